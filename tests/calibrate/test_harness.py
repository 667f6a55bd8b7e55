"""lm-eval through a compressed cache: `full` is plain HFLM, `loki` with all tokens too, with few it is not."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch

from kvcal.calibrate import calibrate, load_model, make_blocks, open_data, save
from kvcal.calibrate.builtin.recall import dictionary, fact, question, random_code
from kvcal.runtime import METHODS, KvcalError

EPISODES = 4
TASK = """
task: recall
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: ["."]
  max_gen_toks: 8
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
filter_list:
  - name: stripped
    filter:
      - function: remove_whitespace
      - function: take_first
"""


@pytest.fixture(scope="module")
def demo() -> Any:
    return load_model("demo", device="cpu")


@pytest.fixture(scope="module")
def artifact(demo: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = open_data("stdlib")
    blocks = make_blocks(data, demo.tokenizer, num_tokens=2048, seq_len=512, source=data.source)
    folder = tmp_path_factory.mktemp("harness") / "demo"
    save(calibrate(demo.model, blocks, model_id="demo"), folder)
    return folder


@pytest.fixture(scope="module")
def texts() -> list[tuple[str, str]]:
    """(text with a fact in it and a question at its end, answer)."""
    rng = random.Random(0)
    documents = [document for document, _ in zip(open_data("stdlib", "heldout"), range(20), strict=False)]
    words = dictionary(documents)[1]
    found = []
    # Of different lengths, so that batches of prompts are padded.
    for number in range(EPISODES):
        word, code = rng.choice(words), random_code(rng)
        filler = documents[number][: 400 + 150 * number]
        found.append((filler[:200] + fact(word, code) + filler[200:] + question(word), code))
    return found


@pytest.fixture(scope="module")
def task(texts: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    rows = [json.dumps({"text": text, "answer": answer}) for text, answer in texts]
    (folder / "recall.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "recall.yaml").write_text(TASK.format(file=folder / "recall.jsonl"))
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets
    from huggingface_hub import constants

    # Environment variables are read when these are imported.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def compressed(demo: Any, artifact: Path | None = None, **settings: Any) -> Any:
    from kvcal.calibrate.harness import CompressedLM

    return CompressedLM(demo, artifact, **settings)


def plain(demo: Any, **settings: Any) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(demo.model, tokenizer=demo.tokenizer, **settings)


def generated(model: Any, folder: Path, **options: Any) -> tuple[list[str], float]:
    """The raw text of each episode, and the task's score."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model, tasks=["recall"], task_manager=manager, bootstrap_iters=0, verbosity="ERROR", **options
    )
    assert found is not None
    samples = sorted(found["samples"]["recall"], key=lambda sample: sample["doc_id"])
    return [sample["resps"][0][0] for sample in samples], found["results"]["recall"]["exact_match,stripped"]


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=args, idx=0) for args in arguments]


