"""The cached step against the one-shot forward, what may see what, guidance, filters and seeds."""

from __future__ import annotations

import pytest
import tiny
import torch

from bitgen_cli.config import SamplingConfig
from bitgen_cli.engine import scales
from bitgen_cli.engine.bits import to_positions
from bitgen_cli.engine.layers import rope_table, rotate
from bitgen_cli.engine.pyramid import inputs_from_bits
from bitgen_cli.engine.sampling import SamplingPlan, bit_probabilities, draw_bits, guide, plan, temperatures
from bitgen_cli.errors import UsageError
from tests.benchmarks.sampling import GUIDANCE, plain_draw

ROUNDING = {"atol": 2e-5, "rtol": 0.0}
"""The same sums in another order, float32."""


@pytest.mark.parametrize("patchify", [False, True])
@pytest.mark.parametrize("lengths", [(5, 5), (3, 8)])
def test_step_equals_forward(patchify: bool, lengths: tuple[int, int]) -> None:
    config = tiny.config(patchify=patchify)
    model, schedule = tiny.transformer(config), scales.schedule(config.scales, patchify=patchify)
    text = tiny.text(2, lengths)
    bits = tiny.random_bits(2, 6, schedule)
    whole = model(tiny.inputs(bits, schedule), text, schedule)
    cache, condition = model.new_cache(2, schedule), model.condition(text)
    grids = inputs_from_bits(bits, schedule)
    for k, positions in enumerate(schedule.slices):
        seen = None if k == 0 else to_positions(grids[k - 1], schedule.cell)
        torch.testing.assert_close(model.step(k, seen, condition, schedule, cache), whole[:, positions], **ROUNDING)


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX2", reason="few rows were measured on processors with AVX2 alone"
)
@torch.inference_mode()
def test_what_a_prompt_becomes_does_not_hang_on_its_company() -> None:
    """To the last bit: few rows are computed as many are."""
    model, text = tiny.transformer(tiny.config()), tiny.text(9)
    together = model.condition(text)
    for row in range(9):
        at = slice(row, row + 1)
        alone, expected = model.condition(text.part(at)), together.part(at)
        assert torch.equal(alone.pooled, expected.pooled)
        assert torch.equal(alone.modulation, expected.modulation)
        assert torch.equal(alone.head_modulation, expected.head_modulation)
        for one, other in zip(alone.text, expected.text, strict=True):
            assert torch.equal(one.keys, other.keys)
            assert torch.equal(one.values, other.values)


def test_what_benchmarks_measure_against_predicts_the_same() -> None:
    config = tiny.config()
    model, schedule = tiny.transformer(config), scales.schedule(config.scales, patchify=False)
    seen: list[torch.Tensor] = []
    how = plan(SamplingConfig(cfg=GUIDANCE, tau=1.0), len(schedule))
    drawn = draw_bits(model, tiny.text(2), schedule, how, [0, 1], on_logits=lambda _, logits: seen.append(logits))
    for expected, found in zip(seen, plain_draw(model, tiny.text(2), schedule, drawn.bits), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)  # guidance multiplies what is rounded by 5


def test_a_scale_does_not_change_the_ones_before_it() -> None:
    config = tiny.config()
    model, schedule = tiny.transformer(config), scales.schedule(config.scales, patchify=False)
    inputs = tiny.inputs(tiny.random_bits(1, 6, schedule), schedule)
    before = model(inputs, tiny.text(1), schedule)
    changed = inputs.clone()
    changed[:, schedule.slices[2].start - 1 :] += 1
    after = model(changed, tiny.text(1), schedule)
    torch.testing.assert_close(after[:, : schedule.slices[2].start], before[:, : schedule.slices[2].start], **ROUNDING)
    assert not torch.allclose(after[:, schedule.slices[2]], before[:, schedule.slices[2]], atol=1e-3)


def test_padding_of_a_prompt_does_not_matter() -> None:
    config = tiny.config()
    model, schedule = tiny.transformer(config), scales.schedule(config.scales, patchify=False)
    inputs = tiny.inputs(tiny.random_bits(2, 6, schedule), schedule)
    both = tiny.text(2, (3, 8))
    together = model(inputs, both, schedule)
    alone = model(inputs[:1], tiny.text(1, (3,)), schedule)
    torch.testing.assert_close(together[:1], alone, **ROUNDING)


