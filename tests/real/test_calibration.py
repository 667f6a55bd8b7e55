"""What `calibrate pca` says of a real model, against hooks on its projections and numpy."""

import json

import numpy as np
import pytest
from oracle_smollm2 import rank, recorded

from kvcal.calibrate.blocks import make_blocks
from kvcal.calibrate.data import open_data
from kvcal.calibrate.rank import rank_report

pytestmark = pytest.mark.real
KV_HEADS, GROUP, LAYERS = 3, 3, 30


@pytest.fixture(scope="module")
def seen(smollm2, blocks):
    """By layer, what the calibrated blocks gave [heads, counted tokens, D]."""
    parts = [recorded(smollm2, row[None].long()) for row in blocks.ids]
    counted = [row.numpy() for row in blocks.counted]
    return [
        {
            name: np.concatenate([part[at][name][:, rows] for part, rows in zip(parts, counted, strict=True)], 1)
            for name in parts[0][at]
        }
        for at in range(LAYERS)
    ]


def pooled(rows):
    """Queries of a group are those of their KV head."""
    return rows.reshape(KV_HEADS, -1, rows.shape[-1])


def test_keys_and_values_are_the_models(artifact, seen):
    for layer, expected in enumerate(seen):
        for name in ("key_post", "value"):
            stored = artifact.tensor("reservoir", layer, name).double().numpy()
            np.testing.assert_allclose(stored, expected[name], atol=2e-4 * np.abs(expected[name]).max())
        queries = expected["query_post"].reshape(KV_HEADS, GROUP, -1, 64)
        stored = artifact.tensor("reservoir", layer, "query_post").double().numpy()
        off = np.abs(queries - stored[:, None]).max(-1).min(1)  # of each token one of its three
        assert off.max() < 2e-4 * np.abs(queries).max()


def test_statistics_and_ranks(artifact, seen):
    report = rank_report(artifact)["layers"]
    for layer, expected in enumerate(seen):
        for name, rows in expected.items():
            rows = pooled(rows)
            mean, covariance = (
                artifact.tensor("moments", layer, f"{name}.{part}").numpy() for part in ("mean", "covariance")
            )
            np.testing.assert_allclose(mean, rows.mean(1), atol=1e-4 * np.abs(rows).max())
            for head in range(KV_HEADS):
                own = np.cov(rows[head].T, bias=True)
                np.testing.assert_allclose(covariance[head], own, atol=1e-4 * np.abs(own).max())
                spectrum = np.linalg.eigvalsh(own)[::-1]
                # Where 90 % are met to a hair, rounding decides.
                least, most = (rank(spectrum, 0.9 + by) for by in (-1e-5, 1e-5))
                assert least <= report[layer][name][head] <= most <= least + 1


def test_keys_have_low_rank_before_their_rotation(artifact):
    """What the method lives on, of a model that nobody here trained."""
    model = rank_report(artifact)["model"]
    assert model["key_pre"] < model["key_post"] < 40 and model["key_post"] < model["value"]


def test_the_same_command_gives_the_same_bytes(artifact, calibrate_pca):
    again = calibrate_pca()
    names = {path.name for path in again.iterdir()}
    assert names == {path.name for path in artifact.folder.iterdir()}
    assert {name.split(".")[0] for name in names if name.endswith(".safetensors")} == {
        "moments",
        "pca",
        "score",
        "reservoir",
        "codebook",
    }
    for name in names:
        assert (again / name).read_bytes() == (artifact.folder / name).read_bytes(), name


def test_codewords_explain_keys_and_values_of_text_that_they_were_not_fitted_to(artifact, unseen):
    """Keys and values together lie nearer to their codeword than to the mean of the calibration text."""
    shares = []
    for layer, rows in enumerate(unseen):
        get = {name: artifact.tensor("codebook", layer, name).double().numpy() for name in ("key", "value", "spread")}
        for head in range(KV_HEADS):
            key, value = (rows[name][head].astype(np.float64) for name in ("key_post", "value"))
            a, b = get["spread"][head]
            far = ((key[:, None] / a - get["key"][head] / a) ** 2).sum(-1)
            far = far + ((value[:, None] / b - get["value"][head] / b) ** 2).sum(-1)
            key_mean, value_mean = (
                artifact.tensor("moments", layer, f"{name}.mean")[head].numpy() for name in ("key_post", "value")
            )
            around = (((key - key_mean) / a) ** 2).sum() + (((value - value_mean) / b) ** 2).sum()
            shares.append(far.min(1).sum() / around)
    assert np.mean(shares) < 0.9 and max(shares) < 1, shares


def test_the_score_basis_keeps_attention_where_pca_loses_it(artifact, unseen):
    """Of unseen text, 16 of 64 dimensions choose 26 of at most 256 keys: the error of attention to these alone."""

    def error(layer, name, maps):
        key, value = (unseen[layer][part] for part in ("key_post", "value"))
        queries = unseen[layer]["query_post"].reshape(KV_HEADS, GROUP, 256, 64)[:, :, 200::8]
        found = []
        for head in range(KV_HEADS):
            to_query, to_key = (part[head].double().numpy()[:16] for part in maps)
            allowed = np.arange(256) <= np.arange(200, 256, 8)[:, None]
            exact = np.where(allowed, queries[head] @ key[head].T / 8, -np.inf)
            near = np.where(allowed, (queries[head] @ to_query.T) @ (to_key @ key[head].T), -np.inf)
            chosen = near >= np.sort(near, -1)[..., -26:-25]
            weights = [np.exp(each - each.max(-1, keepdims=True)) for each in (exact, np.where(chosen, exact, -np.inf))]
            dense, sparse = (each / each.sum(-1, keepdims=True) @ value[head] for each in weights)
            found.append(np.linalg.norm(sparse - dense) / np.linalg.norm(dense))
        return found

    errors = {"pca": [], "score": []}
    for layer in range(LAYERS):
        components = artifact.tensor("pca", layer, "key_post.components")
        score = [artifact.tensor("score", layer, f"post.{name}") for name in ("query_map", "key_map")]
        errors["pca"] += error(layer, "pca", (components, components))
        errors["score"] += error(layer, "score", score)
    pca, score = (np.array(errors[name]) for name in ("pca", "score"))
    assert score.mean() < 0.75 * pca.mean() and (score < pca).mean() > 0.75


def test_chats_are_written_by_the_models_own_template(tokenizer, tmp_path):
    chats = [
        [{"role": "user", "content": "Which day is it?"}, {"role": "assistant", "content": "Friday."}],
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "2 + 2?"},
            {"role": "assistant", "content": "4"},
        ],
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    made = make_blocks(open_data(tmp_path / "chats.jsonl"), tokenizer, num_tokens=64, seq_len=32)
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    assert "named SmolLM" in texts[0] and texts[1].startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    found = made.ids[made.counted].tolist()
    expected = [token for text in texts for token in tokenizer(text, add_special_tokens=False).input_ids]
    assert found == expected[: len(found)] and len(found) > 60
