"""Everything that docs/results/real.md states, measured on real models.

python benchmarks/real/run.py WORK             # hours on two cores; an interrupted run goes on
python benchmarks/real/run.py WORK --page      # only the page, from what was measured
python benchmarks/real/run.py WORK --method M  # one method, anew, on every model; --model NAME: on this one

WORK holds the artifacts, about 300 MB each. Results are docs/results/real/*.json. The models come from the packages of
`kvcal[models]`, the text from Debian's packages debian-handbook and anarchism: see docs/models.md and docs/data.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import page
import parts
from subjects import SUBJECTS, Bench

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder of the artifacts")
    parser.add_argument("--model", choices=SUBJECTS, action="append", help="only this one; may be repeated")
    parser.add_argument("--part", choices=parts.PARTS, action="append", help="only this part; may be repeated")
    parser.add_argument("--method", help="only this method, measured anew")
    parser.add_argument("--page", action="store_true", help="only write the page again")
    options = parser.parse_args()
    results = FOLDER / "real"
    for folder in (options.work, results):
        folder.mkdir(parents=True, exist_ok=True)
    for name in () if options.page else options.model or SUBJECTS:
        wanted = options.part or (parts.OF_METHODS if options.method else parts.PARTS)
        own = SUBJECTS[name].parts
        wanted = [part for part in wanted if own is None or part in own]
        parts.run(Bench(SUBJECTS[name], options.work, results), wanted, options.method)
    page.write(FOLDER)


if __name__ == "__main__":
    main()
