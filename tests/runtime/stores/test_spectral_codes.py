"""What `spectral` codes keys as, what it leaves out, and how many dimensions it takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import coded
import pytest
import samples
import torch
from oracle_clusters import clustering_of
from oracle_spectral import CLIP, LEVELS, Coding, Held
from sequences import Geometry, decode, draw, make, prefill
from torch import Tensor

from kvcal.artifacts import Artifact, KvcalError, Stage
from kvcal.runtime.attention import Logits
from kvcal.runtime.stores.codes import CodedBasis, coded_rank
from kvcal.runtime.stores.spectral import Spectral, SpectralStore

GEOMETRY, LOGITS = Geometry(32, 8, 2, 2), Logits(0.2)


def assert_nearest(stored: Tensor, values: Tensor, bits: int, clip: float) -> None:
    """Each token's scale is its largest magnitude, clipped, over the largest level; each value at the nearest level."""
    levels = torch.tensor(LEVELS[bits], dtype=torch.float64)
    for got, of in zip(stored, values, strict=True):
        scale = (of.abs().max() * clip / levels[-1]).half().double()
        distance = (got[:, None] - scale * levels).abs().min(1).values
        assert (distance <= 1e-6 * scale).all(), "no level of this scale"
        nearest = (of[:, None] - scale * levels).abs().min(1).values
        assert ((of - got).abs() <= nearest + 1e-4 * scale).all(), "not the nearest level"


@pytest.mark.parametrize("settings", [{"bits": 2}, {"bits": 4, "clip": 0.7}, {"bits": 8}], ids=str)
@pytest.mark.parametrize("where", [{}, {"basis": "pca"}, {"stage": "pre"}], ids=str)
def test_codes_are_the_nearest_levels(settings: dict[str, Any], where: dict[str, Any]) -> None:
    """Of B (k - μ) in units of its deviation; of mean keys with 4 bits, of mean values with 8, whatever the tokens."""
    chosen = {"keep": 0.3, "rank": 16, "tokens_per_cluster": 5, "sinks": 2, "window": 3, **settings, **where}
    store, rows = make("spectral", GEOMETRY, **chosen), draw(GEOMETRY, (9, 60), 8)
    assert isinstance(store, SpectralStore)
    prefill(store, rows, LOGITS)
    decode(store, rows, LOGITS)
    of, artifact = store.selection, coded.artifact(GEOMETRY.dim, GEOMETRY.kv_heads)
    for index, row in enumerate(rows):
        for head in range(GEOMETRY.kv_heads):
            coding = Coding.of(artifact, head, 16, of, torch.float32)
            held, key = Held.of(store, index, head), row.key[head].double()
            members = clustering_of(store, index, head).members
            means = torch.stack([key[each].mean(0) for each in members])
            values = torch.stack([row.value[head, each].double().mean(0) for each in members])
            clip = CLIP[of.bits] if of.clip is None else of.clip
            assert_nearest(held.tokens, (key - coding.mean) @ coding.key_map.T, of.bits, clip)
            assert_nearest(held.clusters, (means - coding.mean) @ coding.key_map.T, 4, 1.0)
            assert_nearest(held.values, values, 8, 1.0)


def fitted_to(queries: Tensor, keys: Tensor) -> Artifact:
    """Whose moments are exactly those of these samples [Hkv, n, D]."""
    artifact = coded.artifact(keys.shape[-1], keys.shape[0])
    moments = {}
    for name, of in (("query", queries), ("key", keys)):
        mean = of.mean(1)
        moments[f"layers.0.{name}_post.mean"] = mean
        moments[f"layers.0.{name}_post.covariance"] = of.mT @ of / of.shape[1] - mean[:, :, None] * mean[:, None]
    return replace(artifact, stages={**artifact.stages, "moments": Stage(moments)})


def drawn() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    queries, keys = (torch.randn(2, n, 32, generator=generator, dtype=torch.float64) for n in (70, 90))
    return 2 * queries + 0.5, keys * torch.linspace(3, 0.1, 32, dtype=torch.float64) - 1.5


