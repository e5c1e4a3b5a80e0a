"""Picture files below a folder: found by walking through it, or named by a listing; and links that lead out of it."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from bitgen_cli.engine.captions import NO_CAPTIONS, TEXT_SUFFIXES, printable, read_text_file, several
from bitgen_cli.engine.data import SUFFIXES, load_picture, picture_size
from bitgen_cli.errors import InputError
from bitgen_cli.files import explain

SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing", "dev", "images", "imgs", "data")
"""Names of folders that say nothing about the pictures in them."""
NAMED = 3
"""Examples given of what is counted."""

_SKIPPED = ("__MACOSX", "@eaDir", "$RECYCLE.BIN")
"""Folders that systems make and people do not mean."""


@dataclass(frozen=True)
class FileSource:
    """Picture files below a folder.

    Args:
        folder: where they are.
        files: paths below it, or absolute ones.
        layout, remarks: as in `PictureSource`.
        given: captions of each, or None.
        texts: for each the suffix of the text file beside it, which goes before what is given, or "".
        outside: indices of links that lead out of the folder; they are not read.
        claimed: as in `PictureSource`.
        choice: what else sets this source apart from another one of the same folder, in words.
    """

    folder: Path
    files: tuple[str, ...]
    layout: str
    remarks: tuple[str, ...] = ()
    given: tuple[tuple[str, ...], ...] | None = None
    texts: tuple[str, ...] | None = None
    outside: frozenset[int] = frozenset()
    claimed: tuple[float, ...] | None = None
    choice: str = ""

    @property
    def name(self) -> str:
        return f"folder {printable(self.folder.resolve().name)}{self.choice}"

    def __len__(self) -> int:
        return len(self.files)

    def key(self, index: int) -> str:
        return printable(self.files[index])

    def path(self, index: int) -> Path:
        """The picture's file.

        Raises:
            InputError: it is a link that leads out of the folder.
        """
        path = self.folder / self.files[index]
        if index in self.outside:
            target = os.path.dirname(os.path.realpath(path))
            raise InputError(f"{path} leads out of {self.folder}", f"--image-root {target} allows it")
        return path

    def captions(self, index: int) -> tuple[str, ...]:
        if self.texts is not None and self.texts[index]:
            return several(read_text_file((self.folder / self.files[index]).with_suffix(self.texts[index])))
        return () if self.given is None else self.given[index]

    def image(self, index: int) -> Image.Image:
        return load_picture(self.path(index))

    def size(self, index: int) -> tuple[int, int]:
        return picture_size(self.path(index))


class Fence:
    """The folders that pictures may lie in, links followed.

    The snapshot of a repository in the cache of huggingface_hub is made of links into that repository's folder, which
    is then allowed too.

    Args:
        folder: of the data.
        image_root: another one that the user allows.
    """

    def __init__(self, folder: Path, image_root: Path | None = None) -> None:
        real = folder.resolve()
        roots = [real, *([] if image_root is None else [image_root.resolve()])]
        if real.parent.name == "snapshots" and (real.parent.parent / "blobs").is_dir():
            roots.append(real.parent.parent)
        self._roots = [str(root).rstrip(os.sep) + os.sep for root in roots]
        self._folders: dict[str, bool] = {}

    def holds(self, path: str, *, is_link: bool) -> bool:
        """Whether a file is inside; the folders above it are looked at once each."""
        if is_link:
            return self._inside(os.path.realpath(path))
        folder = os.path.dirname(path)
        if folder not in self._folders:
            self._folders[folder] = self._inside(os.path.realpath(folder) + os.sep)
        return self._folders[folder]

    def _inside(self, real: str) -> bool:
        return any(real.startswith(root) for root in self._roots)


@dataclass
class Found:
    """What a walk through a folder has come across; paths are below it, `/` between the parts.

    Attributes:
        pictures: each with the suffix of the text file beside it ("" for none) and whether it leads out of the folder.
        others: other files, by suffix.
        lone_texts: text files that no picture's name fits.
        linked_folders: links to folders, which are not followed.
    """

    pictures: list[tuple[str, str, bool]] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    lone_texts: list[str] = field(default_factory=list)
    linked_folders: list[str] = field(default_factory=list)

    def remarks(self) -> tuple[str, ...]:
        """What the user should know of the files that are not read."""
        remarks = []
        if self.others:
            listed = [f"{count} {suffix or 'without a suffix'}" for suffix, count in self.others.most_common(8)]
            remarks.append(f"left out: {', '.join(listed)}{' and other files' if len(self.others) > 8 else ''}")
        if self.lone_texts:
            count, example = len(self.lone_texts), printable(self.lone_texts[0])
            noun = "text file has" if count == 1 else "text files have"
            remarks.append(f"{count} {noun} no picture of the same name, for example {example}")
        if self.linked_folders:
            remarks.append(f"links to folders are not followed: {shown(self.linked_folders)}")
        return tuple(remarks)


def shown(names: Sequence[str], limit: int = NAMED) -> str:
    """The first of the names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(printable, names[:limit])) + more


