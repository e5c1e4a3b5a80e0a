"""A small CNN that names object class, colour and place of a demo-world picture: the judge of the demo model.

It is trained on the world itself, all triples alike, within minutes on two cores, and kept in the user's cache folder
under a name that follows from this file and from world.py: a change of either trains a new one.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import numpy.typing as npt
import platformdirs
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bitgen_cli.demo import world
from bitgen_cli.engine.data import to_float, to_tensor
from bitgen_cli.engine.device import autocast, bf16_is_fast
from bitgen_cli.files import atomic_path

SIDE = 64
"""Pixels along a side of what the judge looks at."""

PICTURES = 9_800
STEPS = 400
BATCH = 128
CPU = torch.device("cpu")
LEARNING_RATE = 4e-3
WEIGHT_DECAY = 0.02
SEED = 770_001
"""Of the judge's training pictures; far from the seeds that models are trained and tested on."""

ASPECTS = ("class", "colour", "place")
NAMES: tuple[tuple[str, ...], ...] = (world.CLASSES, tuple(world.COLOURS), world.PLACES)
"""What each head can answer, in the order of its outputs."""


def labels(scenes: Sequence[world.Scene]) -> Tensor:
    """Indices (B, 3) of class, colour and place."""
    classes, colours, places = NAMES
    rows = [(classes.index(s.object_class), colours.index(s.colour), places.index(s.place)) for s in scenes]
    return torch.tensor(rows)


def all_scenes() -> list[world.Scene]:
    """Every triple of the world, both parts of its split, in a fixed order."""
    return world.scenes(held_out=False) + world.scenes(held_out=True)


def draw_scenes(scenes: Sequence[world.Scene], seed: int, side: int = SIDE) -> Tensor:
    """One picture (B, 3, side, side) uint8 of each scene, drawn by all cores."""
    jobs = [(scene, f"{seed}:{number}", side) for number, scene in enumerate(scenes)]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        drawn = list(pool.map(_draw, jobs, chunksize=100))
    return torch.from_numpy(np.stack(drawn))


def _draw(job: tuple[world.Scene, str, int]) -> npt.NDArray[np.uint8]:
    scene, seed, side = job
    return to_tensor(world.draw(scene, random.Random(seed), side), (side, side)).numpy()


class Judge(nn.Module):
    """Five convolutions and one linear layer per head."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_block(3, 24, 4, 2, 1),
            *_block(24, 48, 3, 2, 1),
            *_block(48, 64, 3, 1, 1),
            nn.MaxPool2d(2),
            *_block(64, 112, 3, 1, 1),
            *_block(112, 112, 3, 1, 1),
        )
        self.heads = nn.ModuleList(nn.Linear(2 * 112, len(names)) for names in NAMES)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Logits of class, colour and place of images (B, 3, SIDE, SIDE) in [-1, 1]."""
        found = self.features(image)
        pooled = torch.cat([found.mean((2, 3)), found.amax((2, 3))], dim=1)
        return [head(pooled) for head in self.heads]

    @torch.inference_mode()
    def answers(self, pixels: Tensor) -> Tensor:
        """Indices (B, 3) of the likeliest class, colour and place of pictures (B, 3, h, w) uint8 of any square size."""
        found = []
        for part in pixels.split(200):
            image = to_float(part)
            if image.shape[-1] != SIDE:
                image = F.interpolate(image, (SIDE, SIDE), mode="bilinear", antialias=True)
            found.append(torch.stack([logits.argmax(1) for logits in self(image)], dim=1))
        return torch.cat(found)


def _block(channels_in: int, channels_out: int, kernel: int, stride: int, padding: int) -> list[nn.Module]:
    convolution = nn.Conv2d(channels_in, channels_out, kernel, stride, padding, bias=False)
    return [convolution, nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True)]


def _worsen(image: Tensor, rng: torch.Generator) -> Tensor:
    """A batch moved by up to 3 pixels, half the time blurred, with a little noise: what a tokenizer may do to it."""

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=rng))

    dx, dy = (int(torch.randint(-3, 4, (), generator=rng)) for _ in range(2))
    image = F.pad(image, (3, 3, 3, 3), mode="replicate")[..., 3 + dy : 3 + dy + SIDE, 3 + dx : 3 + dx + SIDE]
    if uniform(0, 1) < 0.5:
        sigma = uniform(0.3, 1.5)
        offsets = torch.arange(-3.0, 4.0)
        window = torch.exp(-offsets.square() / (2 * sigma**2))
        window = window / window.sum()
        rows, columns = window.view(1, 1, 7, 1).expand(3, 1, 7, 1), window.view(1, 1, 1, 7).expand(3, 1, 1, 7)
        image = F.pad(image, (3, 3, 3, 3), mode="replicate")
        image = F.conv2d(F.conv2d(image, rows, groups=3), columns, groups=3)
    return image + uniform(0, 0.12) * torch.randn(image.shape, generator=rng)


@dataclass(frozen=True)
class Trained:
    """A judge ready for use.

    Attributes:
        judge: in evaluation mode.
        file: where it is kept.
        seconds: training took; 0 when it was found in the cache.
    """

    judge: Judge
    file: Path
    seconds: float


def load_or_train() -> Trained:
    """The judge from the cache, or a newly trained one, which the cache then holds; progress goes to stderr."""
    digest = hashlib.sha256(Path(__file__).read_bytes() + Path(world.__file__).read_bytes()).hexdigest()[:16]
    file = Path(platformdirs.user_cache_dir("bitgen")) / f"demo-judge-{digest}.safetensors"
    judge = Judge().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if file.is_file():
        with safe_open(file, "pt") as stored:
            judge.load_state_dict({name: stored.get_tensor(name) for name in stored.keys()})  # noqa: SIM118
        return Trained(judge.eval(), file, 0.0)
    started = time.perf_counter()
    judge = train()
    seconds = time.perf_counter() - started
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(file) as temporary:
        save_file({name: value.contiguous() for name, value in judge.state_dict().items()}, temporary)
    return Trained(judge, file, seconds)


def train() -> Judge:
    """A judge trained from scratch, in evaluation mode."""
    started = time.perf_counter()
    scenes = (all_scenes() * math.ceil(PICTURES / len(all_scenes())))[:PICTURES]
    pictures, wanted = draw_scenes(scenes, SEED), labels(scenes)
    _say(f"judge: drew {PICTURES} pictures in {time.perf_counter() - started:.0f} s")
    rng = torch.Generator().manual_seed(SEED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        judge = Judge().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(judge.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, STEPS, pct_start=0.15)
    started = time.perf_counter()
    for step in range(STEPS):
        chosen = torch.randint(PICTURES, (BATCH,), generator=rng)
        image = _worsen(to_float(pictures[chosen]), rng).contiguous(memory_format=torch.channels_last)
        with autocast(CPU, "bf16" if bf16_is_fast(CPU) else "fp32"):
            answers = judge(image)
        losses = [F.cross_entropy(a.float(), w) for a, w in zip(answers, wanted[chosen].T, strict=True)]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            left = (time.perf_counter() - started) / (step + 1) * (STEPS - step - 1)
            parts = ", ".join(f"{name} {part:.3f}" for name, part in zip(ASPECTS, losses, strict=True))
            _say(f"judge: step {step + 1}/{STEPS}, loss of {parts}, {left:.0f} s left")
    return judge.eval()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
