"""The parts of the measurement: each writes one JSON, and goes on where it was interrupted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from kvcal.calibrate.rank import rank_report

from .alternatives import alternatives as alternatives_of
from .attention import errors, of_rows, unseen
from .choices import CHOICES
from .decoding import (
    aims,
    by_answers,
    defaults,
    forget,
    methods,
    papers,
    question_seen,
    questions,
    ruler,
    short_blocks,
    text_and_passkey,
    why_loki,
)
from .first_token import first_token, standing_out
from .group_errors import group_errors as group_errors_of
from .memory import resident, to_the_prefix
from .plans import plans as plans_of
from .reservoir import LARGEST, SIZES, TEXTS, by_sample, draws
from .settings import AIMS, GROUP, LEVELS, OF_A_PREFILL, ONLY_CHOSEN, at_equal_bytes, spectral_of
from .shared_basis import shared_basis as shared_basis_of
from .shared_basis_text import rows as rows_of_text
from .shared_basis_text import shared_basis_text as shared_basis_text_of
from .sharing import sharing, uptraining
from .subgen import at_memory, clusterable, estimates, line_retrieval, outside, splits, splits_decoded
from .subjects import UNSEEN, Bench, uncentred
from .thresholds import KINDS, choose, rows_of
from .xcla import xcla

ROWS = 4
"""Pieces of unseen text, of every kind, in the tables of attention errors."""
RANKS = (2, 4, 8, 16, 24, 32, 48, 64)
KEEP = 1 / 16
CLUSTER_TOKENS = 32768
"""Tokens of a calibration that only its reservoir is wanted of."""
LAYER_STRIDE = 10
"""Every so many layers tell how much memory a setting takes, which is the same in all."""


def ranks(bench: Bench, only: str | None = None) -> None:
    """Ranks by layer, of keys before and after the rotary embedding, queries and values."""
    done = Done(bench.path("ranks"))
    for text in bench.subject.texts:
        done.once(text, lambda text=text: rank_report(bench.in_short_blocks(text)))


def tokens(bench: Bench, only: str | None = None) -> None:
    """Ranks and attention errors by the number of calibrated tokens."""
    done = Done(bench.path("tokens"))
    settings = [_loki(16, basis) for basis in ("pca", "score")]
    for size in bench.subject.sizes:
        artifact = bench.in_short_blocks("both", size)
        done.once(f"ranks {size}", lambda artifact=artifact: rank_report(artifact)["model"])
        for text in ("prose", "code"):
            _errors(bench, done, f"{text} {size}", text, settings, artifact)


def bases(bench: Bench, only: str | None = None) -> None:
    """Key PCA and the score basis, fitted before and after the rotary embedding, by rank."""
    done = Done(bench.path("bases"))
    dims = [rank * bench.subject.head_dim // 64 for rank in RANKS]
    for basis in ("pca", "score"):
        for stage in ("post", "pre"):
            settings = [_loki(rank, basis, stage) for rank in dims]
            _errors(bench, done, f"{basis} {stage}", "both", settings, bench.in_short_blocks())
    settings = [_loki(rank, "pca") for rank in dims]
    _errors(bench, done, "pca post, uncentred", "both", settings, uncentred(bench.in_short_blocks()))


def transfer(bench: Bench, only: str | None = None) -> None:
    """Calibration text against evaluation text."""
    done = Done(bench.path("transfer"))
    settings = [_loki(rank, basis) for basis in ("pca", "score") for rank in (8, 16, 32)]
    for calibrated in bench.subject.texts:
        for text in ("prose", "code"):
            _errors(bench, done, f"{calibrated} → {text}", text, settings, bench.in_short_blocks(calibrated))


def attention(bench: Bench, only: str | None = None) -> None:
    """Bytes and attention errors of every method at equal bytes, at every length."""
    for length, levels in bench.subject.lengths.items():
        done = Done(bench.path(f"attention-{length}"))
        for level in dict.fromkeys((*levels, *AIMS.get(length, ()))):
            for setting in at_equal_bytes(LEVELS[level], bench.subject.head_dim, length):
                if level not in levels and setting["method"] != "spectral":
                    continue
                if setting["method"] not in OF_A_PREFILL and only in (None, setting["method"]):
                    key = f"{level} {json.dumps(setting)}"
                    _errors(bench, done, key, "both", [setting], bench.artifact(), length)


def memory(bench: Bench, only: str | None = None) -> None:
    """Bytes held with the settings that decode at the shortest length, of a few layers and one text."""
    length, artifact = bench.subject.shortest, bench.in_short_blocks()
    done = Done(bench.path(f"memory-{length}"))

    def few() -> list[Any]:
        return [to_the_prefix(problem) for problem in _problems(bench, "both", length)[::LAYER_STRIDE]]

    for level in bench.subject.lengths[length]:
        for setting in at_equal_bytes(LEVELS[level], bench.subject.head_dim, length):
            if setting["method"] not in OF_A_PREFILL and only in (None, setting["method"]):
                done.once(json.dumps(setting), lambda setting=setting: resident(few(), setting, artifact))


def block_lengths(bench: Bench, only: str | None = None) -> None:
    """The length of what is decoded against that of the blocks calibrated on."""
    done = Done(bench.path("block-lengths"))
    subject = bench.subject
    dims = subject.head_dim // 4
    for length in subject.lengths:
        spectral = at_equal_bytes(LEVELS["1/8"], subject.head_dim, length)[-1]
        settings = [_loki(dims, "pca"), _loki(dims, "score"), _loki(dims, "pca", "pre"), spectral]
        for seq_len in (subject.short_seq_len, subject.seq_len):
            artifact = bench.artifact(seq_len=seq_len)
            _errors(bench, done, f"blocks of {seq_len}, {length} decoded", "both", settings, artifact, length)


def choices(bench: Bench, only: str | None = None) -> None:
    """What the defaults are chosen from: the same bytes spent in different ways."""
    done = Done(bench.path("choices"))
    for name, settings in CHOICES.items():
        for setting in settings:
            if only in (None, setting["method"]):
                _errors(bench, done, f"{name}: {json.dumps(setting)}", "both", [setting], bench.in_short_blocks())


def thresholds(bench: Bench, only: str | None = None) -> None:
    """The sampled choice of `spectral` beside the exact one, at every length and budget."""
    done = Done(bench.path("thresholds"))
    for length in bench.subject.lengths:
        for kind in KINDS:
            keys = {f"{length}, {level}, {kind}": level for level in ("1/16", "1/8")}
            if all(key in done.found for key in keys):
                continue
            found = of_rows(bench.loaded, rows_of(bench.loaded, kind, ROWS, length))
            for key, level in keys.items():
                setting = at_equal_bytes(LEVELS[level], bench.subject.head_dim, length)[-1]
                done.once(key, lambda found=found, setting=setting: choose(found, setting, bench.artifact()))


def codewords(bench: Bench, only: str | None = None) -> None:
    """`spectral` by the size of the codebook."""
    done = Done(bench.path("codewords"))
    length = bench.subject.shortest
    for level in ("1/16", "1/8"):
        for count in (16, 32, 64, 128, 256):
            settings = spectral_of(bench.subject.head_dim // 2, 2, LEVELS[level], bench.subject.head_dim, length, count)
            if settings:
                _errors(bench, done, f"{level}, {count} codewords", "both", settings, bench.with_codewords(count))


def reservoir(bench: Bench, only: str | None = None) -> None:
    """What is fitted to the reservoir, by the tokens in it."""
    done = Done(bench.path("reservoir"))
    samples = {f"{size}, draw {draw}": (size, draw) for size in SIZES for draw in draws(size)}
    if samples.keys() <= done.found.keys():
        return
    artifact = bench.in_short_blocks(reservoir=LARGEST)
    found = unseen(bench.loaded, UNSEEN["both"], TEXTS, bench.subject.shortest)
    for key, sample in samples.items():
        done.once(key, lambda sample=sample: by_sample(found, artifact, bench.loaded.model, *sample))


def alternatives(bench: Bench, only: str | None = None) -> None:
    """What `spectral` could do otherwise."""
    done, length = Done(bench.path("alternatives")), bench.subject.shortest
    done.once(f"{length}", lambda: alternatives_of(_problems(bench, "both", length), bench.in_short_blocks()))


def plans(bench: Bench, only: str | None = None) -> None:
    """What `calibrate plan` is worth."""
    Done(bench.path("plans")).once(f"{bench.subject.shortest}", lambda: plans_of(bench))


def first_tokens(bench: Bench, only: str | None = None) -> None:
    """What of the loss is the first token, not chosen."""
    done = Done(bench.path("first-token"))
    length = bench.subject.shortest
    done.once("settings", lambda: first_token(_problems(bench, "both", length), bench.in_short_blocks()))
    done.once("logits", lambda: standing_out(_problems(bench, "both", length), bench.in_short_blocks()))
    if bench.subject.seq_len != bench.subject.short_seq_len:
        done.once("logits, long blocks", lambda: standing_out(_problems(bench, "both", length), bench.artifact()))


def shared_basis(bench: Bench, only: str | None = None) -> None:
    """One basis for a group of layers, beside keys and values of fewer bits."""
    length, artifact = bench.subject.shortest, bench.in_short_blocks()
    done = Done(bench.path("shared-basis"))
    done.once("rows", lambda: shared_basis_of(_problems(bench, "both", length), artifact, bench.loaded.model))


def shared_basis_text(bench: Bench, only: str | None = None) -> None:
    """The same by what the model then predicts and answers."""
    prompts, done = text_and_passkey(bench), Done(bench.path("shared-basis-text"))
    if "rows" in done.found:
        return
    shared_basis_text_of(bench, prompts, done.once)
    measured, done.found = done.found, {}
    layers = bench.loaded.model.config.num_hidden_layers
    done.once("rows", lambda: rows_of_text(prompts, measured, layers, bench.subject.head_dim))


def group_errors(bench: Bench, only: str | None = None) -> None:
    """What layer-by-layer codes of a group lose of attention, beside one basis for all of its layers."""
    length, artifact = bench.subject.shortest, bench.in_short_blocks()
    done = Done(bench.path("group-errors"))
    done.once("rows", lambda: group_errors_of(_problems(bench, "both", length), artifact, bench.loaded.model))


def subgen(bench: Bench, only: str | None = None) -> None:
    """Whether keys are clusterable, and what SubGen's estimates err by."""
    done, length = Done(bench.path("subgen")), bench.subject.shortest
    own = bench.subject.short_seq_len == length
    sampled = bench.in_short_blocks() if own else bench.artifact(tokens=CLUSTER_TOKENS, seq_len=length)
    done.once("clusterable", lambda: clusterable(sampled, bench.loaded.model))
    settings = [
        setting for setting in at_memory(bench.subject.head_dim, length) if setting["method"] not in OF_A_PREFILL
    ]
    done.once("estimates", lambda: estimates(_problems(bench, "both", length), settings))
    done.once("outside", lambda: outside(_problems(bench, "both", length), length))
    done.once("splits", lambda: estimates(_problems(bench, "both", length), splits(length)))


