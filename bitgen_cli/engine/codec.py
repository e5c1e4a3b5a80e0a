"""A tokenizer at work: pictures to latents and bits to pictures, in the number type and on the device of its choice.

On a CPU a picture's latent is the same to the last bit in whatever company it is encoded. Two things would change the
order in which sums are added up: several cores within one layer, and a small picture all alone, for which there are
other kernels. So each thread computes alone, and a lone picture is encoded twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from bitgen_cli.engine.data import to_float
from bitgen_cli.engine.scales import Schedule
from bitgen_cli.engine.tokenizer import Tokenizer

TOGETHER = 1 << 16
"""Pixels that a CPU's thread encodes together: few enough to stay near the processor."""
ACTIVATIONS = 4 << 30
"""Bytes that the threads of a CPU may take together; with larger pictures there are fewer threads."""


@dataclass(frozen=True)
class Codec:
    """A tokenizer with the bits per latent position, the place and the number type it computes in."""

    tokenizer: Tokenizer
    bits: int
    device: torch.device
    dtype: torch.dtype

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @torch.no_grad()
    def latent(self, pixels: Tensor) -> Tensor:
        """Latents (B, bits, H, W) float32 of pictures (B, 3, h, w) uint8."""
        with self.autocast():
            return self.tokenizer.latent(to_float(pixels.to(self.device)), self.bits).float()

    @torch.inference_mode()
    def decode(self, bits: list[Tensor], entry: Schedule) -> Tensor:
        """Pictures (B, 3, h, w) float32 on the CPU of bits per scale."""
        with self.autocast():
            images = self.tokenizer.decode_bits([grid.to(self.device) for grid in bits], entry)
        return images.float().cpu()


@dataclass(frozen=True)
class Division:
    """How the work of encoding is divided.

    Attributes:
        threads: that encode at the same time.
        cores: that each of them computes with.
        at_once: pictures that each takes together; None is all it is given.
    """

    threads: int = 1
    cores: int = 1
    at_once: int | None = None

    @staticmethod
    def of(device: torch.device, base_channels: int, pixels: int, most: int | None = None) -> Division:
        """The division on a device.

        On a CPU each thread computes alone, which needs no waiting for each other at every layer as many threads within
        one layer do, and takes a few pictures at a time. On a GPU there is one.

        Args:
            base_channels: of the tokenizer.
            pixels: of the largest picture.
            most: pixels that a GPU encodes together; None is no limit.
        """
        cores = torch.get_num_threads()
        if device.type != "cpu":
            return Division(1, cores, None if most is None else max(1, most // pixels))
        # four tensors of the widest layer in float32
        widest = 4 * 4 * base_channels * max(pixels, TOGETHER)
        threads = max(1, min(cores, ACTIVATIONS // widest))
        at_once = max(1, TOGETHER // pixels)
        return Division(threads, max(1, cores // threads) if at_once == 1 else 1, at_once)


class Encoder:
    """Latents of pictures, computed as a `Division` says.

    Args:
        codec: what computes; on a CPU the weights of its encoder are laid out as the pictures are.
        pixels: of the largest picture.
        most: as in `Division.of`.

    Attributes:
        division: of the work.
    """

    def __init__(self, codec: Codec, pixels: int, most: int | None = None) -> None:
        self._codec = codec
        self.division = Division.of(codec.device, codec.tokenizer.config.base_channels, pixels, most)
        if codec.device.type == "cpu":
            for weight in codec.tokenizer.autoencoder.encoder.parameters():
                if weight.ndim == 4:
                    weight.data = weight.data.contiguous(memory_format=torch.channels_last)

    @contextmanager
    def sharing_cores(self) -> Iterator[None]:
        """Lets threads that are started in the block compute with the cores they should."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.division.cores)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def parts(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Pictures (B, 3, h, w) in parts that are encoded together."""
        return torch.split(pixels, self.division.at_once or len(pixels))

    def latents(self, pixels: Tensor) -> Tensor:
        """Latents (B, bits, H, W) float32 of pictures (B, 3, h, w) uint8, one part after the other."""
        return torch.cat([self._latent(part) for part in self.parts(pixels)])

    def _latent(self, pixels: Tensor) -> Tensor:
        if len(pixels) == 1 and self._codec.device.type == "cpu" and self.division.at_once != 1:
            return self._codec.latent(torch.cat((pixels, pixels)))[:1]
        return self._codec.latent(pixels)
