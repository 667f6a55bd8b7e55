"""Layers that share keys and values, against hooks that overwrite projections and against the original model."""

import copy

import pytest
import torch
from architectures import ARCHITECTURES, HEAD_DIM, build
from cla_oracle import GROUPS, SHARING, WHOLE, groups_of, inventory, layers_of, oracle, several
from compressed import CLOSE, padded, random_ids
from torch.utils.flop_counter import FlopCounterMode

from kvcal.runtime import KvcalError
from kvcal.runtime.cla import SharingMap, share, shared, sharing_of
from kvcal.runtime.integration.layer import full_attention_layers

IDS = torch.cat((random_ids(21), random_ids(21, seed=1)))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_groups_of_one_layer_are_bit_identical_to_the_original(name):
    of = build(name)
    alone = SharingMap(tuple((layer,) for layer in full_attention_layers(of)[0]))
    expected, before = of(IDS).logits, inventory(of)
    for settings in ({}, {"pool": "first"}, {"trainable": "shared"}, {"trainable": "all"}):
        with shared(of, alone, **settings) as sharing:
            assert torch.equal(of(IDS).logits, expected)
            assert sharing.parameters.keys() == (
                dict(of.named_parameters()).keys() if settings.get("trainable") == "all" else set()
            )
        assert inventory(of) == before


@pytest.mark.parametrize("pool", ["mean", "first"])
@pytest.mark.parametrize("name", SHARING)
def test_reading_layers_attend_to_the_storing_layers_keys_and_values(name, pool):
    of, inputs = several(name), padded(9, 23, 40)
    before = inventory(of)
    for text in (GROUPS[name], WHOLE[name]):
        expected = oracle(of, groups_of(text), name, pool)
        with shared(of, SharingMap.parse(text), pool=pool):
            torch.testing.assert_close(of(IDS).logits, expected(IDS).logits, **CLOSE)
            found, wanted = (each(**inputs).logits[inputs["attention_mask"].bool()] for each in (of, expected))
            torch.testing.assert_close(found, wanted, **CLOSE)
            assert (of(IDS).logits - build(name, **SHARING[name])(IDS).logits).abs().max() > 1e-3
        assert inventory(of) == before


@pytest.mark.parametrize("name", SHARING)
def test_sharing_between_identical_layers_is_lossless(name):
    """Layers whose inputs agree, since no layer before the last adds to the residual, and whose weights agree."""
    of = several(name)
    owners = [name.rpartition(".")[0] for name, module in of.named_modules() if module in layers_of(of)]
    blocks = [of.get_submodule(owner) for owner in owners]
    with torch.no_grad():
        for block in blocks[1:]:
            block.load_state_dict(blocks[0].state_dict())
        for block in blocks[:2]:
            for key, parameter in block.named_parameters():
                if any(part in key for part in ("o_proj", "down_proj", "c_proj", "dense", "post_", "experts")):
                    parameter.zero_()
                if "post_" in key and type(of).__name__.startswith("Gemma"):
                    parameter.fill_(-1)  # these norms scale by one plus their weight
        queries = [parameter for key, parameter in blocks[2].named_parameters() if "q_proj" in key]
        for parameter in queries:
            parameter.mul_(1.7)  # queries may differ
    expected = of(IDS).logits
    for text in (GROUPS[name], WHOLE[name]):
        with shared(of, SharingMap.parse(text)):
            if ARCHITECTURES[name].split:  # queries by a product of another shape
                torch.testing.assert_close(of(IDS).logits, expected, **CLOSE)
            else:
                assert torch.equal(of(IDS).logits, expected)


@pytest.mark.parametrize("name", SHARING)
def test_reading_layers_project_no_keys_and_values(name):
    of, reading = several(name), 1 if WHOLE[name] == "0+2" else 2
    counts, sizes = [], []

    def count():
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            of(IDS, use_cache=False)
        counts.append(counter.get_total_flops())
        sizes.append(sum(parameter.numel() for parameter in of.parameters() if parameter.dim() == 2))

    count()
    with shared(of, SharingMap.parse(WHOLE[name])):
        count()
    weights = reading * of.config.hidden_size * 2 * ARCHITECTURES[name].kv_heads * HEAD_DIM
    assert counts[0] - counts[1] == 2 * IDS.numel() * weights
    assert sizes[0] - sizes[1] >= weights  # and, in some, a norm of keys that is no vector


