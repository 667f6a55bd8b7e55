from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from kvcal.artifacts import KvcalError
from kvcal.calibrate.blocks import make_blocks
from kvcal.calibrate.chats import read_chat
from kvcal.calibrate.data import open_data

BOS, EOS = 256, 257
PLAIN = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
WITH_TOKENS = "{{ bos_token }}" + PLAIN + "{{ eos_token }}"
CALLS = (
    "{% for t in tools or [] %}<{{ t.name }}>{% endfor %}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}"
    "{% endfor %}"
)
ALTERNATING = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ m.content }}{% endfor %}"
)
DROPS = "{% for m in messages if m.role in ('user', 'assistant') %}{{ m.content }}{% endfor %}"
STRIPS = "{% for m in messages %}[{{ m.role }}]{{ m.content.split('</think>')[-1].strip() | tojson }}{% endfor %}"
HOW = {"role": "user", "content": "How?"}
SO = {"role": "assistant", "content": "So."}


@pytest.fixture
def tokenizer(tiny_tokenizer: Any) -> Any:
    return copy.deepcopy(tiny_tokenizer)


def _text(tokenizer: Any, template: str, messages: Any, tools: Any = None) -> str:
    tokenizer.chat_template = template
    return read_chat(messages, tools, "a.jsonl: row 1").text(tokenizer)


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([HOW, SO], "[user]How?[assistant]So."),
        ([{"from": "human", "value": "How?"}, {"from": "gpt", "value": "So."}], "[user]How?[assistant]So."),
        ([{"from": "system", "value": "S"}, {"from": "Human", "value": "H"}], "[system]S[user]H"),
        ([{"role": "system", "content": "S", "name": None}, HOW], "[system]S[user]How?"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b", "x": None}, "c"]}],
            "[user]a\nb\nc",
        ),
        ([HOW, {"role": "assistant", "content": None}], "[user]How?[assistant]"),
        ([HOW, {"from": "function", "value": "5"}], "[user]How?[tool]5"),
        ([{"role": "narrator", "content": "Once"}], "[narrator]Once"),
    ],
    ids=["openai", "sharegpt", "system", "null-name", "parts", "no-content", "function", "own-role"],
)
def test_forms(tokenizer: Any, messages: Any, expected: str) -> None:
    assert _text(tokenizer, PLAIN, messages) == expected


@pytest.mark.parametrize("arguments", [{"x": 1}, '{"x": 1}'], ids=["object", "json-text"])
def test_tool_calls(tokenizer: Any, arguments: Any) -> None:
    called = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    messages = [HOW, called, {"role": "tool", "content": "5", "tool_call_id": None}]
    assert (
        _text(tokenizer, CALLS, messages, [{"name": "f", "unit": None}]) == '<f>[user]How?[assistant]f({"x": 1})[tool]5'
    )
    with pytest.raises(
        KvcalError, match="row 1: the model's chat template leaves out what assistant by tool calls says"
    ):
        _text(tokenizer, PLAIN, messages)


@pytest.mark.parametrize(
    ("messages", "template", "message"),
    [
        ([{"role": "system", "content": "S"}, HOW], ALTERNATING, "refuses the chat .System role not supported"),
        ([HOW, {"role": "tool", "content": "5"}], DROPS, "leaves out what tool says"),
        ([HOW], None, "chats need a chat template, which this model's tokenizer has not"),
        ([HOW], "{% for", "refuses the chat"),
        ([{"from": "gpt5", "value": "x"}], PLAIN, "a message from 'gpt5': known are human"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], PLAIN, "a part of type 'image_url'"),
        ([{"role": "user", "content": 5}], PLAIN, "content that is int"),
        ([{"role": None, "content": "x"}], PLAIN, "without a role"),
        ([HOW, {"text": "x"}], PLAIN, "no chat: each message needs role and content"),
        ([{**SO, "tool_calls": [{"id": 1}]}], CALLS, "tool_calls without a function"),
    ],
)
def test_what_cannot_be_a_text_of_the_chat_is_said(tokenizer: Any, messages: Any, template: Any, message: str) -> None:
    with pytest.raises(KvcalError, match=message) as caught:
        _text(tokenizer, template, messages)
    assert str(caught.value).startswith("a.jsonl: row 1: ")


def test_a_template_may_rewrite_what_is_said(tokenizer: Any) -> None:
    thought = {"role": "assistant", "content": '<think>hm</think> "So"'}
    assert _text(tokenizer, STRIPS, [HOW, thought]) == '[user]"How?"[assistant]"\\"So\\""'


def test_a_template_that_writes_the_date_writes_the_same_one_every_day(tokenizer: Any) -> None:
    template = "{%- set day = strftime_now('%d %b %Y') -%}{{ day }}, {{ strftime_now('%Y-%m-%d') }}: " + PLAIN
    assert _text(tokenizer, template, [HOW]) == "26 Jul 2024, 2024-07-26: [user]How?"


def test_tokens_of_chats(tokenizer: Any, tmp_path: Path) -> None:
    """One BOS at the beginning of a block, one EOS between chats, whoever writes them."""
    rows = [
        {"id": f"q{number}", "conversations": [{"from": "human", "value": f"tides {number}"}]} for number in range(3)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chats = [f"[user]tides {number}" for number in range(3)]
    for template, ending in ((PLAIN, []), (WITH_TOKENS, [EOS])):
        tokenizer.chat_template = template
        blocks = make_blocks(open_data(tmp_path / "a.jsonl"), tokenizer, num_tokens=1000, seq_len=8)
        text = blocks.ids[:, 1:][blocks.attended[:, 1:]].tolist()
        expected: list[int] = []
        for chat in chats:
            expected += ([EOS] if expected else []) + tokenizer(chat, add_special_tokens=False)["input_ids"]
        assert text == expected + ending and (blocks.ids[:, 0] == BOS).all()
    assert blocks.source["documents"] == 3


def test_bos_of_the_template_stays_where_blocks_have_none(tokenizer: Any, tmp_path: Path) -> None:
    from tokenizers import processors

    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    tokenizer.chat_template = WITH_TOKENS
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [HOW]}) * 2)
    blocks = make_blocks(open_data(tmp_path / "a.jsonl"), tokenizer, num_tokens=26, seq_len=13)
    body = tokenizer("[user]How?", add_special_tokens=False)["input_ids"]
    assert blocks.ids.flatten().tolist() == [BOS, *body, EOS, BOS, *body, EOS, EOS, EOS]
