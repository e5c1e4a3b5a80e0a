"""What is left out at each level, which positions are predicted, and what the others get in their place."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import Tensor

from bitgen_cli.config import SamplingConfig, ScalesConfig
from bitgen_cli.engine import pruning, pyramid
from bitgen_cli.engine.layers import Layout, Sight, modulated_norm
from bitgen_cli.engine.sampling import Drawn, draw_bits, plan
from bitgen_cli.engine.scales import PUBLISHED, RESOLUTIONS, Schedule, consecutive, schedule

SIZES = ((1, 1), (4, 4), (8, 6), (8, 8), (12, 9))
"""At level 3 the last two scales keep 16 and 44 positions of 64 and 108."""
LEVELS = range(1, len(pruning.LEVELS) + 1)


def scales(cell: int = 1) -> Schedule:
    return Schedule(0.75, SIZES, SIZES[-1], cell)


def draw(
    seeds: list[int], patchify: bool = False, logits: list[Tensor] | None = None, **changes: object
) -> Drawn:
    config, table = tiny.config(patchify=patchify), scales(2 if patchify else 1)
    sampling = SamplingConfig.model_validate({"cfg": 3.0, "top_p": 1.0} | changes)
    text = tiny.text(1).repeat(len(seeds))
    seen = [] if logits is None else logits
    return draw_bits(
        tiny.transformer(config), text, table, plan(sampling, len(table)), seeds, on_logits=lambda _, x: seen.append(x)
    )


def test_as_many_levels_as_can_be_configured() -> None:
    SamplingConfig(fast=len(pruning.LEVELS))
    with pytest.raises(ValueError, match="less than or equal"):
        SamplingConfig(fast=len(pruning.LEVELS) + 1)


@pytest.mark.parametrize("resolution", RESOLUTIONS)
@pytest.mark.parametrize("ratio", PUBLISHED)
def test_levels_of_every_published_schedule(ratio: float, resolution: str) -> None:
    config = ScalesConfig.model_validate({"published": True, "resolution": resolution})
    table = schedule(config, patchify=False, ratio=ratio)
    assert pruning.kept_counts(table, 0) == table.counts
    assert not any(pruning.late_scales(table, 0))
    more = table.counts
    for level in LEVELS:
        kept, late = pruning.kept_counts(table, level), pruning.late_scales(table, level)
        assert late == tuple(sorted(late)), "no scale after a late one is early"
        assert late[-1]
        assert not late[0]
        assert all(1 <= few <= many for few, many in zip(kept, more, strict=True)), "a higher level keeps no more"
        assert all(k == count for k, count, is_late in zip(kept, table.counts, late, strict=True) if not is_late)
        more = kept
    assert sum(more) < 0.7 * table.positions


def test_a_scale_no_finer_than_the_one_before_keeps_something() -> None:
    table = Schedule(1.0, ((1, 1), (9, 9), (9, 9)), (9, 9))
    assert pruning.kept_counts(table, 3) == (1, 80, 1)


def test_late_scales_are_cooler_instead_of_guided() -> None:
    late = (False, True, True, True)
    cfg, tau = pruning.unguided((3.0, 3.0, 1.0, 0.5), (1.0, 0.8, 0.8, 0.8), late)
    assert cfg == (3.0, 1.0, 1.0, 1.0)
    assert tau == (1.0, 0.4, 0.8, 0.8)


def test_pivotal_positions_are_those_that_differ_from_what_is_around_them() -> None:
    seen = torch.zeros(3, 2, 6, 5)
    seen[0, 1, 2, 3] = 1  # a spot
    seen[1, :, :, 2:] = 1  # an edge between columns 1 and 2
    spot, edge, flat = pruning.pivotal(seen, 12)
    assert 2 * 5 + 3 in spot.tolist()
    assert edge.tolist() == [row * 5 + column for row in range(6) for column in (1, 2)]
    assert flat.tolist() == list(range(12)), "the first of equals"
    assert pruning.pivotal(seen[1:2], 12)[0].tolist() == edge.tolist(), "whatever else is in the batch"
    doubled = seen.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert pruning.pivotal(doubled, 12, cell=2)[1].tolist() == edge.tolist()


def test_restored_positions_take_over_the_scale_before() -> None:
    generator = torch.Generator().manual_seed(0)
    before, own = torch.randn(2, 6, 4, generator=generator), torch.randn(2, 3, 4, generator=generator)
    kept = torch.tensor([[0, 5, 19], [1, 2, 3]])
    found = pruning.restored(own, kept, before, (2, 3), (4, 5))
    for picture in range(2):
        for position in range(20):
            row, column = divmod(position, 5)
            if position in kept[picture]:
                expected = own[picture, kept[picture].tolist().index(position)]
            else:
                expected = before[picture, row * 2 // 4 * 3 + column * 3 // 5]
            assert torch.equal(found[picture, position], expected)


@pytest.mark.parametrize("patchify", [False, True])
def test_predicting_all_positions_is_predicting_the_scale(patchify: bool) -> None:
    config, table = tiny.config(patchify=patchify), scales(2 if patchify else 1)
    model = tiny.transformer(config)
    inputs = tiny.inputs(tiny.random_bits(2, 6, table), table)
    condition, whole, listed = model.condition(tiny.text(2)), model.new_cache(2, table), model.new_cache(2, table)
    for k, (positions, count) in enumerate(zip(table.slices, table.counts, strict=True)):
        seen = None if k == 0 else inputs[:, positions.start - 1 : positions.stop - 1]
        every = torch.arange(count).expand(2, -1)
        expected = model.step(k, seen, condition, table, whole)
        assert torch.equal(model.step(k, seen, condition, table, listed, kept=every), expected)


def test_predicted_positions_see_each_other_and_those_predicted_before() -> None:
    """Against one pass over the sequence of the predicted positions alone."""
    table, text, model = scales(), tiny.text(2, (3, 8)), tiny.transformer(tiny.config())
    counts = pruning.kept_counts(table, 3)
    inputs = tiny.inputs(tiny.random_bits(2, 6, table), table)
    generator = torch.Generator().manual_seed(0)
    kept = [
        torch.stack([torch.randperm(whole, generator=generator)[:count].sort().values for _ in range(2)])
        for whole, count in zip(table.counts, counts, strict=True)
    ]
    condition, cache = model.condition(text), model.new_cache(2, table, counts)
    found, streams, places = [], [], []
    for k, positions in enumerate(table.slices):
        seen = None
        x = model._start(condition.pooled)
        if k > 0:
            seen = pruning.gather(inputs[:, positions.start - 1 : positions.stop - 1], kept[k])
            x = model.bit_embedding(seen)
        found.append(model.step(k, seen, condition, table, cache, kept=kept[k]))
        streams.append(x + model.scale_embedding.weight[k])
        places.append(kept[k] + positions.start)
    x, rope = torch.cat(streams, dim=1), model.rope(table).at(torch.cat(places, dim=1))
    layout = Layout(rope, tuple(Sight(0, at.start, at.stop) for at in consecutive(counts)), (sum(counts),))
    projected, _, modulation, head = model._read(text)
    for block in model.blocks:
        x = block(x, modulation, projected, text.mask, layout, None)
    scale, shift = head.unbind(2)
    expected = model.head(modulated_norm(x, scale, shift, model.dtype))
    torch.testing.assert_close(torch.cat(found, dim=1), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("patchify", [False, True])
@pytest.mark.parametrize("changes", [{}, {"cfg_layer": 1}, {"target_confidence": 0.8}])
def test_every_scale_has_all_its_bits(patchify: bool, changes: dict[str, object]) -> None:
    logits: list[Tensor] = []
    table, drawn = scales(2 if patchify else 1), draw([3, 4], patchify, logits, fast=3, **changes)
    assert [grid.shape[2:] for grid in drawn.bits] == list(table.latent_sizes)
    assert torch.equal(drawn.total, pyramid.decode(drawn.bits, table)), "the sum is that of the bits"
    totals = list(pyramid.sums(drawn.bits, table))
    for k in (3, 4):
        kept = pruning.pivotal(
            pyramid.next_input(totals[k - 1], table.latent_sizes[k]), pruning.kept_counts(table, 3)[k], table.cell
        )
        expected = pruning.restored(pruning.gather(logits[k], kept), kept, logits[k - 1], SIZES[k - 1], SIZES[k])
        assert torch.equal(logits[k], expected)
        taken_over = pruning.restored(logits[k][:, :0], kept[:, :0], logits[k - 1], SIZES[k - 1], SIZES[k])
        assert not torch.isclose(pruning.gather(logits[k], kept), pruning.gather(taken_over, kept)).all(-1).any()


def test_level_0_leaves_nothing_out() -> None:
    assert all(map(torch.equal, draw([5, 6]).bits, draw([5, 6], fast=0).bits))
    early, late = draw([5, 6]).bits, draw([5, 6], fast=3).bits
    assert all(map(torch.equal, early[:2], late[:2])), "scales before the late ones stay as they are"
    assert not torch.equal(early[-1], late[-1])


def test_guidance_and_temperature_of_late_scales() -> None:
    """A level that prunes nothing here is a plan without guidance and half as warm."""
    table, model = scales(), tiny.transformer(tiny.config())
    late = pruning.late_scales(table, 2)
    assert late == (False, False, True, True, True)
    kept = pruning.Level(pruning.LEVELS[1].late, kept=100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pruning, "LEVELS", (kept,) * 3)
        found = draw([5, 6], fast=2).bits
    by_hand = SamplingConfig(cfg=[3, 3, 1, 1, 1], tau=[1, 1, 0.5, 0.5, 0.5], top_p=1.0)
    text = tiny.text(1).repeat(2)
    expected = draw_bits(model, text, table, plan(by_hand, len(table)), [5, 6]).bits
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("patchify", [False, True])
def test_a_picture_does_not_hang_on_its_company(level: int, patchify: bool) -> None:
    together, alone = draw([5, 6, 7], patchify, fast=level), draw([7], patchify, fast=level)
    assert all(torch.equal(both[2:], one) for both, one in zip(together.bits, alone.bits, strict=True))
