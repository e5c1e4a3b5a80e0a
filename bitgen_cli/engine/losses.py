"""What training minimises, and the two measures of a reconstruction.

Bitwise cross-entropy: INFINITY_FORMAT section 6 (trainer.py). Entropy of BSQ: arXiv 2406.07548, section 4. SSIM: Wang
et al. 2004, Gaussian window of 11 with sigma 1.5.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from bitgen_cli.config import SubjectTraining, TokenizerTraining, TransformerTraining
from bitgen_cli.engine.perceptual import Perceptual
from bitgen_cli.engine.scales import Schedule

MeanOverRanks = Callable[[Tensor], Tensor]
"""A tensor to its mean over the processes that share a batch, without gradient."""


def position_weights(schedule: Schedule, weighting: str) -> Tensor:
    """Weight (L,) of each position's loss, summing to 1.

    Args:
        weighting: `positions` gives all the same; `published` 1 / sqrt(h w) of their scale (reweight_loss_by_scale);
            `scales` 1 / (h w), so that every scale weighs the same.
    """
    counts = torch.tensor(schedule.counts).float()
    per_scale = counts ** {"positions": 0.0, "published": -0.5, "scales": -1.0}[weighting]
    weights = per_scale.repeat_interleave(torch.tensor(schedule.counts))
    return weights / weights.sum()


def bit_loss(
    logits: Tensor, targets: Tensor, schedule: Schedule, config: TransformerTraining | SubjectTraining
) -> tuple[Tensor, Tensor, Tensor]:
    """Bitwise cross-entropy and how well each scale is predicted.

    The cross-entropy over a bit's two logits is softplus of their signed difference.

    Args:
        logits: (B, L, 2K).
        targets: (B, L, K) bool.
        schedule: the scales of L.
        config: scale_weighting and bit_loss are used.

    Returns:
        The loss (scalar); bit accuracy per scale (S,) in [0, 1]; mean cross-entropy per bit and scale (S,) in nats.
        The last two carry no gradient.
    """
    pairs = torch.unflatten(logits.float(), -1, (-1, 2))
    margin = pairs[..., 1] - pairs[..., 0]
    margin = torch.where(targets, margin, -margin)
    per_bit = F.softplus(-margin)
    weights = position_weights(schedule, config.scale_weighting).to(logits.device)
    reduced = per_bit.mean(-1) if config.bit_loss == "mean" else per_bit.sum(-1)
    loss = (reduced * weights).sum(-1).mean()
    with torch.no_grad():
        right = (margin > 0).float().mean((0, 2))
        nats = per_bit.mean((0, 2))
        accuracy = torch.stack([right[s].mean() for s in schedule.slices])
        per_scale = torch.stack([nats[s].mean() for s in schedule.slices])
    return loss, accuracy, per_scale


def distillation_loss(
    logits: Tensor, margins: Tensor, schedule: Schedule, config: TransformerTraining | SubjectTraining
) -> Tensor:
    """How far a model's bit distributions are from those of its teacher: Kullback-Leibler divergence, 0 when equal.

    Args:
        logits: (B, L, 2K).
        margins: (B, L, K) the teacher's logit of "bit = 1" minus that of "bit = 0".
        schedule: the scales of L.
        config: scale_weighting and bit_loss are used, as in `bit_loss`.

    Returns:
        Scalar, in nats.
    """
    pairs = torch.unflatten(logits.float(), -1, (-1, 2))
    own = pairs[..., 1] - pairs[..., 0]
    wanted = margins.float()
    one = torch.sigmoid(wanted)
    per_bit = F.softplus(own) - F.softplus(wanted) - one * (own - wanted)
    weights = position_weights(schedule, config.scale_weighting).to(logits.device)
    reduced = per_bit.mean(-1) if config.bit_loss == "mean" else per_bit.sum(-1)
    return (reduced * weights).sum(-1).mean()


def psnr(image: Tensor, other: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (B,) in dB of images (B, 3, H, W) in [-1, 1]; equal images give infinity."""
    error = (image.float() - other.float()).square().mean((1, 2, 3))
    return 10 * torch.log10(4 / error)


@lru_cache(maxsize=4)
@torch.inference_mode(False)
def _gaussian(size: int, sigma: float) -> Tensor:
    """The window (size,), kept: made as an ordinary tensor, so that a later training may use it too."""
    offsets = torch.arange(size, dtype=torch.float32) - (size - 1) / 2
    window = torch.exp(-offsets.square() / (2 * sigma**2))
    return window / window.sum()


