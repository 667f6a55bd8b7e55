"""benchmarks/peers.py and its worker, without kvpress: what goes there, what is measured, what comes back."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from kvcal.artifacts import KvcalError
from kvcal.calibrate.evaluation.measurements import MEASURED
from kvcal.calibrate.evaluation.prompts import Prompts, Windows
from kvcal.calibrate.evaluation.recall_task import RecallTask
from kvcal.calibrate.evaluation.results import compared_rows, parameters

PREFIX, STEPS, VOCABULARY = 24, 6, 50
LAYERS, KV_HEADS, HEAD_DIM = 2, 2, 8
TOKEN_BYTES = LAYERS * 2 * KV_HEADS * HEAD_DIM * 4
"""Keys and values of one token of one row, float32."""


def benchmark(name: str) -> ModuleType:
    path = Path(__file__).parent.parent / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


peers, worker = benchmark("peers"), benchmark("peers_worker")


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=KV_HEADS,
        vocab_size=VOCABULARY,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for layer in model.model.layers:  # else attention is almost uniform, and positions hardly count
        layer.self_attn.q_proj.weight.mul_(20)
        layer.self_attn.k_proj.weight.mul_(20)
    return model


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    generator = torch.Generator().manual_seed(0)

    def ids(*shape: int) -> torch.Tensor:
        return torch.randint(VOCABULARY, shape, generator=generator)

    answers = (range(2, 5), range(3, 6), range(2, 4))
    task = RecallTask("passkey", ids(3, PREFIX), ids(3, STEPS), answers, (0.1, 0.5, 0.1))
    return Prompts(Windows(ids(5, PREFIX + STEPS), PREFIX), (task,))


@pytest.fixture
def batches(prompts: Prompts, tmp_path: Path) -> list[Any]:
    peers.write_job(tmp_path / "job.safetensors", {"keeps": [0.5]}, prompts, 4)
    return worker.read_job(tmp_path / "job.safetensors")[1]


def one_pass(model: Any, batch: Any, kept: torch.Tensor | None = None) -> torch.Tensor:
    """Log-probabilities [B, C, vocabulary] before each token of the continuation, from one call.

    Args:
        kept: which tokens of the prefix the continuation may see; the prefix itself sees all that is before it.
    """
    rows = torch.cat((batch.prefixes, batch.continuations), 1)
    seen = torch.ones(rows.shape[1], rows.shape[1], dtype=torch.bool).tril()
    if kept is not None:
        seen[PREFIX:, :PREFIX] &= kept
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    logits = model(rows, attention_mask=mask.expand(len(rows), 1, *mask.shape)).logits
    return logits[:, PREFIX - 1 : -1].double().log_softmax(-1)


def nll(scores: torch.Tensor, batch: Any) -> list[float]:
    return (-scores.gather(2, batch.continuations[..., None])).sum((1, 2)).tolist()


def drop(kept: torch.Tensor) -> Any:
    """A press that keeps these tokens of the prefix in every head."""

    @contextmanager
    def press(model: Any) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            for layer in kwargs["past_key_values"].layers:
                layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]

        handle = model.register_forward_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    return press


def test_prompts_arrive_as_they_were_sent(prompts, tmp_path):
    sent = {"keeps": [0.5, 0.25], "model_folder": "somewhere", "threads": 1}
    peers.write_job(tmp_path / "job.safetensors", sent, prompts, 4)
    job, batches = worker.read_job(tmp_path / "job.safetensors")
    assert {name: job[name] for name in sent} == sent
    assert [batch.key for batch in batches] == ["perplexity 0+4", "perplexity 4+1", "passkey@24 0+3"]
    windows = torch.cat([torch.cat((batch.prefixes, batch.continuations), 1) for batch in batches[:2]])
    assert torch.equal(windows, prompts.windows.ids)
    (task,) = prompts.recall
    assert torch.equal(batches[2].prefixes, task.prefixes)
    assert torch.equal(batches[2].continuations, task.continuations)
    assert batches[0].answers is None
    asked = [row.nonzero().flatten().tolist() for row in batches[2].answers]
    assert asked == [list(answer) for answer in task.answers]


def test_without_a_press_it_is_the_model_in_one_pass(model, batches):
    for batch in batches:
        found = worker.measure(model, batch, worker.FULL)
        scores = one_pass(model, batch)
        assert found["nll"] == pytest.approx(nll(scores, batch), abs=1e-4)
        if batch.answers is not None:
            hits = scores.argmax(-1) == batch.continuations
            expected = [bool(hit[asked].all()) for hit, asked in zip(hits, batch.answers, strict=True)]
            assert found["exact"] == expected


def test_after_a_press_the_rest_is_seen_at_its_true_positions(model, batches):
    kept = torch.rand(PREFIX, generator=torch.Generator().manual_seed(1)) < 0.4
    peer = worker.Peer({}, lambda prefix: (drop(kept), worker.nothing))
    found = worker.measure(model, batches[0], peer)
    assert found["nll"] == pytest.approx(nll(one_pass(model, batches[0], kept), batches[0]), abs=1e-4)
    assert found["nll"] != pytest.approx(nll(one_pass(model, batches[0]), batches[0]), abs=1e-2)


def test_bytes_are_those_of_the_keys_and_values_held(model, batches):
    kept = torch.arange(PREFIX) >= PREFIX - 7
    for batch, press, tokens in ((batches[0], worker.nothing, PREFIX), (batches[0], drop(kept), 7)):
        found = worker.measure(model, batch, worker.Peer({}, lambda prefix, press=press: (press, worker.nothing)))
        rows = len(batch.prefixes)
        assert found["bytes_read"] == [(tokens + step) * rows * TOKEN_BYTES for step in range(1, STEPS)]
        assert found["resident_bytes"] == (tokens + STEPS - 1) * rows * TOKEN_BYTES


def test_a_press_that_removes_while_decoding_has_read_before(model, batches):
    """Kept at 7 tokens after each step: the first step still reads all, each later one 7 and its own."""
    last = worker.Peer({}, lambda prefix: (worker.nothing, drop(slice(-7, None))))
    found = worker.measure(model, batches[0], last)
    rows = len(batches[0].prefixes)
    assert found["bytes_read"] == [tokens * rows * TOKEN_BYTES for tokens in [PREFIX + 1, *[8] * (STEPS - 2)]]
    assert found["resident_bytes"] == 7 * rows * TOKEN_BYTES


def measured(prompts: Prompts, nll_per_token: float, exact: bool) -> dict[str, Any]:
    raw = {"resident_bytes": 800, "bytes_read": [400, 600], "ms": [1.0, 3.0, 2.0], "error": {}, "mass": {}}
    nlls = {
        key: [nll_per_token * STEPS] * rows
        for key, rows in (("perplexity 0+4", 4), ("perplexity 4+1", 1), ("passkey@24 0+3", 3))
    }
    return {
        key: {**raw, "nll": each, "exact": [exact] * len(each) if key.startswith("passkey") else []}
        for key, each in nlls.items()
    }


@pytest.fixture
def rows(prompts: Prompts) -> list[dict[str, Any]]:
    found = {
        "versions": {"kvpress": "0.0.0"},
        "rows": [
            {"setting": {"method": "full"}, "measured": measured(prompts, 2.0, True)},
            {"setting": {"method": "kvpress-x", "keep": 0.5}, "measured": measured(prompts, 3.0, False)},
        ],
    }
    return peers.peer_rows(found, prompts, 4, LAYERS)


def test_rows_follow_the_schema_of_evaluate(rows, tmp_path):
    assert [parameters(row) for row in rows] == [{"method": "full"}, {"method": "kvpress-x", "keep": 0.5}]
    assert all(set(row) - set(parameters(row)) == set(MEASURED) - {"hit_rate"} for row in rows)  # nothing is offloaded
    assert all(row["source"] == "kvpress 0.0.0" for row in rows)
    assert rows[0]["perplexity"] == pytest.approx(math.exp(2))
    assert rows[1]["perplexity_ratio"] == pytest.approx(math.e)
    assert [row["recall"] for row in rows] == [{"passkey@24": 1}, {"passkey@24": 0}]
    # Of one row, from batches of 4 and 1.
    assert rows[1]["resident_bytes"] == (800 + 800) / 5
    assert rows[1]["bytes_per_step"] == (500 + 500) / 5
    assert rows[1]["ms_per_step"] == 2


def test_evaluate_takes_the_file_for_comparison(rows, tmp_path):
    settings = {"weights_sha256": "a", "tokens_sha256": "b"}
    path = tmp_path / "new" / "peers.json"
    peers.write(path, settings, rows)
    assert json.loads(path.read_text())["settings"] == settings
    assert compared_rows(settings, {"perplexity": 1.0}, path) == rows
    with pytest.raises(KvcalError, match="other tokens"):
        compared_rows({**settings, "tokens_sha256": "c"}, {}, path)


def test_another_perplexity_of_the_uncompressed_model_is_refused(rows):
    ours = {**rows[0], "perplexity": rows[0]["perplexity"] + 5e-5}
    peers.check_full(rows[0], ours)
    with pytest.raises(KvcalError, match="perplexity"):
        peers.check_full(rows[0], {**ours, "perplexity": rows[0]["perplexity"] + 2e-4})
    with pytest.raises(KvcalError, match="perplexity"):
        peers.check_full({**rows[0], "perplexity": math.nan}, ours)
    with pytest.raises(KvcalError, match="recalls"):
        peers.check_full(rows[0], {**ours, "recall": {"passkey@24": 0.5}})


def test_a_worker_that_fails_is_told_of(prompts, tmp_path):
    """This environment has no kvpress or no such model; either way nothing is measured."""
    job = {"model_folder": str(tmp_path / "nothing"), "keeps": [0.5], "threads": 1}
    with pytest.raises(KvcalError, match="exit code"):
        peers.measured_by_peers(Path(sys.executable), job, prompts, 4)
