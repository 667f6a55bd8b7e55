"""What kvpress's presses cost in quality and save in bytes, on the prompts of `calibrate evaluate`.

    python -m benchmarks.peers [--python .venv-peers/bin/python]

kvpress needs an older transformers than ours, so its part (`worker.py`) runs in an environment of its own. The
results file is one for `calibrate evaluate --compare`, run with the same options. Before any figure is written the
peers' environment has to find the same perplexity of the uncompressed model as ours.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from kvcal.artifacts import KvcalError
from kvcal.calibrate.evaluation.decoding import Answer, ends_of
from kvcal.calibrate.evaluation.grid import FULL
from kvcal.calibrate.evaluation.measurements import Measured, batches, samples_of
from kvcal.calibrate.evaluation.prefilled import answer_as_json
from kvcal.calibrate.evaluation.prompts import Prompts
from kvcal.calibrate.evaluation.protocol import check_lengths, evaluate
from kvcal.calibrate.evaluation.rows import result_row
from kvcal.calibrate.evaluation.tasks.scoring import SCORINGS

from ..shared.places import RESULTS, ROOT

WORKER = Path(__file__).with_name("worker.py")
"""Run by its path: what is installed there knows nothing of this repository."""
TOLERANCE = 1e-4
"""Between the perplexities of the uncompressed model in the two environments."""


def main() -> int:
    options = parse()
    try:
        settings, rows = run(options)
    except KvcalError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    write(options.output, settings, rows)
    print_rows(rows)
    print(f"\n{options.output}")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", type=Path, default=ROOT / ".venv-peers/bin/python", help="with kvpress")
    parser.add_argument("--output", type=Path, default=RESULTS / "peers" / "kvpress.json")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", default="stdlib")
    parser.add_argument("--split", help="[default: heldout of stdlib]")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.25, 0.125, 0.0625], help="of the prefix")
    parser.add_argument("--prefix", type=int, default=1024)
    parser.add_argument("--continuation", type=int, default=256)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--tasks", nargs="+", default=["perplexity", "passkey", "multikey"])
    parser.add_argument("--lengths", type=int, nargs="+", help="of the tasks' contexts  [default: --prefix]")
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not all(0 < keep < 1 for keep in options.keep):
        parser.error("--keep: give fractions between 0 and 1")
    if not options.python.is_file():
        parser.error(f"no {options.python}: run `make peers`, which builds it")
    if options.split is None and options.data == "stdlib":
        options.split = "heldout"
    return options


def run(options: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(settings, rows) of the results file."""
    from kvcal.artifacts import weights_sha256
    from kvcal.calibrate.data import open_data
    from kvcal.calibrate.evaluation.prompts import make_prompts
    from kvcal.calibrate.models import load_model
    from kvcal.calibrate.one_pass import versions
    from kvcal.runtime import hub

    data = open_data(options.data, options.split)
    loaded = load_model(options.model, device="cpu", dtype="float32")
    folder = loaded.source.folder or hub.cached(loaded.source.id, "model", loaded.source.revision)
    if folder is None:
        raise KvcalError(f"model {loaded.source.id}: its files were not found on the disk: give a folder")
    names = ("prefix", "continuation", "windows", "tasks", "lengths", "episodes", "seed")
    asked = {name: getattr(options, name) for name in names}
    prompts = make_prompts(data, loaded.tokenizer, **asked, name=str(data.source["id"]))
    check_lengths(prompts, loaded.model)
    job = {"model_folder": str(folder), "keeps": options.keep, "threads": torch.get_num_threads()}
    job["ends"] = sorted(ends_of(loaded.model))
    found = measured_by_peers(options.python, job, prompts, options.batch_size)
    (ours,) = evaluate(loaded.model, None, prompts, [FULL], tokenizer=loaded.tokenizer, batch_size=options.batch_size)
    layers = loaded.model.config.get_text_config().num_hidden_layers
    rows = peer_rows(found, prompts, options.batch_size, layers, loaded.tokenizer)
    check_full(rows[0], ours)
    settings = {
        "model": loaded.source.id,
        "weights_sha256": weights_sha256(loaded.model),
        "data": data.source,
        **asked,
        "question": "decoded",
        "tokens_sha256": prompts.tokens_sha256,
        "batch_size": options.batch_size,
        "dtype": "float32",
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "peer_versions": found["versions"],
    }
    return settings, rows


def measured_by_peers(python: Path, job: Mapping[str, Any], prompts: Prompts, batch_size: int) -> dict[str, Any]:
    """{"versions": …, "rows": [{"setting": …, "measured": {batch: raw numbers}}, …]}, `full` first."""
    with tempfile.TemporaryDirectory() as folder:
        job_file, answer = Path(folder) / "job.safetensors", Path(folder) / "measured.json"
        write_job(job_file, job, prompts, batch_size)
        # Not resolved: a virtual environment's python is a link, and is told by its place.
        command = [str(python.absolute()), str(WORKER), str(job_file), str(answer)]
        if (code := subprocess.run(command, check=False).returncode) != 0:
            raise KvcalError(f"{python}: the peers' part failed with exit code {code}: its message stands above")
        measured: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return measured


