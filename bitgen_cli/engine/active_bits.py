"""One model used with several numbers of bits d: which are allowed, and what is computed with the first d channels.

A latent's first d of C channels are quantised to +-1/sqrt(d) each, scaled by sqrt(C/d) before. Since codes and latent
are scaled alike, a channel's bits are those it has among all, and pictures of fewer bits are the beginning of those of
more. Decoder and transformer see zeros in place of the other channels; what they see is longer the fewer bits there
are, which tells them d.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bitgen_cli.config import TokenizerConfig
from bitgen_cli.errors import UsageError


def bits_in_use(config: TokenizerConfig, asked: int | None) -> int:
    """The number of bits d a tokenizer is used with: the one asked for, or the most it can be used with.

    Raises:
        UsageError: it was not made for that number.
    """
    if asked is None:
        return config.most_bits
    if asked not in config.bit_counts:
        known = ", ".join(map(str, config.bit_counts))
        raise UsageError(f"this model cannot be used with {asked} bits", f"it was trained for: {known}")
    return asked


def draw(counts: tuple[int, ...], generator: torch.Generator) -> int:
    """One of the numbers of bits, each as likely; nothing is drawn where there is one alone."""
    return counts[0] if len(counts) == 1 else counts[int(torch.randint(len(counts), (), generator=generator))]


def active(latent: Tensor, count: int) -> Tensor:
    """The first d channels of a latent, scaled to the length that all of them have: what is quantised.

    Args:
        latent: (B, C, H, W).
        count: d, 1 ... C; with all channels the latent is returned as it is.

    Returns:
        (B, d, H, W).
    """
    channels = latent.shape[1]
    return latent if count == channels else latent[:, :count] * math.sqrt(channels / count)


def widened(total: Tensor, channels: int) -> Tensor:
    """The sum (B, d, H, W) of a picture's first d channels with zeros for the others, (B, channels, H, W)."""
    return F.pad(total, (0, 0, 0, 0, 0, channels - total.shape[1]))


def widened_positions(inputs: Tensor, channels: int) -> Tensor:
    """The same of what a transformer reads: (..., first channels) to (..., channels)."""
    more = channels - inputs.shape[-1]
    return F.pad(inputs, (0, more)) if more else inputs


def logits_in_use(logits: Tensor, channels: int) -> Tensor:
    """The logits (..., 2 channels) of the first channels of a position, of (..., 2K)."""
    return logits[..., : 2 * channels]
