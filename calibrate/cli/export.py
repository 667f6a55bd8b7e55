from __future__ import annotations

from pathlib import Path

import click

from ...artifacts import KvcalError, load
from .loading import load_calibrated
from .output import json_option, print_json, print_lines, working


@click.command("export")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--model", "model_spec", metavar="MODEL", required=True, help="The model that ARTIFACT was calibrated on."
)
@click.option(
    "--cla",
    "folder",
    type=click.Path(path_type=Path),
    required=True,
    help="New folder: the model with its layers sharing keys and values, by the stage `cla`.",
)
@click.option("--dtype", default="auto", show_default=True, help="Of the weights: auto, float32, bfloat16 or float16.")
@json_option
def export_command(artifact: Path, model_spec: str, folder: Path, dtype: str, as_json: bool) -> None:
    """Write a checkpoint of the shared model, which `kvcal.runtime.cla.load_cla(FOLDER)` loads.

    \b
    Example:
      calibrate export mistral-7b-wikitext --model mistral-7b --cla mistral-7b-cla2
    """
    from ...artifacts.places import check_new_folder
    from ...artifacts.writing import has_content
    from ...runtime.cla.method import stage_map
    from ..cla.export import export
    from ..cla.uptrained_stage import steps_in_all

    check_new_folder(folder)
    if has_content(folder):
        raise KvcalError(f"{folder}: already exists: choose another --cla or remove it")
    found = load(artifact)
    groups = str(stage_map(found))
    loaded = load_calibrated(found, model_spec, device="cpu", dtype=dtype)
    with working("writing"):
        written = export(found, loaded, folder)
    size = sum(path.stat().st_size for path in written.iterdir())
    uptraining = found.stages["cla"].settings.get("uptraining")
    uptrained = uptraining is not None and steps_in_all(uptraining) > 0
    if as_json:
        print_json({"folder": str(written), "groups": groups, "bytes": size, "uptrained": uptrained})
        return
    print_lines(f"{written}: groups {groups}, {'uptrained' if uptrained else 'not uptrained'}, {size / 1e6:.1f} MB")
    print_lines("", "load it with", "  from kvcal.runtime.cla import load_cla", f"  model = load_cla({str(written)!r})")
