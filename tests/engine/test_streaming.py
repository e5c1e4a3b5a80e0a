"""Blocks that wait in the CPU's memory: the same bits, whatever waits, and weights that are where they belong."""

from __future__ import annotations

import pytest
import torch

from bitgen_cli.config import SamplingConfig
from bitgen_cli.engine.model_folder import find_model, load_model
from bitgen_cli.engine.sampling import draw_bits, plan
from bitgen_cli.engine.scales import schedule
from bitgen_cli.engine.streaming import spread
from bitgen_cli.engine.transformer import TextFeatures, Transformer


def test_waiting_blocks_are_spread() -> None:
    assert spread(0, 6) == ()
    assert spread(1, 6) == (5,)
    assert spread(2, 6) == (2, 5)
    assert spread(6, 6) == (0, 1, 2, 3, 4, 5)
    assert spread(12, 32) == tuple(sorted(set(spread(12, 32))))


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_streamed_blocks_draw_the_same_bits(count: int) -> None:
    folder = find_model("demo")
    whole, streamed = (
        load_model(folder, parts=("transformer",), waiting=spread(number, 6)).transformer for number in (0, count)
    )
    assert whole is not None
    assert streamed is not None
    homes = {name: parameter.data_ptr() for name, parameter in streamed.named_parameters()}
    config = load_model(folder, parts=()).config
    scales = schedule(config.scales, patchify=False)
    features = torch.randn(2, 5, config.transformer.text_width, generator=torch.Generator().manual_seed(0))
    text = TextFeatures(features, (5, 5))
    drawn = [
        draw_bits(model, text, scales, plan(SamplingConfig(), len(scales)), [0, 1]).bits
        for model in (whole, streamed, streamed)
    ]
    for expected, first, again in zip(*drawn, strict=True):
        assert torch.equal(expected, first)
        assert torch.equal(expected, again)
    assert homes == {name: parameter.data_ptr() for name, parameter in streamed.named_parameters()}


def test_changed_weights_are_used() -> None:
    """A subject changes weights between two pictures."""
    streamed = load_model(find_model("demo"), parts=("transformer",), waiting=spread(3, 6)).transformer
    assert isinstance(streamed, Transformer)
    changed = list(streamed.each_block)[5].ffn.down.weight
    kept = changed.data
    before = computes_with(streamed, 5)
    changed.data = kept * 2
    doubled = computes_with(streamed, 5)
    changed.data = kept
    assert torch.equal(doubled, before * 2)
    assert torch.equal(computes_with(streamed, 5), before)


def computes_with(model: Transformer, index: int) -> torch.Tensor:
    """A copy of a block's weights when its turn has come."""
    copies = [block.ffn.down.weight.data.clone() for block in model.in_turn(model.each_block)]
    return copies[index]
