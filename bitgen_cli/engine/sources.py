"""Where pictures come from: the one reader that all commands share, which recognises how a data set is laid out.

folders.py, listings.py, archives.py and parquet.py each read a family of layouts; near_misses.py answers what is none.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from PIL import Image

from bitgen_cli.engine import near_misses
from bitgen_cli.engine.archives import open_tars
from bitgen_cli.engine.captions import printable
from bitgen_cli.engine.folders import Fence, folder_source, walk
from bitgen_cli.engine.listings import METADATA, is_split, open_coco, open_listing, open_splits
from bitgen_cli.engine.parquet import open_parquet
from bitgen_cli.errors import InputError, UsageError

WORLD, FLIP = "world:", ":flip"

_BRACES = re.compile(r"(.*)\{([0-9]{1,9})\.\.([0-9]{1,9})\}(.*)")
_MAX_SHARDS = 100_000

T = TypeVar("T")


class PictureSource(Protocol):
    """Pictures with captions, by index. Every part is a pure function of the index."""

    @property
    def name(self) -> str:
        """What the pictures are, in words; equal for equal sources."""

    @property
    def layout(self) -> str:
        """How they are laid out and how many there are, in words."""

    @property
    def remarks(self) -> tuple[str, ...]:
        """What else the user should know of the data: what is left out, what looks odd."""

    @property
    def claimed(self) -> Sequence[float] | None:
        """Height / width that the data says of each picture; None where it says nothing. Not to be trusted."""

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """A name that stays the same from run to run, unlike every other picture's."""

    def captions(self, index: int) -> tuple[str, ...]:
        """Its captions; empty when it has none. Raises InputError when they cannot be read."""

    def image(self, index: int) -> Image.Image:
        """The picture, RGB. Raises InputError when it cannot be read."""

    def size(self, index: int) -> tuple[int, int]:
        """Width and height in pixels, upright, without decoding. Raises InputError when it cannot be read."""


def drawn_caption(captions: Sequence[T], seed: int, epoch: int, index: int) -> T:
    """The caption a picture is learned with in an epoch: each of them once before one comes again.

    Args:
        captions: of the picture, at least one.
        seed: of the training.
        epoch: from 0.
        index: of the picture.
    """
    turn, place = divmod(epoch, len(captions))
    order = random.Random(f"caption {seed} {turn} {index}").sample(range(len(captions)), len(captions))
    return captions[order[place]]


def open_source(
    data: str, picture_size: int = 64, *, caption_key: str | None = None, image_root: Path | None = None
) -> PictureSource:
    """Pictures named on the command line.

    Args:
        data: a folder, read with its sub-folders, hidden ones left out; a .jsonl, .csv, .json, .tar or .parquet file;
            several of them as `NAME-{00000..00099}.tar`; or `world:N` or `world:N:SEED`: N pictures of the demo world,
            with `:flip` behind it half of them mirrored.
        picture_size: pixels along a side of a drawn picture.
        caption_key: field or column that holds the captions; `none` reads none.
        image_root: where listed pictures are, if not beside their listing; links may lead there too.

    Raises:
        InputError: no such data, no pictures in it, or files that are wrong; the path that would work is named where
            there is one.
        UsageError: `world:` followed by something else than numbers, or a caption key that the data does not have.
    """
    if data.startswith(WORLD):
        return _open_world(data, picture_size)
    path = Path(os.path.expanduser(data))
    root = None if image_root is None else Path(os.path.expanduser(image_root))
    if root is not None and not os.path.isdir(root):
        raise InputError(f"the image root {root} is no folder", near_misses.similar(root))
    if os.path.isdir(path):
        return _open_folder(path, caption_key, root)
    if os.path.isfile(path):
        return _open_file(path, caption_key, root)
    several = _BRACES.fullmatch(str(path))
    if several is not None:
        return _open_archives(_expanded(path, several), f"archives {printable(path.name)}", caption_key)
    raise InputError(*near_misses.nothing_there(path))


def _open_file(file: Path, caption_key: str | None, image_root: Path | None) -> PictureSource:
    suffix = file.suffix.lower()
    if suffix in (".tar", ".parquet"):
        return _open_archives([file], f"archive {printable(file.name)}", caption_key)
    if is_split(file):
        return open_splits([file], caption_key=caption_key, image_root=image_root)
    if suffix in (".jsonl", ".csv"):
        return open_listing(file, caption_key=caption_key, image_root=image_root)
    if suffix == ".json":
        return open_coco(file, caption_key=caption_key, image_root=image_root)
    raise InputError(*near_misses.no_data_file(file))


