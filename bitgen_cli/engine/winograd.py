"""3x3 convolutions with fewer products: Winograd's minimal filtering, and its like for a doubled picture.

A tile of the input, the kernel and a tile of products are each put through small constant matrices, so that one product
per entry does the work of several: 36 instead of 144 for 4x4 outputs of a plain convolution, 9 instead of 36 for the
2x2 outputs of a pixel that nearest-neighbour enlarging doubles. What remains are matrix products over channels.

The picture passes in bands of rows that stay in the processor's cache, and the normalisation and activation before the
convolution and the sum after it happen in the same bands. Kernels are transformed anew on each call, which costs a few
per cent where it counts and keeps no second copy of the weights.

Source: Lavin and Gray 2015 (arXiv 1509.09308), F(4x4, 3x3), at interpolation points that round less than the usual
ones: errors are up to 1.5 times those of a direct convolution in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_BAND_TILES = 256
"""Tiles of a band per pair of threads: enough rows for the matrix products, few enough for the cache."""
_MOST_THREADS = 16
"""With more threads than this the passes over a band are too short to be shared out; not measured."""
_MOMENT_ROWS = 1024


@dataclass(frozen=True)
class Scheme:
    """A bilinear scheme in one dimension; both dimensions use the same.

    Attributes:
        inputs: (n, n), applied to n neighbouring pixels.
        kernel: (n, 3), applied to the three weights.
        outputs: (m, n), makes m outputs of n products.
        step: pixels from one tile to the next; n = step + 2.
        least_channels: with fewer the transforms cost more than they save.
        least_pixels: with fewer, likewise, the transform of the kernel.
    """

    inputs: tuple[tuple[float, ...], ...]
    kernel: tuple[tuple[float, ...], ...]
    outputs: tuple[tuple[float, ...], ...]
    step: int
    least_channels: int
    least_pixels: int


def _interpolation(a: float, b: float) -> Scheme:
    """Toom and Cook's scheme for 4 outputs of 3 weights at the points 0, +-a, +-b and infinity."""
    aa, bb = a * a, b * b
    near, far = 1 / (2 * aa * (aa - bb)), 1 / (2 * bb * (bb - aa))
    return Scheme(
        inputs=(
            (aa * bb, 0, -aa - bb, 0, 1, 0),
            (0, -a * bb, -bb, a, 1, 0),
            (0, a * bb, -bb, -a, 1, 0),
            (0, -b * aa, -aa, b, 1, 0),
            (0, b * aa, -aa, -b, 1, 0),
            (0, aa * bb, 0, -aa - bb, 0, 1),
        ),
        kernel=(
            (1 / (aa * bb), 0, 0),
            (near, near * a, near * aa),
            (near, -near * a, near * aa),
            (far, far * b, far * bb),
            (far, -far * b, far * bb),
            (0, 0, 1),
        ),
        outputs=(
            (1, 1, 1, 1, 1, 0),
            (0, a, -a, b, -b, 0),
            (0, aa, aa, bb, bb, 0),
            (0, aa * a, -aa * a, bb * b, -bb * b, 1),
        ),
        step=4,
        least_channels=128,
        least_pixels=1024,
    )


PLAIN = _interpolation(0.75, 1.5)
"""A convolution with padding 1: 4 outputs of 6 pixels. Height and width must be multiples of 4.

At these points the rounding error is less than twice that of a direct convolution; at the usual 1 and 2, four times.
"""

DOUBLING = Scheme(
    inputs=((1, -1, 0), (0, 1, 0), (0, -1, 1)),
    kernel=((1, 0, 0), (1, 1, 1), (0, 0, 1)),
    outputs=((1, 1, 0), (0, 1, 1)),
    step=1,
    least_channels=256,
    least_pixels=256,
)
"""Nearest neighbour x2, then a convolution with padding 1: 2 outputs of 3 pixels.

Of the doubled pixels a, a, b, b, c, c the kernel p, q, r makes (p+q+r) b + p (a-b) and (p+q+r) b + r (c-b).
"""


def pays(x: Tensor, conv: nn.Conv2d, scheme: Scheme) -> bool:
    """Whether this is the faster way: float32 on a CPU without gradients, enough work, MKL's batched products."""
    height, width = x.shape[2:]
    return (
        x.device.type == "cpu"
        and x.dtype == conv.weight.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and min(conv.in_channels, conv.out_channels) >= scheme.least_channels
        and height * width >= scheme.least_pixels
        and height % scheme.step == width % scheme.step == 0
        and torch.get_num_threads() <= _MOST_THREADS
        and bool(torch.backends.mkl.is_available())  # type: ignore[no-untyped-call]
    )


