"""Whole runs from a recipe, and recipes from artifacts: what they make is the same, byte by byte."""

import json
import random
import re
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from kvcal.artifacts import load
from kvcal.calibrate.cli import cli
from kvcal.calibrate.cli.group import COMMANDS
from kvcal.calibrate.cli.recipe_arguments import STAGES, arguments
from kvcal.calibrate.recipe import read_recipe

SMALL = {"num_tokens": 500, "seq_len": 64, "reservoir": 100}
DOCS = Path(__file__).parents[3] / "docs" / "recipes.md"


def run(*given, code=0):
    result = CliRunner().invoke(cli, [str(argument) for argument in given])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def refused(path):
    result = run("run", "--recipe", path, code=2)
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"Error: {path}:") and result.stdout == ""
    return line.removeprefix(f"Error: {path}:")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "notes.txt"
    path.write_text("\n".join(" ".join(rng.choices(["key", "value", "query", "head"], k=9)) for _ in range(60)))
    return path


@pytest.fixture
def recipe(tmp_path, tiny_model_folder, text):
    """Writes a recipe of the tiny model: `recipe({"cluster": {…}}, seed=7)`."""

    def write(*stages, name="recipe.yaml", **pca):
        body = {"recipe": 1, "model": str(tiny_model_folder), "data": str(text), "output": str(tmp_path / "made")}
        path = tmp_path / name
        path.write_text(yaml.safe_dump({**body, "pca": {**SMALL, **pca}, "stages": list(stages)}, sort_keys=False))
        return path

    return write


def tensor_files(folder):
    found = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    assert found
    return found


def made_again(folder, tmp_path):
    """The artifact that the recipe of an artifact makes."""
    path = tmp_path / "again.yaml"
    run("recipe", folder, "-o", path)
    run("run", "--recipe", path, "--output", tmp_path / "again")
    return tmp_path / "again"


def test_run_does_what_the_commands_do(tmp_path, recipe, tiny_model_folder, text):
    run("run", "--recipe", recipe({"cluster": {"clusters": 5, "metric": "l2"}}, uncentred=True))
    options = ("--num-tokens", 500, "--seq-len", 64, "--reservoir", 100, "--uncentred")
    run("pca", "--model", tiny_model_folder, "--data", text, "--output", tmp_path / "by-hand", *options)
    run("cluster", tmp_path / "by-hand", "--clusters", 5, "--metric", "l2")
    assert load(tmp_path / "made").content_hash == load(tmp_path / "by-hand").content_hash


def test_the_recipe_of_an_artifact_of_one_short_block(tmp_path, tiny_model_folder):
    (tmp_path / "short.txt").write_text("x" * 50)
    run("pca", "--model", tiny_model_folder, "--data", tmp_path / "short.txt", "--output", tmp_path / "made")
    again = made_again(tmp_path / "made", tmp_path)
    assert load(again).content_hash == load(tmp_path / "made").content_hash


def test_a_recipe_its_artifact_the_recipe_of_that_and_the_same_artifact(tmp_path, recipe):
    sharing = {"share": {"pattern": "dense-front", "group": 2}}
    run("run", "--recipe", recipe({"cluster": {"tokens_per_cluster": 20, "seed": 3}}, sharing, seed=7))
    again = made_again(tmp_path / "made", tmp_path)
    assert tensor_files(again) == tensor_files(tmp_path / "made")
    assert load(again).content_hash == load(tmp_path / "made").content_hash


@pytest.mark.parametrize(
    "options",
    [
        ("--num-tokens", 475, "--seq-len", 32, "--dtype", "bfloat16", "--batch-size", 3, "--seed", 5, "--uncentred"),
        ("--num-tokens", 100000, "--seq-len", 100),
        ("--num-tokens", 65, "--seq-len", 64),
    ],
    ids=["other options and a padded block", "text that ends before", "a last block of BOS"],
)
def test_an_artifact_of_plain_commands_and_of_its_recipe(tmp_path, tiny_model_folder, text, options):
    run("pca", "--model", tiny_model_folder, "--data", text, "--output", tmp_path / "a", "--reservoir", 50, *options)
    run("cluster", tmp_path / "a", "--clusters", 3, "--iterations", 4)
    again = made_again(tmp_path / "a", tmp_path)
    assert tensor_files(again) == tensor_files(tmp_path / "a")
    assert load(again).data == load(tmp_path / "a").data


