"""Tokens kept in groups of layers: the formula in numpy, and a model's caches."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from architectures import rotate
from compressed import artifact, model, padded, random_ids

from kvcal.artifacts import KvcalError
from kvcal.calibrate.cla.group_fit import Rows, fit_group
from kvcal.kernels.codes import decode, encode
from kvcal.runtime import CompressedCache, compress
from kvcal.runtime.cla.group_code import BITS, KEPT, GroupCode, turned
from kvcal.runtime.settings import new_store

HEADS, DIM, VALUE_DIM, TOKENS = 2, 16, 8, 40
ANGLES = torch.logspace(0, -1, DIM // 2, dtype=torch.float64)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def group(layers: int = 3, level: float = 0.02) -> GroupCode:
    """Fitted to layers of which each has much of the one before."""
    weight = torch.full((300,), 1 / 300, dtype=torch.float64)
    codes = []
    for at, dims in enumerate((DIM, VALUE_DIM)):
        shared = random(HEADS, 300, dims, seed=at)
        own = [shared + 0.5 * random(HEADS, 300, dims, seed=10 * layer + at) for layer in range(1, layers + 1)]
        metric = torch.eye(dims, dtype=torch.float64).expand(HEADS, -1, -1)
        codes.append([fit.code for fit in fit_group([Rows(rows, metric) for rows in own], weight, level)])
    return GroupCode([{"key": key, "value": value} for key, value in zip(*codes, strict=True)], ANGLES)


@pytest.mark.parametrize("position", [torch.arange(7), torch.tensor([[0, 5, 1, 2, 9, 900, 3], [7, 6, 5, 4, 3, 2, 1]])])
def test_rows_turn_as_complex_numbers(position: torch.Tensor) -> None:
    rows = random(2, HEADS, 7, DIM + 3)  # three dimensions are not rotated
    angle = position.unsqueeze(-1) * ANGLES
    angle = (angle if position.dim() == 2 else angle.unsqueeze(0)).expand(2, -1, -1)
    cos, sin = (torch.cat((part, part), -1) for part in (angle.cos(), angle.sin()))
    expected = rotate(rows, cos, sin, interleaved=False)
    torch.testing.assert_close(turned(rows, ANGLES, position), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(turned(expected, ANGLES, position, back=True), rows, rtol=1e-10, atol=1e-10)
    by_head = position.unsqueeze(-2).expand(2, HEADS, 7) if position.dim() == 2 else position.expand(2, HEADS, 7)
    torch.testing.assert_close(turned(rows, ANGLES, by_head), expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(turned(rows, ANGLES[:0], position), rows)


def test_a_row_is_kept_and_restored_by_the_formula() -> None:
    """c = (x - offset - ĉ_earlier back_earlier) basis, x̂ = offset + ĉ back, in float64 and layer by layer."""
    code = group()
    kept, told = [], {"key": np.zeros((HEADS, TOKENS, 0)), "value": np.zeros((HEADS, TOKENS, 0))}
    position = torch.arange(TOKENS)
    for layer in range(3):
        upto = GroupCode(code.layers[: layer + 1], ANGLES)
        key, value = random(1, HEADS, TOKENS, DIM, seed=layer), random(1, HEADS, TOKENS, VALUE_DIM, seed=layer + 5)
        kept.append(upto.encode(turned(key, ANGLES, position).float(), value.float(), position, kept))
        found = dict(zip(("key", "value"), upto.restore(kept, position), strict=True))
        for kind, rows in (("key", key), ("value", value)):
            own = code.layers[layer][kind]
            offset, basis, back = (part.double().numpy() for part in (own.offset, own.basis, own.back))
            earlier = told[kind]
            coefficients = (rows[0].numpy() - offset[:, None] - earlier @ back[:, : earlier.shape[2]]) @ basis
            parts, first = [], 0
            for count, bits in zip(own.counts, BITS, strict=True):
                if count:
                    part = torch.from_numpy(coefficients[..., first : first + count])
                    parts.append(decode(*encode(part, bits), bits).double().numpy())
                first += count
            told[kind] = np.concatenate([earlier, *parts], 2)
            restored = torch.from_numpy(offset[:, None] + told[kind] @ back)
            expected = turned(restored, ANGLES, position) if kind == "key" else restored
            assert kept[-1][kind].dtype == torch.uint8 and kept[-1][f"{kind}_scale"].dtype == torch.float16
            torch.testing.assert_close(found[kind][0].double(), expected, rtol=1e-3, atol=2e-3)
    assert code.nbytes == sum(
        kept[at][name].shape[3] * kept[at][name].element_size() for at in range(3) for name in KEPT
    )


def caches() -> tuple[CompressedCache, CompressedCache]:
    """A full cache and one in groups after the same padded prompt and some decoded tokens."""
    made = [CompressedCache(model(), artifact(), method) for method in ("full", "xcla")]
    inputs = padded(9, 23, 40)
    mask = inputs["attention_mask"]
    ids = [inputs["input_ids"], *(torch.full((3, 1), 7 + step) for step in range(4))]
    for cache in made:
        seen = mask
        for at, new in enumerate(ids):
            seen = mask if not at else torch.cat((seen, torch.ones_like(seen[:, :1])), 1)
            with torch.no_grad():
                model()(new, attention_mask=seen, past_key_values=cache, use_cache=True)
    return made[0], made[1]


def test_layers_restore_their_keys_from_those_before() -> None:
    """Groups of two layers of a model, in 8 bits. A prompt's keys and values are those that `full` holds: both
    prefill densely."""
    full, grouped = caches()
    assert [grouped.stores[layer].policy.earlier for layer in range(3)] == [(), (0,), ()]
    for layer, store in grouped.stores.items():
        key, value = store.policy.keys_values(store.cache())
        for found, name in ((key, "key"), (value, "value")):
            exact = full.stores[layer].tokens[name].view
            for row, length in enumerate((9, 23, 40)):
                error = (found[row, :, :length] - exact[row, :, :length]).norm() / exact[row, :, :length].norm()
                assert error < 0.02, (layer, name)


def test_a_layer_reads_the_codes_of_those_before_it() -> None:
    _, grouped = caches()
    tokens, heads = sum((9, 23, 40)) + 3 * 4, 2
    token = {layer: grouped.stores[layer].policy.code.nbytes for layer in range(3)}
    assert token[1] > token[0], "with those of layer 0"
    recent = (9 + 4 + 16 + 16) * heads * 2 * 16 * 4  # of 13, 27 and 44 tokens the last 16, in float32
    for layer, store in grouped.stores.items():
        assert store.bytes_read() == tokens * heads * token[layer] + recent + store.shared_bytes()
    held = grouped.stores[1]
    own = [*(buffer.tensor for buffer in held.tokens.values()), *held.recent.state().values()]
    assert held.resident_bytes() == sum(tensor.nbytes for tensor in own), "and holds its own alone"


def test_a_long_group_reads_every_layer_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not those that each of its layers follows, again and again."""
    from kvcal.runtime.cla.group_store import GroupStore
    from kvcal.runtime.methods.xcla import XclaPolicy
    from kvcal.runtime.store import Store

    code, stores, asked = group(12, level=0.3), [], []
    for layer in range(12):
        store = GroupStore(XclaPolicy(GroupCode(code.layers[: layer + 1], ANGLES), range(layer), 2))
        store.earlier = lambda upto=layer: stores[:upto]
        store.take(random(2, HEADS, 9, DIM).float(), random(2, HEADS, 9, VALUE_DIM).float())
        stores.append(store)
    own = Store.cache
    monkeypatch.setattr(Store, "cache", lambda store: asked.append(store) or own(store))
    stores[-1].cache()
    assert len(asked) == 12


