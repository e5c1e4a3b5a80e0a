"""Refinement: what it turns over, what it leaves alone, and what it says."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from bitgen_cli.config import SamplingConfig
from bitgen_cli.engine import layers, pyramid, transformer
from bitgen_cli.engine.bits import to_grid
from bitgen_cli.engine.editing import Given
from bitgen_cli.engine.model_folder import Model, find_model, load_model
from bitgen_cli.engine.refine import first_guided, refine, thresholds
from bitgen_cli.engine.sampling import Drawn, draw_bits, generate, plan
from bitgen_cli.engine.scales import Schedule, schedule
from bitgen_cli.engine.transformer import Condition, TextFeatures

PROMPTS = ["a red dog on the moon", "a blue car in the snow", "a green tree underwater"]


@pytest.fixture(scope="module")
def demo() -> Model:
    return load_model(find_model("demo"))


@pytest.fixture(scope="module")
def scales(demo: Model) -> Schedule:
    return schedule(demo.config.scales, patchify=False)


@pytest.fixture(scope="module")
def text(demo: Model) -> TextFeatures:
    assert demo.text_encoder is not None
    with torch.inference_mode():
        return demo.text_encoder.encode(PROMPTS)


@pytest.fixture(scope="module")
def prompts(demo: Model, text: TextFeatures) -> Condition:
    """What the model makes of them."""
    assert demo.transformer is not None
    with torch.inference_mode():
        return demo.transformer.condition(text)


@pytest.fixture(scope="module")
def both(demo: Model, text: TextFeatures) -> Condition:
    """The same, and of prompts to guide away from."""
    assert demo.transformer is not None
    with torch.inference_mode():
        return demo.transformer.condition(TextFeatures.join([text, demo.transformer.null_features(text.lengths)]))


def drawn(demo: Model, text: TextFeatures, scales: Schedule) -> Drawn:
    assert demo.transformer is not None
    return draw_bits(demo.transformer, text, scales, plan(demo.sampling, len(scales)), [0, 1, 2])


def damaged(bits: list[Tensor], share: float) -> list[Tensor]:
    """So many of the bits of all scales but the first turned over."""
    generator = torch.Generator().manual_seed(3)
    return [grid ^ (torch.rand(grid.shape, generator=generator) < share * (k > 0)) for k, grid in enumerate(bits)]


def test_one_scale_is_enough() -> None:
    config = tiny.config(bits=4)
    one = Schedule(1.0, ((1, 1),), (4, 4))
    model = tiny.transformer(config)
    found = refine(model, model.condition(tiny.text(2)), one, [~tiny.random_bits(2, 4, one)[0]], 3)
    assert found.changed.shape == (2, 1)


def test_guidance_mends_more(demo: Model, text: TextFeatures, scales: Schedule) -> None:
    """Of the coarse scales in the first round, of all in later ones; what is told as likelihood is without it."""
    assert demo.transformer is not None
    model, many = demo.transformer, text.repeat(8)
    whole = draw_bits(model, many, scales, plan(demo.sampling, len(scales)), range(24)).bits
    broken = damaged(whole, 0.1)
    with torch.inference_mode():
        both = model.condition(TextFeatures.join([many, model.null_features(many.lengths)]))
    found = {
        (rounds, given is both): refine(model, given, scales, broken, rounds, guidance=3.0)
        for rounds in (1, 2)
        for given in (both.part(slice(24)), both)
    }

    def wrong(rounds: int, guided: bool, scales: slice) -> int:
        bits = found[rounds, guided].bits
        return sum(int((a != b).sum()) for a, b in zip(bits[scales], whole[scales], strict=True))

    coarse, finer = slice(len(first_guided(scales))), slice(len(first_guided(scales)), None)
    assert wrong(1, True, coarse) < wrong(1, False, coarse)
    assert wrong(1, True, finer) == wrong(1, False, finer)
    assert wrong(2, True, finer) < wrong(2, False, finer)
    for one in found.values():
        assert torch.allclose(found[1, False].likelihood[:, 0], one.likelihood[:, 0], atol=1e-5), "rounded otherwise"


def test_guidance_is_that_of_drawing(demo: Model, text: TextFeatures, both: Condition, scales: Schedule) -> None:
    """Against the logits that drawing these bits would choose from; prompts that were read give the same."""
    assert demo.transformer is not None
    broken = damaged(drawn(demo, text, scales).bits, 0.1)
    seen: list[Tensor] = []
    how = plan(demo.sampling.model_copy(update={"cfg": 3.0, "tau": 1.0}), len(scales))
    everywhere = [torch.zeros(1, 1, *size, dtype=torch.bool) for size in scales.sizes]
    given = Given(broken, everywhere)
    draw_bits(demo.transformer, text, scales, how, [0, 1, 2], given=given, on_logits=lambda _, of: seen.append(of))
    found = refine(demo.transformer, both, scales, broken, 1, guidance=3.0)
    assert 0 < len(first_guided(scales)) < len(scales)
    for k in range(len(first_guided(scales))):
        pairs = seen[k].unflatten(-1, (-1, 2))
        of_one = to_grid(pairs[..., 1] - pairs[..., 0], scales.sizes[k])
        against = torch.where(broken[k], -of_one, of_one)
        assert torch.equal(found.bits[k] ^ broken[k], against > thresholds(scales)[k])


def test_one_sequence_for_both_prompts_sees_what_two_do(
    demo: Model, text: TextFeatures, both: Condition, scales: Schedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert demo.transformer is not None
    broken = damaged(drawn(demo, text, scales).bits, 0.1)
    monkeypatch.setattr(layers, "attends_at_once", lambda *_: False)  # of other lengths it would round otherwise
    together = refine(demo.transformer, both, scales, broken, 2, guidance=3.0)
    monkeypatch.setattr(transformer, "LONG", 0)
    apart = refine(demo.transformer, both, scales, broken, 2, guidance=3.0)
    assert all(map(torch.equal, together.bits, apart.bits))
    assert torch.equal(together.likelihood, apart.likelihood)


def test_one_attention_with_a_mask_sees_what_one_for_each_scale_does(
    demo: Model, text: TextFeatures, both: Condition, scales: Schedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert demo.transformer is not None
    broken = damaged(drawn(demo, text, scales).bits, 0.1)
    found = []
    for at_once in (True, False):
        monkeypatch.setattr(layers, "attends_at_once", lambda *_, answer=at_once: answer)
        found.append(refine(demo.transformer, both, scales, broken, 1, guidance=3.0))
    masked, each = found
    assert torch.allclose(masked.likelihood, each.likelihood, atol=1e-5), "rounded as other sums are"
    assert torch.allclose(masked.gain, each.gain, atol=1e-4), "rounded as other sums are"
    assert torch.equal(masked.changed, each.changed)


@pytest.mark.parametrize(
    ("changes", "rounds", "asked"),
    [
        ({}, 1, 0),
        ({}, 2, 1),
        ({"cfg": 1.0}, 1, 0),
        ({"cfg": [1.0, 1.0, 3.0, 1.0]}, 1, 0),
        ({"cfg": [3.0, 1.0, 1.0, 1.0]}, 1, 1),
        ({"cfg_layer": 1}, 1, 1),
        ({"fast": 1}, 1, 1),
    ],
)
def test_what_drawing_has_seen_is_not_asked_for_again(
    demo: Model,
    text: TextFeatures,
    scales: Schedule,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, object],
    rounds: int,
    asked: int,
) -> None:
    """And it is what a pass would find: the same bits are turned over."""
    assert demo.transformer is not None
    assert demo.tokenizer is not None
    model, passes = demo.transformer, []
    read = model.read

    def counted(*given: Any) -> list[Tensor]:
        passes.append(given)
        return read(*given)

    monkeypatch.setattr(model, "read", counted)
    how = plan(demo.sampling.model_copy(update={"tau": 2.0, "top_p": 1.0, "refine": rounds, **changes}), len(scales))
    found = generate(model, demo.tokenizer, text, scales, how, [0, 1, 2])[1].refined
    assert len(passes) == asked
    given = draw_bits(model, text, scales, how, [0, 1, 2])
    assert given.condition is not None
    again = refine(model, given.condition, scales, given.bits, rounds, guidance=max(how.cfg))
    assert found is not None
    assert all(map(torch.equal, found.bits, again.bits))
    assert torch.allclose(found.likelihood, again.likelihood, atol=1e-5, equal_nan=True), "rounded as other sums are"
    assert torch.allclose(found.gain, again.gain, atol=1e-4), "rounded as other sums are"
    assert found.changed.any()


def test_damage_is_mended(demo: Model, text: TextFeatures, prompts: Condition, scales: Schedule) -> None:
    """Most of the damage to coarse scales goes, and the picture becomes likelier."""
    assert demo.transformer is not None
    whole = drawn(demo, text, scales).bits
    broken = damaged(whole, 0.1)
    found = refine(demo.transformer, prompts, scales, broken, 3)

    def wrong(bits: list[Tensor], coarse: int) -> int:
        return sum(int((a != b).sum()) for a, b in zip(bits[:coarse], whole[:coarse], strict=True))

    assert wrong(found.bits, 3) < 0.5 * wrong(broken, 3)
    assert wrong(found.bits, 4) < wrong(broken, 4)
    assert (found.likelihood[:, 1] > found.likelihood[:, 0] + 0.05).all()
    assert found.changed.tolist() == [
        [int((a[row] != b[row]).sum()) for a, b in zip(found.bits, broken, strict=True)] for row in range(3)
    ]


def test_a_picture_does_not_hang_on_its_company_nor_on_rounds_it_does_not_need(
    demo: Model, text: TextFeatures, prompts: Condition, scales: Schedule
) -> None:
    assert demo.transformer is not None
    broken = damaged(drawn(demo, text, scales).bits, 0.1)
    together = refine(demo.transformer, prompts, scales, broken, 8)
    for row in range(3):
        own = TextFeatures(text.features[row : row + 1, : text.lengths[row]], text.lengths[row : row + 1])
        its = demo.transformer.condition(own)
        alone = refine(demo.transformer, its, scales, [grid[row : row + 1] for grid in broken], 16)
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone.bits, together.bits, strict=True))


@pytest.mark.parametrize("patchify", [False, True])
def test_only_unlikely_bits_are_turned_over(patchify: bool) -> None:
    """Against the logits that sampling sees for the same bits, also where a position has several latent ones."""
    config = tiny.config(bits=4, patchify=patchify)
    model, sizes = tiny.transformer(config), schedule(config.scales, patchify=patchify)
    bits = tiny.random_bits(2, 4, sizes)
    found = refine(model, model.condition(tiny.text(2)), sizes, bits, 1)
    with torch.inference_mode():
        logits = model(tiny.inputs(bits, sizes), tiny.text(2), sizes)
    pairs = logits.unflatten(-1, (-1, 2))
    for k in range(len(sizes)):
        of_one = to_grid((pairs[..., 1] - pairs[..., 0])[:, sizes.slices[k]], sizes.sizes[k], sizes.cell)
        against = torch.where(bits[k], -of_one, of_one)
        assert torch.equal(found.bits[k] ^ bits[k], against > thresholds(sizes)[k])
    assert (found.changed.sum(0) > 0)[-2:].all()


def test_the_likelihood_told_is_that_of_the_bits(
    demo: Model, text: TextFeatures, prompts: Condition, scales: Schedule
) -> None:
    """Of each round at its start, until one has found nothing: then no number follows."""
    assert demo.transformer is not None
    broken = damaged(drawn(demo, text, scales).bits, 0.1)
    for grid, settled in zip(broken, refine(demo.transformer, prompts, scales, broken, 16).bits, strict=True):
        grid[0] = settled[0]
    whole = refine(demo.transformer, prompts, scales, broken, 16).likelihood
    for rounds in range(1, whole.shape[1]):
        before = refine(demo.transformer, prompts, scales, broken, rounds)
        again = refine(demo.transformer, prompts, scales, before.bits, 1).likelihood[:, 0]
        going_on = ~whole[:, rounds].isnan()
        assert torch.allclose(again[going_on], whole[going_on, rounds], atol=1e-5), "rounded as other sums are"
    assert whole.isnan().any()
    assert not whole[:, 0].isnan().any()


def test_the_gain_told_is_that_of_the_bits(
    demo: Model, text: TextFeatures, prompts: Condition, scales: Schedule
) -> None:
    """Exactly where only the last scale can change, after which nothing follows; and near what a next round finds."""
    assert demo.transformer is not None
    broken = damaged(drawn(demo, text, scales).bits, 0.1)
    last = [torch.full((1, 1, *size), k == len(scales) - 1) for k, size in enumerate(scales.sizes)]
    found = refine(demo.transformer, prompts, scales, broken, 1, where=last)
    after = refine(demo.transformer, prompts, scales, found.bits, 1).likelihood[:, 0]
    assert found.changed[:, -1].all()
    assert torch.allclose(found.gain, after - found.likelihood[:, 0], atol=1e-5), "rounded as other sums are"
    found = refine(demo.transformer, prompts, scales, broken, 2)
    after = refine(demo.transformer, prompts, scales, found.bits, 1).likelihood[:, 0]
    assert torch.allclose(found.gain, after - found.likelihood[:, 0], atol=0.03), "finer scales go along"
    assert (found.gain > 0.1).all()


def test_generate_refines(demo: Model, text: TextFeatures, scales: Schedule) -> None:
    assert demo.transformer is not None
    assert demo.tokenizer is not None
    how = plan(demo.sampling.model_copy(update={"refine": 2, "tau": 3.0, "top_p": 1.0}), len(scales))
    image, after = generate(demo.transformer, demo.tokenizer, text, scales, how, [0, 1, 2])
    before = draw_bits(demo.transformer, text, scales, how, [0, 1, 2])
    assert after.refined is not None
    assert after.refined.changed.sum() > 0
    assert before.refined is None
    assert not all(torch.equal(a, b) for a, b in zip(after.bits, before.bits, strict=True))
    assert torch.equal(after.total, pyramid.decode(after.bits, scales))
    with torch.inference_mode():
        assert torch.equal(image[:1], demo.tokenizer.decode(after.total[:1]))
    assert plan(SamplingConfig(), 4).refine == 0
