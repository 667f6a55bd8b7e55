"""The same prompt continued with the whole cache and with a compressed one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ...artifacts import Artifact
from ...runtime import CompressedCache
from .grid import decoding, sharing
from .prompts import Prompts


def side_by_side(
    model: Any, tokenizer: Any, artifact: Artifact, prompts: Prompts, settings: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The first window and the first question of `prompts`, continued under each setting.

    Returns:
        [{"prompt": its end, "continuations": [{"setting", "text", "resident_bytes", "bytes_per_step"}, …]}, …].
    """
    asked: list[tuple[list[int], list[int], int]] = []
    if prompts.windows:
        asked.append((prompts.windows.prefixes[0].tolist(), [], 32))
    if prompts.tasks:
        sample = prompts.tasks[0].samples[0]
        asked.append((list(sample.context), list(sample.question), len(sample.reference)))
    report = []
    for prefix, question, tokens in asked:
        found = [
            continue_prompt(model, tokenizer, artifact, prefix, question, tokens=tokens, **setting)
            for setting in settings
        ]
        report.append(
            {
                "prompt": tokenizer.decode(question or prefix[-24:]),
                "continuations": [
                    {"setting": dict(setting), **asdict(each)} for setting, each in zip(settings, found, strict=True)
                ],
            }
        )
    return report


@dataclass(frozen=True)
class Continuation:
    """What `generate()` wrote after a prompt, greedily."""

    text: str
    resident_bytes: int
    """Of the cache at the end."""
    bytes_per_step: int
    """Read of the cache by the last step."""


def continue_prompt(
    model: Any,
    tokenizer: Any,
    artifact: Artifact | None,
    prompt: Sequence[int],
    continuation: Sequence[int] = (),
    *,
    tokens: int = 40,
    **setting: Any,
) -> Continuation:
    """Prefill `prompt`, decode `continuation` as given, then `tokens` more greedily.

    Args:
        continuation: tokens that go through the compressed cache one by one, e.g. a question.
        setting: `method` and its parameters.
    """
    with sharing(model, artifact, setting):
        return _continue(
            model, tokenizer, CompressedCache(model, artifact, **decoding(setting)), prompt, continuation, tokens
        )


def _continue(
    model: Any, tokenizer: Any, cache: CompressedCache, prompt: Sequence[int], continuation: Sequence[int], tokens: int
) -> Continuation:
    ids = torch.tensor([list(prompt)], device=model.device)
    given = torch.tensor([list(continuation)], dtype=torch.int64, device=model.device)
    with torch.no_grad():
        if given.shape[1]:
            model(ids, past_key_values=cache, logits_to_keep=1)
            for at in range(given.shape[1] - 1):
                model(given[:, at : at + 1], past_key_values=cache, logits_to_keep=1)
    whole = torch.cat((ids, given), 1)
    out = model.generate(
        whole,
        attention_mask=torch.ones_like(whole),
        past_key_values=cache,
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    text = tokenizer.decode(out[0, whole.shape[1] :], skip_special_tokens=True)
    return Continuation(text, cache.resident_bytes(), cache.bytes_read())
