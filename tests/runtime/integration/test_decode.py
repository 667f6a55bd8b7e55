"""The loop of fixed addresses gives what plain generate() gives with the same cache."""

import copy
import warnings

import pytest
import torch
from architectures import build
from compressed import artifact, model, padded, random_ids
from methods import by_form

from kvcal.artifacts import KvcalError
from kvcal.kernels import backend
from kvcal.runtime import CompressedCache, Sampler, compress, decode
from kvcal.runtime.integration import stepping
from kvcal.runtime.integration.contexts import shared_for

STEPS = 30
METHODS = {name: {"method": method, **settings} for name, (method, settings) in by_form("decoded").items()}
PCA = {"method": "loki", "basis": "pca", "select": "head"}
SPECTRAL = METHODS["spectral"]
NO_GRAPH = "CUDA graphs need a GPU, the model is on cpu"


def generated(name, inputs, settings, **more):
    with compress(model(name), artifact(name), **settings):
        return model(name).generate(**inputs, max_new_tokens=STEPS, do_sample=False, **more)


def bytes_after(inputs, tokens, settings):
    """What the last decoded token reads of a cache to which these tokens came one by one, after the prompt."""
    cache, prompt = CompressedCache(model(), artifact(), **settings), inputs["input_ids"].shape[1]
    mask = torch.ones_like(tokens)
    mask[:, :prompt] = inputs["attention_mask"]
    with torch.no_grad():
        for first, last in ((0, prompt), *((at, at + 1) for at in range(prompt, tokens.shape[1] - 1))):
            positions = (mask[:, :last].cumsum(1) - 1).clamp_min(0)[:, first:]
            given = {"attention_mask": mask[:, :last], "position_ids": positions, "past_key_values": cache}
            model()(tokens[:, first:last], **given)
    return cache.bytes_read()


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3", "phi3"])
@pytest.mark.parametrize("method", METHODS)
def test_equals_generate(name, method):
    inputs = padded(9, 23, 40)
    out = decode(
        model(name), artifact=artifact(name), max_new_tokens=STEPS, eos_token_id=[], **inputs, **METHODS[method]
    )
    expected = generated(name, inputs, METHODS[method], eos_token_id=None, pad_token_id=0)
    assert torch.equal(out.tokens, expected)


@pytest.mark.parametrize("method", ["cla", "cla+clusterkv"])
def test_layers_that_share(method):
    """Reading layers write nothing and read with queries of their own."""
    settings = {**(METHODS["clusterkv"] if "+" in method else {}), "method": method, "groups": "0-1,2"}
    inputs = padded(9, 23, 40)
    out = decode(model(), artifact=artifact(), max_new_tokens=STEPS, **inputs, **settings)
    assert torch.equal(out.tokens, generated("llama", inputs, settings))
    assert out.why_not_captured == NO_GRAPH
    with shared_for(model(), artifact(), settings["method"], {k: v for k, v in settings.items() if k != "method"}) as (
        method,
        own,
    ):
        cache = CompressedCache(model(), artifact(), method, **own)
        model().generate(**inputs, past_key_values=cache, max_new_tokens=STEPS, do_sample=False)
    assert out.cache.bytes_read() == cache.bytes_read() > 0


@pytest.mark.parametrize("method", ["full", "loki", "loki-score", "clusterkv", "spectral-sampled"])
def test_rows_grow_by_buckets(method, monkeypatch):
    monkeypatch.setattr(stepping, "BUCKET", 8)
    inputs = padded(9, 23, 40)
    out = decode(model(), artifact=artifact(), max_new_tokens=STEPS, **inputs, **METHODS[method])
    assert torch.equal(out.tokens, generated("llama", inputs, METHODS[method]))


@pytest.mark.parametrize("method", METHODS)
def test_the_cache_goes_on(method, tmp_path):
    """A second turn on the cache, or on it saved and loaded, is the second turn on the cache of generate()."""
    inputs = padded(9, 23, 40)
    out = decode(model(), artifact=artifact(), max_new_tokens=STEPS, **inputs, **METHODS[method])
    assert out.cache.get_seq_length() == out.tokens.shape[1] - 1
    cache = CompressedCache(model(), artifact(), **METHODS[method])
    tokens = model().generate(**inputs, past_key_values=cache, max_new_tokens=STEPS, do_sample=False)
    assert torch.equal(out.tokens, tokens)
    assert out.cache.bytes_read() == cache.bytes_read() > 0, "of the last step"
    turn = torch.cat((tokens, torch.cat([random_ids(5, seed=row) for row in range(3)])), 1)
    mask = torch.ones_like(turn)
    mask[:, :40] = inputs["attention_mask"]
    out.cache.save(tmp_path)
    loaded = CompressedCache.load(tmp_path, model(), artifact())
    expected, *others = (
        model().generate(turn, attention_mask=mask, past_key_values=each, max_new_tokens=8, do_sample=False)
        for each in (cache, out.cache, loaded)
    )
    assert all(torch.equal(other, expected) for other in others)
    assert cache.resident_bytes() <= out.cache.resident_bytes()  # reserved in buckets