def test_what_is_cropped_to_nothing_goes_on() -> None:
    """Beams of it, too, and its copy."""
    _, grouped = caches()
    grouped.crop(-grouped.get_seq_length())
    for cache in (grouped, copy.deepcopy(grouped)):
        cache.batch_repeat_interleave(2)
        fresh = CompressedCache(model(), artifact(), "xcla")
        ids = torch.cat([random_ids(7, seed=row) for row in range(6)])
        with torch.no_grad():
            found, expected = (model()(ids, past_key_values=each, use_cache=True).logits for each in (cache, fresh))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_second_turn_reads_the_last_rows_of_the_first_as_they_came() -> None:
    """Though its own tokens have taken their place by then."""
    code = group(1, level=1e9)  # which has few bits
    settings = {"recent": 5}
    from kvcal.runtime.attention import SoftmaxSpec, causal_attention
    from kvcal.runtime.cla.group_store import GroupStore
    from kvcal.runtime.methods.xcla import XclaPolicy

    store = GroupStore(XclaPolicy(code, (), settings["recent"]))
    key, value = random(1, HEADS, 30, DIM).float(), random(1, HEADS, 30, VALUE_DIM, seed=1).float()
    query, spec = random(1, 4, 30, DIM, seed=2).float(), SoftmaxSpec(0.25)
    store.prefill(query[:, :, :20], key[:, :, :20], value[:, :, :20], spec)
    found = store.prefill(query[:, :, 20:], key[:, :, 20:], value[:, :, 20:], spec)
    position = torch.arange(15)
    rows = code.restore([code.encode(key[:, :, :15], value[:, :, :15], position, [])], position)
    read = [torch.cat((kept, came[:, :, 15:]), 2) for kept, came in zip(rows, (key, value), strict=True)]
    expected = causal_attention(query[:, :, 20:], *read, spec, torch.arange(21, 31).unsqueeze(0))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (rows[0] - key[:, :, :15]).norm() > 0.2 * key[:, :, :15].norm()