def test_several_files_and_a_column_come_back_from_the_recipe(tmp_path, tiny_model_folder, text):
    folder = tmp_path / "notes"
    folder.mkdir()
    for name in ("a.md", "b.md", "picture.png"):
        (folder / name).write_text(f"{name} " * 30)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"id": f"q{n}", "body": f"row {n} of many"}) + "\n" for n in range(40)))
    options = ("--text-column", "body", "--num-tokens", 10**5, "--seq-len", 32, "--seed", 5, "--reservoir", 50)
    done = run(
        *("pca", "--model", tiny_model_folder, "--data", folder, "--data", rows),
        *("--data", text, "--output", tmp_path / "a", *options),
    )
    assert f"data {folder}: 1 of its files not read, no text files" in done.stderr and "picture.png" in done.stderr
    found = load(tmp_path / "a").data
    counted = [each["tokens"] for each in found["source"]["sources"]]
    assert counted == [300, sum(len(f"row {n} of many") for n in range(40)), len(text.read_text())]
    assert found["tokens_counted"] == sum(counted) and found["source"]["sources"][0]["files"] == ["a.md", "b.md"]
    again = made_again(tmp_path / "a", tmp_path)
    assert tensor_files(again) == tensor_files(tmp_path / "a")
    assert load(again).content_hash == load(tmp_path / "a").content_hash


def test_uptraining_in_two_goes(tmp_path, recipe, text):
    first = {"uptrain": True, "data": str(text), "steps": 3, "batch_size": 2, "block_size": 16, "lr": 0.003}
    second = {"uptrain": True, "continue": True, "data": str(text), "steps": 2, "block_size": 16, "train": "all"}
    run("run", "--recipe", recipe({"share": first}, {"share": second}))
    again = made_again(tmp_path / "made", tmp_path)
    assert tensor_files(again) == tensor_files(tmp_path / "made")
    assert "earlier" in load(again).stages["cla"].settings["uptraining"]


def test_evaluation_and_json(tmp_path, recipe, text):
    settings = {"data": str(text), "prefix": 32, "continuation": 4, "windows": 1, "tasks": ["perplexity"]}
    grid = {"method": "loki", "keep": [0.25, 0.5], "rank": [0.5, 2], "set": {"basis": "pca"}}
    results = tmp_path / "results.json"
    stage = {"evaluate": {**settings, **grid, "output": str(results)}}
    found = json.loads(run("run", "--recipe", recipe("cluster", stage), "--json").stdout)
    assert [list(each) for each in found["stages"]] == [["pca"], ["cluster"], ["evaluate"]]
    assert found["stages"][0]["pca"]["data"]["seq_len"] == 64
    rows = found["stages"][2]["evaluate"]["results"]
    settings = {(row["method"], row.get("keep"), row.get("rank")) for row in rows}
    wanted = {("loki", keep, rank) for keep in (0.25, 0.5) for rank in (0.5, 2)}
    assert settings == {("full", None, None), *wanted}
    assert len(json.loads(results.read_text())["results"]) == 5


def test_repeated_and_resumed_it_stays_the_same(tmp_path, recipe):
    path = recipe("cluster")
    run("run", "--recipe", path)
    before = tensor_files(tmp_path / "made")
    assert "already calibrated" in run("run", "--recipe", path, "--resume").stderr
    assert tensor_files(tmp_path / "made") == before


def test_a_typing_error_in_the_last_stage_is_said_before_the_first_one_runs(tmp_path, recipe):
    assert "did you mean tokens_per_cluster?" in refused(recipe({"cluster": {"token_per_cluster": 3}}))
    assert not (tmp_path / "made").exists()


