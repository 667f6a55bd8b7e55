"""`cla+loki` and the like with trained weights and refit bases from an artifact, against masks and forward passes."""

import math

import pytest
import torch
from cla_oracle import inventory
from compressed import CLOSE, SMALL, artifact, model, random_ids, step_logits
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from kvcal.artifacts import KvcalError, Stage
from kvcal.calibrate.blocks import TokenBlocks
from kvcal.calibrate.one_pass import calibrate
from kvcal.runtime import CompressedCache, compress
from kvcal.runtime.cla import SharingMap, shared, sharing_of

GROUPS = SharingMap.parse("0-1,2")
PREFIX = 24
PCA = {"rank": 0.5, "keep": 0.25, "basis": "pca", "select": "head", "sinks": 0, "recent": 0}
IDS = torch.cat([random_ids(50, seed=row) for row in range(2)])


def blocks():
    every = torch.ones(4, 32, dtype=torch.bool)
    ids = torch.randint(3, 96, (4, 32), generator=torch.Generator().manual_seed(7), dtype=torch.int32)
    return TokenBlocks(ids, every, every, {"id": "random"})


@pytest.fixture(scope="module")
def weights():
    """As training leaves them: of the shared projections, of queries and of norms."""
    with shared(model(), GROUPS, trainable="shared") as sharing:
        generator = torch.Generator().manual_seed(5)
        return {
            name: parameter.detach() + 0.05 * torch.randn(parameter.shape, generator=generator)
            for name, parameter in sharing.parameters.items()
        }


@pytest.fixture(scope="module")
def of_shared(weights):
    """What the calibration pass finds in the shared model."""
    with shared(model(), GROUPS, weights=weights):
        return calibrate(model(), blocks(), model_id="tiny", reservoir=16)


@pytest.fixture(scope="module")
def trained(weights, of_shared):
    """An artifact of the original model after uptraining, with clusters of its own keys."""
    bases = {name: t for name, t in of_shared.stages["pca"].tensors.items() if name.split(".")[1] in ("0", "2")}
    stage = Stage({**{f"weights.{name}": t for name, t in weights.items()}, **bases}, {"groups": str(GROUPS)})
    centroids = {f"layers.{layer}.centroids": torch.randn(2, 8, 16) for layer in range(3)}
    return artifact().with_stage("cla", stage).with_stage("clusters", Stage(centroids))


def decoded(found, method, **settings):
    with compress(model(), found, method, **settings), torch.no_grad():
        cache = None
        parts = []
        for at in (slice(0, PREFIX), *(slice(at, at + 1) for at in range(PREFIX, IDS.shape[1]))):
            out = model()(IDS[:, at], past_key_values=cache)
            cache = out.past_key_values
            parts.append(out.logits)
        return torch.cat(parts, 1)[:, PREFIX - 1 :], cache


def with_masks(visible):
    """Logits of one forward pass in which queries from PREFIX on see `visible(layer, query, key)` [B, Hq, T, T]."""

    def attention(module, query, key, value, mask, scaling=None, **_):
        group, tokens = query.shape[1] // key.shape[1], key.shape[2]
        key, value = (each.repeat_interleave(group, 1) for each in (key, value))
        past = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        seen = visible(module.layer_idx, query, key, past) | (torch.arange(tokens) < PREFIX).unsqueeze(1) & past
        logits = (query @ key.mT * scaling).masked_fill(~seen, -torch.inf)
        return (logits.softmax(-1) @ value).transpose(1, 2), None

    AttentionInterface.register("simulated_cla", attention)
    AttentionMaskInterface.register("simulated_cla", sdpa_mask)
    before = model().config._attn_implementation
    model().set_attn_implementation("simulated_cla")
    try:
        with torch.no_grad():
            return model()(IDS, use_cache=False).logits[:, PREFIX - 1 :]
    finally:
        model().set_attn_implementation(before)
        del AttentionInterface._global_mapping["simulated_cla"]
        del AttentionMaskInterface._global_mapping["simulated_cla"]


