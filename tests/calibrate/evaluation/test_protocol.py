"""Evaluation against plain forward passes and plain generate() of the same model."""

import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from architectures import HEAD_DIM, KV_HEADS, build

from kvcal.artifacts import KvcalError
from kvcal.calibrate import TokenBlocks, calibrate
from kvcal.calibrate.evaluation.grid import key_of, make_grid
from kvcal.calibrate.evaluation.prompts import Prompts, Windows
from kvcal.calibrate.evaluation.protocol import evaluate
from kvcal.calibrate.evaluation.results import Results
from kvcal.calibrate.evaluation.results_file import parameters
from kvcal.calibrate.evaluation.tasks import scoring
from kvcal.calibrate.evaluation.tasks.sample import Sample, Task
from kvcal.runtime import CompressedCache
from kvcal.runtime import store as stores

PREFIX, CONTINUATION, LAYERS = 40, 12, 3
BATCHES = (
    *(("perplexity", first, rows) for first, rows in ((0, 2), (2, 2), (4, 1))),
    *((f"passkey@{PREFIX}", first, 2) for first in (0, 2, 4)),
)
STEPS = (*3 * (CONTINUATION - 1,), 4 + 3, 5 + 3, 5 + 3)
"""Of each, at most: the longer question of two counts, and the last token of an answer is fed to nothing."""
TASK_STEPS = sum(STEPS[3:])


