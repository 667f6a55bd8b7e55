from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .loading import load_calibrated
from .options import artifact_argument, calibrated_model_option
from .output import json_option, print_lines, print_result, print_table, progress_bar


@click.command("xcla")
@artifact_argument()
@calibrated_model_option()
@click.option(
    "--group", type=click.IntRange(1), default=3, help="Put this many layers into a group; with 1 each is by itself."
)
@click.option(
    "--memory",
    type=click.FloatRange(0, 0.5, min_open=True),
    default=0.2,
    help="Let the cache have at most this part of the bytes of 16-bit keys and values.",
)
@json_option
def xcla_command(artifact: Path, model_spec: str, as_json: bool, **settings: Any) -> None:
    """Fit low-bit codes that neighbouring layers have in common.

    `xcla` keeps these coefficients instead of keys and values. ARTIFACT gets the stage `xcla`. No weight is
    trained, and no layer reads the keys and values of another instead of its own.

    \b
    Example:
      calibrate xcla mistral-7b-wikitext --model mistral-7b --memory 0.2
      calibrate evaluate mistral-7b-wikitext --method xcla
    """
    from ...artifacts import load, save
    from ...artifacts.places import check_can_write_in
    from ..card import card_files
    from ..cla.rotation import angles_of
    from ..cla.xcla import groups_of, xcla, xcla_report

    found = load(artifact)
    check_can_write_in(artifact)
    groups_of(found, settings["group"])
    model = load_calibrated(found, model_spec, device="cpu", dtype=str(found.settings.get("dtype", "auto"))).model
    with progress_bar("fitting codes") as progress:
        coded = xcla(found, **settings, angles=angles_of(found, model), progress=progress)
    saved = save(coded, artifact, card_files(coded))
    report = xcla_report(saved)
    step = f"next: calibrate evaluate {artifact} --method xcla --data …"
    print_result(as_json, report, lambda: print_codes(report), artifact, step)


def print_codes(report: dict[str, Any]) -> None:
    rows = [
        [
            str(layer["layer"]),
            f"{layer['memory']:.3f}",
            *(text for kind in ("key", "value") for text in _cells(layer[kind])),
        ]
        for layer in report["layers"]
    ]
    header = ["layer", "memory", "keys: 8, 4, 2 bits", "told", "lost", "values: 8, 4, 2 bits", "told", "lost"]
    print_table("coefficients of keys and values", header, rows)
    size = report["bytes_per_token"]
    print_lines(
        "memory: bytes of codes over those of 16-bit keys and values; 8, 4, 2 bits: how many coefficients have so many",
        "told: the share of the variance, weighted by the attention that tokens receive and as errors cost, that the "
        "coefficients of the group's earlier layers tell; lost: that does not come back",
        f"groups {report['groups']}: {size['before']} → {size['after']} bytes per token "
        f"({report['memory']:.3f}); a step reads {report['read']:.3f} of what 16-bit keys and values take",
    )


def _cells(code: dict[str, Any]) -> list[str]:
    return [", ".join(map(str, code["bits"].values())), f"{code['told']:.2f}", f"{code['lost']:.3f}"]
