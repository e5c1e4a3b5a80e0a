"""Pictures per second of `bitgen tokenize` against a plain loop, with random weights.

    python -m tests.benchmarks.tokenize [--models demo,16bit] [--repeat N] [--pictures N]

The plain loop takes one picture at a time: Pillow opens, resizes and crops it, a plain autoencoder encodes it in fp32,
the pyramid quantises the latents, and a file of bits and latents is saved. It shares weights, pyramid and Pillow's
filter with the engine; its autoencoder is written out here: separate normalisation, activation and convolution, laid
out as torch does. `bitgen tokenize` reads in processes of its own, encodes batches and writes shards. Both use all
cores.

The pictures are JPEG files of shapes and noise, 512x512 to 1000x700. Both must give the same bits but for few, whose
value is so near to zero that rounding, or the averaging of pixels before much is shrunk, puts it on the other side; how
many that are is printed. The two take turns, each in a process of its own; the best of each counts.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn

from bitgen_cli.config import ModelConfig, SamplingConfig
from bitgen_cli.engine import autoencoder, bits, pyramid
from bitgen_cli.engine.model_folder import load_model, save_model
from bitgen_cli.engine.scales import nearest_ratio, schedule
from bitgen_cli.engine.store import TokenStore
from bitgen_cli.engine.tokenizer import Tokenizer
from bitgen_cli.presets import resolve
from bitgen_cli.report import Silent
from bitgen_cli.runs.tokenize import TokenizeOptions, tokenize

GOAL = 3.0
SIZES = [(512, 512), (640, 480), (768, 512), (800, 800), (700, 1000), (1000, 700)]
PICTURES = {"demo": 2400, "16bit": 12}
"""Pictures per model: so much work that the start of the reading processes hardly counts."""
DISTINCT = 120
"""Pictures that differ; more are the same ones again."""
BATCHES = {"demo": 64, "16bit": 2}


def make_pictures(folder: Path, count: int) -> None:
    """JPEG files with captions: a coloured ground, shapes, and noise."""
    folder.mkdir()
    for number in range(count):
        generator, noise = random.Random(number), np.random.default_rng(number)
        width, height = SIZES[number % len(SIZES)]
        coarse = noise.integers(60, 200, (6, 8, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        pencil = ImageDraw.Draw(picture)
        for _ in range(12):
            left, top = generator.randrange(width), generator.randrange(height)
            corners = (left, top, left + generator.randrange(20, 300), top + generator.randrange(20, 300))
            colour = tuple(generator.randrange(256) for _ in range(3))
            (pencil.ellipse if generator.random() < 0.5 else pencil.rectangle)(corners, fill=colour)
        grain = np.asarray(picture) + noise.normal(0, 6, (height, width, 3))
        Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(folder / f"{number:05d}.jpg", quality=90)
        (folder / f"{number:05d}.txt").write_text(f"picture number {number}")


def plain_activation(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    return F.silu(F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps))


def plain_conv(x: Tensor, conv: nn.Conv2d) -> Tensor:
    return F.conv2d(x, conv.weight, conv.bias, padding=1)


def plain_residual(x: Tensor, block: autoencoder.ResBlock) -> Tensor:
    h = plain_conv(plain_activation(x, block.norm1), block.conv1)
    h = plain_conv(plain_activation(h, block.norm2), block.conv2)
    return (x if block.nin_shortcut is None else block.nin_shortcut(x)) + h


@torch.no_grad()
def plain_encode(encoder: autoencoder.Encoder, image: Tensor) -> Tensor:
    x = plain_conv(image, encoder.conv_in)
    for level in encoder.down:
        level = cast(autoencoder.EncoderLevel, level)
        for block in level.block:
            x = plain_residual(x, cast(autoencoder.ResBlock, block))
        if level.downsample is not None:
            conv = level.downsample.conv
            x = F.conv2d(F.pad(x, (0, 1, 0, 1)), conv.weight, conv.bias, stride=2)
    x = plain_residual(plain_residual(x, encoder.mid.block_1), encoder.mid.block_2)
    return plain_conv(plain_activation(x, encoder.norm_out), encoder.conv_out)


def plain_tensor(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """(1, 3, h, w) in [-1, 1]."""
    height, width = size
    proportion = image.width / image.height
    if proportion <= width / height:
        scaled = (width, max(height, int(width / proportion)))
    else:
        scaled = (max(width, int(proportion * height)), height)
    image = image.resize(scaled, Image.Resampling.LANCZOS)
    left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
    pixels = torch.from_numpy(np.array(image.crop((left, top, left + width, top + height))))
    return pixels.permute(2, 0, 1)[None].float() / 127.5 - 1


def plain_loop(files: list[Path], out: Path, tokenizer: Tokenizer, config: ModelConfig) -> float:
    """Seconds of the plain loop; its files are named as the pictures are."""
    out.mkdir()
    started = time.perf_counter()
    for file in files:
        picture = Image.open(file).convert("RGB")
        ratio = nearest_ratio(picture.height / picture.width, config.scales)
        scales = schedule(config.scales, patchify=config.transformer.patchify, ratio=ratio)
        image = plain_tensor(picture, scales.pixels(config.tokenizer.patch_size))
        latent = plain_encode(tokenizer.autoencoder.encoder, image).bfloat16()
        grids, _ = pyramid.encode(latent.float(), scales)
        packed = bits.pack(torch.cat([bits.to_positions(grid, scales.cell) for grid in grids], dim=1))
        caption = file.with_suffix(".txt").read_text()
        torch.save({"bits": packed, "latents": latent, "caption": caption}, out / f"{file.stem}.pt")
    return time.perf_counter() - started


def differing(store: TokenStore, out: Path) -> float:
    """Share of bits that the two have differently."""
    wrong = total = 0
    for index, key in enumerate(store.keys):
        plain = torch.load(out / f"{Path(key).stem}.pt")["bits"]
        cell = store.manifest.cell
        ours = bits.pack(torch.cat([bits.to_positions(grid, cell) for grid in store.bits([index])], dim=1))
        wrong += sum(int(byte).bit_count() for byte in (plain ^ ours).flatten())
        total += sum(grid.numel() for grid in store.bits([index]))
    return wrong / total


def measure(what: str, name: str, folder: Path) -> float:
    """Seconds that one of the two takes in a process of its own; what it writes is in a folder of its name."""
    shutil.rmtree(folder / what, ignore_errors=True)
    command = [sys.executable, "-m", "tests.benchmarks.tokenize", "--child", what, name, str(folder)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def child(what: str, name: str, folder: Path) -> float:
    """Seconds of the plain loop or of `bitgen tokenize`, without what is loaded first."""
    data, model, out = folder / f"pictures {name}", folder / name, folder / what
    if what == "bitgen":
        workers = len(os.sched_getaffinity(0))
        options = TokenizeOptions(str(data), out, str(model), batch_size=BATCHES[name], workers=workers, device="cpu")
        return tokenize(options, Silent()).seconds
    loaded = load_model(model, parts=("tokenizer",))
    assert loaded.tokenizer is not None
    files = sorted(data.glob("*.jpg"))
    plain_loop(files[:2], folder / "warm", loaded.tokenizer, loaded.config)
    shutil.rmtree(folder / "warm")
    return plain_loop(files, out, loaded.tokenizer, loaded.config)


def compare(name: str, folder: Path, count: int, repeat: int) -> None:
    """Prints how many times as many pictures a second `bitgen tokenize` makes."""
    config = resolve(name, environment={}).config.model
    tokenizer = Tokenizer(config.tokenizer)
    tokenizer.autoencoder.initialise(torch.Generator().manual_seed(0))
    save_model(folder / name, config, SamplingConfig(), tokenizer=tokenizer)
    data = folder / f"pictures {name}"
    data.mkdir()
    files = sorted((folder / "pictures").glob("*.jpg"))
    for number in range(count):
        for suffix in (".jpg", ".txt"):
            (data / f"{number:05d}{suffix}").hardlink_to(files[number % len(files)].with_suffix(suffix))
    pairs = [(measure("plain", name, folder), measure("bitgen", name, folder)) for _ in range(repeat)]
    plain, ours = (min(seconds) for seconds in zip(*pairs, strict=True))
    apart = differing(TokenStore.open(folder / "bitgen"), folder / "plain")
    height, width = schedule(config.scales, patchify=False, ratio=1.0).pixels(config.tokenizer.patch_size)
    print(f"{name:8} {f'{height}x{width}':9} {count:8} {count / plain:8.2f} {count / ours:8.2f} {plain / ours:6.2f} "
          f"{GOAL:5.1f} {apart:12.1e}", flush=True)  # fmt: skip
    assert apart < 0.01, "they do not compute the same"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="demo,16bit", metavar="NAMES", help="of demo and 16bit")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="runs of each; the fastest counts")
    parser.add_argument("--pictures", type=int, metavar="N", help="how many; without it, some seconds' work")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        what, name, place = given.child
        print(child(what, name, Path(place)))
        return
    names = given.models.split(",")
    counts = {name: given.pictures or PICTURES[name] for name in names}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_pictures(folder / "pictures", min(DISTINCT, max(counts.values())))
        print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")
        print(f"{'model':8} {'size':9} {'pictures':>8} {'plain/s':>8} {'bitgen/s':>8} {'ratio':>6} {'goal':>5} "
              f"{'other bits':>12}")  # fmt: skip
        for name in names:
            compare(name, folder, counts[name], given.repeat)


if __name__ == "__main__":
    main()