def subgen_decoded(bench: Bench, only: str | None = None) -> None:
    """How SubGen's memory is best divided."""
    splits_decoded(bench)


def lines(bench: Bench, only: str | None = None) -> None:
    """Line retrieval in a fifth of the memory."""
    line_retrieval(bench)


def _loki(rank: int, basis: str, stage: str = "post") -> dict[str, Any]:
    setting = {"method": "loki", "rank": rank, "keep": KEEP, "basis": basis, "stage": stage}
    return {**setting, **GROUP, **ONLY_CHOSEN}


def _errors(
    bench: Bench, done: Done, key: str, text: str, settings: Any, artifact: Any, length: int | None = None
) -> None:
    def measured() -> list[dict[str, Any]]:
        found = _problems(bench, text, length or bench.subject.shortest)
        return errors(found, settings, artifact)

    done.once(key, measured)


_MADE: dict[tuple[str, str, int], Any] = {}


def _problems(bench: Bench, text: str, length: int) -> Any:
    """Those of the last text and length asked for: they are as large as a cache."""
    key = (bench.subject.model, text, length)
    if key not in _MADE:
        _MADE.clear()
        _MADE[key] = unseen(bench.loaded, UNSEEN[text], ROWS, length)
    return _MADE[key]


class Done:
    """A JSON of what was measured, written after every entry."""

    def __init__(self, path: Path):
        self.path = path
        self.found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def once(self, key: str, measured: Callable[[], Any]) -> None:
        if key in self.found:
            return
        print(f"{self.path.stem}: {key}", flush=True)
        self.found[key] = measured()
        partial = self.path.with_name(f"{self.path.name}.partial")
        partial.write_text(json.dumps(self.found, indent=1) + "\n")
        partial.replace(self.path)


