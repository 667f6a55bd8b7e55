import re

import pytest
import torch

from kvcal.artifacts import KvcalError
from kvcal.calibrate import make_blocks
from kvcal.calibrate.builtin.recall import question
from kvcal.calibrate.data import open_data
from kvcal.calibrate.evaluation.prompts import make_prompts
from kvcal.calibrate.evaluation.tasks.names import FACTS
from kvcal.calibrate.evaluation.tasks.recall import DEPTHS

BOS = 256
WORDS = [f"{a}{b}{c}{d}" for a in "bdf" for b in "aei" for c in "lmn" for d in "ou"]
TEXT = [" ".join(WORDS[i % 54] for i in range(start, start + 300)) for start in (0, 7, 20, 33)]


def read_back(tokenizer, ids):
    from tokenizers.decoders import ByteLevel

    tokens = tokenizer.convert_ids_to_tokens(ids)
    return ByteLevel().decode(["|" if token == "</s>" else token for token in tokens])


def prompts(tokenizer, texts=TEXT, **options):
    given = {"prefix": 400, "continuation": 20, "windows": 3, "episodes": 10, "seed": 3}
    return make_prompts(texts, tokenizer, **{**given, **options}, name="given")


def test_windows_are_consecutive_blocks_of_the_text(tiny_tokenizer):
    windows = prompts(tiny_tokenizer).windows
    blocks = make_blocks(TEXT, tiny_tokenizer, num_tokens=3 * 420, seq_len=420)
    assert torch.equal(windows.ids, blocks.ids.long())
    assert torch.equal(torch.cat((windows.prefixes, windows.continuations), 1), windows.ids)
    assert windows.prefixes.shape == (3, 400) and (windows.ids[:, 0] == BOS).all()


@pytest.mark.parametrize("task", FACTS)
@pytest.mark.parametrize("length", [400, 777])
def test_every_question_is_answered_by_the_fact_at_its_depth(tiny_tokenizer, task, length):
    (found,) = prompts(tiny_tokenizer, tasks=[task], lengths=[length]).tasks
    assert found.key == f"{task}@{length}" and found.scoring == "digits" and found.new_tokens == 5 + 8
    assert [sample.depth for sample in found.samples] == [*DEPTHS * 2]
    for sample in found.samples:
        assert len(sample.context) == length and sample.context[0] == BOS and BOS not in sample.context[1:]
        text, asked, said = (
            read_back(tiny_tokenizer, part) for part in (sample.context[1:], sample.question, sample.reference)
        )
        stated = dict(re.findall(r"\nThe code of (\w+) is (\d{5})\.\n", text))
        assert len(stated) == FACTS[task]
        # The answer begins with its first digit: the space before it is asked.
        (word,) = [word for word in stated if asked == question(word) + " "]
        assert said == stated[word] and sample.answers == (said,)
        assert "?" not in text  # the question stands in no context
        # One token per byte: characters are positions; another fact may lie across the exact depth.
        at = text.index(f"\nThe code of {word} is") + 1
        assert abs(at - sample.depth * length) <= (1 if task == "passkey" else 30)


def test_the_seed_decides_and_tasks_do_not_depend_on_each_other(tiny_tokenizer):
    both, alone = prompts(tiny_tokenizer), prompts(tiny_tokenizer, tasks=["multikey"])
    assert both.tasks[1] == alone.tasks[0]
    assert both.tokens_sha256 == prompts(tiny_tokenizer).tokens_sha256
    assert both.tokens_sha256 != alone.tokens_sha256
    assert both.tokens_sha256 != prompts(tiny_tokenizer, seed=4).tokens_sha256


def test_no_more_text_is_read_than_needed(tiny_tokenizer):
    def documents():
        yield from TEXT
        raise AssertionError("read on")

    assert len(prompts(tiny_tokenizer, documents(), tasks=["perplexity"]).windows.ids) == 3


def test_a_tokenizer_that_merges_over_the_seam_and_adds_no_bos():
    """One that joins "is" and the space after it, and two digits: the answer begins with the token of its first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [("s", "Ġ"), *((f"{a}", f"{b}") for a in range(10) for b in range(10))]
    vocab = {letter: index for index, letter in enumerate([*letters, *("".join(pair) for pair in pairs)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    (task,) = prompts(fast, tasks=["passkey"]).tasks
    for sample in task.samples:
        asked, said = read_back(fast, sample.question), read_back(fast, sample.reference)
        assert re.fullmatch(r"\nWhat is the code of (\w+)\? The code of \1 is ", asked) and re.fullmatch(r"\d{5}", said)
        assert [*sample.question, *sample.reference] == fast(asked + said)["input_ids"]
        assert len(sample.context) == 400 and len(sample.reference) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"windows": 100}, "only 14 windows of 420 tokens .100 asked for.: give --windows 14"),
        ({"prefix": 9000, "tasks": ["perplexity"]}, "only 0 windows of 9020 tokens"),
        ({"prefix": 9000, "tasks": ["passkey"]}, "fewer than a prefix of 9000"),
        ({"lengths": [100]}, "100 tokens is too short for 8 facts"),
        ({"lengths": [99999], "most_tokens": 8192}, "passkey@99999: this model's context is 8192 tokens"),
        ({"prefix": 9000, "most_tokens": 8192}, r"perplexity: 9000 \+ 20 tokens exceed this model's context of 8192"),
        ({"lengths": [1]}, "are too few: give at least 2"),
        ({"continuation": 1}, "are too few: give at least"),
        (
            {"tasks": ["perplexity", "passkeys"]},
            "no task 'passkeys': choose among perplexity, passkey, multikey, ruler",
        ),
        ({"tasks": []}, "choose among"),
        ({"texts": ["aa bb cc " * 900]}, "only 0 words to hide facts under, 8 needed"),
    ],
)
def test_what_cannot_be_built_is_said(tiny_tokenizer, options, message):
    with pytest.raises(KvcalError, match=message):
        prompts(tiny_tokenizer, **options)


def test_windows_are_of_all_files_and_the_source_says_what_was_read(tiny_tokenizer, tmp_path):
    for letter in "abc":
        (tmp_path / f"{letter}.txt").write_text(letter * 300)
    data = open_data(tmp_path)
    options = {"prefix": 32, "continuation": 8, "windows": 12, "tasks": ["perplexity"]}
    found = make_prompts(data, tiny_tokenizer, **options)
    text = "".join(tiny_tokenizer.convert_ids_to_tokens(found.windows.ids.flatten().tolist()))
    read = [text.count(letter) for letter in "abc"]
    assert found.source["file_tokens"] == read and min(read) > 140, "468 tokens without BOS, some of them EOS"
    assert found.source["files"] == ["a.txt", "b.txt", "c.txt"]
    again = make_prompts(open_data(tmp_path, seed=1), tiny_tokenizer, **options)
    assert not again.windows.ids.equal(found.windows.ids)
