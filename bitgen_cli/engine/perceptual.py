"""LPIPS (arXiv 1801.03924) through torchmetrics, which is asked for only where the loss has a weight."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bitgen_cli.errors import ResourceError

Perceptual = Callable[[Tensor, Tensor], Tensor]
"""Images and their reconstructions, both (B, 3, height, width) in [-1, 1], to the mean distance (scalar)."""

LEAST_SIDE = 16
"""Pixels along the shorter side of a picture: the network halves it four times."""


def perceptual_distance(device: torch.device) -> Perceptual:
    """The distance of the features of VGG-16, whose weights torchvision downloads the first time.

    Raises:
        ResourceError: torchmetrics or torchvision is not installed, or the weights cannot be had.
    """
    try:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        network = LearnedPerceptualImagePatchSimilarity(net_type="vgg").net
    except ImportError as error:
        raise ResourceError(
            f"the LPIPS loss needs a package that is not installed: {error.name or 'torchvision'}",
            "pip install 'bitgen[lpips]', or set training.tokenizer.perceptual_weight=0",
        ) from error
    except OSError as error:
        raise ResourceError(
            f"the weights of the LPIPS loss cannot be loaded: {error}",
            "download them once with access to the internet, or set training.tokenizer.perceptual_weight=0",
        ) from error
    network = network.to(device).requires_grad_(False).eval()

    def distance(image: Tensor, reconstruction: Tensor) -> Tensor:
        found: Tensor = network(image, reconstruction)
        return found.mean()

    return distance
