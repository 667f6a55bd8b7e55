"""Decoding from a cache that groups share, against forward passes without one, transformers' own cache, and a cache
of ours in which every layer stores the same keys and values for itself."""

import copy
from dataclasses import replace

import pytest
import torch
import transformers
from cla_oracle import GROUPS, SHARING, WHOLE, inventory, several
from compressed import CLOSE, SMALL, artifact, greedy, model, padded, random_ids, small, step_logits, traces
from compressed import KEEPING as ALONE
from safetensors import safe_open

from kvcal.artifacts import KvcalError, Stage, fingerprint
from kvcal.runtime import CompressedCache, compress
from kvcal.runtime.cla import SharingMap, shared, sharing_of
from kvcal.runtime.integration.cache import Blueprint

KEEPING = [form for form in ALONE if small(form)["method"] not in ("spectral", "xcla")]
"""`spectral` and `xcla` are refused where layers share."""
LOOKUP = {"prompt_lookup_num_tokens": 3, "use_cache": True}
MAPS = ["0-1,2", "0-2"]
WAYS = {
    "padding": (padded(9, 23, 40), {}),
    "chunks": (padded(9, 40), {"prefill_chunk_size": 7}),
    "beams": (padded(11, 30), {"num_beams": 3, "num_return_sequences": 2}),
    "lookup": ({"input_ids": random_ids(9).repeat(1, 3)}, {**LOOKUP, "new": 24}),
    "lookup later": ({"input_ids": random_ids(31, seed=4)}, {**LOOKUP, "new": 24}),
}


@pytest.fixture(params=MAPS)
def groups(request):
    """The model's layers share while a test runs; its cache and its oracle are made by `caches`."""
    before = inventory(model())
    with shared(model(), SharingMap.parse(request.param)):
        yield request.param
    assert inventory(model()) == before


def caches(form):
    """(a cache of groups that share, one in which every layer has a store of its own)."""
    of, sharing = model(), sharing_of(model())
    with sharing.lifted():
        settings = small(form)
        blueprint = Blueprint.of(of, artifact(), settings.pop("method"), settings)
    of_storing = {layer: blueprint.builders[sharing.map.storing_of(layer)] for layer in blueprint.builders}
    separate = CompressedCache.of(of, replace(blueprint, builders=of_storing, sharing=sharing.identity))
    return CompressedCache(of, artifact(), **small(form)), separate


def assert_same(found, expected):
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], **CLOSE)


@pytest.mark.parametrize("name", SHARING)
def test_prefill_and_steps_equal_a_forward_pass_without_a_cache(name):
    of, ids = several(name), torch.cat([random_ids(30, seed=row) for row in range(2)])
    for groups in (GROUPS[name], WHOLE[name]):
        with compress(of, None, "cla", groups=groups), torch.no_grad():
            expected = of(ids, use_cache=False).logits[:, 19:]
            torch.testing.assert_close(step_logits(of, ids, CompressedCache(of, None, "full"), 20), expected, **CLOSE)


@pytest.mark.parametrize("name", SHARING)
def test_generate_equals_generate_with_transformers_own_cache(name):
    of, inputs = several(name), padded(9, 23, 40)
    of.generation_config.eos_token_id = of.config.vocab_size
    before = inventory(of)
    for groups in (GROUPS[name], WHOLE[name]):
        with shared(of, SharingMap.parse(groups)):
            expected = greedy(of, inputs)
        with compress(of, None, "cla", groups=groups):
            found = greedy(of, inputs)
            assert isinstance(found[2], CompressedCache)
        assert_same(found, expected)
        del found
        assert inventory(of) == before


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", KEEPING)
def test_generate_equals_a_cache_in_which_every_layer_stores_for_itself(form, way, groups):
    inputs, settings = WAYS[way]
    ours, separate = caches(form)
    found, expected = (greedy(model(), inputs, **settings, past_key_values=cache) for cache in (ours, separate))
    assert_same(found, expected)
    assert ours.bytes_read() == separate.bytes_read()
    # A second turn, padded in the middle.
    if "num_beams" not in settings and "prompt_lookup_num_tokens" not in settings:
        turn = next_turn(found[0], inputs, 14, 3, 8)
        assert_same(*(greedy(model(), turn, past_key_values=cache) for cache in (ours, separate)))


