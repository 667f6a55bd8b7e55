"""Which layers share keys and values: cross-layer attention (Brandon et al., 2024).

The first layer of a group projects and stores them, it is the group's storing layer; the others, its reading layers,
read them with queries of their own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ...artifacts import KvcalError


@dataclass(frozen=True)
class SharingMap:
    """A partition of the layers with full attention into groups of neighbours."""

    groups: tuple[tuple[int, ...], ...]
    """Layers of each group, ascending, the storing layer first; a group of one layer shares nothing."""

    def __post_init__(self) -> None:
        named: set[int] = set()
        for group in self.groups:
            if not group or list(group) != sorted(set(group)) or group[0] < 0:
                raise KvcalError(f"group {_text(group)!r}: give its layers in ascending order, e.g. 0-1 or 0+5+11")
            if twice := named & set(group):
                raise KvcalError(f"layer {min(twice)} is in two groups: put every layer into one")
            named |= set(group)
        object.__setattr__(self, "groups", tuple(sorted(tuple(group) for group in self.groups)))

    @classmethod
    def parse(cls, text: str) -> SharingMap:
        """The inverse of `str()`: "0-1,2-3,4", or "0+5,11" where neighbours have sliding layers between them; "0-1/2-3"
        where commas have a meaning already.

        Raises:
            KvcalError: of another form, no text, or a layer twice.
        """
        if not isinstance(text, str):
            raise KvcalError(f"groups {str(text)[:40]!r}: give a text, e.g. '0-1,2-3', or a SharingMap")
        return cls(tuple(_group(part.strip()) for part in re.split("[,/]", text)))

    def __str__(self) -> str:
        return ",".join(map(_text, self.groups))

    @property
    def storing(self) -> tuple[int, ...]:
        """The first layer of each group, of groups of one, too."""
        return tuple(group[0] for group in self.groups)

    @property
    def reading(self) -> tuple[int, ...]:
        return tuple(sorted(layer for group in self.groups for layer in group[1:]))

    @property
    def shared(self) -> tuple[tuple[int, ...], ...]:
        """The groups of more than one layer."""
        return tuple(group for group in self.groups if len(group) > 1)

    def storing_of(self, layer: int) -> int:
        """Which layer's keys and values `layer` attends to; itself when it is in no group."""
        return next((group[0] for group in self.groups if layer in group), layer)

    def check(self, shareable: Sequence[int], total: int) -> None:
        """Refuse a map that does not fit a model.

        Args:
            shareable: the layers with full attention, ascending.
            total: layers of the model.

        Raises:
            KvcalError: layers left out or beyond the model, a sliding layer in a group with others, groups whose
                layers are no neighbours.
        """
        for group in self.groups:
            if group[-1] >= total:
                raise KvcalError(f"group {_text(group)}: this model has layers 0 to {total - 1}")
            if len(group) == 1:
                continue
            for layer in group:
                if layer not in shareable:
                    raise KvcalError(
                        f"group {_text(group)}: layer {layer} has sliding attention, and sliding and full layers never "
                        f"share (a window bounds its cache already): leave it out; full are {_listed(shareable)}"
                    )
            first = list(shareable).index(group[0])
            if group != tuple(shareable[first : first + len(group)]):
                raise KvcalError(
                    f"group {_text(group)}: its layers are no neighbours among those with full attention "
                    f"({_listed(shareable)}): only neighbours share"
                )
        named = {layer for group in self.groups for layer in group}
        if left := [layer for layer in shareable if layer not in named]:
            raise KvcalError(
                f"groups {self}: layers {_listed(left)} are in none: name every layer with full attention, by itself "
                "where it is to share nothing (after --set, as groups=0-1/2-3: a comma separates values there)"
            )


def _group(text: str) -> tuple[int, ...]:
    if re.fullmatch(r"[0-9]{1,6}(\+[0-9]{1,6})*", text):
        return tuple(map(int, text.split("+")))
    if re.fullmatch(r"[0-9]{1,6}-[0-9]{1,6}", text):
        first, last = map(int, text.split("-"))
        if first < last <= first + 10**4:
            return tuple(range(first, last + 1))
    raise KvcalError(f"group {text[:40]!r}: give layers as 0-1, 0+5 or 4, and groups separated by commas")


def _text(group: Sequence[int]) -> str:
    contiguous = len(group) > 1 and list(group) == list(range(group[0], group[-1] + 1))
    return f"{group[0]}-{group[-1]}" if contiguous else "+".join(map(str, group))


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers)) or "none"