@pytest.mark.parametrize("method", ["full", "loki", "clusterkv", "spectral-8-bit-rows"])
def test_rows_end_by_themselves(method):
    """As generate() pads them, and stops when all have ended."""
    inputs = padded(9, 23, 40)
    free = generated("llama", inputs, METHODS[method])
    ends = [int(free[0, 44]), int(free[1, 50]), int(free[2, 41])]
    out = decode(
        model(),
        artifact=artifact(),
        max_new_tokens=STEPS,
        eos_token_id=ends,
        pad_token_id=1,
        **inputs,
        **METHODS[method],
    )
    expected = generated("llama", inputs, METHODS[method], eos_token_id=ends, pad_token_id=1)
    assert torch.equal(out.tokens, expected) and expected.shape[1] < 40 + STEPS
    assert out.cache.bytes_read() == bytes_after(inputs, expected, METHODS[method]), "steps after the end do not count"
    assert out.cache.get_seq_length() == out.tokens.shape[1] - 1


@pytest.mark.parametrize(("name", "method"), [("gemma2", {**PCA, "rank": 0.25}), ("llama", {"method": "h2o"})], ids=str)
@pytest.mark.parametrize("at", [3, 20])
def test_rows_end_where_nothing_can_be_taken_back(name, method, at):
    inputs = padded(40)
    ends = [int(generated(name, inputs, method)[0, 40 + at])]
    out = decode(model(name), artifact=artifact(name), max_new_tokens=STEPS, eos_token_id=ends, **inputs, **method)
    assert torch.equal(out.tokens, generated(name, inputs, method, eos_token_id=ends, pad_token_id=0))


@pytest.mark.parametrize("method", ["full", "loki", "clusterkv", "spectral"])
def test_the_cache_outlives_inference_mode(method):
    """It goes on as one that was decoded without."""
    inputs, ends = padded(9, 23), []
    mask = torch.cat((inputs["attention_mask"], torch.ones(2, 6, dtype=torch.int64)), 1)
    for inference in (True, False):
        with torch.inference_mode(inference):
            out = decode(model(), artifact=artifact(), max_new_tokens=6, **inputs, **METHODS[method])
        again = {"attention_mask": mask, "past_key_values": out.cache, "max_new_tokens": 4, "do_sample": False}
        ends.append(model().generate(out.tokens.clone(), **again))
    assert torch.equal(*ends)


def test_padding_is_that_of_generate():
    """Without a padding token in the generation config, the first token that ends a row."""
    inputs = padded(9, 23)
    free = generated("llama", inputs, METHODS["full"])
    ends = [int(free[0, 26]), int(free[1, 33])]
    out = decode(model(), max_new_tokens=STEPS, eos_token_id=ends, **inputs, **METHODS["full"])
    assert torch.equal(out.tokens, generated("llama", inputs, METHODS["full"], eos_token_id=ends))


@pytest.mark.parametrize(
    "settings",
    [{"method": "clusterkv", "keep": 6, "sinks": 2, "tokens_per_cluster": 80, "window": 320}, SPECTRAL],
    ids=["clusterkv", "spectral"],
)
def test_small_budgets_do_not_move_buffers(settings, monkeypatch):
    """Buffers are reserved for all clusters that a bucket can bring."""
    seen = []
    prepare = stepping.SteppingCache.prepare
    monkeypatch.setattr(stepping.SteppingCache, "prepare", lambda self: seen.append(prepare(self)) or seen[-1])
    decode(model(), artifact=artifact(), max_new_tokens=60, **padded(9, 23), **settings)
    assert len(set(seen)) == 1


@pytest.mark.parametrize(
    ("name", "method", "reason"),
    [
        ("llama", METHODS["loki"], NO_GRAPH),
        ("gemma2", METHODS["loki"], "the model has layers that keep transformers' own cache"),
        ("llama", {"method": "subgen"}, "what leaves its window enters a sketch"),
        ("llama", {"method": "clusterkv", "offload": "cpu"}, "an offloaded cache copies what the step selects"),
    ],
)
def test_why_there_is_no_graph(name, method, reason):
    inputs = padded(9, 23)
    out = decode(model(name), artifact=artifact(name), max_new_tokens=6, **inputs, **method)
    assert out.why_not_captured and out.why_not_captured.startswith(reason)
    with compress(model(name), artifact(name), **method):
        assert torch.equal(out.tokens, model(name).generate(**inputs, max_new_tokens=6, do_sample=False))


