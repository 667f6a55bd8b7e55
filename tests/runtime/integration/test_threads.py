"""`compress()` is its thread's and task's: another one is refused, and plain calls are what the model is."""

import asyncio
import gc
import threading

import pytest
import torch
from architectures import build
from compressed import CLOSE, artifact, random_ids, small, step_logits, traces

from kvcal.runtime import CompressedCache, KvcalError, compress, decode
from kvcal.runtime.cla import SharingMap, shared, sharing_of
from kvcal.runtime.integration import contexts, disable, enable

IDS = random_ids(24)
OUTSIDE = "a call outside the thread or task"
pytestmark = pytest.mark.filterwarnings(f"ignore:kvcal. {OUTSIDE}")


def kind(of):
    """What cache a call gets: the method's name, or None for a plain one."""
    with torch.no_grad():
        past = of(IDS).past_key_values
    if not isinstance(past, CompressedCache):
        return None
    return {type(store.policy).__name__ for store in past.stores.values()}.pop()


def in_thread(call):
    """The result of a call in a thread of its own, or what it raised."""
    found = []
    thread = threading.Thread(target=lambda: found.append(tried(call)))
    thread.start()
    thread.join()
    return found[0]


def tried(call):
    try:
        with torch.no_grad():
            return call()
    except KvcalError as error:
        return error


def begun(module, call, when=lambda: True):
    """`call`, begun in a thread that stands before `module`; -> what ends it and gives its result or error."""
    reached, go, found = threading.Event(), threading.Event(), []

    def stand(*args):
        if threading.current_thread() is thread and when():
            reached.set()
            assert go.wait(20)

    hook = module.register_forward_pre_hook(stand)
    thread = threading.Thread(target=lambda: found.append(tried(call)))
    thread.start()
    assert reached.wait(20)

    def end():
        go.set()
        thread.join()
        hook.remove()
        return found[0]

    return end


@pytest.mark.parametrize("methods", [("full", "streaming"), ("cla", "full")])
def test_of_two_threads_that_enter_one_is_refused(methods, monkeypatch):
    """Although the first is still on its way in."""
    of = build("llama")
    before, entering, go = traces(of), threading.Event(), threading.Event()
    plain = contexts.Blueprint.of

    def slow(*args):
        entering.set()
        assert go.wait(20)
        return plain(*args)

    monkeypatch.setattr(contexts.Blueprint, "of", slow)
    found = []

    def first():
        with compress(of, None, methods[0], **({"groups": "0-1,2"} if "cla" in methods else {})):
            found.append(kind(of))

    thread = threading.Thread(target=first, name="the first")
    thread.start()
    assert entering.wait(20)
    with pytest.raises(KvcalError, match=r"already compressed in the first"), compress(of, None, methods[1]):
        pass
    go.set()
    thread.join()
    assert found == ["FullPolicy"]
    assert traces(of) == before
    with compress(of, None, "streaming", keep=8):
        assert kind(of) == "ByAge"


def test_threads_that_race_get_what_they_asked_for_or_are_refused():
    of, found, errors = build("llama"), [], []
    before, start = traces(of), threading.Barrier(3)
    expected, stop = of(IDS).logits, threading.Event()

    def enter(method, store):
        for _ in range(8):
            start.wait()
            try:
                with compress(of, None, method):
                    found.append(kind(of) == store)
            except KvcalError as error:
                errors.append("already compressed" in str(error))

    def call():
        with torch.no_grad():
            while not stop.is_set():
                out = of(IDS)
                found.append(type(out.past_key_values) is not CompressedCache and torch.equal(out.logits, expected))

    threads = [threading.Thread(target=enter, args=each) for each in (("full", "FullPolicy"), ("h2o", "H2OPolicy"))]
    calling = threading.Thread(target=call)
    for thread in (*threads, calling):
        thread.start()
    for _ in range(8):
        start.wait()
    for thread in threads:
        thread.join()
    stop.set()
    calling.join()
    assert all(found) and all(errors)
    gc.collect()
    assert traces(of) == before


