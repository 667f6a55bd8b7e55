"""Everything one pass accumulates, for all layers: moments of each quantity and the reservoir."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..artifacts import QUANTITIES, KvcalError, Layer
from .capture import LayerTensors
from .defaults import RESERVOIR
from .moments import MomentsFitter
from .pca import fit_pca, spectrum
from .reservoir import Placement, ReservoirSample, SampledRows, priorities
from .score_basis import fit_score_basis

SAMPLED = ("key_post", "query_post", "value")


class StatisticsFitter:
    """Grows with every batch; two fitters over disjoint tokens merge into the fitter of the union."""

    def __init__(self, reservoir: int = RESERVOIR, seed: int = 0):
        self.reservoir = reservoir
        self.seed = seed
        self.sample = ReservoirSample(reservoir, seed)
        self.layers: dict[int, Layer] = {}
        self.moments: dict[tuple[int, str], MomentsFitter] = {}
        self.rows: dict[tuple[int, str], SampledRows] = {}
        self._batch: _Batch | None = None

    def begin_batch(self, tokens: Tensor, counted: Tensor) -> None:
        """Announce a batch.

        Args:
            tokens: [B, T] int64 index of each token in the whole text, each at most once in a run.
            counted: [B, T] bool, which tokens enter the statistics.
        """
        counted_tokens = tokens[counted]
        self._batch = _Batch(counted, counted_tokens, self.sample.place(counted_tokens))

    def update(self, seen: LayerTensors, pre_rotary: str = "none") -> None:
        """Take in one layer of the announced batch."""
        if self._batch is None:
            raise RuntimeError("update() before begin_batch()")
        batch = self._batch
        kv_heads, group = seen.key_post.shape[1], seen.query_post.shape[1] // seen.key_post.shape[1]
        counted = batch.counted.to(seen.value.device)
        if seen.layer not in self.layers:
            self.add_layer(_shape_of(seen, pre_rotary), seen.value.dtype)
        for quantity in QUANTITIES:
            if quantity.endswith("_pre") and pre_rotary == "none":
                continue  # no rotary embedding: pre is post, filled in at the end
            samples = _rows(getattr(seen, quantity), counted)
            fitter = self.moments[seen.layer, quantity]
            # Queries are pooled over the G heads of their KV head's group.
            fitter.update(samples.reshape(kv_heads, -1, samples.shape[-1]))
            if not torch.isfinite(fitter.mean).all():
                raise KvcalError(
                    f"layer {seen.layer}: NaN or Inf among the {quantity} activations: try --dtype float32, "
                    "or check the weights of this layer"
                )
            if (seen.layer, quantity) in self.rows:
                if quantity.startswith("query"):
                    samples = batch.one_query_per_group(samples, group, self.seed)
                self.rows[seen.layer, quantity].update(samples, batch.placement)

    def merge(self, other: StatisticsFitter) -> None:
        """Take in everything that `other` has seen; the result's reservoir is that of one pass over both."""
        if (self.reservoir, self.seed) != (other.reservoir, other.seed):
            raise ValueError("only statistics with the same reservoir size and seed can be merged")
        placement = self.sample.place(other.sample.token)
        for key, layer in other.layers.items():
            if key not in self.layers:
                sampled = other.rows.get((key, "value"))
                self.add_layer(layer, sampled.rows.dtype if sampled else None)
        for name, fitter in other.moments.items():
            self.moments[name].merge(fitter)
        for name, rows in other.rows.items():
            self.rows[name].update(rows.rows, placement)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Everything, as JSON-able numbers and tensors: what checkpoints hold and processes send one another."""
        numbers = {
            "layers": [asdict(layer) for layer in self.layers.values()],
            "counts": {f"{layer}.{quantity}": fitter.count for (layer, quantity), fitter in self.moments.items()},
        }
        tensors = {"token": self.sample.token}
        for (layer, quantity), fitter in self.moments.items():
            tensors[f"{layer}.{quantity}.mean"] = fitter.mean
            tensors[f"{layer}.{quantity}.scatter"] = fitter.scatter
        for (layer, quantity), rows in self.rows.items():
            tensors[f"{layer}.{quantity}.rows"] = rows.rows
        return numbers, tensors

    @classmethod
    def from_state(
        cls, reservoir: int, seed: int, numbers: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> StatisticsFitter:
        """The inverse of `state`.

        Raises:
            KeyError, TypeError, ValueError, RuntimeError: not such a state.
        """
        found = cls(reservoir, seed)
        found.sample.token = tensors["token"]
        for fields in numbers["layers"]:
            sampled = tensors.get(f"{fields['index']}.value.rows")
            found.add_layer(Layer(**fields), None if sampled is None else sampled.dtype)
        for (layer, quantity), fitter in found.moments.items():
            fitter.count = numbers["counts"][f"{layer}.{quantity}"]
            fitter.mean.copy_(tensors[f"{layer}.{quantity}.mean"])
            fitter.scatter.copy_(tensors[f"{layer}.{quantity}.scatter"])
        for (layer, quantity), rows in found.rows.items():
            rows.rows.copy_(tensors[f"{layer}.{quantity}.rows"])
        return found

    def finalize(self, *, centred: bool = True) -> dict[str, dict[str, Tensor]]:
        """The tensors of the stages moments, pca, score and reservoir, as docs/format.md names them."""
        stages: dict[str, dict[str, Tensor]] = {"moments": {}, "pca": {}, "score": {}, "reservoir": {}}
        order = self.sample.order()
        stages["reservoir"]["token"] = self.sample.token[order]
        for index, layer in sorted(self.layers.items()):
            prefix = f"layers.{index}"
            moments = {}
            for quantity in QUANTITIES:
                source = quantity.replace("_pre", "_post") if layer.pre_rotary == "none" else quantity
                found = moments[quantity] = self.moments[index, source].finalize()
                stages["moments"] |= {
                    f"{prefix}.{quantity}.count": torch.tensor(found.count),
                    f"{prefix}.{quantity}.mean": found.mean,
                    f"{prefix}.{quantity}.covariance": found.covariance,
                }
                stages["pca"] |= {
                    f"{prefix}.{quantity}.eigenvalues": spectrum(found),
                    f"{prefix}.{quantity}.eigenvalues_uncentred": spectrum(found, centred=False),
                }
            for rotary_stage in ("pre", "post"):
                keys = moments[f"key_{rotary_stage}"]
                pca = fit_pca(keys, centred=centred)
                basis = fit_score_basis(moments[f"query_{rotary_stage}"], keys)
                stages["pca"] |= {
                    f"{prefix}.key_{rotary_stage}.mean": pca.mean.float(),
                    f"{prefix}.key_{rotary_stage}.components": pca.components.float(),
                }
                stages["score"] |= {
                    f"{prefix}.{rotary_stage}.query_map": basis.query_map.float(),
                    f"{prefix}.{rotary_stage}.key_map": basis.key_map.float(),
                    f"{prefix}.{rotary_stage}.singular_values": basis.singular_values,
                }
            for quantity in SAMPLED if layer.window is None else ():
                stages["reservoir"][f"{prefix}.{quantity}"] = self.rows[index, quantity].finalize(order)
        return stages

    def add_layer(self, layer: Layer, dtype: torch.dtype | None) -> None:
        """Make room for a layer whose activations are of `dtype`; one with a sliding window is not sampled, since
        no method that needs the sample is applied to it."""
        self.layers[layer.index] = layer
        for quantity in QUANTITIES:
            dim = layer.value_dim if quantity == "value" else layer.head_dim
            self.moments[layer.index, quantity] = MomentsFitter(layer.kv_heads, dim)
            if quantity in SAMPLED and layer.window is None:
                if dtype is None:
                    raise ValueError(f"no rows of layer {layer.index}")
                self.rows[layer.index, quantity] = SampledRows(self.reservoir, layer.kv_heads, dim, dtype)


def _shape_of(seen: LayerTensors, pre_rotary: str) -> Layer:
    (_, query_heads, _, head_dim), (_, kv_heads, _, value_dim) = seen.query_post.shape, seen.value.shape
    return Layer(
        index=seen.layer,
        kv_heads=kv_heads,
        query_heads=query_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        scaling=seen.scaling,
        window=seen.window,
        pre_rotary=pre_rotary,
    )


@dataclass(frozen=True)
class _Batch:
    counted: Tensor
    """[B, T] bool."""
    tokens: Tensor
    """[n] int64 index of each counted token."""
    placement: Placement

    def one_query_per_group(self, queries: Tensor, group: int, seed: int) -> Tensor:
        """[Hkv, n, D]: one of each token's G queries per KV head, chosen by the token's index."""
        heads, tokens, dim = queries.shape
        grouped = queries.view(heads // group, group, tokens, dim)
        chosen = (priorities(self.tokens, seed + 1) % group).to(queries.device)
        return grouped.gather(1, chosen.view(1, 1, tokens, 1).expand(heads // group, 1, tokens, dim)).squeeze(1)


def _rows(tensor: Tensor, counted: Tensor) -> Tensor:
    """[B, H, T, D] -> [H, n, D], the counted tokens of all blocks in order."""
    return tensor.transpose(0, 1)[:, counted]
