"""benchmarks/real: settings read the bytes that they are to read, and one method can be measured anew."""

import dataclasses
import itertools
import json
import math
from pathlib import Path

import coded
import pytest
import torch
from architectures import build

from kvcal.calibrate.blocks import TokenBlocks
from kvcal.calibrate.one_pass import calibrate
from kvcal.calibrate.planning.points import DENSE, Point, Problem
from kvcal.runtime.attention import SoftmaxSpec

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results" / "real"
LENGTH, HEAD_DIM = 2048, 64


@pytest.mark.parametrize("level", ["1/32", "1/16", "1/8", "1/4", "1/2"])
def test_equal_bytes_are_equal(module, level):
    """Of a 16-bit cache, as the stores count them; loki and spectral, which need an artifact, in the test below.
    H2O and SnapKV start from the queries of a prompt."""
    settings = module("settings")
    share = settings.LEVELS[level]
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, tokens, HEAD_DIM, dtype=torch.bfloat16)
        for heads, tokens in ((3, 1), (1, LENGTH + 1), (1, LENGTH + 1))
    )
    problem = Problem(0, query, key, value, SoftmaxSpec(HEAD_DIM**-0.5, None, None), 1)
    for setting in settings.at_equal_bytes(share, HEAD_DIM, LENGTH):
        if setting["method"] not in ("loki", "spectral", "h2o", "snapkv"):
            read = problem.measure(setting, None, 8).bytes
            least, most = _bounds(setting, share, LENGTH + 1)
            assert least < read < most, (setting, read)


@pytest.mark.parametrize("length", [2048, 4096, 7680])
def test_measured_bytes_are_equal(module, length):
    """On the model's own keys, of every method."""
    found = json.loads((RESULTS / f"smollm2-135m-attention-{length}.json").read_text())
    for key, (row,) in found.items():
        share = module("settings").LEVELS[key.partition(" ")[0]]
        least, most = _bounds(row["setting"], share, length + 8)
        assert least < row["bytes"] < most, (key, row["bytes"])


def _bounds(setting, share, tokens):
    if setting["method"] == "quest":  # boxes, and whole pages
        page = setting["page"]
        # The one that grows at least, and the first.
        read = max(1 + setting["sinks"], math.ceil(setting["keep"] * tokens / page))
        pages = math.ceil(tokens / page) + read * page
        return 0.97 * pages / tokens, 1.03 * pages / tokens
    if setting.get("normaliser") == "clusters":  # counts and spread of clusters are small: a seventh is not spent
        return 0.84 * share, 1.01 * share  # and positions of exact tokens
    return 0.97 * share, 1.08 * share  # sinks, or the maps of a basis, come on top


def test_errors_have_the_standard_error_over_texts(module):
    """Of the mean over layers: two layers, three texts, against measuring each text alone."""
    torch.manual_seed(0)
    attention = module("attention")
    layers = []
    for layer in range(2):
        query, key, value = (torch.randn(3, heads, tokens, 8) for heads, tokens in ((2, 4), (1, 64), (1, 64)))
        layers.append(Problem(layer, query, key, value, SoftmaxSpec(8**-0.5, None, None), 3))
    setting = {"method": "exact_topk", "keep": 4}
    found = attention.errors(layers, [setting], None)[0]
    alone = [[_of_row(layer, row).measure(setting, None, 1).error for layer in layers] for row in range(3)]
    by_text = torch.tensor(alone).mean(1)
    assert found["by_text"] == pytest.approx(by_text.tolist(), abs=2e-5)
    assert found["error"] == pytest.approx(float(by_text.mean()))
    assert found["error_se"] == pytest.approx(float(by_text.std() / 3**0.5))


