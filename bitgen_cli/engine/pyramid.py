"""THE walk over scales, written once: what remains, what is added, what the next scale sees.

The tokenizer, the training input and the sampler all walk here. A latent picture is the sum over scales of codes
resampled to the full grid; each scale quantises what the sum so far has left over.
Source: INFINITY_FORMAT sections 3, 5 and 6.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bitgen_cli.engine.bits import codes, quantise
from bitgen_cli.engine.scales import Schedule

ChangeBits = Callable[[Tensor, int], Tensor]
"""Bits of one scale (B, C, h, w) and its index, to the bits that are passed on (self-correction's flips)."""


def residual_at(latent: Tensor, total: Tensor | None, size: tuple[int, int]) -> Tensor:
    """What the scale of that size has to express: the latent minus the sum so far, reduced by area.

    Args:
        latent: (B, C, H, W) what the autoencoder made.
        total: (B, C, H, W) sum of the scales so far; None before the first.
        size: (h, w) in latent positions.

    Returns:
        (B, C, h, w).
    """
    residual = latent if total is None else latent - total
    return residual if residual.shape[-2:] == size else F.interpolate(residual, size=size, mode="area")


def accumulate(total: Tensor | None, scale_codes: Tensor, full: tuple[int, int]) -> Tensor:
    """The sum so far with one more scale: its codes resampled to the full grid (trilinear over one frame = bilinear).

    Args:
        total: (B, C, H, W), or None before the first scale.
        scale_codes: (B, C, h, w).
        full: (H, W) in latent positions.
    """
    grown = resample(scale_codes, full)
    return grown if total is None else total + grown


def next_input(total: Tensor, size: tuple[int, int]) -> Tensor:
    """What the transformer reads before predicting the scale of that size: the sum so far, resampled.

    Trilinear also when shrinking, without antialiasing, as upstream feeds its transformer.

    Args:
        total: (B, C, H, W).
        size: (h, w) in latent positions.

    Returns:
        (B, C, h, w).
    """
    return resample(total, size)


def resample(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resampling, corners not aligned; unchanged when the size already fits."""
    if grid.shape[-2:] == size:
        return grid
    return F.interpolate(grid, size=size, mode="bilinear", align_corners=False)


def walk(
    latent: Tensor, schedule: Schedule, change: ChangeBits | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Bits of each scale, coarsest first, and the sum including that scale.

    With `change`, every scale is quantised against a sum that contains the changed bits (re-quantised targets), while
    the bits yielded are never the changed ones.

    Args:
        latent: (B, C, H, W).
        schedule: its `latent_sizes` are walked; the last must be (H, W).
        change: what to do to a scale's bits before they are added; None leaves them.

    Yields:
        (B, C, h, w) bool and (B, C, H, W).
    """
    total: Tensor | None = None
    for k, size in enumerate(schedule.latent_sizes):
        scale_bits = quantise(residual_at(latent, total, size))
        passed_on = scale_bits if change is None else change(scale_bits, k)
        total = accumulate(total, codes(passed_on, latent.dtype), schedule.latent_sizes[-1])
        yield scale_bits, total


def sums(bits: list[Tensor], schedule: Schedule, dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
    """The sum after each scale of known bits, (B, C, H, W), coarsest first; bits (B, C, h, w) bool per scale."""
    total: Tensor | None = None
    for scale_bits in bits:
        total = accumulate(total, codes(scale_bits, dtype), schedule.latent_sizes[-1])
        yield total


def encode(latent: Tensor, schedule: Schedule) -> tuple[list[Tensor], Tensor]:
    """Bits per scale, each (B, C, h, w) bool, and the quantised sum (B, C, H, W) of a latent (B, C, H, W)."""
    steps = list(walk(latent, schedule))
    return [bits for bits, _ in steps], steps[-1][1]


def decode(bits: list[Tensor], schedule: Schedule, dtype: torch.dtype = torch.float32) -> Tensor:
    """The quantised sum (B, C, H, W) of bits per scale, each (B, C, h, w) bool: the inverse of `encode`."""
    *_, total = sums(bits, schedule, dtype)
    return total


def teacher_inputs(
    latent: Tensor, schedule: Schedule, change: ChangeBits | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Targets and inputs of a training step.

    Args:
        latent: (B, C, H, W).
        change: as in `walk`: flips whose effects the following targets must correct.

    Returns:
        Target bits per scale, each (B, C, h, w) bool, and the inputs of scales 1..K-1, each (B, C, h, w).
    """
    steps = list(walk(latent, schedule, change))
    later_sizes = schedule.latent_sizes[1:]
    inputs = [next_input(total, size) for (_, total), size in zip(steps, later_sizes, strict=False)]
    return [bits for bits, _ in steps], inputs


def inputs_from_bits(bits: list[Tensor], schedule: Schedule, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Inputs of scales 1..K-1, each (B, C, h, w), for known bits per scale: what sampling feeds for the same bits."""
    later_sizes = schedule.latent_sizes[1:]
    totals = sums(bits, schedule, dtype)
    return [next_input(total, size) for total, size in zip(totals, later_sizes, strict=False)]
