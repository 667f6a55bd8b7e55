"""Tells whoever waits for an evaluation how far it is, and how long it will take."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from .schedule import Part, Schedule, counted, in_words

Progress = Callable[[int, int, str], None]
MISJUDGED = 1.5
"""Factor by which the first estimate may be wrong before another line says so."""


class ProgressReport:
    """Calls `progress` after every step, `say` after the first steps, and once more if that estimate was far off."""

    def __init__(
        self,
        parts: Sequence[Part],
        tasks: int,
        progress: Progress | None,
        say: Callable[[str], None] | None,
        schedule: Schedule | None = None,
    ):
        self.schedule = schedule or Schedule(parts)
        self._tasks = tasks
        self._progress, self._say = progress, say
        self._done, self._total = 0, sum(len(part.settings) * part.steps for part in parts)
        self._before = 0
        """Steps of the settings and batches that are finished, as many as there could have been."""
        self._first: float | None = None
        """Seconds that the whole evaluation takes, as first announced; None: not yet."""
        self._all_told = False

    def show(self) -> None:
        if self._progress:
            left = f"about {in_words(self.schedule.remaining())} left" if self.schedule.begun else ""
            self._progress(self._done, self._total, left)

    def begin(self, setting: Hashable) -> None:
        self.schedule.begin(setting)

    def step(self) -> None:
        self.schedule.step()
        self._done += 1
        self._tell()
        self.show()

    def finish(self) -> None:
        """A setting is done with a batch, perhaps in fewer steps than there could have been."""
        self._before += self.schedule.finish()
        early, self._done = self._done < self._before, self._before
        self._tell()
        if early:
            self.show()

    def _tell(self) -> None:
        if self._say is None or self._all_told or not self.schedule.begun:
            return
        parts = self.schedule.parts
        if self._first is None:
            left = self.schedule.remaining()
            self._first = self.schedule.elapsed() + left
            settings = {setting for part in parts for setting in part.settings}
            self._say(
                f"about {in_words(left)}: {counted(len(settings), 'setting')}, {counted(self._tasks, 'task')}, "
                f"{counted(len(parts), 'batch')}"
            )
        if self.schedule.seen_all:
            self._all_told = True
            left = self.schedule.remaining()
            total = self.schedule.elapsed() + left
            if left > 60 and not self._first / MISJUDGED < total < self._first * MISJUDGED:
                self._say(f"about {in_words(left)} left, now that every setting has been timed")