def draw(seeds: list[int], **changes: object) -> list[torch.Tensor]:
    config = tiny.config()
    schedule = scales.schedule(config.scales, patchify=False)
    values = {"cfg": 3.0, "tau": 1.0, "top_p": 1.0} | changes
    sampling = plan(SamplingConfig.model_validate(values), len(schedule))
    text = tiny.text(1).repeat(len(seeds))
    return draw_bits(tiny.transformer(config), text, schedule, sampling, seeds).bits


def test_bits_depend_on_the_seed_alone() -> None:
    together, alone = draw([5, 6, 7]), draw([7])
    for both, one in zip(together, alone, strict=True):
        assert torch.equal(both[2:], one)
    assert any(not torch.equal(scale[0], scale[1]) for scale in together)


def test_greedy_ignores_the_seed() -> None:
    for scale in draw([1, 2], top_k=1):
        assert torch.equal(scale[0], scale[1])


@pytest.mark.parametrize("confidence", [0.55, 0.75, 0.95])
def test_temperatures_make_bits_as_sure_as_asked(confidence: float) -> None:
    logits = torch.randn(3, 9, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.3, 1, 5])[:, None, None]
    found = temperatures(logits, confidence)
    assert found.shape == (3, 1, 1)
    one = bit_probabilities(logits / found)
    assert torch.maximum(one, 1 - one).mean((1, 2)).tolist() == pytest.approx([confidence] * 3, abs=1e-4)
    assert found.flatten().tolist() == sorted(found.flatten().tolist()), "surer logits need a higher temperature"
    alone = temperatures(logits[1:2], confidence)
    assert torch.allclose(alone, found[1:2], rtol=1e-5), "a picture's does not hang on its company"


def test_bits_that_nothing_tells_apart_are_drawn_at_any_confidence() -> None:
    assert torch.isfinite(temperatures(torch.zeros(1, 4, 4), 0.9)).all()


def test_a_target_takes_the_place_of_tau() -> None:
    assert all(map(torch.equal, draw([5], target_confidence=0.8), draw([5], target_confidence=0.8, tau=0.1)))
    # with nearly certain bits the seed hardly matters any more, as when drawing greedily
    greedy, sure = draw([5], top_k=1), draw([5], target_confidence=0.999999)
    same = [torch.equal(a, b) for a, b in zip(greedy, sure, strict=True)]
    assert all(same)


def test_guidance_of_one_is_the_conditional_model() -> None:
    both = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(guide(both, 1.0), both[:2])
    torch.testing.assert_close(guide(both, 3.0), 3 * both[:2] - 2 * both[2:])
    # only the last scale unguided: the unconditional half is dropped there, the bits before it stay
    most, full = draw([1], cfg=[3, 3, 3, 1]), draw([1], cfg=[3, 3, 3, 3])
    for guided, reference in zip(most[:3], full[:3], strict=True):
        assert torch.equal(guided, reference)


def test_filters_keep_what_they_should() -> None:
    logits = torch.tensor([[[0.0, 4.0, 1.0, 0.0, 0.0, 0.0]]])
    one = torch.sigmoid(torch.tensor([4.0, -1.0, 0.0]))
    torch.testing.assert_close(bit_probabilities(logits)[0, 0], one)
    assert bit_probabilities(logits, top_p=0.97)[0, 0].tolist() == [1.0, one[1].item(), 0.5]
    assert bit_probabilities(logits, top_k=1)[0, 0].tolist() == [1.0, 0.0, 0.5]
    assert bit_probabilities(logits, top_k=2)[0, 0].tolist() == one.tolist()


def test_a_plan_needs_a_number_per_scale() -> None:
    with pytest.raises(UsageError, match="cfg has 2 numbers, the model has 4 scales"):
        plan(SamplingConfig(cfg=[1.0, 2.0]), 4)
    assert plan(SamplingConfig(cfg=2.0, tau=[1, 2, 3, 4]), 4) == SamplingPlan(
        (2.0,) * 4, (0,), (1.0, 2.0, 3.0, 4.0), 0, 0.97
    )


def test_rotation_is_the_same_with_and_without_gradients() -> None:
    """One is a product of complex numbers: the same sums, which a processor may round once less."""
    schedule = scales.schedule(tiny.config().scales, patchify=False)
    rope = rope_table(schedule, 16, torch.device("cpu"))
    x = torch.randn(2, schedule.positions, 3, 16, generator=torch.Generator().manual_seed(0)).transpose(1, 2)
    with torch.no_grad():
        plain = rotate(x, rope)
    torch.testing.assert_close(rotate(x, rope), plain, atol=1e-6, rtol=0)
