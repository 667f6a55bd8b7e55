"""Greedy tokens of vLLM with kvcal against those of vLLM without it, and of the transformers engine."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from transformers import AutoTokenizer

DEMO = json.loads((Path(os.environ["KVCAL_VLLM_PREPARED"]) / "expected.json").read_text())["demo"]
STOCK = {"logprobs": 3}


def tokens(call):
    return [outputs[0]["tokens"] for outputs in call]


def assert_same(call, wanted):
    """Rows of 8 bits have levels, and a number between two of them gets either: where tokens part, the one that was
    expected was nearly as likely."""
    for (found,), tokens_wanted in zip(call, wanted, strict=True):
        for token, other, position in zip(found["tokens"], tokens_wanted, found["logprobs"], strict=True):
            if token != other:
                assert position[str(token)] - position[str(other)] < 0.05
                break


def expected(model, asked):
    (found,) = [entry["tokens"] for entry in model["expected"] if entry["asked"] == asked]
    return found


@pytest.fixture(scope="module", params=["smollm2", "demo", "windows"])
def stock(request, prepared, run):
    """(model, what vLLM decodes without kvcal: all prompts at once)"""
    model = prepared[request.param]
    (call,) = run(model, None, [{"prompts": model["prompts"], "sampling": STOCK}])
    return model, call


def test_reading_everything_is_vllm_itself(stock, run):
    """Of `windows` every other layer is vLLM's own, with pages as long as its window."""
    model, without = stock
    (call,) = run(model, {"method": "spectral", "keep": 1.0}, [{"prompts": model["prompts"], "sampling": STOCK}])
    assert tokens(call) == tokens(without)
    for (one,), (other,) in zip(call, without, strict=True):
        for mine, theirs in zip(one["logprobs"], other["logprobs"], strict=True):
            assert mine.keys() == theirs.keys()
            assert all(abs(mine[token] - theirs[token]) < 1e-3 for token in mine)


@pytest.mark.parametrize("caching", [True, False], ids=["prefix caching", "none"])
@pytest.mark.parametrize("method", ["spectral", "loki"])
def test_tokens_are_those_of_the_transformers_engine(prepared, run, method, caching):
    """One by one; then 16 at once, of unequal length, in chunks of prompts beside others' tokens; then the same again,
    with what is cached; and longer ones that begin like others."""
    model = prepared["smollm2"]
    prompts, wanted = model["prompts"], expected(model, {"method": method})
    alone = [{"prompts": [prompts[at]]} for at in (3, 7, 12)]
    calls = [*alone, {"prompts": prompts}, {"prompts": prompts[::-1]}]
    found = run(model, {"method": method}, calls, enable_prefix_caching=caching)
    for at, call in zip((3, 7, 12), found, strict=False):
        assert tokens(call) == [wanted[at]]
    assert tokens(found[3]) == wanted
    assert tokens(found[4]) == wanted[::-1]
    cached = [outputs[0]["cached"] for outputs in found[4]]
    assert (max(cached) >= 256) == caching


@pytest.mark.parametrize("number", range(len(DEMO["expected"])))
def test_every_method_that_fits(prepared, run, number):
    """Also one for each layer, and an artifact's plan."""
    model = prepared["demo"]
    asked, wanted = (model["expected"][number][name] for name in ("asked", "tokens"))
    (call,) = run(model, asked, [{"prompts": model["prompts"], "sampling": STOCK}])
    if asked.get("rows") == 8 or not asked:  # the plan has such rows, too
        assert_same(call, wanted)
    else:
        assert tokens(call) == wanted


def test_requests_that_are_preempted_come_back(prepared, run):
    """Memory for a few of them: others are computed again, in other pages. Quest keeps boxes, and with `keep=1.0`
    reads everything, so that no token depends on how it came."""
    model, asked = prepared["demo"], {"method": "quest", "keep": 1.0}
    few = {"num_gpu_blocks_override": 10, "max_num_seqs": 16, "max_model_len": 512}
    calls = [{"prompts": model["prompts"], "sampling": {"max_tokens": 150}}]
    call, preempted = run(model, asked, calls, **few)[0], run.preempted
    assert preempted > 0
    (plenty,) = run(model, asked, calls)
    assert tokens(call) == tokens(plenty)
    assert [found[:16] for found in tokens(call)] == expected(model, {"method": "full"})


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two workers want two cores")
def test_two_workers_share_the_heads(prepared, run):
    model = prepared["demo"]
    asked = {"method": "spectral", "rows": 8}
    calls = [{"prompts": model["prompts"], "sampling": STOCK}]
    (call,) = run(model, asked, calls, workers=2, tensor_parallel_size=2)
    assert_same(call, expected(model, asked))


def test_guesses_that_are_verified(prepared, run):
    """Verified tokens attend densely, so that a method that reads everything decodes what it would without guesses."""
    model = prepared["demo"]
    guesses = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    (call,) = run(model, {"method": "full"}, [{"prompts": model["prompts"]}], speculative_config=guesses)
    assert tokens(call) == expected(model, {"method": "full"})


def test_samples_stops_and_logprobs(prepared, run):
    model = prepared["smollm2"]
    prompt, wanted = model["prompts"][3], expected(model, {"method": "spectral"})[3]
    text = AutoTokenizer.from_pretrained(model["model"]).decode(wanted)
    stop = text[len(text) // 2 :][:4]
    calls = [
        {"prompts": [prompt], "sampling": {"n": 4, "temperature": 1.0}},
        {"prompts": [prompt], "sampling": {"stop": [stop], "logprobs": 2}},
    ]
    four, stopped = run(model, {"method": "spectral"}, calls)
    assert len(four[0]) == 4 and len({tuple(one["tokens"]) for one in four[0]}) > 1
    (found,) = stopped[0]
    assert found["finished"] == "stop" and found["text"] == text[: text.index(stop)]
    assert found["tokens"] == wanted[: len(found["tokens"])]
    for token, position in zip(found["tokens"], found["logprobs"], strict=True):
        assert position[str(token)] == max(position.values()) <= 0
