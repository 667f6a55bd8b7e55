"""A model in a wrapper does what it does by itself: calls by position and by name, `generate()`, caches of either."""

import copy

import pytest
import torch
import transformers
from architectures import build
from compressed import CLOSE, artifact, greedy, random_ids, small, step_logits, traces
from torch import nn

from kvcal.runtime import CompressedCache, KvcalError, check_model, compress, decode
from kvcal.runtime.wrapped import unwrapped

IDS = random_ids(24)
START = 22
WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 2},
    "lookup": {"prompt_lookup_num_tokens": 3, "use_cache": True},
    "assisted": {"assisted": True},
}


class Around(nn.Module):
    """Any module around a model."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, *args, **kwargs):
        return self.inside(*args, **kwargs)


class Delegating(Around):
    """As PEFT's: what it does not have it takes from inside, two modules deep."""

    def __init__(self, inside):
        super().__init__(Around(inside))

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inside").inside, name)


class Overriding(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class Backbone(transformers.LlamaModel):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def overriding(of):
    made = Overriding(of.config).eval()
    made.load_state_dict(of.state_dict())
    made.generation_config = of.generation_config
    return made


def overriding_twice(of):
    made = overriding(of)
    made.model = Backbone(of.config).eval()
    made.load_state_dict(of.state_dict())
    return made


def with_hook(of):
    hooks = pytest.importorskip("accelerate.hooks")
    return hooks.add_hook_to_module(copy.deepcopy(of), hooks.ModelHook())


def nameless(of):
    """A forward put in the place of the model's, which does not name its arguments."""
    made = copy.deepcopy(of)
    inside = made.forward
    made.forward = lambda *args, **kwargs: inside(*args, **kwargs)
    return made


def adapted(of):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    return peft.get_peft_model(copy.deepcopy(of), config).eval()


WRAPPERS = {
    "module": Around,
    "delegating": Delegating,
    "data parallel": nn.DataParallel,
    "overriding": overriding,
    "overriding twice": overriding_twice,
    "accelerate": with_hook,
    "nameless": nameless,
    "peft": adapted,
}


@pytest.fixture(scope="module")
def of():
    made = build("llama")
    made.generation_config.eos_token_id = made.config.vocab_size
    return made


@torch.no_grad()
def by_position(call, embeddings=None):
    """(logits of IDS from START on, the cache), of a call that begins a cache and of steps that are given it."""
    out = call(IDS[:, :START]) if embeddings is None else call(inputs_embeds=embeddings[:, :START])
    parts = [out.logits[:, -1:]]
    for at in range(START, IDS.shape[1]):
        if embeddings is None:
            parts.append(call(IDS[:, at : at + 1], None, None, out.past_key_values).logits)
        else:
            step = {"inputs_embeds": embeddings[:, at : at + 1], "past_key_values": out.past_key_values}
            parts.append(call(**step).logits)
    return torch.cat(parts, 1), out.past_key_values


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapped_model_does_what_it_does_by_itself(of, name):
    wrapped = WRAPPERS[name](of)
    inside = unwrapped(wrapped)
    before = traces(inside)
    embeddings = inside.get_input_embeddings()(IDS).detach()
    expected = step_logits(inside, IDS, CompressedCache(inside, artifact(), **small("loki")), START)
    for given in (wrapped, inside):
        with compress(given, artifact(), **small("loki")):
            for found, cache in (by_position(wrapped), by_position(wrapped, embeddings)):
                assert isinstance(cache, CompressedCache) and cache.get_seq_length() == IDS.shape[1]
                torch.testing.assert_close(found, expected, **CLOSE)
            with pytest.raises(KvcalError, match="already compressed"), compress(wrapped, None, "full"):
                pass
        cache = CompressedCache(given, artifact(), **small("loki"))
        torch.testing.assert_close(step_logits(wrapped, IDS, cache, START), expected, **CLOSE)
    found, plain = (decode(each, IDS, artifact(), max_new_tokens=4, **small("loki")) for each in (wrapped, inside))
    assert torch.equal(found.tokens, plain.tokens)
    del found, plain, cache
    assert traces(inside) == before


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["delegating", "peft"])
def test_generate_of_a_wrapped_model(of, name, way):
    wrapped = WRAPPERS[name](of)
    found = []
    for given in (wrapped, unwrapped(wrapped)):
        with compress(given, artifact(), **small("loki")):
            found.append(generated(given, WAYS[way]))
    (tokens, logits, cache), (expected, expected_logits, _) = found
    assert torch.equal(tokens, expected) and isinstance(cache, CompressedCache)
    torch.testing.assert_close(logits, expected_logits, **CLOSE)


