"""One scale of binary spherical quantisation: values to bits, bits to codes, bits to bytes.

Source: INFINITY_FORMAT section 3, "Bit quantiser" (bsq_vae/multiscale_bsq.py); BSQ is arXiv 2406.07548.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def quantise(residual: Tensor) -> Tensor:
    """Bits of a residual: whether each channel of the unit vector is above zero (exactly zero is False).

    Normalising to the unit sphere changes no sign, so the bits are the signs themselves.

    Args:
        residual: (B, C, h, w) float.

    Returns:
        (B, C, h, w) bool.
    """
    return residual > 0


def unit(residual: Tensor) -> Tensor:
    """The residual on the unit sphere over its channels, (B, C, h, w); norms below 1e-12 count as 1e-12."""
    return F.normalize(residual, dim=1, eps=1e-12)


def codes(bits: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Points of the hypercube on the unit sphere: +-1/sqrt(C) per channel.

    Args:
        bits: (B, C, h, w) bool.
        dtype: of the result.

    Returns:
        (B, C, h, w), every position of norm 1.
    """
    scale = bits.shape[1] ** -0.5
    return bits.to(dtype).mul_(2 * scale).sub_(scale)


def pack(bits: Tensor) -> Tensor:
    """Bits as bytes, most significant bit first, the last byte of a position filled with zeros.

    Args:
        bits: (..., K) bool.

    Returns:
        (..., ceil(K / 8)) uint8.
    """
    padded = F.pad(bits.to(torch.uint8), (0, -bits.shape[-1] % 8))
    weights = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=bits.device)
    grouped = torch.unflatten(padded, -1, (-1, 8))
    packed: Tensor = (grouped * weights).sum(-1, dtype=torch.uint8)
    return packed


def unpack(packed: Tensor, bits_per_position: int) -> Tensor:
    """The inverse of `pack`: (..., ceil(K / 8)) uint8 to (..., K) bool."""
    weights = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=packed.device)
    grouped = packed.unsqueeze(-1).bitwise_and(weights) != 0
    return grouped.flatten(-2)[..., :bits_per_position]


def to_positions(grid: Tensor, cell: int = 1) -> Tensor:
    """Latent grid to the transformer's sequence of positions, raster order.

    When patchified (cell 2) a position holds 2x2 latent positions: channel 4d + 2dy + dx (pixel unshuffle).

    Args:
        grid: (B, C, h*cell, w*cell).

    Returns:
        (B, h*w, K), K = C * cell^2.
    """
    return _unshuffle(grid, cell).flatten(2).transpose(1, 2)


def to_grid(positions: Tensor, size: tuple[int, int], cell: int = 1) -> Tensor:
    """The inverse of `to_positions`: (B, h*w, K) to (B, C, h*cell, w*cell), for size (h, w)."""
    grid = torch.unflatten(positions.transpose(1, 2), 2, size)
    return grid if cell == 1 else F.pixel_shuffle(grid, cell)


def _unshuffle(grid: Tensor, cell: int) -> Tensor:
    return grid if cell == 1 else F.pixel_unshuffle(grid, cell)
