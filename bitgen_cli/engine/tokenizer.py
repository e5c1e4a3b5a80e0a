"""The visual tokenizer: autoencoder and pyramid together, images to bits and back.

It may be used with several numbers of bits d (active_bits.py): shapes below have d channels instead of C.
"""

from __future__ import annotations

from torch import Tensor, nn

from bitgen_cli.config import TokenizerConfig
from bitgen_cli.engine import pyramid
from bitgen_cli.engine.active_bits import active, widened
from bitgen_cli.engine.autoencoder import Autoencoder
from bitgen_cli.engine.bands import decode_in_bands
from bitgen_cli.engine.scales import Schedule


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

    def decode(self, total: Tensor, *, in_bands: bool = False) -> Tensor:
        """Image (B, 3, height, width) in [-1, 1] of a quantised sum (B, d, H, W).

        Args:
            in_bands: of rows, in less than half of the memory, rounded otherwise and without gradient (bands.py).
        """
        total = widened(total, self.config.bits)
        return decode_in_bands(self.autoencoder.decoder, total) if in_bands else self.autoencoder.decode(total)

    def decode_bits(self, bits: list[Tensor], schedule: Schedule, *, in_bands: bool = False) -> Tensor:
        """Image (B, 3, height, width) in [-1, 1] of bits per scale, each (B, d, h, w) bool; see `decode`."""
        dtype = next(self.parameters()).dtype
        return self.decode(pyramid.decode(bits, schedule).to(dtype), in_bands=in_bands)
