"""The bits that a picture carries, as bytes: the digest of its pixels, then the bits of each latent position.

A program that changes the pixels may keep what else is in the file. Then the digest tells that the bits are not the
picture's any more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from bitgen_cli.engine.bits import pack, to_grid, to_positions, unpack
from bitgen_cli.engine.scales import Schedule
from bitgen_cli.errors import InputError

DIGEST = 32
"""Bytes of it."""


def packed(bits: Sequence[Tensor], image: Image.Image) -> bytes:
    """What a picture carries: coarse scales come first.

    Args:
        bits: per scale (d, h, w) bool.
        image: RGB, that they were decoded to.
    """
    positions = torch.cat([to_positions(grid[None]) for grid in bits], dim=1)
    return digest(image) + pack(positions).cpu().numpy().tobytes()


def unpacked(content: bytes, image: Image.Image, schedule: Schedule, bits: int) -> list[Tensor]:
    """Bits per scale (1, d, h, w) of what a picture carries.

    Args:
        content: as `packed` makes it, or anything.
        image: RGB, of the picture that carries it.
        schedule: scales of the picture.
        bits: d, per latent position.

    Raises:
        InputError: they are another picture's, or have another length.
    """
    if content[:DIGEST] != digest(image):
        raise InputError("the picture was changed since")
    packed_bits = bytearray(content[DIGEST:])
    width = -(-bits // 8)
    positions = sum(h * w for h, w in schedule.latent_sizes)
    if len(packed_bits) != positions * width:
        raise InputError(f"they have {len(packed_bits)} bytes, not {positions * width}")
    rows = unpack(torch.frombuffer(packed_bits, dtype=torch.uint8).view(1, positions, width), bits)
    parts = torch.split(rows, [h * w for h, w in schedule.latent_sizes], dim=1)
    return [to_grid(part, size).contiguous() for part, size in zip(parts, schedule.latent_sizes, strict=True)]


def digest(image: Image.Image) -> bytes:
    """Tells the pixels of a picture, as RGB, from all others."""
    return hashlib.sha256(image.convert("RGB").tobytes()).digest()
