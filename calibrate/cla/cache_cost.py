"""What a cache takes per token, with and without sharing between layers.

Sharing makes the cache smaller and nothing else: in a decoding step every layer still reads its keys and values
from memory, its own or those it shares (section 2.3 of the CLA paper: no direct effect on bandwidth).
"""

from __future__ import annotations

from collections.abc import Sequence

from ...artifacts import KvcalError, Layer
from ...runtime.cla.sharing_map import SharingMap

BANDWIDTH = (
    "decode bandwidth does not fall by itself: every layer still reads its keys and values in every step, "
    "those it shares too"
)


def bytes_per_token(
    layers: int,
    kv_heads: int,
    head_dim: int,
    element_bytes: int = 2,
    sharing: SharingMap | int | None = None,
    value_dim: int | None = None,
) -> int:
    """Bytes of keys and values that one token takes in the caches of all layers.

    Args:
        element_bytes: 2 for 16 bit, as in the paper's table 1.
        sharing: a map, or the layers of a group (the paper's sharing factor); None: every layer stores its own.
        value_dim: where values have another head dim than keys.
    """
    if min(layers, kv_heads, head_dim, element_bytes) < 1 or (isinstance(sharing, int) and sharing < 1):
        raise KvcalError("bytes per token: layers, heads, head dim, bytes and group must be at least 1")
    if sharing is None:
        stored = layers
    elif isinstance(sharing, int):
        stored = -(-layers // sharing)
    else:
        stored = layers - len(sharing.reading)
    return stored * kv_heads * (head_dim + (value_dim or head_dim)) * element_bytes


def layers_bytes_per_token(layers: Sequence[Layer], sharing: SharingMap | None = None, element_bytes: int = 2) -> int:
    """The same from an artifact's layers, which may differ in shape.

    Layers with a sliding window are left out: their cache stops growing at the window, whatever the others do.
    """
    reading = sharing.reading if sharing is not None else ()
    return sum(
        bytes_per_token(1, layer.kv_heads, layer.head_dim, element_bytes, value_dim=layer.value_dim)
        for layer in layers
        if layer.window is None and layer.index not in reading
    )
