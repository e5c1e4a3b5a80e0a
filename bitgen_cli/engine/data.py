"""Picture files read safely and turned into tensors; and pictures out. Where they come from: sources.py.

Image transform: INFINITY_FORMAT section 6 (resize to cover with LANCZOS, centre crop).
"""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from bitgen_cli.errors import InputError
from bitgen_cli.files import atomic_path, explain

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
"""File names that count as pictures, in any case."""

MAX_BYTES = 1 << 29
"""Largest picture file that is read: more than a bitmap of as many pixels as Pillow allows."""
MAX_ENLARGED = 64
"""Pictures are cropped before they are resized where that would make more than so many times the pixels needed."""
REDUCING_GAP = 3.0
"""Pillow's for a result that can hardly be told from that of LANCZOS alone, which takes more than twice the time."""

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
_UNDECODABLE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, struct.error, zlib.error)
"""What Pillow's decoders raise for damaged files; all of it means the same to the user."""

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_MAX_EXIF = 1 << 20
_EXIF_ORIENTATION = 0x0112
_LYING = (5, 6, 7, 8)
"""Orientations whose width and height are exchanged when the picture is turned upright."""


def load_picture(path: Path) -> Image.Image:
    """A picture file as upright RGB: EXIF orientation applied, transparency on white.

    Args:
        path: a JPEG, PNG, WebP or BMP file; of an animation the first frame counts.

    Raises:
        InputError: missing, not a picture, damaged or truncated, larger than MAX_BYTES, or of more pixels than Pillow
            allows against decompression bombs (`PIL.Image.MAX_IMAGE_PIXELS`).
    """
    with _reading(str(path)), path.open("rb") as file:
        _refuse_huge(os.fstat(file.fileno()).st_size, str(path))
        return _decoded(file)


def load_mask(path: Path) -> Image.Image:
    """A picture file as upright grey, mode L: read as `load_picture` does.

    Raises:
        InputError: as `load_picture`, or a part of it is transparent, which may mean either that it stays or goes.
    """
    with _reading(str(path)), path.open("rb") as file:
        _refuse_huge(os.fstat(file.fileno()).st_size, str(path))
        with Image.open(file, formats=_FORMATS) as opened:
            opened.load()
            transparent = opened.has_transparency_data and min(opened.convert("RGBA").getchannel("A").tobytes()) < 255
            mask = _to_rgb(_upright(opened)).convert("L")
    if transparent:
        raise InputError(f"{path} is a mask with transparency", "save it opaque: white is drawn anew, black stays")
    return mask


def picture_content(file: BinaryIO, name: str) -> bytes:
    """The bytes of a picture file, from where it is open up to its end.

    Raises:
        InputError: it cannot be read, or is larger than MAX_BYTES.
    """
    with _reading(name):
        content = file.read(MAX_BYTES + 1)
    _refuse_huge(len(content), name)
    return content


def decode_picture(content: bytes, name: str) -> Image.Image:
    """The same of a picture in memory.

    Args:
        content: of the file.
        name: what errors call it.

    Raises:
        InputError: as `load_picture`.
    """
    with _reading(name):
        return _decoded(io.BytesIO(content))


def picture_size(file: Path | BinaryIO, name: str | None = None) -> tuple[int, int]:
    """Width and height of a picture in pixels, upright; only its head is read, and nothing decoded.

    Args:
        file: a path, or an open file that can be read from anywhere.
        name: what errors call an open file.

    Raises:
        InputError: missing, not a picture, or of too many pixels.
    """
    if isinstance(file, Path):
        with _reading(str(file)), file.open("rb") as opened:
            return _size(opened)
    with _reading(name or "the picture"):
        return _size(file)


def _decoded(file: BinaryIO) -> Image.Image:
    with Image.open(file, formats=_FORMATS) as opened:
        opened.load()
        return _to_rgb(_upright(opened))


def _size(file: BinaryIO) -> tuple[int, int]:
    with Image.open(file, formats=_FORMATS) as opened:
        width, height = opened.size
        return (height, width) if _orientation(opened, file) in _LYING else (width, height)