def walk(folder: Path, fence: Fence) -> Found:
    """Everything below a folder but what is hidden, each folder read once.

    Raises:
        InputError: a folder cannot be read.
    """
    found = Found()
    waiting = [""]
    while waiting:
        below = waiting.pop()
        try:
            with os.scandir(folder / below) as entries:
                _look(list(entries), below, waiting, found, fence)
        except OSError as error:
            raise explain(error, Path(error.filename or folder / below), "read") from error
    found.pictures.sort()
    found.lone_texts.sort()
    return found


def _look(entries: Sequence[os.DirEntry[str]], below: str, waiting: list[str], found: Found, fence: Fence) -> None:
    pictures: list[tuple[str, os.DirEntry[str]]] = []
    texts: set[str] = set()
    for entry in entries:
        name = entry.name
        if name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            if name not in _SKIPPED:
                waiting.append(f"{below}{name}/")
            continue
        stem, suffix = os.path.splitext(name)
        kind = suffix.lower()
        if entry.is_symlink() and os.path.isdir(entry.path):
            found.linked_folders.append(below + name)
        elif kind in SUFFIXES and _is_file(entry):
            pictures.append((stem, entry))
        elif suffix in TEXT_SUFFIXES and _is_file(entry):
            if not entry.is_symlink() or fence.holds(entry.path, is_link=True):
                texts.add(name)
        else:
            found.others[kind] += 1
    used = set()
    for stem, entry in pictures:
        beside = next((suffix for suffix in TEXT_SUFFIXES if stem + suffix in texts), "")
        used.add(stem + beside)
        outside = entry.is_symlink() and not fence.holds(entry.path, is_link=True)
        found.pictures.append((below + entry.name, beside, outside))
    stems = {stem for stem, _ in pictures}
    found.lone_texts += [below + name for name in texts - used if os.path.splitext(name)[0] not in stems]


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Whether it may be read; a link that leads nowhere may, so that it is named."""
    if entry.is_symlink():
        return os.path.isfile(entry.path) or not os.path.exists(entry.path)
    return entry.is_file()


def folder_source(folder: Path, found: Found, caption_key: str | None) -> FileSource:
    """The pictures that a walk through a folder has come across.

    Captions are those in text files beside the pictures. Where all pictures lie in sub-folders that have names of their
    own, a picture without a text file has the name of its sub-folder for a caption.
    """
    files = tuple(name for name, _, _ in found.pictures)
    texts = tuple(beside for _, beside, _ in found.pictures)
    outside = frozenset(index for index, (_, _, leads_out) in enumerate(found.pictures) if leads_out)
    if caption_key == NO_CAPTIONS:
        layout = f"plain folder, {len(files)} pictures; captions are not read"
        return FileSource(folder, files, layout, found.remarks(), outside=outside, choice=", without captions")
    captioned = sum(1 for beside in texts if beside)
    classes = _classes(files)
    known = [name for name in classes if name is not None]
    if len(known) < len(files) or len(set(known)) < 2 or captioned == len(files):
        kinds = " or ".join(sorted({beside for beside in texts if beside}, key=TEXT_SUFFIXES.index))
        layout = f"pictures with {kinds} files: {captioned} of {len(files)} have one"
        if not captioned:
            layout = f"plain folder, {len(files)} pictures without captions"
        return FileSource(folder, files, layout, found.remarks(), texts=texts, outside=outside)
    names = sorted(set(known))
    layout = f"{len(names)} class folders ({shown(names)}), {len(files)} pictures: folder names are the captions"
    remarks = (*found.remarks(), f"--caption-key {NO_CAPTIONS} if the folders' names are no captions")
    given = tuple((name,) for name in known)
    return FileSource(folder, files, layout, remarks, given, texts, outside)


def _classes(files: Sequence[str]) -> list[str | None]:
    """The class of each file, thought about once for each folder."""
    known: dict[str, str | None] = {}
    found = []
    for file in files:
        folder = file[: file.rfind("/") + 1]
        if folder not in known:
            known[folder] = class_of(file)
        found.append(known[folder])
    return found


def class_of(file: str) -> str | None:
    """The class a picture's folder names, in words: the first folder of its path that is no SPLITS one.

    None where there is none, or where its name has no letter in it.
    """
    folders = file.split("/")[:-1]
    name = next((name for name in folders if name.lower() not in SPLITS), "")
    words = several(printable(name).replace("_", " ").replace("-", " "))
    return words[0] if words and any(character.isalpha() for character in words[0]) else None


def file_state(path: str) -> tuple[bool, bool]:
    """Whether there is a file at a path, and whether it is a link; one look at the disk for most."""
    try:
        mode = os.lstat(path).st_mode
    except (OSError, ValueError):
        return False, False
    if stat.S_ISLNK(mode):
        return os.path.isfile(path), True
    return stat.S_ISREG(mode), False
