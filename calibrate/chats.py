"""Chats as data sets hold them, and the text that a tokenizer's chat template makes of them."""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..artifacts import KvcalError
from ..runtime import hub
from .documents import check_characters

ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "assistant", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "function_response", "observation"), "tool"),
    "system": "system",
}
"""What stands under `from` in ShareGPT's form -> role."""
_TEXT_PARTS = ("text", "input_text", "output_text")
_DATED = "strftime_now"
"""The function by which templates write today's date: the same data would be another text tomorrow."""
_DAY = datetime.datetime(2024, 7, 26)


@dataclass(frozen=True)
class Chat:
    """One document of messages. `text` is what a tokenizer's template writes for it."""

    messages: Sequence[Mapping[str, Any]]
    """role, content (always a string) and whatever else the template may read: tool_calls, name, …"""
    tools: Sequence[Any] | None
    label: str
    """Where it stands, for messages."""

    def text(self, tokenizer: Any) -> str:
        """Raises KvcalError: no template, or one that refuses the chat or leaves out what somebody said."""
        if not getattr(tokenizer, "chat_template", None):
            raise KvcalError(
                f"{self.label}: chats need a chat template, which this model's tokenizer has not: give the model with "
                "one (mostly the instruct version), or --text-column with a column of text"
            )
        try:
            text = self.render(tokenizer, self.messages)
        except Exception as error:  # a template may raise anything
            raise KvcalError(
                f"{self.label}: the model's chat template refuses the chat ({hub.one_line(error)}): leave it out, or "
                "give --text-column with a column of text"
            ) from None
        check_characters(text, self.label)
        for role in self.left_out(tokenizer, text):
            raise KvcalError(
                f"{self.label}: the model's chat template leaves out what {role} says: convert the chat to roles that "
                "it knows, or give --text-column with a column of text"
            )
        return text

    def render(self, tokenizer: Any, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """What the template writes for these messages in place of the chat's.

        Args:
            options: the template's.
        """
        template = tokenizer.get_chat_template(None, self.tools)
        if _DATED in template:
            template = _always_the_same_day() + template
        chat = [dict(message) for message in messages]
        return str(
            tokenizer.apply_chat_template(chat, tools=self.tools, chat_template=template, tokenize=False, **options)
        )

    def left_out(self, tokenizer: Any, text: str) -> list[str]:
        """Roles whose messages or tool calls are not in the text.

        Marks are rendered in place of the contents, which a template may rewrite (strip thoughts, quote tools).
        """
        marks = [f"kvcal{number}mark" if message["content"] else "" for number, message in enumerate(self.messages)]
        marked = [{**message, "content": mark} for message, mark in zip(self.messages, marks, strict=True)]
        found = []
        with contextlib.suppress(Exception):  # a template may refuse the marks where it took the contents
            seen = self.render(tokenizer, marked)
            found = [str(message["role"]) for message, mark in zip(marked, marks, strict=True) if mark not in seen]
        for message in self.messages:
            names = [call["function"]["name"] for call in message.get("tool_calls", ())]
            found += [f"{message['role']} by tool calls" for name in names if str(name) not in text]
        return found


@functools.cache
def _always_the_same_day() -> str:
    """A macro in place of the function, since templates are handed plain data only."""
    codes = (f"%{code}" for code in "aAbBdHIjmMpSUwWyYcxXZz")
    day = "".join(f"|replace({code!r}, {_DAY.strftime(code)!r})" for code in codes)
    return f"{{%- macro {_DATED}(format) -%}}{{{{ format{day} }}}}{{%- endmacro -%}}"


def looks_like_chat(value: Any) -> bool:
    """A list of messages, in OpenAI's form (role, content) or in ShareGPT's (from, value)."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, dict) and ("role" in item or {"from", "value"} <= item.keys()) for item in value)
    )


def read_chat(value: Sequence[Any], tools: Any, label: str) -> Chat:
    """Raises KvcalError: not messages, unknown roles, contents that are no text."""
    if not looks_like_chat(value):
        raise KvcalError(f"{label}: no chat: each message needs role and content, or from and value")
    if isinstance(tools, str):
        tools = _parsed(tools)
    tools = _without_nulls(tools) if isinstance(tools, list) else None
    return Chat([_message(item, label) for item in value], tools or None, label)


def _message(item: Mapping[str, Any], label: str) -> dict[str, Any]:
    role = item.get("role") or item.get("from")
    if not isinstance(role, str):
        raise KvcalError(f"{label}: a message without a role: give role and content, or from and value")
    if "from" in item and not item.get("role"):
        if role.strip().lower() not in ROLES:
            raise KvcalError(f"{label}: a message from {role!r}: known are {', '.join(ROLES)}")
        content = item.get("value")
    else:
        content = item.get("content")
    role = ROLES.get(role.strip().lower(), role)
    more = {
        key: _without_nulls(value) for key, value in item.items() if key not in ("role", "from", "content", "value")
    }
    message = {"role": role, "content": _text(content, label), **{k: v for k, v in more.items() if v is not None}}
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(message["tool_calls"], label)
    return message


def _text(content: Any, label: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise KvcalError(f"{label}: content that is {type(content).__name__}, not text or a list of parts")
    texts = []
    for part in content:
        if isinstance(part, dict) and part.get("type", "text") in _TEXT_PARTS:
            part = part.get("text")
        if not isinstance(part, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise KvcalError(f"{label}: a part of type {kind!r}: only text can be calibrated on, leave the chat out")
        texts.append(part)
    return "\n".join(texts)


def _tool_calls(calls: Any, label: str) -> list[dict[str, Any]]:
    """Arguments as objects, which templates expect; OpenAI's files have them as JSON in a string."""
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or "name" not in function:
            raise KvcalError(f"{label}: tool_calls without a function and its name")
        arguments = function.get("arguments", {})
        parsed = _parsed(arguments) if isinstance(arguments, str) else arguments
        function = {**function, "arguments": parsed if isinstance(parsed, dict) else arguments}
        found.append({**(call if "function" in call else {"type": "function"}), "function": function})
    return found


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _without_nulls(value: Any) -> Any:
    """Tables give every row all keys that any row has, empty ones as null; templates would print them."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
