"""A user's own prompts: what is read of a row, the chat around it, and what is said of rows that cannot be asked."""

import gzip
import json
import os

import pytest

from kvcal.artifacts import KvcalError
from kvcal.calibrate.evaluation.prompts import make_prompts
from kvcal.calibrate.evaluation.tasks.prompts_file import make_prompt_tasks

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ROW = {"context": "Anna lives in Rome.", "question": "Where does Anna live?", "answer": "Rome"}


@pytest.fixture
def chatting(tiny_tokenizer):
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def written(tmp_path, *rows, name="mine.jsonl"):
    path = tmp_path / name
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def said(tokenizer, ids):
    from tokenizers.decoders import ByteLevel

    return ByteLevel().decode(tokenizer.convert_ids_to_tokens(list(ids)))


def texts(tokenizer, sample):
    return said(tokenizer, sample.context), said(tokenizer, sample.question)


def test_context_question_and_answer_without_a_template(tiny_tokenizer, tmp_path):
    rows = [ROW, {"context": "Two.\n", "question": "How many?", "answers": ["2", "two", "2"], "id": 7}]
    (task,), (source,) = make_prompt_tasks([written(tmp_path, *rows)], tiny_tokenizer)
    assert task.key == "mine" and task.length is None and task.scoring == "exact"
    assert texts(tiny_tokenizer, task.samples[0]) == ("<s>Anna lives in Rome.", "\n\nWhere does Anna live?")
    assert texts(tiny_tokenizer, task.samples[1]) == ("<s>Two.\n", "How many?")
    assert task.samples[1].answers == ("2", "two") and task.samples[1].label == f"{tmp_path}/mine.jsonl: row 2"
    assert task.new_tokens == len("Rome") + 32
    assert source["file"] == "mine.jsonl" and source["rows"] == 2 and not source["chat_template"]


@pytest.mark.parametrize(
    ("row", "messages", "context"),
    [
        (ROW, [("user", "Anna lives in Rome.\n\nWhere does Anna live?")], "<user>Anna lives in Rome."),
        (
            {"messages": [{"role": "system", "content": "Be brief."}], **ROW},
            [("system", "Be brief."), ("user", "Anna lives in Rome.\n\nWhere does Anna live?")],
            "<system>Be brief.</><user>Anna lives in Rome.",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "I live in Rome."},
                    {"role": "assistant", "content": "I see."},
                    {"role": "user", "content": "Where do I live?"},
                ],
                "answer": "Rome",
            },
            [("user", "I live in Rome."), ("assistant", "I see."), ("user", "Where do I live?")],
            "<user>I live in Rome.</><assistant>I see.</><user>",
        ),
        (
            {"messages": [{"from": "human", "value": "Where?"}], "context": "In Rome. ", "answer": "Rome"},
            [("user", "In Rome. Where?")],
            "<user>In Rome. ",
        ),
        (
            {"messages": [{"role": "user", "content": "I am Bo."}], "question": "Who am I?", "answer": "Bo"},
            [("user", "I am Bo."), ("user", "Who am I?")],
            "<user>I am Bo.</><user>",
        ),
    ],
    ids=["plain", "system", "chat", "context-first", "question-beside"],
)
def test_the_tokens_are_those_of_the_chat_template(chatting, tmp_path, row, messages, context):
    ((task,), (source,)) = make_prompt_tasks([written(tmp_path, row)], chatting)
    (sample,) = task.samples
    chat = [{"role": role, "content": content} for role, content in messages]
    whole = chatting.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert [*sample.context, *sample.question] == whole
    assert said(chatting, sample.context) == context and source["chat_template"]


def test_no_template_where_none_is_wanted(chatting, tiny_tokenizer, tmp_path):
    path = written(tmp_path, ROW)
    plain = make_prompt_tasks([path], tiny_tokenizer)[0]
    assert make_prompt_tasks([path], chatting, chat=False)[0] == plain != make_prompt_tasks([path], chatting)[0]


def test_files_as_others_read_them(tiny_tokenizer, tmp_path):
    """Compressed, with a byte order mark and Windows' line ends, or one list."""
    text = "\ufeff" + "\r\n".join(json.dumps(ROW) for _ in range(2)) + "\r\n\r\n"
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "b.json").write_text(json.dumps([ROW, ROW]))
    tasks, sources = make_prompt_tasks([tmp_path / "a.jsonl.gz", tmp_path / "b.json"], tiny_tokenizer)
    assert [task.key for task in tasks] == ["a", "b"] and sources[0]["sha256"] == sources[1]["sha256"]
    assert [sample.context for sample in tasks[0].samples] == [sample.context for sample in tasks[1].samples]


def test_they_are_evaluated_without_text_and_are_part_of_what_is_hashed(tiny_tokenizer, tmp_path):
    path = written(tmp_path, ROW)
    found = make_prompts((), tiny_tokenizer, tasks=[], prompt_files=[path], match="part", max_new_tokens=9)
    assert found.windows is None and [(t.key, t.scoring, t.new_tokens) for t in found.tasks] == [("mine", "part", 9)]
    assert [each["rows"] for each in found.source["prompts"]] == [1]
    other = written(tmp_path, {**ROW, "answer": "rome"})
    again = make_prompts((), tiny_tokenizer, tasks=[], prompt_files=[other], match="part", max_new_tokens=9)
    assert again.tokens_sha256 != found.tokens_sha256
    assert again.source["prompts"][0]["sha256"] != found.source["prompts"][0]["sha256"]


