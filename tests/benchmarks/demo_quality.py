"""How well the demo model draws what it never saw, judged by a classifier trained on the demo world.

    python -m tests.benchmarks.demo_quality [--model demo|FOLDER] [--reconstructions-only] [--grid FILE.png]

Three things are judged: pictures of the world (how good the judge is), their reconstructions through the model's
tokenizer, and pictures drawn for prompts such as "a red dog on the moon". By default the prompts are the 140 triples
that are never trained on; `--split trained` takes 140 others, on which sampling settings are chosen.

Exit status: 0 when every bar that was asked for is reached, 1 when one is missed or could not be measured (a model
folder without a transformer).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from pydantic import ValidationError
from torch import Tensor

from bitgen_cli.config import SamplingConfig
from bitgen_cli.demo import world
from bitgen_cli.engine.data import to_float, to_pil, to_uint8
from bitgen_cli.engine.losses import psnr, ssim
from bitgen_cli.engine.model_folder import Model, find_model, load_model
from bitgen_cli.engine.sampling import generate, plan
from bitgen_cli.engine.scales import Schedule, schedule
from bitgen_cli.engine.tokenizer import Tokenizer
from bitgen_cli.errors import BitgenError
from bitgen_cli.files import atomic_path
from tests.benchmarks import judge as judging
from tests.benchmarks.judge import ASPECTS, Judge, labels

BARS = {
    "judge": {"class": 0.98},
    "reconstructions": {"class": 0.95},
    "samples": {"class": 0.85, "colour": 0.95, "place": 0.95},
}
TEST_SEED = 880_001
"""Of the world pictures that are judged and reconstructed: one of each of the 1400 triples."""

BATCH = 70


@dataclass(frozen=True)
class Score:
    """How many pictures were recognised.

    Attributes:
        right: (B, 3) bool, whether class, colour and place were named as wanted.
        wanted: (B,) indices of the classes wanted.
        mistakes: how often a class was taken for another, as (wanted, named).
    """

    right: Tensor
    wanted: Tensor
    mistakes: Counter[tuple[str, str]]

    @staticmethod
    def of(judge: Judge, pixels: Tensor, scenes: Sequence[world.Scene]) -> Score:
        """Judges one picture (3, h, w) uint8 per scene."""
        wanted, answers = labels(scenes), judge.answers(pixels)
        pairs = zip(wanted[:, 0].tolist(), answers[:, 0].tolist(), strict=True)
        mistakes = Counter((world.CLASSES[w], world.CLASSES[a]) for w, a in pairs if w != a)
        return Score(answers == wanted, wanted[:, 0], mistakes)

    @staticmethod
    def join(scores: Sequence[Score]) -> Score:
        """All pictures of several scores together."""
        return Score(
            torch.cat([score.right for score in scores]),
            torch.cat([score.wanted for score in scores]),
            sum((score.mistakes for score in scores), Counter()),
        )

    def shares(self) -> dict[str, float]:
        """Share of pictures with the right class, colour, place, and all three."""
        means = {name: float(self.right[:, i].float().mean()) for i, name in enumerate(ASPECTS)}
        return means | {"all three": float(self.right.all(1).float().mean())}

    def per_class(self) -> dict[str, float]:
        """Share of each class's pictures whose class was named."""
        return {name: float(self.right[self.wanted == i, 0].float().mean()) for i, name in enumerate(world.CLASSES)}

    def as_json(self) -> dict[str, Any]:
        """Everything as plain numbers."""
        mistakes = [[*pair, count] for pair, count in self.mistakes.most_common()]
        return {**self.shares(), "per_class": self.per_class(), "mistakes": mistakes, "pictures": len(self.right)}


@dataclass(frozen=True)
class Reconstructed:
    """What came back from the tokenizer: its score, and means over the pictures."""

    score: Score
    psnr: float
    ssim: float


@dataclass(frozen=True)
class Painter:
    """The parts of a model that draw, and how they sample."""

    model: Model
    schedule: Schedule
    sampling: SamplingConfig

    @torch.inference_mode()
    def paint(self, scenes: Sequence[world.Scene], seeds: Sequence[int]) -> Tensor:
        """A picture (B, 3, h, w) uint8 of each scene's plain caption."""
        model = self.model
        assert model.transformer is not None
        assert model.tokenizer is not None
        assert model.text_encoder is not None
        chosen = plan(self.sampling, len(self.schedule))
        parts = []
        for first in range(0, len(scenes), BATCH):
            text = model.text_encoder.encode([str(scene) for scene in scenes[first : first + BATCH]])
            some = seeds[first : first + BATCH]
            images, _ = generate(model.transformer, model.tokenizer, text, self.schedule, chosen, some)
            parts.append(to_uint8(images))
        return torch.cat(parts)


def prompts(split: str) -> list[world.Scene]:
    """140 triples, ten of each class: all held-out ones, or as many trained ones, always the same."""
    if split == "held-out":
        return world.scenes(held_out=True)
    rng, trained = random.Random("trained triples"), world.scenes(held_out=False)
    return [scene for name in world.CLASSES for scene in rng.sample([s for s in trained if s.object_class == name], 10)]


