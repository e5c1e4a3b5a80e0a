"""Going on from a picture: which of its bits stay, and where new ones are drawn.

A latent picture is a sum over scales, and every code of a coarse scale reaches as far as its resampling spreads it. A
code may change only where all it reaches is to be drawn anew: then the sum stays the same to the last bit everywhere
else. What the kept coarse codes hold under the mask, finer scales make up for, as they learned to do for wrong bits
(self_correction.py). Source: next-scale bits make it possible; the rule is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitgen_cli.engine.pyramid import resample
from bitgen_cli.engine.scales import Schedule


@dataclass(frozen=True)
class Given:
    """B pictures that are gone on from.

    Attributes:
        bits: per scale (B, d, h, w) bool, in latent positions.
        drawn: per scale (1, 1, h, w) bool, where bits are drawn; elsewhere they stay.
        latent: (B, d, H, W) what the bits were made of, where that is known: of pictures that were tokenized.
    """

    bits: Sequence[Tensor]
    drawn: Sequence[Tensor]
    latent: Tensor | None = None

    @property
    def draws(self) -> bool:
        """Whether anything is drawn."""
        return any(bool(where.any()) for where in self.drawn)


def drawn_positions(schedule: Schedule, mask: Tensor | None, keep_scales: int = 0) -> list[Tensor]:
    """Where bits are drawn.

    Args:
        schedule: scales of the picture.
        mask: (H, W) bool, the latent positions that may change; None is all.
        keep_scales: so many of the first scales stay.

    Returns:
        Per scale (1, 1, h, w) bool.
    """
    found = []
    for k, size in enumerate(schedule.latent_sizes):
        where = torch.ones(size, dtype=torch.bool) if mask is None else _within(mask, size)
        found.append((where & (k >= keep_scales))[None, None])
    return found


def latent_mask(pixels: Tensor, schedule: Schedule) -> Tensor:
    """The latent positions of which a mask covers anything: (H, W) bool.

    Args:
        pixels: (height, width) bool, of the size of the picture.
        schedule: its last scale decides the result's size.
    """
    height, width = schedule.latent_sizes[-1]
    parts = torch.unflatten(torch.unflatten(pixels, 1, (width, -1)), 0, (height, -1))
    return parts.any(3).any(1)


def _within(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Positions of a scale of that size (h, w) whose codes reach nothing outside a mask (H, W): (h, w) bool."""
    down, right = (_reach(few, many) for few, many in zip(size, mask.shape, strict=True))
    return down.T @ (~mask).float() @ right == 0


def _reach(few: int, many: int) -> Tensor:
    """Which of many positions each of few reaches when they are resampled along one side: (many, few) of 0 and 1."""
    each = torch.eye(few)[None, :, :, None]
    return (resample(each, (many, 1))[0, :, :, 0].T != 0).float()