def tokens(*shape, seed=0):
    return torch.randint(3, 96, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model():
    return build("llama").requires_grad_(False)


@pytest.fixture(scope="module")
def artifact(model):
    ids = tokens(8, 64, seed=1).int()
    everything = torch.ones_like(ids, dtype=torch.bool)
    return calibrate(model, TokenBlocks(ids, everything, everything, {"id": "noise"}), model_id="tiny", reservoir=200)


@pytest.fixture(scope="module")
def windows():
    return Windows(tokens(5, PREFIX + CONTINUATION, seed=2), PREFIX)


class Numbers:
    """A tokenizer whose text is the ids."""

    def decode(self, ids, **settings):
        return " ".join(map(str, ids))


@pytest.fixture(scope="module", autouse=True)
def beginning():
    """A scoring by how the prediction begins, which more text leaves at 1."""
    scoring.SCORINGS["beginning"] = lambda prediction, answers: float(f"{prediction} ".startswith(f"{answers[0]} "))
    yield
    del scoring.SCORINGS["beginning"]


def plain(model, sample, tokens):
    """What `generate()` says after context and question."""
    ids = torch.tensor([[*sample.context, *sample.question]])
    said = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return said[0, ids.shape[1] :].tolist()


@pytest.fixture(scope="module")
def task(model):
    """Six questions of 3 to 5 tokens; what plain generate() says is the answer to the even ones."""
    samples = []
    for row in range(6):
        sample = Sample(
            tuple(tokens(PREFIX, seed=3 + 100 * row).tolist()),
            tuple(tokens(3 + row % 3, seed=10 + row).tolist()),
            ("",),
            (1,),
            (0.1, 0.3, 0.5)[row % 3],
        )
        said = plain(model, sample, 4)
        if row % 2:
            said[2] = 3 + (said[2] - 2) % 93
        samples.append(dataclasses.replace(sample, answers=(Numbers().decode(said),)))
    return Task("passkey", PREFIX, tuple(samples), 4, "beginning")


@pytest.fixture(scope="module")
def prompts(windows, task):
    return Prompts(windows, (task,))


@pytest.fixture(scope="module")
def grid():
    per_head = {"rank": [0.25], "basis": ["pca"], "select": ["head"], "sinks": [0], "recent": [0]}
    return make_grid(["loki", "exact_topk", "h2o", "streaming"], {**per_head, "keep": [1.0, 0.25]})


@pytest.fixture(scope="module")
def rows(model, artifact, prompts, grid):
    return evaluate(model, artifact, prompts, grid, tokenizer=Numbers(), batch_size=2)


def without_times(rows):
    return [{name: value for name, value in row.items() if name != "ms_per_step"} for row in rows]


def find(rows, **setting):
    (row,) = [row for row in rows if all(row.get(name) == value for name, value in setting.items())]
    return row


def test_perplexity_of_full_is_that_of_one_plain_forward_pass(model, windows, rows):
    logits = model(windows.ids).logits[:, PREFIX - 1 : -1].double()
    loss = F.cross_entropy(logits.flatten(0, 1), windows.continuations.flatten())
    assert rows[0]["method"] == "full"
    assert rows[0]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert rows[0]["perplexity_ratio"] == 1


def test_exact_match_is_that_of_plain_generate(rows):
    assert rows[0]["scores"] == {f"passkey@{PREFIX}": 0.5}
    # Depths 0.1, 0.3 and 0.5 belong to rows 0 and 3, 1 and 4, 2 and 5: one of each pair is altered.
    assert rows[0]["scores_by_depth"] == {f"passkey@{PREFIX}": {"0.1": 0.5, "0.3": 0.5, "0.5": 0.5}}


def test_full_attends_to_everything(rows):
    for row in (rows[0], find(rows, method="loki", keep=1.0), find(rows, method="h2o", keep=1.0)):
        assert row["attention_mass"] == [pytest.approx(1, abs=1e-5)] * LAYERS
        assert row["attention_error"] == [pytest.approx(0, abs=1e-5)] * LAYERS
        assert row["perplexity_ratio"] == pytest.approx(1, abs=1e-5)
        assert row["scores"] == rows[0]["scores"]


def test_mass_recalled_by_exact_topk_is_that_of_the_models_own_probabilities(windows, rows):
    """In the first layer, whose queries no compression below has changed."""
    eager = build("llama", attention="eager")
    weights = eager(windows.ids, output_attentions=True).attentions[0]
    masses = []
    for position in range(PREFIX, PREFIX + CONTINUATION - 1):
        held = position + 1
        masses.append(weights[:, :, position, :held].topk(math.ceil(0.25 * held)).values.sum(-1).mean().item())
    row = find(rows, method="exact_topk", keep=0.25)
    assert row["attention_mass"][0] == pytest.approx(sum(masses) / len(masses), rel=1e-5)
    assert row["attention_error"][0] > 0.01


def simulate(rank, components):
    """Attention over whole windows that leaves tokens out by a mask, with causal budgets; rank None: exact scores."""

    def attention(module, query, key, value, mask, scaling, **kwargs):
        group = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(group, 1) for part in (key, value))
        exact = query @ key.mT * scaling
        scores = exact
        if rank is not None:
            basis = components[module.layer_idx][:, :rank].repeat_interleave(group, 0)
            scores = (query @ basis.mT) @ (key @ basis.mT).mT
        allowed = torch.zeros_like(exact, dtype=torch.bool)
        for position in range(query.shape[2]):
            held = position + 1
            budget = math.ceil(0.25 * held) if position >= PREFIX else held
            best = scores[:, :, position, :held].topk(budget).indices
            allowed[:, :, position].scatter_(2, best, True)
        weights = exact.masked_fill(~allowed, -torch.inf).softmax(-1)
        return (weights @ value).transpose(1, 2), None

    return attention


