"""What options take: numbers of tokens, dtypes, and the folder of an artifact."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from ...artifacts import KvcalError
from ..dtypes import DTYPES, SHORT, dtype_name

_COUNT = re.compile(r"(\d+(?:_\d+)*)([kKmM]?)", re.ASCII)
_UNITS = {"": 1, "k": 1024, "m": 1024**2}
_MOST = 2**62
TOKENS_HELP = "TOKENS are written 8192, 8_192, 8k (8 × 1024 tokens) or 1M (1024k)."


class TokenCount(click.ParamType):
    """A whole number of tokens: 8192, 8_192, 8k or 1M, where k is 1024 and M is 1024k."""

    name = "tokens"

    def __init__(self, least: int = 1):
        self.least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = _COUNT.fullmatch(str(value).strip())
        count = int(found[1]) * _UNITS[found[2].lower()] if found and len(found[1]) < 20 else None
        if count is None:
            self.fail(f"{value!r} is not a number of tokens: give e.g. 8192, 8k (8 × 1024) or 1M", param, ctx)
        if not self.least <= count < _MOST:
            self.fail(f"{value} tokens: give at least {self.least} and less than 2**62", param, ctx)
        return count


class TokenCounts(click.ParamType):
    """Several numbers of tokens, separated by commas: 512,2k."""

    name = "tokens,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        if isinstance(value, list):
            return value
        words = [word for word in str(value).split(",") if word.strip()]
        if not words:
            self.fail(f"{value!r}: give numbers of tokens separated by commas, e.g. 512,2k", param, ctx)
        return [TokenCount().convert(word, param, ctx) for word in words]


class Dtype(click.ParamType):
    """The name of a dtype, long (bfloat16) or short (bf16); becomes the long one."""

    name = "dtype"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return dtype_name(str(value))
        except KvcalError as error:
            self.fail(str(error), param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(name) for name in (*DTYPES, *SHORT) if name.startswith(incomplete)]


class Folder(click.Path):
    """A folder; shells complete folders only. Whether it is there is for the command to check."""

    def __init__(self) -> None:
        super().__init__(path_type=Path, file_okay=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return Path(value)