def test_a_sampled_choice_is_measured_against_the_exact_one(module):
    """A sample of more than half of the tokens is all of them, and the choice exact; of a smaller one, of 143, the 15th
    best is the threshold, and what a head reads has a deviation of 1/√15."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, tokens, HEAD_DIM) for heads, tokens in ((4, 3), (2, 1003), (2, 1003)))
    problem = Problem(0, query, key, value, SoftmaxSpec(HEAD_DIM**-0.5), 2)
    setting = {"method": "spectral", "keep": 0.125}
    exact, *sampled = module("thresholds").choose([problem], setting, coded.artifact(HEAD_DIM, 2))
    assert exact["read"] == exact["most"] == pytest.approx(1, abs=0.01) and 0.125 < exact["mass"] < 1
    for row in sampled[2:]:
        same = {name: value for name, value in row.items() if name not in ("choice", "sample")}
        assert same == pytest.approx({name: exact[name] for name in same}, rel=1e-5)  # not summed in the same order
    for row in sampled[:2]:
        assert row["read"] == pytest.approx(1, abs=0.15) and 1 < row["most"] <= 1 + 3 / 15**0.5
        assert row["mass"] == pytest.approx(exact["mass"], rel=0.15)  # as what is read


@pytest.fixture
def problem():
    """Two texts; the first token receives much of the attention, as it does in models."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, tokens, HEAD_DIM) for heads, tokens in ((4, 3), (2, 1603), (2, 1603)))
    key[:, :, 0] = 6 * query.unflatten(1, (2, 2)).mean((2, 3))
    return Problem(0, query, key, value, SoftmaxSpec(HEAD_DIM**-0.5), 2)


def test_the_simulation_meets_the_step(module, problem):
    """Its outputs' errors, up to page corrections, which are not coded in it."""
    itself, simulated, *others = module("alternatives").alternatives([problem], coded.artifact(HEAD_DIM, 2))
    assert simulated["what"] == "as it is" and simulated["error"] == pytest.approx(itself["error"], rel=0.002)
    by_name = {row["what"]: row for row in others}
    assert by_name["tokens by mass"]["tokens"] <= simulated["tokens"]


