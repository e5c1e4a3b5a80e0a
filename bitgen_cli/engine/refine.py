"""Self-correction of finished pictures: bits that the model finds unlikely are turned over, without drawing again.

The model has learned to go on from pictures with wrong bits (self_correction.py), so one teacher-forced pass tells for
every bit how likely it is after what the coarser scales hold. Guidance sees more, and takes as long again: the first
round guides the coarse scales, where a wrong bit does most and positions are few. The next round looks at all of them
anew, after what has changed, and guides all. Of a picture that was tokenized, later scales are quantised anew after
each round.
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
from bitgen_cli.engine.layers import waits_for_calls
from bitgen_cli.engine.scales import Schedule
from bitgen_cli.engine.transformer import Condition, Predictor, TextFeatures

SURE, SURE_OF_FINE = 3.0, 1.5
"""Difference of the logits against a bit, in the first round, from which it is turned over: a probability of 4.7 %, and
of 18 % on the last scale, after which nothing follows that would have been chosen otherwise."""
SURER = 1.0
"""What each further round asks for more, so that fewer bits change in it."""
COARSE = 0.25
"""Share of all positions that the scales have which the first round guides."""


@dataclass(frozen=True)
class Refined:
    """Bits of B pictures after refinement.

    Attributes:
        bits: per scale (B, d, h, w) bool.
        changed: (B, scales) bits that are not what they were.
        likelihood: (B, rounds) mean log-likelihood of a bit in nats without guidance, as each round found it at its
            start; NaN in rounds after one that found nothing more to change in the picture.
        gain: (B,) by how much it has risen: to what the last round found, and there by the bits it turned over, each
            after the coarser scales as it saw them. What they change for finer scales the next round would tell.
    """

    bits: list[Tensor]
    changed: Tensor
    likelihood: Tensor
    gain: Tensor


@torch.inference_mode()
def refine(
    transformer: Predictor,
    text: TextFeatures | Condition,
    schedule: Schedule,
    bits: Sequence[Tensor],
    rounds: int,
    *,
    both: TextFeatures | Condition | None = None,
    guidance: float = 1.0,
    where: Sequence[Tensor] | None = None,
    latent: Tensor | None = None,
) -> Refined:
    """Turns over the bits that are unlikely, until a round finds none.

    A picture's bits hang neither on the others of the batch nor, once none of its own is unlikely, on the rounds left.

    Args:
        transformer: in evaluation mode.
        text: B prompts, or what the transformer has made of them.
        schedule: scales of the pictures.
        bits: per scale (B, d, h, w) bool.
        rounds: at most so many times, 1 or more.
        both: the same of those prompts and of B to guide away from; None guides nothing.
        guidance: of the logits.
        where: per scale (1, 1, h, w) bool, positions that may change; None is all.
        latent: (B, d, H, W) what the bits were quantised from. Later scales are then quantised anew after what has been
            turned over, so that the sum stays near it. Bits that were drawn have none: they are what is meant, and
            quantised to their own sum they would only undo what has changed.
    """
    cell = schedule.cell
    start = _positions(bits, cell)
    now, turned = start, torch.zeros_like(start)
    may_change = None if where is None else _positions([_of_all(there, bits[0]) for there in where], cell)
    sure = torch.full((schedule.positions, 1), SURE, device=start.device)
    sure[schedule.slices[-1]] = SURE_OF_FINE
    settled = torch.zeros(len(start), dtype=torch.bool, device=start.device)
    likelihoods: list[Tensor] = []
    gain = torch.zeros(len(start), device=start.device)
    for number in range(rounds):
        guided = len(schedule) if number else _coarse(schedule)
        against, plainly = _against(transformer, text, both, schedule, now, guidance, guided)
        unlikely = against > sure + number * SURER
        unlikely = unlikely if may_change is None else unlikely & may_change
        likelihood = -F.softplus(plainly).flatten(1).mean(1)
        risen = (plainly * unlikely).flatten(1).mean(1)  # log p of the other value less log p of this one: the logit
        likelihoods.append(likelihood.masked_fill(settled, torch.nan))
        gain = torch.where(settled, gain, likelihood - likelihoods[0] + risen)
        if number > 0 or both is None:  # later rounds look as this one, and ask for more
            settled = settled | ~unlikely.flatten(1).any(1)
            if settled.all():
                break
        now, turned = now ^ unlikely, turned | unlikely
        if latent is not None:
            grids = (_grids(positions, schedule) for positions in (now, turned))
            now = _positions(_requantised(latent, schedule, *grids), cell)
    found = _grids(now, schedule)
    changed = torch.stack([(a != b).flatten(1).sum(1) for a, b in zip(found, bits, strict=True)], dim=1)
    return Refined(found, changed, torch.stack(likelihoods, dim=1), gain)


def _of_all(there: Tensor, like: Tensor) -> Tensor:
    """Positions (1, 1, h, w) as bits (1, d, h, w) of as many channels."""
    return there.expand(-1, like.shape[1], -1, -1)


def _positions(grids: Sequence[Tensor], cell: int) -> Tensor:
    """(B, L, K) of each scale's (B, d, h, w)."""
    return torch.cat([to_positions(grid, cell) for grid in grids], dim=1)


