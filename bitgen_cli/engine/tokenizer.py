"""The visual tokenizer: autoencoder and pyramid together, images to bits and back.

One tokenizer may be used with several numbers of bits d: then only the first d of its C latent channels are quantised,
each to +-1/sqrt(d), and its decoder sees zeros in place of the others.
"""

from __future__ import annotations

from torch import Tensor, nn

from bitgen_cli.config import TokenizerConfig
from bitgen_cli.engine import pyramid
from bitgen_cli.engine.autoencoder import Autoencoder
from bitgen_cli.engine.bits import active, widened
from bitgen_cli.engine.scales import Schedule
from bitgen_cli.errors import UsageError


def bits_in_use(config: TokenizerConfig, asked: int | None) -> int:
    """The number of bits d a tokenizer is used with: the one asked for, or the most it can be used with.

    Raises:
        UsageError: it was not made for that number.
    """
    if asked is None:
        return config.most_bits
    if asked not in config.bit_counts:
        known = " or ".join(map(str, config.bit_counts))
        raise UsageError(f"this model's tokenizer was not trained for {asked} bits", f"it is used with {known}")
    return asked


class Tokenizer(nn.Module):
    """Images to bits per scale and back.

    Args:
        config: geometry of the autoencoder; its `bits` are the latent channels C.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.autoencoder = Autoencoder(config)

    def latent(self, image: Tensor, bits: int | None = None) -> Tensor:
        """What is quantised: (B, d, H, W) of an image (B, 3, height, width) in [-1, 1].

        Args:
            bits: d; None is the most the tokenizer is used with.
        """
        return active(self.autoencoder.encode(image), bits or self.config.most_bits)

    def encode(self, image: Tensor, schedule: Schedule, bits: int | None = None) -> tuple[list[Tensor], Tensor]:
        """Bits per scale, each (B, d, h, w) bool, and their quantised sum (B, d, H, W).

        Args:
            image: (B, 3, height, width) in [-1, 1], of the size `schedule.pixels(patch_size)`.
            bits: d; None is the most the tokenizer is used with.
        """
        return pyramid.encode(self.latent(image, bits).float(), schedule)

    def decode(self, total: Tensor) -> Tensor:
        """Image (B, 3, height, width) in [-1, 1] of a quantised sum (B, d, H, W)."""
        return self.autoencoder.decode(widened(total, self.config.bits))

    def decode_bits(self, bits: list[Tensor], schedule: Schedule) -> Tensor:
        """Image (B, 3, height, width) in [-1, 1] of bits per scale, each (B, d, h, w) bool."""
        dtype = next(self.parameters()).dtype
        return self.decode(pyramid.decode(bits, schedule).to(dtype))
