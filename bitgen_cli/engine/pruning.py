"""Faster pictures for less agreement: on late scales few positions go through the blocks, and nothing is guided.

Fine scales have most of a picture's positions, and most of those bring little that is new. The pivotal ones are
predicted; the others take over the logits of the scale before. Nothing is trained for it.
Source: after FastVAR (arXiv 2503.23367; fastvar_utils.py, masked_previous_scale_cache), which takes the positions
farthest from the mean of the whole scale, and restores what each block added to the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bitgen_cli.engine.bits import to_grid, to_positions
from bitgen_cli.engine.scales import Schedule


@dataclass(frozen=True)
class Level:
    """How much is left out.

    Attributes:
        late: a scale is late from this share of the last scale's positions on.
        kept: positions of a late scale that are predicted, for each it has more than the scale before it.
    """

    late: float
    kept: float


LEVELS = (Level(late=0.5, kept=2.0), Level(late=0.2, kept=4 / 3), Level(late=0.2, kept=1.0))
"""Levels 1, 2 and 3; 0 leaves nothing out."""
WHOLE = 64
"""Scales of fewer positions are predicted whole: they take no time worth saving, and all later ones build on them."""


def late_scales(schedule: Schedule, level: int) -> tuple[bool, ...]:
    """Which scales are late; at level 0 none, and never the first."""
    if level == 0:
        return (False,) * len(schedule)
    least = LEVELS[level - 1].late * schedule.counts[-1]
    return tuple(k > 0 and count >= least for k, count in enumerate(schedule.counts))


def kept_counts(schedule: Schedule, level: int) -> tuple[int, ...]:
    """Positions of each scale that are predicted: of one that is not late or has fewer than WHOLE, all of them."""
    counts = list(schedule.counts)
    for k, late in enumerate(late_scales(schedule, level)):
        if late and counts[k] >= WHOLE:
            more = schedule.counts[k] - schedule.counts[k - 1]
            counts[k] = min(schedule.counts[k], max(1, round(LEVELS[level - 1].kept * more)))
    return tuple(counts)


def unguided(
    cfg: Sequence[float], tau: Sequence[float], late: Sequence[bool]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Guidance and temperature per scale without guidance on late ones.

    Guidance also makes bits surer. Where it is gone the temperature is lower instead, by 2 / (1 + cfg): half of it in
    place of a guidance of 3.
    """
    cooler = [t * 2 / (1 + c) if is_late and c > 1 else t for c, t, is_late in zip(cfg, tau, late, strict=True)]
    return tuple(1.0 if is_late else c for c, is_late in zip(cfg, late, strict=True)), tuple(cooler)


def pivotal(seen: Tensor, count: int, cell: int = 1) -> Tensor:
    """The positions of a scale whose input is farthest from that of the positions around them, in ascending order.

    Args:
        seen: (B, C, h*cell, w*cell) what the transformer reads before the scale (pyramid.next_input).
        count: p, how many of the h*w.
        cell: latent positions along one side of a transformer position.

    Returns:
        (B, p) int64. Of equally far ones the first; a picture's do not hang on the others of the batch.
    """
    around = F.avg_pool2d(seen, 3, stride=1, padding=1, count_include_pad=False)
    distance = to_positions((seen - around).square(), cell).sum(-1)
    farthest = torch.argsort(distance, dim=1, descending=True, stable=True)[:, :count]
    return farthest.sort(dim=1).values


def gather(positions: Tensor, kept: Tensor) -> Tensor:
    """The kept positions (B, p, K) of (B, l, K); kept (B, p)."""
    return positions.gather(1, kept[..., None].expand(-1, -1, positions.shape[-1]))


def restored(
    logits: Tensor, kept: Tensor, before: Tensor, size_before: tuple[int, int], size: tuple[int, int]
) -> Tensor:
    """Logits of all positions of a scale: its own where it has them, elsewhere those of the scale before.

    Args:
        logits: (B, p, 2K) of the kept positions.
        kept: (B, p).
        before: (B, h0*w0, 2K) of all positions of the scale before.
        size_before, size: (h0, w0) and (h, w).

    Returns:
        (B, h*w, 2K); a position that was not kept has the logits of the one that lay at its place (nearest).
    """
    taken_over = to_positions(F.interpolate(to_grid(before, size_before), size=size, mode="nearest"))
    return taken_over.scatter(1, kept[..., None].expand(-1, -1, logits.shape[-1]), logits)
