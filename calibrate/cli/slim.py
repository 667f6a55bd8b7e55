from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .numbers import megabytes
from .options import artifact_argument
from .output import json_option, print_lines, print_result, working
from .summary import artifact_summary
from .types import Folder

if TYPE_CHECKING:
    from ...artifacts import Artifact


@click.command("slim")
@artifact_argument()
@click.argument("output", metavar="OUT", type=Folder())
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
    from ...artifacts import load
    from ..slim import save_slim

    with working("writing what decoding needs"):
        found = load(artifact)
        saved = save_slim(found, output)
    left_out = sorted(found.stages.keys() - saved.stages.keys())
    what = f"without {' and '.join(left_out)}" if left_out else "the same: it has nothing that decoding does not need"
    print_result(
        as_json,
        artifact_summary(saved),
        lambda: print_lines(
            f"{output}: {what}, {megabytes(_bytes(found))} → {megabytes(_bytes(saved))}",
            f"content {saved.content_hash}",
        ),
        output,
        f"next: calibrate verify {output}",
    )


def _bytes(artifact: Artifact) -> int:
    return sum(stage.tensors.file.bytes for stage in artifact.stages.values())  # type: ignore[attr-defined]
