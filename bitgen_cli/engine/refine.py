"""Self-correction of finished pictures: bits that the model finds unlikely are turned over, without drawing again.

The model has learned to go on from pictures with wrong bits (self_correction.py), so one teacher-forced pass tells for
every bit how likely it is after what the coarser scales hold. The next round looks at them anew, after what has
changed. Of a picture that was tokenized, later scales are quantised anew after each round.
Source: the training is Infinity's bitwise self-correction (arXiv 2412.04431); this use of it is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bitgen_cli.engine import pyramid
from bitgen_cli.engine.active_bits import logits_in_use, widened_positions
from bitgen_cli.engine.bits import to_grid, to_positions
from bitgen_cli.engine.scales import Schedule
from bitgen_cli.engine.transformer import Predictor, TextFeatures

SURE, SURE_OF_FINE = 3.0, 2.0
"""Difference of the logits against a bit, in the first round, from which it is turned over: a probability of 4.7 %, and
of 12 % on the last scale, after which nothing follows that would have been chosen otherwise."""
SURER = 1.0
"""What each further round asks for more, so that fewer bits change in it."""


@dataclass(frozen=True)
class Refined:
    """Bits of B pictures after refinement.

    Attributes:
        bits: per scale (B, d, h, w) bool.
        changed: (B, scales) bits that are not what they were.
        before, after: (B,) mean log-likelihood of a bit in nats, at the start of the first round and at the end of the
            last: each bit after the coarser scales as the round has found them.
    """

    bits: list[Tensor]
    changed: Tensor
    before: Tensor
    after: Tensor


@torch.inference_mode()
def refine(
    transformer: Predictor,
    text: TextFeatures,
    schedule: Schedule,
    bits: Sequence[Tensor],
    rounds: int,
    *,
    where: Sequence[Tensor] | None = None,
    latent: Tensor | None = None,
) -> Refined:
    """Turns over the bits that are unlikely, until a round finds none.

    A picture's bits hang neither on the others of the batch nor, once none of its own is unlikely, on the rounds left.

    Args:
        transformer: in evaluation mode.
        text: B prompts; without guidance, which would double the work.
        schedule: scales of the pictures.
        bits: per scale (B, d, h, w) bool.
        rounds: at most so many times, 1 or more.
        where: per scale (1, 1, h, w) bool, positions that may change; None is all.
        latent: (B, d, H, W) what the bits were quantised from. Later scales are then quantised anew after what has been
            turned over, so that the sum stays near it. Bits that were drawn have none: they are what is meant, and
            quantised to their own sum they would only undo what has changed.
    """
    now = list(bits)
    turned = [torch.zeros_like(grid) for grid in bits]
    before: Tensor | None = None
    for number in range(rounds):
        against = _against(transformer, text, schedule, now)
        sure = [SURE + number * SURER] * (len(against) - 1) + [SURE_OF_FINE + number * SURER]
        unlikely = [held > least for held, least in zip(against, sure, strict=True)]
        if where is not None:
            unlikely = [wrong & there for wrong, there in zip(unlikely, where, strict=True)]
        before = _likelihood(against) if before is None else before
        after = _likelihood([torch.where(wrong, -held, held) for wrong, held in zip(unlikely, against, strict=True)])
        if not any(wrong.any() for wrong in unlikely):
            break
        now = [grid ^ wrong for grid, wrong in zip(now, unlikely, strict=True)]
        turned = [earlier | wrong for earlier, wrong in zip(turned, unlikely, strict=True)]
        if latent is not None:
            now = _requantised(latent, schedule, now, turned)
    changed = torch.stack([(a != b).flatten(1).sum(1) for a, b in zip(now, bits, strict=True)], dim=1)
    assert before is not None
    return Refined(now, changed, before, after)


def _likelihood(against: Sequence[Tensor]) -> Tensor:
    """Mean log-likelihood (B,) of bits by what is held against them."""
    return -torch.cat([F.softplus(scale).flatten(1) for scale in against], dim=1).mean(1)


def _requantised(latent: Tensor, schedule: Schedule, bits: Sequence[Tensor], turned: Sequence[Tensor]) -> list[Tensor]:
    """The bits of a latent, but for those that were turned over: later scales express what is left after them."""
    found: list[Tensor] = []

    def keep_turned(fresh: Tensor, scale: int) -> Tensor:
        found.append(torch.where(turned[scale], bits[scale], fresh))
        return found[-1]

    for _ in pyramid.walk(latent, schedule, keep_turned):
        pass
    return found


def _against(
    transformer: Predictor, text: TextFeatures, schedule: Schedule, bits: Sequence[Tensor]
) -> list[Tensor]:
    """What the model holds against the bits: the logit of the other value minus that of this one.

    Returns:
        (B, d, h, w) float32 of each scale.
    """
    every, own = transformer.bits_per_position, bits[0].shape[1] * schedule.cell**2
    seen = pyramid.inputs_from_bits(list(bits), schedule)
    inputs = [widened_positions(to_positions(grid, schedule.cell), every) for grid in seen]
    nothing = torch.zeros(bits[0].shape[0], 0, every, device=bits[0].device)
    logits = logits_in_use(transformer(torch.cat([nothing, *inputs], dim=1), text, schedule), own)
    pairs = torch.unflatten(logits, -1, (-1, 2))
    of_one = pairs[..., 1] - pairs[..., 0]
    places = zip(schedule.slices, schedule.sizes, strict=True)
    grids = [to_grid(of_one[:, at], size, schedule.cell) for at, size in places]
    return [torch.where(grid, -logit, logit) for grid, logit in zip(bits, grids, strict=True)]
