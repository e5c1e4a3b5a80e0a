"""Bits, codes, bytes, positions, and the walk over scales."""

from __future__ import annotations

import pytest
import tiny
import torch

from bitgen_cli.engine import bits, pyramid, scales
from bitgen_cli.engine.draws import Draws
from bitgen_cli.engine.self_correction import flipper


@pytest.mark.parametrize("channels", [1, 7, 14, 16, 32, 56, 64])
def test_bits_survive_codes_bytes_and_positions(channels: int) -> None:
    generator = torch.Generator().manual_seed(channels)
    chosen = torch.rand(2, channels, 6, 4, generator=generator) < 0.5
    codes = bits.codes(chosen)
    torch.testing.assert_close(codes.square().sum(1), torch.ones(2, 6, 4))
    assert torch.equal(bits.quantise(codes), chosen)
    for cell, size in ((1, (6, 4)), (2, (3, 2))):
        positions = bits.to_positions(chosen, cell)
        packed = bits.pack(positions)
        assert packed.shape[-1] == -(-positions.shape[-1] // 8)
        assert torch.equal(bits.unpack(packed, positions.shape[-1]), positions)
        assert torch.equal(bits.to_grid(positions, size, cell), chosen)


def test_pack_puts_the_first_bit_highest() -> None:
    assert bits.pack(torch.tensor([True, False, False, False, False, False, False, True, True])).tolist() == [129, 128]


@pytest.mark.parametrize("patchify", [False, True])
def test_decode_gives_the_sum_that_encode_made(patchify: bool) -> None:
    schedule = scales.schedule(tiny.config().scales, patchify=patchify)
    latent = torch.randn(2, 6, *schedule.latent_sizes[-1], generator=torch.Generator().manual_seed(0))
    found, total = pyramid.encode(latent, schedule)
    assert torch.equal(pyramid.decode(found, schedule), total)


def test_teacher_inputs_are_what_sampling_feeds() -> None:
    schedule = scales.schedule(tiny.config().scales, patchify=False)
    latent = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    targets, teacher = pyramid.teacher_inputs(latent, schedule)
    for ours, fed in zip(teacher, pyramid.inputs_from_bits(targets, schedule), strict=True):
        assert torch.equal(ours, fed)


def test_each_scale_brings_the_sum_nearer() -> None:
    schedule = scales.schedule(tiny.config().scales, patchify=False)
    latent = torch.randn(4, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    errors = [(latent - total).square().mean().item() for _, total in pyramid.walk(latent, schedule)]
    assert errors == sorted(errors, reverse=True)


def test_flips_change_the_inputs_and_never_the_scale_they_flip() -> None:
    schedule = scales.schedule(tiny.config().scales, patchify=False)
    latent = torch.randn(4, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    plain_targets, plain_inputs = pyramid.teacher_inputs(latent, schedule)

    def all_of_scale_one(scale_bits: torch.Tensor, scale: int) -> torch.Tensor:
        return ~scale_bits if scale == 1 else scale_bits

    targets, inputs = pyramid.teacher_inputs(latent, schedule, all_of_scale_one)
    assert torch.equal(targets[0], plain_targets[0])
    assert torch.equal(targets[1], plain_targets[1])
    assert torch.equal(inputs[0], plain_inputs[0])
    assert not torch.equal(inputs[1], plain_inputs[1])
    assert not torch.equal(targets[2], plain_targets[2])


def test_flipper_keeps_to_its_scales_and_strength() -> None:
    change = flipper(0.3, 2, Draws(0, range(1)))
    kept = torch.zeros(1, 8, 50, 50, dtype=torch.bool)
    assert torch.equal(change(kept, 2), kept)
    shares = [change(kept, 0).float().mean().item() for _ in range(60)]
    assert max(shares) < 0.33  # 0.30 and the noise of 20000 draws
    assert max(shares) > 0.2
    assert min(shares) < 0.1
    still = flipper(0.0, 2, Draws(0, range(1)))
    assert torch.equal(still(kept, 0), kept)
