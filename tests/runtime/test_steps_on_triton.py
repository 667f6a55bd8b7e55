"""The steps that a CUDA graph replays: on Triton's kernels against the kernels' references, and these against the
steps that run eagerly, whose shapes follow from the true lengths."""

import coded
import pytest
import torch
from tolerances import assert_close

from kvcal.runtime.attention import SoftmaxSpec
from kvcal.runtime.fixed_step import Clock, FixedStep
from kvcal.runtime.methods.basis import Basis
from kvcal.runtime.methods.clusterkv import ClusterKV
from kvcal.runtime.methods.exact_topk import ExactTopk
from kvcal.runtime.methods.full import Full
from kvcal.runtime.methods.h2o import H2O
from kvcal.runtime.methods.loki import Loki, LokiPolicy
from kvcal.runtime.methods.quest import Quest
from kvcal.runtime.methods.snapkv import SnapKV
from kvcal.runtime.methods.sparq import Sparq
from kvcal.runtime.methods.spectral import Spectral
from kvcal.runtime.methods.streaming import Streaming
from kvcal.runtime.settings import new_store
from kvcal.runtime.store import Store

KERNELS = ("append", "attend", "dense", "scan", "score", "select")
HEADS, GROUP, DIMS, RANK = 2, 4, 32, 16
LENGTHS = (37, 9, 62)
"""The last of them fills its page, of which what `spectral` keeps is read from there on."""
CLUSTERS = {"keep": 30, "tokens_per_cluster": 6, "window": 12, "sinks": 4}
CODED = {"rank": RANK, "keep": 12, "sinks": 3, "recent": 4}
METHODS = {
    "full": Full(),
    "loki": Loki(rank=RANK, keep=12, basis="pca", select="head"),
    "loki-group": Loki(rank=RANK, keep=0.5, select="group", basis="pca"),
    "loki-max": Loki(rank=RANK, keep=12, select="max", dense_below=20, basis="pca"),
    "loki-index": Loki(rank=RANK, keep=12, select="max", basis="score"),
    "loki-index-group": Loki(rank=RANK, keep=12, select="group", basis="score"),
    "loki-sinks": Loki(rank=RANK, keep=12, select="max", basis="score", sinks=2, recent=3),
    "loki-index-sampled": Loki(rank=RANK, keep=12, basis="score", choice="sampled", sample=16, recent=2),
    "loki-sampled": Loki(rank=RANK, keep=0.5, basis="pca", choice="sampled", sample=16),
    "exact_topk": ExactTopk(keep=12, select="head"),
    "exact_topk-group": ExactTopk(keep=0.4, dense_below=20),
    "quest": Quest(keep=20, page=4, select="head"),
    "quest-group": Quest(keep=0.5, page=8, sinks=3, recent=5),
    "sparq": Sparq(keep=12, rank=RANK, select="head"),
    "sparq-group": Sparq(keep=0.4, dense_below=20),
    "clusterkv": ClusterKV(**CLUSTERS),
    "clusterkv-head": ClusterKV(**CLUSTERS, select="head"),
    "clusterkv-max": ClusterKV(**CLUSTERS, select="max"),
    "clusterkv-tail": ClusterKV(**CLUSTERS, tail=True, select="max"),
    "clusterkv-head-tail": ClusterKV(**CLUSTERS, tail=True, select="head"),
    "spectral": Spectral(**CODED, select="max"),
    "spectral-group-4-bits": Spectral(**CODED, bits=4),
    "spectral-head-no-residual": Spectral(**CODED, bits=8, select="head", residual=False),
    "spectral-8-bit-rows": Spectral(**CODED, rows=8, dense_below=20),
    "spectral-sampled": Spectral(**CODED, sample=16),
    "spectral-8-bit-rows-sampled": Spectral(**CODED, rows=8, sample=16, select="head"),
    "streaming": Streaming(keep=12),
    "h2o": H2O(keep=0.4),
    "snapkv": SnapKV(keep=0.4, window=4),
}
STEPPED = 2
CALLERS = ("methods.full.choose", "methods.choosing.backend", "methods.loki.backend", "kv.pages.choose")


@pytest.fixture
def on(monkeypatch, device):
    """Makes every kernel run on one backend, whatever its tensors' device."""
    monkeypatch.setattr("kvcal.runtime.methods.choosing.SLACK", 1000.0)  # kernels read all that reaches a threshold

    def choose(backend):
        for kernel in KERNELS:
            monkeypatch.setattr(f"kvcal.kernels.{kernel}.choose", lambda *_, **__: backend)
        for caller in CALLERS:
            monkeypatch.setattr(f"kvcal.runtime.{caller}", lambda *_, **__: backend)

    return choose


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Text:
    """Queries, keys and values of a prompt of unequal rows and of the tokens after it."""

    def __init__(self, dtype, device):
        self.generator, self.dtype, self.device = torch.Generator().manual_seed(5), dtype, device
        self.basis = torch.linalg.qr(self.draw(HEADS, DIMS, DIMS, dtype=torch.float64))[0].float().to(device)
        padding = torch.arange(max(LENGTHS)) < max(LENGTHS) - torch.tensor(LENGTHS).unsqueeze(1)
        self.prompt, self.valid = self.tokens(max(LENGTHS)), ~padding
        self.decoded = [self.tokens(1) for _ in range(STEPPED)]

    def tokens(self, count):
        shapes = (HEADS * GROUP, HEADS, HEADS)
        return [self.draw(len(LENGTHS), heads, count, DIMS, dtype=self.dtype) for heads in shapes]

    def draw(self, *shape, dtype):
        return torch.randn(shape, generator=self.generator).to(self.device, dtype)


