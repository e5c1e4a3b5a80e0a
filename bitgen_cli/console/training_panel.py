"""A training while it runs: its newest measurements, as a panel or a line."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from bitgen_cli.console.words import ACCURACY, HELD_OUT, duration, name_of, number_of, per_scale, shown_by_name

CHANCE = 0.5
"""Accuracy of a bit that is guessed."""
_BAR_CELLS = 24
_SPARKS = "▁▂▃▄▅▆▇█"


class TrainingPanel:
    """The newest measurements of a training, as a panel or as one line."""

    def __init__(self) -> None:
        self._step = 0
        self._total = 0
        self._values: dict[str, float] = {}
        self._losses: deque[float] = deque(maxlen=32)

    def update(self, step: int, total: int, values: Mapping[str, float]) -> None:
        """Takes in measurements; those of earlier steps stay until they are measured again."""
        self._step, self._total = step, total
        self._values.update(values)
        if "loss" in values:
            self._losses.append(values["loss"])

    def line(self, values: Mapping[str, float]) -> str:
        """These measurements of the newest step in one line of plain text."""
        named = sorted(filter(shown_by_name, values), key="loss".__ne__)
        parts = [f"{name_of(key)} {number_of(key, values[key])}" for key in named]
        for label, prefix in (("bit accuracy", ACCURACY), ("held-out bit accuracy", HELD_OUT)):
            scales = per_scale(values, prefix)
            if scales:
                parts.append(f"{label} {' '.join(f'{100 * value:.1f}' for value in scales)} %")
        if "images_per_second" in values:
            parts.append(f"{values['images_per_second']:.1f} img/s")
        if "seconds_left" in values:
            parts.append(f"{duration(values['seconds_left'])} left")
        return f"step {self._step}/{self._total}: {', '.join(parts)}"

    def __rich__(self) -> Panel:
        parts: list[RenderableType] = [self._numbers()]
        if per_scale(self._values, ACCURACY):
            parts.append(self._scales())
        parts.append(self._footer())
        return Panel(
            Group(*parts), title=f"step {self._step} of {self._total}", title_align="left", expand=False
        )

    def _numbers(self) -> Table:
        """Loss with its course, then everything without a place of its own."""
        table = Table.grid(padding=(0, 2))
        if self._losses:
            table.add_row("loss", f"{self._losses[-1]:.4f}", Text(sparks(self._losses), style="cyan"))
        others = [key for key in self._values if shown_by_name(key) and key != "loss"]
        for key in others:
            table.add_row(name_of(key), number_of(key, self._values[key]), "")
        return table

    def _scales(self) -> Table:
        """One bar per scale; what a guess would reach is marked."""
        accuracy, held_out = per_scale(self._values, ACCURACY), per_scale(self._values, HELD_OUT)
        table = Table.grid(padding=(0, 2))
        table.add_row("", "bit accuracy, │ is chance", "", "held out" if held_out else "")
        for number, value in enumerate(accuracy):
            other = f"{100 * held_out[number]:.1f} %" if number < len(held_out) else ""
            table.add_row(f"scale {number}", accuracy_bar(value), f"{100 * value:.1f} %", other)
        return table

    def _footer(self) -> Table:
        table = Table.grid(padding=(0, 2))
        cells: list[RenderableType] = [ProgressBar(self._total, self._step, width=30)]
        if "images_per_second" in self._values:
            cells.append(f"{self._values['images_per_second']:.1f} img/s")
        if "seconds_left" in self._values:
            cells.append(f"{duration(self._values['seconds_left'])} left")
        table.add_row(*cells)
        return table


def accuracy_bar(accuracy: float) -> Text:
    """A bar for an accuracy in [0, 1] with chance marked; red where it is no better than that."""
    full = round(accuracy * _BAR_CELLS)
    chance = round(CHANCE * _BAR_CELLS)
    style = "green" if accuracy > CHANCE + 0.005 else "red"
    bar = Text()
    for cell in range(_BAR_CELLS):
        if cell == chance:
            bar.append("│", style="bold")
        else:
            bar.append("━" if cell < full else " ", style=style)
    return bar


def sparks(values: Sequence[float]) -> str:
    """The course of the values as one character each, lowest to highest; what is not finite is left out."""
    finite = [value for value in values if abs(value) < float("inf")]
    if not finite:
        return ""
    low, high = min(finite), max(finite)
    scale = (len(_SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_SPARKS[round((value - low) * scale)] for value in finite)
