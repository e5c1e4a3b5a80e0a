"""Bits as a picture carries them."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from bitgen_cli.engine.scales import Schedule
from bitgen_cli.errors import InputError
from bitgen_cli.runs.carried_bits import digest, packed, unpacked

OF = Schedule(1.0, ((1, 1), (2, 3), (4, 6)), (4, 6))


@pytest.mark.parametrize("bits", [1, 8, 13, 64])
def test_what_is_packed_is_unpacked(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    grids = [torch.rand(bits, *size, generator=generator) > 0.5 for size in OF.latent_sizes]
    image = Image.effect_noise((6, 4), 90).convert("RGB")
    found = unpacked(packed(grids, image), image, OF, bits)
    assert all(torch.equal(a, b[0]) for a, b in zip(grids, found, strict=True))


def test_other_pixels_and_other_lengths_are_refused() -> None:
    image = Image.new("RGB", (6, 4))
    good = packed([torch.zeros(8, *size, dtype=torch.bool) for size in OF.latent_sizes], image)
    for content, bits, problem in (
        (good, 9, "31 bytes, not 62"),
        (good + b"x", 8, "32 bytes, not 31"),
        (digest(image), 8, "0 bytes"),
        (good[1:], 8, "changed since"),
        (b"", 8, "changed since"),
    ):
        with pytest.raises(InputError, match=problem):
            unpacked(content, image, OF, bits)
    with pytest.raises(InputError, match="changed since"):
        unpacked(good, Image.new("RGB", (6, 4), (0, 0, 1)), OF, 8)
