"""Sharing patterns of the CLA paper (Brandon et al. 2024, figure 2 and section 3.2.1), for any number of layers.

Groups are tuples of layers; the first of a group stores keys and values, the others read them. The paper's models
have 20 layers; where it leaves open what other numbers of layers get, the choice is stated with the function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...artifacts import KvcalError

Groups = tuple[tuple[int, ...], ...]
PATTERNS = ("uniform", "keep-ends", "dense-front", "dense-back")


def uniform(count: int, group: int) -> Groups:
    """Groups of `group` layers; where that leaves a shorter one, it is the first (the paper's CLA3 of 10 layers)."""
    return _runs(0, count % group, group) + _runs(count % group, count, group)


def keep_ends(count: int, group: int) -> Groups:
    """The first and the last layer by themselves, the layers between in groups of `group`.

    The paper's 0, 1-2, 3-4, …, 17-18, 19. A shorter group, which 20 layers in pairs do not have, comes last.
    """
    if count < 3:
        return _runs(0, count, 1)
    return ((0,), *_runs(1, count - 1, group), (count - 1,))


def dense_front(count: int, stored: int) -> Groups:
    """Layers by themselves in front, then one long group, then the last layer by itself.

    The paper's 10 layers of their own (0 to 9), 9 that read layer 9, and the last: 11 of 20 are stored.
    """
    _check_stored("dense-front", count, stored, 2)
    first = stored - 2
    return (*_runs(0, first, 1), tuple(range(first, count - 1)), (count - 1,))


def dense_back(count: int, stored: int) -> Groups:
    """The mirror image: the first layer by itself, one long group, then layers by themselves.

    The paper says "2 non-CLA layers, followed by a run of 10 CLA layers all using the KV activations of layer 1,
    and finally 9 non-CLA layers", which are 21 layers; its table has 20, of which 11 are stored. Here those 20 are
    0, the group 1-10, and 11 to 19: one reading layer fewer than the sentence, as many stored as the table.
    """
    _check_stored("dense-back", count, stored, 2)
    end = count - stored + 2
    return ((0,), tuple(range(1, end)), *_runs(end, count, 1))


def pattern_groups(pattern: str, layers: Sequence[int], group: int = 2, stored: int | None = None) -> Groups:
    """The groups of a pattern over `layers`, which share among themselves and are in ascending order.

    Args:
        group: layers of a full group; for the dense patterns only what gives the default of `stored`.
        stored: layers that store keys and values. By default what the pattern gives; for the dense ones as many
            as keep-ends has with the same group, as in the paper.

    Raises:
        KvcalError: an unknown pattern, a group larger than the model, or a number that the pattern cannot give.
    """
    count = len(layers)
    if count < 2:
        raise KvcalError(f"{count} full-attention layers: sharing needs at least 2, there is nothing to share")
    if not 1 <= group <= count:
        raise KvcalError(f"groups of {group} layers: this model has {count} full-attention layers, give a smaller one")
    if pattern in _BY_GROUP:
        found = _BY_GROUP[pattern](count, group)
        if stored is not None and stored != len(found):
            gives = {size: len(_BY_GROUP[pattern](count, size)) for size in range(2, min(4, count) + 1)}
            table = ", ".join(f"{number} with --group {size}" for size, number in gives.items())
            raise KvcalError(
                f"{pattern} in groups of {group} stores {len(found)} of {count} layers, not {stored}: "
                f"it stores {table}; auto, dense-front and dense-back take any number"
            )
    elif pattern in _BY_STORED:
        found = _BY_STORED[pattern](count, len(keep_ends(count, group)) if stored is None else stored)
    else:
        raise KvcalError(
            f"unknown pattern {pattern!r}: give {', '.join(PATTERNS)}, auto, or the groups themselves, as 0-1,2-3"
        )
    return tuple(tuple(layers[index] for index in indices) for indices in found)


_BY_GROUP: dict[str, Callable[[int, int], Groups]] = {"uniform": uniform, "keep-ends": keep_ends}
_BY_STORED: dict[str, Callable[[int, int], Groups]] = {"dense-front": dense_front, "dense-back": dense_back}


def _runs(start: int, end: int, size: int) -> Groups:
    return tuple(tuple(range(first, min(first + size, end))) for first in range(start, end, size))


def _check_stored(pattern: str, count: int, stored: int, least: int) -> None:
    if not least <= stored <= count:
        raise KvcalError(
            f"{pattern} with {stored} stored layers: give {least} to {count}, "
            "the numbers of full-attention layers that it can store in this model"
        )
