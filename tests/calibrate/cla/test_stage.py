"""The stage `cla` of artifacts whose layers are related in known ways."""

import math
from dataclasses import replace
from itertools import combinations, pairwise

import pytest
import torch
from related_layers import DIM, HEADS, VALUE_DIM, artifact, layer, reading_copy, with_trained_weights

from kvcal.artifacts import KvcalError, load, save
from kvcal.calibrate.cla import share, share_report
from kvcal.calibrate.cla.cost import ReadingLayer
from kvcal.calibrate.cla.figures import share_figure
from kvcal.calibrate.cla.pairs import MEASURES


def pairs_of(report):
    return {(pair["storing"], pair["reading"]): pair for pair in report["pairs"]}


def test_identical_layers_are_shared_without_loss():
    first = layer(0)
    pair = pairs_of(share_report(share(artifact([first, reading_copy(first, 1)]))))[0, 1]
    assert (pair["key_r2"], pair["value_r2"]) == pytest.approx((1, 1)) and pair["cost_as_is"] == 0
    assert pair["key_r2_unaligned"] == pair["value_r2_unaligned"] == 1
    assert pair["cost_aligned"] == pytest.approx(0, abs=1e-4) and pair["shared"]


def test_what_a_linear_map_undoes_costs_nothing_when_aligned():
    first = layer(0)
    pair = pairs_of(share_report(share(artifact([first, reading_copy(first, 1, mixed=True)]))))[0, 1]
    assert pair["cost_as_is"] > 0.3 and pair["cost_aligned"] == pytest.approx(0, abs=1e-4)


def test_unrelated_layers_have_no_likeness():
    pair = pairs_of(share_report(share(artifact([layer(0), layer(1)]))))[0, 1]
    assert pair["key_r2"] < 0.1 and pair["value_r2"] < 0.1 and pair["cost_aligned"] > 0.5


def test_the_cost_is_that_of_the_reading_layer():
    first, second = layer(0), layer(1)
    found = artifact([first, second])
    reader = ReadingLayer(
        second["query_post"], second["key_post"], second["value"], found.stages["reservoir"].tensors["position"], 0.4
    )
    pair = pairs_of(share_report(share(found)))[0, 1]
    assert pair["cost_as_is"] == reader.error(first["key_post"], first["value"])


def mixed_within_heads(of, seed):
    """What a layer's own queries and outputs can undo, where nothing is rotated."""
    made = reading_copy(of, seed)
    for name in ("key_post", "value"):
        heads, _, dim = of[name].shape
        made[name] = of[name] @ torch.randn(heads, dim, dim, generator=torch.Generator().manual_seed(seed))
    return made


def test_auto_shares_the_layers_that_are_alike():
    a, b = layer(0), layer(1)
    layers = [layer(7), a, reading_copy(a, 8), mixed_within_heads(a, 9), b, reading_copy(b, 10)]
    report = share_report(share(artifact(layers), pattern="auto"))
    assert report["settings"]["groups"] == "0,1-3,4-5" and report["settings"]["stored_layers"] == 3
    assert report["predicted_loss"] == pytest.approx(0, abs=1e-6)


def test_auto_predicts_no_more_loss_than_any_pattern():
    found = artifact([layer(seed) for seed in range(5)])
    for stored in (2, 3, 4, 5):
        best = share_report(share(found, pattern="auto", stored_layers=stored))
        assert len(best["groups"]) == stored
        for pattern in ("dense-front", "dense-back"):
            other = share_report(share(found, pattern=pattern, stored_layers=stored))
            assert best["predicted_loss"] <= other["predicted_loss"] + 1e-12
    assert best["predicted_loss"] == 0


def of_kinds(layers, kinds):
    """Layers of other kinds never share."""
    found = artifact(layers)
    return replace(
        found, layers=tuple(replace(own, pre_rotary=kind) for own, kind in zip(found.layers, kinds, strict=True))
    )


