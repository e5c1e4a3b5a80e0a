"""Recorded scales give the bits of the transformer; recordings that compute again stand in for a GPU's graphs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tiny
import torch
from torch import Tensor

from bitgen_cli.config import SamplingConfig
from bitgen_cli.engine.graphs import KEPT, RecordedTransformer
from bitgen_cli.engine.sampling import draw_bits, plan
from bitgen_cli.engine.scales import Schedule, schedule
from bitgen_cli.engine.transformer import Transformer


class Rerun:
    """Computes again into the tensor of the first result, from whatever the tensors it read hold by then."""

    made = 0
    replays = 0

    def record(self, compute: Callable[[], Tensor]) -> Tensor:
        Rerun.made += 1
        self._compute, self._result = compute, torch.full_like(compute(), torch.nan)
        return self._result

    def replay(self) -> None:
        Rerun.replays += 1
        self._result.copy_(self._compute())


@pytest.fixture(autouse=True)
def _from_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rerun, "made", 0)
    monkeypatch.setattr(Rerun, "replays", 0)


@pytest.fixture
def model() -> Transformer:
    return tiny.transformer(tiny.config())


@pytest.fixture
def scales() -> Schedule:
    return schedule(tiny.config().scales, patchify=False)


def test_recordings_draw_the_bits_of_the_transformer(model: Transformer, scales: Schedule) -> None:
    """Prompts of several lengths, padded ones, guidance that ends, guidance at a block."""
    recorded = RecordedTransformer(model, lambda: Rerun)
    chosen = [
        (SamplingConfig(cfg=3.0), (4, 4)),
        (SamplingConfig(cfg=3.0), (4, 6)),
        (SamplingConfig(cfg=[3.0, 3.0, 2.0, 1.0]), (4, 4)),
        (SamplingConfig(cfg=2.0, cfg_layer=1), (6, 4)),
    ]
    for _ in range(3):
        for seed, (sampling, lengths) in enumerate(chosen):
            how = plan(sampling, len(scales))
            text = tiny.text(2, lengths)
            expected = draw_bits(model, text, scales, how, [seed, 7])
            found = draw_bits(recorded, text, scales, how, [seed, 7])
            for one, other in zip(expected.bits, found.bits, strict=True):
                assert torch.equal(one, other)
            assert torch.equal(expected.total, found.total)
    assert 0 < Rerun.made < Rerun.replays


class Shared(Rerun):
    """Recordings of one memory: what one has given is gone as soon as another one plays."""

    given: Tensor | None = None

    def replay(self) -> None:
        if Shared.given is not None:
            Shared.given.fill_(torch.nan)
        super().replay()
        Shared.given = self._result


def test_what_refinement_remembers_is_not_played_over(model: Transformer, scales: Schedule) -> None:
    recorded = RecordedTransformer(model, lambda: Shared)
    how = plan(SamplingConfig(cfg=2.0, tau=2.0, refine=1), len(scales))
    for seed in range(3):
        expected = draw_bits(model, tiny.text(2), scales, how, [seed, 7]).said
        found = draw_bits(recorded, tiny.text(2), scales, how, [seed, 7]).said
        assert expected is not None
        assert found is not None
        assert torch.equal(found.conditional, expected.conditional)
        assert found.unconditional is not None
        assert expected.unconditional is not None
        assert torch.equal(found.unconditional, expected.unconditional)
    assert Shared.replays > 0


@pytest.mark.parametrize("layer", [0, 1])
def test_recordings_follow_the_positions_that_are_predicted(model: Transformer, layer: int) -> None:
    sizes = ((1, 1), (4, 4), (8, 8), (10, 10))
    scales, recorded = Schedule(1.0, sizes, sizes[-1]), RecordedTransformer(model, lambda: Rerun)
    for fast in (1, 1, 1, 3, 3, 3, 0, 0, 0):
        how = plan(SamplingConfig(cfg_layer=layer, fast=fast), len(scales))
        seeds = [Rerun.replays, 7]
        expected = draw_bits(model, tiny.text(2), scales, how, seeds)
        found = draw_bits(recorded, tiny.text(2), scales, how, seeds)
        assert all(map(torch.equal, expected.bits, found.bits))
    assert 0 < Rerun.made < Rerun.replays


def test_nothing_is_recorded_for_one_picture(model: Transformer, scales: Schedule) -> None:
    recorded = RecordedTransformer(model, lambda: Rerun)
    draw_bits(recorded, tiny.text(1), scales, plan(SamplingConfig(), len(scales)), [0])
    assert Rerun.made == 0


def test_changed_weights_are_not_played_from_old_recordings(model: Transformer, scales: Schedule) -> None:
    """A subject puts other tensors in the place of weights, and takes them away again."""
    recorded, how = RecordedTransformer(model, lambda: Rerun), plan(SamplingConfig(), len(scales))

    def draw(predictor: Transformer | RecordedTransformer) -> list[Tensor]:
        return draw_bits(predictor, tiny.text(1), scales, how, [0]).bits

    before = [draw(recorded) for _ in range(3)][-1]
    kept = model.head.weight.data
    model.head.weight.data = -kept
    changed, expected = [draw(recorded) for _ in range(3)][-1], draw(model)
    assert all(torch.equal(one, other) for one, other in zip(changed, expected, strict=True))
    assert not all(torch.equal(one, other) for one, other in zip(changed, before, strict=True))
    model.head.weight.data = kept
    made = Rerun.made
    assert all(torch.equal(one, other) for one, other in zip(draw(recorded), before, strict=True))
    assert Rerun.made == made


def test_another_size_of_picture_or_batch_is_recorded_anew(model: Transformer, scales: Schedule) -> None:
    recorded, how = RecordedTransformer(model, lambda: Rerun), plan(SamplingConfig(), len(scales))
    for batch in (1, 2, 1):
        for _ in range(2):
            seeds = list(range(batch))
            found = draw_bits(recorded, tiny.text(batch), scales, how, seeds)
            expected = draw_bits(model, tiny.text(batch), scales, how, seeds)
            assert torch.equal(found.total, expected.total)
    assert Rerun.made == 3 * len(scales)


def test_few_recordings_are_kept(model: Transformer, scales: Schedule) -> None:
    recorded, how = RecordedTransformer(model, lambda: Rerun), plan(SamplingConfig(), len(scales))
    for length in (*range(1, KEPT + 2), 1, 1):
        draw_bits(recorded, tiny.text(1, (length,)), scales, how, [0])
    assert Rerun.made == len(scales)
