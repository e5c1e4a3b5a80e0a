"""Going on from a picture: what is kept is kept to the last bit, and what is drawn is drawn as it would be anyway."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import Tensor

from bitgen_cli.config import SamplingConfig, ScalesConfig
from bitgen_cli.engine import pyramid
from bitgen_cli.engine.editing import Given, drawn_positions, latent_mask
from bitgen_cli.engine.refine import refine
from bitgen_cli.engine.sampling import draw_bits, plan
from bitgen_cli.engine.scales import Schedule, schedule

PUBLISHED = ScalesConfig(published=True, resolution="1M")
SCHEDULES = [
    schedule(PUBLISHED, patchify=False, resolution="0.25M"),
    schedule(PUBLISHED, patchify=True, ratio=1.5, resolution="0.06M"),
    Schedule(1.0, ((1, 1), (2, 2), (3, 3), (4, 4)), (4, 4)),
]


def a_mask(of: Schedule) -> Tensor:
    """A box that touches one side, over three quarters of the picture's height."""
    height, width = of.latent_sizes[-1]
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[height // 4 :, width // 8 : -(width // 8) or None] = True
    return mask


@pytest.mark.parametrize("of", SCHEDULES)
def test_what_is_drawn_reaches_nothing_outside_the_mask_and_all_that_does_not_is_drawn(of: Schedule) -> None:
    mask = a_mask(of)
    where = drawn_positions(of, mask)
    assert where[-1][0, 0].equal(mask), "of the last scale all under the mask is drawn"
    assert sum(bool(grid.any()) for grid in where) > 1
    for k, size in enumerate(of.latent_sizes):
        each = torch.eye(size[0] * size[1]).view(-1, 1, *size)
        outside = pyramid.resample(each, of.latent_sizes[-1])[:, 0][:, ~mask]
        assert where[k].flatten().equal((outside == 0).all(1))


@pytest.mark.parametrize("of", SCHEDULES)
def test_the_sum_outside_the_mask_stays_to_the_last_bit(of: Schedule) -> None:
    mask = a_mask(of)
    old, new = (tiny.random_bits(2, 5, of, seed) for seed in (1, 2))
    mixed = [torch.where(there, b, a) for there, a, b in zip(drawn_positions(of, mask), old, new, strict=True)]
    before, after = (pyramid.decode(bits, of) for bits in (old, mixed))
    assert torch.equal(before[:, :, ~mask], after[:, :, ~mask])
    assert not torch.equal(before[:, :, mask], after[:, :, mask])


def test_first_scales_stay() -> None:
    of = SCHEDULES[-1]
    assert [bool(grid.all()) for grid in drawn_positions(of, None, 2)] == [False, False, True, True]
    assert not any(bool(grid.any()) for grid in drawn_positions(of, a_mask(of), 2)[:2])


def test_a_position_is_under_a_mask_that_covers_any_of_it() -> None:
    of = SCHEDULES[-1]
    pixels = torch.zeros(16, 16, dtype=torch.bool)
    pixels[3, 4] = pixels[15, 15] = True
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[0, 1] = expected[3, 3] = True
    assert latent_mask(pixels, of).equal(expected)


@pytest.mark.parametrize("patchify", [False, True])
def test_drawing_goes_on_from_given_bits_as_from_its_own(patchify: bool) -> None:
    """A picture whose first scales are those of the same seed is that seed's picture, guided or not."""
    config = tiny.config(patchify=patchify)
    of = schedule(config.scales, patchify=patchify)
    model = tiny.transformer(config)
    for cfg in (1.0, 3.0):
        how = plan(SamplingConfig(cfg=cfg, tau=1.0, top_p=1.0), len(of))
        own = draw_bits(model, tiny.text(2), of, how, [5, 6]).bits
        given = Given(own, drawn_positions(of, None, 2))
        assert all(map(torch.equal, draw_bits(model, tiny.text(2), of, how, [5, 6], given=given).bits, own))
        other = draw_bits(model, tiny.text(2), of, how, [7, 8], given=given).bits
        assert all(map(torch.equal, other[:2], own[:2]))
        assert not any(map(torch.equal, other[2:], own[2:]))
        nothing = Given([~grid for grid in own], drawn_positions(of, None))
        assert all(map(torch.equal, draw_bits(model, tiny.text(2), of, how, [5, 6], given=nothing).bits, own))


def test_a_masked_picture_keeps_its_bits_and_later_ones_follow_from_them() -> None:
    config = tiny.config()
    of = schedule(config.scales, patchify=False)
    model = tiny.transformer(config)
    how = plan(SamplingConfig(cfg=3.0, tau=1.0, top_p=1.0), len(of))
    old = tiny.random_bits(1, 6, of)
    where = drawn_positions(of, a_mask(of))
    seen: list[Tensor] = []
    drawn = draw_bits(
        model, tiny.text(1), of, how, [3], given=Given(old, where), on_logits=lambda _, logits: seen.append(logits)
    )
    for k, there in enumerate(where):
        assert torch.equal(drawn.bits[k][:, :, ~there[0, 0]], old[k][:, :, ~there[0, 0]])
    again: list[Tensor] = []
    given = Given(drawn.bits, drawn_positions(of, None, len(of)))
    draw_bits(model, tiny.text(1), of, how, [4], given=given, on_logits=lambda _, logits: again.append(logits))
    assert all(map(torch.equal, seen, again)), "kept and drawn bits are what later scales read"


def test_a_tokenized_picture_is_quantised_anew_after_what_was_turned_over() -> None:
    """The sum stays nearer to the latent than with the coarse bits turned over alone; without changes all bits stay."""
    config = tiny.config()
    of = schedule(config.scales, patchify=False)
    model = tiny.transformer(config)
    latent = torch.randn(1, 6, 4, 4, generator=torch.Generator().manual_seed(4))
    bits, _ = pyramid.encode(latent, of)
    plain = refine(model, model.condition(tiny.text(1)), of, bits, 1)
    mended = refine(model, model.condition(tiny.text(1)), of, bits, 1, latent=latent)
    assert int(plain.changed.sum()) > 0
    far, near = (float((pyramid.decode(found.bits, of) - latent).square().mean()) for found in (plain, mended))
    assert near < far
    nowhere = [torch.zeros(1, 1, *size, dtype=torch.bool) for size in of.sizes]
    kept = refine(model, model.condition(tiny.text(1)), of, bits, 2, latent=latent, where=nowhere)
    assert all(map(torch.equal, kept.bits, bits))
    assert kept.likelihood.shape == (1, 1)
