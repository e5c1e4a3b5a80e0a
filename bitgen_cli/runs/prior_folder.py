"""A folder of class pictures: what it holds, and whether that is what is wanted.

    manifest.json    base model, class, templates, sampling, and prompt, seed and sha256 of every picture
    0000.png ...     the pictures, each with its recipe

Pictures that the manifest does not list are the user's own: counted, never touched.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bitgen_cli.config import SamplingConfig
from bitgen_cli.engine.captions import captions_beside
from bitgen_cli.engine.data import SUFFIXES, picture_size
from bitgen_cli.engine.model_folder import fingerprint
from bitgen_cli.errors import InputError, UsageError
from bitgen_cli.files import PARTIAL, data_folder, explain, read_json, write_json
from bitgen_cli.runs.class_words import CLASS, with_article
from bitgen_cli.runs.output import slug

MANIFEST = "manifest.json"
SEEDS = 2**63
"""First seeds are below this."""
NAMED = 5
"""Files named one by one in a message; further ones are only counted."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


_Seed = Annotated[int, Field(ge=0, lt=2 * SEEDS)]


class Made(_Record):
    """A picture the base model made.

    Attributes:
        file: its name in the folder; nothing that leads out of it.
        prompt, seed: it was drawn from.
        sha256: of the file.
    """

    file: Annotated[str, Field(pattern=r"^[0-9]{4,12}(-[0-9]{1,12})?\.png$")]
    prompt: str
    seed: _Seed
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Manifest(_Record):
    """What the pictures of a folder were made with, and which they are.

    Attributes:
        base: fingerprints of the base model's parts.
        base_name: what the base model was called; for people.
        class_word, templates: what the prompts were made of.
        seed: of picture 0.
        size: width and height of the pictures in pixels.
        pictures: in the order of their seeds.
    """

    format: Literal["bitgen priors"] = "bitgen priors"
    version: Literal[1] = 1
    base: dict[str, str]
    base_name: str
    class_word: str
    templates: Annotated[list[str], Field(min_length=1)]
    seed: _Seed
    sampling: SamplingConfig
    size: tuple[int, int]
    pictures: list[Made]

    @model_validator(mode="after")
    def _each_once(self) -> Manifest:
        for what in ("file", "seed"):
            if len({getattr(picture, what) for picture in self.pictures}) != len(self.pictures):
                raise ValueError(f"a {what} is listed twice")
        if any(picture.seed < self.seed for picture in self.pictures):
            raise ValueError("a picture has a seed before the first")
        return self

    @property
    def files(self) -> set[str]:
        """Names of the listed pictures."""
        return {picture.file for picture in self.pictures}


@dataclass(frozen=True)
class Prior:
    """A class picture to learn from, and what it shows."""

    file: Path
    prompt: str


def read_manifest(folder: Path) -> Manifest:
    """What the folder says about itself.

    Raises:
        InputError: missing or broken.
    """
    file = folder / MANIFEST
    try:
        return Manifest.model_validate(read_json(file))
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise InputError(
            f"{file} does not describe class pictures: {f'{where}: ' if where else ''}{problem['msg']}",
            "move that folder away, or choose another one",
        ) from error


def read_priors(folder: Path, class_word: str, fingerprints: Mapping[str, str]) -> list[Prior]:
    """The class pictures of a folder: those of its manifest, and the user's own with the captions beside them.

    Of the user's own, those that cannot be read are left out; `gen_priors` names them.

    Args:
        folder: filled by `gen_priors`, or the user's own pictures alone, without a manifest.
        class_word: what they are to show.
        fingerprints: of the base model.

    Raises:
        InputError: no folder, no pictures, a broken manifest, or a listed picture that is missing or damaged.
        UsageError: they were made by another base model, or show another class.
    """
    folder, class_word = folder.expanduser(), " ".join(class_word.split())
    if not folder.is_dir():
        raise InputError(f"no class pictures at {folder}: there is no such folder", "bitgen gen-priors makes them")
    known = None
    if (folder / MANIFEST).exists():
        known = read_manifest(folder)
        _refuse(folder, [*_base_differences(known, fingerprints), *_class_difference(known, class_word)])
        bad = bad_files(folder, known)
        if bad:
            raise InputError(f"{folder}: {in_words(bad)}", "bitgen gen-priors makes them again")
    found = list(all_priors(folder, known, own_pictures(folder, known)[0], class_word))
    if not found:
        raise InputError(f"no class pictures in {folder}", "bitgen gen-priors makes them, or put your own there")
    return found


def default_folder(wanted: Manifest) -> Path:
    """Where pictures are kept: apart for each base model, and for each class and way of drawing it."""
    base = "".join(f"{part}={wanted.base[part]}\n" for part in sorted(wanted.base))
    drawn = wanted.model_dump_json(include={"class_word", "templates", "seed", "sampling", "size"})
    model, way = (hashlib.sha256(text.encode()).hexdigest() for text in (base, drawn))
    return data_folder() / "priors" / model[:12] / f"{slug(wanted.class_word)}-{way[:8]}"


