"""The discriminator, and which gradients reach whom."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bitgen_cli.engine.adversary import MOST_WEIGHT, PatchDiscriminator, adaptive_weight, hinge_loss, least_side
from bitgen_cli.engine.losses import one_rank


def discriminator() -> PatchDiscriminator:
    found = PatchDiscriminator(8, 2)
    found.initialise(torch.Generator().manual_seed(0))
    return found


def pictures(count: int = 4, side: int = 16) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_a_verdict_on_every_patch_that_does_not_depend_on_the_company() -> None:
    judge = discriminator()
    together = judge(pictures())
    assert together.shape == (4, 1, 2, 2)
    alone = torch.cat([judge(one) for one in pictures().split(1)])
    torch.testing.assert_close(alone, together)
    assert least_side(2) == 12
    assert judge(pictures(side=12)).shape == (4, 1, 1, 1)


def test_hinge() -> None:
    assert hinge_loss(torch.tensor([1.0, 3.0]), torch.tensor([-1.0, -2.0])) == 0
    assert hinge_loss(torch.zeros(2), torch.zeros(2)) == 1
    assert hinge_loss(torch.tensor([-1.0]), torch.tensor([1.0])) == 2


def test_the_discriminator_learns_to_tell_and_the_pictures_to_fool() -> None:
    judge, real, fake = discriminator(), pictures(), (pictures() * 0.5).requires_grad_()
    learner = torch.optim.Adam(judge.parameters(), lr=1e-2)
    before = hinge_loss(judge(real), judge(fake.detach())).item()
    for _ in range(30):
        learner.zero_grad()
        loss = hinge_loss(judge(real), judge(fake.detach()))
        loss.backward()
        learner.step()
    assert loss.item() < before / 2
    assert fake.grad is None
    learner.zero_grad()
    fooled = -judge.unmoved(fake).mean()
    fooled.backward()
    assert fake.grad is not None
    assert all(parameter.grad is None for parameter in judge.parameters())
    with torch.no_grad():
        assert torch.equal(judge.unmoved(fake), judge(fake))
        assert -judge(fake - 0.05 * fake.grad.sign()).mean() < fooled


@pytest.mark.parametrize("parts", [1, 2])
def test_the_adaptive_weight_is_that_of_autograd_on_the_layer_itself(parts: int) -> None:
    generator = torch.Generator().manual_seed(2)
    last = nn.Conv2d(5, 3, 3, padding=1)
    judge, target = discriminator(), pictures()
    features = [torch.randn(4, 5, 16, 16, generator=generator) for _ in range(parts)]
    images = [last(seen) for seen in features]
    likeness = torch.stack([(image - target).abs().mean() for image in images]).mean()
    adversarial = torch.stack([-judge.unmoved(image).mean() for image in images]).mean()
    found = adaptive_weight(
        torch.autograd.grad(likeness, images, retain_graph=True),
        torch.autograd.grad(adversarial, images, retain_graph=True),
        features,
        last,
        one_rank,
    )
    of_likeness, of_adversary = (
        torch.autograd.grad(loss, last.weight, retain_graph=True)[0].norm() for loss in (likeness, adversarial)
    )
    torch.testing.assert_close(found, of_likeness / (of_adversary + 1e-4), rtol=1e-4, atol=0)
    assert not found.requires_grad
    assert last.weight.grad is None


def test_several_ranks_weigh_as_one() -> None:
    """Half of the batch on each of two ranks, whose gradients are averaged before norms are taken."""
    last, judge, target = nn.Conv2d(5, 3, 3, padding=1), discriminator(), pictures()
    features = torch.randn(4, 5, 16, 16, generator=torch.Generator().manual_seed(2))

    def weight(rows: slice, mean: object) -> Tensor:
        image = last(features[rows])
        likeness = (image - target[rows]).abs().mean()
        of_likeness = torch.autograd.grad(likeness, image, retain_graph=True)
        of_adversary = torch.autograd.grad(-judge.unmoved(image).mean(), image)
        return adaptive_weight(of_likeness, of_adversary, [features[rows]], last, mean)  # type: ignore[arg-type]

    local: list[list[Tensor]] = [[], []]
    for rank, rows in enumerate((slice(0, 2), slice(2, 4))):
        weight(rows, lambda x, rank=rank: local[rank].append(x) or x)
    means = iter([(one + other) / 2 for one, other in zip(*local, strict=True)])
    whole = weight(slice(0, 4), one_rank)
    torch.testing.assert_close(weight(slice(0, 2), lambda x: next(means)), whole, rtol=1e-4, atol=0)


def test_the_weight_has_an_upper_end() -> None:
    last = nn.Conv2d(5, 3, 3, padding=1)
    of_likeness, of_adversary = torch.full((1, 3, 4, 4), 1e9), torch.zeros(1, 3, 4, 4)
    weight = adaptive_weight([of_likeness], [of_adversary], [torch.ones(1, 5, 4, 4)], last, one_rank)
    assert weight == MOST_WEIGHT
