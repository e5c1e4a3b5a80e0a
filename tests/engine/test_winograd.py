"""Convolutions with fewer products equal direct ones, up to the rounding of float32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitgen_cli.engine import winograd

CLOSE = 2e-5
"""Largest error of a float32 sum over some hundred channels of order-one numbers; measured 5e-6."""


def layer(channels: int, out: int) -> nn.Conv2d:
    torch.manual_seed(1)
    return nn.Conv2d(channels, out, 3, padding=1)


def picture(batch: int, channels: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(batch, channels, height, width, generator=generator) * 3 + 5
    return x.to(memory_format=torch.channels_last)


def exact(conv: nn.Conv2d) -> nn.Conv2d:
    double = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1).double()
    double.load_state_dict(conv.state_dict())
    return double


@pytest.mark.parametrize("size", [(4, 4), (8, 20), (36, 12), (64, 64), (4, 132)])
@pytest.mark.parametrize("with_norm", [True, False])
@pytest.mark.parametrize("with_sum", [True, False])
@torch.inference_mode()
def test_plain_equals_the_direct_convolution(size: tuple[int, int], with_norm: bool, with_sum: bool) -> None:
    x, conv = picture(2, 24, *size), layer(24, 40)
    norm = nn.GroupNorm(8, 24, eps=1e-6)
    norm.weight.data.uniform_(0.5, 1.5)
    norm.bias.data.uniform_(-1, 1)
    plus = picture(2, 40, *size) if with_sum else None
    before = x.clone()
    found = winograd.convolve(x, conv, winograd.PLAIN, norm if with_norm else None, plus)
    seen = x.double()
    if with_norm:
        seen = F.silu(F.group_norm(seen, 8, norm.weight.double(), norm.bias.double(), 1e-6))
    wanted = exact(conv)(seen) + (plus.double() if plus is not None else 0)
    assert torch.equal(x, before), "the input is left as it is"
    # without the norm the values are of order 5, not 1
    assert float((found - wanted).abs().max()) < CLOSE * (1 if with_norm else 4)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (16, 16), (7, 40)])
@torch.inference_mode()
def test_doubling_equals_enlarging_and_convolving(size: tuple[int, int]) -> None:
    x, conv = picture(2, 24, *size), layer(24, 16)
    found = winograd.convolve(x, conv, winograd.DOUBLING)
    wanted = exact(conv)(F.interpolate(x.double(), scale_factor=2.0, mode="nearest"))
    assert found.shape == (2, 16, 2 * size[0], 2 * size[1])
    assert float((found - wanted).abs().max()) < 4 * CLOSE


def test_where_it_does_not_belong_it_is_not_used() -> None:
    conv, x = layer(128, 128), picture(1, 128, 32, 32)
    with torch.inference_mode():
        fits = winograd.pays(x, conv, winograd.PLAIN)
        assert fits == bool(torch.backends.mkl.is_available() and torch.get_num_threads() <= 16)
        assert not winograd.pays(x.bfloat16(), conv, winograd.PLAIN)
        assert not winograd.pays(picture(1, 128, 34, 34), conv, winograd.PLAIN)
        assert not winograd.pays(picture(1, 128, 16, 16), conv, winograd.PLAIN)
        assert not winograd.pays(picture(1, 64, 64, 64), layer(64, 128), winograd.PLAIN)
    assert not winograd.pays(x, conv, winograd.PLAIN), "gradients need the ordinary way"