@pytest.mark.parametrize("kinds", [["none"] * 7, ["none"] * 6 + ["unrotate"], ["replay", *["none"] * 6]])
def test_auto_is_the_best_of_all_groupings(kinds):
    """Five layers are one and the same, so that the best groups are long ones."""
    alike = layer(0, 40)
    found = of_kinds([layer(1, 40), *(reading_copy(alike, seed) for seed in range(2, 7)), layer(7, 40)], kinds)
    every = share(found, pattern="auto", stored_layers=len(set(kinds)))  # measures all pairs
    costs = every.stages["cla"].settings["group_costs"]
    for stored in range(len(set(kinds)), 8):
        report = share_report(share(found, pattern="auto", stored_layers=stored))
        measured = report["settings"]["group_costs"]
        groupings = [
            tuple(tuple(range(*ends)) for ends in pairwise((0, *cuts, 7)))
            for cuts in combinations(range(1, 7), stored - 1)
        ]
        names = [[f"{of[0]}-{of[-1]}" for of in groups if len(of) > 1] for groups in groupings]
        least = min(sum(costs[name] for name in each) for each in names if measured.keys() >= set(each))
        assert report["predicted_loss"] == pytest.approx(least, abs=1e-12) and len(report["groups"]) == stored


@pytest.mark.parametrize(("stored", "measured"), [(1, 12), (2, 6), (3, 4), (6, 4), (11, 4)])
def test_auto_measures_groups_of_at_most_four_unless_fewer_are_stored(stored, measured):
    report = share_report(
        share(artifact([layer(seed, 32) for seed in range(12)]), pattern="auto", stored_layers=stored)
    )
    assert len(report["groups"]) == stored
    assert max(pair["reading"] - pair["storing"] for pair in report["pairs"]) == measured - 1


def test_groups_longer_than_four():
    """All that auto can need for one stored layer of six, and what a dense pattern needs, is measured."""
    found = artifact([layer(seed) for seed in range(6)])
    for settings in ({"pattern": "auto", "stored_layers": 1}, {"pattern": "0-5"}):
        report = share_report(share(found, **settings))
        assert report["groups"] == [[0, 1, 2, 3, 4, 5]]
        shared = [pair for pair in report["pairs"] if pair["shared"]]
        assert [(pair["storing"], pair["reading"]) for pair in shared] == [(0, reader) for reader in range(1, 6)]
        assert report["predicted_loss"] == report["settings"]["group_costs"]["0-5"] == shared[-1]["cost_as_group"]


def test_sliding_layers_stay_out():
    layers, windows = [layer(seed) for seed in range(4)], [None, 32, None, None]
    report = share_report(share(artifact(layers, windows)))
    assert report["groups"] == [[0], [2, 3]] and report["settings"]["stored_layers"] == 2
    assert {(pair["storing"], pair["reading"]) for pair in report["pairs"]} == {(0, 2), (0, 3), (2, 3)}
    assert share_report(share(artifact(layers, windows), pattern="0+2,3"))["groups"] == [[0, 2], [3]]
    token = HEADS * (DIM + VALUE_DIM) * 2
    assert report["bytes_per_token"] == {"before": 3 * token, "after": 2 * token}


def test_patterns_that_a_model_cannot_have_are_not_among_its_patterns():
    found = of_kinds([layer(seed, 40) for seed in range(5)], ["none", "none", "none", "none", "unrotate"])
    patterns = {
        (of["pattern"], of["group"]): of["groups"] for of in share_report(share(found, pattern="0-1,2,3,4"))["patterns"]
    }
    assert ("uniform", 2) not in patterns and ("uniform", 4) not in patterns  # 3-4, 1-4
    assert patterns["keep-ends", 3] == [[0], [1, 2, 3], [4]]


def test_saved_and_loaded(tmp_path):
    found = share(artifact([layer(0), layer(1), layer(2)]), pattern="0-1,2")
    loaded = load(save(found, tmp_path / "a").folder)
    assert share_report(loaded) == share_report(found)
    settings = dict(loaded.stages["cla"].settings)
    assert settings.pop("group_costs").keys() == {"0-1", "1-2", "0-2"}
    assert settings == {
        "groups": "0-1,2",
        "pattern": "list",
        "pool": "mean",
        "stored_layers": 2,
        "keys_aligned": "pre",
        "uptraining": None,
    }
    for name in MEASURES:
        measured = torch.stack([loaded.tensor("cla", index, name) for index in range(3)])
        assert torch.equal(measured.isnan(), ~torch.ones(3, 3, dtype=torch.bool).tril(-1))


def test_progress_counts_pairs_and_groups():
    seen = []
    share(artifact([layer(seed) for seed in range(3)]), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 6) for done in range(7)]