def _grids(positions: Tensor, schedule: Schedule) -> list[Tensor]:
    """The inverse of `_positions`."""
    places = zip(schedule.slices, schedule.sizes, strict=True)
    return [to_grid(positions[:, at], size, schedule.cell) for at, size in places]


def _requantised(latent: Tensor, schedule: Schedule, bits: Sequence[Tensor], turned: Sequence[Tensor]) -> list[Tensor]:
    """The bits of a latent, but for those that were turned over: later scales express what is left after them."""
    found: list[Tensor] = []

    def keep_turned(fresh: Tensor, scale: int) -> Tensor:
        found.append(torch.where(turned[scale], bits[scale], fresh))
        return found[-1]

    for _ in pyramid.walk(latent, schedule, keep_turned):
        pass
    return found


def _coarse(schedule: Schedule) -> int:
    """How many scales the first round guides."""
    return sum(at.stop <= COARSE * schedule.positions for at in schedule.slices)


def _against(
    transformer: Predictor,
    text: TextFeatures | Condition,
    both: TextFeatures | Condition | None,
    schedule: Schedule,
    bits: Tensor,
    guidance: float,
    guided: int,
) -> tuple[Tensor, Tensor]:
    """What the model holds against bits (B, L, K): the logit of the other value minus that of this one.

    Args: as `refine`; so many scales are `guided`.

    Returns:
        (B, L, K), and the same without guidance.
    """
    batch, _, known = bits.shape
    seen = pyramid.inputs_from_bits(_grids(bits, schedule), schedule)
    nothing = torch.zeros(batch, 0, known, device=bits.device)
    inputs = _positions(seen, schedule.cell) if seen else nothing
    inputs = widened_positions(inputs, transformer.bits_per_position)

    def of_one(inputs: Tensor, text: TextFeatures | Condition, schedule: Schedule) -> Tensor:
        pairs = torch.unflatten(logits_in_use(transformer(inputs, text, schedule), known), -1, (-1, 2))
        return pairs[..., 1] - pairs[..., 0]

    coarse = replace(schedule, sizes=schedule.sizes[:guided])
    count = coarse.positions
    if both is None or not guided:
        conditional = logits = of_one(inputs, text, schedule)
    elif guided == len(schedule) or waits_for_calls(bits.device, batch * schedule.positions):
        # in one pass, also where what is not used costs nothing
        conditional, unconditional = of_one(inputs.repeat(2, 1, 1), both, schedule).chunk(2)
        logits = _guided(conditional, unconditional[:, :count], guidance)
    else:
        conditional = of_one(inputs, text, schedule)
        unconditional = of_one(inputs[:, : count - 1], both.part(slice(batch, None)), coarse)
        logits = _guided(conditional, unconditional, guidance)
    return torch.where(bits, -logits, logits), torch.where(bits, -conditional, conditional)


def _guided(conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
    """Logits (B, L, K) of which the first are guided: those that `unconditional` has."""
    count = unconditional.shape[1]
    first = torch.lerp(unconditional, conditional[:, :count], guidance)
    return torch.cat((first, conditional[:, count:]), dim=1)
