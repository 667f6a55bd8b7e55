from __future__ import annotations

from pathlib import Path

import click

from ...artifacts import load
from .output import json_option, print_json, print_lines, working
from .summary import artifact_summary


@click.command("slim")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("output", metavar="OUT", type=click.Path(path_type=Path))
@json_option
def slim_command(artifact: Path, output: Path, as_json: bool) -> None:
    """Write what methods decode with of ARTIFACT, a few MB, to the new folder OUT; its plan and a card go with it.

    Left out are the moments and the reservoir of keys, queries and values, which only calibration uses: clusterings,
    codes and sharing are fitted with the full artifact. The manifest keeps the hashes of what is left out, and all else
    keeps its bytes.

    \b
    Example:
      calibrate slim mistral-7b-wikitext mistral-7b-wikitext-slim
    """
    from ..slim import save_slim

    with working("writing what decoding needs"):
        found = load(artifact)
        saved = save_slim(found, output)
    if as_json:
        print_json(artifact_summary(saved))
        return
    before, after = (
        sum(stage.tensors.file.bytes for stage in each.stages.values())  # type: ignore[attr-defined]
        for each in (found, saved)
    )
    left_out = sorted(found.stages.keys() - saved.stages.keys())
    what = f"without {' and '.join(left_out)}" if left_out else "the same: it has nothing that decoding does not need"
    print_lines(
        f"{output}: {what}, {before / 1e6:.1f} → {after / 1e6:.1f} MB",
        f"content {saved.content_hash}",
        "",
        f"next: calibrate verify {output}",
    )
