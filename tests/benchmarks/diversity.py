"""Livelier pictures against pictures as asked for: the demo model at several temperatures and target confidences.

    python -m tests.benchmarks.diversity [--pictures N] [--json]

For each of the 140 triples that are never trained on N pictures are drawn, with the same seeds for every setting.
Adherence is the share of them whose class, colour and place a classifier names as asked for; diversity, how far two
pictures of one prompt lie apart on average: in levels (of 255) per colour value, and as the share of bits that differ.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from bitgen_cli.demo import world
from bitgen_cli.engine.data import to_uint8
from bitgen_cli.engine.model_folder import Model, find_model, load_model
from bitgen_cli.engine.sampling import generate, plan
from bitgen_cli.engine.scales import schedule
from tests.benchmarks.demo_quality import Score, picture_seeds
from tests.benchmarks.judge import load_or_train

TAUS = (0.5, 1.0, 1.5, 2.0)
TARGETS = (0.95, 0.9, 0.85, 0.8)
BATCH = 70


@dataclass(frozen=True)
class Row:
    """What a setting gave.

    Attributes:
        setting: as its flag.
        adherence: share of pictures as asked for.
        levels, bits: how far two pictures of a prompt lie apart.
    """

    setting: str
    adherence: float
    levels: float
    bits: float


@torch.inference_mode()
def drawn(model: Model, scenes: list[world.Scene], seeds: list[int], changes: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Pictures (B, 3, h, w) uint8 and their bits (B, n) bool."""
    assert model.transformer is not None
    assert model.tokenizer is not None
    assert model.text_encoder is not None
    sizes = schedule(model.config.scales, patchify=model.config.transformer.patchify)
    chosen = plan(model.sampling.model_copy(update={"top_p": 1.0, **changes}), len(sizes))
    pictures, bits = [], []
    for first in range(0, len(scenes), BATCH):
        text = model.text_encoder.encode([str(scene) for scene in scenes[first : first + BATCH]])
        some = seeds[first : first + BATCH]
        images, found = generate(model.transformer, model.tokenizer, text, sizes, chosen, some)
        pictures.append(to_uint8(images))
        bits.append(torch.cat([grid.flatten(1) for grid in found.bits], dim=1))
    return torch.cat(pictures), torch.cat(bits)


def apart(values: Tensor, each: int) -> float:
    """Mean difference between two of the rows of each prompt, values (prompts x each, n)."""
    groups = values.float().unflatten(0, (-1, each))
    pairs = [(groups[:, a] - groups[:, b]).abs().mean() for a in range(each) for b in range(a)]
    return float(torch.stack(pairs).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pictures", type=int, default=4, metavar="N", help="of each prompt, at least 2")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    given = parser.parse_args()
    judge, model = load_or_train().judge, load_model(find_model("demo"))
    scenes = [scene for scene in world.scenes(held_out=True) for _ in range(given.pictures)]
    settings = [(f"--tau {tau:g}", {"tau": tau}) for tau in TAUS]
    settings += [(f"--target-confidence {target:g}", {"target_confidence": target}) for target in TARGETS]
    rows = []
    for name, changes in settings:
        pixels, bits = drawn(model, scenes, picture_seeds(0, len(scenes)), changes)
        adherence = Score.of(judge, pixels, scenes).shares()["all three"]
        rows.append(Row(name, adherence, apart(pixels.flatten(1), given.pictures), apart(bits, given.pictures)))
        print(f"{name}: done", file=sys.stderr, flush=True)
    if given.json:
        print(json.dumps([asdict(row) for row in rows]))
        return
    print("| setting | adherence | levels apart | bits apart |\n|---|---|---|---|")
    for row in rows:
        print(f"| `{row.setting}` | {row.adherence:.1%} | {row.levels:.1f} | {row.bits:.1%} |")


if __name__ == "__main__":
    main()