def _open_folder(folder: Path, caption_key: str | None, image_root: Path | None) -> PictureSource:
    near_misses.refuse_store(folder)
    for name in METADATA:
        if (folder / name).is_file():
            return open_listing(folder / name, caption_key=caption_key, image_root=image_root)
    sets = near_misses.top_level(folder)
    if sets.splits:
        return open_splits(sets.splits, caption_key=caption_key, image_root=image_root)
    if len(sets.coco) > 1:
        names = ", ".join(str(file) for file in sets.coco[:6])
        raise InputError(f"{folder} holds several COCO caption files", f"give one of them: {names}")
    if sets.coco:
        return open_coco(sets.coco[0], caption_key=caption_key, image_root=image_root, folder=folder)
    found = walk(folder, Fence(folder, image_root))
    if not found.pictures and sets.archives:
        near_misses.refuse_mixed_splits(folder, sets.archives)
        title = f"folder {printable(folder.resolve().name)}"
        return _open_archives(sets.archives, title, caption_key)
    near_misses.refuse_data_set_below(folder)
    near_misses.refuse_metadata_json(folder)
    if not found.pictures:
        raise InputError(*near_misses.no_pictures(folder, found))
    source = folder_source(folder, found, caption_key)
    return near_misses.with_remarks(source, folder, sets)


def _open_archives(files: Sequence[Path], title: str, caption_key: str | None) -> PictureSource:
    if files[0].suffix.lower() == ".parquet":
        return open_parquet(files, title, caption_key=caption_key)
    return open_tars(files, title, caption_key=caption_key)


def _expanded(pattern: Path, several: re.Match[str]) -> list[Path]:
    """The files of NAME-{00000..00099}.tar.

    Raises:
        InputError: one of them is missing, or there are too many.
        UsageError: they are no archives, or are counted backwards.
    """
    before, first, last, behind = several.groups()
    if Path(str(pattern)).suffix.lower() not in (".tar", ".parquet"):
        raise UsageError(f"{pattern}: {{..}} stands for several tar or parquet files")
    count = int(last) - int(first) + 1
    if not 0 < count <= _MAX_SHARDS:
        raise UsageError(f"{pattern}: {first}..{last} is no range of at most {_MAX_SHARDS} files")
    files = [Path(f"{before}{number:0{len(first)}d}{behind}") for number in range(int(first), int(last) + 1)]
    missing = [file for file in files if not file.is_file()]
    if missing:
        hint = near_misses.similar(missing[0]) if len(missing) == len(files) else None
        raise InputError(f"{len(missing)} of {len(files)} files of {pattern} are missing, {missing[0]} first", hint)
    return files


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

    @property
    def layout(self) -> str:
        return f"{self.count} drawings of the demo world, seed {self.seed}{', half mirrored' if self.flips else ''}"

    @property
    def remarks(self) -> tuple[str, ...]:
        return ()

    @property
    def claimed(self) -> None:
        return None

    def __len__(self) -> int:
        return self.count

    def key(self, index: int) -> str:
        return f"world/{self.seed}{FLIP if self.flips else ''}/{index:08d}"

    def captions(self, index: int) -> tuple[str, ...]:
        from bitgen_cli.demo import world

        return (world.caption_at(index, self.seed),)

    def image(self, index: int) -> Image.Image:
        from bitgen_cli.demo import world

        return world.picture(index, self.seed, self.side, flips=self.flips).image

    def size(self, index: int) -> tuple[int, int]:
        return self.side, self.side


def _open_world(data: str, side: int) -> WorldSource:
    numbers = data.removeprefix(WORLD).removesuffix(FLIP).split(":")
    written_right = all(part.isascii() and part.isdigit() and len(part) < 16 for part in numbers) and len(numbers) <= 2
    if not written_right or int(numbers[0]) == 0:
        raise UsageError(f"{data!r} is not world:N[:SEED][:flip]", "for example world:20000")
    return WorldSource(int(numbers[0]), int(numbers[1]) if len(numbers) == 2 else 0, side, data.endswith(FLIP))