def next_turn(tokens, inputs, *lengths):
    added = padded(*lengths[: len(tokens)], seed=50)
    mask = torch.ones_like(tokens)
    mask[:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"]
    return {
        "input_ids": torch.cat((tokens, added["input_ids"]), 1),
        "attention_mask": torch.cat((mask, added["attention_mask"]), 1),
    }


@pytest.mark.parametrize("form", KEEPING)
def test_guesses_change_nothing(form):
    of, inputs = model(), WAYS["lookup"][0]
    assistant = transformers.AutoModelForCausalLM.from_config(of.config)
    assistant.load_state_dict(of.state_dict())
    assistant.generation_config.num_assistant_tokens = 4
    with torch.no_grad():
        assistant.lm_head.weight.add_(0.02 * torch.randn(assistant.lm_head.weight.shape))
    with shared(of, SharingMap.parse("0-1,2")), compress(of, artifact(), **small(form)):
        expected = greedy(of, inputs, new=24)
        for way in (LOOKUP, {"assistant_model": assistant}):
            found = greedy(of, inputs, new=24, **way)
            tokens = expected[0].shape[1]  # transformers 5.8 may give one more
            assert_same((found[0][:, :tokens], found[1][:, :24]), expected)


OPERATIONS = {
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])),
    "interleave": lambda cache: cache.batch_repeat_interleave(1),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([2, 1, 1])),
    "crop": lambda cache: cache.crop(-5),
    "offload": lambda cache: [(layer.offload(), layer.prefetch()) for layer in cache.layers],
}


@pytest.mark.parametrize("form", KEEPING)
def test_operations_act_once_per_group(form, groups, tmp_path):
    ids, new = (torch.cat([random_ids(tokens, seed=row) for row in range(3)]) for tokens in (30, 4))
    for name, operation in OPERATIONS.items():
        ours, separate = caches(form)
        results = []
        for cache in (ours, separate):
            step_logits(model(), ids, cache, 24)
            operation(cache)
            assert cache.get_seq_length() == (25 if name == "crop" else 30)
            results.append(step_logits(model(), new, cache, 1))
        torch.testing.assert_close(*results, **CLOSE)
    ours, _ = caches(form)
    step_logits(model(), ids, ours, 24)
    ours.save(tmp_path)
    twins = [copy.deepcopy(ours), CompressedCache.load(tmp_path, model(), artifact())]
    assert all(layer.is_initialized for twin in twins for layer in twin.layers)
    expected = step_logits(model(), new, ours, 1)
    for twin in twins:
        torch.testing.assert_close(step_logits(model(), new, twin, 1), expected, **CLOSE)
    assert sum("tokens.key" in name for name in saved_names(tmp_path)) == len(SharingMap.parse(groups).groups)
    ours.reset()
    assert ours.get_seq_length() == ours.resident_bytes() == ours.bytes_read() == 0 and not ours.is_initialized
    fresh, _ = caches(form)
    torch.testing.assert_close(*(step_logits(model(), ids, cache, 24) for cache in (ours, fresh)), **CLOSE)


def saved_names(folder):
    with safe_open(folder / "cache.safetensors", "pt") as file:
        return list(file.keys())


@pytest.mark.parametrize("form", KEEPING)
def test_several_caches_share_one_prefill(form, groups):
    inputs, tokens = padded(9, 23, 40), random_ids(3, seed=9).T
    position = inputs["attention_mask"].sum(1, keepdim=True)
    last = {"attention_mask": torch.cat((inputs["attention_mask"], torch.ones(3, 1).long()), 1)}
    logits = []
    with torch.no_grad():
        for cache in caches(form):
            model()(**inputs, position_ids=(inputs["attention_mask"].cumsum(1) - 1).clamp_min(0), past_key_values=cache)
            logits.append(model()(tokens, **last, position_ids=position, past_key_values=cache).logits)
        full, ours = CompressedCache(model(), None, "full"), caches(form)[0]
        model()(**inputs, position_ids=(inputs["attention_mask"].cumsum(1) - 1).clamp_min(0), past_key_values=full)
        ours.adopt(full)
        logits.append(model()(tokens, **last, position_ids=position, past_key_values=ours).logits)
    for found in logits[::2]:
        torch.testing.assert_close(found, logits[1], **CLOSE)


