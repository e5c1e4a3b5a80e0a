"""Decoding a large picture in bands of rows: the picture of the plain decoder, in a fraction of its memory.

A picture is a queue of bands, (1, channels, rows, width) each; a layer takes one after the other off it and appends
to the next. A convolution borrows a row from either neighbour, and a norm's statistics are those of the whole picture,
so there are no seams and nothing is computed twice: the result is the plain decoder's up to rounding. At full size live
what a layer has not read yet and what it has made, and in a residual block the shortcut, to which the branch is added
in place. Normalised, padded and rearranged copies are as large as a band.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitgen_cli.engine.autoencoder import Decoder, ResBlock, Upsample
from bitgen_cli.engine.convolution import only_infers
from bitgen_cli.engine.group_norm import Affine, affine_of

BAND, GPU_BAND = 1 << 22, 1 << 24
"""Numbers a band has at most, unless one row has more: few beside a large picture, and enough to keep a GPU busy."""

Bands = deque[Tensor]
"""A picture from top to bottom. Heights may differ."""


@torch.no_grad()
def decode_in_bands(decoder: Decoder, total: Tensor, numbers: int | None = None) -> Tensor:
    """Image (B, 3, height, width) in [-1, 1]: `Autoencoder.decode` up to rounding, one picture after the other.

    Args:
        decoder: of the autoencoder. No gradient flows through bands.
        total: quantised sum (B, C, H, W).
        numbers: a band has at most, unless one row has more; None is what suits the device.
    """
    if numbers is None:
        numbers = GPU_BAND if total.device.type == "cuda" else BAND
    images = [_decoded(decoder, one, numbers) for one in torch.split(total, 1)]
    return torch.cat(images).clamp_(-1, 1).contiguous()


def _decoded(decoder: Decoder, total: Tensor, numbers: int) -> Tensor:
    x = Bands([total])
    _cut(x, decoder.conv_in.out_channels, numbers)
    x = _made(x, lambda window, _: decoder.conv_in.framed(window))
    for layer in decoder.layers():
        if isinstance(layer, ResBlock):
            x = _through(layer, x, numbers)
        else:
            assert isinstance(layer, Upsample)
            x = _doubled(layer, x, numbers)
    return torch.cat(list(_made(x, lambda window, _: decoder.conv_out.framed(window), decoder.norm_out)), 2)


def _cut(x: Bands, numbers_at_pixel: int, numbers: int) -> None:
    """Cuts bands that are too high for a layer which reads or makes so many numbers at a pixel."""
    rows = max(1, numbers // (numbers_at_pixel * x[0].shape[3]))
    if rows > 4:
        rows -= rows % 4  # Winograd's tiles are four rows high
    for _ in range(len(x)):
        x.extend(torch.split(x.popleft(), rows, dim=2))


def _through(block: ResBlock, x: Bands, numbers: int) -> Bands:
    """What a residual block makes of a picture."""
    _cut(x, max(block.conv1.in_channels, block.conv1.out_channels), numbers)
    shortcut = Bands()

    def branch(window: Tensor, band: Tensor) -> Tensor:
        shortcut.append(band if block.nin_shortcut is None else block.nin_shortcut(band))
        return block.conv1.framed(window)

    h = _made(x, branch, block.norm1)
    return _made(h, lambda window, _: shortcut.popleft().add_(block.conv2.framed(window)), block.norm2)


def _doubled(layer: Upsample, x: Bands, numbers: int) -> Bands:
    """The picture twice as high and wide."""
    _cut(x, 4 * layer.conv.out_channels, numbers)
    return _made(x, lambda window, _: layer.conv.framed(window))


def _made(x: Bands, make: Callable[[Tensor, Tensor], Tensor], norm: nn.GroupNorm | None = None) -> Bands:
    """A picture made of another one, which is gone afterwards.

    Args:
        make: the new band of a band's window (`_window`) and the band itself.
        norm: what a window has passed, and swish after it; None: it has the band's own numbers.
    """
    affine = None if norm is None else affine_of(norm, x)
    y = Bands()
    above = None
    while x:
        band = x.popleft()
        below = x[0][:, :, :1] if x else None
        edge = band[:, :, -1:].clone()
        y.append(make(_window(above, band, below, affine), band))
        above = edge
    return y


def _window(above: Tensor | None, band: Tensor, below: Tensor | None, affine: Affine | None) -> Tensor:
    """A band (1, C, rows, width) with one pixel around it, (1, C, rows + 2, width + 2), normed and through swish.

    Args:
        above, below: the neighbours' rows; None, and zeros, where the picture ends.
        affine: of the norm; None: the pixels stay as they are.
    """
    _, channels, rows, width = band.shape
    last = only_infers(band) or band.device.type == "cuda"
    layout = torch.channels_last if last else torch.contiguous_format
    size = (1, channels, rows + 2, width + 2)
    window = torch.empty(size, dtype=band.dtype, device=band.device, memory_format=layout)
    for side in (window[..., :1], window[..., -1:]):
        side.zero_()
    inside = window[..., 1:-1]
    for target, source in zip(torch.split(inside, [1, rows, 1], dim=2), (above, band, below), strict=True):
        if source is None:
            target.zero_()
        elif affine is None:
            target.copy_(source)
        else:
            torch.addcmul(affine.shift, source, affine.scale, out=target)
    return window if affine is None else F.silu(window, inplace=True)
