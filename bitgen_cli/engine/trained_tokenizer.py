"""The forward pass of a tokenizer's training in one module, so that it can be wrapped whole."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bitgen_cli.engine import pyramid
from bitgen_cli.engine.bits import active, widened
from bitgen_cli.engine.scales import Schedule
from bitgen_cli.engine.tokenizer import Tokenizer


@dataclass(frozen=True)
class Reconstruction:
    """What a picture becomes with some number of bits d.

    Attributes:
        image: (B, 3, height, width) float32, not clamped.
        latent: (B, d, H, W) float32 before quantisation.
        total: (B, d, H, W) its quantised sum, without gradient.
    """

    image: Tensor
    latent: Tensor
    total: Tensor

    @property
    def bits(self) -> int:
        """d."""
        return self.latent.shape[1]


class TrainedTokenizer(nn.Module):
    """What stage `tokenizer` trains.

    Args:
        tokenizer: autoencoder and quantiser.
        precision: `fp32` or `bf16`, the number type of the convolutions.
    """

    def __init__(self, tokenizer: Tokenizer, precision: str) -> None:
        super().__init__()
        self.tokenizer = tokenizer.requires_grad_(True)
        self._bf16 = precision == "bf16"

    def forward(self, image: Tensor, schedule: Schedule, bits: tuple[int, ...]) -> list[Reconstruction]:
        """The image decoded again, once with each number of bits, from one pass through the encoder.

        The decoder sees the quantised sum; its gradient goes straight to the latent, past all scales at once.

        Args:
            image: (B, 3, height, width) in [-1, 1].
            schedule: its scales.
            bits: numbers of bits d.
        """
        autocast = torch.autocast(image.device.type, torch.bfloat16, enabled=self._bf16)
        autoencoder = self.tokenizer.autoencoder
        with autocast:
            whole = autoencoder.encode(image)
        found = []
        for count in bits:
            latent = active(whole.float(), count)
            with torch.no_grad():
                _, total = pyramid.encode(latent, schedule)
            straight = latent + (total - latent).detach()
            with autocast:
                decoded = autoencoder.decoder(widened(straight, whole.shape[1]))
            found.append(Reconstruction(decoded.float(), latent, total))
        return found
