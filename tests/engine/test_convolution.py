"""Convolutions with fewer products: what they compute is the plain convolution."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bitgen_cli.engine.convolution import Conv3, DoublingConv3, folded, spread, winograd


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("tiles", [1, 5, 1000])
@pytest.mark.parametrize(
    ("batch", "channels", "out", "height", "width"),
    [(1, 8, 8, 6, 10), (2, 3, 5, 2, 4), (3, 16, 4, 8, 2), (2, 4, 6, 9, 13), (1, 5, 5, 1, 1)],
)
def test_winograd_is_the_convolution(
    batch: int, channels: int, out: int, height: int, width: int, tiles: int
) -> None:
    """Whatever the bands; float32 rounds a little more often on the way."""
    x, weight, bias = random(batch, channels, height, width), random(out, channels, 3, 3), random(out)
    wanted = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    assert error(winograd(x, spread(weight), bias, tiles), wanted) < 2e-6
    wanted = F.conv2d(x.double(), weight.double(), padding=1)
    assert error(winograd(x, spread(weight), None, tiles), wanted) < 2e-6


def test_doubling_is_nearest_neighbour_and_the_convolution() -> None:
    x, weight = random(2, 6, 4, 5), random(7, 6, 3, 3)
    wanted = F.conv2d(F.interpolate(x.double(), scale_factor=2.0, mode="nearest"), weight.double(), padding=1)
    assert error(F.conv_transpose2d(x, folded(weight), stride=2, padding=1), wanted) < 2e-6


@pytest.mark.parametrize(
    ("kind", "shape"),
    [(Conv3, (1, 128, 32, 32)), (Conv3, (1, 128, 33, 32)), (Conv3, (1, 8, 32, 32)), (DoublingConv3, (1, 8, 6, 6))],
)
def test_layers_compute_the_same_whether_they_learn_or_not(
    kind: type[Conv3] | type[DoublingConv3], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    layer, x = kind(shape[1], 128), random(*shape)
    learning = layer(x)
    assert learning.requires_grad
    layer.requires_grad_(False)
    with torch.inference_mode():
        assert error(layer(x), learning.detach().double()) < 3e-6
    with torch.no_grad():
        layer.weight.mul_(2)
        layer.bias.mul_(2)
    with torch.inference_mode():  # new weights are not answered with what was made of the old ones
        assert error(layer(x), 2 * learning.detach().double()) < 3e-6
        half = layer.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert error(half, 2 * learning.detach().double()) < 0.01
