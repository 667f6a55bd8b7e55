import random

from hypothesis import given, settings
from hypothesis import strategies as st

from kvcal.calibrate.builtin.recall import CODE_DIGITS, dictionary, fact, make_episode, question

WORDS = ["apple", "river", "stone", "cloud", "tiger", "lamp"]


def encode(text):
    """One token per character: what was encoded can be read back."""
    return [ord(character) for character in text]


def decode(ids):
    return "".join(map(chr, ids))


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 9999),
    facts=st.integers(1, 6),
    ask=st.integers(1, 6),
    length=st.integers(0, 200),
    last=st.booleans(),
)
def test_every_question_is_answered_by_the_fact_before_it(seed, facts, ask, length, last):
    filler = encode("~" * length)
    episode = make_episode(encode, filler, WORDS, facts, random.Random(seed), ask=ask, questions_last=last)
    text = decode(episode.ids)
    assert text.count("~") == length
    assert len(episode.answers) == min(ask, facts) == len(set(episode.asked_facts))
    for answer, stated_at in zip(episode.answers, episode.asked_facts, strict=True):
        before, given_answer = text[: answer.start], text[answer.start : answer.stop]
        word = next(word for word in WORDS if before.endswith(question(word)))
        assert len(given_answer.strip()) == CODE_DIGITS
        assert text.startswith(fact(word, given_answer.strip()), stated_at) and stated_at < answer.start
    if last:
        assert "~" not in text[text.find("What is") :]


def test_the_same_seed_gives_the_same_episode():
    episodes = [make_episode(encode, encode("~" * 50), WORDS, 3, random.Random(7), ask=2) for _ in range(2)]
    assert episodes[0] == episodes[1]


def test_training_and_evaluation_words_are_disjoint_plain_words():
    text = "alpha beta gamma delta. Alpha alpha_x call(names) self.value use( word word word " * 3
    train, evaluation = dictionary([text], size=10)
    assert train[0] == "word"  # the most frequent first
    assert set(train).isdisjoint(evaluation)
    # Not names in code, nor words before a full stop: those are often attributes.
    assert {*train, *evaluation} == {"alpha", "beta", "gamma", "word", "names"}
