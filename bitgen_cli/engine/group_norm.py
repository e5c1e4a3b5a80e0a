"""GroupNorm of large pictures: exact over parts of one, and quick on a GPU.

torch's own has a GPU's every group summed up by one of its many processors, which at 1024x1024 is half of the decoder's
time; on a CPU, channels-last, its scale is off by 2e-4 there. Here channels are summed up first, then put together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Affine(NamedTuple):
    """What a norm multiplies the channels of one picture by, and adds then: (1, C, 1, 1) each, float32."""

    scale: Tensor
    shift: Tensor


def normed(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """norm(x) of a picture (B, C, h, w) up to rounding; torch's own but for one picture on a GPU without gradients."""
    if torch.is_grad_enabled() or x.device.type != "cuda" or x.shape[0] != 1:
        y: Tensor = norm(x)
        return y
    return scaled(x, affine_of(norm, (x,)))


def scaled(x: Tensor, affine: Affine) -> Tensor:
    """x * scale + shift of a picture (1, C, h, w), computed in float32 and rounded once."""
    scale, shift = affine.scale.flatten(), affine.shift.flatten()
    # with a mean of 0 and a variance of 1 this is one pass over x, whatever its number type
    zero, one = torch.zeros_like(scale), torch.ones_like(scale)
    return torch.batch_norm(x, scale, shift, zero, one, training=False, momentum=0.0, eps=0.0, cudnn_enabled=False)


def affine_of(norm: nn.GroupNorm, parts: Sequence[Tensor]) -> Affine:
    """The norm of one picture.

    Mean and variance are put together from those of channels in parts, which need no difference of large sums.
    Source: Chan, Golub and LeVeque 1983, equation 2.1, for many parts.

    Args:
        norm: its groups and weights.
        parts: the picture from top to bottom, each (1, C, rows, width).
    """
    height = sum(part.shape[2] for part in parts)
    shares = torch.tensor([part.shape[2] / height for part in parts], device=parts[0].device).view(-1, 1)
    means, variances = map(torch.stack, zip(*map(_moments, parts), strict=True))
    mean = (shares * means).sum(0)
    variance = (shares * (variances + (means - mean).square())).sum(0)

    means, variances = mean.view(norm.num_groups, -1), variance.view(norm.num_groups, -1)
    mean = means.mean(1, keepdim=True)
    variance = (variances + (means - mean).square()).mean(1, keepdim=True)

    by_group = (norm.num_groups, -1)
    scale = norm.weight.float().view(by_group) * (variance + norm.eps).rsqrt()
    shift = norm.bias.float().view(by_group) - mean * scale
    return Affine(scale.view(1, -1, 1, 1), shift.view(1, -1, 1, 1))


def _moments(part: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (C,) of a part's channels, float32."""
    if part.device.type == "cuda":
        mean, inverse = torch.batch_norm_stats(part, 0.0)  # one pass; 0 for a channel that is the same everywhere
        return mean, torch.where(inverse > 0, inverse.square().reciprocal(), 0.0)
    mean = part.mean((0, 2, 3), keepdim=True, dtype=torch.float32)
    return mean.flatten(), (part - mean).square_().mean((0, 2, 3))