@pytest.mark.parametrize(("method", "rank"), [("exact_topk", None), ("loki", 4)])
def test_perplexity_of_topk_methods_is_that_of_a_mask_simulation(artifact, windows, rows, method, rank):
    from transformers import AttentionInterface

    components = [artifact.tensor("pca", layer, "key_post.components").float() for layer in range(LAYERS)]
    name = f"simulated_{method}"
    AttentionInterface.register(name, simulate(rank, components))
    simulated = build("llama")
    simulated.set_attn_implementation(name)
    with torch.no_grad():
        logits = simulated(windows.ids).logits[:, PREFIX - 1 : -1].double()
    loss = F.cross_entropy(logits.flatten(0, 1), windows.continuations.flatten())
    row = find(rows, method=method, keep=0.25)
    assert row["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert abs(row["perplexity_ratio"] - 1) > 1e-4  # that the simulation is of something


def test_bytes_of_full_by_hand(rows):
    token = LAYERS * KV_HEADS * 2 * HEAD_DIM * 4  # keys and values in float32
    lengths = range(PREFIX + 1, PREFIX + CONTINUATION)
    assert rows[0]["bytes_per_step"] == pytest.approx(token * sum(lengths) / len(lengths))
    assert rows[0]["resident_bytes"] >= token * lengths[-1]
    assert all(row["ms_per_step"] > 0 for row in rows)


def test_every_setting_starts_from_the_same_prefill(model, artifact, prompts, grid, rows):
    """Whatever ran before it, a setting finds what it finds alone."""
    for setting in (grid[2], grid[-1]):
        alone = evaluate(model, artifact, prompts, [setting], tokenizer=Numbers(), batch_size=2)
        assert without_times(alone) == without_times([rows[0], rows[grid.index(setting)]])


@pytest.mark.parametrize(
    ("method", "recorded"),
    [("streaming", 0), ("h2o", LAYERS), ({"0": "streaming", "1": "h2o", "2-": "full"}, 1)],
    ids=["streaming", "h2o", "h2o in one layer"],
)
@pytest.mark.parametrize("question", ["decoded", "prefilled"])
def test_a_prefill_records_attention_in_layers_that_start_from_it(
    model, prompts, monkeypatch, method, recorded, question
):
    calls = []
    mass = stores.attention_mass
    monkeypatch.setattr(stores, "attention_mass", lambda *given: calls.append(1) or mass(*given))
    rows = evaluate(model, None, prompts, [{"method": method}], tokenizer=Numbers(), question=question)
    batches = 2  # of windows and of questions; these are prefilled after their contexts, and through what h2o has left
    assert len(calls) == recorded * (batches + 2 * (question == "prefilled")) and rows[-1]["scores"]


def test_the_batch_size_does_not_matter(model, artifact, prompts, grid, rows):
    for row, other in zip(
        rows, evaluate(model, artifact, prompts, grid, tokenizer=Numbers(), batch_size=4), strict=True
    ):
        for name in ("perplexity", "resident_bytes"):
            assert other[name] == pytest.approx(row[name], rel=1e-5), row
        if row["method"] != "loki":  # which also reads its basis, once for all rows of a batch
            assert other["bytes_per_step"] == pytest.approx(row["bytes_per_step"])
        assert other["scores"] == row["scores"]
        assert other["attention_mass"] == pytest.approx(row["attention_mass"], rel=1e-4)


@pytest.fixture(scope="module")
def few(grid):
    """Some settings of the grid."""
    return [grid[0], grid[2], grid[-3]]


@pytest.mark.parametrize("after", [1, 30, 120])
def test_an_interrupted_run_goes_on_to_the_same_figures(tmp_path, model, artifact, prompts, grid, few, rows, after):
    def stop(done, total, left):
        if done >= after:
            raise KeyboardInterrupt

    def run(progress):
        results = Results.open({"seed": 0}, tmp_path / "results.json")
        return evaluate(
            model, artifact, prompts, few, tokenizer=Numbers(), batch_size=2, results=results, progress=progress
        )

    with pytest.raises(KeyboardInterrupt):
        run(stop)
    kept = json.loads((tmp_path / "results.json").read_text()).get("partial", {})
    steps, again = [], []
    resumed = run(lambda *counts: steps.append(counts[:2]))
    assert without_times(resumed) == without_times([rows[grid.index(setting)] for setting in few])
    everything = len(few) * (3 * (CONTINUATION - 1) + TASK_STEPS)
    done = sum(len(raw["ms"]) for batches in kept.values() for raw in batches.values())
    assert (after == 1) == (done == 0) and steps[-1][0] <= everything - done
    assert steps[-1][0] == steps[-1][1] == sum(most(key) for key in missing(few, kept))
    assert run(lambda *counts: again.append(counts[:2])) == resumed and again == [(0, 0)]
    # What was answered stands beside it, each once.
    lines = [json.loads(line) for line in (tmp_path / "results.predictions.jsonl").read_text().splitlines()]
    assert [(line["setting"], line["index"]) for line in lines] == [(setting, at) for setting in few for at in range(6)]
    for row in resumed:
        of = [line["score"] for line in lines if line["setting"] == parameters(row)]
        assert row["sample_scores"] == {f"passkey@{PREFIX}": of}


def missing(settings, kept):
    """Batches that are yet to be measured, once for each setting."""
    keys = [f"{task} {first}+{rows}" for task, first, rows in BATCHES]
    return [key for setting in settings for key in keys if key not in kept.get(key_of(setting), {})]


def most(key):
    return dict(zip((f"{task} {first}+{rows}" for task, first, rows in BATCHES), STEPS, strict=True))[key]


def test_a_larger_grid_runs_only_what_is_new(model, artifact, prompts, grid, few, rows):
    results = Results({})
    evaluate(model, artifact, prompts, few[:2], tokenizer=Numbers(), batch_size=2, results=results)
    steps = []
    found = evaluate(
        model,
        artifact,
        prompts,
        few,
        tokenizer=Numbers(),
        batch_size=2,
        results=results,
        progress=lambda *counts: steps.append(counts[:2]),
    )
    assert without_times(found) == without_times([rows[grid.index(setting)] for setting in few])
    assert steps[-1][0] == 3 * (CONTINUATION - 1) + TASK_STEPS


def test_a_task_alone_and_perplexity_alone(model, artifact, windows, task, rows):
    (only,) = evaluate(model, None, Prompts(None, (task,)), [{"method": "full"}], tokenizer=Numbers())
    assert only["perplexity"] is None and only["attention_error"] is None
    assert only["scores"] == rows[0]["scores"] and only["bytes_per_step"] > 0
    (only,) = evaluate(model, None, Prompts(windows, ()), [{"method": "full"}])
    assert only["scores"] == {} and only["perplexity"] == pytest.approx(rows[0]["perplexity"], rel=1e-5)


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gpt2", "gpt-neox"])
def test_other_architectures(name, windows):
    """Soft-capped logits, sliding windows (which stay as they are and are not probed), no rotary embedding."""
    model = build(name).requires_grad_(False)
    rows = evaluate(model, None, Prompts(windows, ()), make_grid(["exact_topk"], {"keep": [1.0, 0.25]}))
    logits = model(windows.ids).logits[:, PREFIX - 1 : -1].double()
    loss = F.cross_entropy(logits.flatten(0, 1), windows.continuations.flatten())
    for row in rows[:2]:
        assert row["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
        assert [error for error in row["attention_error"] if error is not None] == pytest.approx(
            [0] * sum(error is not None for error in row["attention_error"]), abs=1e-5
        )
    sliding = [kind == "sliding_attention" for kind in getattr(model.config, "layer_types", None) or [None] * LAYERS]
    assert [error is None for error in rows[2]["attention_error"]] == sliding


def test_prompts_beyond_the_context_are_refused(model):
    calls = []
    handle = model.register_forward_pre_hook(lambda *args: calls.append(args))
    with pytest.raises(KvcalError, match=r"perplexity: 120 \+ 9 tokens exceed this model's context of 128"):
        evaluate(model, None, Prompts(Windows(tokens(1, 129), 120), ()), [{"method": "full"}])
    handle.remove()
    assert not calls


def test_the_hit_rate_is_of_what_was_read(model):
    """A device cache that holds everything misses each token once, when it is first read."""
    windows = Windows(tokens(1, 70, seed=5), 60)
    settings = {"method": "clusterkv", "keep": 24, "tokens_per_cluster": 4, "sinks": 2, "window": 1000}
    reads = {"hits": 0, "needed": 0}
    cache = CompressedCache(model, None, **settings)
    seen = {}

    def observe(layer, store, *_):
        read = store.read_mask().expand(1, KV_HEADS, -1)
        known = seen.setdefault(layer, torch.zeros(1, KV_HEADS, 70, dtype=torch.bool))[:, :, : read.shape[2]]
        reads["hits"] += int((read & known).sum())
        reads["needed"] += int(read.sum())
        known |= read

    cache.observer = observe
    with torch.no_grad():
        model(windows.ids[:, :60], past_key_values=cache)
        for at in range(60, 69):
            model(windows.ids[:, at : at + 1], past_key_values=cache)
    (_, row) = evaluate(model, None, Prompts(windows, ()), [{**settings, "offload": "cpu", "cached": 200}])
    assert row["hit_rate"] == reads["hits"] / reads["needed"]
