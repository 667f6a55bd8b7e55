from __future__ import annotations

from pathlib import Path

import click

from ...artifacts import KvcalError
from .loading import load_calibrated
from .numbers import megabytes
from .options import artifact_argument, calibrated_model_option, dtype_option
from .output import json_option, print_lines, print_result, working


@click.command("export")
@artifact_argument()
@calibrated_model_option()
@click.option(
    "-o",
    "--output",
    "--cla",
    "folder",
    type=click.Path(path_type=Path),
    required=True,
    help="Write the model, whose layers share keys and values by the stage `cla`, to this new folder.",
)
@dtype_option()
@json_option
def export_command(artifact: Path, model_spec: str, folder: Path, dtype: str, as_json: bool) -> None:
    """Write a checkpoint of the model whose layers share.

    `kvcal.runtime.cla.load_cla(FOLDER)` loads it.

    \b
    Example:
      calibrate export mistral-7b-wikitext --model mistral-7b --output mistral-7b-cla2
    """
    from ...artifacts import load
    from ...artifacts.places import check_new_folder
    from ...artifacts.writing import has_content
    from ...runtime.cla.method import stage_map
    from ..cla.export import export
    from ..cla.uptrained_stage import steps_in_all

    check_new_folder(folder)
    if has_content(folder):
        raise KvcalError(f"{folder}: already exists: choose another --output or remove it")
    found = load(artifact)
    groups = str(stage_map(found))
    loaded = load_calibrated(found, model_spec, device="cpu", dtype=dtype)
    with working("writing"):
        written = export(found, loaded, folder)
    size = sum(path.stat().st_size for path in written.iterdir())
    uptraining = found.stages["cla"].settings.get("uptraining")
    uptrained = uptraining is not None and steps_in_all(uptraining) > 0
    report = {"folder": str(written), "groups": groups, "bytes": size, "uptrained": uptrained}
    trained = "uptrained" if uptrained else "not uptrained"
    load_it = ("load it with", "  from kvcal.runtime.cla import load_cla", f"  model = load_cla({str(written)!r})")
    print_result(
        as_json,
        report,
        lambda: print_lines(f"{written}: groups {groups}, {trained}, {megabytes(size)}"),
        written,
        *load_it,
    )
