"""Which of several processes this is, as torchrun and `--devices` tell in the environment."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """A process among those that work together.

    Attributes:
        rank: its number.
        count: how many there are.
        local_rank: its number among those on the same machine.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0


def place() -> Place:
    """Of this process; of one alone where nothing is told."""
    names = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    return Place(*(int(os.environ.get(name, alone)) for name, alone in names.items()))
