"""Small data sets of every layout, for tests."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bitgen_cli.engine.sources import PictureSource


def picture(number: int = 0, size: tuple[int, int] = (12, 8)) -> Image.Image:
    """A picture of smooth noise, another one for each number."""
    values = np.random.default_rng(number).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)


def encoded(number: int = 0, size: tuple[int, int] = (12, 8)) -> bytes:
    """The same as a PNG."""
    stream = io.BytesIO()
    picture(number, size).save(stream, format="PNG")
    return stream.getvalue()


def put(folder: Path, *names: str, size: tuple[int, int] = (12, 8)) -> None:
    """Writes files of these names: pictures where the suffix says so (number n is picture(n)), else empty ones."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() in (".png", ".jpg", ".webp", ".bmp"):
            picture(number, size).save(path, format={".jpg": "jpeg"}.get(path.suffix.lower()))
        else:
            path.touch()


def write_lines(file: Path, *rows: object) -> Path:
    """Writes JSON lines; a text is a line as it stands."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


def write_tar(file: Path, members: Mapping[str, bytes] | Sequence[tuple[str, bytes]], mode: str = "w") -> Path:
    """Writes a tar of regular files."""
    items = members.items() if isinstance(members, Mapping) else members
    with tarfile.open(file, mode) as tar:  # type: ignore[call-overload]
        for name, content in items:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file


def write_coco(file: Path, images: Mapping[int, str], captions: Sequence[tuple[int, str]]) -> Path:
    """Writes a COCO captions file: file names by id, and captions of ids."""
    file.parent.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {
        "images": [{"id": identity, "file_name": name} for identity, name in images.items()],
        "annotations": [
            {"id": number, "image_id": identity, "caption": text} for number, (identity, text) in enumerate(captions)
        ],
    }
    file.write_text(json.dumps(content))
    return file


def contents(source: PictureSource) -> dict[str, tuple[str, ...]]:
    """Keys and captions, in order; checks on the way that every picture and its size can be read."""
    for index in range(len(source)):
        assert source.image(index).size == source.size(index)
    return {source.key(index): source.captions(index) for index in range(len(source))}
