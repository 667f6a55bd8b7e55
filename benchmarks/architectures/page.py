"""docs/architectures.md."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvcal.runtime.integration.routing import UNSUPPORTED

from ..shared.lookup import load
from ..shared.page import Page
from ..shared.tables import table

NOT_BUILT = "not built"
"""A road of its own: why there is no such model."""
ROADS = ("calibrates", "full", "loki", "decode()")


def values(results: Path) -> dict[str, Any]:
    found = load(results / "architectures" / "decoders.json")
    rows: Mapping[str, Mapping[str, str]] = found["rows"]
    works = {name: row for name, row in rows.items() if row.get("full") == "equal"}
    refused = {name: row for name, row in rows.items() if name not in works and NOT_BUILT not in row}
    unbuilt = {name: row for name, row in rows.items() if NOT_BUILT in row}
    return {
        "transformers": found["transformers"],
        "tried": len(rows),
        "works": (
            len(works),
            table(
                ["model type", "calibrates", "`full`", "`loki`", "`decode()`"],
                [[f"`{name}`", *(_cell(row.get(road, "–")) for road in ROADS)] for name, row in works.items()],
            ),
        ),
        "refused": (
            len(refused),
            table(
                ["model type", "what is said"],
                [[f"`{name}`", _cell(" / ".join(sorted(set(row.values()))))] for name, row in refused.items()],
            ),
        ),
        "unbuilt": (
            len(unbuilt),
            table(
                ["model type", "what it says"],
                [[f"`{name}`", _cell(row[NOT_BUILT])] for name, row in unbuilt.items()],
            ),
        ),
    }


PAGE = Page("../architectures.md", Path(__file__).with_name("page.md.j2"), values)


def _cell(text: str) -> str:
    return text.removeprefix("refused: ").removesuffix(f": {UNSUPPORTED}").replace("|", "\\|")
