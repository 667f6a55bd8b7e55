from __future__ import annotations

from pathlib import Path

import click

from .loading import load_calibrated
from .options import artifact_argument, model_option
from .output import json_option, print_lines, print_result, working


@click.command("verify")
@artifact_argument()
@model_option("Also check that this model's weights are the calibrated ones.")
@json_option
def verify_command(artifact: Path, model_spec: str | None, as_json: bool) -> None:
    """Check hashes, shapes, dtypes and values of ARTIFACT.

    When something is wrong, one line says what, and the exit code is 2. Values are checked against one another:
    bases against the moments that they are derived from, clusters against the keys that were sampled, and so on
    through all that docs/format.md promises. Of a slim artifact, or another without these stages, a line names
    what could not be checked.

    \b
    Example:
      calibrate verify mistral-7b-wikitext --model mistral-7b
    """
    from ...artifacts import load
    from ...artifacts.slim_form import made_after
    from ...runtime.planned import has_plan
    from ..verification import verify

    with working("checking hashes and values"):
        found = load(artifact)
        unchecked = verify(found)
    if model_spec is not None:
        # In the dtype of the run: another one may round the weights, and then they are others.
        dtype = str(found.settings.get("dtype", "auto"))
        load_calibrated(found, model_spec, device="cpu", dtype=dtype)
    planned = has_plan(found)
    tensors = sum(len(stage.tensors) for stage in found.stages.values())
    report = {
        "artifact": str(artifact),
        "valid": True,
        "content_hash": found.content_hash,
        "stages": sorted(found.stages),
        "tensors": tensors,
        "plan": planned,
        "slim_of": found.slim_of and found.slim_of.content_hash,
        "not_checked_against": unchecked,
        "model_checked": model_spec is not None,
    }

    def show() -> None:
        print_lines(
            f"{artifact}: {len(found.stages)} stages, {tensors} tensors: hashes, shapes, dtypes and values hold"
        )
        if found.slim_of is not None:
            but = f", but for {' and '.join(later)}, made afterwards" if (later := made_after(found)) else ""
            left_out, full = " and ".join(found.left_out), found.slim_of.content_hash
            print_lines(f"slim, without {left_out}: its stage files are those of content {full}{but}")
        if unchecked:
            pairs = ", ".join(f"{stage} ({' and '.join(absent)})" for stage, absent in unchecked.items())
            print_lines(f"not checked against what they are derived from, which is not here: {pairs}")
        if planned:
            print_lines("plan.json is a plan for this artifact")
        print_lines(f"content {found.content_hash}")
        if model_spec is not None:
            print_lines(f"{model_spec}: architecture and weights are those it was calibrated on")

    print_result(as_json, report, show, found.content_hash)