def test_a_seed_decides_what_is_sampled():
    inputs = {"input_ids": random_ids(20).expand(3, -1)}
    draws = [
        decode(model(), method="full", max_new_tokens=9, sampler=Sampler(temperature=2.0), seed=seed, **inputs).tokens
        for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert len({tuple(row) for row in draws[0].tolist()}) == 3  # rows are drawn by themselves


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": torch.zeros(1, 0, dtype=torch.int64), "max_new_tokens": 3}, r"input_ids \[1, 0\]: give"),
        ({"input_ids": random_ids(3), "max_new_tokens": 0}, "max_new_tokens 0: give a whole number of at least 1"),
        ({"input_ids": random_ids(3), "max_new_tokens": 2, "method": "x"}, "unknown method 'x'"),
        (
            {"input_ids": random_ids(3), "max_new_tokens": 2, "attention_mask": torch.ones(1, 2)},
            r"attention_mask \[1, 2",
        ),
        ({"input_ids": random_ids(3), "max_new_tokens": 2, "eos_token_id": "x"}, "eos_token_id 'x': give a token id"),
        ({"input_ids": random_ids(3), "max_new_tokens": 2, "sampler": {}}, "sampler {}: give a Sampler"),
        ({"input_ids": random_ids(3).float(), "max_new_tokens": 2}, "input_ids of torch.float32: give the numbers"),
        ({"input_ids": "hello", "max_new_tokens": 2}, "input_ids: a str: give a tensor"),
        ({"input_ids": [[3, 4]], "max_new_tokens": 2}, "input_ids: a list: give a tensor"),
        (
            {"input_ids": torch.tensor([[3, 99999]]), "max_new_tokens": 2},
            "input_ids has 99999, this model's tokens are 0",
        ),
        ({"input_ids": torch.tensor([[-1, 3]]), "max_new_tokens": 2}, "input_ids has -1, this model's tokens are 0"),
        *(
            ({"input_ids": random_ids(4), "max_new_tokens": 2, "attention_mask": torch.tensor([mask])}, message)
            for mask, message in (
                ([1, 1, 1, 0], "row 0: padding follows or parts its tokens: pad prompts on the left"),
                ([0, 1, 0, 1], "row 0: padding follows or parts its tokens"),
                ([True, True, False, True], "row 0: padding follows or parts its tokens"),
                ([0, 0, 0, 0], "row 0: padding follows or parts its tokens"),
                ([0, 1, 1, 2], "numbers other than 0 and 1"),
                ([0.0, 1.0, 0.5, 1.0], "numbers other than 0 and 1"),
            )
        ),
        (
            {
                "input_ids": random_ids(4).expand(3, -1),
                "max_new_tokens": 2,
                "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 0, 0]]),
            },
            "row 2: padding follows",
        ),
    ],
)
def test_refused(inputs, message):
    with pytest.raises(KvcalError, match=message):
        decode(model(), **inputs)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int32])
def test_masks_of_any_dtype(dtype):
    inputs = padded(9, 23)
    expected = decode(model(), max_new_tokens=3, **inputs, **METHODS["full"]).tokens
    inputs["attention_mask"] = inputs["attention_mask"].to(dtype)
    assert torch.equal(decode(model(), max_new_tokens=3, **inputs, **METHODS["full"]).tokens, expected)


@pytest.mark.parametrize("part", ["model", "model.layers.1"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_model_that_trains_is_refused(part, checkpointing):
    of = build("llama")
    if checkpointing:
        of.gradient_checkpointing_enable()
    of.get_submodule(part).train()
    with pytest.raises(KvcalError, match=rf"training mode \({part}\).*call model.eval\(\) before decode"):
        decode(of, random_ids(4), max_new_tokens=2, method="full")
    of.eval()
    decode(of, random_ids(4), max_new_tokens=2, method="full")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", METHODS)
def test_a_captured_step_equals_generate(method):
    gpu = copy.deepcopy(model()).cuda()
    inputs = {name: tensor.cuda() for name, tensor in padded(9, 23, 40).items()}
    out = decode(gpu, artifact=artifact(), max_new_tokens=STEPS, **inputs, **METHODS[method])
    assert out.why_not_captured is None
    with compress(gpu, artifact(), **METHODS[method]):
        assert torch.equal(out.tokens, gpu.generate(**inputs, max_new_tokens=STEPS, do_sample=False))


def test_it_says_what_runs_without_numba(monkeypatch):
    monkeypatch.setattr(backend, "has_numba", lambda: False)
    with pytest.warns(UserWarning, match=r"in torch, which takes longer .*: pip install 'kvcal\[cpu\]'"):
        out = decode(model(), random_ids(20), artifact(), "spectral", max_new_tokens=2, rank=16, keep=0.3)
    assert out.tokens.shape == (1, 22)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode(model(), random_ids(20), artifact(), "quest", max_new_tokens=2, keep=0.3)
