"""Low-rank adapters: nothing at the start, the same merged into the weights as beside them."""

from __future__ import annotations

import pytest
import tiny
import torch

from bitgen_cli.engine import lora, scales
from bitgen_cli.engine.transformer import Transformer

LAYERS = ("cross", "ffn", "self")


def logits(model: Transformer) -> torch.Tensor:
    schedule = scales.schedule(tiny.config().scales, patchify=False)
    bits = tiny.random_bits(2, 6, schedule)
    with torch.no_grad():
        return model(tiny.inputs(bits, schedule), tiny.text(2), schedule)


def test_at_the_start_nothing_changes() -> None:
    model = tiny.transformer(tiny.config())
    before = logits(model)
    lora.attach(model, LAYERS, rank=3, alpha=6, seed=0)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("layers", [("cross",), ("ffn",), ("self",), LAYERS])
def test_merged_is_as_beside(layers: tuple[str, ...]) -> None:
    model = tiny.transformer(tiny.config())
    before = logits(model)
    lora.attach(model, layers, rank=3, alpha=6, seed=0)
    generator = torch.Generator().manual_seed(3)
    adapters = {name: module.adapter for name, module in lora.targets(model, layers)}
    with torch.no_grad():
        for adapter in adapters.values():
            assert isinstance(adapter, lora.Lora)
            adapter.lora_B.copy_(0.1 * torch.randn(adapter.lora_B.shape, generator=generator))
    beside = logits(model)
    assert not torch.allclose(beside, before, atol=1e-3)
    for _, module in lora.targets(model, layers):
        adapter, module.adapter = module.adapter, None
        assert isinstance(adapter, lora.Lora)
        module.weight.data += lora.product(adapter.lora_A, adapter.lora_B, adapter.scale).detach()
    # float32 sums in another order
    assert torch.allclose(logits(model), beside, atol=1e-4)


def test_adapters_stand_in_the_named_layers_alone() -> None:
    model = tiny.transformer(tiny.config())
    lora.attach(model, ["cross"], rank=2, alpha=2, seed=0)
    names = {name.rpartition(".adapter.")[0] for name, _ in model.named_parameters() if ".adapter." in name}
    parts = ("q", "kv", "proj")
    assert names == {f"blocks.{block}.cross_attention.{part}" for block in range(3) for part in parts}


def test_the_seed_decides_the_adapters() -> None:
    drawn = []
    for seed in (0, 0, 1):
        model = tiny.transformer(tiny.config())
        lora.attach(model, ["ffn"], rank=2, alpha=2, seed=seed)
        drawn.append(dict(model.named_parameters())["blocks.0.ffn.up.adapter.lora_A"].detach())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
