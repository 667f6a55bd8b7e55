"""`xcla`: every token is read, from low-bit coefficients that a layer has in common with the layers before it.

No layer reads another's keys and values instead of its own, as with `cla`, and no weight is trained: a layer keeps what
the earlier layers of its group do not tell of its tokens (`runtime/cla/group_code.py`), and a step restores its keys
and values from theirs and its own. The cache is smaller; a step reads the codes of the earlier layers, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ...artifacts import Artifact, KvcalError
from ..attention import SoftmaxSpec
from ..cla.group_code import GroupCode, Kept, earlier_layers
from ..kv.pages import LayerCache
from .amounts import check_count
from .base import Attended, Method, Policy, Reading, Widths
from .full import attend_all


@dataclass(frozen=True)
class Xcla(Method):
    """Groups, and how many bits a coefficient has, are those of the artifact's stage `xcla`."""

    recent: int = 16
    """Last tokens that are held and read as they came."""

    def check(self) -> None:
        check_count("recent", self.recent, 1)

    def not_captured(self) -> str | None:
        return "a step reads the caches of other layers"

    def not_shared(self) -> str | None:
        return "xcla's bases are of each layer's own keys and values: take xcla by itself"

    def not_paged(self) -> str | None:
        return "a layer reads the pages of other layers, which an engine does not hand it"

    def check_changed_keys(self, layer: int, bases: Mapping[str, Tensor]) -> None:
        raise KvcalError("xcla has no bases of keys that uptraining changed: take xcla by itself")

    def bind(self, layer: int, head_dim: int, artifact: Artifact | None) -> XclaPolicy:
        self.check()
        if artifact is None:
            raise KvcalError("xcla needs an artifact: make one with `calibrate pca`, then `calibrate xcla`")
        return XclaPolicy(GroupCode.load(artifact, layer), earlier_layers(artifact, layer), self.recent)


class XclaPolicy(Policy):
    grouped, keeps_keys_values = True, False

    def __init__(self, code: GroupCode, earlier: Sequence[int], recent: int):
        self.code, self.earlier, self.recent_rows = code, tuple(earlier), recent
        key, value = (code.own[kind].offset for kind in ("key", "value"))
        self.fitted_to = len(key), key.shape[-1], value.shape[-1]

    def encode(self, key: Tensor, value: Tensor) -> dict[str, Tensor]:
        """Of no tokens: what is kept of tokens is told by `encode_after`."""
        return self.code.on(key.device).empty(key, value)

    def encode_after(self, key: Tensor, value: Tensor, position: Tensor, earlier: Sequence[Kept]) -> dict[str, Tensor]:
        return self.code.on(key.device).encode(key, value, position, earlier)

    def keys_values(self, cache: LayerCache) -> tuple[Tensor, Tensor]:
        return self.code.restore_all(cache)

    def step(self, query: Tensor, cache: LayerCache, spec: SoftmaxSpec) -> Attended:
        return Attended(attend_all(self, query, cache, spec), None)

    def dense_bytes(self, reading: Reading) -> int:
        """Codes of the group's layers up to this one, the last rows, and the maps back, once, in 16 bits."""
        return bytes_of_all(self.code, self.recent_rows, reading)

    def shared_bytes(self, widths: Widths) -> int:
        return 2 * self.code.map_numbers


def bytes_of_all(code: GroupCode, recent: int, reading: Reading) -> int:
    """Bytes of a step that restores every token: codes, the last rows as they came, maps in 16 bits."""
    codes = reading.heads * reading.tokens() * code.nbytes
    return codes + recent_bytes(recent, reading) + 2 * code.map_numbers


def recent_bytes(recent: int, reading: Reading) -> int:
    """Bytes of the last `recent` keys and values of every sequence, as they came."""
    row = reading.widths["recent_key"] + reading.widths["recent_value"]
    return reading.heads * int(reading.metadata.seq_lens.clamp(max=recent).sum()) * row
