"""The pass as a whole, on tiny models of real architectures, against tensors recorded by plain hooks."""

import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, build
from scipy.linalg import subspace_angles
from sklearn.decomposition import PCA as SklearnPCA

from kvcal import artifacts
from kvcal.artifacts import QUANTITIES, KvcalError, Stage
from kvcal.calibrate.blocks import TokenBlocks
from kvcal.calibrate.capture import capture
from kvcal.calibrate.one_pass import calibrate, save
from kvcal.calibrate.statistics import StatisticsFitter

SEQ_LEN = 21


def make_blocks(count=7, seed=0, padded=8):
    """Blocks that start with an uncounted BOS, have an uncounted separator, and end in padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 96, (count, SEQ_LEN), generator=generator, dtype=torch.int32)
    attended = torch.ones(count, SEQ_LEN, dtype=torch.bool)
    attended[-1, SEQ_LEN - padded :] = False
    ids[:, 0], ids[1, 9] = 1, 2
    counted = attended.clone()
    counted[:, 0] = counted[1, 9] = False
    ids[~attended] = 0
    return TokenBlocks(ids, counted, attended, {"id": "random", "seed": seed})


@torch.no_grad()
def recorded(name, model, blocks):
    """Per layer and quantity [heads, counted tokens, D], block by block, each cut to its attended tokens."""
    parts = []
    for row in range(len(blocks)):
        ids = blocks.ids[row : row + 1].long()
        layers = ARCHITECTURES[name].oracle(model, lambda ids=ids: model(input_ids=ids, use_cache=False))
        parts.append([{key: value[0][:, blocks.counted[row]] for key, value in layer.items()} for layer in layers])
    return [
        {quantity: torch.cat([part[layer][quantity] for part in parts], 1).double() for quantity in QUANTITIES}
        for layer in range(len(parts[0]))
    ]


@pytest.fixture(scope="module")
def llama():
    return build("llama")


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3", "gpt-neox", "gpt2", "cohere", "mistral-window"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_moments_are_those_of_the_counted_tokens_only(name, batch_size):
    model, blocks = build(name), make_blocks()
    artifact = calibrate(model, blocks, batch_size=batch_size)
    for layer, expected in enumerate(recorded(name, model, blocks)):
        for quantity in QUANTITIES:
            samples = expected[quantity]
            kv_heads = artifact.layers[layer].kv_heads
            samples = samples.reshape(kv_heads, -1, samples.shape[-1])  # queries pooled over their group
            assert artifact.tensor("moments", layer, f"{quantity}.count").item() == samples.shape[1]
            mean = artifact.tensor("moments", layer, f"{quantity}.mean")
            torch.testing.assert_close(mean, samples.mean(1), rtol=1e-5, atol=1e-5)
            for head in range(kv_heads):
                covariance = artifact.tensor("moments", layer, f"{quantity}.covariance")[head]
                oracle = torch.cov(samples[head].T, correction=0)
                torch.testing.assert_close(covariance, oracle, rtol=1e-4, atol=1e-5 * oracle.abs().max().item())


def test_pca_equals_scikit_learn_on_the_stored_keys(llama):
    artifact = calibrate(llama, make_blocks(40), reservoir=4096)  # larger than the text: every key is stored
    for layer in range(3):
        keys = artifact.tensor("reservoir", layer, "key_post")
        assert keys.shape[1] == artifact.data["tokens_counted"]
        for head in range(2):
            oracle = SklearnPCA().fit(keys[head].double().numpy())
            spectrum = artifact.tensor("pca", layer, "key_post.eigenvalues")[head]
            np.testing.assert_allclose(spectrum, oracle.explained_variance_, rtol=1e-6)
            rows = artifact.tensor("pca", layer, "key_post.components")[head]
            for rank in (1, 4, 8):
                assert subspace_angles(rows[:rank].double().numpy().T, oracle.components_[:rank].T).max() < 1e-4


def test_reservoir_holds_the_rows_of_its_tokens(llama):
    blocks = make_blocks()
    artifact = calibrate(llama, blocks, reservoir=30, batch_size=2)
    token = artifact.stages["reservoir"].tensors["token"]
    assert len(token) == 30 and (token.diff() > 0).all() and blocks.counted.flatten()[token].all()
    position = artifact.stages["reservoir"].tensors["position"]
    assert torch.equal(position, token % SEQ_LEN)
    among_counted = torch.searchsorted(blocks.counted.flatten().nonzero().flatten(), token)
    for layer, expected in enumerate(recorded("llama", llama, blocks)):
        for quantity in ("key_post", "value"):
            stored = artifact.tensor("reservoir", layer, quantity).double()
            torch.testing.assert_close(stored, expected[quantity][:, among_counted], rtol=1e-5, atol=1e-5)
        queries = expected["query_post"][:, among_counted].unflatten(0, (2, 2))  # [Hkv, G, n, D]
        stored = artifact.tensor("reservoir", layer, "query_post").double()
        nearest = (queries - stored.unsqueeze(1)).abs().amax(-1).min(1)
        assert (nearest.values < 1e-5).all()
        assert set(nearest.indices.flatten().tolist()) == {0, 1}  # both heads of a group are drawn from


def test_another_batch_size_agrees_within_1e_5(llama):
    one, many = (calibrate(llama, make_blocks(), batch_size=size) for size in (1, 4))
    for stage, names in (("moments", ("mean", "covariance")), ("pca", ("eigenvalues", "eigenvalues_uncentred"))):
        for name, tensor in one.stages[stage].tensors.items():
            if name.endswith(names):
                other = many.stages[stage].tensors[name]
                assert (other - tensor).norm() <= 1e-5 * tensor.norm(), name


def test_merged_halves_equal_one_pass(llama):
    blocks = make_blocks(6)

    def fitter(rows):
        found = StatisticsFitter(reservoir=50, seed=3)
        with torch.no_grad(), capture(llama, lambda seen: found.update(seen, "unrotate")):
            for row in rows:
                tokens = torch.arange(row * SEQ_LEN, (row + 1) * SEQ_LEN)[None]
                found.begin_batch(tokens, blocks.counted[row : row + 1])
                llama(input_ids=blocks.ids[row : row + 1].long(), use_cache=False)
        return found

    halves, whole = fitter([0, 1, 5]), fitter(range(6))
    halves.merge(fitter([2, 3, 4]))
    merged, expected = halves.finalize(), whole.finalize()
    for name, tensor in expected["moments"].items():
        torch.testing.assert_close(merged["moments"][name], tensor, rtol=1e-10, atol=1e-10)
    for name, tensor in expected["reservoir"].items():
        assert torch.equal(merged["reservoir"][name], tensor), name


def test_uncentred_pca_is_of_the_second_moment(llama):
    artifact = calibrate(llama, make_blocks(), centred=False)
    rows = artifact.tensor("pca", 1, "key_post.components")[0].double()
    keys = artifact.tensor("reservoir", 1, "key_post")[0].double()
    _, _, right = torch.linalg.svd(keys, full_matrices=False)
    assert subspace_angles(rows[:3].numpy().T, right[:3].numpy().T).max() < 1e-4


def test_nan_activations_name_the_layer():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] = float("nan")
    with pytest.raises(KvcalError, match="layer 1: NaN or Inf among the key"):
        calibrate(model, make_blocks())


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(KvcalError, match=r"training mode.*eval"):
        calibrate(build("gpt2").train(), make_blocks())


def test_layers_of_unequal_head_dims_can_be_reported(llama):
    """Gemma 4 has them; the card must not fail after a whole pass."""
    from samples import artifact

    from kvcal.calibrate.plots import rank_figure
    from kvcal.calibrate.rank import rank_report

    small, large = artifact(head_dim=4), artifact(head_dim=6, layers=2)
    stage = {name: t for name, t in small.stages["pca"].tensors.items() if name.startswith("layers.0.")}
    stage |= {name: t for name, t in large.stages["pca"].tensors.items() if name.startswith("layers.1.")}
    mixed = replace(small, layers=(small.layers[0], large.layers[1]), stages={"pca": Stage(stage)})
    assert rank_figure(mixed, rank_report(mixed)).startswith(b"\x89PNG")


def test_text_longer_than_the_context_is_refused(llama):
    long = TokenBlocks(*(torch.ones(1, 200, dtype=d) for d in (torch.int32, torch.bool, torch.bool)), {"id": "long"})
    with pytest.raises(KvcalError, match=r"200 tokens exceed this model's context of 128"):
        calibrate(llama, long)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Stop(Exception):
    pass


@pytest.mark.parametrize("stop_at", [1, 4, 6])
def test_a_resumed_run_equals_an_uninterrupted_one(llama, tmp_path, stop_at):
    blocks = make_blocks()
    save(calibrate(llama, blocks, output=tmp_path / "straight"), tmp_path / "straight")

    def stop(done, total):
        if done == stop_at:
            raise Stop

    output = tmp_path / "resumed"
    with pytest.raises(Stop):
        calibrate(llama, blocks, output=output, checkpoint_every=0, progress=stop)
    assert not output.exists()
    steps = []
    artifact = calibrate(llama, blocks, output=output, resume=True, progress=lambda done, total: steps.append(done))
    assert steps[:2] == [0, stop_at - 1]  # the last checkpoint before the stop
    save(artifact, output)
    assert files(output) == files(tmp_path / "straight")
    assert not output.with_name("resumed.partial").exists()


def test_ctrl_c_saves_the_state_and_says_how_to_go_on(llama, tmp_path):
    output = tmp_path / "a"

    def interrupt(done, total):
        if done == 3:
            signal.raise_signal(signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KvcalError, match="interrupted after 3 of 7 blocks, nothing lost: add --resume"):
        calibrate(llama, make_blocks(), output=output, progress=interrupt)
    assert signal.getsignal(signal.SIGINT) is handler
    steps = []
    calibrate(llama, make_blocks(), output=output, resume=True, progress=lambda done, total: steps.append(done))
    assert steps[:2] == [0, 3]


def test_an_interrupted_run_is_neither_lost_nor_mixed_with_another(llama, tmp_path):
    output = tmp_path / "a"

    def stop(done, total):
        if done == 2:
            raise Stop

    with pytest.raises(Stop):
        calibrate(llama, make_blocks(), output=output, checkpoint_every=0, progress=stop)
    state = files(tmp_path / "a.partial")
    with pytest.raises(KvcalError, match="interrupted run is there: add --resume"):
        calibrate(llama, make_blocks(), output=output)
    with pytest.raises(KvcalError, match="another model, text or settings"):
        calibrate(llama, make_blocks(), output=output, resume=True, seed=1)
    with pytest.raises(KvcalError, match="another model, text or settings"):
        calibrate(llama, make_blocks(seed=1), output=output, resume=True)
    assert files(tmp_path / "a.partial") == state


def test_a_damaged_checkpoint_is_named(llama, tmp_path):
    (tmp_path / "a.partial").mkdir()
    (tmp_path / "a.partial" / "blocks-0-of-1.3.json").write_text("{")
    with pytest.raises(KvcalError, match=r"a\.partial: checkpoint is damaged"):
        calibrate(llama, make_blocks(), output=tmp_path / "a", resume=True)


def test_a_run_is_resumed_by_one_process_at_a_time(llama, tmp_path):
    def again(done, total):
        if done == 2:
            with pytest.raises(KvcalError, match="another process works on this now"):
                calibrate(build("llama"), make_blocks(), output=tmp_path / "a", resume=True)

    straight = calibrate(llama, make_blocks())
    found = calibrate(llama, make_blocks(), output=tmp_path / "a", checkpoint_every=0, progress=again)
    for name, stage in straight.stages.items():
        assert all(torch.equal(found.stages[name].tensors[each], tensor) for each, tensor in stage.tensors.items())


def test_the_same_run_again_is_recognised_and_another_refused(llama, tmp_path):
    output = tmp_path / "a"
    first = save(calibrate(llama, make_blocks(), output=output), output)
    before = files(output)
    again = calibrate(llama, make_blocks(), output=output)
    assert again.content_hash == first.content_hash
    for change in ({"seed": 1}, {"centred": False}, {"reservoir": 9}):
        with pytest.raises(KvcalError, match="artifact of another run"):
            calibrate(llama, make_blocks(), output=output, **change)
    with pytest.raises(KvcalError, match="artifact of another run"):
        calibrate(llama, make_blocks(seed=1), output=output)
    with pytest.raises(KvcalError, match="artifact of another run"):
        calibrate(build("llama", seed=1), make_blocks(), output=output)
    assert files(output) == before


def test_another_seed_text_or_model_gives_another_content_hash(llama, tmp_path):
    runs = {
        "base": (llama, make_blocks(), 0),
        "seed": (llama, make_blocks(), 1),
        "text": (llama, make_blocks(seed=1), 0),
        "model": (build("llama", seed=1), make_blocks(), 0),
    }
    hashes = {}
    for name, (model, blocks, seed) in runs.items():
        hashes[name] = artifacts.save(calibrate(model, blocks, seed=seed, reservoir=20), tmp_path / name).content_hash
    assert len(set(hashes.values())) == 4


def test_bfloat16_models_are_captured_in_their_dtype():
    model = build("llama", dtype=torch.bfloat16)
    artifact = calibrate(model, make_blocks())
    assert artifact.tensor("reservoir", 0, "key_post").dtype == torch.bfloat16
    exact = calibrate(model.float(), make_blocks())
    for layer in range(3):
        found, expected = (a.tensor("pca", layer, "key_post.eigenvalues")[:, :4] for a in (artifact, exact))
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0)  # bf16 keeps 8 bits of each activation
