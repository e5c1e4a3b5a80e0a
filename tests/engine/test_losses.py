"""Losses and measures against values known by hand."""

from __future__ import annotations

import math

import pytest
import tiny
import torch

from bitgen_cli.config import OptimizerConfig, TransformerTraining
from bitgen_cli.engine import scales
from bitgen_cli.engine.losses import _gaussian, bit_entropy, bit_loss, distillation_loss, position_weights, psnr, ssim


def test_undecided_logits_cost_log_two() -> None:
    schedule = scales.schedule(tiny.config().scales, patchify=False)
    training = TransformerTraining(steps=1, batch_size=1, optimizer=OptimizerConfig(learning_rate=1))
    targets = torch.rand(2, schedule.positions, 6) < 0.5
    loss, _, per_scale = bit_loss(torch.zeros(2, schedule.positions, 12), targets, schedule, training)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
    assert per_scale.tolist() == pytest.approx([math.log(2)] * 4)
    right = torch.stack((~targets, targets), dim=-1).flatten(-2) * 50.0
    loss, accuracy, _ = bit_loss(right, targets, schedule, training)
    assert loss.item() < 1e-6
    assert accuracy.tolist() == [1.0] * 4


def test_distillation_is_the_divergence_from_the_teacher() -> None:
    schedule = scales.schedule(tiny.config().scales, patchify=False)
    training = TransformerTraining(steps=1, batch_size=1, optimizer=OptimizerConfig(learning_rate=1))
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, schedule.positions, 12, generator=generator).requires_grad_()
    pairs = logits.detach().unflatten(-1, (-1, 2))
    same = distillation_loss(logits, pairs[..., 1] - pairs[..., 0], schedule, training)
    assert same.item() == pytest.approx(0, abs=1e-6)
    same.backward()
    assert logits.grad is not None
    assert float(logits.grad.abs().max()) < 1e-7, "equal distributions are the minimum"
    # teacher 3/4, student 1/2: 3/4 log(3/2) + 1/4 log(1/2)
    margins = torch.full((2, schedule.positions, 6), math.log(3))
    other = distillation_loss(torch.zeros(2, schedule.positions, 12), margins, schedule, training)
    assert other.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-5)


def test_scales_that_weigh_the_same() -> None:
    schedule = scales.schedule(tiny.config().scales, patchify=False)
    weights = position_weights(schedule, "scales")
    assert [weights[part].sum().item() for part in schedule.slices] == pytest.approx([0.25] * 4)


def test_position_weights() -> None:
    schedule = scales.schedule(tiny.config().scales, patchify=False)
    even, published = position_weights(schedule, "positions"), position_weights(schedule, "published")
    assert even.sum().item() == pytest.approx(1)
    assert published.sum().item() == pytest.approx(1)
    assert len(set(even.tolist())) == 1
    assert (published[0] / published[-1]).item() == pytest.approx(4)  # 1/sqrt(1) to 1/sqrt(16)


def test_psnr_and_ssim() -> None:
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert psnr(image, image + 0.02).tolist() == pytest.approx([40.0, 40.0], abs=1e-3)
    assert ssim(image, image).tolist() == pytest.approx([1.0, 1.0], abs=1e-5)
    assert ssim(image, -image).max() < 0


def test_ssim_can_be_trained_after_it_was_measured() -> None:
    _gaussian.cache_clear()
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        ssim(image, image)
    other = (image * 0.5).requires_grad_()
    ssim(image, other).mean().backward()
    assert other.grad is not None
    assert other.grad.abs().max() > 0


def test_bit_entropy_tells_sure_and_varied_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    signs = (torch.rand(64, 8, 4, 4, generator=generator) < 0.5).float() * 2 - 1
    unsure, usage = bit_entropy(signs * 10)
    assert unsure < 0.01
    assert usage > 0.95
    # a pattern that is the same in every picture uses no bits, however it varies over the picture
    _, usage = bit_entropy(signs[:1].expand(64, -1, -1, -1) * 10)
    assert usage < 0.01


def test_usage_is_that_of_the_batch_that_several_ranks_share() -> None:
    """Values and gradients of two halves, averaged, are those of the whole."""
    whole = torch.randn(4, 8, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    halves = [part.detach().requires_grad_() for part in whole.chunk(2)]
    _, usage = bit_entropy(whole)
    usage.backward()
    means = []
    for half in halves:
        bit_entropy(half, lambda mean: means.append(mean) or mean)
    shared = (means[0] + means[1]) / 2
    for half, expected in zip(halves, whole.grad.chunk(2), strict=True):
        _, own = bit_entropy(half, lambda mean: shared)
        torch.testing.assert_close(own, usage)
        own.backward()
        torch.testing.assert_close(half.grad / 2, expected)
