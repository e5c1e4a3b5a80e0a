"""Scale schedules: which sizes a picture is predicted at, per aspect ratio and pixel budget.

Source: INFINITY_FORMAT section 8 (infinity/utils/dynamic_resolution.py). An aspect ratio is height / width.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from itertools import accumulate

from bitgen_cli.config import ScalesConfig
from bitgen_cli.errors import UsageError

RESOLUTIONS = {"0.06M": 7, "0.25M": 10, "0.60M": 12, "1M": 13}
"""Pixel budgets and how many entries of a ratio's list each one uses."""

_PUBLISHED = {
    1.0: "1x1 2x2 4x4 6x6 8x8 12x12 16x16 20x20 24x24 32x32 40x40 48x48 64x64",
    1.25: "1x1 2x2 3x3 5x4 10x8 15x12 20x16 25x20 30x24 35x28 45x36 55x44 70x56",
    1.333: "1x1 2x2 4x3 8x6 12x9 16x12 20x15 24x18 28x21 36x27 48x36 60x45 72x54",
    1.5: "1x1 2x2 3x2 6x4 9x6 15x10 21x14 27x18 33x22 39x26 48x32 63x42 78x52",
    1.75: "1x1 2x2 3x3 7x4 11x6 14x8 21x12 28x16 35x20 42x24 56x32 70x40 84x48",
    2.0: "1x1 2x2 4x2 6x3 10x5 16x8 22x11 30x15 38x19 46x23 60x30 74x37 90x45",
    2.5: "1x1 2x2 5x2 10x4 15x6 20x8 25x10 30x12 40x16 50x20 65x26 80x32 100x40",
    3.0: "1x1 2x2 6x2 9x3 15x5 21x7 27x9 36x12 45x15 54x18 72x24 90x30 111x37",
}


def _published_table() -> dict[float, tuple[tuple[int, int], ...]]:
    """All 15 ratios in published order: 1.0, then each ratio followed by its landscape twin."""
    table: dict[float, tuple[tuple[int, int], ...]] = {}
    for ratio, text in _PUBLISHED.items():
        sizes = tuple((int(h), int(w)) for h, w in (size.split("x") for size in text.split()))
        table[ratio] = sizes
        if ratio != 1.0:
            table[int(1 / ratio * 1000) / 1000] = tuple((w, h) for h, w in sizes)
    return table


PUBLISHED = _published_table()


