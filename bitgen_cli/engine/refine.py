"""Self-correction of finished pictures: bits that the model finds unlikely are turned over, without drawing again.

The model has learned to go on from pictures with wrong bits (self_correction.py), so one teacher-forced pass tells for
every bit how likely it is after what the coarser scales hold. Only coarse scales are looked at: a wrong bit there shows
in a large part of the picture, and they are a small part of the work. The next round looks at them anew, after what has
changed. Source: the training is Infinity's bitwise self-correction (arXiv 2412.04431); this use of it is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from bitgen_cli.engine import pyramid
from bitgen_cli.engine.active_bits import logits_in_use, widened_positions
from bitgen_cli.engine.bits import to_grid, to_positions
from bitgen_cli.engine.scales import Schedule
from bitgen_cli.engine.transformer import Predictor, TextFeatures

SURE = 3.0
"""Difference of the logits against a bit, in the first round, from which it is turned over: a probability of 4.7 %."""
SURER = 1.0
"""What each further round asks for more, so that fewer bits change in it."""
COARSE = 0.5
"""Scales are looked at that have fewer than this share of the last scale's positions."""


@dataclass(frozen=True)
class Refined:
    """Bits of B pictures after refinement.

    Attributes:
        bits: per scale (B, d, h, w) bool.
        changed: (B, scales) bits that are not what they were.
        before, after: (B,) mean log-likelihood in nats of a bit of the scales that were looked at.
    """

    bits: list[Tensor]
    changed: Tensor
    before: Tensor
    after: Tensor


def coarse_scales(schedule: Schedule) -> int:
    """How many scales are looked at, from the first on."""
    return max(1, sum(count < COARSE * schedule.counts[-1] for count in schedule.counts))


@torch.inference_mode()
def refine(
    transformer: Predictor, text: TextFeatures, schedule: Schedule, bits: Sequence[Tensor], rounds: int
) -> Refined:
    """Turns over the bits that are unlikely.

    A picture's bits hang neither on the others of the batch nor, once none of its own is unlikely, on the rounds left.

    Args:
        transformer: in evaluation mode.
        text: B prompts.
        schedule: scales of the pictures.
        bits: per scale (B, d, h, w) bool.
        rounds: at most so many times.
    """
    count = coarse_scales(schedule)
    now, before = list(bits), None
    for number in range(rounds + 1):
        against = _against(transformer, text, schedule, now, count)
        likelihood = -torch.cat([F.softplus(scale).flatten(1) for scale in against], dim=1).mean(1)
        before = likelihood if before is None else before
        unlikely = [scale > SURE + number * SURER for scale in against]
        if number == rounds or not any(scale.any() for scale in unlikely):
            break
        now[:count] = [grid ^ turned for grid, turned in zip(now, unlikely, strict=False)]
    changed = torch.stack([(a != b).flatten(1).sum(1) for a, b in zip(now, bits, strict=True)], dim=1)
    assert before is not None
    return Refined(now, changed, before, likelihood)


def _against(
    transformer: Predictor, text: TextFeatures, schedule: Schedule, bits: Sequence[Tensor], count: int
) -> list[Tensor]:
    """What the model holds against the bits of the first scales: the logit of the other value minus that of this one.

    Returns:
        (B, d, h, w) float32 of each.
    """
    every, own = transformer.bits_per_position, bits[0].shape[1] * schedule.cell**2
    seen = pyramid.inputs_from_bits(list(bits[:count]), schedule)[: count - 1]
    inputs = [widened_positions(to_positions(grid, schedule.cell), every) for grid in seen]
    nothing = torch.zeros(bits[0].shape[0], 0, every, device=bits[0].device)
    part = replace(schedule, sizes=schedule.sizes[:count])
    logits = logits_in_use(transformer(torch.cat([nothing, *inputs], dim=1), text, part), own)
    pairs = torch.unflatten(logits, -1, (-1, 2))
    of_one = pairs[..., 1] - pairs[..., 0]
    grids = [to_grid(of_one[:, at], size, schedule.cell) for at, size in zip(part.slices, part.sizes, strict=True)]
    return [torch.where(grid, -logit, logit) for grid, logit in zip(bits, grids, strict=False)]
