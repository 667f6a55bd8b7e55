"""RULER's tasks at given lengths, in the tokens of the model that is evaluated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ....artifacts import KvcalError
from ...blocks import bos_tokens
from .chat_prompts import as_chat, has_template
from .encoding import encode, text_sample
from .ruler_package import PACKAGE, RulerTask, installed_version, ruler_tasks
from .ruler_process import Scripts, TooShort, Written
from .sample import Sample, Task
from .scoring import SCORINGS

_QUESTION, _PREFIX = "\x01", "\x02"
"""Marks in the templates, before the question and before the words that the answer begins with. No text has them."""
_ROUNDS = 8
"""Attempts at asking a script for less, where it wrote more than it was asked for."""

Progress = Callable[[int, int], None]


def make_ruler_tasks(
    names: Sequence[str],
    tokenizer: Any,
    lengths: Sequence[int],
    episodes: int,
    seed: int,
    chat_template: bool = False,
    progress: Progress | None = None,
) -> tuple[list[Task], dict[str, Any]]:
    """Samples whose context, question and answer together are at most `length` tokens; and what they were made by.

    Args:
        names: of `NAMES`.
        chat_template: put the prompt into the model's chat template, if it has one, and the beginning of the answer
            behind it.
        progress: called with (samples made, all).

    Raises:
        KvcalError: the package is not installed, or tasks cannot be held in a length.
    """
    by_name = ruler_tasks()
    unknown = {by_name[name].scoring for name in names} - SCORINGS.keys()
    if unknown:
        raise KvcalError(
            f"{PACKAGE} {installed_version()} scores by {', '.join(sorted(unknown))}, which kvcal does not"
        )
    chat = chat_template and has_template(tokenizer)
    total, done = len(names) * len(lengths) * episodes, 0
    found: dict[str, Task] = {}
    made_by: dict[str, dict[str, Any]] = {}

    def sample() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(min(done, total), total)

    for kind, alike in groupby(sorted(names, key=lambda name: by_name[name].kind), key=lambda name: by_name[name].kind):
        with Scripts(kind) as scripts:
            maker = _Maker(scripts, tokenizer, episodes, seed, chat, sample)
            for name, length in [(name, length) for name in alike for length in lengths]:
                try:
                    task, source = maker.make(name, by_name[name], length)
                except TooShort as error:
                    if "IndexError" in str(error):
                        raise KvcalError(f"{name} has no {episodes} questions: give fewer --episodes") from None
                    continue
                found[task.key], made_by[task.key] = task, source
    keys = [f"{name}@{length}" for name in names for length in lengths]
    if missing := [key for key in keys if key not in found]:
        raise KvcalError(
            f"{', '.join(missing)}: cannot be held in so few tokens by this tokenizer: give longer --lengths, or leave "
            "them out"
        )
    origin = {"package": PACKAGE, "version": installed_version(), "seed": seed, "chat_template": chat}
    return [found[key] for key in keys], {**origin, "tasks": [made_by[key] for key in keys]}


@dataclass(frozen=True)
class _Maker:
    """Makes tasks of one script."""

    scripts: Scripts
    tokenizer: Any
    episodes: int
    seed: int
    chat: bool
    sample: Callable[[], None]
    """Called before each sample."""

    def make(self, name: str, ruler_task: RulerTask, length: int) -> tuple[Task, dict[str, Any]]:
        """A task, and what it was made by.

        Asks for less until all of a sample fits: some scripts count without the answer, or change words afterwards. The
        length that a script is given stays as it is, since scripts choose other settings below 4096: the tokens to
        spare are added to each count instead.

        Raises:
            TooShort: no sample fits, or less than half of the length would be filled.
        """
        spare = len(bos_tokens(self.tokenizer))
        if self.chat:
            spare = len(encode(self.tokenizer, "".join(as_chat(self.tokenizer, (), "", "x", name))))
        written, samples = self._write(name, ruler_task, length, spare)
        for tries in range(_ROUNDS):
            over = max(map(_tokens, samples)) + ruler_task.new_tokens - length
            if over <= 0:
                break
            spare += over << tries  # a script that leaves no room for the answer notices only more than that room
            written, samples = self._write(name, ruler_task, length, spare)
        else:
            raise TooShort("too long")
        sizes = [_tokens(sample) for sample in samples]
        if 2 * sum(sizes) < (length - ruler_task.new_tokens) * len(sizes):
            raise TooShort("text comes in larger pieces")
        source = {"task": f"{name}@{length}", "arguments": ruler_task.arguments, "tokens": [min(sizes), max(sizes)]}
        if written.sentences is not None:
            source["sentences"] = written.sentences
        return Task(name, length, tuple(samples), ruler_task.new_tokens, ruler_task.scoring), source

    def _write(self, name: str, ruler_task: RulerTask, length: int, spare: int) -> tuple[Written, list[Sample]]:
        template = ruler_task.template.replace("{context}", "{context}" + _QUESTION)
        prefix = _PREFIX + ruler_task.answer_prefix
        arguments = {
            **{"max_seq_length": length, "tokens_to_generate": ruler_task.new_tokens, "num_samples": self.episodes},
            **{"random_seed": self.seed % 2**32, "template": template + prefix, **ruler_task.arguments},
        }
        templates = {ruler_task.kind: {"template": template, "answer_prefix": prefix}}
        written = self.scripts.run(
            arguments, templates, lambda text: len(encode(self.tokenizer, _unmarked(text))) + spare, self.sample
        )
        return written, [self._sample(row, f"{name}, sample {at}") for at, row in enumerate(written.rows)]

    def _sample(self, row: dict[str, Any], label: str) -> Sample:
        answers = row["outputs"]
        if not answers or not all(answer.strip() for answer in answers):
            raise TooShort("no room for what is asked")
        context, question, prefix = parted(row["input"])
        bos = [] if self.chat else bos_tokens(self.tokenizer)
        if self.chat:
            context, question = as_chat(self.tokenizer, (), context, question, label)
            prefix = prefix.lstrip() if question[-1:].isspace() else prefix
        return text_sample(self.tokenizer, bos, context, question + prefix, answers, label)


def parted(text: str) -> tuple[str, str, str]:
    """Context, question, and what the answer begins with, parted at the last of each mark: examples in the prompt have
    marks, too."""
    before, _, prefix = text.rpartition(_PREFIX)
    context, _, question = before.rpartition(_QUESTION)
    return _unmarked(context), question, prefix


def _unmarked(text: str) -> str:
    return text.replace(_QUESTION, "").replace(_PREFIX, "")


def _tokens(sample: Sample) -> int:
    return len(sample.context) + len(sample.question)