def write_job(path: Path, job: Mapping[str, Any], prompts: Prompts, batch_size: int) -> None:
    """The token ids by batch, and what to do with them as JSON in the metadata.

    Raises:
        KvcalError: contexts of unequal lengths, which presses, that know of no padding, cannot have in one batch.
    """
    parts: dict[str, torch.Tensor] = {}
    asked: dict[str, Any] = {}
    keys = []
    for batch in batches(prompts, batch_size):
        keys.append(batch.key)
        found = samples_of(prompts, batch)
        if found is None:
            assert prompts.windows is not None
            rows = slice(batch.first, batch.first + batch.rows)
            parts[f"{batch.key}/prefixes"] = prompts.windows.prefixes[rows].contiguous()
            parts[f"{batch.key}/continuations"] = prompts.windows.continuations[rows].contiguous()
            continue
        task, samples = found
        if len({len(sample.context) for sample in samples.values()}) > 1:
            raise KvcalError(f"{task.key}: contexts of unequal lengths: give --batch-size 1")
        parts[f"{batch.key}/prefixes"] = torch.tensor([sample.context for sample in samples.values()])
        asked[batch.key] = {
            "questions": [sample.question for sample in samples.values()],
            "new_tokens": task.new_tokens,
        }
    save_file(parts, path, {"job": json.dumps({**job, "batches": keys, "asked": asked})})


def peer_rows(
    found: Mapping[str, Any], prompts: Prompts, batch_size: int, layers: int, tokenizer: Any
) -> list[dict[str, Any]]:
    """Rows as `calibrate evaluate` makes them of the same raw numbers, ratios against the peers' own `full`."""
    rows: list[dict[str, Any]] = []
    work = batches(prompts, batch_size)
    for entry in found["rows"]:
        measured = {
            batch.key: Measured(**_scored(entry["measured"][batch.key], samples_of(prompts, batch), tokenizer))
            for batch in work
        }
        full = rows[0] if rows else None
        row = result_row(entry["setting"], measured, prompts, work, layers, full)
        rows.append({**row, "source": f"kvpress {found['versions']['kvpress']}"})
    return rows


def _scored(raw: Mapping[str, Any], asked: Any, tokenizer: Any) -> dict[str, Any]:
    """Raw numbers with the answers' tokens as text and score."""
    rest = {name: value for name, value in raw.items() if name != "answers"}
    if asked is None:
        return {**rest, "samples": []}
    task, samples = asked
    told = []
    for (index, sample), tokens in zip(samples.items(), raw["answers"], strict=True):
        answer = Answer(sample, tokenizer, SCORINGS[task.scoring], frozenset(), task.new_tokens)
        for token in tokens:
            if not answer.done:
                answer.take(token)
        told.append(answer_as_json(index, answer))
    return {**rest, "samples": told}


def check_full(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raise KvcalError when the two environments do not compute the same model on the same tokens."""
    if theirs["scores"] != ours["scores"]:
        raise KvcalError(f"the uncompressed model scores {theirs['scores']} there and {ours['scores']} here")
    there, here = theirs["perplexity"], ours["perplexity"]
    if here is not None and not abs(there - here) <= TOLERANCE:
        raise KvcalError(
            f"the uncompressed model's perplexity is {there:.6f} in the peers' environment and {here:.6f} in ours, "
            f"more than {TOLERANCE:.0e} apart: nothing measured there can be compared, and nothing was written"
        )


def write(path: Path, settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    from kvcal.calibrate.evaluation.results import Results

    results = Results(settings, path)
    results.rows = [dict(row) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    results.write()


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    tasks = list(rows[0]["scores"])
    print(f"\n{'':40}  perplexity  ratio{''.join(f'{task:>15}' for task in tasks)}       MB  read MB      ms")
    for row in rows:
        name = f"{row['method']} {row['keep']:g}" if "keep" in row else row["method"]
        quality = "         –      –"
        if row["perplexity"] is not None:
            quality = f"{row['perplexity']:10.3f}  {row['perplexity_ratio']:5.3f}"
        scores = "".join(f"{row['scores'][task]:15.2f}" for task in tasks)
        costs = f"{row['resident_bytes'] / 1e6:9.3f}{row['bytes_per_step'] / 1e6:9.3f}{row['ms_per_step']:8.1f}"
        print(f"{name:40}  {quality}{scores}{costs}")


if __name__ == "__main__":
    sys.exit(main())