def test_patterns_have_the_loss_of_their_groups_where_those_were_measured():
    report = share_report(share(artifact([layer(seed) for seed in range(9)])))
    losses = {(of["pattern"], of["group"]): of["predicted_loss"] for of in report["patterns"]}
    costs = report["settings"]["group_costs"]
    assert losses["uniform", 2] == report["predicted_loss"]
    assert losses["uniform", 2] == pytest.approx(sum(costs[group] for group in ("1-2", "3-4", "5-6", "7-8")))
    assert losses["keep-ends", 3] == pytest.approx(costs["1-3"] + costs["4-6"])
    assert losses["dense-front", 4] is None  # one group of six
    found = share(artifact([layer(seed) for seed in range(3)]))
    stage = found.stages["cla"]
    of_before = {name: value for name, value in stage.settings.items() if name != "group_costs"}
    assert share_report(found.with_stage("cla", replace(stage, settings=of_before)))["predicted_loss"] is None


def test_figure_is_a_png_of_the_same_bytes():
    found = share(artifact([layer(seed) for seed in range(4)]))
    first, second = (share_figure(found, share_report(found)) for _ in range(2))
    assert first.startswith(b"\x89PNG\r\n\x1a\n") and first == second


def test_trained_weights_are_not_lost():
    trained = with_trained_weights(share(artifact([layer(0), layer(1)])))
    with pytest.raises(
        KvcalError, match=r"stage cla \(groups 0-1\) has fitted or trained weights: give --uptrain --continue"
    ):
        share(trained)
    assert not any(name.startswith("weights.") for name in share(trained, overwrite=True).stages["cla"].tensors)
    share(share(artifact([layer(0), layer(1)])))  # without weights there is nothing to lose


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pattern": "0-1"}, "layers 2, 3 are in none"),
        ({"pattern": "0-1,1-3"}, "layer 1 is in two groups"),
        ({"pattern": "0-1,2-7"}, "this model has layers 0 to 3"),
        ({"pattern": "0-1,x"}, "'x'"),
        ({"pattern": "0+2,1+3"}, "no neighbours"),
        ({"pattern": "0-1,2-3", "stored_layers": 2}, "leave --budget-layers out"),
        ({"pattern": "unform"}, "unknown pattern 'unform'"),
        ({"pattern": "auto", "stored_layers": 5}, "give 1 to 4"),
        ({"pattern": "auto", "group": 5}, "groups of 5 layers: this model has 4"),
        ({"stored_layers": 3}, "stores 2 of 4 layers, not 3"),
    ],
)
def test_refused_settings(settings, message):
    with pytest.raises(KvcalError, match=message):
        share(artifact([layer(seed) for seed in range(4)]), **settings)


def test_refused_models():
    with pytest.raises(KvcalError, match="1 full-attention layers: sharing needs at least 2"):
        share(artifact([layer(0)]))
    with pytest.raises(KvcalError, match="1 full-attention layers and 1 with sliding attention, which never share"):
        share(artifact([layer(0), layer(1)], [None, 16]))
    with pytest.raises(KvcalError, match="sliding and full layers never share"):
        share(artifact([layer(0), layer(1), layer(2)], [None, 16, None]), pattern="0-1,2")
    with pytest.raises(KvcalError, match="a reservoir of 20 tokens"):
        share(artifact([layer(0, tokens=20), layer(1, tokens=20)]))


def test_layers_of_other_shapes_are_not_measured_and_not_shared():
    wide = layer(2)
    wide["key_post"], wide["query_post"] = (torch.cat((wide[name],) * 2, -1) for name in ("key_post", "query_post"))
    found = artifact([layer(0), layer(1), wide])
    report = share_report(share(found, pattern="auto"))
    assert report["groups"] == [[0, 1], [2]] and set(pairs_of(report)) == {(0, 1)}
    with pytest.raises(KvcalError, match="layers 1 and 2 differ"):
        share(found, pattern="0,1-2")
    with pytest.raises(KvcalError, match="no grouping into 1 stored layers"):
        share(found, pattern="auto", stored_layers=1)


def test_hardly_more_tokens_than_dimensions():
    """16 tokens to fit 12 dimensions on: still numbers, and noise is not fitted perfectly."""
    report = share_report(share(artifact([layer(0, tokens=32), layer(1, tokens=32)])))
    assert all(math.isfinite(pair[name]) for pair in report["pairs"] for name in MEASURES)
    assert report["pairs"][0]["key_r2"] < 0.5
