"""How the engine and the runs tell what they are doing, without knowing who listens.

A run gets a `Report`; the command line passes one that draws with rich (console/), tests and Python callers
pass `Silent()`. Nothing here prints.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


class Task(Protocol):
    """One progress bar."""

    def advance(self, amount: float = 1.0) -> None:
        """Move the bar on by units that are finished."""

    def ahead(self, amount: float) -> None:
        """Move the bar on by what is done so far of units that are not finished; those that then are take it back."""

    def status(self, text: str) -> None:
        """Replace the short text behind the bar."""


class Report(Protocol):
    """Receives everything a run has to say while it works."""

    def notice(self, text: str) -> None:
        """Say something the user should know and need not act on."""

    def warning(self, text: str) -> None:
        """Say something the user may want to act on."""

    def task(self, title: str, total: float | None) -> AbstractContextManager[Task]:
        """Open a progress bar of `total` units; None when the end is not known."""

    def metrics(self, step: int, total_steps: int, values: Mapping[str, float]) -> None:
        """Show the newest measurements of a training run.

        Keys are those of metrics.jsonl: `loss`, `bit_accuracy/0` ... one per scale, `images_per_second`,
        `learning_rate` (of the schedule; parts may have a pace of their own), `seconds_left`.
        """


class MetricsLog(Protocol):
    """Keeps the measurements of a training somewhere else than metrics.jsonl."""

    def configuration(self, step: int, description: Mapping[str, Any]) -> None:
        """Keep what is trained from a step on: the run's config.json."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Keep measurements; a step may have them in several parts."""

    def picture(self, step: int, file: Path) -> None:
        """Keep a picture grid."""

    def close(self, *, failed: bool) -> None:
        """Keep what is not kept yet; nothing follows."""


@dataclass(frozen=True)
class Table:
    """Part of a result that is shown as a table.

    Attributes:
        title: shown above it.
        columns: heads.
        rows: cells, as many in each row as there are heads.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


class _SilentTask:
    def advance(self, amount: float = 1.0) -> None:
        pass

    def ahead(self, amount: float) -> None:
        pass

    def status(self, text: str) -> None:
        pass


class Silent:
    """A report that keeps what it hears and shows nothing.

    Attributes:
        notices: every notice and warning, in order.
    """

    def __init__(self) -> None:
        self.notices: list[str] = []

    def notice(self, text: str) -> None:
        self.notices.append(text)

    def warning(self, text: str) -> None:
        self.notices.append(text)

    @contextmanager
    def task(self, title: str, total: float | None) -> Iterator[Task]:
        yield _SilentTask()

    def metrics(self, step: int, total_steps: int, values: Mapping[str, float]) -> None:
        pass
