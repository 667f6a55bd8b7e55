"""`calibrate evaluate` as a user runs it, on a tiny model folder and own text."""

import json
import random
import re

import pytest
from cli_runs import refused, run

from kvcal.calibrate import load_model

QUICK = ("--prefix", 64, "--continuation", 8, "--windows", 2, "--tasks", "perplexity", "--batch-size", 2)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    rng = random.Random(0)
    words = [f"{a}{b}{c}{d}" for a in "bdfg" for b in "aei" for c in "lmn" for d in "ou"]
    path = tmp_path_factory.mktemp("text") / "notes.txt"
    path.write_text("\n".join(" ".join(rng.choices(words, k=9)) + "." for _ in range(200)))
    return path


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, tiny_model_folder, text):
    folder = tmp_path_factory.mktemp("artifacts") / "tiny"
    options = ("--num-tokens", 1024, "--seq-len", 64, "--reservoir", 400)
    run("pca", "--model", tiny_model_folder, "--data", text, "--output", folder, *options)
    return folder


def test_json_is_the_documented_shape_and_the_file_holds_the_same(artifact, text, tmp_path):
    """Without --model: the artifact names it."""
    options = ("--method", "loki,streaming,h2o", "--rank", "4,variance:0.8", "--keep", ".5,16", "--set", "basis=score")
    found = json.loads(
        run("evaluate", artifact, "--data", text, *QUICK, *options, "--output", tmp_path / "r.json", "--json").stdout
    )
    assert found == json.loads((tmp_path / "r.json").read_text())
    settings, rows = found["settings"], found["results"]
    assert (settings["prefix"], settings["continuation"], settings["windows"]) == (64, 8, 2)
    assert settings["tasks"] == ["perplexity"] and settings["data"]["id"] == str(text)
    assert {"model", "weights_sha256", "artifact", "tokens_sha256", "dtype", "device", "versions"} <= set(settings)
    assert [(row["method"], row.get("rank"), row.get("keep")) for row in rows] == [
        ("full", None, None),
        *(("loki", rank, keep) for rank in (4, "variance:0.8") for keep in (0.5, 16)),
        *((method, None, keep) for method in ("streaming", "h2o") for keep in (0.5, 16)),
    ]
    for row in rows:
        assert row["perplexity_ratio"] == pytest.approx(row["perplexity"] / rows[0]["perplexity"])
        assert len(row["attention_error"]) == len(row["attention_mass"]) == 2
        assert all(row[name] > 0 for name in ("bytes_per_step", "resident_bytes", "ms_per_step"))


def test_table_and_figure(artifact, text, tmp_path):
    options = ("--prefix", 64, "--continuation", 8, "--windows", 2, "--tasks", "perplexity,passkey", "--episodes", 2)
    files = ("--plot", tmp_path / "p.png", "--output", tmp_path / "r.json", "--question", "prefilled")
    found = run("evaluate", artifact, "--data", text, *options, *files)
    lines, out = found.stderr.splitlines(), found.stdout
    assert lines[0] == (
        "data notes.txt: the artifact was calibrated on it, so methods may look better than they are: give other text"
    )
    assert re.fullmatch(r"about \d+ (s|min): 2 settings, 2 tasks, 2 batches", lines[1])
    # A model of random weights answers nothing.
    low = "full itself scores below 0.9: passkey@64 0.00: read scores relative to full's"
    assert "questions prefilled" in out and low in out.splitlines() and low not in found.stderr
    assert out.splitlines()[-2] == "no answer of full's counts: passkey@64: methods cannot be compared"
    assert json.loads((tmp_path / "r.json").read_text())["settings"]["question"] == "prefilled"
    said = [json.loads(line) for line in (tmp_path / "r.predictions.jsonl").read_text().splitlines()]
    assert [(line["setting"]["method"], line["task"], line["index"]) for line in said] == [
        (method, "passkey@64", index) for method in ("full", "loki") for index in (0, 1)
    ]
    assert low in run("evaluate", artifact, "--data", text, *options, *files, "--json").stderr.splitlines()
    decoded = ("evaluate", artifact, "--data", text, *options, "--output", tmp_path / "r.json")
    assert "question prefilled there, decoded asked for" in refused(*decoded)
    assert "passkey" in out and "@64" in out and "rank .25 keep .25" in out and "(100 %)" in out
    assert max(map(len, out.splitlines())) <= 120
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_contexts_beyond_the_calibrated_blocks_are_said(artifact, text):
    """The basis of loki and the codes of spectral were fitted to other positions; sparq's channels to none."""
    grid = ("--method", "loki,sparq,spectral")
    options = ("--prefix", 65, "--continuation", 4, "--windows", 1, "--tasks", "perplexity")
    line = "contexts of 65 tokens, and blocks of 64 in calibration: loki, spectral may do worse than calibrated with"
    found = run("evaluate", artifact, "--data", text, *options, *grid).stderr
    assert f"{line} --seq-len 65" in found.splitlines()
    for other in (("--method", "sparq"), ("--method", "loki", "--set", "stage=pre"), ("--prefix", 64)):
        assert "in calibration" not in run("evaluate", artifact, "--data", text, *options, *other).stderr


def test_a_second_run_measures_nothing_again(artifact, text, tmp_path):
    arguments = ("evaluate", artifact, "--data", text, *QUICK, "--output", tmp_path / "r.json")
    run(*arguments)
    before = (tmp_path / "r.json").read_bytes()
    again = run(*arguments)
    assert "2 settings are there already" in again.stderr and (tmp_path / "r.json").read_bytes() == before
    run(*arguments, "--method", "loki,streaming")
    rows = json.loads((tmp_path / "r.json").read_text())["results"]
    assert rows[:2] == json.loads(before)["results"] and [row["method"] for row in rows[2:]] == ["streaming"]