@torch.inference_mode()
def reconstruct(judge: Judge, tokenizer: Tokenizer, sizes: Schedule, pixels: Tensor) -> Reconstructed:
    """World pictures, one of each scene in `judging.all_scenes()`, to bits and back."""
    shown, noise, likeness = [], [], []
    for part in pixels.split(BATCH):
        image = to_float(part)
        back = to_uint8(tokenizer.decode(tokenizer.encode(image, sizes)[1]))
        shown.append(back)
        noise.append(psnr(image, to_float(back)))
        likeness.append(ssim(image, to_float(back)))
    score = Score.of(judge, torch.cat(shown), judging.all_scenes())
    return Reconstructed(score, float(torch.cat(noise).mean()), float(torch.cat(likeness).mean()))


def sample(judge: Judge, painter: Painter, scenes: Sequence[world.Scene], seeds: int, per_triple: int) -> list[Score]:
    """A score for each seed, of `per_triple` pictures of every scene."""
    scores = []
    wanted = [scene for scene in scenes for _ in range(per_triple)]
    for seed in range(seeds):
        started = time.perf_counter()
        pixels = painter.paint(wanted, picture_seeds(seed, len(wanted)))
        say(f"seed {seed}: {len(wanted)} pictures in {time.perf_counter() - started:.1f} s")
        scores.append(Score.of(judge, pixels, wanted))
    return scores


def picture_seeds(seed: int, count: int) -> list[int]:
    """One for each picture of a run."""
    return [seed * 1_000_000 + number for number in range(count)]


def draw_grid(painter: Painter, rows: int, file: Path) -> None:
    """Writes samples of held-out triples: a column for each class, a row for each place, the triple below a picture."""
    held_out = world.scenes(held_out=True)
    places = world.PLACES[:rows]
    scenes = [
        s for place in places for name in world.CLASSES for s in held_out if (s.object_class, s.place) == (name, place)
    ]
    pixels = painter.paint(scenes, [held_out.index(scene) for scene in scenes])
    width, height, margin = 2 * pixels.shape[-1], 2 * pixels.shape[-2], 18
    sheet = Image.new("RGB", (len(world.CLASSES) * (width + 4) + 4, rows * (height + margin) + margin), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for column, name in enumerate(world.CLASSES):
        pen.text((4 + column * (width + 4) + width / 2, margin / 2), name, "black", font, "mm")
    for number, (image, scene) in enumerate(zip(pixels, scenes, strict=True)):
        left = 4 + number % len(world.CLASSES) * (width + 4)
        top = margin + number // len(world.CLASSES) * (height + margin)
        sheet.paste(to_pil(image).resize((width, height), Image.Resampling.LANCZOS), (left, top))
        where = (left + width / 2, top + height + margin / 2 - 1)
        pen.text(where, f"{scene.colour}, {scene.place}", (90, 90, 90), font, "mm")
    with atomic_path(file) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)


def check_bars(shares: dict[str, dict[str, float] | None]) -> list[dict[str, Any]]:
    """Every bar of the parts asked for, with what was reached; None where a part could not be measured."""
    rows = []
    for part, measured in shares.items():
        for aspect, bar in BARS[part].items():
            reached = None if measured is None else measured[aspect]
            passed = reached is not None and reached >= bar
            rows.append({"part": part, "aspect": aspect, "bar": bar, "reached": reached, "pass": passed})
    return rows


def table(rows: Sequence[Sequence[str]]) -> str:
    """Text in columns, the first to the left and the others to the right; the first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        first, *others = (
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *others]).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def score_rows(name: str, score: Score, more: Sequence[str] = ("", "")) -> list[str]:
    """A row of the main table."""
    return [name, str(len(score.right)), *(f"{share:.3f}" for share in score.shares().values()), *more]


def print_report(real: Score, back: Reconstructed, seeds: Sequence[Score], bars: Sequence[dict[str, Any]]) -> None:
    """The tables, on stdout."""
    drawn = Score.join(seeds) if seeds else None
    rows = [["", "pictures", *ASPECTS, "all three", "PSNR", "SSIM"], score_rows("world", real)]
    rows.append(score_rows("reconstructions", back.score, (f"{back.psnr:.2f}", f"{back.ssim:.3f}")))
    rows += [score_rows(f"samples, seed {number}", score) for number, score in enumerate(seeds)]
    if drawn is not None:
        rows.append(score_rows("samples, mean", drawn))
    print(table(rows), end="\n\n")

    columns = {"world": real, "reconstructions": back.score} | ({"samples": drawn} if drawn is not None else {})
    accuracies = [score.per_class() for score in columns.values()]
    by_class = [[name, *(f"{part[name]:.3f}" for part in accuracies)] for name in world.CLASSES]
    print(table([["class accuracy", *columns], *by_class]), end="\n\n")
    for name, score in columns.items():
        if score.mistakes:
            common = (
                f"{wanted} taken for {named} {count}x" for (wanted, named), count in score.mistakes.most_common(5)
            )
            print(f"{name}: {', '.join(common)}")
    print()
    for bar in bars:
        reached = "not measured" if bar["reached"] is None else f"{bar['reached']:.3f}"
        verdict = "PASS" if bar["pass"] else "FAIL"
        print(f"{verdict}  {bar['aspect']} of {bar['part']}: {reached}, bar {bar['bar']:.2f}")


def sampling_settings(stored: SamplingConfig, args: argparse.Namespace) -> SamplingConfig:
    """The model's own settings, with those of the command line over them."""
    given = {"cfg": args.cfg, "tau": args.tau, "top_p": args.top_p}
    return SamplingConfig.model_validate(stored.model_dump() | {k: v for k, v in given.items() if v is not None})


