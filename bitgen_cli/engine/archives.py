"""Tars of pictures as WebDataset writes them: KEY.jpg, KEY.txt and KEY.json one after the other.

A tar is gone through once and read by offset from then on; nothing is unpacked. Names in it are keys and never paths.
"""

from __future__ import annotations

import os
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Any, BinaryIO, cast

from PIL import Image

from bitgen_cli.engine.captions import (
    NO_CAPTIONS,
    captions_of_row,
    decode_text,
    one_line,
    parse_json,
    printable,
    require_key,
    several,
)
from bitgen_cli.engine.data import MAX_BYTES, SUFFIXES, decode_picture, picture_size
from bitgen_cli.engine.folders import shown
from bitgen_cli.errors import InputError
from bitgen_cli.files import explain

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip", ".7z", ".rar")
"""Archives that cannot be read from anywhere."""

_HEADER = 1 << 20
"""Most bytes read at once while a tar is gone through: what describes a member is never longer."""
_TEXTS = ("txt", "caption", "json")
_BROKEN = (tarfile.TarError, ValueError, OverflowError, EOFError, KeyError, IndexError, UnicodeError)
"""What tarfile raises for files that are no tars or damaged ones."""


@dataclass(frozen=True)
class TarSource:
    """Pictures in tars.

    Args:
        tars: the files.
        index: where the pictures are in each.
        layout, remarks: as in `PictureSource`.
        caption_key: field of the JSON member that holds the caption; None takes the text member before it.
        title: what the source is called.
    """

    tars: tuple[Path, ...]
    index: TarIndex
    layout: str
    remarks: tuple[str, ...]
    caption_key: str | None
    title: str
    _opened: dict[int, FileIO] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def name(self) -> str:
        return self.title + ("" if self.caption_key is None else f", captions from {one_line(self.caption_key)}")

    @property
    def claimed(self) -> None:
        return None

    def __len__(self) -> int:
        return len(self.index.keys)

    def key(self, index: int) -> str:
        return f"{printable(self.tars[self.index.tar[index]].name)}/{self.index.keys[index]}"

    def captions(self, index: int) -> tuple[str, ...]:
        """Of the text member, else of the JSON member; with a caption key of the JSON member alone."""
        if self.caption_key == NO_CAPTIONS:
            return ()
        texts = {kind: self.index.parts[kind][2 * index : 2 * index + 2] for kind in _TEXTS}
        for kind in ("txt", "caption") if self.caption_key is None else ():
            if texts[kind][0]:
                return several(decode_text(self._read(index, *texts[kind]), self._where(index, kind)))
        if not texts["json"][0]:
            return ()
        where = self._where(index, "json")
        row = parse_json(decode_text(self._read(index, *texts["json"]), where), where)
        return captions_of_row(row, self.caption_key, where) if isinstance(row, dict) else ()

    def image(self, index: int) -> Image.Image:
        offset, size = self._picture(index)
        return decode_picture(self._read(index, offset, size), self._where(index))

    def size(self, index: int) -> tuple[int, int]:
        offset, size = self._picture(index)
        window = cast(BinaryIO, BufferedReader(_Window(self._file(index), offset, size)))
        return picture_size(window, self._where(index))

    def __getstate__(self) -> dict[str, Any]:
        """Without open files: each process opens its own."""
        return {**self.__dict__, "_opened": {}}

    def _picture(self, index: int) -> tuple[int, int]:
        offset, size = self.index.parts["picture"][2 * index : 2 * index + 2]
        if size > MAX_BYTES:
            raise InputError(f"{self._where(index)} has {size >> 20} MiB, more than a picture may have")
        return offset, size

    def _where(self, index: int, suffix: str = "") -> str:
        tar = self.tars[self.index.tar[index]]
        return f"{tar}: {self.index.keys[index]}{'.' if suffix else ''}{suffix}"

    def _file(self, index: int) -> FileIO:
        """The tar of a picture, opened once per process."""
        number = self.index.tar[index]
        if number not in self._opened:
            while len(self._opened) >= 16:
                self._opened.pop(next(iter(self._opened))).close()
            try:
                self._opened[number] = FileIO(self.tars[number])
            except OSError as error:
                raise explain(error, self.tars[number], "read") from error
        return self._opened[number]

    def _read(self, index: int, offset: int, size: int) -> bytes:
        tar = self.tars[self.index.tar[index]]
        try:
            content = os.pread(self._file(index).fileno(), min(size, MAX_BYTES + 1), offset)
        except OSError as error:
            raise explain(error, tar, "read") from error
        if len(content) != size:
            raise InputError(f"{self._where(index)} is cut short", f"has {tar.name} changed?")
        return content


@dataclass
class TarIndex:
    """Where the pictures of several tars are, in as little memory as that takes.

    Attributes:
        keys: name of each without its suffix.
        tar: number of the tar each is in.
        parts: of `picture` and each kind of text, offset and size one after the other; two zeros where there is none.
    """

    keys: list[str] = field(default_factory=list)
    tar: array[int] = field(default_factory=lambda: array("l"))
    parts: dict[str, array[int]] = field(default_factory=lambda: {k: array("q") for k in ("picture", *_TEXTS)})

    def add(self, key: str, tar: int, members: dict[str, tuple[int, int]]) -> None:
        """Takes in one picture with its texts."""
        self.keys.append(key)
        self.tar.append(tar)
        for kind, places in self.parts.items():
            places.extend(members.get(kind, (0, 0)))


