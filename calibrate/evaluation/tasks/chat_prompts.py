"""A context and a question as a chat: the text of a model's template, parted where the question begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ....artifacts import KvcalError
from ....runtime import hub
from ...chats import Chat

_SEAM = "kvcalseam"


def has_template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def as_chat(
    tokenizer: Any, history: Sequence[Mapping[str, Any]], context: str, question: str, label: str
) -> tuple[str, str]:
    """The chat's text before the question, and the text from there to where the model's answer begins.

    Args:
        history: messages before the user's last one, which is `context + question`. Templates that let a model think
            first are told not to.

    Raises:
        KvcalError: a template that refuses the chat or leaves out a part of it.
    """
    last = {"role": "user", "content": context + _SEAM + question}
    chat = Chat([*history, last], None, label)
    try:
        text = chat.render(tokenizer, chat.messages, add_generation_prompt=True, enable_thinking=False)
    except Exception as error:  # templates raise what they like
        raise KvcalError(
            f"{label}: the model's chat template refuses the chat ({hub.one_line(error)}): change the messages, or "
            "give --no-chat-template"
        ) from None
    before, found, after = text.partition(_SEAM)
    left_out = chat.left_out(tokenizer, text) if found else ["the user"]
    if left_out or _SEAM in after:
        who = f"leaves out what {left_out[0]} says" if left_out else "repeats the question"
        raise KvcalError(f"{label}: the model's chat template {who}: change the messages, or give --no-chat-template")
    return before, after
