"""A batch after its dense prefill, from which every setting decodes.

The question of a task is asked in one of two ways. "decoded": token by token through the setting's cache, so that also
the first word of an answer comes from a decoded step. "prefilled": densely, with the context, as papers do it. Methods
that evict tokens would then know the question when they choose. So, unless they are `query_aware`, their prefill ends
before the question, which goes through what is left of the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...artifacts import Artifact
from ...runtime import CompressedCache
from .attention_error import AttentionProbe, History
from .costs import Costs
from .decoding import Answer, RaggedCalls, decode_answers, ends_of
from .grid import Setting
from .measurements import Batch, Measured, samples_of
from .prompts import Prompts
from .tasks.sample import Sample, Task
from .tasks.scoring import SCORINGS

DECODED, PREFILLED = "decoded", "prefilled"
QUESTIONS = (DECODED, PREFILLED)
MOST_ASKED = 300
"""Characters of a question that are kept beside its answer: its end, where most tasks ask."""
Step = Callable[[], None]


@dataclass(frozen=True)
class PrefilledWindows:
    """Pieces of text after the dense prefill of their prefixes."""

    model: Any
    cache: Any
    """A `full` cache of the prefixes; only ever copied from."""
    logits: Tensor
    """[B, vocabulary] at the last prefix position."""
    continuations: Tensor
    """[B, C] int64."""
    histories: Mapping[int, History]
    """For the probe, by layer."""

    @torch.no_grad()
    def measure(self, artifact: Artifact | None, setting: Setting, step: Step) -> Measured:
        """Feed the continuation token by token through a cache of its own.

        Args:
            setting: what the cache is made from, see `grid.decoding`.
            step: called after each decoded step.
        """
        cache = CompressedCache(self.model, artifact, **setting)
        cache.adopt(self.cache)
        cache.observer = probe = AttentionProbe(self.histories)
        logits, device = self.logits, self.continuations.device
        nll, costs = [], Costs(cache, device)
        for position in range(self.continuations.shape[1]):
            if position:
                fed = self.continuations[:, position - 1 : position]
                with costs.of_a_step(probe):
                    logits = self.model(fed, past_key_values=cache, use_cache=True).logits[:, -1]
                step()
            token = self.continuations[:, position : position + 1]
            nll.append(-logits.double().log_softmax(-1).gather(1, token))
        error, mass = ({str(layer): rows for layer, rows in found.items()} for found in probe.result())
        return costs.measured(nll=torch.cat(nll, 1).sum(1).tolist(), error=error, mass=mass)


@dataclass(frozen=True)
class PrefilledSamples:
    """Samples of a task after the dense prefill of their contexts."""

    model: Any
    task: Task
    samples: Mapping[int, Sample]
    """By their index in the task."""
    tokenizer: Any
    contexts: tuple[Any, RaggedCalls]
    """A `full` cache, and the calls that filled it; only ever copied from."""
    asked: tuple[Any, RaggedCalls, Tensor] | None
    """The same after the questions, and the logits there [B, vocabulary]; None: the questions are decoded."""

    @torch.no_grad()
    def measure(self, artifact: Artifact | None, setting: Setting, step: Step) -> Measured:
        """Ask and answer through a cache of its own; see `PrefilledWindows.measure`."""
        cache = CompressedCache(self.model, artifact, **setting)
        questions: list[Sequence[int]] = [sample.question for sample in self.samples.values()]
        logits = None
        if self.asked is None:
            cache.adopt(self.contexts[0])
            calls = self.contexts[1].copy()
        elif all(method.keeps_all_tokens or method.query_aware for method in cache.blueprint.methods.values()):
            cache.adopt(self.asked[0])
            calls, logits = self.asked[1].copy(), self.asked[2]
        else:
            cache.adopt(self.contexts[0])
            calls = self.contexts[1].copy()
            cache.make_room()
            logits = calls(cache, questions)
        scoring, ends = SCORINGS[self.task.scoring], ends_of(self.model)
        answers = [
            Answer(sample, self.tokenizer, scoring, ends, self.task.new_tokens) for sample in self.samples.values()
        ]
        costs = Costs(cache, self.model.device)

        def decode(fed: Sequence[Sequence[int]], ended: Sequence[bool]) -> Tensor:
            with costs.of_a_step():
                found = calls(cache, fed, ended)
            step()
            return found

        decode_answers(decode, answers, questions if logits is None else [[]] * len(questions), logits)
        return costs.measured(
            samples=[answer_as_json(index, answer) for index, answer in zip(self.samples, answers, strict=True)]
        )


@torch.no_grad()
def prefill(
    model: Any, prompts: Prompts, batch: Batch, tokenizer: Any, question: str, recorded: Mapping[str, Any]
) -> PrefilledWindows | PrefilledSamples:
    """
    Args:
        tokenizer: of the model; needed for tasks.
        question: one of `QUESTIONS`.
        recorded: settings of `full`, see `grid.recorded`. To record attention takes longer than attending.
    """
    cache = CompressedCache(model, None, "full", **recorded)
    asked = samples_of(prompts, batch)
    if asked is None:
        windows = prompts.windows
        assert windows is not None
        rows = slice(batch.first, batch.first + batch.rows)
        out = model(windows.prefixes[rows].to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
        continuations = windows.continuations[rows].to(model.device)
        histories = {
            layer: History(store.tokens["key"].view, store.tokens["value"].view, continuations.shape[1])
            for layer, store in cache.stores.items()
        }
        return PrefilledWindows(model, cache, out.logits[:, -1], continuations, histories)
    task, samples = asked
    calls = RaggedCalls(model, len(samples))
    calls(cache, [sample.context for sample in samples.values()])
    if question == DECODED:
        return PrefilledSamples(model, task, samples, tokenizer, (cache, calls), None)
    whole = CompressedCache(model, None, "full", **recorded)
    whole.adopt(cache)
    after = calls.copy()
    logits = after(whole, [sample.question for sample in samples.values()])
    return PrefilledSamples(model, task, samples, tokenizer, (cache, calls), (whole, after, logits))


def answer_as_json(index: int, answer: Answer) -> dict[str, Any]:
    sample = answer.sample
    # A token is a character at least, but for those that are parts of one.
    asked = str(answer.tokenizer.decode(list(sample.question[-MOST_ASKED:])))
    return {
        "index": index,
        "question": asked if len(asked) <= MOST_ASKED else "…" + asked[1 - MOST_ASKED :],
        "prediction": answer.prediction,
        "answers": list(sample.answers),
        "score": answer.score,
        "depth": sample.depth,
    }
