"""The visual tokenizer: autoencoder and pyramid together, images to bits and back."""

from __future__ import annotations

from torch import Tensor, nn

from bitgen_cli.config import TokenizerConfig
from bitgen_cli.engine import pyramid
from bitgen_cli.engine.autoencoder import Autoencoder
from bitgen_cli.engine.scales import Schedule


class Tokenizer(nn.Module):
    """Images to bits per scale and back.

    Args:
        config: geometry of the autoencoder; its `bits` are the latent channels.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.autoencoder = Autoencoder(config)

    def latent(self, image: Tensor) -> Tensor:
        """What is quantised: (B, C, H, W) of an image (B, 3, height, width) in [-1, 1]."""
        return self.autoencoder.encode(image)

    def encode(self, image: Tensor, schedule: Schedule) -> tuple[list[Tensor], Tensor]:
        """Bits per scale, each (B, C, h, w) bool, and their quantised sum (B, C, H, W).

        Args:
            image: (B, 3, height, width) in [-1, 1], of the size `schedule.pixels(patch_size)`.
        """
        return pyramid.encode(self.latent(image).float(), schedule)

    def decode(self, total: Tensor) -> Tensor:
        """Image (B, 3, height, width) in [-1, 1] of a quantised sum (B, C, H, W)."""
        return self.autoencoder.decode(total)

    def decode_bits(self, bits: list[Tensor], schedule: Schedule) -> Tensor:
        """Image (B, 3, height, width) in [-1, 1] of bits per scale, each (B, C, h, w) bool."""
        dtype = next(self.parameters()).dtype
        return self.decode(pyramid.decode(bits, schedule).to(dtype))
