"""From the text of a prompt to the token ids of a sample."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from ....artifacts import KvcalError
from .sample import Sample


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids, without special tokens."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def split_tokens(tokenizer: Any, context: str, question: str) -> tuple[list[int], list[int]]:
    """The tokens of `context + question`, parted where the question begins.

    The context keeps the tokens that it has without the question, too. A token that reaches over the seam belongs to
    the question, so that no part of a question is read with a context.
    """
    whole, alone = encode(tokenizer, context + question), encode(tokenizer, context)
    both = zip(whole, alone, strict=False)
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], both))
    return whole[:same], whole[same:]


def text_sample(
    tokenizer: Any, bos: Sequence[int], context: str, question: str, answers: Sequence[str], label: str
) -> Sample:
    """A sample of texts that are joined as they are.

    Args:
        bos: what stands before the context and is not in its text.

    Raises:
        KvcalError: a tokenizer that leaves nothing of the context or of the question.
    """
    read, asked = split_tokens(tokenizer, context, question)
    for name, ids in (("context", read), ("question", asked)):
        if not ids:
            raise KvcalError(f"{label}: the tokenizer makes no token of its {name}: give one that it knows")
    # Where the question's last token and the answer's first would merge, the answer is encoded alone.
    said = ("" if question[-1:].isspace() else " ") + answers[0]
    before, after = encode(tokenizer, question), encode(tokenizer, question + said)
    reference = after[len(before) :] if after[: len(before)] == before else encode(tokenizer, said)
    return Sample((*bos, *read), tuple(asked), tuple(answers), tuple(reference), label=label)
