"""Which device computes."""

from __future__ import annotations

import pytest
import torch

from bitgen_cli.engine.device import pick_device
from bitgen_cli.errors import ResourceError


def test_the_gpu_that_is_named_becomes_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events, streams and graphs that name no device are made on the current one, and weights would be elsewhere."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert pick_device("cuda:1") == torch.device("cuda:1")
    assert pick_device("cuda") == torch.device("cuda")
    assert pick_device("cpu") == torch.device("cpu")
    assert chosen == [torch.device("cuda:1")]
    with pytest.raises(ResourceError, match="torch sees 2 CUDA devices"):
        pick_device("cuda:2")
    assert len(chosen) == 1