def test_a_prompt_that_the_models_context_cannot_hold_is_named(tiny_tokenizer, tmp_path):
    """One token per byte, BOS, and the blank line between context and question."""
    long = {**ROW, "context": "x" * 100}
    path, size = written(tmp_path, ROW, long), 1 + 100 + 2 + len(ROW["question"])
    options = {"tasks": [], "prompt_files": [path], "max_new_tokens": 9}
    assert make_prompts((), tiny_tokenizer, **options, most_tokens=size + 9).tasks
    with pytest.raises(
        KvcalError, match=rf"mine.jsonl: row 2: {size} tokens and 9 of the answer exceed .* {size + 8}:"
    ):
        make_prompts((), tiny_tokenizer, **options, most_tokens=size + 8)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "row 2: is not valid JSON"),
        ("[1]", "row 2: is a list"),
        ('"text"', "row 2: no question"),
        ({**ROW, "context": None}, "row 2: no context: give text under 'context', or messages before the last"),
        ({**ROW, "context": " \n"}, "row 2: context is empty"),
        ({**ROW, "context": ["a"]}, "row 2: context is a list, not text"),
        ({**ROW, "question": ""}, "row 2: question is empty"),
        ({"context": "x", "answer": "y"}, "row 2: no question"),
        ({"context": "x", "question": "y"}, "row 2: no answer"),
        ({**ROW, "answer": "  "}, "row 2: answer is empty"),
        ({**ROW, "answer": 42}, 'row 2: answer is a number, not text: give "42"'),
        ({**ROW, "answer": ["a"]}, "row 2: answer is a list, not text"),
        ({**ROW, "answers": ["a"]}, "row 2: both `answer` and `answers`"),
        ({"context": "x", "question": "y", "answers": []}, "row 2: answers is empty"),
        ({"context": "x", "question": "y", "answers": "z"}, "row 2: answers is text"),
        ({"context": "x", "question": "y", "answers": ["z", ""]}, "row 2: an answer is empty"),
        ({"context": "x", "question": "y", "answers": [True]}, "row 2: an answer is true or false, not text"),
        ({**ROW, "context": "\ud800"}, "row 2: context with half a character"),
        ({"messages": [{"role": "user", "content": "Who?"}], "answer": "y"}, "row 2: no context"),
        ({"messages": [{"role": "assistant", "content": "Hm"}], "context": "x", "answer": "y"}, "is of assistant"),
        ({"messages": [{"role": "user", "content": " "}], "context": "x", "answer": "y"}, "last message is empty"),
        ({"messages": "hello", "context": "x", "answer": "y"}, "row 2: no chat"),
        ({**ROW, "answer": "x" * 40}, "row 2: its answer has 40 tokens, of which 9 would be decoded"),
    ],
)
def test_rows_that_cannot_be_asked_are_named(chatting, tmp_path, row, message):
    path = written(tmp_path, ROW, row)
    with pytest.raises(KvcalError, match=message) as raised:
        make_prompt_tasks([path], chatting, max_new_tokens=9)
    assert "\n" not in str(raised.value) and "mine.jsonl" in str(raised.value)


def test_chats_need_a_template_that_takes_them(chatting, tiny_tokenizer, tmp_path):
    path = written(tmp_path, {"messages": [{"role": "system", "content": "Be brief."}], **ROW})
    with pytest.raises(KvcalError, match=r"row 1: messages need a chat template: this model's tokenizer has none"):
        make_prompt_tasks([path], tiny_tokenizer)
    with pytest.raises(KvcalError, match="leave --no-chat-template out"):
        make_prompt_tasks([path], chatting, chat=False)
    chatting.chat_template = "{{ raise_exception('no system') }}"
    with pytest.raises(KvcalError, match=r"row 1: the model's chat template refuses the chat \(no system\)"):
        make_prompt_tasks([path], chatting)
    chatting.chat_template = "{{ messages[-1]['content'] }}"
    with pytest.raises(KvcalError, match="row 1: the model's chat template leaves out what system says"):
        make_prompt_tasks([path], chatting)
    chatting.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(KvcalError, match="row 1: the model's chat template leaves out what the user says"):
        make_prompt_tasks([path], chatting)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["mine.jsonl", "mine.json"], "mine.json: its results would be named 'mine' as those of .*mine.jsonl"),
        (["perplexity.jsonl"], "named 'perplexity' as those of a task of ours"),
        (["passkey@256.jsonl"], "named 'passkey@256' as those of a task of ours"),
        (["absent.jsonl"], "absent.jsonl: does not exist"),
        (["empty.jsonl"], "empty.jsonl: no prompts"),
        (["pipe.jsonl"], "pipe.jsonl: is no plain file"),
    ],
)
def test_files_that_cannot_be_tasks(tiny_tokenizer, tmp_path, names, message):
    for name in names:
        if name == "pipe.jsonl":
            os.mkfifo(tmp_path / name)
        elif name != "absent.jsonl":
            written(tmp_path, *([] if name == "empty.jsonl" else [ROW]), name=name)
    with pytest.raises(KvcalError, match=message):
        make_prompt_tasks([tmp_path / name for name in names], tiny_tokenizer)
