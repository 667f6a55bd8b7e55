"""What a plan is measured and checked on, and what is said of one that ruins a model."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from kvcal.calibrate.evaluation.prompts import Prompts, Windows
from kvcal.calibrate.evaluation.tasks.sample import Sample, Task
from kvcal.calibrate.planning.body import ruinous
from kvcal.calibrate.planning.prompts import STEPS, answerable, split_prompts

PREFIX = 30


def sample(context: int, question: int, reference: int) -> Sample:
    """Contexts are 0, 1, 2, …; questions 100, 101, …; answers 200, 201, …."""
    parts = ((0, context), (100, question), (200, reference))
    context_, question_, reference_ = (tuple(range(start, start + count)) for start, count in parts)
    return Sample(context_, question_, ("7",), reference_)


def prompts(*samples: Sample) -> Prompts:
    ids = torch.arange(1000, 1000 + 3 * (PREFIX + 20)).view(3, -1)
    tasks = (Task("first", PREFIX, samples[::-1], 5, "digits"), Task("last", PREFIX, samples, 5, "digits"))
    return Prompts(Windows(ids, PREFIX), tasks if samples else ())


def test_questions_of_the_last_task_end_in_their_answers():
    given = prompts(sample(30, 4, 3), sample(30, 6, 2), sample(30, 5, 5))
    measured, checked = split_prompts(given, 2, 2)
    assert measured.texts == 2 and measured.steps == 8 and measured.ids.shape == (4, 37)
    assert torch.equal(measured.ids[:2], given.windows.ids[:2, :37])
    assert measured.ids[2].tolist() == [*range(30), *range(100, 104), *range(200, 203)]
    # A token longer than the shortest: what goes follows the first, on which models lean.
    assert measured.ids[3].tolist() == [0, *range(2, 30), *range(100, 106), *range(200, 202)]
    assert torch.equal(checked.windows.ids, given.windows.ids[2:])
    assert [task.samples for task in checked.tasks] == [task.samples[2:] for task in given.tasks]


@pytest.mark.parametrize(("context", "tokens"), [(25, 34), (40, 39)], ids=["shorter", "longer"])
def test_contexts_that_are_not_as_long_as_the_prefix(context, tokens):
    measured, _ = split_prompts(prompts(sample(context, 4, 5), sample(context, 4, 5)), 1, 1)
    assert measured.steps == 9 and measured.ids.shape == (2, tokens)
    assert measured.ids[1].tolist()[-9:] == [*range(100, 104), *range(200, 205)]
    assert measured.ids[1, 0] == 0 and measured.ids[1, -10] == context - 1


def test_text_alone():
    measured, checked = split_prompts(prompts(), 1, 5)
    assert measured.steps == STEPS and measured.ids.shape == (1, PREFIX + STEPS) and checked.tasks == ()


def test_tasks_that_full_cannot_answer_are_left_out():
    given = prompts(sample(30, 4, 3))
    kept, dropped = answerable({"scores": {"first@30": 0.9, "last@30": 0.89}}, given)
    assert dropped == {"last@30": 0.89} and kept == dataclasses.replace(given, tasks=given.tasks[:1])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        ({"perplexity_ratio": 1.2}, ["perplexity is 1.20 of full's"]),
        ({"perplexity_ratio": None}, ["perplexity is beyond measure"]),
        ({"relative": {"a@1": 0.5, "b@1": 0.95}}, ["a@1 is answered 0.50 as well as by full"]),
    ],
)
def test_a_plan_that_ruins_a_model_is_told(changes: dict[str, Any], said: list[str]):
    assert ruinous({"perplexity_ratio": 1.05, "relative": {"a@1": 0.9, "b@1": None}, **changes}) == said
