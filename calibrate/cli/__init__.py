"""The command line: one file per command over the Python API, which never imports click."""

from __future__ import annotations

from .group import cli

__all__ = ["cli"]