def per_scale(text: str) -> float | list[float]:
    """A number, or several with commas between them."""
    numbers = [float(part) for part in text.split(",")]
    return numbers[0] if len(numbers) == 1 else numbers


def say(line: str) -> None:
    """Progress, on stderr."""
    print(line, file=sys.stderr, flush=True)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.demo_quality", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo", help="demo (the built-in model), a model folder or a run folder")
    parser.add_argument("--reconstructions-only", action="store_true", help="leave out the samples")
    parser.add_argument("--split", choices=("held-out", "trained"), default="held-out", help="triples to draw")
    parser.add_argument("--seeds", type=int, default=3, help="how often the triples are drawn (3)")
    parser.add_argument("--per-triple", type=int, default=1, help="pictures of each triple and seed (1)")
    parser.add_argument("--cfg", type=per_scale, help="guidance, or one per scale: 1,2,3,3 (the model's)")
    parser.add_argument("--tau", type=per_scale, help="temperature, or one per scale (the model's)")
    parser.add_argument("--top-p", type=float, help="the model's by default")
    parser.add_argument("--json", action="store_true", help="print numbers instead of tables")
    parser.add_argument("--grid", type=Path, metavar="FILE.png", help="also write a grid of held-out samples")
    parser.add_argument("--grid-rows", type=int, choices=range(1, 11), default=5, metavar="1-10", help="(5)")
    args = parser.parse_args(arguments)
    if args.seeds < 1 or args.per_triple < 1:
        parser.error("--seeds and --per-triple start at 1")
    return args


def run(args: argparse.Namespace) -> int:
    """Judges, prints, and gives the exit status."""
    model = load_model(find_model(args.model))
    assert model.tokenizer is not None
    sizes = schedule(model.config.scales, patchify=model.config.transformer.patchify)
    sampling = sampling_settings(model.sampling, args)
    plan(sampling, len(sizes))
    trained = judging.load_or_train()
    where = f"trained in {trained.seconds:.0f} s" if trained.seconds else "from the cache"
    say(f"judge: {where}, {trained.file}")

    side = sizes.pixels(model.config.tokenizer.patch_size)[0]
    pixels = judging.draw_scenes(judging.all_scenes(), TEST_SEED, side)
    real = Score.of(trained.judge, pixels, judging.all_scenes())
    back = reconstruct(trained.judge, model.tokenizer, sizes, pixels)

    seeds: list[Score] = []
    shares: dict[str, dict[str, float] | None] = {"judge": real.shares(), "reconstructions": back.score.shares()}
    if args.reconstructions_only:
        say("samples: not asked for")
    elif model.transformer is None or model.text_encoder is None:
        say(f"samples: skipped, {model.folder} holds a tokenizer and no transformer yet")
    else:
        painter = Painter(model, sizes, sampling)
        seeds = sample(trained.judge, painter, prompts(args.split), args.seeds, args.per_triple)
        if args.grid is not None:
            draw_grid(painter, args.grid_rows, args.grid)
            say(f"grid: {args.grid}")
    if not args.reconstructions_only:
        shares["samples"] = Score.join(seeds).shares() if seeds else None

    bars = check_bars(shares)
    if args.json:
        print(
            json.dumps(
                {
                    "model": str(model.folder),
                    "fingerprints": model.fingerprints,
                    "split": args.split,
                    "sampling": sampling.model_dump(mode="json"),
                    "judge_seconds": round(trained.seconds, 1),
                    "world": real.as_json(),
                    "reconstructions": back.score.as_json() | {"psnr": back.psnr, "ssim": back.ssim},
                    "samples": Score.join(seeds).as_json() if seeds else None,
                    "seeds": [score.as_json() for score in seeds],
                    "bars": bars,
                },
                indent=2,
            )
        )
    else:
        print(f"model: {model.folder}")
        if seeds:
            chosen = sampling.model_dump(mode="json", include={"cfg", "tau", "top_p", "top_k"})
            print(f"samples: {args.split} triples, {', '.join(f'{k} {v}' for k, v in chosen.items())}")
        print()
        print_report(real, back, seeds, bars)
    return 0 if all(bar["pass"] for bar in bars) else 1


def main() -> None:
    """Runs the command line."""
    args = parse()
    try:
        code = run(args)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        say(f"error: {problems}")
        code = 2
    except BitgenError as error:
        say(f"error: {error}")
        code = int(error.exit_code)
    sys.exit(code)


if __name__ == "__main__":
    main()