@pytest.mark.parametrize("base", ["codebook", "sequence", "between", "page"])
@pytest.mark.parametrize("pages", [False, True])
def test_what_stands_for_tokens_that_are_not_read(module, problem, base, pages):
    """By a loop over tokens."""
    simulation = module("simulation")
    layer = simulation.Layer(
        problem, coded.artifact(HEAD_DIM, 2), simulation.Variation(rows=16, base=base, pages=pages)
    )
    weights = torch.rand(*layer.estimates.shape) / layer.estimates.shape[-1]
    expected = torch.zeros(2, 2, 2, 3, HEAD_DIM)
    codebook, prefix = layer.tables["value"], problem.prefix
    for text, head in itertools.product(range(2), range(2)):
        value, words = layer.value[text, head], layer.words[text, head]
        bases = codebook[head][words]
        if base in ("sequence", "between"):
            calibrated = 16 if base == "between" else 0
            for word in words[:prefix].unique():
                of_word = value[:prefix][words[:prefix] == word]
                sums = of_word.sum(0) + calibrated * codebook[head][word]
                bases[words == word] = sums / (len(of_word) + calibrated)
        for step, token in itertools.product(range(3), range(len(words))):
            page = slice(token // 64 * 64, token // 64 * 64 + 64)
            stand_in = bases[token]
            if pages and page.stop <= prefix + step + 1:
                mean = value[page].mean(0)
                stand_in = mean if base == "page" else stand_in + mean - bases[page].mean(0)
            expected[text, head, :, step] += weights[text, head, :, step, token, None] * stand_in
    torch.testing.assert_close(layer.stand_ins(weights), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("select", ["group", "max", "head"])
def test_who_chooses_reads_what_it_estimates_highest(module, problem, select):
    """By a loop over texts, heads and steps: what is always read, and of the rest the best, a budget in all."""
    simulation = module("simulation")
    layer = simulation.Layer(problem, coded.artifact(HEAD_DIM, 2), simulation.Variation(select=select))
    budget = simulation.Variation().keep(HEAD_DIM, problem.prefix) / (2 if select == "head" else 1)
    chosen = layer._chosen(None).expand(-1, -1, 2, -1, -1)
    for text, head, step in itertools.product(range(2), range(2), range(3)):
        held = problem.prefix + step + 1
        free = torch.arange(simulation.SINKS, held - simulation.RECENT)
        estimates = layer.estimates[text, head, :, step][:, free].double()
        by_head = {
            "group": estimates.softmax(-1).mean(0, keepdim=True).expand(2, -1),
            "max": estimates.amax(0, keepdim=True).expand(2, -1),
            "head": estimates,
        }[select]
        room = math.ceil(budget * held) - simulation.SINKS - simulation.RECENT
        for query, scores in enumerate(by_head):
            expected = {*range(simulation.SINKS), *range(held - simulation.RECENT, held)}
            expected |= set(free[scores.topk(room).indices].tolist())
            assert set(chosen[text, head, query, step].nonzero().flatten().tolist()) == expected


def test_variations_read_no_more_bytes(module):
    """By hand: a codeword's number, codes with their scales, tables shared by 8 sequences, page corrections, rows."""
    tables = 2 * (2 * 64 * 64 + 64 + 2 * 64 * 32) / 8
    alternatives = module("alternatives")
    for name, code, page, row in (
        ("as it is", 10, 66, 132),
        ("rows of 4 bits", 10, 66, 68),
        ("codewords, no pages", 10, 0, 132),
    ):
        keep = alternatives.VARIATIONS[name].keep(64, 2048)
        read = 2048 * (1 + code) + 2048 / 64 * page + tables + keep * 2048 * row
        assert read == pytest.approx(2048 * 256 / 8)


def _of_row(problem, row):
    tensors = {name: getattr(problem, name)[row : row + 1] for name in ("query", "key", "value")}
    return dataclasses.replace(problem, **tensors, texts=1)


@pytest.mark.parametrize(("called", "seq_len"), [("artifact", 8192), ("in_short_blocks", 2048)])
def test_artifacts_are_named_by_all_that_they_depend_on(module, monkeypatch, tmp_path, called, seq_len):
    subjects, asked = module("subjects"), []
    monkeypatch.setattr(subjects.subprocess, "run", lambda arguments, check: asked.append(arguments))
    monkeypatch.setattr(subjects, "load", str)
    bench = subjects.Bench(subjects.SUBJECTS["smollm2-135m"], tmp_path, tmp_path)
    folder = getattr(bench, called)("code", 4096)
    (arguments,) = asked
    assert arguments[arguments.index("--seq-len") + 1] == str(seq_len)
    assert folder == arguments[arguments.index("--output") + 1] == str(tmp_path / f"smollm2-135m-code-4096-{seq_len}")


def test_blocks_calibrated_on_are_as_long_as_what_is_decoded_after(module):
    for subject in module("subjects").SUBJECTS.values():
        assert subject.seq_len >= max(subject.lengths) and subject.short_seq_len >= subject.shortest


def test_loki_scores_as_many_dimensions_and_reads_as_many_tokens_as_sparq(module):
    for share in module("settings").LEVELS.values():
        found = module("settings").at_equal_bytes(share, HEAD_DIM, LENGTH)
        loki, score, sparq = ({**each, "method": ""} for each in found[:3])
        assert loki == {**sparq, "basis": "pca", "sinks": 0, "recent": 0}, "as published"
        assert score == {**sparq, "basis": "score", "sinks": 1, "recent": 16}
        assert loki["rank"] / (2 * HEAD_DIM) + loki["keep"] == pytest.approx(share, abs=1e-4)


def test_uniform_settings_read_as_much_as_a_plan(module):
    """Of two layers whose bytes are linear in `keep`: 0.02 + 0.6·keep in the mean, with 32 dimensions 0.05 more."""
    points = {
        layer: [
            *(
                Point(
                    {"method": "spectral", "rank": rank, "keep": keep},
                    0.01 * (layer + 1) + 0.005 + 0.05 * (rank == 32) + (0.4 + 0.4 * layer) * keep,
                    0.1,
                    0.1,
                    (),
                )
                for rank in (16, 32, 64)
                for keep in ((0.5, 1.0) if rank == 64 else (0.0625, 0.125, 0.25))
            ),
            DENSE,
        ]
        for layer in range(2)
    }
    found = {setting["rank"]: setting["keep"] for setting in module("plans").uniform(points, 0.125)}
    assert found == {16: pytest.approx(0.105 / 0.6, abs=1e-5), 32: pytest.approx(0.055 / 0.6, abs=1e-5)}


def test_a_check_says_what_was_not_asked(module):
    checked = {
        "full": {"scores": {"passkey@8": 0.5, "multikey@8": 0.25}},
        "plan": {"perplexity_ratio": 1.0, "perplexity_ratio_se": 0.01, "scores": {"multikey@8": 0.75}},
    }
    line = module("page_decoding")._check(checked)
    assert "passkey@8 not asked (full 0.50), multikey@8 0.75 (full 0.25)" in line


def test_one_method_is_forgotten_with_what_was_not_finished(module, tmp_path):
    rows = [{"method": "full"}, {"method": "loki"}, {"method": "quest"}]
    path = tmp_path / "methods.json"
    keys = [json.dumps({"method": name}) for name in ("loki", "quest")]
    path.write_text(json.dumps({"settings": {}, "results": rows, "partial": {key: {} for key in keys}}))
    module("decoding").forget(path, "loki")
    left = json.loads(path.read_text())
    assert [row["method"] for row in left["results"]] == ["full", "quest"] and list(left["partial"]) == keys[1:]


def test_what_is_measured_of_spectral_alone_is_measured_anew(module, monkeypatch, tmp_path):
    subjects, parts, found = module("subjects"), module("parts"), []
    path = tmp_path / "smollm2-135m-codewords.json"
    path.write_text("{}")
    monkeypatch.setitem(parts.PARTS, "codewords", lambda bench, only: found.append((path.exists(), only)))
    parts.run(subjects.Bench(subjects.SUBJECTS["smollm2-135m"], tmp_path, tmp_path), ["codewords"], "spectral")
    assert found == [(False, "spectral")]


def test_the_page_states_what_was_measured(module, tmp_path):
    """A ratio with its standard error, bytes as counted or as h2o's formula has them, and nothing that is missing."""
    rows = [
        _row({"method": "full"}, 1.0, 0.0, 0.9, 0.05),
        _row({"method": "h2o", "keep": 0.5}, 1.25, 0.125, 0.0, 0.0),
        _row({"method": "sparq", "rank": 8, "keep": 0.5}, 3.5, 0.5, 0.5, 0.1),
    ]
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "smollm2-135m-methods-2048.json").write_text(json.dumps({"settings": {}, "results": rows}))
    counted = {"setting": {"method": "sparq", "rank": 8, "keep": 0.5}, "bytes": 0.5678}
    counted |= {"error": 0.1, "error_se": 0.0625, "by_layer": {"0": 0.1}, "by_text": [0.1]}
    (tmp_path / "real" / "smollm2-135m-attention-2048.json").write_text(json.dumps({"1/2 sparq": [counted]}))
    page = module("page").tables(tmp_path / "real")
    assert "| `h2o` keep 0.5 | 0.5156 | 1.250 ± .125 | 0.00 ± .00 |" in page
    assert "| `sparq` rank 8, keep 0.5 | 0.5678 | 3.500 ± .500 | 0.50 ± .10 |" in page
    assert "| 1/2 | `sparq` rank 8, keep 0.5 | 0.5678 | 0.100 ± .062 | – | 0.10 (0) |" in page
    assert "## RULER" not in page
    (figure,) = module("figure").figures(tmp_path / "real", module("subjects").SUBJECTS["smollm2-135m"])
    assert figure.name == "real.png" and len(figure.draw()) > 1000


def test_the_page_leaves_out_what_is_asked_no_more(module, tmp_path):
    """Results of settings that a method no longer has, or that nobody wants to know of any more."""
    (tmp_path / "real").mkdir()
    published, gone = module("settings").PUBLISHED, {"method": "loki", "rank": 0.25, "tail": True}
    rows = [_row(setting, 1.5, 0.1, 0.5, 0.1) for setting in ({"method": "full"}, published, gone)]
    (tmp_path / "real" / "smollm2-135m-why-loki.json").write_text(json.dumps({"settings": {}, "results": rows}))
    asked = module("choices").CHOICES["StreamingLLM, sinks"][0]
    entry = {"bytes": 0.125, "error": 0.5, "error_se": 0.1, "by_layer": {"0": 0.5}}
    keys = {f"StreamingLLM, sinks: {json.dumps(asked)}": asked, f"Loki, a tail: {json.dumps(gone)}": gone}
    found = {key: [{"setting": setting, **entry}] for key, setting in keys.items()}
    (tmp_path / "real" / "smollm2-135m-choices.json").write_text(json.dumps(found))
    page = module("page").tables(tmp_path / "real")
    assert "| as published |" in page and "| StreamingLLM, sinks | `streaming` keep 0.125, sinks 0 |" in page
    assert "`loki` rank 0.25, tail" not in page


def _row(setting, ratio, ratio_se, score, score_se):
    task = "passkey@2048"
    measured = {"perplexity_ratio": ratio, "perplexity_ratio_se": ratio_se, "bytes_per_step": 1.0}
    return {**setting, **measured, "scores": {task: score}, "scores_se": {task: score_se}}


def test_the_bias_and_the_spread_of_an_estimate(module):
    """Of 2000 draws with a known offset and deviation in each of 64 dimensions, over an output of length 8."""
    torch.manual_seed(0)
    dense = torch.full((2, 3, HEAD_DIM), 8 / HEAD_DIM**0.5)
    offset, deviation = 0.25, 0.5
    draws = dense + offset + deviation * torch.randn(2000, 2, 3, HEAD_DIM)
    found = module("subgen").squares(draws, dense)
    for name, size in (("bias", offset**2), ("spread", deviation**2), ("error", offset**2 + deviation**2)):
        assert found[name].tolist() == pytest.approx([HEAD_DIM * size / 64] * 2, rel=0.02)


def test_an_estimate_without_bias_has_none(module):
    """Few draws have a mean that is off, by as much as their spread explains."""
    torch.manual_seed(0)
    dense = torch.randn(2, 5000, HEAD_DIM)
    found = module("subgen").squares(dense + torch.randn(8, 2, 5000, HEAD_DIM), dense)
    assert (found["bias"].abs() < 0.01 * found["spread"]).all()


def test_every_seed_draws_anew_and_what_is_not_drawn_has_no_spread(module):
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 1, tokens, HEAD_DIM) for tokens in (1, 301, 301))
    problem = Problem(3, query, key, value, SoftmaxSpec(HEAD_DIM**-0.5), 1)
    sizes = {"window": 32, "clusters": 8, "t": 2, "s": 16}
    drawn = [{"method": "subgen", **sizes, "normaliser": normaliser} for normaliser in ("clusters", "values")]
    *estimates, streaming = module("subgen").estimates([problem], [*drawn, {"method": "streaming", "keep": 32}])
    assert all(row["spread"] > 0.1 and row["layers"] == [3] for row in estimates)
    assert streaming["spread"] == 0 and streaming["error"] == pytest.approx(streaming["bias"])


