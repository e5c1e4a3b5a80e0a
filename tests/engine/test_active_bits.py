"""One model used with several numbers of bits."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import Tensor

from bitgen_cli.config import SamplingConfig
from bitgen_cli.engine import pyramid, scales
from bitgen_cli.engine.active_bits import active, bits_in_use, draw, logits_in_use, widened, widened_positions
from bitgen_cli.engine.bits import codes, to_positions
from bitgen_cli.engine.sampling import draw_bits, generate, plan
from bitgen_cli.engine.tokenizer import Tokenizer
from bitgen_cli.errors import UsageError

ELASTIC = tiny.config(8).tokenizer.model_copy(update={"active_bits": [2, 4, 8]})


def latent(channels: int = 8) -> Tensor:
    return torch.randn(2, channels, 4, 4, generator=torch.Generator().manual_seed(0))


def test_the_first_channels_are_quantised_as_codes_of_their_own_number() -> None:
    few = active(latent(), 2)
    # a quarter of the channels, each twice as long: the same mean square over positions, as far as channels are alike
    torch.testing.assert_close(few, 2 * latent()[:, :2])
    schedule = scales.schedule(tiny.config().scales, patchify=False)
    bits, total = pyramid.encode(few, schedule)
    assert bits[0].shape[1] == total.shape[1] == 2
    # the sum is made of codes +-1/sqrt(2)
    torch.testing.assert_close(total, sum(pyramid.resample(codes(grid), (4, 4)) for grid in bits))
    assert codes(bits[0]).abs().unique().tolist() == pytest.approx([2**-0.5])


@pytest.mark.parametrize("count", [2, 4, 8])
def test_fewer_bits_are_the_beginning_of_more(count: int) -> None:
    schedule = scales.schedule(tiny.config().scales, patchify=False)
    every, whole = pyramid.encode(latent(), schedule)
    few, total = pyramid.encode(active(latent(), count), schedule)
    for ours, theirs in zip(few, every, strict=True):
        assert torch.equal(ours, theirs[:, :count])
    torch.testing.assert_close(total, whole[:, :count] * (8 / count) ** 0.5)


def test_all_bits_are_the_plain_way_bit_for_bit() -> None:
    torch.manual_seed(0)
    elastic = Tokenizer(ELASTIC).eval().requires_grad_(False)
    plain = Tokenizer(tiny.config(8).tokenizer).eval().requires_grad_(False)
    plain.load_state_dict(elastic.state_dict())
    schedule = scales.schedule(tiny.config().scales, patchify=False)
    image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    _, total = plain.encode(image, schedule)
    _, same = elastic.encode(image, schedule, 8)
    assert torch.equal(total, same)
    assert torch.equal(total, elastic.encode(image, schedule)[1]), "all bits are used unless fewer are asked for"
    assert torch.equal(elastic.decode(total), plain.decode(total))
    # fewer bits are decoded as the sum of the first channels, with zeros for the others
    few, total = elastic.encode(image, schedule, 2)
    assert few[0].shape[1] == 2
    padded = torch.cat((total, torch.zeros(2, 6, 4, 4)), dim=1)
    assert torch.equal(elastic.decode_bits(few, schedule), plain.decode(padded))


def test_numbers_of_bits_that_were_not_trained_are_refused() -> None:
    assert bits_in_use(ELASTIC, None) == 8
    assert bits_in_use(ELASTIC, 2) == 2
    with pytest.raises(UsageError, match=r"cannot be used with 3 bits \(it was trained for: 2, 4, 8\)"):
        bits_in_use(ELASTIC, 3)
    with pytest.raises(UsageError, match=r"with 4 bits \(it was trained for: 8\)"):
        bits_in_use(tiny.config(8).tokenizer, 4)


def test_each_number_is_drawn_as_often_and_one_alone_costs_no_draw() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [draw((2, 4, 8), generator) for _ in range(3000)]
    assert all(900 < drawn.count(bits) < 1100 for bits in (2, 4, 8))
    state = generator.get_state()
    assert draw((8,), generator) == 8
    assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize("patchify", [False, True])
def test_positions_keep_the_first_bits_first(patchify: bool) -> None:
    cell = 2 if patchify else 1
    few, every = latent()[:, :2], latent()
    zeroed = torch.cat((few, torch.zeros(2, 6, 4, 4)), dim=1)
    assert torch.equal(widened(few, 8), zeroed)
    assert torch.equal(widened_positions(to_positions(few, cell), 8 * cell**2), to_positions(zeroed, cell))
    pairs = to_positions(every, cell).repeat_interleave(2, dim=-1)
    first = logits_in_use(pairs, 2 * cell**2)
    assert torch.equal(first, to_positions(few, cell).repeat_interleave(2, dim=-1))


@pytest.mark.parametrize("patchify", [False, True])
def test_fewer_bits_are_drawn_from_what_training_shows_of_them(patchify: bool) -> None:
    """The logits of the cached walk are those of the one-shot forward of the drawn bits, whatever their number."""
    config = tiny.config(8, patchify)
    model = tiny.transformer(config)
    schedule = scales.schedule(config.scales, patchify=patchify)
    steps = plan(SamplingConfig(cfg=1.0, top_p=1.0), len(schedule))
    seen: list[Tensor] = []
    drawn = draw_bits(
        model, tiny.text(2), schedule, steps, [0, 1], bits=2, on_logits=lambda _, logits: seen.append(logits)
    )
    assert [grid.shape[1] for grid in drawn.bits] == [2] * len(schedule)
    inputs = widened_positions(tiny.inputs(drawn.bits, schedule), model.bits_per_position)
    whole = logits_in_use(model(inputs, tiny.text(2), schedule), 2 * schedule.cell**2)
    torch.testing.assert_close(torch.cat(seen, dim=1), whole, rtol=1e-4, atol=1e-4)


def test_pictures_of_fewer_bits_are_decoded_with_zeros_for_the_others() -> None:
    config = tiny.config(8)
    schedule = scales.schedule(config.scales, patchify=False)
    tokenizer = Tokenizer(ELASTIC).eval().requires_grad_(False)
    steps = plan(SamplingConfig(cfg=2.0), len(schedule))
    model = tiny.transformer(config)
    image, drawn = generate(model, tokenizer, tiny.text(2), schedule, steps, [0, 1], bits=4)
    assert drawn.total.shape[1] == 4
    whole = torch.cat((drawn.total, torch.zeros(2, 4, 4, 4)), dim=1)
    torch.testing.assert_close(image, tokenizer.decode(whole), rtol=1e-4, atol=1e-5)
