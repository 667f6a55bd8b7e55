import pytest

from kvcal.artifacts import KvcalError
from kvcal.calibrate.evaluation.tasks.encoding import encode, split_tokens, text_sample


@pytest.fixture(scope="module")
def merging():
    """One token per byte, but ". " and " 4" are one each: over seams that lie between their bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate([*letters, ".Ġ", "Ġ4"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[(".", "Ġ"), ("Ġ", "4")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize(
    ("context", "question", "read"),
    [
        ("It is.", "Why?", "It is."),
        ("It is.", " Why?", "It is"),  # ". " is one token, and the question's
        ("It is. ", "Why?", "It is. "),
        ("", "Why?", ""),
    ],
)
def test_a_token_over_the_seam_is_the_questions(merging, context, question, read):
    before, after = split_tokens(merging, context, question)
    assert before + after == encode(merging, context + question)
    assert merging.decode(before) == read and merging.decode(after) == (context + question)[len(read) :]


def test_the_answer_goes_on_where_the_question_ends(merging):
    sample = text_sample(merging, [7], "A fact. ", "It is", ["42", "43"], "row 1")
    assert sample.context == (7, *encode(merging, "A fact. ")) and sample.question == tuple(encode(merging, "It is"))
    assert (*sample.question, *sample.reference) == tuple(encode(merging, "It is 42"))
    assert sample.answers == ("42", "43") and sample.label == "row 1"
    spaced = text_sample(merging, [], "A fact.", " It is ", ["42"], "")
    assert merging.decode(spaced.reference).strip() == "42", "no second space"


def test_what_the_tokenizer_makes_nothing_of_is_said(tiny_tokenizer):
    class Deaf:
        def __call__(self, text, **options):
            return {"input_ids": [] if "Why" in text else [1] * len(text)}

    with pytest.raises(KvcalError, match="row 3: the tokenizer makes no token of its context"):
        text_sample(Deaf(), [1], "x", "Why?", ["y"], "row 3")