def test_memory_is_that_of_a_16_bit_cache(module):
    """Of half of the tokens and their positions; of all rows in 8 bits and a scale, with codes of half of the
    dimensions in 2 bits, a scale and a codeword, and a mean of each page in 8 bits and its scale."""
    memory = module("memory")
    query, key, value = (
        torch.randn(2, heads, tokens, HEAD_DIM, dtype=torch.bfloat16)
        for heads, tokens in ((4, 3), (2, 1539), (2, 1539))
    )
    problem = memory.to_the_prefix(Problem(0, query, key, value, SoftmaxSpec(HEAD_DIM**-0.5), 2))
    artifact = coded.artifact(HEAD_DIM, 2)

    def held(**setting):
        return memory.resident([problem, problem], setting, artifact)

    assert held(method="full") == 1
    assert held(method="streaming", keep=0.5) == pytest.approx(0.5 * (1 + 4 / (4 * HEAD_DIM)), rel=0.01)
    token = 2 * (HEAD_DIM + 2) + HEAD_DIM / 2 * 2 / 8 + 2 + 1 + (HEAD_DIM + 2) / 64
    assert held(method="spectral", rows=8) == pytest.approx(token / (4 * HEAD_DIM), rel=0.01)


def test_all_coefficients_of_a_group_give_its_rows_back(module):
    """In 16 bits each, up to their rounding; the first coefficients alone do not."""
    torch.manual_seed(0)
    shared = module("shared_basis")
    rows = torch.randn(400, 12).double() @ torch.randn(12, 12).double() + 3
    metric = torch.randn(12, 12).double()
    basis = shared.fit(rows, torch.rand(400).double(), metric @ metric.mT)
    found = rows[:5].float()
    assert torch.allclose(basis.through(found, ((1, 16),)), found, rtol=0.02, atol=0.2)
    assert not torch.allclose(basis.through(found, ((1 / 2, 16),)), found, rtol=0.02, atol=0.2)