@pytest.mark.parametrize("basis", ["pca", "score"])
def test_variance_is_that_of_what_the_basis_leaves_out(basis: str) -> None:
    """Over every pair of a query and a key, one by one; the lift of a logit is half of it, times the scaling twice."""
    queries, keys = drawn()
    artifact = fitted_to(queries, keys)
    found = CodedBasis.load(artifact, 0, 16, 4, None, "post", basis)
    query_map, key_map, mean, offset = (part.double() for part in found.parts(keys.float()))
    for head in range(2):
        missed = torch.stack(
            [
                torch.stack(
                    [
                        q @ k - (query_map[head] @ q) @ (key_map[head] @ k - offset[head]) - q @ mean[head]
                        for k in keys[head]
                    ]
                )
                for q in queries[head]
            ]
        )
        assert abs(missed.mean()) < 1e-4  # keys are centred
        lift = found.correction(keys.float(), 0.25)[head]
        torch.testing.assert_close(float(lift), float(0.25**2 * missed.square().mean() / 2), rtol=1e-4, atol=0)


@pytest.mark.parametrize("basis", ["pca", "score"])
def test_dimensions_have_one_deviation(basis: str) -> None:
    queries, keys = drawn()
    found = CodedBasis.load(fitted_to(queries, keys), 0, 16, 8, None, "post", basis)
    _, key_map, _, offset = (part.double() for part in found.parts(keys.float()))
    projected = keys @ key_map.mT - offset[:, None]
    torch.testing.assert_close(projected.mean(1), torch.zeros(2, 16).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(projected.square().mean(1), torch.ones(2, 16).double(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_directions_without_keys_do_not_drown_the_others(dtype: torch.dtype) -> None:
    """Keys in 20 of 32 dimensions: what is left of the others is rounding, and must not set a token's scale."""
    queries, keys = drawn()
    axes = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    keys[..., 20:] = 0
    keys, queries = (keys @ axes).float().double(), queries @ axes
    artifact = fitted_to(queries, keys)
    components = axes.float().expand(2, -1, -1)
    pca = {**artifact.stages["pca"].tensors, "layers.0.key_post.components": components.contiguous()}
    artifact = replace(artifact, stages={**artifact.stages, "pca": Stage(pca)})
    basis = CodedBasis.load(artifact, 0, 32, 8, None, "post", "pca")
    codes, scales = basis.encode(keys[None].to(dtype))
    query = queries[None, :, :1].to(dtype)
    got = basis.logits(query, codes, scales, Logits(1.0)) - basis.correction(query, 1.0).view(-1, 1, 1)
    exact = query.double() @ keys[None].mT
    assert torch.isfinite(got).all()
    assert (got - exact).std() < 0.03 * exact.std()


def test_rank_is_rounded_up_to_what_is_packed() -> None:
    """Tiles of 16 where the head dim has them; otherwise whole bytes, of the clusters' 4 bits as well."""
    for rank, width, bits, expected in (
        (0.5, 64, 2, 32), (0.3, 64, 2, 32), (0.01, 64, 8, 16), (1.0, 80, 4, 80), (0.25, 80, 2, 32),
        (48, 64, 2, 48), (80, 80, 2, 80), ("variance:0.9", 64, 2, 32), (0.5, 12, 2, 8), (0.5, 12, 4, 6),
        (0.5, 12, 8, 6), (6, 12, 8, 6), (12, 12, 2, 12), (0.9, 12, 2, 12),
    ):  # fmt: skip
        dims = {"variance:0.9": 20}.get(rank) or (rank if isinstance(rank, int) else -(-int(rank * width * 100) // 100))
        assert coded_rank(rank, dims, width, bits) == expected, (rank, width, bits)


@pytest.mark.parametrize(("share", "expected"), [(0.2, 16), (0.9, 32), (1.0, 32)])
def test_rank_by_variance(share: float, expected: int) -> None:
    spectrum = coded.artifact(32, 2).stages["pca"].tensors["layers.0.key_post.eigenvalues"]
    needed = int((spectrum.cumsum(-1) < share * spectrum.sum(-1, keepdim=True) * (1 - 1e-9)).sum(-1).max()) + 1
    assert -(-min(32, needed) // 16) * 16 == expected
    assert CodedBasis.load(coded.artifact(32, 2), 0, f"variance:{share}", 4, None, "post", "pca").rank == expected


@pytest.mark.parametrize(
    ("width", "settings", "message"),
    [
        (64, {"rank": 20}, "rank 20: codes take a multiple of 16, e.g. 16"),
        (64, {"rank": 1}, "rank 1: codes take a multiple of 16, e.g. 16"),
        (64, {"rank": 65}, "rank 65 is above the head dim 64: "),
        (64, {"rank": "0.5"}, "rank '0.5': "),
        (12, {"rank": 6}, "rank 6: codes take a multiple of 4, e.g. 4"),
        (12, {"rank": 5, "bits": 4}, "rank 5: codes take a multiple of 2, e.g. 4"),
        (6, {"rank": 1.0}, "a head dim of 6: codes of 2 bits take a multiple of 4: give a smaller rank, or more bits"),
        (7, {"rank": 1.0, "bits": 8}, "a head dim of 7: codes of 8 bits take a multiple of 2: give a smaller rank"),
        (12, {"rank": 5, "bits": 8}, "rank 5: codes take a multiple of 2, e.g. 4"),
        (64, {"bits": 3}, "bits 3: give 2, 4 or 8"),
        (64, {"bits": 16}, "bits 16: give 2, 4 or 8"),
        (64, {"bits": 2.0}, "bits 2.0: give 2, 4 or 8"),
        (64, {"bits": "2"}, "bits '2': give 2, 4 or 8"),
        (64, {"clip": 0}, "clip 0: give a share of the largest magnitude from 0.01 to 1"),
        (64, {"clip": 1.5}, "clip 1.5: "),
        (64, {"clip": "x"}, "clip 'x': "),
        (64, {"stage": "mid"}, "stage 'mid': give pre or post"),
        (64, {"basis": "svd"}, "basis 'svd': give pca or score"),
        (64, {"refine": 0}, "refine 0: "),
        (64, {"refine": 1.5}, "refine 1.5: "),
        (64, {"flat_below": -1}, "flat_below -1: give a whole number of at least 0"),
        (64, {"recent": 0}, "recent 0: give a whole number of at least 1"),
        (64, {"keep": 0.0}, "keep 0.0: "),
        (64, {"tail": 1}, "tail 1: give True or False"),
        (64, {"tokens_per_cluster": 0}, "tokens_per_cluster 0: "),
        (64, {"window": 0}, "window 0: "),
        (64, {"sinks": -1}, "sinks -1: "),
        (64, {"select": "layer"}, "select 'layer': give head or group or max"),
        (64, {"offload": "disk"}, "offload 'disk': give none or cpu"),
        (64, {"cached": 0}, "cached 0: "),
        (64, {"segment": 0}, "segment 0: "),
        (64, {"iterations": 0}, "iterations 0: "),
    ],
    ids=str,
)
def test_refused(width: int, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(KvcalError, match=f"^{message}[^\n]*$"):
        Spectral(**settings).build(0, width, coded.artifact(width, 2))


def test_what_an_artifact_has_to_have() -> None:
    with pytest.raises(KvcalError, match=r"^spectral needs an artifact: make one with `calibrate pca`[^\n]*$"):
        Spectral().build(0, 64, None)
    whole = samples.artifact(head_dim=16)
    for stage in ("score", "moments"):
        lacking = replace(whole, stages={name: of for name, of in whole.stages.items() if name != stage})
        with pytest.raises(KvcalError, match=rf"^[^\n]*{stage}[^\n]*$"):
            Spectral().build(0, 16, lacking)
