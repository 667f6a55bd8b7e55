"""lm-evaluation-harness tasks decoded through a compressed cache.

    python -m kvcal.calibrate.harness --model kvcal --model_args pretrained=demo,artifact=DIR,method=loki,keep=0.25 …

is `lm_eval` with one more model; everything else is its own. docs/lm-eval.md has examples, `--help` the arguments.
Three kinds of requests, and what is compressed:

- generation: prompts are prefilled densely, which also gives the first new token; every later one is decoded.
- log-likelihood: the harness scores it by one forward pass, which never decodes, and every method would look alike.
  Here all of the context but its last token is prefilled densely, and the rest is fed token by token, so that
  every scored token is predicted by a decoded step, also the single one of a multiple choice.
- rolling log-likelihood: likewise, with a context of one token: the whole text is decoded.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..artifacts import Artifact, KvcalError
from ..runtime import CompressedCache, compress, load
from ..runtime.integration.rotation import refuse_change, rotations
from .evaluation.grid import decoding, sharing
from .harness_help import arguments
from .models import LoadedModel, compare_weights, load_model

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "lm_eval":
        raise
    lacking = KvcalError("lm-eval is not installed: run pip install 'kvcal[calibrate,eval]'")
    if __name__ == "__main__":
        print(f"error: {lacking}", file=sys.stderr)
        sys.exit(2)
    raise lacking from error

_OF_THE_HARNESS = (
    "max_length",
    "truncation",
    "add_bos_token",
    "prefix_token_id",
    "think_end_token",
    "enable_thinking",
    "chat_template_args",
)
"""Arguments of HFLM that do not concern how the model is loaded."""


@register_model("kvcal")
class CompressedLM(HFLM):
    """A model of the harness whose keys and values are held by one of METHODS."""

    def __init__(
        self,
        pretrained: str | LoadedModel,
        artifact: str | os.PathLike[str] | Artifact | None = None,
        method: Any = "loki",
        *,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int | str = 1,
        max_batch_size: int = 64,
        **settings: Any,
    ):
        """
        Args:
            pretrained: as `load_model` takes it (alias, Hub id, folder, GGUF file), or what it returned.
            artifact: folder or Hub id, or loaded; for the methods that need one.
            device, dtype: see `load_model`; of no effect on a model that is loaded.
            batch_size: rows decoded together, or "auto".
            settings: the method's parameters, as `compress` takes them, and of HFLM's arguments max_length,
                truncation, add_bos_token, prefix_token_id, think_end_token, enable_thinking, chat_template_args.

        Raises:
            KvcalError: not found, or settings that this model or artifact does not allow.
        """
        if device == "cuda:0" and not torch.cuda.is_available():
            device = "auto"  # the harness's own default, on machines of any kind
        loaded = pretrained if isinstance(pretrained, LoadedModel) else load_model(pretrained, device, dtype)
        passed_on = {name: settings.pop(name) for name in _OF_THE_HARNESS if name in settings}
        if artifact is not None and not isinstance(artifact, Artifact):
            artifact = load(artifact)
        if artifact is not None and (note := compare_weights(artifact, loaded.model, loaded.exact)):
            logging.getLogger("kvcal").warning(note)
        self.compression: dict[str, Any] = {"artifact": artifact, "method": method, **settings}
        self._setting = {"method": method, **settings}
        with sharing(loaded.model, artifact, self._setting):
            CompressedCache(loaded.model, artifact, **decoding(self._setting))  # raises now where settings do not fit
        self._source = loaded.source
        super().__init__(
            loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size, max_batch_size=max_batch_size, **passed_on
        )

    def _model_generate(self, *args: Any, **kwargs: Any) -> Tensor:
        with compress(self.model, **self.compression):
            rows: Tensor = super()._model_generate(*args, **kwargs)
        return rows

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding gives it) of each (texts, context, continuation)."""
        from tqdm import tqdm

        if not requests:
            return []
        # Too long a row loses the beginning of its context, as in HFLM.
        pairs = [((c + k)[-(self.max_length + 1) :][: -len(k)], k) for _, c, k in requests]
        changing = rotations(self.model)
        for context, continuation in pairs:
            first, last = max(1, len(context) - 1), len(context) + len(continuation) - 1
            refuse_change(changing, self.model, first, last)
        batch_size = override_bs or self.batch_size
        if batch_size == "auto":
            batch_size = self._detect_batch_size([max(requests, key=lambda request: len(request[1] + request[2]))])
        answers: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(pairs), disable=disable_tqdm, desc="Decoding loglikelihood requests") as bar:
            for rows in equal_contexts(pairs, batch_size):
                with sharing(self.model, self.compression["artifact"], self._setting):
                    scored = self._score([pairs[row] for row in rows])
                for row, answer in zip(rows, scored, strict=True):
                    answers[row] = answer
                    texts = requests[row][0]
                    if texts is not None:
                        self.cache_hook.add_partial("loglikelihood", texts, answer)
                bar.update(len(rows))
        return [answers[row] for row in range(len(pairs))]

    @torch.no_grad()
    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Answers to pairs of context and continuation, decoded as one batch: their contexts are equally long."""
        longest = max(len(continuation) for _, continuation in pairs)
        context = torch.tensor([context for context, _ in pairs], device=self.device)
        rows = [continuation + continuation[-1:] * (longest - len(continuation)) for _, continuation in pairs]
        continuation = torch.tensor(rows, device=self.device)
        cache = CompressedCache(self.model, self.compression["artifact"], **decoding(self._setting))
        if context.shape[1] > 1:
            self.model(context[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        fed = torch.cat((context[:, -1:], continuation[:, :-1]), 1)
        scores, hits = [], []
        for position in range(longest):
            column = slice(position, position + 1)
            logits = self.model(fed[:, column], past_key_values=cache, use_cache=True).logits[:, -1]
            scores.append(logits.float().log_softmax(-1).gather(1, continuation[:, column]))
            hits.append(logits.argmax(-1, keepdim=True) == continuation[:, column])
        score, hit = torch.cat(scores, 1), torch.cat(hits, 1)
        return [
            (float(score[row, : len(pair[1])].sum()), bool(hit[row, : len(pair[1])].all()))
            for row, pair in enumerate(pairs)
        ]

    def get_model_info(self) -> dict[str, Any]:
        """For the harness's results file."""
        artifact = self.compression["artifact"]
        return {
            **super().get_model_info(),
            "model_source": self._source.id,
            "model_revision": self._source.revision,
            "kvcal": {**self.compression, "artifact": artifact.content_hash if artifact else None},
        }


def equal_contexts(pairs: Sequence[tuple[list[int], list[int]]], batch_size: int) -> list[list[int]]:
    """Batches of pairs, by number, whose contexts are equally long, longest first: nothing is padded on the left.

    The choices of a question share its context, and so a batch.
    """
    order = sorted(range(len(pairs)), key=lambda row: (-len(pairs[row][0]), pairs[row][0], -len(pairs[row][1])))
    batches: list[list[int]] = []
    for row in order:
        last = batches[-1] if batches else []
        if last and len(last) < batch_size and len(pairs[last[0]][0]) == len(pairs[row][0]):
            last.append(row)
        else:
            batches.append([row])
    return batches


def main() -> int:
    """`lm_eval`'s command line with our model in it."""
    from lm_eval.__main__ import cli_evaluate

    try:
        if {"-h", "--help"} & set(sys.argv[1:]):
            try:
                cli_evaluate()
            finally:
                print(f"\n{arguments(_OF_THE_HARNESS)}")
        else:
            cli_evaluate()
    except KvcalError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
