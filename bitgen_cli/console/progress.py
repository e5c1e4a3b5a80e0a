"""What a run reports while it works: bars and notices on a terminal, lines now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn
from rich.progress import Task as RichTask
from rich.text import Text

from bitgen_cli.console.terminal import console_on, is_terminal, print_error_line, say
from bitgen_cli.console.training_panel import TrainingPanel
from bitgen_cli.console.words import duration, pace
from bitgen_cli.place import place
from bitgen_cli.report import Silent

if TYPE_CHECKING:
    from bitgen_cli.report import Report, Task

LINE_EVERY = 10.0
"""Seconds between two lines of progress where there is no terminal."""
SPEED_OVER = 300.0
"""Seconds that the speed of a bar is a mean of: a single step may take long."""


def listening(*, apart: bool = False) -> AbstractContextManager[Report]:
    """A report on the terminal; of several processes that work together, the first alone speaks.

    Args:
        apart: each works on a share of its own, so that the others warn too.
    """
    rank = place().rank
    if not rank:
        return ConsoleReport()
    return nullcontext(_Warner(rank) if apart else Silent())


class _Warner(Silent):
    """Shows warnings alone, and who warns."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    def warning(self, text: str) -> None:
        say(console_on(sys.stderr), "warning", "yellow", f"rank {self._rank}: {text}")


class ConsoleReport:
    """Shows on stderr what a run reports; use it as a context, whose end clears the progress bars away.

    Args:
        clock: seconds from anywhere; for tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console_on(sys.stderr)
        self._clock = clock
        self._training: TrainingPanel | None = None
        self._line_due = clock()
        self._live: Live | None = None
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            _CountColumn(),
            _SpeedColumn(),
            _TimesColumn(),
            TextColumn("{task.fields[status]}", style="dim"),
            console=self._console,
            speed_estimate_period=SPEED_OVER,
        )
        if is_terminal(self._console):
            self._live = Live(
                get_renderable=self._view, console=self._console, refresh_per_second=8, redirect_stdout=False
            )

    def __enter__(self) -> ConsoleReport:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live is not None and self._live.is_started:
            for task in self._progress.task_ids:
                self._progress.remove_task(task)
            self._live.transient = self._training is None
            self._live.stop()

    def notice(self, text: str) -> None:
        say(self._console, "note", "cyan", text)

    def warning(self, text: str) -> None:
        say(self._console, "warning", "yellow", text)

    @contextmanager
    def task(self, title: str, total: float | None) -> Iterator[Task]:
        if self._live is None:
            plain = _PlainTask(title, total, self._clock)
            yield plain
            plain.close()
            return
        self._live.start()
        bar = self._progress.add_task(title, total=total, done=0.0, status="")
        try:
            yield _Bar(self._progress, bar)
        finally:
            self._progress.remove_task(bar)

    def metrics(self, step: int, total_steps: int, values: Mapping[str, float]) -> None:
        if self._training is None:
            self._training = TrainingPanel()
        self._training.update(step, total_steps, values)
        if self._live is not None:
            self._live.start()
        elif "loss" not in values:
            print_error_line(self._training.line(values))
        elif self._clock() >= self._line_due or step == total_steps:
            self._line_due = self._clock() + LINE_EVERY
            print_error_line(self._training.line(values))

    def _view(self) -> RenderableType:
        parts: list[RenderableType] = [] if self._training is None else [self._training]
        return Group(*parts, self._progress) if self._progress.tasks else Group(*parts)


class _Bar:
    """A task as a progress bar."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task
        self._done = self._ahead = 0.0

    def advance(self, amount: float = 1.0) -> None:
        self._done += amount
        self.ahead(max(0.0, self._ahead - amount))

    def ahead(self, amount: float) -> None:
        self._ahead = amount
        self._progress.update(self._task, completed=self._done + amount, done=self._done)

    def status(self, text: str) -> None:
        self._progress.update(self._task, status=text)


class _CountColumn(ProgressColumn):
    """Units that are finished, of all."""

    def render(self, task: RichTask) -> Text:
        total = "?" if task.total is None else f"{int(task.total)}"
        return Text(f"{int(task.fields['done']):>{len(total)}}/{total}", style="progress.download")


class _SpeedColumn(ProgressColumn):
    """Units per second, or seconds for each."""

    def render(self, task: RichTask) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else pace(speed), style="progress.data.speed")


class _TimesColumn(ProgressColumn):
    """Time since the start, and about how much is left."""

    max_refresh = 0.5

    def render(self, task: RichTask) -> Text:
        left = "--:--" if task.time_remaining is None else _clock(task.time_remaining)
        return Text(f"{_clock(task.elapsed or 0)}<{left}", style="progress.remaining")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"


class _PlainTask:
    """A task as a line now and then; short tasks say nothing."""

    def __init__(self, title: str, total: float | None, clock: Callable[[], float]) -> None:
        self._title = title
        self._total = total
        self._clock = clock
        self._started = clock()
        self._due = self._started + LINE_EVERY
        self._done = self._ahead = 0.0
        self._first: float | None = None
        self._status = ""
        self._told: float | None = None

    def advance(self, amount: float = 1.0) -> None:
        if self._first is None:
            # what an earlier run had done comes in one piece at the start and is no measure of speed
            self._first = amount
        self._done += amount
        self.ahead(max(0.0, self._ahead - amount))

    def ahead(self, amount: float) -> None:
        if self._first is None:
            self._first = 0.0
        self._ahead = amount
        if self._clock() >= self._due:
            self._speak()

    def status(self, text: str) -> None:
        self._status = text

    def close(self) -> None:
        """Says how it ended, if it has said anything before and something has happened since."""
        if self._told not in (None, self._done):
            self._speak()

    def _speak(self) -> None:
        now = self._clock()
        self._told = self._done
        self._due = now + LINE_EVERY
        so_far = self._done + self._ahead
        speed = (so_far - (self._first or 0.0)) / max(now - self._started, 1e-9)
        of_total = "" if self._total is None else f"/{self._total:g}"
        line = f"{self._title}: {self._done:g}{of_total}" + (f", {pace(speed)}" if speed > 0 else "")
        if self._total is not None and speed > 0 and so_far < self._total:
            line += f", {duration((self._total - so_far) / speed)} left"
        print_error_line(line + (f", {self._status}" if self._status else ""))
