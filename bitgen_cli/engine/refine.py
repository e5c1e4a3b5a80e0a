"""Self-correction of finished pictures: bits that the model finds unlikely are turned over, without drawing again.

The model has learned to go on from pictures with wrong bits (self_correction.py), so one teacher-forced pass tells for
every bit how likely it is after what the coarser scales hold. Of a picture that was just drawn that is known: drawing
has chosen its bits by it. Guidance sees more, and takes as long again: the first round guides the first scales, where a
wrong bit does most and positions are few. The next round looks at all of them anew, after what has changed, and guides
all. Of a picture that was tokenized, later scales are quantised anew after each round.
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
from bitgen_cli.engine.transformer import Condition, Predictor

SURE, SURE_OF_FINEST = 3.0, 1.5
"""Difference of the logits against a bit, in the first round, from which it is turned over: a probability of 4.7 % on
the first scale, and of 18 % on the last, after which nothing follows that would have been chosen otherwise."""
SURER = 1.0
"""What each further round asks for more, so that fewer bits change in it."""
COARSE = 0.1
"""Share of all positions that the scales have which the first round guides."""


@dataclass(frozen=True)
class Said:
    """What the model says of bits that are known, each after the coarser scales: the logit of "1" minus that of "0".

    Attributes:
        conditional: (B, L, K).
        unconditional: (B, l, K) of the first positions, with what is guided away from; None where nothing is.
    """

    conditional: Tensor
    unconditional: Tensor | None


def of_one(logits: Tensor) -> Tensor:
    """Of logits (B, L, 2K) that of "1" minus that of "0", (B, L, K)."""
    pairs = torch.unflatten(logits, -1, (-1, 2))
    return pairs[..., 1] - pairs[..., 0]


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
    prompts: Condition,
    schedule: Schedule,
    bits: Sequence[Tensor],
    rounds: int,
    *,
    guidance: float = 1.0,
    said: Said | None = None,
    where: Sequence[Tensor] | None = None,
    latent: Tensor | None = None,
) -> Refined:
    """Turns over the bits that are unlikely, until a round finds none.

    A picture's bits hang neither on the others of the batch nor, once none of its own is unlikely, on the rounds left.

    Args:
        transformer: in evaluation mode.
        prompts: what the transformer has made of B prompts, or of those and B more to guide away from.
        schedule: scales of the pictures.
        bits: per scale (B, d, h, w) bool.
        rounds: at most so many times, 1 or more.
        guidance: of the logits, where there are prompts to guide away from.
        said: of these bits, if it is known: the first round then takes no time.
        where: per scale (1, 1, h, w) bool, positions that may change; None is all.
        latent: (B, d, H, W) what the bits were quantised from. Later scales are then quantised anew after what has been
            turned over, so that the sum stays near it. Bits that were drawn have none: they are what is meant, and
            quantised to their own sum they would only undo what has changed.
    """
    cell = schedule.cell
    start = _positions(bits, cell)
    guides = len(prompts.pooled) > len(start)
    now, turned = start, torch.zeros_like(start)
    may_change = None if where is None else _positions([_of_all(there, bits[0]) for there in where], cell)
    counts = torch.tensor(schedule.counts)
    sure = torch.tensor(thresholds(schedule)).repeat_interleave(counts)[:, None].to(start.device)
    settled = torch.zeros(len(start), dtype=torch.bool, device=start.device)
    likelihoods: list[Tensor] = []
    gain = torch.zeros(len(start), device=start.device)
    for number in range(rounds):
        guided = schedule if number else first_guided(schedule)
        if number or said is None:
            said = _ask(transformer, prompts, schedule, now, guided if guides else None)
        plainly = _against(said.conditional, now)
        against = _against(_guided(said, guided.positions, guidance), now)
        unlikely = against > sure + number * SURER
        unlikely = unlikely if may_change is None else unlikely & may_change
        likelihood = -F.softplus(plainly).flatten(1).mean(1)
        risen = (plainly * unlikely).flatten(1).mean(1)  # log p of the other value less log p of this one: the logit
        likelihoods.append(likelihood.masked_fill(settled, torch.nan))
        gain = torch.where(settled, gain, likelihood - likelihoods[0] + risen)
        if number > 0 or not guides:  # later rounds look as this one, and ask for more
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


def thresholds(schedule: Schedule) -> list[float]:
    """Of each scale from SURE to SURE_OF_FINEST: the difference of logits that turns a bit over in the first round."""
    return torch.linspace(SURE, SURE_OF_FINEST, len(schedule)).tolist()


def first_guided(schedule: Schedule) -> Schedule:
    """The scales that the first round guides."""
    coarse = sum(at.stop <= COARSE * schedule.positions for at in schedule.slices)
    return replace(schedule, sizes=schedule.sizes[:coarse])


def _ask(
    transformer: Predictor, prompts: Condition, schedule: Schedule, bits: Tensor, guided: Schedule | None
) -> Said:
    """A pass over bits (B, L, K), and over those of the scales that are `guided`."""
    batch, _, known = bits.shape
    seen = pyramid.inputs_from_bits(_grids(bits, schedule), schedule)
    nothing = torch.zeros(batch, 0, known, device=bits.device)
    inputs = _positions(seen, schedule.cell) if seen else nothing
    inputs = widened_positions(inputs, transformer.bits_per_position)
    readings = [(prompts.part(slice(batch)), schedule)]
    if guided is not None and len(guided):
        readings.append((prompts.part(slice(batch, None)), guided))
    conditions, schedules = zip(*readings, strict=True)
    logits = transformer.read(inputs, conditions, schedules)
    conditional, *unconditional = [of_one(logits_in_use(of, known)) for of in logits]
    return Said(conditional, unconditional[0] if unconditional else None)


def _guided(said: Said, positions: int, guidance: float) -> Tensor:
    """What is said (B, L, K), the first positions of it with guidance where there is any."""
    if said.unconditional is None:
        return said.conditional
    at = slice(positions)
    first = torch.lerp(said.unconditional[:, at], said.conditional[:, at], guidance)
    return torch.cat((first, said.conditional[:, positions:]), dim=1)


def _against(logits: Tensor, bits: Tensor) -> Tensor:
    """The logit of the other value minus that of this one, (B, L, K), of what `of_one` gives."""
    return torch.where(bits, -logits, logits)