def test_calls_of_another_thread_are_plain_and_a_given_cache_is_not():
    of = build("llama")
    expected = step_logits(of, IDS, CompressedCache(of, artifact(), **small("loki")), 20)
    with compress(of, None, "streaming", keep=8):
        with pytest.warns(UserWarning, match=f"{OUTSIDE} that entered .*MainThread.* is not compressed"):
            assert in_thread(lambda: kind(of)) is None
        tokens = in_thread(lambda: of.generate(IDS, max_new_tokens=3, do_sample=False))
        given = in_thread(lambda: step_logits(of, IDS, CompressedCache(of, artifact(), **small("loki")), 20))
        assert kind(of) == "ByAge"
    assert torch.equal(tokens, of.generate(IDS, max_new_tokens=3, do_sample=False))
    torch.testing.assert_close(given, expected, **CLOSE)


@pytest.mark.parametrize("way", ["compress", "decode"])
def test_layers_that_share_are_of_no_other_thread(way):
    of = build("llama")
    settings = {"method": "cla", "groups": "0-1,2"}

    def inside():
        if way == "decode":
            return decode(of, IDS, max_new_tokens=2, **settings).tokens
        with compress(of, None, **settings):
            return of.generate(IDS, max_new_tokens=2, do_sample=False)

    expected, plain = inside(), of(IDS).logits
    end = begun(of.model.layers[2], inside, when=lambda: sharing_of(of) is not None)
    refused = tried(lambda: of(IDS, use_cache=False))
    assert isinstance(refused, KvcalError) and "share keys and values in Thread-" in str(refused)
    again = tried(inside)
    assert isinstance(again, KvcalError) and "already" in str(again)
    assert torch.equal(end(), expected)
    assert torch.equal(of(IDS).logits, plain)


def test_two_threads_that_call_a_shared_model_do_not_mix_their_keys():
    of, other = build("llama"), random_ids(24, seed=5)
    with shared(of, SharingMap.parse("0-1,2")), torch.no_grad():
        expected = of(IDS).logits, of(other).logits
        end = begun(of.model.layers[1], lambda: of(IDS).logits)  # which reads what layer 0 kept
        found = of(other).logits
        assert torch.equal(end(), expected[0]) and torch.equal(found, expected[1])


def test_a_call_that_began_before_layers_shared_is_told():
    of = build("llama")
    end = begun(of.model.layers[0], lambda: of(IDS))
    with shared(of, SharingMap.parse("0-1,2")):
        assert "in a call that began before layers shared" in str(end())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", [0, 5])
def test_a_plain_call_goes_on_as_it_began_while_others_enter_and_leave(attention, padding):
    """Masks are made at its beginning, for the attention that the model had then."""
    of = build("llama", attention=attention)
    before, layer = traces(of), of.model.layers[1]
    mask = torch.ones_like(IDS)
    mask[:, :padding] = 0

    def call():
        return of(IDS, attention_mask=mask).logits

    with torch.no_grad():
        expected = call()
    end = begun(layer, call)
    with compress(of, None, "full"):
        assert torch.equal(end(), expected)
        end = begun(layer, call)
        assert kind(of) == "FullPolicy"
    assert torch.equal(end(), expected)
    assert traces(of) == before


def test_tasks_of_one_thread():
    of, found = build("llama"), {}
    before = traces(of)

    async def call():
        return kind(of)

    async def inside(entered):
        with compress(of, None, "streaming", keep=8):
            entered.set()
            found["own"], found["child"] = kind(of), await asyncio.create_task(call())
            found["to_thread"] = await asyncio.to_thread(kind, of)
            await asyncio.sleep(0.01)

    async def outside(entered):
        await entered.wait()
        found["other"] = kind(of)
        with pytest.raises(KvcalError, match="already compressed"), compress(of, None, "full"):
            pass

    async def both():
        entered = asyncio.Event()
        await asyncio.gather(inside(entered), outside(entered))

    with pytest.warns(UserWarning, match=OUTSIDE):
        asyncio.run(both())
    assert found == {"own": "ByAge", "child": "ByAge", "to_thread": "ByAge", "other": None}
    with compress(of, None, "full"):  # tasks inherit what their caller is in
        assert asyncio.run(call()) == "FullPolicy"
    gc.collect()
    assert traces(of) == before


def test_enabled_in_one_thread_and_disabled_in_another():
    of = build("llama")
    before = traces(of)
    enable(of, None, "full")
    assert isinstance(in_thread(lambda: enable(of, None, "full")), KvcalError)
    assert in_thread(lambda: disable(of)) is None
    assert isinstance(in_thread(lambda: disable(of)), KvcalError)
    assert kind(of) is None and traces(of) == before
