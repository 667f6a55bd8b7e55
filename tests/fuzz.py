"""Coverage-guided fuzzing of what strangers give us: `python tests/fuzz.py [TARGET …] [--seconds N]`, or `make fuzz`.

Needs atheris (`pip install atheris`). Starts from the inputs in `fuzz_targets.py` and the abusive files in
`tests/attacks`; an input that gets anything but a result or a named error is written to `crash-…`: fix the
fault, shorten the file and keep it in `tests/attacks/TARGET`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ATTACKS = HERE / "attacks"
INSTRUMENTED = ["kvcal.artifacts", "kvcal.calibrate.recipe", "kvcal.calibrate.recipe_of", "kvcal.calibrate.cli",
                "kvcal.calibrate.data", "kvcal.calibrate.data_sets", "kvcal.calibrate.text_files",
                "kvcal.calibrate.chats", "kvcal.calibrate.tables", "kvcal.calibrate.json_rows",
                "kvcal.calibrate.text_columns", "kvcal.calibrate.models", "yaml", "json", "csv"]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", help="all by default")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    try:
        import atheris
    except ImportError:
        print("fuzzing needs atheris: pip install atheris", file=sys.stderr)
        return 2
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    with atheris.instrument_imports(include=INSTRUMENTED):
        from fuzz_targets import TARGETS, refusal, seeds
    if unknown := set(given.targets) - TARGETS.keys():
        parser.error(f"no target {', '.join(sorted(unknown))}: there are {', '.join(TARGETS)}")
    if not given.inside:  # libFuzzer ends its process
        command = [sys.executable, __file__, "--inside", "--seconds", str(given.seconds)]
        return max(subprocess.run([*command, target]).returncode for target in given.targets or TARGETS)
    (target,) = given.targets
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(seeds(target)):
            (Path(corpus) / f"seed-{number}").write_bytes(seed)
        known = [str(folder) for folder in [ATTACKS / target] if folder.is_dir()]
        bounds = [f"-max_total_time={given.seconds}", "-timeout=20", "-rss_limit_mb=8192", "-max_len=20000"]
        print(f"fuzzing {target} for {given.seconds} s", flush=True)
        atheris.Setup(
            [sys.argv[0], *bounds, "-print_final_stats=1", corpus, *known], lambda data: refusal(target, data)
        )
        atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
