"""Evaluation of `cla`, which changes the model, beside methods that do not."""

import math

import pytest
import torch
import torch.nn.functional as F
from architectures import HEAD_DIM, KV_HEADS, build

from kvcal.artifacts import KvcalError
from kvcal.calibrate.evaluation.figure import series_of
from kvcal.calibrate.evaluation.grid import by_sharing, check_grid, decoding, make_grid
from kvcal.calibrate.evaluation.prompts import Prompts, Windows
from kvcal.calibrate.evaluation.protocol import evaluate
from kvcal.calibrate.evaluation.results import Results
from kvcal.calibrate.evaluation.side_by_side import continue_prompt
from kvcal.runtime.cla import SharingMap, share, shared

PREFIX, CONTINUATION, LAYERS = 40, 12, 4
SHARED = {"groups": ["0-1/2-3", "0-3"], "pool": ["mean", "first"], "keep": [1.0, 0.25]}


@pytest.fixture(scope="module")
def model():
    return build("llama", num_hidden_layers=LAYERS).requires_grad_(False)


@pytest.fixture(scope="module")
def windows():
    ids = torch.randint(3, 96, (5, PREFIX + CONTINUATION), generator=torch.Generator().manual_seed(2))
    return Windows(ids, PREFIX)


@pytest.fixture(scope="module")
def grid():
    return make_grid(["full", "h2o", "exact_topk", "cla", "cla+exact_topk"], SHARED)


@pytest.fixture(scope="module")
def rows(model, windows, grid):
    return evaluate(model, None, Prompts(windows, ()), grid, batch_size=2)


def without_times(rows):
    return [{name: value for name, value in row.items() if name != "ms_per_step"} for row in rows]


def test_settings_of_the_sharing_and_of_the_method_after_it(grid):
    of = [setting for setting in grid if setting["method"] == "cla+exact_topk"]
    assert len(of) == 8 and all(setting.keys() == {"method", *SHARED} for setting in of)
    assert sum(setting["method"] == "cla" for setting in grid) == 4  # keep is none of its parameters
    assert decoding(of[0]) == {"method": "exact_topk", "keep": 1.0}
    assert decoding({"method": "cla", "groups": "0-1", "uptrained": False}) == {"method": "full"}
    for method in ("cla+nothing", "cla+", "clay"):
        with pytest.raises(KvcalError, match=r"choose among full, .*, and cla or cla\+ any of them"):
            make_grid([method], {})


def test_h2o_beside_layers_that_share(model, windows):
    """Attention is recorded for its layers, and not for those that share, where that means nothing."""
    setting = {"method": "cla+h2o", "groups": "0-1/2/3", "dense_layers": 2, "keep": 1.0}
    row = evaluate(model, None, Prompts(windows, ()), [setting])[-1]
    with shared(model, SharingMap.parse("0-1/2/3")):
        logits = model(windows.ids, use_cache=False).logits[:, PREFIX - 1 : -1].double()
    nll = F.cross_entropy(logits.flatten(0, 1), windows.continuations.flatten())
    assert row["perplexity"] == pytest.approx(math.exp(nll), rel=1e-5)


def test_models_that_are_alike_are_measured_together(grid):
    groups = by_sharing(grid)
    assert [len(group) for group in groups] == [5, 3, 3, 3, 3]
    assert groups[0][0] == {"method": "full"}
    names = {series_of(setting) for setting in grid if setting["method"] == "cla"}
    assert len(names) == 4


@pytest.mark.parametrize("groups", SHARED["groups"])
@pytest.mark.parametrize("pool", SHARED["pool"])
def test_perplexity_of_cla_is_that_of_one_forward_pass_of_the_shared_model(model, windows, rows, groups, pool):
    def perplexity():
        logits = model(windows.ids, use_cache=False).logits[:, PREFIX - 1 : -1].double()
        return math.exp(F.cross_entropy(logits.flatten(0, 1), windows.continuations.flatten()))

    full = perplexity()
    with shared(model, SharingMap.parse(groups), pool=pool):
        expected = perplexity()
    chosen = [row for row in rows if row.get("groups") == groups and row.get("pool") == pool]
    cla, topk = chosen[0], next(row for row in chosen if row.get("keep") == 1.0)
    for row in (cla, topk):
        assert row["perplexity"] == pytest.approx(expected, rel=1e-5)
        assert row["perplexity_ratio"] == pytest.approx(expected / full, rel=1e-5)
        # Against the shared model's own dense attention.
        assert row["attention_error"] == [pytest.approx(0, abs=1e-5)] * LAYERS
        assert row["attention_mass"] == [pytest.approx(1, abs=1e-5)] * LAYERS
    assert rows[0]["perplexity"] == pytest.approx(full, rel=1e-5) and abs(expected / full - 1) > 1e-4


