"""Where results lie as data, and where the pages that are made of them lie."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
"""A folder for each room, with what it measured as JSON."""
PAGES = ROOT / "docs" / "results"
