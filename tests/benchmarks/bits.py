"""What bits buy: tokenizers of 16, 32 and 64 bits, and one used with each of these numbers, on pictures held out.

    python -m tests.benchmarks.bits [--runs FOLDER] [--steps N] [--pictures N] [--device NAME] [--json]

All are trained by the recipe of preset demo on the same pictures in the same order, each seen once at most; those of
the elastic one are decoded with every number of bits (`every_bit_count`), or with one that is drawn per batch. Runs are
kept in FOLDER: what is finished there is measured, what was stopped goes on. Measured is on the CPU, on pictures of
another seed of the demo world, whole and rounded to 8 bits as a picture file holds them.

Ends with 1 where more bits do not show better.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import Tensor

from bitgen_cli.engine.checkpoint import RunFolder
from bitgen_cli.engine.data import to_float, to_tensor, to_uint8
from bitgen_cli.engine.device import keep_freed_memory
from bitgen_cli.engine.losses import psnr, ssim
from bitgen_cli.engine.model_folder import find_model, load_model
from bitgen_cli.engine.scales import schedule
from bitgen_cli.engine.sources import open_source
from bitgen_cli.presets import resolve
from bitgen_cli.report import Silent
from bitgen_cli.runs.resume import resume
from bitgen_cli.runs.train import TrainOptions, train

COUNTS = (16, 32, 64)
TRAINING, HELD_OUT = "world:40000", "world:{count}:7"
RECIPE = (
    "training.tokenizer.precision=fp32",
    "training.tokenizer.export_precision=fp32",
    "training.tokenizer.sample_every=0",
    "training.tokenizer.save_every=100",
    "training.tokenizer.keep_last=1",
)
ELASTIC = ("model.tokenizer.bits=64", f"model.tokenizer.active_bits={list(COUNTS)}")
TRAININGS = {
    **{f"bits{count}": (f"model.tokenizer.bits={count}",) for count in COUNTS},
    "elastic": (*ELASTIC, "training.tokenizer.every_bit_count=true"),
    "elastic-drawn": ELASTIC,
}
"""Name of a run to what sets it apart."""
BAR = 0.2
"""dB that one tokenizer for all numbers of bits may lose against one made for a number alone."""
BATCH = 20


@dataclass(frozen=True)
class Row:
    """One tokenizer, used with one number of bits.

    Attributes:
        run: name of its training.
        bits: per position.
        psnr, ssim: means over the held-out pictures, dB and at most 1.
        positions: of a picture, over all scales.
        bits_per_picture: positions x bits.
        seconds: to encode and decode a picture, one at a time.
        seen: pictures it was trained on.
        decoded: reconstructions it was trained by.
        each: PSNR of every picture, in order.
    """

    run: str
    bits: int
    psnr: float
    ssim: float
    positions: int
    bits_per_picture: int
    seconds: float
    seen: int
    decoded: int
    each: tuple[float, ...]


def trained(name: str, folder: Path, steps: int, device: str = "cpu", workers: int = 0) -> Path:
    """The run of that name: finished already, resumed, or begun."""
    run = folder / name
    state = run / "state.json"
    if not state.is_file():
        length = (f"training.tokenizer.steps={steps}", f"training.tokenizer.workers={workers}")
        resolved = resolve("demo", overrides=[*TRAININGS[name], *RECIPE, *length])
        say(f"{name}: training")
        train(TrainOptions(resolved, None, TRAINING, run, device=device), Silent())
    elif not json.loads(state.read_text())["finished"]:
        say(f"{name}: training goes on")
        resume(run, Silent(), device=device)
    return run


def held_out(count: int, side: int) -> Tensor:
    """Pictures (count, 3, side, side) uint8 that no training saw."""
    source = open_source(HELD_OUT.format(count=count), picture_size=side)
    return torch.stack([to_tensor(source.image(index), (side, side)) for index in range(count)])


@torch.no_grad()
def rows(run: Path, pixels: Tensor) -> Iterator[Row]:
    """The tokenizer of a run, with each number of bits it can be used with."""
    config = RunFolder(run).description()["config"]
    recipe, steps = config["training"]["tokenizer"], json.loads((run / "state.json").read_text())["step"]
    model = load_model(find_model(str(run)), parts=("tokenizer",))
    assert model.tokenizer is not None
    sizes = schedule(model.config.scales, patchify=model.config.transformer.patchify)
    counts = model.config.tokenizer.bit_counts
    seen = steps * recipe["batch_size"] * recipe["accumulation"]
    for bits in counts:
        quality: list[tuple[Tensor, Tensor]] = []
        for part in pixels.split(BATCH):
            image = to_float(part)
            found, _ = model.tokenizer.encode(image, sizes, bits)
            shown = to_float(to_uint8(model.tokenizer.decode_bits(found, sizes)))
            quality.append((psnr(image, shown), ssim(image, shown)))
        noise, likeness = (torch.cat(values) for values in zip(*quality, strict=True))
        times = []
        for one in to_float(pixels[:BATCH]).split(1):
            started = time.perf_counter()
            found, _ = model.tokenizer.encode(one, sizes, bits)
            model.tokenizer.decode_bits(found, sizes)
            times.append(time.perf_counter() - started)
        yield Row(
            run=run.name,
            bits=bits,
            psnr=noise.mean().item(),
            ssim=likeness.mean().item(),
            positions=sizes.positions,
            bits_per_picture=sizes.positions * bits,
            seconds=sorted(times)[len(times) // 2],
            seen=seen,
            decoded=seen * (len(counts) if recipe["every_bit_count"] else 1),
            each=tuple(noise.tolist()),
        )


def table(found: Sequence[Row]) -> str:
    """The rows in Markdown."""
    heads = ["tokenizer", "bits", "PSNR", "SSIM", "positions", "bits per picture", "seconds", "seen", "decoded"]
    lines = [heads, ["---"] * len(heads)]
    for row in found:
        measured = [f"{row.psnr:.2f} dB", f"{row.ssim:.3f}", str(row.positions), f"{row.bits_per_picture:,}"]
        lines.append(
            [row.run, str(row.bits), *measured, f"{row.seconds:.4f}", f"{row.seen:,}", f"{row.decoded:,}"]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def differences(found: Sequence[Row]) -> Iterator[str]:
    """Each tokenizer of several numbers of bits against the one made for that number, picture by picture."""
    alone = {row.bits: row for row in found if row.run == f"bits{row.bits}"}
    for row in found:
        if row.run.startswith("elastic") and row.bits in alone:
            gains = [own - other for own, other in zip(row.each, alone[row.bits].each, strict=True)]
            error = stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
            verdict = "no worse" if mean(gains) >= -BAR else "worse"
            yield (
                f"{row.run} at {row.bits} bits: {mean(gains):+.2f} dB (standard error {error:.2f}) against "
                f"{alone[row.bits].run}: {verdict} (bar {BAR} dB)"
            )


def out_of_order(found: Sequence[Row]) -> list[str]:
    """Where more bits do not show better: among those made for one number, and within each of the others."""
    series: dict[str, list[Row]] = {}
    for row in found:
        series.setdefault("separate" if row.run == f"bits{row.bits}" else row.run, []).append(row)
    return [
        f"{name}: {more.bits} bits show no better than {few.bits}"
        for name, members in series.items()
        for few, more in pairwise(sorted(members, key=lambda row: row.bits))
        if more.psnr <= few.psnr or more.ssim <= few.ssim
    ]


def say(text: str) -> None:
    """Progress, beside the results."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Trains what is missing, measures, and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/bits"), help="where the trainings are kept")
    parser.add_argument("--steps", type=int, default=4500, help="of each training that is begun")
    parser.add_argument("--device", default="cpu", help="that trains")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw pictures for each training")
    parser.add_argument("--pictures", type=int, default=1000, help="held out, that are measured")
    parser.add_argument("--only", default=",".join(TRAININGS), help="names of trainings, with commas")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    runs = [trained(name, args.runs, args.steps, args.device, args.workers) for name in args.only.split(",")]
    model = resolve("demo").config.model
    side = schedule(model.scales, patchify=False).pixels(model.tokenizer.patch_size)[0]
    pixels = held_out(args.pictures, side)
    found = [row for run in runs for row in rows(run, pixels)]
    wrong = out_of_order(found)
    if args.json:
        print(json.dumps({"rows": [asdict(row) for row in found], "out_of_order": wrong}))
    else:
        print(table(found), "", *differences(found), *wrong, sep="\n")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