def ssim(image: Tensor, other: Tensor) -> Tensor:
    """Structural similarity (B,), at most 1, of images (B, 3, H, W) in [-1, 1], at least 11 pixels a side."""
    channels = image.shape[1]
    window = _gaussian(11, 1.5).to(image.device)
    rows = window.view(1, 1, -1, 1).expand(channels, 1, -1, 1)
    columns = window.view(1, 1, 1, -1).expand(channels, 1, 1, -1)

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, rows, groups=channels), columns, groups=channels)

    # intensities from 0 up, as the measure's luminance term needs them
    x, y = (image.float() + 1) / 2, (other.float() + 1) / 2
    mean_x, mean_y = blur(x), blur(y)
    variance_x = blur(x * x) - mean_x**2
    variance_y = blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    )
    return similarity.mean((1, 2, 3))


def one_rank(mean: Tensor) -> Tensor:
    """The mean over the processes that share a batch, where there is one alone."""
    return mean


def bit_entropy(latent: Tensor, mean_over_ranks: MeanOverRanks = one_rank) -> tuple[Tensor, Tensor]:
    """How unsure single bits are, and how evenly the bit of each place and channel is used; both in bits, [0, 1].

    Usage is taken place by place: over all places at once a fixed pattern would pass for evenly used bits.

    A bit's probability is the sigmoid of twice its latent value in units of a code, 1/sqrt(d).

    Args:
        latent: (B, d, H, W).
        mean_over_ranks: usage is that of the whole batch, which several processes may share.
    """
    probability = torch.sigmoid(2 * math.sqrt(latent.shape[1]) * latent.float())
    mean = probability.mean(0)
    whole = mean + (mean_over_ranks(mean.detach()) - mean).detach()
    return _binary_entropy(probability).mean(), _binary_entropy(whole).mean()


def _binary_entropy(p: Tensor) -> Tensor:
    p = p.clamp(1e-6, 1 - 1e-6)
    return -(p * p.log2() + (1 - p) * (1 - p).log2())


def reconstruction_loss(
    image: Tensor, reconstruction: Tensor, config: TokenizerTraining, perceptual: Perceptual | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """How unlike a picture its reconstruction is: L1, L2, structure, and LPIPS where it is given.

    Args:
        image, reconstruction: (B, 3, height, width) in [-1, 1].
        config: the weights.
        perceptual: None leaves LPIPS out.

    Returns:
        The loss (scalar) and its detached parts `l1`, `l2`, `structure`, `perceptual`.
    """
    difference = image - reconstruction
    parts = {
        "l1": difference.abs().mean(),
        "l2": (difference if config.l2_weight else difference.detach()).square().mean(),
        "structure": 1 - ssim(image, reconstruction).mean(),
    }
    loss = (
        config.l1_weight * parts["l1"]
        + config.l2_weight * parts["l2"]
        + config.structural_weight * parts["structure"]
    )
    if perceptual is not None:
        parts["perceptual"] = perceptual(image, reconstruction)
        loss = loss + config.perceptual_weight * parts["perceptual"]
    return loss, {name: part.detach() for name, part in parts.items()}


def quantiser_loss(
    latent: Tensor, total: Tensor, config: TokenizerTraining, mean_over_ranks: MeanOverRanks = one_rank
) -> tuple[Tensor, dict[str, Tensor]]:
    """What is asked of a latent: sure and evenly used bits, and to be near its quantised sum.

    Args:
        latent: (B, d, H, W) before quantisation.
        total: (B, d, H, W) quantised sum; treated as a constant.
        config: the weights.
        mean_over_ranks: as in `bit_entropy`.

    Returns:
        The loss (scalar) and its detached parts `bit_entropy`, `bit_usage`, `commitment`.
    """
    unsure, usage = bit_entropy(latent, mean_over_ranks)
    commitment = (latent - total.detach()).square().sum(1).mean()
    loss = config.entropy_weight * (unsure - usage) + config.commitment_weight * commitment
    parts = {"bit_entropy": unsure, "bit_usage": usage, "commitment": commitment}
    return loss, {name: part.detach() for name, part in parts.items()}