def to_tensor(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """The picture resized to cover `size` (LANCZOS) and cropped at the centre, (3, h, w) uint8.

    One that is shrunk 6 times or more is first averaged over whole numbers of pixels, to three times its final size.

    Args:
        image: RGB.
        size: (h, w) in pixels.
    """
    height, width = size
    scaled = covering(image.size, size)
    if scaled[0] * scaled[1] > MAX_ENLARGED * height * width:
        image = _middle(image, size)
        scaled = covering(image.size, size)
    if scaled != image.size:
        image = image.resize(scaled, Image.Resampling.LANCZOS, reducing_gap=REDUCING_GAP)
    left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
    pixels = np.asarray(image)[top : top + height, left : left + width]
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous()


def covering(picture: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Width and height a picture is resized to, so that it covers a size with as little left over as possible.

    Args:
        picture: (w, h) in pixels.
        size: (h, w) in pixels.
    """
    height, width = size
    proportion = picture[0] / picture[1]
    if proportion <= width / height:
        return width, max(height, int(width / proportion))
    return max(width, int(proportion * height)), height


def cropped_share(picture: tuple[int, int], size: tuple[int, int]) -> float:
    """Share of a picture's area that `to_tensor` cuts off, 0 to 1.

    Args:
        picture: (w, h) in pixels.
        size: (h, w) in pixels.
    """
    scaled = covering(picture, size)
    return 1 - size[0] * size[1] / (scaled[0] * scaled[1])


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


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turns whatever Pillow raises or warns of for a bad file into one InputError."""
    try:
        with warnings.catch_warnings():
            # Pillow also warns of odd metadata, which changes nothing here.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        what = f"{name} has more than {Image.MAX_IMAGE_PIXELS} pixels, refused as a decompression bomb"
        raise InputError(what, "make it smaller") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{name} is not a JPEG, PNG, WebP or BMP picture") from error
    except _UNDECODABLE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise explain(error, Path(name), "read") from error
        raise InputError(f"{name} is damaged: {error}") from error


def _refuse_huge(size: int, name: str) -> None:
    if size > MAX_BYTES:
        raise InputError(f"{name} has more than the {MAX_BYTES >> 20} MiB a picture may have")


def _middle(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The middle of a picture of extreme proportions, MAX_ENLARGED times as long as those of `size` (h, w)."""
    width = min(image.width, max(1, round(MAX_ENLARGED * image.height * size[1] / size[0])))
    height = min(image.height, max(1, round(MAX_ENLARGED * image.width * size[0] / size[1])))
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _orientation(image: Image.Image, file: BinaryIO) -> int:
    """The EXIF orientation, 1 (upright) where there is none or it cannot be read."""
    try:
        if image.format != "PNG" or {"exif", "Raw profile type exif"} & image.info.keys():
            return int(Image.Image.getexif(image).get(_EXIF_ORIENTATION, 1))
        # a PNG's own getexif decodes it, to look for what may stand behind its pixels
        exif = Image.Exif()
        exif.load(_png_exif(file))
        return int(exif.get(_EXIF_ORIENTATION, 1))
    except (*_UNDECODABLE, TypeError):
        return 1


def _png_exif(file: BinaryIO) -> bytes:
    """What the eXIf chunk of a PNG holds, wherever it stands; empty where there is none."""
    file.seek(len(_PNG_SIGNATURE))
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind == b"eXIf":
            return file.read(min(length, _MAX_EXIF))
        file.seek(length + 4, os.SEEK_CUR)
    return b""


def _upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF orientation says; EXIF data that cannot be read turns nothing."""
    try:
        return image if image.getexif().get(_EXIF_ORIENTATION, 1) == 1 else ImageOps.exif_transpose(image)
    except _UNDECODABLE:
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any of Pillow's modes as RGB."""
    if image.mode.startswith("I"):
        # 16 bits of grey: Pillow's own conversion would clip instead of scale.
        deep = np.asarray(image).astype(np.int64).clip(0, 65535)
        grey = np.where(deep == image.info.get("transparency", -1), 255, deep // 257)
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        coloured = image.convert("RGBA")
        canvas = Image.new("RGBA", coloured.size, "white")
        return Image.alpha_composite(canvas, coloured).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
