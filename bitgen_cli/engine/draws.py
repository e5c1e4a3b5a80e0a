"""Random numbers of training: pure functions of a seed, a step and a picture, so that nothing of them is saved."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


def mix(*numbers: int) -> int:
    """A seed from several numbers: distinct tuples give unrelated seeds (splitmix64 steps)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


@dataclass(frozen=True)
class Draws:
    """The random numbers of one micro-batch, the same however many processes share it.

    Attributes:
        seed: of the micro-batch.
        rows: which of its pictures are computed here.
        weight: of their mean in that over all processes, as in `parallel.Share`.
        epoch: how often all pictures have had their turn before.
    """

    seed: int
    rows: range
    weight: float = 1.0
    epoch: int = 0

    @cached_property
    def shared(self) -> torch.Generator:
        """What concerns the whole micro-batch: every process draws the same."""
        return torch.Generator().manual_seed(self.seed)

    @cached_property
    def _own(self) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(mix(self.seed, row)) for row in self.rows]

    def uniform(self, *shape: int) -> Tensor:
        """(rows, *shape) in [0, 1), on the CPU; each picture draws from a generator of its own."""
        return torch.stack([torch.rand(shape, generator=generator) for generator in self._own])
