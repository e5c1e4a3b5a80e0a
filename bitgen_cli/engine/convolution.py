"""3x3 convolutions of the autoencoder, with fewer products on a CPU that only infers.

Two forms equal the plain one up to rounding. Where weights learn, or on a GPU, the plain form is the faster one.

- Winograd's F(4x4, 3x3) (Lavin and Gray 2015, arXiv 1509.09308, section 4.3): 36 products for sixteen pixels, not 144.
- Nearest x2, then 3x3, as one transposed convolution: of the nine pixels a window covers only four differ.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST_CHANNELS, LEAST_POSITIONS = 128, 1024
"""Below these Winograd's transforms cost more than the products they save."""
TILES = 112
"""Tiles that are worked on at once: enough for full products, few enough to stay near the processor."""


def only_infers(x: Tensor) -> bool:
    """Whether x is computed on a CPU without gradients."""
    return x.device.type == "cpu" and not torch.is_grad_enabled()


class _Derived:
    """Something made of a weight, made once, and again when the weight has changed."""

    def __init__(self, make: Callable[[Tensor], Tensor]) -> None:
        self._make = make
        self._state: tuple[object, ...] | None = None
        self.value: Tensor | None = None

    def of(self, weight: Tensor) -> Tensor:
        state = (weight.data_ptr(), weight._version, weight.dtype)
        if self.value is None or self._state != state:
            self._state, self.value = state, self._make(weight)
        return self.value


class _InferringConv3(nn.Conv2d):
    """3x3 with padding 1, and weights made of its own that infer with fewer products."""

    def __init__(self, channels_in: int, channels_out: int, make: Callable[[Tensor], Tensor]) -> None:
        super().__init__(channels_in, channels_out, 3, padding=1)
        self._made = _Derived(make)

    @property
    def derived(self) -> Tensor | None:
        """The weights that have been made of its own, if any."""
        return self._made.value


class Conv3(_InferringConv3):
    """3x3 with padding 1; large ones by Winograd's algorithm where a CPU infers with frozen float32 weights."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, spread)

    def forward(self, x: Tensor) -> Tensor:
        if self._takes_winograd(x, x.shape[2] * x.shape[3]):
            return winograd(x, self._made.of(self.weight), self.bias)
        return super().forward(x)

    def framed(self, x: Tensor) -> Tensor:
        """What forward makes of a part (B, in, height, width) of a picture, given with the pixel around it.

        Args:
            x: (B, in, height + 2, width + 2): zeros are where the picture ends.
        """
        if self._takes_winograd(x, (x.shape[2] - 2) * (x.shape[3] - 2)):
            return winograd(x, self._made.of(self.weight), self.bias, framed=True)
        return F.conv2d(x, self.weight, self.bias)

    def _takes_winograd(self, x: Tensor, positions: int) -> bool:
        large = min(self.weight.shape[:2]) >= LEAST_CHANNELS and positions >= LEAST_POSITIONS
        exact = x.dtype == self.weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        return large and exact and only_infers(x) and not self.weight.requires_grad


class DoublingConv3(_InferringConv3):
    """Nearest neighbour x2, then 3x3 with padding 1."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, folded)

    def forward(self, x: Tensor) -> Tensor:
        if only_infers(x) and not self.weight.requires_grad:
            return F.conv_transpose2d(x, self._made.of(self.weight), self.bias, stride=2, padding=1)
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))

    def framed(self, x: Tensor) -> Tensor:
        """What forward makes of a part of a picture, given with the pixel around it; see `Conv3.framed`."""
        if only_infers(x) and not self.weight.requires_grad:
            return F.conv_transpose2d(x, self._made.of(self.weight), self.bias, stride=2, padding=3)
        doubled = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return F.conv2d(doubled[:, :, 1:-1, 1:-1], self.weight, self.bias)


def spread(weight: Tensor) -> Tensor:
    """Weights (36, in, out) of the products: G w G^T of Lavin and Gray, section 4.3.

    Args:
        weight: (out, in, 3, 3).
    """
    out, channels = weight.shape[:2]
    rows = [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]
    both_ways = _both_ways(rows).double() / 24**2
    wide = torch.mm(both_ways, weight.permute(2, 3, 1, 0).reshape(9, -1).double())
    return wide.to(weight.dtype).view(36, channels, out)


def winograd(
    x: Tensor, weight: Tensor, bias: Tensor | None, tiles: int = TILES, *, framed: bool = False
) -> Tensor:
    """3x3 convolution with padding 1 by Winograd's F(4x4, 3x3), channels-last.

    Args:
        x: (B, in, height, width) float32, or (B, in, height + 2, width + 2) where it is framed.
        weight: (36, in, out) from `spread`.
        bias: (out,).
        tiles: of 4x4 pixels that are worked on at once: several pictures together, or one in bands of rows.
        framed: whether x has the padding already.

    Returns:
        (B, out, height, width).
    """
    batch, channels = x.shape[:2]
    frame = 0 if framed else 1
    height, width = x.shape[2] - 2 + 2 * frame, x.shape[3] - 2 + 2 * frame
    out = weight.shape[2]
    down, across = -(-height // 4), -(-width // 4)
    edges = (frame, frame + 4 * across - width, frame, frame + 4 * down - height)
    padded = (F.pad(x, edges) if any(edges) else x).permute(0, 2, 3, 1)
    result = x.new_empty((batch, 4 * down, 4 * across, out))
    rows = max(1, min(down, tiles // across))
    together = max(1, tiles // (down * across))
    for first in range(0, batch, together):
        for top in range(0, down, rows):
            part = slice(first, first + together), slice(4 * top, 4 * (top + rows))
            windows = padded[part[0], 4 * top : 4 * (top + rows) + 2].unfold(1, 6, 4).unfold(2, 6, 4)
            places = windows.shape[:3]
            count = places.numel()
            seen = windows.permute(0, 1, 2, 4, 5, 3).reshape(count, 36, channels)
            factors = torch.bmm(_INWARDS.expand(count, 36, 36), seen)
            products = torch.bmm(factors.transpose(0, 1), weight)
            made = torch.bmm(_OUTWARDS.expand(count, 16, 36), products.transpose(0, 1))
            if bias is not None:
                made.add_(bias)
            target = result[part].view(places[0], places[1], 4, across, 4, out)
            target.copy_(made.view(*places, 4, 4, out).transpose(2, 3))
    return result[:, :height, :width].permute(0, 3, 1, 2)


def _both_ways(rows: list[list[int]]) -> Tensor:
    """A transform along rows and columns at once, as one matrix."""
    one_way = torch.tensor(rows, dtype=torch.float32)
    return torch.kron(one_way, one_way)


_INWARDS = _both_ways(
    [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0],
     [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]]
)  # fmt: skip
"""B^T of Lavin and Gray: 36 numbers of a 6x6 window to 36 factors."""
_OUTWARDS = _both_ways([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]])
"""A^T of Lavin and Gray: 36 products to 4x4 pixels."""


def folded(weight: Tensor) -> Tensor:
    """Weights (in, out, 4, 4) of the transposed convolution with stride 2 that equals nearest x2, then `weight`.

    Args:
        weight: (out, in, 3, 3).
    """
    flipped = weight.float().flip(2, 3)
    corners = [(left, 1 - left, top, 1 - top) for left in (0, 1) for top in (0, 1)]
    wide = torch.stack([F.pad(flipped, corner) for corner in corners]).sum(0)
    return wide.transpose(0, 1).to(weight.dtype).contiguous(memory_format=torch.channels_last)