PARTS: Mapping[str, Callable[[Bench, str | None], None]] = {
    "ranks": ranks,
    "tokens": tokens,
    "bases": bases,
    "transfer": transfer,
    "attention": attention,
    "block-lengths": block_lengths,
    "choices": choices,
    "memory": memory,
    "thresholds": thresholds,
    "codewords": codewords,
    "reservoir": reservoir,
    "alternatives": alternatives,
    "first-token": first_tokens,
    "methods": methods,
    "short-blocks": short_blocks,
    "papers": papers,
    "defaults": defaults,
    "why-loki": why_loki,
    "by-answers": by_answers,
    "questions": questions,
    "question-seen": question_seen,
    "ruler": ruler,
    "aims": aims,
    "plans": plans,
    "sharing": sharing,
    "uptraining": uptraining,
    "shared-basis": shared_basis,
    "shared-basis-text": shared_basis_text,
    "group-errors": group_errors,
    "xcla": xcla,
    "subgen": subgen,
    "subgen-decoded": subgen_decoded,
    "lines": lines,
}
OF_METHODS = (
    "attention",
    "memory",
    "choices",
    "methods",
    "short-blocks",
    "papers",
    "defaults",
    "by-answers",
    "questions",
    "question-seen",
    "ruler",
    "aims",
)
"""What is measured again for one method alone."""
OF_SPECTRAL = ("thresholds", "codewords", "alternatives")
"""What is measured of `spectral` only."""


def run(bench: Bench, names: Iterable[str], method: str | None = None) -> None:
    """
    Args:
        method: only this one, anew.
    """
    for name in names:
        if method is not None:
            for path in bench.results.glob(f"{bench.subject.model}-{name}*.json"):
                if name in OF_SPECTRAL:
                    path.unlink()
                else:
                    forget(path, method)
        PARTS[name](bench, method)
