"""How far the pictures of a batch are: told with each scale, as parts of pictures."""

from __future__ import annotations

from itertools import accumulate

from bitgen_cli.engine.scales import Schedule
from bitgen_cli.report import Task

AFTER = 0.25
"""Share of a picture's time that goes by after its last scale, about: decoding and writing."""
LEAST = 1 / 32
"""What any scale takes besides its positions, about, as a share of the last one's."""


class Pace:
    """Moves a bar on with every scale, and says which one is drawn. Is called with a scale's index when it is done.

    Args:
        task: has pictures for units.
        schedule: of the pictures.
        pictures: that are drawn together.
        then: what is said when the last scale is done.
    """

    def __init__(self, task: Task, schedule: Schedule, pictures: int, then: str = "decoding") -> None:
        self._task = task
        self._then = then
        efforts = [count + LEAST * schedule.counts[-1] for count in schedule.counts]
        self._done = [pictures * (1 - AFTER) * effort / sum(efforts) for effort in accumulate(efforts)]
        self._say(0)

    def __call__(self, scale: int) -> None:
        self._say(scale + 1)
        self._task.ahead(self._done[scale])

    def _say(self, scale: int) -> None:
        last = len(self._done)
        self._task.status(f"scale {scale + 1} of {last}" if scale < last else self._then)
