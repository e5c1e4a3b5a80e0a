"""Self-correction of finished pictures: bits that the model finds unlikely are turned over, without drawing again.

The model has learned to go on from pictures with wrong bits (self_correction.py), so a teacher-forced pass tells for
every bit how likely it is after what the coarser scales hold. Only coarse scales are looked at: a wrong bit there shows
in a large part of the picture, and they are a small part of the work. The coarsest of them are mended first, and what
is said of the others follows from them. Of a picture that was tokenized, later scales are quantised anew each time.
Source: the training is Infinity's bitwise self-correction (arXiv 2412.04431); this use of it is ours.
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

SURE = (3.0, 2.0)
"""Difference of the logits against a bit from which it is turned over in the first round, of the coarsest scales and of
the others: a probability of 4.7 % and of 12 %."""
SURER = 1.0
"""What each further round asks for more, so that fewer bits change in it."""
COARSE = 0.5
"""Scales are coarse that have fewer than this share of the last one's positions; the coarsest of them, fewer than this
share of the last coarse one's."""


@dataclass(frozen=True)
class Refined:
    """Bits of B pictures after refinement.

    Attributes:
        bits: per scale (B, d, h, w) bool.
        changed: (B, scales) bits that are not what they were.
        before, after: (B,) mean log-likelihood in nats of a bit of the scales that are looked at, at the start of the
            first round and at the end of the last: each bit after the coarser scales as the round has left them.
    """

    bits: list[Tensor]
    changed: Tensor
    before: Tensor
    after: Tensor


def looked_at(schedule: Schedule) -> tuple[range, range]:
    """The coarsest scales, and the other coarse ones, of which there may be none."""
    counts = schedule.counts
    coarse = max(1, sum(count < COARSE * counts[-1] for count in counts))
    coarsest = max(1, sum(count < COARSE * counts[coarse - 1] for count in counts))
    return range(coarsest), range(coarsest, coarse)


@torch.inference_mode()
def refine(
    transformer: Predictor,
    text: TextFeatures,
    schedule: Schedule,
    bits: Sequence[Tensor],
    rounds: int,
    *,
    guidance: float = 1.0,
    negative: TextFeatures | None = None,
    where: Sequence[Tensor] | None = None,
    latent: Tensor | None = None,
) -> Refined:
    """Turns over the bits that are unlikely, until a round finds none.

    A picture's bits hang neither on the others of the batch nor, once none of its own is unlikely, on the rounds left.

    Args:
        transformer: in evaluation mode.
        text: B prompts.
        schedule: scales of the pictures.
        bits: per scale (B, d, h, w) bool.
        rounds: at most so many times, 1 or more.
        guidance: of all but the coarsest scales, which it does little for; 1 is none.
        negative: B prompts to guide away from; None takes the learned unconditional prompt.
        where: per scale (1, 1, h, w) bool, positions that may change; None is all.
        latent: (B, d, H, W) what the bits were quantised from. Later scales are then quantised anew after what has been
            turned over, so that the sum stays near it. Bits that were drawn have none: they are what is meant, and
            quantised to their own sum they would only undo what has changed.
    """
    both = text
    if guidance != 1:
        both = TextFeatures.join([text, negative or transformer.null_features(text.lengths)])
    now = list(bits)
    turned = [torch.zeros_like(grid) for grid in bits]
    likelihoods = []
    for number in range(rounds):
        start, end, again = [], [], False
        for scales, sure, prompts in zip(looked_at(schedule), SURE, (text, both), strict=True):
            if not scales:
                continue
            against = _against(transformer, prompts, schedule, now, scales, guidance)
            for k, held in zip(scales, against, strict=True):
                unlikely = held > sure + number * SURER
                unlikely = unlikely if where is None else unlikely & where[k]
                now[k], turned[k] = now[k] ^ unlikely, turned[k] | unlikely
                again = again or bool(unlikely.any())
                start.append(held)
                end.append(torch.where(unlikely, -held, held))
            if latent is not None:
                now = _requantised(latent, schedule, now, turned)
        likelihoods += [_likelihood(start), _likelihood(end)]
        if not again:
            break
    changed = torch.stack([(a != b).flatten(1).sum(1) for a, b in zip(now, bits, strict=True)], dim=1)
    return Refined(now, changed, likelihoods[0], likelihoods[-1])


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
    transformer: Predictor,
    text: TextFeatures,
    schedule: Schedule,
    bits: Sequence[Tensor],
    scales: range,
    guidance: float,
) -> list[Tensor]:
    """What the model holds against the bits of some scales: the logit of the other value minus that of this one.

    Args: as `refine`; of `text` there are B prompts, or 2B for guidance.

    Returns:
        (B, d, h, w) float32 of each.
    """
    every, own = transformer.bits_per_position, bits[0].shape[1] * schedule.cell**2
    batch, rows = bits[0].shape[0], len(text.lengths)
    seen = pyramid.inputs_from_bits(list(bits[: scales.stop]), schedule)[: scales.stop - 1]
    inputs = [widened_positions(to_positions(grid, schedule.cell), every) for grid in seen]
    nothing = torch.zeros(batch, 0, every, device=bits[0].device)
    part = replace(schedule, sizes=schedule.sizes[: scales.stop])
    logits = transformer(torch.cat([nothing, *inputs], dim=1).repeat(rows // batch, 1, 1), text, part)
    pairs = torch.unflatten(logits_in_use(logits, own), -1, (-1, 2))
    of_one = pairs[..., 1] - pairs[..., 0]
    if rows > batch:
        conditional, unconditional = of_one.chunk(2)
        of_one = torch.lerp(unconditional, conditional, guidance)
    grids = [to_grid(of_one[:, part.slices[k]], part.sizes[k], schedule.cell) for k in scales]
    return [torch.where(bits[k], -grid, grid) for k, grid in zip(scales, grids, strict=True)]
