"""What a manifest says of text, as a specification that opens the same text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from samples import artifact, codebook

from kvcal.artifacts import Stage
from kvcal.calibrate import data as data_module
from kvcal.calibrate.cla.uptraining import LOSS
from kvcal.calibrate.data import open_data
from kvcal.calibrate.recipe_of import data_spec, recipe_of
from kvcal.runtime import hub

CARD = """---
configs:
- config_name: plain
  data_files:
  - split: train
    path: a.txt
  - split: test
    path: b.txt
- config_name: other
  data_files: b.txt
---
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("set/a.txt", "set/b.txt", "plain.txt", "many/1.md", "many/2.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    (tmp_path / "set" / "README.md").write_text(CARD)
    return tmp_path


@pytest.mark.parametrize(
    "spec", ["stdlib", "stdlib:heldout", "plain.txt", "many", "many/*.md", "set:plain", "set:plain:test", "set:other"]
)
def test_text_of_this_machine(here: Path, spec: str) -> None:
    opened = open_data(spec)
    again = open_data(data_spec(opened.source, []))
    assert again.source["split" if "split" in opened.source else "id"] == opened.source.get("split", spec)
    assert next(iter(again)) == next(iter(opened)) and again.source.get("files") == opened.source.get("files")


@pytest.mark.parametrize("spec", ["org/set:plain", "org/set:plain:test", "org/set:other:train"])
def test_text_of_the_hub_at_its_commit(here: Path, monkeypatch: pytest.MonkeyPatch, spec: str) -> None:
    asked = []

    def locate(repo_id: str, kind: str, revision: str | None, lacking: object) -> hub.Located:
        asked.append((repo_id, revision))
        return hub.Located(here / "set", "c" * 40)

    monkeypatch.setattr(data_module.hub, "locate", locate)
    opened = open_data(spec)
    again = open_data(data_spec(opened.source, []))
    assert again.source == opened.source and list(again) == list(opened)
    assert asked == [("org/set", None), ("org/set", "c" * 40)]


def test_several_texts_and_their_column(here: Path) -> None:
    (here / "rows.csv").write_text("id,body\n1,text\n")
    opened = open_data(["plain.txt", "set:plain:test", "rows.csv"], text_column="body", seed=3)
    assert data_spec(opened.source, []) == ["plain.txt", "set:plain:test", "rows.csv"]
    made = artifact()
    made = replace(made, data={**made.data, "source": opened.source}, settings={**made.settings, "seed": 3})
    found = recipe_of(made, {"seed"})
    assert yaml.safe_load(found)["pca"]["text_column"] == "body" and "another seed" not in found
    assert "another seed" in recipe_of(replace(made, settings={**made.settings, "seed": 4}), {"seed"})


def test_what_the_manifest_cannot_tell_is_said() -> None:
    made = artifact()
    found = recipe_of(made, {"seed"})
    assert "# The text was given in Python" in found and "# The manifest does not tell whether" in found
    assert yaml.safe_load(found)["pca"] == {"num_tokens": 16, "seq_len": 16, "seed": 0}
    unheard_of = recipe_of(replace(made, settings={**made.settings, "shards": 4}), {"seed"})
    assert "# Of the pass the manifest also says shards 4" in unheard_of


def test_a_codebook_is_a_stage_of_its_own_where_it_is_not_the_one_that_the_pass_makes() -> None:
    made = artifact(tokens=16)
    other = codebook(made, tokens=16)
    usual = Stage(other.tensors, {"codewords": 2, "iterations": 20, "seed": 0})
    smaller = Stage(other.tensors, {"codewords": 1, "iterations": 5, "seed": 3})
    assert "stages" not in yaml.safe_load(recipe_of(made.with_stage("codebook", usual), ()))
    found = yaml.safe_load(recipe_of(made.with_stage("codebook", smaller), ()))
    assert found["stages"] == [{"cluster": {"metric": "joint", "clusters": 1, "iterations": 5, "seed": 3}}]
    alone = replace(made, stages={name: stage for name, stage in made.stages.items() if name != "reservoir"})
    assert "stages" in yaml.safe_load(recipe_of(alone.with_stage("codebook", usual), ())), "it cannot be told then"


def test_a_model_of_the_hub_at_its_commit() -> None:
    made = artifact()
    pinned = replace(made, model=replace(made.model, revision="c" * 40))
    assert yaml.safe_load(recipe_of(pinned, ()))["model"] == f"org/model@{'c' * 40}"


@pytest.mark.parametrize(("loss", "distill"), [({}, 0.75), ({"loss": LOSS}, 3.0)])
def test_a_training_of_before_has_its_loss_up_to_a_factor(loss: dict[str, str], distill: float) -> None:
    """Cross entropy + 3 KL is four times a quarter of the first and three quarters of the second."""
    training = {"steps": 2, "distill": 3.0, **loss}
    cla = Stage({}, {"pattern": "list", "groups": "0-1", "pool": "mean", "uptraining": training})
    text = recipe_of(replace(artifact(), stages={**artifact().stages, "cla": cla}), ())
    ((share,),) = (stage.values() for stage in yaml.safe_load(text)["stages"] if "share" in stage)
    assert share["distill"] == distill and ("up to a factor" in text) == (not loss)
