"""Lines of progress for logs, on a clock that the test turns."""

import contextlib
import itertools
import sys
import threading

import pytest

from kvcal.calibrate.cli import logged as module
from kvcal.calibrate.cli.logged import LoggedWork, due, logged
from kvcal.calibrate.cli.output import progress_bar, working

HOUR = 3600


class Clock:
    """Waiting turns it; the work is over after `until` seconds, and wakes up `late` seconds after it was to."""

    def __init__(self, until, during=lambda now: None, late=0):
        self.now, self.until, self.during, self.late = 1000.0, 1000.0 + until, during, late

    def __call__(self):
        return self.now

    def wait(self, seconds):
        assert seconds >= 0
        self.now = min(self.until, self.now + seconds + self.late)
        self.during(self.now - 1000)
        return self.now == self.until


def lines(until, during=None, late=0, title="calibrating"):
    """What work of so many seconds writes; `during(work, seconds)` is called before every line."""
    said = []
    clock = Clock(until, (lambda second: during(work, second)) if during else lambda second: None, late)
    work = LoggedWork(title, said.append, clock)
    if during:
        during(work, 0)
    work.speak(clock.wait)
    work.end()
    return said


def test_lines_come_at_growing_intervals():
    first = list(itertools.islice(due(), 14))
    assert first == [10, 30, 60, 120, 180, 240, 300, 360, 420, 480, 540, 600, 900, 1200]
    assert len(lines(8 * HOUR)) < 120


def test_short_work_writes_nothing():
    assert lines(9.9) == []
    assert lines(10.5) == ["calibrating: 0:10 so far", "calibrating: done · 0:10"]


def test_done_total_elapsed_and_an_estimate():
    """Half a block a second, of 64."""
    said = lines(128, lambda work, second: work.update(int(second / 2), 64))
    assert said == [
        "calibrating: 5 of 64 · 0:10 so far · about 1:58 left",
        "calibrating: 15 of 64 · 0:30 so far · about 1:38 left",
        "calibrating: 30 of 64 · 1:00 so far · about 1:08 left",
        "calibrating: 60 of 64 · 2:00 so far · about 0:08 left",
        "calibrating: done · 64 of 64 · 2:08",
    ]


def test_the_estimate_of_a_resumed_run_is_of_its_own_work():
    """40 of 64 were there: 2 in 10 s, so 22 take 110 s, whatever time the others took."""
    assert lines(10.5, lambda work, second: work.update(40 + int(second / 5), 64))[0].endswith("about 1:50 left")


def test_no_estimate_before_anything_is_done_and_notes_are_shown():
    assert lines(10.5, lambda work, second: work.update(0, 3))[0] == "calibrating: 0 of 3 · 0:10 so far"
    assert lines(10.5, lambda work, second: work.update(0, 3, "loki"))[0].endswith("so far · loki")
    said = lines(10.5, lambda work, second: work.update(0, None, "waiting for another process"))
    assert said == ["calibrating: 0:10 so far · waiting for another process", "calibrating: done · 0:10"]
    assert lines(2 * HOUR, title="loading")[-1] == "loading: done · 2:00:00"


def test_no_second_estimate_beside_that_of_a_note():
    said = []
    work = LoggedWork("decoding", said.append, Clock(100), estimate=False)
    work.update(0, 64)
    work.update(32, 64, "about 5 min left")
    assert work.line() == "decoding: 32 of 64 · 0:00 so far · about 5 min left"


def test_who_wakes_up_late_says_so_once():
    """Woken 100 s after each line was due: those that were due meanwhile are not made up for."""
    times = [line.split()[1] for line in lines(600, late=100)[:-1]]
    assert times == ["1:50", "3:40", "5:40", "7:40", "9:40"]


@pytest.fixture
def hasty(monkeypatch):
    """A line every hundredth of a second, and stderr is no terminal."""
    monkeypatch.setattr(module, "due", lambda: (number / 100 for number in itertools.count(1)))
    monkeypatch.delenv("KVCAL_PROGRESS", raising=False)


@pytest.mark.parametrize("failing", [False, True])
def test_lines_go_to_stderr_and_the_thread_ends(hasty, capsys, failing):
    before, shown = threading.active_count(), ""
    with contextlib.suppress(ZeroDivisionError), progress_bar("calib\nrating") as update:
        update(1, 2)
        while "1 of 2" not in shown:
            shown += capsys.readouterr().err
        if failing:
            raise ZeroDivisionError
    shown += (after := capsys.readouterr()).err
    assert shown.count("\n") == shown.count("calib") > 0 and not after.out
    assert ("done" in after.err) is not failing and threading.active_count() == before


def test_a_log_that_nobody_reads_ends_no_work(hasty, monkeypatch):
    tried = threading.Event()

    class Closed:
        def isatty(self):
            return False

        def write(self, text):
            tried.set()
            raise BrokenPipeError

        flush = write

    monkeypatch.setattr(sys, "stderr", Closed())
    with working("loading"):
        assert tried.wait(60)


def test_the_switch_silences_them(hasty, monkeypatch):
    monkeypatch.setenv("KVCAL_PROGRESS", "0")
    before = threading.active_count()
    with progress_bar("calibrating") as update, working("loading"):
        update(1, 2, "note")
        assert threading.active_count() == before
    with logged("other", print):
        assert threading.active_count() == before + 1
