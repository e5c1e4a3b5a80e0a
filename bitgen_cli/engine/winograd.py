"""3x3 convolutions with fewer products: Winograd's minimal filtering, and its like for a doubled picture.

A tile of the picture, the kernel and a tile of products each go through small constant matrices, so that one product
does the work of several: 36 instead of 144 for 4x4 outputs of a plain convolution, 25 instead of 144 for those of a
convolution after nearest-neighbour doubling. What remains are matrix products over channels.

The picture passes in bands of rows that stay in the processor's cache, and the normalisation and activation before the
convolution and the sum after it happen in the same bands. Each thread takes bands of its own: an operation on a band is
too short to be shared out well, the less so while other programs run. Kernels are transformed anew on each call, which
costs a few per cent and keeps no second copy of the weights.

Source: Lavin and Gray 2015 (arXiv 1509.09308), F(4x4, 3x3).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from threading import Barrier
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Job = TypeVar("Job")
Result = TypeVar("Result")

_BAND_TILES = 128
"""Tiles of a band at most: enough rows for the matrix products, few enough for the cache."""
_LEAST_TILES = 64
"""Tiles per thread at least: with fewer the products are too flat to be faster."""
_MOMENT_PIXELS = 2048


@dataclass(frozen=True)
class Scheme:
    """A bilinear scheme in one dimension; both dimensions use the same.

    Attributes:
        inputs: (p, n), makes p factors of n neighbouring pixels, the first of them left of the tile.
        kernel: (p, 3), makes their p partners of the three weights.
        outputs: (m, p), makes m outputs of the p products.
        step: pixels from one tile to the next.
        early: outputs of the first tile that lie before the picture; there is one tile more then.
        least_channels: with fewer the transforms cost more than they save.
    """

    inputs: tuple[tuple[float, ...], ...]
    kernel: tuple[tuple[float, ...], ...]
    outputs: tuple[tuple[float, ...], ...]
    step: int
    early: int
    least_channels: int

    def tiles(self, pixels: int) -> int:
        """Tiles that cover that many pixels."""
        return pixels // self.step + min(self.early, 1)


def _interpolation(a: float, b: float) -> Scheme:
    """Toom and Cook's scheme for 4 outputs of 3 weights, at the points 0, +-a, +-b and infinity."""
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
            (0, a * aa, -a * aa, b * bb, -b * bb, 1),
        ),
        step=4,
        early=0,
        least_channels=128,
    )


PLAIN = _interpolation(0.75, 1.5)
"""A convolution with padding 1: 4 outputs of 6 pixels.

At these points the rounding error is less than twice that of a direct convolution; at the usual 1 and 2, four times.
"""