def convolve(
    x: Tensor, conv: nn.Conv2d, scheme: Scheme, norm: nn.GroupNorm | None = None, plus: Tensor | None = None
) -> Tensor:
    """conv(x), or conv(swish(norm(x))), and `plus` added: (B, C', H, W) channels-last, doubled in size by `DOUBLING`.

    Args:
        x: (B, C, H, W), channels-last.
        conv: 3x3 with padding 1.
        scheme: `PLAIN` or `DOUBLING`.
        norm: applied to x before, with the activation.
        plus: (B, C', H, W), channels-last, added to the result.
    """
    batch, channels, height, width = x.shape
    step, n, m = scheme.step, len(scheme.inputs), len(scheme.outputs)
    inputs, outputs = (torch.tensor(part, dtype=x.dtype) for part in (scheme.inputs, scheme.outputs))
    kernels = _kernels(conv.weight, scheme)
    down, across = height // step, width // step
    deep = min(down, max(1, _BAND_TILES * max(1, torch.get_num_threads() // 2) // across))
    line = (width + 2) * channels
    tiles = deep * across

    source, target = x.permute(0, 2, 3, 1), x.new_empty(batch, down * m, across * m, kernels.shape[-1])
    added = None if plus is None else plus.permute(0, 2, 3, 1)
    band = x.new_zeros(deep * step + 2, width + 2, channels)
    lines = x.new_empty(deep, n, line)
    columns, moved = x.new_empty(n, n * tiles * channels), x.new_empty(n, n * tiles * channels)
    # one more row than products: the bias, which is in every output once
    products = x.new_zeros(n * n + 1, tiles, kernels.shape[-1])
    if conv.bias is not None:
        products[-1] = conv.bias
    combine = torch.cat((torch.kron(outputs, outputs), outputs.new_ones(m * m, 1)), dim=1)
    made = x.new_empty(m * m, tiles * kernels.shape[-1])
    affine = None if norm is None else _affine(source, norm)

    for picture in range(batch):
        for top in range(0, down, deep):
            # the last band starts early enough to be full, and repeats some rows
            top = min(top, down - deep)
            _fill(band, source[picture], top * step - 1, None if affine is None else affine[:, picture])
            torch.bmm(
                inputs.expand(deep, n, n), band.as_strided((deep, n, line), (step * line, line, 1)), out=lines
            )
            windows = (n, n, deep, across, channels)
            strides = (channels, line, n * line, step * channels, 1)
            columns.view(windows).copy_(lines.as_strided(windows, strides))
            torch.mm(inputs, columns, out=moved)
            torch.bmm(moved.view(n * n, tiles, channels), kernels, out=products[:-1])
            torch.mm(combine, products.flatten(1), out=made)
            grid = made.view(m, m, deep, across, -1).permute(2, 1, 3, 0, 4)
            rows = slice(top * m, (top + deep) * m)
            place = target[picture, rows].view(grid.shape)
            if added is None:
                place.copy_(grid)
            else:
                torch.add(grid, added[picture, rows].view(grid.shape), out=place)
    return target.permute(0, 3, 1, 2)


def _kernels(weight: Tensor, scheme: Scheme) -> Tensor:
    """(n * n, C, C'): the kernel between each pair of transformed column (outer) and row."""
    kernel = torch.tensor(scheme.kernel, dtype=weight.dtype)
    both = torch.einsum("ia,jb->jiab", kernel, kernel).reshape(-1, 9)
    moved = torch.mm(both, weight.reshape(-1, 9).T)
    return moved.view(-1, *weight.shape[:2]).transpose(1, 2)


def _fill(band: Tensor, source: Tensor, first: int, affine: Tensor | None) -> None:
    """Writes the rows from `first` on into the band, activated if asked for, zeros where the picture ends."""
    low, high = max(first, 0), min(first + len(band), len(source))
    inner = band[low - first : high - first]
    band[: low - first] = 0
    band[high - first :] = 0
    if affine is None:
        inner[:, 1:-1] = source[low:high]
    else:
        torch.addcmul(affine[1], source[low:high], affine[0], out=inner[:, 1:-1])
        F.silu(inner, inplace=True)


def _affine(source: Tensor, norm: nn.GroupNorm) -> Tensor:
    """(2, B, C): factor and summand that normalise a picture (B, H, W, C).

    Squares are summed around a rough mean of the channel, so that a mean far from zero costs no digits.
    """
    batch, channels = len(source), source.shape[-1]
    pixels = source.flatten(1, 2)
    sums = torch.zeros(2, batch, channels, dtype=torch.float64)
    pivots = pixels[:, :: max(1, pixels.shape[1] // 64)].mean(1)
    for picture in range(batch):
        for part in torch.split(pixels[picture], _MOMENT_ROWS):
            apart = part - pivots[picture]
            sums[0, picture] += apart.sum(0)
            sums[1, picture] += apart.square_().sum(0)
    first, second = sums / pixels.shape[1]
    means = first + pivots
    groups = (batch, norm.num_groups, -1)
    mean = means.view(groups).mean(-1, keepdim=True)
    spread = (second - first.square()).view(groups) + (means.view(groups) - mean).square()
    factor = torch.rsqrt(spread.mean(-1, keepdim=True) + norm.eps) * norm.weight.view(1, norm.num_groups, -1)
    summand = norm.bias.view(1, norm.num_groups, -1) - mean * factor
    return torch.stack((factor, summand)).flatten(2).float()