@pytest.mark.parametrize("stage", ["pre", "post"])
def test_each_reading_layer_selects_with_its_own_queries_in_the_refit_basis(trained, weights, stage):
    def visible(layer, query, key, past, who=None):
        basis = trained.stages["cla"].tensors[f"layers.{GROUPS.storing_of(layer)}.key_{stage}.components"]
        low = basis[:, :8].repeat_interleave(2, 0)
        scores = ((query @ low.mT) @ (key @ low.mT).mT).masked_fill(~past, -torch.inf)
        if who is not None:  # instead with those of the storing layer
            who.setdefault(GROUPS.storing_of(layer), scores)
            scores = who[GROUPS.storing_of(layer)]
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        for at in range(scores.shape[2]):
            best = scores[:, :, at].topk(math.ceil(0.25 * (at + 1))).indices
            chosen[:, :, at].scatter_(-1, best, True)
        return chosen & past

    found, _ = decoded(trained, "cla+loki", **PCA, stage=stage)
    with shared(model(), GROUPS, weights=weights):
        torch.testing.assert_close(found, with_masks(visible), **CLOSE)
        of_storing = {}
        others = with_masks(lambda *arguments: visible(*arguments, who=of_storing))
    assert (found - others).abs().max() > 1e-3  # what is told apart


def test_what_keeps_all_equals_cla(trained, weights):
    expected, cache = decoded(trained, "cla")
    with shared(model(), GROUPS, weights=weights), torch.no_grad():
        torch.testing.assert_close(expected, model()(IDS, use_cache=False).logits[:, PREFIX - 1 :], **CLOSE)
    for method, settings in (
        ("cla+full", {}),
        ("cla+loki", {"keep": 1.0, "basis": "pca"}),
        ("cla+clusterkv", {"keep": 1.0, **{k: SMALL["clusterkv"][k] for k in ("tokens_per_cluster", "window")}}),
        ("cla+exact_topk", {"keep": 1.0}),
    ):
        found, of = decoded(trained, method, **settings)
        torch.testing.assert_close(found, expected, **CLOSE)
        if method in ("cla+full", "cla+loki"):
            assert of.resident_bytes() == cache.resident_bytes()


def test_clusters_of_other_keys_are_not_begun_with(trained):
    _, cache = decoded(trained, "cla+clusterkv", **SMALL["clusterkv"])
    assert [store.sequence_index.start for store in cache.stores.values()] == [None] * 3
    _, cache = decoded(trained, "clusterkv", **SMALL["clusterkv"])
    assert all(store.sequence_index.start is not None for store in cache.stores.values())


def test_untrained_projections_and_other_groups(trained):
    for settings, pool in (({"uptrained": False}, "mean"), ({"uptrained": False, "pool": "first"}, "first")):
        found, _ = decoded(trained, "cla", **settings)
        with shared(model(), GROUPS, pool=pool), torch.no_grad():
            torch.testing.assert_close(found, model()(IDS, use_cache=False).logits[:, PREFIX - 1 :], **CLOSE)
    found, _ = decoded(trained, "cla", groups="0,1-2")
    with shared(model(), SharingMap.parse("0,1-2")), torch.no_grad():
        torch.testing.assert_close(found, model()(IDS, use_cache=False).logits[:, PREFIX - 1 :], **CLOSE)


@pytest.mark.parametrize("settings", [{"uptrained": False}, {"groups": "0,1-2"}])
def test_no_basis_of_the_shared_keys_is_refused(trained, settings):
    before = inventory(model())
    message = r"loki needs a basis of the keys as shared in layer 0: make it with `calibrate share ARTIFACT"
    with pytest.raises(KvcalError, match=message), compress(model(), trained, "cla+loki", basis="pca", **settings):
        pass
    assert inventory(model()) == before and sharing_of(model()) is None