DOUBLING = Scheme(
    inputs=((0, 1, 0), (1, -1, 0), (1, -1, 0), (0, -1, 1), (0, -1, 1)),
    kernel=((1, 1, 1), (1, 0, 0), (1, 1, 0), (0, 0, 1), (0, 1, 1)),
    outputs=((1, 0, 1, 0, 0), (1, 1, 0, 0, 0), (1, 0, 0, 1, 0), (1, 0, 0, 0, 1)),
    step=2,
    early=1,
    least_channels=256,
)
"""Nearest neighbour x2, then a convolution with padding 1: 4 outputs of 3 pixels.

Of the doubled pixels a a b b c c the kernel p q r makes, around the two b, (p+q+r) b and to it in turn (p+q) (a-b),
p (a-b), r (c-b), (q+r) (c-b).
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
        and height % scheme.step == width % scheme.step == 0
        and scheme.tiles(height) * scheme.tiles(width) >= _LEAST_TILES * torch.get_num_threads()
        and torch.backends.mkl.is_available()
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
        plus: (B, C', H, W), channels-last, added to the result; only with `PLAIN`.
    """
    source = x.permute(0, 2, 3, 1)
    batch, height, width, _ = source.shape
    m, down, across = len(scheme.outputs), scheme.tiles(height), scheme.tiles(width)
    shared = -(-down * across // torch.get_num_threads())
    deep = min(down, max(1, min(_BAND_TILES, shared) // across))

    bands = _Bands(scheme, source, conv, None if norm is None else _affine(source, norm), deep)
    target = x.new_empty(batch, height * m // scheme.step, width * m // scheme.step, conv.out_channels)
    places = target.unflatten(2, (-1, m)).unflatten(1, (-1, m))
    added = None if plus is None else plus.permute(0, 2, 3, 1).reshape(places.shape)

    # the last band starts early enough to be full, and repeats some rows
    starts = ((picture, min(top, down - deep)) for picture in range(batch) for top in range(0, down, deep))
    pending = iter(list(starts))

    def work(_: int) -> None:
        for picture, top, tiles in bands.run(pending):
            for rows, lines, tile_rows, tile_lines in _cells(scheme, top, deep, places.shape[1]):
                for columns, dots, tile_columns, tile_dots in _cells(scheme, 0, across, places.shape[3]):
                    place = places[picture, rows, lines, columns, dots]
                    made = tiles[tile_rows, tile_lines, tile_columns, tile_dots]
                    if added is None:
                        place.copy_(made)
                    else:
                        torch.add(made, added[picture, rows, lines, columns, dots], out=place)

    _share(work, range(torch.get_num_threads()))
    return target.permute(0, 3, 1, 2)


class _Bands:
    """The products of one convolution, band by band.

    Args:
        scheme: of the products.
        source: (B, H, W, C).
        conv: weight and bias.
        affine: (2, B, C), factor and summand before the activation; None without.
        deep: rows of tiles in a band.
    """

    def __init__(
        self, scheme: Scheme, source: Tensor, conv: nn.Conv2d, affine: Tensor | None, deep: int
    ) -> None:
        self.scheme = scheme
        self.source = source
        self.affine = affine
        self.deep = deep
        self.across = scheme.tiles(source.shape[2])
        self.inputs = torch.tensor(scheme.inputs, dtype=source.dtype)
        outputs = torch.tensor(scheme.outputs, dtype=source.dtype)
        # one row more than products: the bias, which is in every output once
        both = torch.kron(outputs, outputs)
        self.outputs = torch.cat((both, both.new_ones(len(both), 1)), dim=1)
        self.kernels = _kernels(conv.weight, scheme)
        self.bias = conv.bias

    def run(self, pending: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int, Tensor]]:
        """Takes bands, each a picture and its first row of tiles, and yields them with their outputs.

        Yields:
            picture, first row of tiles, and (rows of tiles, m, tiles of a row, m, C'), overwritten by the next.
        """
        source, step, deep, across = self.source, self.scheme.step, self.deep, self.across
        (p, n), m, channels = self.inputs.shape, len(self.scheme.outputs), source.shape[-1]
        wide = (across - 1) * step + n
        line, tiles = wide * channels, deep * across
        band = source.new_zeros((deep - 1) * step + n, wide, channels)
        rows = source.new_empty(deep, p, line)
        windows = source.new_empty(n, p, deep, across, channels)
        factors = source.new_empty(p, p * tiles * channels)
        products = source.new_zeros(p * p + 1, tiles, self.kernels.shape[-1])
        if self.bias is not None:
            products[-1] = self.bias
        outputs = source.new_empty(m * m, products[0].numel())

        for picture, top in pending:
            self._fill(band, picture, top * step - 1)
            lines = band.as_strided((deep, n, line), (step * line, line, 1))
            torch.bmm(self.inputs.expand(deep, p, n), lines, out=rows)
            windows.copy_(rows.as_strided(windows.shape, (channels, line, p * line, step * channels, 1)))
            torch.mm(self.inputs, windows.flatten(1), out=factors)
            torch.bmm(factors.view(p * p, tiles, channels), self.kernels, out=products[:-1])
            torch.mm(self.outputs, products.flatten(1), out=outputs)
            # columns of a tile are outermost, as the windows were gathered
            yield picture, top, outputs.view(m, m, deep, across, -1).permute(2, 1, 3, 0, 4)

    def _fill(self, band: Tensor, picture: int, first: int) -> None:
        """Writes the rows from `first` on into the band, activated if asked for, zeros where the picture ends."""
        source = self.source[picture]
        low, high = max(first, 0), min(first + len(band), len(source))
        inner = band[low - first : high - first]
        band[: low - first] = 0
        band[high - first :] = 0
        place = inner[:, 1 : 1 + source.shape[1]]
        if self.affine is None:
            place.copy_(source[low:high])
        else:
            factor, summand = self.affine[:, picture]
            torch.addcmul(summand, source[low:high], factor, out=place)
            F.silu(inner, inplace=True)


def _kernels(weight: Tensor, scheme: Scheme) -> Tensor:
    """(p * p, C, C'): the kernel of each pair of column (outer) and row."""
    kernel = torch.tensor(scheme.kernel, dtype=weight.dtype)
    both = torch.einsum("ia,jb->jiab", kernel, kernel).reshape(-1, 9)
    moved = torch.mm(both, weight.reshape(-1, 9).T)
    return moved.view(-1, *weight.shape[:2]).transpose(1, 2)


def _cells(scheme: Scheme, first: int, count: int, cells: int) -> Iterator[tuple[slice, slice, slice, slice]]:
    """Where the outputs of tiles in a row go; the row is divided into cells of as many outputs as a tile has.

    Args:
        first: index of the first tile.
        count: tiles.
        cells: in the row.

    Yields:
        cells and outputs within them; tiles and outputs within them.
    """
    m, early = len(scheme.outputs), scheme.early
    for shift, inside, of_tile in ((0, slice(0, m - early), slice(early, m)), (1, slice(m - early, m), slice(0, early))):
        low, high = max(first - shift, 0), min(first + count - shift, cells)
        if inside.start < inside.stop and low < high:
            yield slice(low, high), inside, slice(low + shift - first, high + shift - first), of_tile


def _affine(source: Tensor, norm: nn.GroupNorm) -> Tensor:
    """(2, B, C): factor and summand that normalise a picture (B, H, W, C).

    Squares are summed around a rough mean of the channel, so that a mean far from zero costs no digits.
    """
    batch, height, width, channels = source.shape
    pivots = source[:, :: max(1, height // 8)].mean((1, 2))
    deep = max(1, _MOMENT_PIXELS // width)
    parts = [(picture, slice(top, top + deep)) for picture in range(batch) for top in range(0, height, deep)]

    def moments(part: tuple[int, slice]) -> Tensor:
        picture, rows = part
        apart = source[picture, rows] - pivots[picture]
        return torch.stack((apart.sum((0, 1)), apart.square_().sum((0, 1)))).double()

    sums = torch.stack(_share(moments, parts)).unflatten(0, (batch, -1)).sum(1) / (height * width)
    first, second = sums.unbind(1)
    groups = (batch, norm.num_groups, -1)
    means = (first + pivots).view(groups)
    mean = means.mean(-1, keepdim=True)
    variance = ((second - first.square()).view(groups) + (means - mean).square()).mean(-1, keepdim=True)
    factor = torch.rsqrt(variance + norm.eps) * norm.weight.view(1, *groups[1:])
    summand = norm.bias.view(1, *groups[1:]) - mean * factor
    return torch.stack((factor, summand)).flatten(2).to(source.dtype)


def _share(function: Callable[[Job], Result], jobs: Sequence[Job]) -> list[Result]:
    """The function of each job, on as many threads as torch may use, each with one of them for itself."""
    threads = torch.get_num_threads()
    if threads == 1 or len(jobs) == 1:
        return [function(job) for job in jobs]

    def alone(job: Job) -> Result:
        with torch.inference_mode():
            return function(job)

    return list(_workers(threads).map(alone, jobs))


@cache
def _workers(threads: int) -> ThreadPoolExecutor:
    """That many threads on which torch's operations are not divided further."""
    ready = Barrier(threads + 1)

    def begin() -> None:
        # asking first: a thread that has not would take the common number at its first operation
        torch.get_num_threads()
        torch.set_num_threads(1)
        ready.wait()

    workers = ThreadPoolExecutor(threads, "bitgen-bands", initializer=begin)
    for _ in range(threads):
        workers.submit(int)
    ready.wait()
    # the workers have set the common number too, which threads that start later would take
    torch.set_num_threads(threads)
    return workers


if hasattr(os, "register_at_fork"):
    # a forked process has the pool but not its threads
    os.register_at_fork(after_in_child=_workers.cache_clear)