def test_results_of_other_settings_are_refused_and_kept(artifact, text, tmp_path):
    arguments = ("evaluate", artifact, "--data", text, *QUICK, "--output", tmp_path / "r.json")
    run(*arguments)
    before = (tmp_path / "r.json").read_bytes()
    assert "holds results of other settings (seed 0 there, 1 asked" in refused(*arguments, "--seed", 1)
    assert (tmp_path / "r.json").read_bytes() == before


def test_rows_of_a_peer_stand_beside_ours(artifact, text, tmp_path):
    run("evaluate", artifact, "--data", text, *QUICK, "--output", tmp_path / "r.json")
    peer = json.loads((tmp_path / "r.json").read_text())
    peer["results"] = [{"method": "SnapKV", "source": "kvpress 0.5.5", "perplexity": 400.0, "bytes_per_step": 900}]
    (tmp_path / "peer.json").write_text(json.dumps(peer))
    arguments = ("evaluate", artifact, "--data", text, *QUICK, "--compare", tmp_path / "peer.json")
    found = json.loads(run(*arguments, "--json").stdout)["results"]
    assert [row["method"] for row in found] == ["full", "loki", "SnapKV"]
    assert "kvpress" in run(*arguments, "--plot", tmp_path / "p.png").stdout
    peer["settings"]["tokens_sha256"] = "0" * 64
    (tmp_path / "peer.json").write_text(json.dumps(peer))
    assert "other tokens" in refused(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "lokki"), "no method 'lokki'"),
        (("--method", ""), "choose among"),
        (("--rank", "9"), "rank 9"),
        (("--rank", "0"), "rank 0"),
        (("--rank", "variance:2"), "variance"),
        (("--rank", "x"), "rank"),
        (("--keep", "0"), "keep 0"),
        (("--keep", "-0.5"), "keep -0.5"),
        (("--keep", "nan"), "keep nan"),
        (("--keep", ".5,,.25"), "empty entry"),
        (("--method", "streaming", "--rank", "4"), "no parameter 'rank' in streaming"),
        (("--set", "bassis=pca"), "no parameter 'bassis'"),
        (("--set", "basis=svd"), "svd"),
        (("--set", "basis"), "a name and a value"),
        (("--set", "keep=.5", "--keep", ".5"), "give one of them"),
        (("--set", "dense_layers=5"), "dense_layers 5"),
        (("--tasks", "perplexity,passkeys"), "no task 'passkeys'"),
        (("--tasks", "passkey", "--lengths", "64,x"), "--lengths"),
        (("--tasks", "passkey", "--lengths", "16"), "too short for 1 facts"),
        (("--tasks", "passkey", "--lengths", "120"), "passkey@120"),
        (("--prefix", 124), "exceed this model's context of 128"),
        (("--windows", 5000), "windows of 72 tokens (5000 asked for)"),
        (("--prefix", 1), "--prefix"),
        (("--output", "no/such/folder/r.json"), "is not a folder"),
        (("--plot", "r.pdf"), ".png"),
        (("--compare", "no/such.json"), "such.json"),
        (("--split", "nowhere"), "split"),
        (("--device", "tpu"), "tpu"),
    ],
)
def test_what_cannot_work_is_one_line(artifact, text, options, message):
    assert message in refused("evaluate", artifact, "--data", text, *QUICK, *options)


def test_data_and_an_artifact_are_needed(artifact, text, tmp_path):
    assert "--data" in refused("evaluate", artifact)
    assert "does not exist" in refused("evaluate", tmp_path / "nowhere", "--data", text)


def test_a_model_that_the_artifact_is_not_of(artifact, text, tmp_path, tiny_model_folder):
    import shutil

    import torch
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "other"
    shutil.copytree(tiny_model_folder, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight += 1
    model.save_pretrained(folder)
    assert "other weights" in refused("evaluate", artifact, "--model", folder, "--data", text, *QUICK)


def test_a_users_prompts_are_answered_as_generate_answers_them(artifact, tiny_model_folder, tmp_path):
    """Of unequal lengths in one batch, without --data."""
    asked = [("bemo bilu dalo", "what is fano?"), ("gamu " * 20, "and bilo?"), ("dimo dinu bemo", "fanu bamo gilu?")]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"context": c, "question": q, "answer": "none"}) + "\n" for c, q in asked))
    options = ("--method", "loki", "--keep", "1.0", "--max-new-tokens", 6, "--output", tmp_path / "r.json", "--json")
    found = json.loads(run("evaluate", artifact, "--prompts", path, *options).stdout)
    assert [row["scores"] for row in found["results"]] == [{"mine": 0.0}] * 2
    told = [json.loads(line) for line in (tmp_path / "r.predictions.jsonl").read_text().splitlines()]
    loaded = load_model(str(tiny_model_folder))
    for line in told:
        context, question = asked[line["index"]]
        ids = loaded.tokenizer(f"{context}\n\n{question}", return_tensors="pt")
        out = loaded.model.generate(**ids, max_new_tokens=6, do_sample=False)
        text = loaded.tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert line["prediction"] == text and line["answers"] == ["none"], line
    assert all(line["prediction"] for line in told)
    assert [(line["setting"]["method"], line["index"]) for line in told] == [
        (m, i) for m in ("full", "loki") for i in range(3)
    ]
