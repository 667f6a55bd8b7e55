"""A spectral step: its store as a prefill would leave it, and the launches that it is made of."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from caches import Copy, fill, fill_clusters
from sizes import FORMS, REFINE, Sizes
from torch import Tensor

from kvcal.kernels.attend import attend
from kvcal.kernels.score import quantize
from kvcal.runtime.attention import Logits
from kvcal.runtime.static import Clock
from kvcal.runtime.static.spectral import SpectralStep
from kvcal.runtime.stores.codes import CLIP, CodedBasis
from kvcal.runtime.stores.spectral import MEAN_KEY_BITS, MEAN_VALUE_BITS, Spectral, SpectralStore

ALWAYS_FLAT = 1 << 30


def settings(sizes: Sizes, form: str, flat: bool = False) -> Spectral:
    """Args: form: "int4" or "int2"."""
    bits, times = FORMS[form]
    return Spectral(
        keep=sizes.keep,
        select="max",
        rank=times * sizes.rank,
        bits=bits,
        refine=REFINE,
        flat_below=ALWAYS_FLAT if flat else 0,
        sinks=sizes.sinks,
        tokens_per_cluster=sizes.coded_per_cluster,
        window=sizes.coded_window,
    )


def coded_basis(sizes: Sizes, basis: Tensor, of: Spectral) -> CodedBasis:
    """Of keys as `caches.draw` makes them. Args: basis: [Hkv, D, D] orthonormal rows."""
    assert isinstance(of.rank, int)
    spread = torch.full((of.rank, 1), 0.3)
    spread[: sizes.rank] = 1.5
    part = basis[:, : of.rank].float().cpu()
    mean = 0.1 * torch.randn(part.shape[0], part.shape[2], generator=torch.Generator().manual_seed(1))
    variance = torch.full((part.shape[0],), 0.09 * (part.shape[2] - of.rank))
    return CodedBasis(part * spread, part / spread, mean, variance, of.bits, CLIP[of.bits])


def fill_spectral(store: SpectralStore, sizes: Sizes, held: int, key: Tensor, value: Tensor, seed: int = 0) -> None:
    """Make a store hold the first `held` of these tokens, their codes, and clusters with random means."""
    of, generator = store.selection, torch.Generator(key.device).manual_seed(seed)
    like = key.new_zeros(1, dtype=torch.float32)  # the same codes for float32 as for 16 bits
    _, key_map, _, offset = store.basis.parts(like)
    coded = [
        quantize(key[:, head].float() @ key_map[head].mT - offset[head], of.bits, store.basis.clip)
        for head in range(key.shape[1])
    ]
    codes, scales = (torch.stack(parts, 1) for parts in zip(*coded, strict=True))  # type: ignore[arg-type]
    fill(store, held, {"key": key, "value": value, "code": codes, "scale": scales.unsqueeze(-1)})

    def means(clusters: int) -> dict[str, Tensor]:
        made = {}
        for name, dims, bits in (
            ("key", store.basis.rank, MEAN_KEY_BITS),
            ("value", value.shape[-1], MEAN_VALUE_BITS),
        ):
            drawn = torch.randn(*key.shape[:2], clusters, dims, generator=generator, device=key.device)
            made[f"cluster.{name}"], of_mean = quantize(drawn, bits)
            assert of_mean is not None
            made[f"cluster.{name}_scale"] = of_mean.unsqueeze(-1)
        made["cluster.radius"] = made["cluster.key_scale"].abs()
        return made

    fill_clusters(store, sizes, held, of.tokens_per_cluster, window=of.window, means=means)


class SpectralKernels:
    def __init__(self, copy: Copy, sizes: Sizes, form: str, flat: bool):
        self.copy, self.logits, self.flat = copy, Logits(sizes.scaling), flat
        of = settings(sizes, form, flat)
        batch, _, length, _ = copy.key.shape
        self.store = SpectralStore(of, coded_basis(sizes, copy.basis, of), None)
        fill_spectral(self.store, sizes, length - 1, copy.key, copy.value)
        self.step = SpectralStep(self.store, Clock([length - 1] * batch, copy.key.device))
        self.step.reserve(length)

    def run(self) -> Tensor:
        return self.step.step(*self.copy.new, self.logits)

    def parts(self) -> dict[str, Any]:
        step, logits, copy = self.step, self.logits, self.copy
        projected = step.project(copy.grouped)
        found = step.candidates(projected, logits)
        chosen = step.choose(found)
        slots = step.slots(found, chosen)
        rest = step.rest(projected, found, logits)
        clusters: dict[str, Any] = {}
        if not self.flat:
            _, by = step.score_clusters(projected, logits)
            clusters = {
                "clusters": partial(step.score_clusters, projected, logits),
                "refine": partial(step.refine, by),
            }
        key, value = copy.key, copy.value
        return {
            "append": partial(step.write, copy.key_new[:, :, 0], copy.value_new[:, :, 0]),
            "project": partial(step.project, copy.grouped),
            **clusters,
            "score": partial(step.score_tokens, projected, logits, found.ends),
            "select": partial(step.choose, found),
            "slots": partial(step.slots, found, chosen),
            "rest": partial(step.rest, projected, found, logits),
            "attend": partial(attend, copy.grouped, key, value, *slots, extra=[rest], scaling=logits.scaling),
        }
