"""benchmarks/peers and its worker, without kvpress: what goes there, what is measured, what comes back."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.peers import __main__ as peers
from benchmarks.peers import worker
from kvcal.artifacts import KvcalError
from kvcal.calibrate.evaluation.prompts import Prompts, Windows
from kvcal.calibrate.evaluation.results_file import compared_rows, parameters
from kvcal.calibrate.evaluation.rows import MEASURED
from kvcal.calibrate.evaluation.tasks.sample import Sample, Task

PREFIX, STEPS, VOCABULARY = 24, 6, 50
LAYERS, KV_HEADS, HEAD_DIM = 2, 2, 8
TOKEN_BYTES = LAYERS * 2 * KV_HEADS * HEAD_DIM * 4
"""Keys and values of one token of one row, float32."""


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

    samples = [
        Sample(tuple(ids(PREFIX).tolist()), tuple(ids(length).tolist()), ("17",), (1,), depth)
        for length, depth in ((2, 0.1), (4, 0.5), (2, 0.1))
    ]
    return Prompts(Windows(ids(5, PREFIX + STEPS), PREFIX), (Task("passkey", PREFIX, tuple(samples), 3, "digits"),))


@pytest.fixture
def batches(prompts: Prompts, tmp_path: Path) -> list[Any]:
    peers.write_job(tmp_path / "job.safetensors", {"keeps": [0.5], "ends": []}, prompts, 4)
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
    sent = {"keeps": [0.5, 0.25], "model_folder": "somewhere", "threads": 1, "ends": [7, 9]}
    peers.write_job(tmp_path / "job.safetensors", sent, prompts, 4)
    job, batches = worker.read_job(tmp_path / "job.safetensors")
    assert {name: job[name] for name in sent} == sent
    assert [batch.key for batch in batches] == ["perplexity 0+4", "perplexity 4+1", "passkey@24 0+3"]
    windows = torch.cat([torch.cat((batch.prefixes, batch.continuations), 1) for batch in batches[:2]])
    assert torch.equal(windows, prompts.windows.ids)
    (task,) = prompts.tasks
    assert batches[2].prefixes.tolist() == [list(sample.context) for sample in task.samples]
    assert batches[2].questions == [list(sample.question) for sample in task.samples]
    assert (batches[2].new_tokens, batches[2].ends) == (3, {7, 9})
    assert batches[2].continuations is None and batches[0].questions == []


def test_contexts_of_unequal_lengths_are_refused(prompts, tmp_path):
    (task,) = prompts.tasks
    shorter = dataclasses.replace(task.samples[0], context=task.samples[0].context[1:])
    unequal = Prompts(None, (dataclasses.replace(task, samples=(shorter, *task.samples[1:])),))
    with pytest.raises(KvcalError, match="unequal lengths: give --batch-size 1"):
        peers.write_job(tmp_path / "job.safetensors", {}, unequal, 4)
    peers.write_job(tmp_path / "job.safetensors", {}, unequal, 1)


def test_without_a_press_it_is_the_model_in_one_pass(model, batches):
    for batch in batches:
        found = worker.measure(model, batch, worker.FULL)
        if batch.continuations is not None:
            assert found["nll"] == pytest.approx(nll(one_pass(model, batch), batch), abs=1e-4)
        else:
            assert found["answers"] == [
                generated(model, *asked) for asked in zip(batch.prefixes, batch.questions, strict=True)
            ]


def generated(model: Any, prefix: torch.Tensor, question: list[int]) -> list[int]:
    ids = torch.cat((prefix, torch.tensor(question)))[None]
    said = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return said[0, ids.shape[1] :].tolist()


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
    raw = {"resident_bytes": 800, "bytes_read": [400, 600], "ms": [1.0, 3.0, 2.0]}
    texts = (("perplexity 0+4", 4), ("perplexity 4+1", 1))
    found = {key: {**raw, "rows": rows, "nll": [nll_per_token * STEPS] * rows, "answers": []} for key, rows in texts}
    said = [[1, 7], [8, 1, 7], [1, 7]] if exact else [[1, 8], [], [7, 1]]
    return {**found, "passkey@24 0+3": {**raw, "rows": 3, "nll": [], "answers": said}}


class Digits:
    """A tokenizer whose text is the ids, a digit each; 8 is a space."""

    def decode(self, ids: list[int], **settings: Any) -> str:
        return "".join(" " if token == 8 else str(token) for token in ids)


@pytest.fixture
def rows(prompts: Prompts) -> list[dict[str, Any]]:
    found = {
        "versions": {"kvpress": "0.0.0"},
        "rows": [
            {"setting": {"method": "full"}, "measured": measured(prompts, 2.0, True)},
            {"setting": {"method": "kvpress-x", "keep": 0.5}, "measured": measured(prompts, 3.0, False)},
        ],
    }
    return peers.peer_rows(found, prompts, 4, LAYERS, Digits())


def test_rows_follow_the_schema_of_evaluate(rows, tmp_path):
    assert [parameters(row) for row in rows] == [{"method": "full"}, {"method": "kvpress-x", "keep": 0.5}]
    assert all(set(row) - set(parameters(row)) == set(MEASURED) - {"hit_rate"} for row in rows)  # nothing is offloaded
    assert all(row["source"] == "kvpress 0.0.0" for row in rows)
    assert rows[0]["perplexity"] == pytest.approx(math.exp(2))
    assert rows[1]["perplexity_ratio"] == pytest.approx(math.e)
    assert [row["scores"] for row in rows] == [{"passkey@24": 1}, {"passkey@24": 0}]
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
    with pytest.raises(KvcalError, match="scores"):
        peers.check_full(rows[0], {**ours, "scores": {"passkey@24": 0.5}})


def test_a_worker_that_fails_is_told_of(prompts, tmp_path):
    """This environment has no kvpress or no such model; either way nothing is measured."""
    job = {"model_folder": str(tmp_path / "nothing"), "keeps": [0.5], "threads": 1, "ends": []}
    with pytest.raises(KvcalError, match="exit code"):
        peers.measured_by_peers(Path(sys.executable), job, prompts, 4)
