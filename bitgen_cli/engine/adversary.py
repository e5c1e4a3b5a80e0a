"""The adversary of a tokenizer's training: a discriminator of patches, its loss, and how much it weighs.

Source: PatchGAN (Isola et al. 2017, arXiv 1611.07004, section 3.2.2) with the hinge loss and the adaptive weight of
VQGAN (arXiv 2012.09841, equation 7). It normalises each picture for itself, so that how a batch is split changes
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.grad import conv2d_weight

LEAST_WEIGHT, MOST_WEIGHT = 1e-4, 1e4
"""Added to the adversary's gradient norm, and the most that it may weigh."""


class PatchDiscriminator(nn.Module):
    """Pictures (B, 3, height, width) to a verdict on each patch, (B, 1, h, w): high for real ones.

    Args:
        channels: of the first layer; doubled by each further one, up to eight times.
        layers: that halve the picture, at least 1.
    """

    def __init__(self, channels: int, layers: int) -> None:
        super().__init__()
        widths = [channels * min(2**layer, 8) for layer in range(layers + 1)]
        found: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for layer in range(1, layers + 1):
            before, after = widths[layer - 1], widths[layer]
            stride = 2 if layer < layers else 1
            found += [
                nn.Conv2d(before, after, 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(math.gcd(after, 32), after),
                nn.LeakyReLU(0.2),
            ]
        found.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.layers = nn.Sequential(*found)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Fresh weights as published: normal, deviation 0.02."""
        for module in self.layers:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, image: Tensor) -> Tensor:
        verdict: Tensor = self.layers(image)
        return verdict

    def unmoved(self, image: Tensor) -> Tensor:
        """The same, with gradients for the pictures and none for the weights."""
        fixed = {name: parameter.detach() for name, parameter in self.named_parameters()}
        verdict: Tensor = functional_call(self, fixed, (image,))
        return verdict


def least_side(layers: int) -> int:
    """Pixels along the shorter side of a picture that a discriminator of so many layers needs."""
    return 3 << layers


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss of verdicts on real and on reconstructed pictures; 0 when all are sure and right."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def adaptive_weight(
    of_reconstruction: Sequence[Tensor],
    of_adversary: Sequence[Tensor],
    features: Sequence[Tensor],
    last: nn.Conv2d,
    mean_over_ranks: Callable[[Tensor], Tensor],
) -> Tensor:
    """How much the adversarial loss has to weigh to move the decoder's last layer as much as the reconstruction does.

    The gradients of the layer's weight are computed from those of what it made, so that nothing around the weight
    itself sees a backward pass.

    Args:
        of_reconstruction, of_adversary: gradients of the two losses, each (B, 3, height, width), of images that the
            last layer made.
        features: each (B, channels, height, width), what it made them of.
        last: the layer, 3x3 with padding 1.
        mean_over_ranks: of a tensor, the mean over the processes that share a batch.

    Returns:
        Scalar without gradient, 0 ... 1e4.
    """
    norms = []
    for gradients in (of_reconstruction, of_adversary):
        parts = [
            conv2d_weight(seen.detach().float(), last.weight.shape, gradient.float(), padding=1)  # type: ignore[no-untyped-call]
            for seen, gradient in zip(features, gradients, strict=True)
        ]
        norms.append(mean_over_ranks(torch.stack(parts).sum(0)).norm())
    ratio: Tensor = norms[0] / (norms[1] + LEAST_WEIGHT)
    return ratio.clamp(max=MOST_WEIGHT)
