from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ...artifacts import load, save
from ...artifacts.places import check_can_write_in
from .loading import load_calibrated
from .output import json_option, print_json, print_lines, print_table, progress_bar


@click.command("xcla")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--model", "model_spec", metavar="MODEL", required=True, help="The model that ARTIFACT was calibrated on."
)
@click.option(
    "--group", type=click.IntRange(1), default=3, show_default=True, help="Layers of a group; 1: each by itself."
)
@click.option(
    "--memory",
    type=click.FloatRange(0, 0.5, min_open=True),
    default=0.2,
    show_default=True,
    help="Bytes of the cache over those of 16-bit keys and values, at most.",
)
@json_option
def xcla_command(artifact: Path, model_spec: str, as_json: bool, **settings: Any) -> None:
    """Fit low-bit coefficients that neighbouring layers have in common, which `xcla` keeps instead of keys and values.

    Adds the stage `xcla` to ARTIFACT. No weight is trained, and no layer reads the keys and values of another instead
    of its own.

    \b
    Example:
      calibrate xcla mistral-7b-wikitext --model mistral-7b --memory 0.2
      calibrate evaluate mistral-7b-wikitext --method xcla
    """
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
    if as_json:
        print_json(report)
        return
    print_codes(report)
    print_lines("", f"next: calibrate evaluate {artifact} --method xcla --data …")


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
