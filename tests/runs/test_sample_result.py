"""What is told of pictures that were written."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitgen_cli.runs.sample_result import MOST_SEEDS, SampledPicture, SampleResult


@pytest.mark.parametrize(
    ("seeds", "told"),
    [
        ([], None),
        ([None, None], None),
        ([7], "seed 7"),
        ([7, None], "seed 7"),
        ([7, 7], "seed 7"),
        ([7, 8, 9], "seeds 7 to 9"),
        ([90, 91, 5, 6, 30], "seeds 5 to 6, 30, 90 to 91"),
        (list(range(0, 2 * MOST_SEEDS + 6, 2)), "seeds 0, 2, 4, 6, 8, 10, 12, 14 and 3 more"),
    ],
)
def test_seeds_are_told_where_they_follow_each_other_as_one(seeds: list[int | None], told: str | None) -> None:
    pictures = [SampledPicture(Path("a.png"), "a dog", seed, {}) for seed in seeds]
    assert SampleResult(pictures, None, 1.0).seeds == told