@pytest.mark.parametrize("way", ["greedy", "sampling", "beams"])
def test_generate_of_a_model_whose_forward_names_no_arguments(of, way):
    with compress(of, artifact(), **small("loki")):
        expected, expected_logits, _ = generated(of, WAYS[way])
    wrapped = overriding(of)
    with compress(wrapped, artifact(), **small("loki")):
        tokens, logits, _ = generated(wrapped, WAYS[way])
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(logits, expected_logits, **CLOSE)


@pytest.mark.parametrize("way", ["lookup", "assisted"])
def test_guesses_that_nothing_tells_from_a_prompt_are_refused(of, way):
    """generate() passes logits_to_keep, which tells them, to a forward that names it."""
    wrapped = overriding(of)
    refused = pytest.raises(KvcalError, match="does not name logits_to_keep")
    with compress(wrapped, artifact(), **small("loki")), refused:
        generated(wrapped, WAYS[way])


def generated(of, settings):
    settings = dict(settings)
    if settings.pop("assisted", False):
        settings["assistant_model"] = build("llama", seed=1)
    torch.manual_seed(0)
    return greedy(of, {"input_ids": IDS.repeat(1, 2)}, new=6, **settings)


@pytest.mark.parametrize("method", ["exact_topk", "spectral"])
def test_a_compiled_model_that_was_called_before_gets_compressed_caches(method):
    """torch.compile does not look whether hooks have come; the model's config tells."""
    torch._dynamo.reset()
    fewer = {} if method == "spectral" else {"num_hidden_layers": 1}  # the artifact is of all layers
    plain, twin = (build("llama", **fewer) for _ in range(2))
    compiled = torch.compile(Around(plain), backend="eager", dynamic=True)
    with torch.no_grad():
        stock = compiled(IDS).logits
        settings, of_model = small(method), artifact() if method == "spectral" else None
        expected = step_logits(twin, IDS, CompressedCache(twin, of_model, **settings), START)
        with compress(compiled, of_model, **settings):
            found, cache = by_position(compiled)
        assert isinstance(cache, CompressedCache)
        torch.testing.assert_close(found, expected, **CLOSE)
        del cache
        after = compiled(IDS)
    assert type(after.past_key_values) is transformers.DynamicCache
    assert torch.equal(after.logits, stock)
    torch._dynamo.reset()


def test_check_model_looks_inside(of):
    check_model(artifact(), Around(of))
    with pytest.raises(KvcalError, match="other weights"):
        check_model(artifact(), Around(build("llama", seed=3)), weights=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda of: nn.Linear(2, 2), "Linear is no transformers model and holds none"),
        (lambda of: nn.ModuleList([of, build("llama")]), "ModuleList holds 2 transformers models"),
        (lambda of: "llama", "str is no transformers model"),
    ],
    ids=["none", "two", "a name"],
)
def test_what_holds_no_model_or_several_is_refused(of, make, message):
    for use in (lambda it: compress(it, None, "full").__enter__(), lambda it: decode(it, IDS, max_new_tokens=2)):
        with pytest.raises(KvcalError, match=message):
            use(make(of))