def test_nothing_is_kept_after_a_forward_call():
    of = several("llama")
    with shared(of, SharingMap.parse("0-2")) as sharing:
        of(IDS)
        assert all(output.output is None for output in sharing._shared_outputs)
        hook = layers_of(of)[2].register_forward_pre_hook(lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            of(IDS)
        assert all(output.output is None for output in sharing._shared_outputs)
        hook.remove()


@pytest.mark.parametrize("name", SHARING)
def test_keys_and_values_are_kept_until_the_last_layer_of_their_group_has_read_them(name):
    """A prefill holds those of one group beside its cache, not of all."""
    of = several(name)
    last, held = SharingMap.parse(WHOLE[name]).reading[-1], []
    with shared(of, SharingMap.parse(WHOLE[name])) as sharing:
        attention = layers_of(of)[last]
        hook = attention.register_forward_pre_hook(
            lambda *args: held.append([s.output for s in sharing._shared_outputs])
        )
        block = of.get_submodule(next(n for n, m in of.named_modules() if m is attention).rpartition(".")[0])
        after = block.register_forward_hook(lambda *args: held.append([s.output for s in sharing._shared_outputs]))
        for twin in (of, copy.deepcopy(of)):
            held.clear()
            outputs = sharing_of(twin)._shared_outputs
            twin(IDS)
            assert all(output.output is None for output in outputs)
            if twin is of:
                assert all(kept is not None for kept in held[0]) and all(kept is None for kept in held[1])
        hook.remove(), after.remove()


def test_the_model_is_as_before_after_an_exception():
    of = several("qwen3")
    before = inventory(of)
    with pytest.raises(ZeroDivisionError), shared(of, SharingMap.parse("0-1,2"), trainable="all"):
        of(IDS).logits.sum().backward()
        raise ZeroDivisionError
    assert inventory(of) == before and all(parameter.grad is None for parameter in of.parameters())
    for arguments in ({"weights": {"lm_head.weight": torch.zeros(2, 2)}}, {"weights": {"nothing": torch.zeros(1)}}):
        with pytest.raises(Exception, match="weights: "):
            share(of, SharingMap.parse("0-1,2"), **arguments)
        assert inventory(of) == before


def test_tied_weights_are_replaced_together():
    of = build("llama", tie_word_embeddings=True)
    with shared(of, SharingMap.parse("0-1,2"), trainable="all") as sharing:
        assert of.lm_head.weight is of.model.embed_tokens.weight is sharing.parameters["model.embed_tokens.weight"]
        assert "lm_head.weight" not in sharing.parameters


def test_given_weights_take_the_place_of_pooled_ones_and_of_others():
    of = several("llama")
    weights = {
        "model.layers.0.self_attn.k_proj.weight": torch.randn(32, 64, dtype=torch.float64),
        "model.layers.1.self_attn.q_proj.weight": torch.randn(64, 64),
    }
    with shared(of, SharingMap.parse("0-1,2"), weights=weights) as sharing:
        for name, value in weights.items():
            assert sharing.parameters[name] is of.get_parameter(name) is not value
            torch.testing.assert_close(of.get_parameter(name).detach(), value.float())
        mean = (layers_of(several("llama"))[0].v_proj.weight + layers_of(several("llama"))[1].v_proj.weight) / 2
        torch.testing.assert_close(of.get_parameter("model.layers.0.self_attn.v_proj.weight").data, mean.data)
        assert not any(parameter.requires_grad for parameter in sharing.parameters.values())


@pytest.mark.parametrize("name", SHARING)
def test_a_copy_of_a_shared_model_is_a_shared_model_of_its_own(name):
    of = several(name)
    expected = of(IDS).logits
    with shared(of, SharingMap.parse(WHOLE[name])):
        found = of(IDS).logits
        twin = copy.deepcopy(of)
    assert torch.equal(of(IDS).logits, expected) and sharing_of(of) is None
    assert torch.equal(twin(IDS).logits, found)
    sharing_of(twin).remove()
    assert torch.equal(twin(IDS).logits, expected) and sharing_of(twin) is None


def test_sharing_lifted_for_a_moment():
    of = several("qwen3")
    expected, before = of(IDS).logits, inventory(of)
    with shared(of, SharingMap.parse("0-1,2"), trainable="shared") as sharing:
        inside, found = inventory(of), of(IDS).logits
        with pytest.raises(ZeroDivisionError), sharing.lifted():
            assert torch.equal(of(IDS).logits, expected) and sharing_of(of) is None
            raise ZeroDivisionError
        assert inventory(of) == inside and torch.equal(of(IDS).logits, found) and sharing_of(of) is sharing
    assert inventory(of) == before


def test_what_is_shared_for_good_is_not_lifted():
    of = several("llama")
    sharing = share(of, SharingMap.parse("0-1,2"))
    sharing.keep()
    with pytest.raises(KvcalError, match="for good: load the original model"), sharing.lifted():
        pass
    assert sharing_of(of) is sharing
