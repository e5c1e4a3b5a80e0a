"""3x3 convolutions of the autoencoder, with fewer products on a CPU that only infers.

Two forms equal the plain one up to rounding. Where weights learn, or on a GPU, the plain form is the faster one.

- Winograd's F(2x2, 3x3) (Lavin and Gray 2015, arXiv 1509.09308, section 4.1): 16 products for four pixels, not 36.
- Nearest x2, then 3x3, as one transposed convolution: of the nine pixels a window covers only four differ.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST_CHANNELS, LEAST_POSITIONS = 128, 1024
"""Below these Winograd's transforms cost more than the products they save."""
WORKSPACE = 32 << 20
"""Bytes of products that are worked on at once: smaller bands wait for each other, larger ones gained nothing."""


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
        height, width = x.shape[2:]
        large = min(self.weight.shape[:2]) >= LEAST_CHANNELS and height * width >= LEAST_POSITIONS
        even = height % 2 == 0 and width % 2 == 0
        exact = x.dtype == self.weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        if large and even and exact and only_infers(x) and not self.weight.requires_grad:
            return winograd(x, self._made.of(self.weight), self.bias)
        return super().forward(x)


class DoublingConv3(_InferringConv3):
    """Nearest neighbour x2, then 3x3 with padding 1."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, folded)

    def forward(self, x: Tensor) -> Tensor:
        if only_infers(x) and not self.weight.requires_grad:
            return F.conv_transpose2d(x, self._made.of(self.weight), self.bias, stride=2, padding=1)
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def spread(weight: Tensor) -> Tensor:
    """Weights (4, 4, out, in) of the products: G w G^T of Lavin and Gray, with

        G = [[1, 0, 0], [1/2, 1/2, 1/2], [1/2, -1/2, 1/2], [0, 0, 1]].

    Args:
        weight: (out, in, 3, 3).
    """

    def outwards(w: Tensor) -> Tensor:
        """(3, ...) to (4, ...)."""
        ends, middle = (w[0] + w[2]) / 2, w[1] / 2
        return torch.stack((w[0], ends + middle, ends - middle, w[2]))

    rows = outwards(weight.permute(2, 3, 0, 1))
    return outwards(rows.transpose(0, 1)).transpose(0, 1).contiguous()


def winograd(x: Tensor, weight: Tensor, bias: Tensor | None, workspace: int = WORKSPACE) -> Tensor:
    """3x3 convolution with padding 1 by Winograd's F(2x2, 3x3), channels-last.

    Args:
        x: (B, in, height, width) float32, both even.
        weight: (4, 4, out, in) from `spread`.
        bias: (out,).
        workspace: bytes of products at once; the picture is worked on in bands of rows.

    Returns:
        (B, out, height, width).
    """
    batch, channels, height, width = x.shape
    out, tiles = weight.shape[2], width // 2
    padded = F.pad(x, (1, 1, 1, 1)).permute(0, 2, 3, 1)
    result = x.new_empty((batch, height, width, out))
    band = max(1, min(height // 2, workspace // (16 * 4 * max(channels, out) * tiles * batch)))
    for top in range(0, height, 2 * band):
        rows = min(2 * band, height - top)
        window = padded[:, top : top + rows + 2]
        seen = _inwards(_inwards(window, 1, rows), 3, width)
        # the second row's and column's product is in all four pixels, once
        products = [
            [_product(seen[j, i], weight[i, j], bias if i == j == 1 else None) for j in range(4)] for i in range(4)
        ]
        target = result[:, top : top + rows]
        by_row = [_outwards(*(products[i][j] for i in range(4))) for j in range(4)]
        for i in range(2):
            target[:, i::2, 0::2], target[:, i::2, 1::2] = _outwards(*(by_row[j][i] for j in range(4)))
    return result.permute(0, 3, 1, 2)


def _inwards(x: Tensor, dim: int, size: int) -> Tensor:
    """B^T of Lavin and Gray along a dimension: (..., size + 2, ...) to (4, ..., size / 2, ...)."""
    a, b, c, d = (x.narrow(dim, start, size - 1)[_every_other(dim)] for start in range(4))
    found = a.new_empty((4, *a.shape))
    torch.sub(a, c, out=found[0])
    torch.add(b, c, out=found[1])
    torch.sub(c, b, out=found[2])
    torch.sub(b, d, out=found[3])
    return found


def _every_other(dim: int) -> tuple[slice, ...]:
    return (*[slice(None)] * dim, slice(None, None, 2))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (B, h, w, in) times weight (out, in): (B, h, w, out), as a 1x1 convolution, which is oneDNN's."""
    return F.conv2d(x.permute(0, 3, 1, 2), weight[:, :, None, None], bias).permute(0, 2, 3, 1)


def _outwards(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """A^T of Lavin and Gray: the two outputs of four products."""
    return torch.add(a, b).add_(c), torch.sub(b, c).sub_(d)


def folded(weight: Tensor) -> Tensor:
    """Weights (in, out, 4, 4) of the transposed convolution with stride 2 that equals nearest x2, then `weight`.

    Args:
        weight: (out, in, 3, 3).
    """
    flipped = weight.float().flip(2, 3)
    corners = [(left, 1 - left, top, 1 - top) for left in (0, 1) for top in (0, 1)]
    wide = torch.stack([F.pad(flipped, corner) for corner in corners]).sum(0)
    return wide.transpose(0, 1).to(weight.dtype).contiguous(memory_format=torch.channels_last)
