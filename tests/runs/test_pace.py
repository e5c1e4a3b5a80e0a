"""How far a picture is: parts that grow with the scales, and what is said meanwhile."""

from __future__ import annotations

import pytest

from bitgen_cli.engine.scales import Schedule
from bitgen_cli.runs.pace import AFTER, Pace


class Listening:
    """A task that keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.parts: list[float] = []

    def advance(self, amount: float = 1.0) -> None:
        raise AssertionError("no picture is finished")

    def ahead(self, amount: float) -> None:
        self.parts.append(amount)

    def status(self, text: str) -> None:
        self.said.append(text)


def test_every_scale_moves_the_bar_by_about_its_work() -> None:
    task = Listening()
    pace = Pace(task, Schedule(1.0, ((1, 1), (2, 2), (4, 4)), (4, 4)), 3, "refining")
    for scale in range(3):
        pace(scale)
    assert task.said == ["scale 1 of 3", "scale 2 of 3", "scale 3 of 3", "refining"]
    whole = 1 + 4 + 16 + 3 / 2
    assert task.parts == pytest.approx([3 * (1 - AFTER) * done / whole for done in (1.5, 6, whole)])
