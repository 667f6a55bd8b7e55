import pytest

from kvcal.calibrate.evaluation.tasks.scoring import digits, exact, part, settled, without_articles


@pytest.mark.parametrize(
    ("prediction", "score"),
    [
        (" 48213", 1),
        (" the code is\n 48213.", 1),
        ("48213999", 1),
        ("4 8213", 0),
        ("7 and 48213", 0),
        (" 4821", 0),
        ("", 0),
    ],
)
def test_digits_are_those_of_the_first_number(prediction, score):
    assert digits(prediction, ["48213"]) == score


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("The Eiffel Tower.", "eiffel  tower", 1),
        (" \n Paris\nQuestion: …", "Paris", 1),
        ("Paris Hilton", "Paris", 0),
        ("“Paris”", "paris", 1),
        ("one\ntwo\nthree", "One two", 0),
        ("one\ntwo\nthree", "One\ntwo", 1),
        ("A.", "A", 1),  # an article, and all of the answer
        ("the", "A", 0),
        ("(+)", "+", 0),
        ("+", "+", 1),
        ("35", "3.5", 0),
        ("5", "-5", 0),
        ("5,000", "5000", 1),
        ("3,5", "35", 0),
        ("10:30", "1030", 0),
        ("$5", "5", 1),
        ("Cafe\u0301", "café", 1),
        ("", "x", 0),
        ("state of the art", "State-of-the-art", 0),  # SQuAD's rule: marks go, and nothing comes in their place
        ("北京。", "北京", 1),
    ],
)
def test_exact_is_the_first_line_and_all_of_it(prediction, answer, score):
    assert exact(prediction, [answer]) == score
    assert exact(prediction, ["nothing else", answer]) == score


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("It stands in Paris, France.", "paris", 1),
        ("Parisian", "Paris", 0),
        ("about 57 or so", "5", 0),
        ("about 5,000", "5", 0),
        ("3.5", "5", 0),
        ("3.5", "3", 0),
        ("-5 degrees", "5", 0),
        ("it is 5.", "5", 1),
        ("It is the Eiffel\nTower", "Eiffel Tower", 1),
        ("It is Eiffel Tower", "the Eiffel Tower", 1),
        ("The answer is A.", "A", 1),
        ("Apples", "A", 0),
        ("答案是北京市。", "北京", 1),
        ("use + here", "+", 1),
        ("use - here", "+", 0),
        ("yes/no", "yes", 1),
        ("in the US now", "U.S.", 1),
        ("in the U.S. now", "US", 1),
        ("", "x", 0),
    ],
)
def test_part_is_whole_words_and_numbers_anywhere(prediction, answer, score):
    assert part(prediction, [answer]) == score


def test_articles_and_marks_go_as_in_squad():
    """Its official script, of which this is the definition, on texts without numbers."""
    import re
    import string

    def official(text):
        text = "".join(mark for mark in text.lower() if mark not in set(string.punctuation))
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())

    for text in ("The  cat, an owl & a dog!", "A.B. (the C)", "another theme", "don't", "  the\tend\n"):
        assert without_articles(text) == official(text)


@pytest.mark.parametrize(
    ("scoring", "said", "answer", "over"),
    [
        (digits, "4821", "48213", False),
        (digits, "48213", "48213", True),
        (exact, "Paris", "Paris", False),
        (exact, "Paris\n", "Paris", True),
        (exact, "London\n", "Paris", False),
        (part, "in Paris", "Paris", False),
        (part, "in Paris,", "Paris", True),
        (part, "5", "5", False),
        (part, "5,", "5", False),
        (part, "5 ", "5", True),
    ],
)
def test_decoding_may_stop_where_no_more_text_changes_the_score(scoring, said, answer, over):
    assert settled(scoring, said, [answer]) is over
    if over:
        assert all(scoring(said + more, [answer]) == 1 for more in ("x", "7", ",000", ".5", " and more", "\nQ"))