def open_tars(tars: Sequence[Path], title: str, *, caption_key: str | None = None) -> TarSource:
    """The pictures in tars, in the order they have there.

    Args:
        tars: uncompressed files.
        title: what the source is called.
        caption_key: field of KEY.json that holds the caption; None takes KEY.txt, KEY.caption or the usual fields.

    Raises:
        InputError: not a tar, a compressed or damaged one, or no pictures in them.
        UsageError: the first JSON member has no such field.
    """
    index = TarIndex()
    for number, tar in enumerate(tars):
        _add(tar, number, index)
    if not index.keys:
        names = shown([str(tar) for tar in tars])
        raise InputError(f"no pictures in {names}", "looked for KEY.jpg, with KEY.txt or KEY.json")
    with_text = {kind: sum(1 for offset in index.parts[kind][::2] if offset) for kind in _TEXTS}
    kinds = [f"{count} .{kind}" for kind, count in with_text.items() if count]
    count = "1 tar" if len(tars) == 1 else f"{len(tars)} tars"
    layout = f"WebDataset, {count}: {len(index.keys)} pictures, {', '.join(kinds) or 'no captions'}"
    source = TarSource(tuple(tars), index, layout, (), caption_key, title)
    if caption_key not in (None, NO_CAPTIONS):
        _require_field(source)
    return source


def _require_field(source: TarSource) -> None:
    """Raises UsageError when the first JSON member has no field of that name."""
    places = source.index.parts["json"]
    first = next((number for number in range(len(source)) if places[2 * number]), None)
    if first is None:
        require_key(source.caption_key, (), f"{source.tars[0]}, which has no .json,")
        return
    where = source._where(first, "json")
    row = parse_json(decode_text(source._read(first, *places[2 * first : 2 * first + 2]), where), where)
    require_key(source.caption_key, row if isinstance(row, dict) else (), where)


def _add(tar: Path, number: int, index: TarIndex) -> None:
    """Goes through one tar. Of members of the same name the last one counts, as in every tar."""
    groups: dict[str, dict[str, tuple[int, int]]] = {}
    with _walking(tar) as (opened, file):
        length = os.fstat(file.fileno()).st_size
        while (member := opened.next()) is not None:
            opened.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
            if not member.isreg() or member.issparse():
                continue
            if member.offset_data + member.size > length:
                raise tarfile.ReadError(f"{printable(member.name)} is cut short")
            folder, _, name = member.name.rpartition("/")
            stem, _, suffix = name.partition(".")
            kind = suffix.lower()
            if not stem or (kind not in _TEXTS and f".{kind}" not in SUFFIXES):
                continue
            key = printable(f"{folder}/{stem}" if folder else stem)
            part = kind if kind in _TEXTS else "picture"
            groups.setdefault(key, {})[part] = (member.offset_data, member.size)
        if os.pread(file.fileno(), tarfile.BLOCKSIZE, opened.offset).strip(b"\0"):
            raise tarfile.ReadError(f"byte {opened.offset} begins no member")
    for key, members in groups.items():
        if "picture" in members:
            index.add(key, number, members)


@contextmanager
def _walking(tar: Path) -> Iterator[tuple[tarfile.TarFile, BufferedReader]]:
    """An open tar and its file; whatever tarfile raises for a bad one becomes an InputError."""
    try:
        if tar.name.lower().endswith(COMPRESSED) or _is_compressed(tar):
            raise InputError(
                f"{tar} is compressed, so that pictures in it cannot be read one by one",
                "unpack it, or write an uncompressed tar: pictures are compressed already",
            )
        with _Headers(FileIO(tar)) as file, tarfile.open(fileobj=file, mode="r:") as opened:
            yield opened, file
    except OSError as error:
        raise explain(error, tar, "read") from error
    except _BROKEN as error:
        reason = one_line(str(error)) or type(error).__name__
        raise InputError(f"{tar} is not a whole tar: {reason}", "copy it again") from error


def _is_compressed(tar: Path) -> bool:
    with tar.open("rb") as file:
        head = file.read(6)
    return head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK\x03\x04"))


class _Headers(BufferedReader):
    """A tar while it is gone through: what claims to be a header and is far too long is not read."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


class _Window(FileIO):
    """A part of an open file as a file of its own."""

    def __init__(self, file: FileIO, offset: int, size: int) -> None:
        super().__init__(file.fileno(), closefd=False)
        self._start, self._size, self._place = offset, size, 0

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        content = os.pread(self.fileno(), min(len(view), max(0, self._size - self._place)), self._start + self._place)
        view[: len(content)] = content
        self._place += len(content)
        return len(content)

    def seek(self, place: int, whence: int = os.SEEK_SET, /) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        self._place = max(0, base + place)
        return self._place

    def tell(self) -> int:
        return self._place