def one_pass(demo: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Log-likelihood from one plain forward call, and whether it is what greedy decoding gives."""
    with torch.no_grad():
        logits = demo.model(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1]
    target = torch.tensor(continuation)
    score = logits.double().log_softmax(-1).gather(1, target[:, None]).sum()
    return float(score), bool((logits.argmax(-1) == target).all())


@pytest.mark.parametrize("batch_size", [1, 3])
def test_generation_with_the_full_cache_is_plain_generation(demo, task, batch_size):
    answers, score = generated(plain(demo, batch_size=batch_size), task)
    assert score > 0, "a model that never answers would compare nothing"
    assert generated(compressed(demo, method="full", batch_size=batch_size), task) == (answers, score)


def test_generation_with_all_tokens_kept_is_plain_generation(demo, artifact, task):
    expected = generated(plain(demo), task)
    assert generated(compressed(demo, artifact, method="loki", rank=0.25, keep=1.0), task) == expected


def test_generation_with_few_tokens_kept_is_another(demo, artifact, task):
    expected = generated(plain(demo), task)
    assert generated(compressed(demo, artifact, method="loki", rank=1, keep=1), task) != expected


def test_the_model_goes_by_its_name_and_arguments(demo, artifact, task):
    import kvcal.calibrate.harness  # noqa: F401 (registers it)

    expected = generated(plain(demo), task)
    arguments = f"pretrained=demo,artifact={artifact},method=loki,rank=0.25,keep=1.0"
    assert generated("kvcal", task, model_args=arguments, device="cpu", batch_size=2) == expected


def test_the_harness_default_device_is_no_obstacle(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert compressed("demo", method="full", device="cuda:0").device.type == "cpu"
    with pytest.raises(KvcalError, match="cuda:1"):
        compressed("demo", method="full", device="cuda:1")


@pytest.mark.parametrize("settings", [{"method": "full"}, {"method": "loki", "rank": 0.25, "keep": 1.0}], ids=str)
@pytest.mark.parametrize("batch_size", [1, 8])
def test_log_likelihood_with_all_tokens_is_that_of_one_pass(demo, artifact, texts, settings, batch_size):
    model = compressed(demo, artifact, batch_size=batch_size, **settings)
    # Right and wrong, of one token and of several: a multiple choice.
    asked = [(text, f" {choice}") for text, answer in texts for choice in (answer, "00000", "the", "7")]
    expected = [one_pass(demo, *model._encode_pair(*pair)) for pair in asked]
    assert any(hit for _, hit in expected) and not all(hit for _, hit in expected)
    found = model.loglikelihood(requests("loglikelihood", *asked), disable_tqdm=True)
    assert [hit for _, hit in found] == [hit for _, hit in expected]
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-4)


def test_rolling_log_likelihood_with_all_tokens_is_that_of_one_pass(demo, artifact, texts):
    model = compressed(demo, artifact, method="loki", rank=0.25, keep=1.0, batch_size=4, max_length=100)
    text = texts[0][0]
    ids = model.tok_encode(text)
    # Windows of 100 predicted tokens; the last reaches back to be as long.
    expected, start = 0.0, 0
    for stop in range(100, len(ids) + 100, 100):
        stop = min(stop, len(ids))
        first = max(0, stop - 100)
        before = [model.prefix_token_id, *ids][first : first + 1]
        context = before + ids[first:start]
        expected += one_pass(demo, context, ids[start:stop])[0]
        start = stop
    (found,) = model.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)), disable_tqdm=True)
    assert found == pytest.approx(expected, abs=1e-3)


def test_log_likelihood_with_few_tokens_is_another(demo, artifact, texts):
    """Also of a single token: no part of what is scored may come from the dense prefill."""
    model = compressed(demo, artifact, method="loki", rank=1, keep=1)
    for choice in (" 7", " 12345"):
        pair = (texts[0][0], choice)
        ((found, _),) = model.loglikelihood(requests("loglikelihood", pair), disable_tqdm=True)
        assert abs(found - one_pass(demo, *model._encode_pair(*pair))[0]) > 0.01


def test_too_long_a_row_loses_the_beginning_of_its_context(demo, artifact, texts):
    model = compressed(demo, artifact, method="full", max_length=64)
    context, continuation = model._encode_pair(texts[0][0], " 12345")
    expected = one_pass(demo, context[len(context) + len(continuation) - 65 :], continuation)[0]
    ((found, _),) = model.loglikelihood(requests("loglikelihood", (texts[0][0], " 12345")), disable_tqdm=True)
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("asked", [["--help"], ["run", "-h"]], ids=" ".join)
def test_help_has_lm_evals_arguments_and_ours(monkeypatch, capsys, asked):
    from kvcal.calibrate import harness

    monkeypatch.setattr("sys.argv", ["harness", *asked])
    with pytest.raises(SystemExit) as ended:
        harness.main()
    out = capsys.readouterr().out
    assert ended.value.code == 0 and "usage: lm-eval" in out
    ours = out[out.index("--model kvcal:") :]
    assert max(map(len, ours.splitlines())) <= 120
    words = set(ours.replace("=", " ").replace(",", " ").split())
    assert {"pretrained", "artifact", "method", "dtype", "max_length", "dense_layers", *METHODS} <= words
    assert {field.name for method in METHODS.values() for field in dataclasses.fields(method)} <= words


def test_batches_have_equal_contexts_and_every_row_once():
    from kvcal.calibrate.harness import equal_contexts

    pairs = [([0] * (1 + row % 3), [row]) for row in range(20)]
    batches = equal_contexts(pairs, 4)
    assert sorted(row for batch in batches for row in batch) == list(range(20))
    assert all(len({len(pairs[row][0]) for row in batch}) == 1 and len(batch) <= 4 for batch in batches)


@pytest.mark.parametrize(
    "settings", [{"method": "lokki"}, {"method": "loki", "keeep": 0.5}, {"method": "loki", "keep": -1.0}], ids=str
)
def test_what_does_not_fit_is_said_before_anything_runs(demo, artifact, settings):
    with pytest.raises(KvcalError):
        compressed(demo, artifact, **settings)