def test_codes_of_groups_err_less_with_more_memory(module, monkeypatch):
    """On a tiny model of three layers; of one layer there is nothing to have in common."""
    errors = module("group_errors")
    monkeypatch.setattr(errors, "SIZES", (1, 3))
    monkeypatch.setattr(errors, "MEMORIES", (0.6, 0.3))
    made = build("llama")
    ids = torch.randint(3, 96, (4, 32), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    whole = torch.ones(4, 32, dtype=torch.bool)
    artifact = calibrate(made, TokenBlocks(ids, whole, whole, {"id": "random"}), reservoir=64)
    torch.manual_seed(0)
    found = [
        Problem(layer, torch.randn(2, 4, 3, 16), *torch.randn(2, 2, 2, 20, 16), SoftmaxSpec(0.25), 2)
        for layer in range(3)
    ]
    rows = errors.group_errors(found, artifact, made)
    assert [(row["size"], row["way"]) for row in rows[::2]] == [
        (1, "layer by layer"),
        (3, "layer by layer"),
        (3, "one basis"),
    ]
    for more, less in zip(rows[::2], rows[1::2], strict=True):
        assert more["error"] < less["error"] and less["memory"] <= 0.3 < more["memory"] <= 0.6
    reads = [row["read"] / row["memory"] for row in rows[::2]]
    assert reads[0] == 1 and 1.5 < reads[1] < 2.5 and reads[2] == 3


def test_a_row_of_full_is_taken_from_the_same_prompts_only(module, tmp_path):
    """Whatever artifact the others were decoded with."""
    decoding = module("decoding")
    row = {"method": "full", "perplexity_ratio": 1.0, "scores": {}}
    settings = {"tokens_sha256": "a", "calibrated_on": "b", "dtype": "float32"}
    path = tmp_path / "m-methods.json"
    assert decoding._full_row(path, settings) == []
    path.write_text(json.dumps({"settings": settings, "results": [row, {**row, "method": "loki"}]}))
    assert decoding._full_row(path, {**settings, "calibrated_on": "c"}) == [row]
    assert decoding._full_row(path, {**settings, "tokens_sha256": "c"}) == []


def test_what_lies_between_the_first_tokens_and_the_window(module):
    """Where keys are all alike, attention is even and so is the length of values by it; where one token gets all of it,
    that length is the token's."""
    subgen = module("subgen")
    key, value = torch.zeros(1, 1, 101, HEAD_DIM), torch.ones(1, 1, 101, HEAD_DIM)
    value[:, :, 30] *= 3
    query = torch.ones(1, 1, 1, HEAD_DIM)
    problem = Problem(3, query, key, value, SoftmaxSpec(HEAD_DIM**-0.5), 1)
    (row,) = subgen.outside([problem], 100)
    between = 101 - 4 - 20
    assert row["layer"] == 3 and row["mass"] == pytest.approx(between / 101) and row["values"] == pytest.approx(1)
    key[:, :, 30] = 100.0
    (row,) = subgen.outside([problem], 100)
    assert row["mass"] == pytest.approx(1) and row["values"] == pytest.approx(3 / ((between + 2) / between))
