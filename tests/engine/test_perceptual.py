"""LPIPS through torchmetrics: used where it is there, one clear line where it is not."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from bitgen_cli.engine.perceptual import perceptual_distance
from bitgen_cli.errors import ResourceError

MODULE = "torchmetrics.image.lpip"


class Network(nn.Module):
    """Stands in for VGG: the squared difference of one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 2, 1)

    def forward(self, image: Tensor, other: Tensor) -> Tensor:
        return (self.layer(image) - self.layer(other)).square().mean((1, 2, 3), keepdim=True)


class Metric:
    def __init__(self, net_type: str) -> None:
        assert net_type == "vgg"
        self.net = Network()


def stand_in(monkeypatch: pytest.MonkeyPatch, metric: type) -> None:
    for name in ("torchmetrics", "torchmetrics.image", MODULE):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[MODULE].LearnedPerceptualImagePatchSimilarity = metric  # type: ignore[attr-defined]


def test_the_distance_moves_the_reconstruction_and_not_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, Metric)
    distance = perceptual_distance(torch.device("cpu"))
    image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    other = (image * 0.5).requires_grad_()
    found = distance(image, other)
    assert found.shape == ()
    assert found > 0
    found.backward()
    assert other.grad is not None
    assert distance(image, image) == 0


def test_a_missing_package_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, MODULE, None)
    with pytest.raises(ResourceError, match=r"pip install 'bitgen\[lpips\]'"):
        perceptual_distance(torch.device("cpu"))

    class WithoutTorchvision:
        def __init__(self, net_type: str) -> None:
            raise ModuleNotFoundError("LPIPS metric requires that torchvision is installed.")

    stand_in(monkeypatch, WithoutTorchvision)
    with pytest.raises(ResourceError, match=r"not installed: torchvision.*perceptual_weight=0"):
        perceptual_distance(torch.device("cpu"))


def test_weights_that_cannot_be_downloaded_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Offline:
        def __init__(self, net_type: str) -> None:
            raise OSError("no route to host")

    stand_in(monkeypatch, Offline)
    with pytest.raises(ResourceError, match=r"cannot be loaded: no route to host.*download them once"):
        perceptual_distance(torch.device("cpu"))