def test_bytes_are_those_of_the_storing_layers_and_reads_those_of_all(rows):
    token = LAYERS * KV_HEADS * 2 * HEAD_DIM * 4
    lengths = range(PREFIX + 1, PREFIX + CONTINUATION)
    for row in rows:
        if row["method"] == "cla":
            part = 2 if row["groups"] == "0-1/2-3" else 4
            assert rows[0]["resident_bytes"] == part * row["resident_bytes"]
            assert row["bytes_per_step"] == pytest.approx(token * sum(lengths) / len(lengths))
        if row["method"] == "cla+exact_topk" and row["keep"] == 0.25:
            assert row["bytes_per_step"] < rows[0]["bytes_per_step"]
            assert min(row["attention_error"]) > 0.01


def test_other_settings_are_as_without_it(model, windows, grid, rows):
    plain = [setting for setting in grid if "groups" not in setting]
    alone = evaluate(model, None, Prompts(windows, ()), plain, batch_size=2)
    assert without_times(alone) == without_times([row for row in rows if "groups" not in row])


def test_an_interrupted_run_goes_on_to_the_same_figures(tmp_path, model, windows, grid, rows):
    def stop(done, total, left):
        if done == 200:
            raise KeyboardInterrupt

    def run(progress):
        results = Results.open({"seed": 0}, tmp_path / "results.json")
        return evaluate(model, None, Prompts(windows, ()), grid, batch_size=2, results=results, progress=progress)

    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(KeyboardInterrupt):
        run(stop)
    assert [name for name, _ in model.named_parameters()] == names
    assert without_times(run(None)) == without_times(rows)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("cla+h2o", "h2o evicts tokens that the others still want"),
        ("cla+loki", "loki needs a basis of the keys as shared in layer 0"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_run(model, method, message):
    with pytest.raises(KvcalError, match=message):
        check_grid(make_grid([method], {"groups": ["0-3"]}), model, None)
    with pytest.raises(KvcalError, match="which layers share"):
        check_grid(make_grid(["cla"], {}), model, None)


def test_a_prompt_continued_by_a_shared_model(model):
    class Ids:
        pad_token_id = 0

        def decode(self, ids, **settings):
            return ids.tolist()

    ids = torch.randint(3, 96, (1, 20), generator=torch.Generator().manual_seed(4))
    found = continue_prompt(model, Ids(), None, ids[0].tolist(), tokens=5, method="cla", groups="0-1,2-3")
    with shared(model, SharingMap.parse("0-1,2-3")):
        mask = torch.ones_like(ids)
        said = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)[0, 20:].tolist()
    assert found.text == said


def test_a_model_that_shares_for_good_is_evaluated_as_one_that_shares_for_the_setting(model, windows):
    kept = build("llama", num_hidden_layers=LAYERS).requires_grad_(False)
    share(kept, SharingMap.parse("0-1/2-3")).keep()
    own, of = make_grid(["quest"], {}), make_grid(["cla", "cla+quest"], {"groups": ["0-1/2-3"]})
    found = evaluate(kept, None, Prompts(windows, ()), own)
    expected = evaluate(model, None, Prompts(windows, ()), of)[1:]
    assert len(found) == len(expected) == 2
    for row, same in zip(found, expected, strict=True):
        assert row["perplexity"] == pytest.approx(same["perplexity"], rel=1e-5)
        assert row["resident_bytes"] == same["resident_bytes"]


def test_methods_that_evict_are_evaluated_where_nothing_is_shared(model, windows):
    grid = make_grid(["h2o", "cla+h2o"], {"groups": ["0,1,2,3"], "keep": [0.25]})
    rows = evaluate(model, None, Prompts(windows, ()), grid)
    assert rows[1]["perplexity"] == pytest.approx(rows[2]["perplexity"], rel=1e-6)