@pytest.mark.parametrize("settings", [{}, {"uptrained": False}, {"groups": "0,1-2"}])
def test_spectral_has_no_codebook_of_shared_keys(trained, of_shared, weights, settings):
    """Also where the artifact was calibrated in the shared model: its codes are fitted to one layer's queries."""
    before, other = inventory(model()), r"keys and values, and spectral's codebooks are of one [^\n]* without a basis$"
    for found in (trained, artifact()):
        own = {"groups": str(GROUPS), **settings} if found is not trained else settings
        with pytest.raises(KvcalError, match=rf"^layers \d, \d share {other}"):
            compress(model(), found, "cla+spectral", **own).__enter__()
        assert inventory(model()) == before and sharing_of(model()) is None
    with shared(model(), GROUPS, weights=weights), pytest.raises(KvcalError, match=rf"layers 0, 1 share {other}"):
        CompressedCache(model(), of_shared, "spectral")


def test_where_no_basis_is_named_shared_keys_are_scored_in_that_of_key_pca(trained, of_shared, weights):
    unsaid = {name: value for name, value in PCA.items() if name != "basis"}
    expected, _ = decoded(trained, "cla+loki", **PCA)
    found, cache = decoded(trained, "cla+loki", **unsaid)
    assert torch.equal(found, expected) and {of.basis for of in cache.blueprint.methods.values()} == {"pca"}
    refused = pytest.raises(
        KvcalError, match="layers 0, 1 share keys and values, and basis 'score' is fitted to the queries of one layer"
    )
    with shared(model(), GROUPS, weights=weights):
        cache = CompressedCache(model(), of_shared, "loki", **unsaid)
        torch.testing.assert_close(step_logits(model(), IDS, cache, PREFIX), expected, **CLOSE)
        with refused:
            CompressedCache(model(), of_shared, "loki", **unsaid, basis="score")
    with compress(model(), trained, "cla+loki"):
        assert {of.basis for of in model()(IDS).past_key_values.blueprint.methods.values()} == {"pca"}
    with refused, compress(model(), trained, "cla+loki", basis="score"):
        pass
    # A map that shares nothing leaves every layer its own keys and its own defaults.
    assert {of.basis for of in decoded(trained, "cla+loki", groups="0,1,2")[1].blueprint.methods.values()} == {"score"}


@pytest.mark.parametrize("method", ["loki", "clusterkv", "spectral"])
def test_where_no_two_layers_share_the_artifacts_own_fits_are_used(trained, method):
    for of in (trained, artifact()):
        expected, _ = decoded(of, method, **SMALL[method])
        found, _ = decoded(of, f"cla+{method}", groups="0,1,2", **SMALL[method])
        assert torch.equal(found, expected)


def test_a_cache_of_ones_own_takes_the_method_after_the_plus(trained):
    expected, _ = decoded(trained, "cla+loki", **PCA)
    with compress(model(), trained, "cla"):
        cache = CompressedCache(model(), trained, "loki", **PCA)
        torch.testing.assert_close(step_logits(model(), IDS, cache, PREFIX), expected, **CLOSE)


def test_a_model_that_is_shared_for_good_has_an_artifact_of_its_own(of_shared, weights, trained):
    """Calibrated as any other; reading layers have the storing layer's keys and values."""
    tensors = of_shared.stages["moments"].tensors
    for quantity in ("key_pre", "key_post", "value"):
        assert torch.equal(*(tensors[f"layers.{layer}.{quantity}.covariance"] for layer in (0, 1)))
    assert not torch.equal(*(tensors[f"layers.{layer}.query_post.covariance"] for layer in (0, 1)))
    expected, _ = decoded(trained, "cla+loki", **PCA)
    with shared(model(), GROUPS, weights=weights):
        found, _ = decoded(of_shared, "loki", **PCA)
        torch.testing.assert_close(found, expected, **CLOSE)
        with (
            pytest.raises(KvcalError, match="basis 'score' is fitted to the queries of one layer"),
            compress(model(), of_shared, "loki", basis="score"),
        ):
            pass
        with pytest.raises(KvcalError, match="layers 0 and 1 share one cache"):
            CompressedCache(model(), of_shared, "loki", dense_layers=1)
        CompressedCache(model(), of_shared, "loki", dense_layers=2)


def test_an_artifact_of_another_model_is_refused_before_anything_is_shared():
    before = inventory(model())
    with pytest.raises(KvcalError, match="was fitted for model_type qwen2"):
        compress(model(), artifact("qwen2"), "cla", groups="0-1,2").__enter__()
    assert inventory(model()) == before
