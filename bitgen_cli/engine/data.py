"""Pictures in: folders and the demo world, read safely, turned into tensors; and pictures out.

Image transform: INFINITY_FORMAT section 6 (resize to cover with LANCZOS, centre crop).
"""

from __future__ import annotations

import json
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from bitgen_cli.errors import InputError, UsageError
from bitgen_cli.files import atomic_path, explain

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
"""File names that count as pictures, in any case."""

METADATA = "metadata.jsonl"
CAPTION_KEYS = ("text", "caption", "prompt")
WORLD, FLIP = "world:", ":flip"

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
_UNDECODABLE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, struct.error, zlib.error)
"""What Pillow's decoders raise for damaged files; all of it means the same to the user."""

_EXIF_ORIENTATION = 0x0112
_LYING = (5, 6, 7, 8)
"""Orientations whose width and height are exchanged when the picture is turned upright."""


class PictureSource(Protocol):
    """Pictures with captions, by index. Every part is a pure function of the index."""

    @property
    def name(self) -> str:
        """What the pictures are, in words; equal for equal sources."""

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """A name that stays the same from run to run, unlike every other picture's."""

    def caption(self, index: int) -> str:
        """Its caption; empty when it has none. Raises InputError when it cannot be read."""

    def image(self, index: int) -> Image.Image:
        """The picture, RGB. Raises InputError when it cannot be read."""

    def size(self, index: int) -> tuple[int, int]:
        """Width and height in pixels, upright, without decoding. Raises InputError when it cannot be read."""


def load_picture(path: Path) -> Image.Image:
    """A picture file as upright RGB: EXIF orientation applied, transparency on white.

    Args:
        path: a JPEG, PNG, WebP or BMP file; of an animation the first frame counts.

    Raises:
        InputError: missing, not a picture, damaged or truncated, or of more pixels than Pillow allows against
            decompression bombs (`PIL.Image.MAX_IMAGE_PIXELS`).
    """
    with _reading(path), Image.open(path, formats=_FORMATS) as opened:
        opened.load()
        return _to_rgb(_upright(opened))


