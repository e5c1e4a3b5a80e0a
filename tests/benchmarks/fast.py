"""What `sample --fast LEVEL` saves, and what it costs: time, arithmetic, bits that change, pictures as asked for.

    python -m tests.benchmarks.fast [--pictures N] [--repeat N] [--resolution BUDGET] [--json]

Time is that of the transformer for one square picture of the 32bit preset, with guidance and random weights in fp32;
the levels take turns, and the fastest of the repetitions counts. Arithmetic is that of the blocks for one 1024x1024
picture of infinity-2b. Bits and adherence are of the demo model: for each of the 140 triples that are never trained on
N pictures are drawn, with the same seeds at every level; a bit that changes makes the following ones change. Adherence
is the share of pictures whose class, colour and place a classifier names as asked for.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from bitgen_cli.config import ModelConfig
from bitgen_cli.demo import world
from bitgen_cli.engine import pruning
from bitgen_cli.engine.model_folder import find_model, load_model
from bitgen_cli.engine.sampling import draw_bits, plan
from bitgen_cli.engine.scales import RESOLUTIONS, Schedule, schedule
from bitgen_cli.engine.transformer import TextFeatures, Transformer
from bitgen_cli.presets import resolve
from tests.benchmarks.demo_quality import Score, picture_seeds
from tests.benchmarks.diversity import drawn
from tests.benchmarks.judge import load_or_train

LEVELS = range(len(pruning.LEVELS) + 1)
PROMPT_LENGTH = 20
GUIDANCE = 3.0


@dataclass(frozen=True)
class Row:
    """What a level gave.

    Attributes:
        level: 0 leaves nothing out.
        seconds: for the bits of one picture.
        arithmetic: share of level 0's.
        late, bits: share of bits that are those of level 0, on late scales (level 3's) and on all.
        adherence: share of pictures as asked for.
    """

    level: int
    seconds: float
    arithmetic: float
    late: float
    bits: float
    adherence: float


def square(model: ModelConfig, resolution: str | None = None) -> Schedule:
    """The schedule of square pictures."""
    return schedule(model.scales, patchify=model.transformer.patchify, resolution=resolution)


def arithmetic(model: ModelConfig, level: int) -> int:
    """Multiplications in the blocks for one guided picture: linear layers, and attention to positions and to text."""
    geometry, scales = model.transformer, square(model)
    layers = 6 * geometry.width**2 + 2 * geometry.width * geometry.ffn_width
    total = seen = 0
    for late, count in zip(pruning.late_scales(scales, level), pruning.kept_counts(scales, level), strict=True):
        seen += count
        attention = 2 * geometry.width * (seen + PROMPT_LENGTH)
        total += (1 if late else 2) * count * (layers + attention)
    return total * geometry.depth


def times(repeat: int, resolution: str) -> list[float]:
    """Seconds of the fastest of `repeat` drawings at each level, after one to warm up."""
    config = resolve("32bit", environment={}).config
    generator = torch.Generator().manual_seed(0)
    transformer = Transformer(config.model).eval().requires_grad_(False)
    transformer.initialise(generator)
    scales = square(config.model, resolution)
    text = torch.randn(1, PROMPT_LENGTH, config.model.transformer.text_width, generator=generator)
    plans = [
        plan(config.sampling.model_copy(update={"cfg": GUIDANCE, "fast": level}), len(scales)) for level in LEVELS
    ]
    seconds = [float("inf")] * len(plans)
    for turn in range(repeat + 1):
        for level, how in enumerate(plans):
            started = time.perf_counter()
            draw_bits(transformer, TextFeatures(text, (PROMPT_LENGTH,)), scales, how, [0])
            if turn > 0:
                seconds[level] = min(seconds[level], time.perf_counter() - started)
    return seconds


def equal(some: Tensor, others: Tensor) -> float:
    """Share of bits that are the same."""
    return float((some == others).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pictures", type=int, default=4, metavar="N", help="of each prompt")
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="drawings at each level; the fastest counts")
    parser.add_argument("--resolution", choices=RESOLUTIONS, default="0.06M", help="of the pictures that are timed")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    given = parser.parse_args()
    seconds, large = times(given.repeat, given.resolution), resolve("infinity-2b", environment={}).config.model
    judge, model = load_or_train().judge, load_model(find_model("demo"))
    scenes = [scene for scene in world.scenes(held_out=True) for _ in range(given.pictures)]
    scales = square(model.config)
    early = sum(c for c, late in zip(scales.counts, pruning.late_scales(scales, LEVELS[-1]), strict=True) if not late)
    first = early * model.config.bits_per_position
    rows: list[Row] = []
    whole: Tensor | None = None
    for level in LEVELS:
        changes = {"top_p": model.sampling.top_p, "fast": level}
        pixels, bits = drawn(model, scenes, picture_seeds(0, len(scenes)), changes)
        whole = bits if whole is None else whole
        rows.append(
            Row(
                level,
                seconds[level],
                arithmetic(large, level) / arithmetic(large, 0),
                equal(bits[:, first:], whole[:, first:]),
                equal(bits, whole),
                Score.of(judge, pixels, scenes).shares()["all three"],
            )
        )
        print(f"level {level}: done", file=sys.stderr, flush=True)
    if given.json:
        print(json.dumps([asdict(row) for row in rows]))
        return
    print(f"| level | transformer, {given.resolution} | arithmetic, 1024x1024 | late bits | all bits | as asked for |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        faster, less = rows[0].seconds / row.seconds, 1 / row.arithmetic
        print(f"| {row.level} | {row.seconds:.2f} s, {faster:.2f} times as fast | {row.arithmetic:.0%}, "
              f"{less:.1f} times less | {row.late:.1%} | {row.bits:.1%} | {row.adherence:.1%} |")  # fmt: skip


if __name__ == "__main__":
    main()
