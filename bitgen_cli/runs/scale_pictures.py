"""A picture as it is after each of its scales: beside each other in a strip, or one after the other in an animation.

The bits that were drawn tell the sum after every scale, so that the transformer has nothing more to do: each frame is
what the decoder makes of a sum, and the last one is the picture itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, features
from torch import Tensor

from bitgen_cli.engine import pyramid
from bitgen_cli.engine.data import to_pil, to_uint8
from bitgen_cli.engine.scales import Schedule
from bitgen_cli.engine.tokenizer import Tokenizer
from bitgen_cli.errors import ResourceError, UsageError
from bitgen_cli.files import atomic_path

SUFFIXES = {"strip": ".png", "webp": ".webp"}
"""Formats, and how their files end."""
WIDEST = 4096
"""Pixels of a strip; its frames are shrunk to that."""
GAP = 4
"""White pixels between the frames of a strip."""
EACH, LAST = 400, 2000
"""Milliseconds that an animation shows each frame, and the last one."""


@dataclass(frozen=True)
class Frames:
    """A picture after each of its scales, coarsest first, at full size; decoded when they are looped over.

    Attributes:
        tokenizer: that the picture was decoded by.
        bits: of the picture, per scale (d, h, w) bool, on the CPU.
        schedule: of the picture.
        finished: the picture, which is the last frame.
        in_bands: whether it is decoded in bands of rows.
    """

    tokenizer: Tokenizer
    bits: Sequence[Tensor]
    schedule: Schedule
    finished: Image.Image
    in_bands: bool = False

    def __len__(self) -> int:
        return len(self.bits)

    @torch.inference_mode()
    def __iter__(self) -> Iterator[Image.Image]:
        like = next(self.tokenizer.parameters())
        grids = [grid[None].to(like.device) for grid in self.bits[:-1]]
        for total in pyramid.sums(grids, self.schedule):
            (image,) = self.tokenizer.decode(total.to(like.dtype), in_bands=self.in_bands).float()
            yield to_pil(to_uint8(image))
        yield self.finished


def check_format(name: str | None) -> None:
    """Raises where it is no format, or none that can be written here."""
    if name is not None and name not in SUFFIXES:
        raise UsageError(f"--save-scales {name}: unknown", f"use {' or '.join(SUFFIXES)}")
    if name == "webp" and not features.check("webp"):
        raise ResourceError("--save-scales webp: Pillow was built without WebP", "use strip")


def files_of(picture: Path, form: str | None) -> list[Path]:
    """The picture's file, and where what it is after each scale goes if a format is given."""
    beside = scales_path(picture, form)
    return [picture] if beside is None else [picture, beside]


def scales_path(picture: Path, form: str | None) -> Path | None:
    """Where what a picture is after each scale goes: beside it; None without a format."""
    return None if form is None else picture.with_name(f"{picture.stem}-scales{SUFFIXES[form]}")


def write_scales(path: Path, frames: Frames, on_frame: Callable[[int], None] = lambda _: None) -> None:
    """Writes all frames as one file, whole or not at all: an animation without loss that begins anew, or a strip.

    Args:
        path: as in `scales_path`.
        frames: are decoded one at a time.
        on_frame: is called with the number of each frame, from 1, before it is decoded.

    Raises:
        ResourceError: no space left.
        InputError: not allowed to write there.
    """
    with atomic_path(path) as temporary:
        if path.suffix != SUFFIXES["webp"]:
            _strip(_told(frames, on_frame), len(frames), frames.finished.size).save(temporary, format="PNG")
            return
        first, *others = _told(frames, on_frame)
        times = [EACH] * len(others) + [LAST]
        first.save(
            temporary, format="WEBP", save_all=True, append_images=others, duration=times, loop=0, lossless=True
        )


def _told(frames: Frames, on_frame: Callable[[int], None]) -> Iterator[Image.Image]:
    left = iter(frames)
    for number in range(1, len(frames) + 1):
        on_frame(number)
        yield next(left)


def _strip(frames: Iterator[Image.Image], count: int, size: tuple[int, int]) -> Image.Image:
    """Frames of that size beside each other, shrunk where they are too wide together."""
    width = max(1, min(size[0], (WIDEST - GAP * (count - 1)) // count))
    height = max(1, round(size[1] * width / size[0]))
    strip = Image.new("RGB", (count * (width + GAP) - GAP, height), "white")
    for number, frame in enumerate(frames):
        small = frame if frame.size == (width, height) else frame.resize((width, height), Image.Resampling.LANCZOS)
        strip.paste(small, (number * (width + GAP), 0))
    return strip