def to_tensor(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """The picture resized to cover `size` (LANCZOS) and cropped at the centre, (3, h, w) uint8.

    Args:
        image: RGB.
        size: (h, w) in pixels.
    """
    height, width = size
    proportion = image.width / image.height
    if proportion <= width / height:
        scaled = (width, max(height, int(width / proportion)))
    else:
        scaled = (max(width, int(proportion * height)), height)
    if scaled != image.size:
        image = image.resize(scaled, Image.Resampling.LANCZOS)
    left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
    pixels = np.asarray(image)[top : top + height, left : left + width]
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous()


def to_float(pixels: Tensor) -> Tensor:
    """uint8 pixels of any shape as float32 in [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1)


def to_uint8(image: Tensor) -> Tensor:
    """A float picture of any shape in [-1, 1] as uint8, cut off and not rounded, as published."""
    return image.float().add(1).div_(2).mul_(255).clamp_(0, 255).to(torch.uint8)


def to_pil(pixels: Tensor) -> Image.Image:
    """A uint8 picture (3, h, w) as a Pillow picture."""
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())


def grid(images: Tensor, columns: int) -> Image.Image:
    """Pictures (B, 3, h, w) uint8 in rows of `columns`; missing ones are black."""
    rows = -(-images.shape[0] // columns)
    height, width = images.shape[-2:]
    sheet = torch.zeros(3, rows * height, columns * width, dtype=torch.uint8)
    for number, image in enumerate(images.cpu()):
        top, left = number // columns * height, number % columns * width
        sheet[:, top : top + height, left : left + width] = image
    return to_pil(sheet)


def save_grid(images: Tensor, columns: int, file: Path) -> None:
    """Writes float pictures (B, 3, h, w) in [-1, 1] as one PNG, in rows of `columns`."""
    with atomic_path(file) as temporary:
        grid(to_uint8(images), columns).save(temporary, format="PNG")


def open_source(data: str, picture_size: int = 64) -> PictureSource:
    """Pictures named on the command line.

    Args:
        data: a folder (read with its sub-folders, hidden ones left out), or `world:N` or `world:N:SEED`: N
            pictures of the demo world, with `:flip` behind it half of them mirrored. A folder with a
            `metadata.jsonl` (one object per line: `file_name` and one of `text`, `caption`, `prompt`) holds
            exactly the pictures listed there.
        picture_size: pixels along a side of a drawn picture.

    Raises:
        InputError: no such folder, no pictures in it, or a `metadata.jsonl` that is wrong or names missing
            files.
        UsageError: `world:` followed by something else than numbers.
    """
    if data.startswith(WORLD):
        return _open_world(data, picture_size)
    folder = Path(data).expanduser()
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise InputError(f"{folder} {what}", "give a folder of pictures, or world:N for N drawn ones")
    if (folder / METADATA).is_file():
        return _open_metadata(folder)
    files = _pictures_below(folder)
    if not files:
        looked_for = f"looked for {', '.join(SUFFIXES)}, sub-folders included"
        raise InputError(f"no pictures in {folder}", looked_for)
    return FolderSource(folder, tuple(files))


@dataclass(frozen=True)
class FolderSource:
    """Pictures of a folder; captions from `.txt` files beside them, or given.

    Args:
        folder: where the pictures are.
        files: paths of the pictures below it, `/` between the parts.
        captions: one per file, or None: each comes from the `.txt` file of the same stem, where there is one.
    """

    folder: Path
    files: tuple[str, ...]
    captions: tuple[str, ...] | None = None

    @property
    def name(self) -> str:
        return f"folder {self.folder.resolve().name}"

    def __len__(self) -> int:
        return len(self.files)

    def key(self, index: int) -> str:
        return self.files[index]

    def caption(self, index: int) -> str:
        if self.captions is not None:
            return self.captions[index]
        path = (self.folder / self.files[index]).with_suffix(".txt")
        if not path.is_file():
            return ""
        return _one_line(read_text_file(path))

    def image(self, index: int) -> Image.Image:
        return load_picture(self.folder / self.files[index])

    def size(self, index: int) -> tuple[int, int]:
        path = self.folder / self.files[index]
        with _reading(path), Image.open(path, formats=_FORMATS) as opened:
            width, height = opened.size
            return (height, width) if _orientation(opened) in _LYING else (width, height)


@dataclass(frozen=True)
class WorldSource:
    """Pictures of the demo world, drawn when they are asked for.

    Args:
        count: how many.
        seed: another seed draws other pictures.
        side: pixels along a side.
        flips: whether half of them are mirrored.
    """

    count: int
    seed: int
    side: int
    flips: bool = False

    @property
    def name(self) -> str:
        return f"demo world, seed {self.seed}, {self.side}x{self.side}{', half mirrored' if self.flips else ''}"

    def __len__(self) -> int:
        return self.count

    def key(self, index: int) -> str:
        return f"world/{self.seed}{FLIP if self.flips else ''}/{index:08d}"

    def caption(self, index: int) -> str:
        from bitgen_cli.demo import world

        return world.caption_at(index, self.seed)

    def image(self, index: int) -> Image.Image:
        from bitgen_cli.demo import world

        return world.picture(index, self.seed, self.side, flips=self.flips).image

    def size(self, index: int) -> tuple[int, int]:
        return self.side, self.side


def _open_world(data: str, side: int) -> WorldSource:
    numbers = data.removeprefix(WORLD).removesuffix(FLIP).split(":")
    written_right = all(part.isascii() and part.isdigit() for part in numbers) and len(numbers) <= 2
    if not written_right or int(numbers[0]) == 0:
        raise UsageError(f"{data!r} is not world:N[:SEED][:flip]", "for example world:20000")
    return WorldSource(int(numbers[0]), int(numbers[1]) if len(numbers) == 2 else 0, side, data.endswith(FLIP))


def _pictures_below(folder: Path) -> list[str]:
    """Paths of all pictures below a folder, sorted, `/` between the parts."""

    def refuse(error: OSError) -> None:
        raise explain(error, Path(error.filename or folder), "read") from error

    found = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and name.lower().endswith(SUFFIXES):
                found.append((Path(parent) / name).relative_to(folder).as_posix())
    return sorted(found)


def _open_metadata(folder: Path) -> FolderSource:
    """The pictures a metadata.jsonl lists, in its order."""
    path = folder / METADATA
    captions: dict[str, str] = {}
    for number, line in enumerate(read_text_file(path).split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            name, caption = _metadata_row(line, where)
            if name in captions:
                raise InputError(f"{where}: {name!r} is listed twice", "keep one line per picture")
            captions[name] = caption
    if not captions:
        raise InputError(f"{path} lists no pictures", 'one object per line: {"file_name": ..., "text": ...}')
    missing = [name for name in captions if not (folder / name).is_file()]
    if missing:
        shown = ", ".join(missing[:10]) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
        noun = "file that is" if len(missing) == 1 else "files that are"
        raise InputError(f"{path} names {len(missing)} {noun} missing: {shown}")
    return FolderSource(folder, tuple(captions), tuple(captions.values()))


def _metadata_row(line: str, where: str) -> tuple[str, str]:
    """File name and caption of one line."""
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON: {error}") from error
    name = row.get("file_name") if isinstance(row, dict) else None
    if not isinstance(name, str) or not name:
        raise InputError(f'{where}: needs an object with "file_name"')
    path = Path(name)
    if path.is_absolute() or PurePosixPath(name).is_absolute() or ".." in path.parts or "\0" in name:
        raise InputError(f"{where}: {name!r} lies outside the folder", f"paths are relative to {METADATA}")
    caption = next((row[key] for key in CAPTION_KEYS if row.get(key) is not None), "")
    if not isinstance(caption, str):
        raise InputError(f"{where}: the caption must be text, not {type(caption).__name__}")
    return path.as_posix(), _one_line(caption)


def read_text_file(path: Path) -> str:
    """The text of a file somebody wrote.

    Raises:
        InputError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise explain(error, path, "read") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text", "save it as UTF-8") from error


def _one_line(text: str) -> str:
    return " ".join(text.split())


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns whatever Pillow raises or warns of for a bad file into one InputError."""
    try:
        with warnings.catch_warnings():
            # Pillow also warns of odd metadata, which changes nothing here.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        what = f"{path} has more than {Image.MAX_IMAGE_PIXELS} pixels, refused as a decompression bomb"
        raise InputError(what, "make it smaller") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{path} is not a JPEG, PNG, WebP or BMP picture") from error
    except _UNDECODABLE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise explain(error, path, "read") from error
        raise InputError(f"{path} is damaged: {error}") from error


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) where there is none or it cannot be read."""
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except (*_UNDECODABLE, TypeError):
        return 1


def _upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF orientation says; EXIF data that cannot be read turns nothing."""
    try:
        return image if _orientation(image) == 1 else ImageOps.exif_transpose(image)
    except _UNDECODABLE:
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any of Pillow's modes as RGB."""
    if image.mode.startswith("I"):
        # 16 bits of grey: Pillow's own conversion would clip instead of scale.
        grey = np.asarray(image).astype(np.int64).clip(0, 65535) // 257
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        coloured = image.convert("RGBA")
        canvas = Image.new("RGBA", coloured.size, "white")
        return Image.alpha_composite(canvas, coloured).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