def test_a_saved_cache_of_another_sharing_is_refused(tmp_path):
    of, groups = model(), SharingMap.parse("0-1,2")
    with shared(of, groups):
        cache = CompressedCache(of, None, "full")
        step_logits(of, random_ids(9), cache, 6)
        cache.save(tmp_path)
    with pytest.raises(KvcalError, match="in groups 0-1,2, this model's groups are None"):
        CompressedCache.load(tmp_path, of)
    with shared(of, groups, pool="first"), pytest.raises(KvcalError, match="saved with other weights"):
        CompressedCache.load(tmp_path, of)
    with shared(of, groups):
        assert CompressedCache.load(tmp_path, of).get_seq_length() == 9


@pytest.mark.parametrize("form", [form for form in KEEPING if "offload" not in SMALL[form]])
@pytest.mark.parametrize(("text", "layers", "part"), [("0-1,2-3", 4, 2), ("0-2", 3, 3), ("0-2,3-5", 6, 3)])
def test_resident_bytes_are_those_of_the_storing_layers(form, text, layers, part):
    of, found = several("llama", num_hidden_layers=layers), artifact()
    # More layers than the artifact was fitted on: it is as good as any where only bytes are counted.
    fitted = {
        stage: Stage(
            {
                f"layers.{layer}.{name}": found.tensor(stage, layer % 3, name)
                for layer in range(layers)
                for name in names
            }
        )
        for stage, names in {
            "pca": ("key_post.components", "key_post.eigenvalues"),
            "moments": [f"{side}_post.{part}" for side in ("key", "query") for part in ("mean", "covariance")],
        }.items()
    }
    identity = replace(found.model, fingerprint=fingerprint(of.config))
    found = replace(found, model=identity, layers=found.layers * 2, stages=fitted)
    ids, resident, read = random_ids(40), [], []
    for groups in (",".join(map(str, range(layers))), text):
        with shared(of, SharingMap.parse(groups)):
            cache = CompressedCache(of, found, **small(form))
            step_logits(of, ids, cache, 30)
            resident.append(cache.resident_bytes())
            read.append(cache.bytes_read())
    assert resident[0] == part * resident[1] > 0
    assert read[0] == read[1] > 0  # bandwidth does not fall by itself


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_call_that_failed_in_a_reading_layer_is_told_of(where):
    """The storing layers of all groups have taken in the token, so that their lengths tell nothing."""
    of, ids = model(), random_ids(12)
    with compress(of, None, "cla", groups="0-2"), torch.no_grad():
        cache, fine = (of(ids[:, :10]).past_key_values for _ in range(2))
        block = of.model.layers[2] if where == "before" else of.model.layers[1].mlp
        handle = block.register_forward_pre_hook(lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            of(ids[:, 10:11], past_key_values=cache)
        handle.remove()
        with pytest.raises(KvcalError, match="ended half-way, layer 2 has not read what layer 0 took in: begin a new"):
            of(ids[:, 10:11], past_key_values=cache)
        of(ids[:, 10:11], past_key_values=fine)
        of(ids[:, 11:], past_key_values=copy.deepcopy(fine))
        cache.reset()
        of(ids, past_key_values=cache)


def test_the_model_and_its_traces_come_back_after_compress():
    of = model()
    before, seen = inventory(of), traces(of)
    with pytest.raises(ZeroDivisionError), compress(of, None, "cla", groups="0-2"):
        greedy(of, padded(9, 12))
        raise ZeroDivisionError
    assert inventory(of) == before and traces(of) == seen