def make_store(method, basis):
    if isinstance(method, Loki):
        part = basis[:, :RANK].contiguous()
        made = Basis(basis, basis, RANK) if method.basis == "pca" else Basis(part, part, RANK)
        return Store(LokiPolicy(method, made))
    return new_store(method.bind(0, DIMS, coded.artifact(DIMS, HEADS) if isinstance(method, Spectral) else None))


def stepped(method, text, spec):
    """[STEPPED, B, Hq, Dv] and what the store holds after that."""
    store = make_store(method, text.basis.to(text.dtype))
    store.prefill(*text.prompt, spec, text.valid)
    clock = Clock(store.lengths, text.device)
    step = FixedStep(store, clock)
    step.reserve(max(LENGTHS) + STEPPED + 1)
    out = []
    for query, key, value in text.decoded:
        out.append(step.step(query, key, value, spec).squeeze(2))
        clock.tick()
    return torch.stack(out), {name: step.buffer(name) for name in store.tokens}


@pytest.mark.parametrize(
    ("method", "capped"),
    [
        *((method, False) for method in METHODS),
        *(
            (method, True)
            for method in ("full", "loki-max", "quest", "sparq", "clusterkv-tail", "spectral", "spectral-8-bit-rows")
        ),
    ],
)
def test_equals_the_reference(method, capped, on, device):
    text, spec = Text(torch.float32, device), SoftmaxSpec(DIMS**-0.5)
    if capped:
        sinks = torch.linspace(-1, 1, HEADS * GROUP, device=device)
        spec = SoftmaxSpec(DIMS**-0.5, softcap=5.0, sink_logits=sinks)
    on("reference")
    expected, held = stepped(METHODS[method], text, spec)
    on("triton")
    out, written = stepped(METHODS[method], text, spec)
    assert_close(out, expected)
    for name in held:
        if held[name].is_floating_point():
            assert_close(written[name], held[name])
        else:
            assert torch.equal(written[name], held[name])


@pytest.mark.parametrize("method", METHODS)
def test_equals_the_store(method, on, device):
    """One softmax over what the store's own, eager attention reads, and its tail."""
    text, spec = Text(torch.float32, device), SoftmaxSpec(DIMS**-0.5)
    on("reference")
    out, _ = stepped(METHODS[method], text, spec)
    store = make_store(METHODS[method], text.basis)
    store.prefill(*text.prompt, spec, text.valid)
    for step, (query, key, value) in zip(out, text.decoded, strict=True):
        store.append(key, value)
        assert_close(step, store.attend(query, spec).squeeze(2).double())


@pytest.mark.parametrize(
    "method", ["full", "loki-sinks", "quest", "clusterkv", "spectral", "streaming", "h2o", "snapkv"]
)
def test_a_step_can_be_taken_again(method, on, device):
    """As a graph's is, which is run to warm up and then, from the same state, for real."""
    text, spec = Text(torch.float32, device), SoftmaxSpec(DIMS**-0.5)
    on("reference")
    store = make_store(METHODS[method], text.basis)
    store.prefill(*text.prompt, spec, text.valid)
    clock = Clock(store.lengths, device)
    step = FixedStep(store, clock)
    step.reserve(max(LENGTHS) + STEPPED + 1)
    for query, key, value in text.decoded:
        before = [tensor.clone() for tensor in store.changed_by_step()]
        first = step.step(query, key, value, spec)
        for tensor, was in zip(store.changed_by_step(), before, strict=True):
            tensor.copy_(was)
        assert torch.equal(step.step(query, key, value, spec), first)
        clock.tick()
    store.count(STEPPED)
    eager = make_store(METHODS[method], text.basis)
    eager.prefill(*text.prompt, spec, text.valid)
    for _, key, value in text.decoded:
        eager.append(key, value)
    assert store.lengths == eager.lengths and store.held == eager.held
    mine, expected = store.state(), eager.state()
    positions = [name for name in ("tokens.position", "tokens.key") if name in expected and method != "h2o"]
    assert all(torch.equal(mine[name], expected[name]) for name in positions)


@pytest.mark.parametrize("method", ["full", "loki-max", "clusterkv-max", "spectral", "spectral-8-bit-rows"])
def test_sixteen_bits(method, on, device):
    """Against float32: what is chosen may differ in a token or two whose scores are nearly those of others."""
    text, exact = Text(torch.bfloat16, device), Text(torch.float32, device)
    exact.prompt = [part.float() for part in text.prompt]
    exact.decoded = [[part.float() for part in token] for token in text.decoded]
    on("reference")
    expected, _ = stepped(METHODS[method], exact, SoftmaxSpec(DIMS**-0.5))
    on("triton")
    out, _ = stepped(METHODS[method], text, SoftmaxSpec(DIMS**-0.5))
    error = (out.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.median() < 2e-2
