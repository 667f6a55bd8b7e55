"""Principal components of the keys that layers share, which are other keys than those of the calibrated model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...artifacts import KvcalError
from ...runtime.cla.sharing import shared
from ...runtime.cla.sharing_map import SharingMap
from ...runtime.integration.routing import backbone
from ..blocks import TokenBlocks
from ..capture import LayerTensors, capture
from ..moments import MomentsFitter
from ..pca import fit_pca, spectrum
from ..pre_rotary import PreRotary

KEY_QUANTITIES = ("key_pre", "key_post")
REFIT_TOKENS = 32768
"""That a pass takes at most: four or sixteen times as many change the errors of SmolLM2-135M's bases by less than two
standard errors (docs/results/real.md)."""


@torch.no_grad()
def refit_keys(
    model: Any,
    sharing_map: SharingMap,
    weights: Mapping[str, Tensor],
    blocks: TokenBlocks,
    *,
    centred: bool = True,
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """One pass of the shared model: what the stage `pca` has of keys, for every storing layer, under the same names.

    Layers that store for themselves only are included: their hidden states have changed, too.

    Args:
        model: as for the calibration pass, in eval mode; left as found.
        weights: as `share` takes them.
        blocks: of the length that decoding is to meet, since rotated keys depend on their positions.
        progress: called with (blocks done, blocks in all).
    """
    fitters: dict[tuple[int, str], MomentsFitter] = {}
    counted = blocks.counted[:0]

    def observe(seen: LayerTensors) -> None:
        if seen.layer not in sharing_map.storing:
            return
        for quantity in KEY_QUANTITIES:
            keys = getattr(seen, quantity)
            _, heads, _, dim = keys.shape
            fitter = fitters.setdefault((seen.layer, quantity), MomentsFitter(heads, dim))
            fitter.update(keys.transpose(0, 1)[:, counted.to(keys.device)])

    with shared(model, sharing_map, weights=weights), capture(model, observe, PreRotary()):
        for start in range(0, len(blocks), batch_size):
            rows = slice(start, start + batch_size)
            counted = blocks.counted[rows]
            backbone(model)(
                input_ids=blocks.ids[rows].long().to(model.device),
                attention_mask=blocks.attended[rows].long().to(model.device),
                use_cache=False,
            )
            if progress:
                progress(min(rows.stop, len(blocks)), len(blocks))
    bases: dict[str, Tensor] = {}
    for (layer, stage), fitter in sorted(fitters.items()):
        moments = fitter.finalize()
        if not torch.isfinite(moments.covariance).all():
            raise KvcalError(f"layer {layer}: NaN or Inf among its keys after uptraining: give a smaller --lr")
        pca, prefix = fit_pca(moments, centred=centred), f"layers.{layer}.{stage}"
        bases |= {
            f"{prefix}.eigenvalues": spectrum(moments),
            f"{prefix}.eigenvalues_uncentred": spectrum(moments, centred=False),
            f"{prefix}.mean": pca.mean.float(),
            f"{prefix}.components": pca.components.float(),
        }
    return bases
