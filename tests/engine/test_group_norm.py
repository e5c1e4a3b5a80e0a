"""The norm that is put together from channels and parts, against torch's own in double."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bitgen_cli.engine.group_norm import affine_of, scaled


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_one_pass_is_the_norm(dtype: torch.dtype, layout: torch.memory_format) -> None:
    generator = torch.Generator().manual_seed(0)
    norm = nn.GroupNorm(4, 16, eps=1e-6)
    nn.init.normal_(norm.weight, generator=generator)
    nn.init.normal_(norm.bias, generator=generator)
    x = torch.randn(1, 16, 13, 9, generator=generator) * 3 + torch.randn(1, 16, 1, 1, generator=generator) * 10
    x = x.to(dtype).contiguous(memory_format=layout)
    with torch.inference_mode():
        found = scaled(x, affine_of(norm, torch.split(x, 5, dim=2)))
        expected = nn.functional.group_norm(x.double(), 4, norm.weight.double(), norm.bias.double(), 1e-6)
    assert found.dtype == dtype
    rounding = 1e-5 if dtype == torch.float32 else 2**-8 * expected.abs().max().item()
    assert (found.double() - expected).abs().max() < rounding
    assert found.is_contiguous(memory_format=layout)
