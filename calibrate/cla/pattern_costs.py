"""What every pattern would store, to choose one by the memory that it takes."""

from __future__ import annotations

from typing import Any

from ...artifacts import Artifact, KvcalError
from ...runtime.cla.sharing_map import SharingMap
from .cache_cost import layers_bytes_per_token
from .patterns import PATTERNS, pattern_groups
from .requested import refuse_other_kinds, shareable_layers

GROUPS = (2, 3, 4)


def pattern_costs(artifact: Artifact) -> list[dict[str, Any]]:
    """What each pattern that this model can have would store.

    Returns:
        [{"pattern", "group": layers of a full group, "groups": [[layer, …]], "stored_layers": of the full-attention
        layers, "bytes_per_token": of their caches at 16 bit}]; the dense patterns store as many layers as keep-ends.
    """
    layers, found = shareable_layers(artifact), []
    for pattern in PATTERNS:
        for group in GROUPS:
            try:
                chosen = SharingMap(pattern_groups(pattern, layers, group))
                refuse_other_kinds(artifact, chosen)
            except KvcalError:
                continue
            found.append(
                {
                    "pattern": pattern,
                    "group": group,
                    "groups": [list(members) for members in chosen.groups],
                    "stored_layers": len(chosen.storing),
                    "bytes_per_token": layers_bytes_per_token(artifact.layers, chosen),
                }
            )
    return found