@dataclass(frozen=True)
class Schedule:
    """The scales one picture is predicted at, coarsest first.

    Attributes:
        ratio: height / width, the key of the table it comes from.
        sizes: (h, w) of each scale of the transformer; the last is the full grid.
        rope_grid: (H, W) the rotary positions are spread over: the last scale of the 1M schedule of the same ratio,
            whatever budget is in use (INFINITY_FORMAT section 4).
        cell: latent positions along one side of a transformer position: 2 when patchified, else 1.
    """

    ratio: float
    sizes: tuple[tuple[int, int], ...]
    rope_grid: tuple[int, int]
    cell: int = 1

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def full(self) -> tuple[int, int]:
        """(H, W) of the last scale, in transformer positions."""
        return self.sizes[-1]

    @cached_property
    def latent_sizes(self) -> tuple[tuple[int, int], ...]:
        """(h, w) of each scale in latent positions: twice the transformer's when patchified."""
        return tuple((h * self.cell, w * self.cell) for h, w in self.sizes)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Positions of each scale."""
        return tuple(h * w for h, w in self.sizes)

    @cached_property
    def slices(self) -> tuple[slice, ...]:
        """Where each scale lies in the sequence of all positions."""
        return consecutive(self.counts)

    @property
    def positions(self) -> int:
        """L: positions over all scales."""
        return sum(self.counts)

    @property
    def kept_positions(self) -> int:
        """Positions whose keys and values later scales attend to: those of all but the last."""
        return self.positions - self.counts[-1]

    def pixels(self, patch_size: int) -> tuple[int, int]:
        """Height and width of the picture in pixels, for a tokenizer of that patch size."""
        h, w = self.latent_sizes[-1]
        return h * patch_size, w * patch_size


def consecutive(counts: Sequence[int]) -> tuple[slice, ...]:
    """Where parts of these lengths lie one after the other."""
    return tuple(slice(end - count, end) for end, count in zip(accumulate(counts), counts, strict=True))


def ratios(config: ScalesConfig) -> tuple[float, ...]:
    """Aspect ratios (height / width) a model can draw, in table order."""
    if config.custom is None:
        return tuple(PUBLISHED)
    return tuple(float(ratio) for ratio in config.custom)


def nearest_ratio(h_div_w: float, config: ScalesConfig) -> float:
    """The ratio of the table nearest to `h_div_w` (smallest absolute difference; the first of equals)."""
    return nearest(h_div_w, ratios(config))


def nearest(h_div_w: float, among: Sequence[float]) -> float:
    """Of several ratios the one nearest to `h_div_w` (smallest absolute difference; the first of equals)."""
    return min(among, key=lambda ratio: abs(h_div_w - ratio))


def parse_aspect(aspect: str) -> float:
    """The height / width of a shape written W:H.

    Raises:
        UsageError: it is written otherwise.
    """
    found = re.fullmatch(r"([0-9]{1,6}):([0-9]{1,6})", aspect)
    if found is None or not (int(found[1]) and int(found[2])):
        raise UsageError(f"--aspect {aspect!r} is not W:H", "for example 16:9")
    return int(found[2]) / int(found[1])


def aspect_of(ratio: float) -> str:
    """A height / width as W:H in small numbers."""
    shape = Fraction(1 / ratio).limit_denominator(16) if ratio >= 1 / 16 else Fraction(round(1 / ratio))
    return f"{max(1, shape.numerator)}:{shape.denominator}"


def buckets(config: ScalesConfig, aspects: Sequence[str] = ()) -> tuple[float, ...]:
    """The aspect ratios (height / width) that pictures are sorted into, in table order.

    Args:
        config: the model's table.
        aspects: shapes W:H; of each the nearest ratio of the table is taken. Without any, all ratios are.

    Raises:
        UsageError: a shape is written otherwise, or the model has no other ratio than one.
    """
    known = ratios(config)
    wanted = {aspect: parse_aspect(aspect) for aspect in aspects}
    for aspect, ratio in wanted.items():
        if len(known) == 1 and abs(known[0] - ratio) > 0.01:
            raise UsageError(f"this model has height / width {known[0]:g} alone, not --aspect {aspect}")
    chosen = {nearest(ratio, known) for ratio in wanted.values()}
    return tuple(ratio for ratio in known if ratio in chosen or not chosen)


def schedule(
    config: ScalesConfig, *, patchify: bool, ratio: float = 1.0, resolution: str | None = None
) -> Schedule:
    """The schedule of one aspect ratio and pixel budget.

    Args:
        config: published table or custom sizes.
        patchify: whether the transformer predicts 2x2 latent positions at once.
        ratio: an aspect ratio (height / width) of the table; see `nearest_ratio`.
        resolution: pixel budget; None takes the configured one.

    Raises:
        UsageError: the ratio or the resolution is not in the table.
    """
    cell = 2 if patchify else 1
    known = ratios(config)
    if ratio not in known:
        raise UsageError(f"no schedule for aspect ratio {ratio}", f"known: {', '.join(map(str, known))}")
    if config.custom is not None:
        if resolution is not None:
            raise UsageError(f"this model has one size per aspect ratio, not --resolution {resolution}")
        sizes = next(tuple(sizes) for key, sizes in config.custom.items() if float(key) == ratio)
        return Schedule(ratio, sizes, sizes[-1], cell)
    budget = resolution or config.resolution
    if budget not in RESOLUTIONS:
        raise UsageError(f"unknown resolution {budget!r}", f"known: {', '.join(RESOLUTIONS)}")
    sizes = PUBLISHED[ratio]
    return Schedule(ratio, sizes[: RESOLUTIONS[budget]], sizes[-1], cell)


def budgeted(
    config: ScalesConfig, *, patchify: bool, ratio: float = 1.0, budget: str | int | None = None
) -> Schedule:
    """The schedule of a tokenizer's training: as `schedule`, or the first so many scales of a custom one.

    Args:
        budget: pixel budget of a published schedule, or a number of scales; None takes the configured schedule.
    """
    if not isinstance(budget, int):
        return schedule(config, patchify=patchify, ratio=ratio, resolution=budget)
    whole = schedule(config, patchify=patchify, ratio=ratio)
    return replace(whole, sizes=whole.sizes[:budget])


def largest(budgets: Sequence[str | int] | None) -> str | int | None:
    """The budget of the most pixels; None where there are none."""
    if budgets is None:
        return None
    return max(budgets, key=lambda budget: budget if isinstance(budget, int) else RESOLUTIONS[budget])
