"""Several models, threads, contexts and caches at once, and caches that outlive them."""

import sys
import threading

import pytest
import torch
from architectures import build
from compressed import CLOSE, SMALL, artifact, greedy, make_cache, model, padded, random_ids, step_logits, traces
from transformers import AttentionInterface

from kvcal.runtime import CompressedCache, compress

IDS = random_ids(30)


def test_two_models_at_once():
    one, two = model(), model("qwen2")
    before = traces(one), traces(two)
    inputs = padded(9, 40)
    with compress(one, artifact(), **SMALL["loki"]):
        expected_one = greedy(one, inputs)[1]
    with compress(two, None, "h2o"):
        expected_two = greedy(two, inputs)[1]
    outer = compress(one, artifact(), **SMALL["loki"])
    outer.__enter__()
    with compress(two, None, "h2o"):
        for of, expected in ((two, expected_two), (one, expected_one), (two, expected_two)):
            torch.testing.assert_close(greedy(of, inputs)[1], expected, **CLOSE)
        outer.__exit__(None, None, None)  # not in the order of a stack
        torch.testing.assert_close(greedy(two, inputs)[1], expected_two, **CLOSE)
    assert (traces(one), traces(two)) == before


def test_one_model_in_several_threads():
    of, before = model(), traces(model())
    methods = ["loki", "h2o", "quest", "full"]
    expected = {method: step_logits(of, IDS, make_cache(method), 12) for method in methods}
    found, start = {}, threading.Barrier(len(methods))

    def decode(method):
        start.wait()
        for _ in range(3):
            cache = make_cache(method)  # who is first attaches, while the others would too; who is last detaches
            found[method] = step_logits(of, IDS, cache, 12)
            del cache

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    threads = [threading.Thread(target=decode, args=(method,)) for method in methods]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    for method in methods:
        torch.testing.assert_close(found[method], expected[method], **CLOSE)
    assert traces(of) == before


def test_a_cache_outlives_its_context_and_then_lets_the_model_go():
    of, before = model(), traces(model())
    with torch.no_grad():
        expected = step_logits(of, IDS, make_cache("loki"), 20)
        with compress(of, artifact(), **SMALL["loki"]):
            cache = of(IDS[:, :20]).past_key_values
        assert not isinstance(of(IDS).past_key_values, CompressedCache)  # new caches are stock again
        rest = [of(IDS[:, at : at + 1], past_key_values=cache).logits for at in range(20, 30)]
        torch.testing.assert_close(torch.cat(rest, 1), expected[:, 1:], **CLOSE)
        with compress(of, artifact(), "streaming"):
            assert isinstance(of(IDS).past_key_values, CompressedCache)
        assert traces(of) != before
    del cache, rest
    assert traces(of) == before


@pytest.mark.parametrize("held", ["cache", "context", "both"])
def test_a_model_that_is_dropped_first(held):
    registered = set(AttentionInterface().keys())
    of, raised = build("llama"), []
    hook, sys.unraisablehook = sys.unraisablehook, raised.append
    try:
        cache = CompressedCache(of, None, "full") if held != "context" else None
        if held != "cache":
            context = compress(of, None, "full")
            context.__enter__()
            of(IDS)
            context.__exit__(None, None, None)
        del of
        del cache
    finally:
        sys.unraisablehook = hook
    assert not raised
    assert set(AttentionInterface().keys()) == registered


def test_a_cache_that_could_not_be_made_leaves_nothing():
    of, before = model(), traces(model())
    for _ in range(2):
        with pytest.raises(Exception, match="keep"):
            CompressedCache(of, artifact(), keep=0)
    with compress(of, artifact()), pytest.raises(IndexError):
        of(torch.tensor([[1000]]))
    assert traces(of) == before