def open_manifest(place: Path, wanted: Manifest) -> Manifest:
    """The folder's manifest, or the wanted one where there is none yet.

    Raises:
        UsageError: its pictures were made with something else, or it is a file.
    """
    try:
        if place.exists() and not place.is_dir():
            raise UsageError(f"{place} is a file", "choose a folder for the class pictures")
        if not (place / MANIFEST).exists():
            return wanted
    except OSError as error:  # a folder above may not be looked into
        raise explain(error, place, "read") from error
    found = read_manifest(place)
    differences = [*_base_differences(found, wanted.base), *_class_difference(found, wanted.class_word)]
    if found.templates != wanted.templates:
        differences.append(f"templates {', '.join(found.templates)!r}, not {', '.join(wanted.templates)!r}")
    for name in ("seed", "size"):
        if getattr(found, name) != getattr(wanted, name):
            differences.append(f"{name} {getattr(found, name)}, not {getattr(wanted, name)}")
    was, now = found.sampling.model_dump(), wanted.sampling.model_dump()
    differences += [f"sampling.{key} {was[key]}, not {now[key]}" for key in was if was[key] != now[key]]
    _refuse(place, differences)
    return found


def _base_differences(found: Manifest, fingerprints: Mapping[str, str]) -> list[str]:
    parts = sorted(p for p in {*found.base, *fingerprints} if found.base.get(p) != fingerprints.get(p))
    return [f"made by another base model, {found.base_name}, whose {' and '.join(parts)} differ"] if parts else []


def _class_difference(found: Manifest, class_word: str) -> list[str]:
    return [] if found.class_word == class_word else [f"class {found.class_word!r}, not {class_word!r}"]


def _refuse(place: Path, differences: Sequence[str]) -> None:
    if differences:
        raise UsageError(
            f"{place} holds other class pictures: {'; '.join(differences)}",
            "choose another folder with --output (--priors of finetune-subject), or move this one away",
        )


def bad_files(place: Path, known: Manifest) -> dict[str, str]:
    """Listed files that are not there as they were made, with what is wrong."""
    bad = {}
    for picture in known.pictures:
        file = place / picture.file
        try:
            if not file.is_file():
                bad[picture.file] = "missing"
            elif fingerprint(file) != picture.sha256:
                bad[picture.file] = "damaged"
        except OSError as error:
            raise explain(error, file, "read") from error
    return bad


def in_words(bad: Mapping[str, str]) -> str:
    """What is wrong with which files, in one line."""
    named = [f"{file} is {what}" for file, what in list(bad.items())[:NAMED]]
    return ", ".join(named) + (f" and {len(bad) - NAMED} more are not as they were" if len(bad) > NAMED else "")


def own_pictures(place: Path, known: Manifest | None) -> tuple[list[Path], list[str]]:
    """The user's own pictures, by name, and why others of them cannot be read.

    Only their heads are read; what is damaged further down is told by whoever loads them.
    """
    listed = set() if known is None else known.files
    try:
        entries = sorted(place.iterdir()) if place.is_dir() else []
        names = [
            entry.name
            for entry in entries
            if entry.name.lower().endswith(SUFFIXES) and not entry.name.startswith(".") and entry.name not in listed
            if entry.is_file()
        ]
    except OSError as error:
        raise explain(error, place, "read") from error
    own, unreadable = [], []
    for name in names:
        try:
            picture_size(place / name)
            own.append(place / name)
        except InputError as error:
            unreadable.append(error.message)
    return own, unreadable


def all_priors(place: Path, known: Manifest | None, own: Iterable[Path], class_word: str) -> Iterator[Prior]:
    """All pictures with what they show."""
    for picture in () if known is None else known.pictures:
        yield Prior(place / picture.file, picture.prompt)
    for file in own:
        yield Prior(file, _caption(file, class_word))


def _caption(file: Path, class_word: str) -> str:
    """What the user says a picture shows, else that it shows the class."""
    caption = next(iter(captions_beside(file)), f"a {CLASS}")
    return with_article(caption, class_word)


@contextmanager
def staging(place: Path) -> Iterator[Path]:
    """A hidden folder in `place` for pictures that the manifest does not list yet.

    Raises:
        ResourceError: no space left.
        InputError: not allowed to write there.
    """
    folder = place / f".batch.{os.getpid()}{PARTIAL}"
    try:
        folder.mkdir(exist_ok=True)
        yield folder
    except OSError as error:
        raise explain(error, place, "write") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def list_pictures(place: Path, known: Manifest, made: Sequence[Made]) -> Manifest:
    """Writes the manifest with these pictures put in; what another process has listed meanwhile stays listed."""
    stored = open_manifest(place, known)
    listed = {picture.seed: picture for picture in (*known.pictures, *stored.pictures, *made)}
    known = known.model_copy(update={"pictures": [listed[seed] for seed in sorted(listed)]})
    write_json(place / MANIFEST, known.model_dump(mode="json"))
    return known