def test_a_token_that_fails_has_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by Ctrl-C: the store decodes on as if nothing had been."""
    from kvcal.runtime.cla.group_store import GroupStore
    from kvcal.runtime.kv.layer import LayerBuffers
    from kvcal.runtime.methods.xcla import XclaPolicy

    store = GroupStore(XclaPolicy(group(1), (), 2))
    store.take(random(2, HEADS, 9, DIM).float(), random(2, HEADS, 9, VALUE_DIM).float())
    before = {name: tensor.clone() for name, tensor in store.state().items()}

    def interrupted(*ignored: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(LayerBuffers, "put", interrupted)
        store.append(random(2, HEADS, 1, DIM).float(), random(2, HEADS, 1, VALUE_DIM).float())
    after = store.state()
    assert store.lengths == [9, 9] and all(torch.equal(after[name], before[name]) for name in before)


def test_a_cache_that_is_reset_follows_the_new_stores() -> None:
    """As if it had been made anew: the stores of before are gone."""
    _, grouped = caches()
    grouped.reset()
    fresh = CompressedCache(model(), artifact(), "xcla")
    ids = random_ids(12)
    with torch.no_grad():
        found, expected = (
            [model()(part, past_key_values=cache).logits for part in (ids[:, :11], ids[:, 11:])]
            for cache in (grouped, fresh)
        )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"method": "xcla", "dense_layers": 1}, r"xcla, layer 1: its tokens are kept relative to those of layer 0"),
        ({"method": {"0": "xcla", "1-": "full"}}, None),
        (
            {"method": {"0": "full", "1-": "xcla"}},
            "give that the same method and settings .with dense_layers, whole groups",
        ),
        ({"method": "cla+xcla", "groups": "0-1,2"}, "xcla's bases are of each layer's own keys and values"),
        ({"method": "spectral", "rows": "xcla", "offload": "cpu"}, "rows xcla lie on the device: leave offload out"),
        ({"method": "xcla", "memory": 0.5}, "xcla has no parameter 'memory': there are recent, and dense_layers"),
    ],
    ids=str,
)
def test_groups_stay_whole(settings: dict, told: str | None) -> None:
    settings = dict(settings)
    if told is None:
        with compress(model(), artifact(), **settings):
            return
    with pytest.raises(KvcalError, match=told), compress(model(), artifact(), **settings):
        pass


def test_what_is_missing_is_said() -> None:
    without = artifact()
    stages = {name: stage for name, stage in without.stages.items() if name != "xcla"}

    without = dataclasses.replace(without, stages=stages)
    command = "make it with `calibrate xcla ARTIFACT --model MODEL`"
    for settings in ({"method": "xcla"}, {"method": "spectral", "rows": "xcla"}):
        with pytest.raises(KvcalError, match=f"has no stage xcla: {command}"):
            CompressedCache(model(), without, **settings)
    with pytest.raises(KvcalError, match="xcla needs an artifact"):
        CompressedCache(model(), None, "xcla")
    policy = CompressedCache(model(), artifact(), "xcla").stores[1].policy
    with pytest.raises(KvcalError, match="kept relative to those of layers 0: decode with all of the model's layers"):
        new_store(policy).append(torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16))