HEAD = "recipe: 1\nmodel: demo\ndata: stdlib\n"


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("", "is empty"),
        ("model: demo\n", "1: a recipe starts with the line `recipe: 1`"),
        ("recipe: 2\nmodel: demo\n", "1: a recipe starts with"),
        ("recipe: true\n", "1: a recipe starts with"),
        ("- recipe\n", "1: the recipe: expected lines of `name: value`"),
        ("recipe: 1\ndata: stdlib\n", "1: no model"),
        ("recipe: 1\nmodel: demo\n", "1: no data"),
        ("recipe: 1\nmodel: 7\ndata: stdlib\n", "2: model: expected text, not 7"),
        ("recipe: 1\nmodel: [demo]\ndata: stdlib\n", "2: model: expected text, not several values"),
        ("recipe: 1\nmodel:\ndata: stdlib\n", "2: model: expected text, not nothing"),
        (HEAD + "stage:\n- cluster\n", "4: the recipe: no 'stage' there: did you mean stages?"),
        (HEAD + "data: stdlib\n", "4: the recipe: data stands there twice"),
        (HEAD + "pca: 5\n", "4: pca: expected lines"),
        (HEAD + "pca:\n  seed: 1\n  num_token: 5\n", "6: pca: no 'num_token' there: did you mean num_tokens?"),
        (HEAD + "pca:\n  num_tokens: many\n", "5: pca.num_tokens: 'many' is not a number of tokens: give e.g. 8192"),
        (HEAD + "pca:\n  num_tokens: 1.5\n", "5: pca.num_tokens: expected a number of tokens, e.g. 8192 or 8k, not"),
        (HEAD + "pca:\n  num_tokens: 5q\n", "5: pca.num_tokens: '5q' is not a number of tokens"),
        (HEAD + "pca:\n  num_tokens: true\n", "5: pca.num_tokens: expected a number of tokens, e.g. 8192 or 8k, not T"),
        (HEAD + "pca:\n  num_tokens: 0\n", "5: pca.num_tokens: 0 tokens: give at least 1"),
        (HEAD + "pca:\n  seed: '5'\n", "5: pca.seed: expected a whole number, not '5'"),
        (HEAD + "pca: {force: true}\n", "4: pca: no 'force' there"),
        (HEAD + "pca:\n  seed:\n", "5: pca.seed: expected a whole number, not None"),
        (HEAD + "pca:\n  uncentred: 1\n", "5: pca.uncentred: expected true or false, not 1"),
        (HEAD + "pca:\n  model: other\n", "5: pca.model: stands outside of pca"),
        (HEAD + "pca:\n  resume: true\n", "5: pca: no 'resume' there"),
        (HEAD + "pca: {json: true}\n", "4: pca: no 'json' there"),
        (HEAD + "stages: cluster\n", "4: stages: expected a list"),
        (HEAD + "stages:\n- clutser\n", "5: stages: no 'clutser' there: did you mean cluster?"),
        (HEAD + "stages:\n- pca\n", "5: stages: no 'pca' there: there are cluster, xcla, share, plan, evaluate"),
        (HEAD + "stages:\n- cluster: {}\n  share: {}\n", "5: stages: one name in each item"),
        (HEAD + "stages:\n- cluster: {metric: cosin}\n", "5: cluster.metric: 'cosin' is not one of"),
        (HEAD + "stages:\n- cluster: {plot: a.pdf}\n", "5: cluster.plot: a.pdf: give a name that ends in .png"),
        (HEAD + "stages:\n- evaluate: {keep: .5}\n", "5: evaluate: no data"),
        (HEAD + "stages:\n- evaluate: {data: x, keep: {a: 1}}\n", "5: evaluate.keep: expected text, a number"),
        (HEAD + "stages:\n- evaluate: {data: x, set: 5}\n", "5: evaluate.set: expected text"),
        (HEAD + "expect: {text_sha256: abc}\n", "4: expect.text_sha256: is no sha256"),
        (HEAD + "expect: {tekst_sha256: abc}\n", "4: expect: no 'tekst_sha256' there: did you mean text_sha256?"),
        (HEAD + "1: 2\n", "4: the recipe: no '1' there"),
        (HEAD + "pca: {1: 2}\n", "4: pca: 1 is no plain text as a name"),
        ("recipe: [\n", ":2: is not valid YAML"),
        (HEAD + "pca: !!python/object/apply:os.system ['true']\n", "4: is not valid YAML"),
        (HEAD + "pca: &a {seed: 1}\nstages: [*a]\n", "5: aliases"),
        ("[" * 50000, "1: lists in lists"),
        ("#" * 70000, "larger than"),
        ("a: !!int ''\n", "is not valid YAML"),
        ("a: 2001-99-99\n", "is not valid YAML"),
        (b"\xff\xfe\x00", "is not valid YAML"),
        (b"a: \x00\n", "is not valid YAML"),
    ],
)  # fmt: skip
def test_mistakes_in_one_line_with_the_place(tmp_path, monkeypatch, recipe, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "r.yaml"
    path.write_bytes(recipe.encode() if isinstance(recipe, str) else recipe)
    assert message.lstrip(":") in refused(path)
    assert [found.name for found in tmp_path.iterdir()] == ["r.yaml"]


def test_no_such_recipe_and_a_recipe_in_the_way(tmp_path, recipe):
    assert "does not exist" in refused(tmp_path / "nowhere.yaml")
    run("run", "--recipe", recipe())
    (tmp_path / "mine.yaml").write_text("mine")
    assert "already exists" in run("recipe", tmp_path / "made", "-o", tmp_path / "mine.yaml", code=2).stderr
    assert (tmp_path / "mine.yaml").read_text() == "mine"
    assert yaml.safe_load(run("recipe", tmp_path / "made").stdout)["pca"]["num_tokens"] == 500


def test_moved_text_is_said_and_other_text_is_refused(tmp_path, recipe, text):
    run("run", "--recipe", recipe())
    printed = run("recipe", tmp_path / "made").stdout
    assert re.search(rf"^# The text was local: '{text}'", printed, re.MULTILINE)
    assert re.search("^# The model was a folder or file", printed, re.MULTILINE)
    (tmp_path / "notes.txt").write_text(text.read_text().replace("value", "other"))
    (tmp_path / "r.yaml").write_text(printed.replace(str(text), str(tmp_path / "notes.txt")))
    result = run("run", "--recipe", tmp_path / "r.yaml", "--output", tmp_path / "other", code=2)
    assert "calibrated on other text (or its tokens) than" in result.stderr


def test_the_example_in_the_documents_is_a_recipe(tmp_path):
    (example,) = re.findall(r"```yaml\n(.*?)```", DOCS.read_text(), re.DOTALL)
    (tmp_path / "example.yaml").write_text(example)
    found = read_recipe(tmp_path / "example.yaml", STAGES)
    group = cli.get_command
    for section in (found.pca, *found.stages):
        assert arguments(found, section, group(None, section.command))


def test_a_flag_that_has_two_forms_can_be_taken_back(tmp_path):
    said = {"data": "text", "prompts": ["a.jsonl", "b.jsonl"], "tasks": ["vt", "cwe"]}
    for value, flag in ((True, "--chat-template"), (False, "--no-chat-template")):
        body = {"recipe": 1, "model": "m", "data": "d", "stages": [{"evaluate": {**said, "chat_template": value}}]}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(body))
        found = read_recipe(tmp_path / "recipe.yaml", STAGES)
        given = arguments(found, found.stages[0], cli.get_command(None, "evaluate"))
        assert {flag, "--prompts=a.jsonl", "--prompts=b.jsonl", "--tasks=vt,cwe"} <= set(given)


def test_stages_are_commands():
    assert set(STAGES) <= set(COMMANDS)
