"""The documents, and the code in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
_BLOCK = re.compile(r"(<!-- not run here: [^>]+ -->\n+)?^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    text: str
    runs: bool
    """False where the page says above it why it is not run."""

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text, name = page.read_text(), page.relative_to(ROOT).as_posix()
    return [
        Block(name, text[: found.start(3)].count("\n"), found[2], found[3], found[1] is None)
        for found in _BLOCK.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in blocks(page)]


def commands(block: Block) -> list[str]:
    """The lines of a block that call us, without comments and with their continuations.

    Those with … or [OPTIONAL] are a sketch.
    """
    joined = re.sub(r"\\\n\s*", "", block.text)
    lines = [re.sub(r"\s+#.*", "", line).strip() for line in joined.splitlines()]
    ours = re.compile(r"(torchrun .* -m kvcal\.calibrate|calibrate|kvcal) (?=[a-z-])")
    return [line[found.end() :] for line in lines if (found := ours.match(line)) and not set("…[") & set(line)]
