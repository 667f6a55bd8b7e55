"""How long it will take, by a clock that the test turns."""

from __future__ import annotations

import pytest

from kvcal.calibrate.evaluation.progress_report import ProgressReport
from kvcal.calibrate.evaluation.schedule import STEPS, Part, Schedule, in_words

SETTINGS = ("full", "loki")
COSTS = {"full": 0.5, "loki": 2.0}
"""Seconds per step."""


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def parts(steps: int = 10, lengths: tuple[int, ...] = (100, 100, 400)) -> list[Part]:
    return [Part(length, 2, 1, steps, SETTINGS) for length in lengths]


def work(schedule: Schedule, clock: Clock, part: Part, steps: int, step: object = None) -> None:
    """One part: prefill at 10 ms a token, then `steps` steps of each setting."""
    done = schedule.prefilling()
    clock.now += 0.01 * part.rows * part.length
    done()
    for setting in part.settings:
        schedule.begin(setting)
        for _ in range(steps):
            clock.now += COSTS[str(setting)]
            schedule.step()
        schedule.finish()


def test_after_the_first_steps_all_settings_are_taken_for_the_first():
    clock, todo = Clock(), parts()
    schedule = Schedule(todo, clock)
    done = schedule.prefilling()
    clock.now += 2.0  # 200 tokens
    done()
    schedule.begin("full")
    for _ in range(STEPS):
        assert not schedule.begun
        clock.now += 0.5
        schedule.step()
    assert schedule.begun and not schedule.seen_all
    to_prefill = 0.01 * 2 * (100 + 400)
    assert schedule.remaining() == pytest.approx(to_prefill + 3 * 2 * 10 * 0.5 - STEPS * 0.5)


def test_settings_that_were_seen_are_reckoned_by_their_own_steps():
    clock, todo = Clock(), parts()
    schedule = Schedule(todo, clock)
    work(schedule, clock, todo[0], 10)
    assert schedule.seen_all
    assert schedule.remaining() == pytest.approx(0.01 * 2 * 500 + 2 * 10 * 2.5)
    before, started = schedule.remaining(), clock.now
    work(schedule, clock, todo[1], 10)
    assert schedule.remaining() == pytest.approx(before - (clock.now - started))
    work(schedule, clock, todo[2], 10)
    assert schedule.remaining() == 0


def test_answers_that_end_early_are_expected_to_go_on_doing_so():
    clock, todo = Clock(), parts()
    schedule = Schedule(todo, clock)
    work(schedule, clock, todo[0], 4)
    assert schedule.remaining() == pytest.approx(0.01 * 2 * 500 + 2 * 4 * 2.5)


def test_each_other_model_prefills_again():
    clock, todo = Clock(), [Part(100, 2, 3, 10, SETTINGS), Part(100, 2, 3, 10, SETTINGS)]
    schedule = Schedule(todo, clock)
    done = schedule.prefilling()
    clock.now += 2.0
    done()
    schedule.begin("full")
    for _ in range(10):
        clock.now += 0.5
        schedule.step()
    schedule.finish()
    assert schedule.remaining() == pytest.approx((2 + 3) * 2.0 + 3 * 10 * 0.5)


def test_prefill_is_reckoned_by_the_nearest_length():
    clock, todo = Clock(), [Part(length, 1, 1, 1, ("full",)) for length in (100, 1000, 900, 120)]
    schedule = Schedule(todo, clock)
    for _, seconds in zip(todo[:2], (1.0, 40.0), strict=True):
        done = schedule.prefilling()
        clock.now += seconds
        done()
        schedule.begin("full")
        schedule.step()
        schedule.finish()
    assert schedule.remaining() == pytest.approx(900 * 0.04 + 120 * 0.01)


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "1 s"), (89, "89 s"), (100, "2 min"), (34 * 60, "34 min"), (2.5 * 3600, "2.5 h")]
)
def test_words(seconds, words):
    assert in_words(seconds) == words


def test_it_is_said_once_and_again_where_the_first_steps_misled():
    clock, todo, lines, shown = Clock(), parts(steps=20, lengths=(100,) * 5), [], []
    report = ProgressReport(todo, 2, lambda *given: shown.append(given), lines.append, Schedule(todo, clock))
    for _ in todo:
        done = report.schedule.prefilling()
        clock.now += 2.0
        done()
        for setting in SETTINGS:
            report.begin(setting)
            for _ in range(20):
                clock.now += COSTS[setting]
                report.step()
            report.finish()
    assert lines == [
        # 4 prefills of 2 s and 200 steps of 0.5 s, four of which are done
        "about 2 min: 2 settings, 2 tasks, 5 batches",
        # 4 batches of 2 s and 20 · 2.5 s
        "about 3 min left, now that every setting has been timed",
    ]
    assert shown[-1] == (200, 200, "about 1 s left") and [done for done, _, _ in shown] == list(range(1, 201))
