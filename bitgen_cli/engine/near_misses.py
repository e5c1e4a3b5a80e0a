"""What a folder holds at its top, and answers to data that is nearly right: the path that would work."""

from __future__ import annotations

import difflib
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bitgen_cli.engine.archives import COMPRESSED
from bitgen_cli.engine.data import SUFFIXES
from bitgen_cli.engine.folders import NAMED, FileSource, Found, shown
from bitgen_cli.engine.listings import METADATA, is_split
from bitgen_cli.engine.store_format import MANIFEST
from bitgen_cli.errors import InputError
from bitgen_cli.files import explain

ARCHIVES = (".tar", ".parquet")
LISTINGS = (".jsonl", ".csv", ".json")
ANNOTATIONS = "annotations"
"""The folder COCO keeps its captions in."""

_PARQUET_SPLIT = re.compile(r"(.*?)-(\d{5,})-of-(\d{5,})\.parquet")
_MOST = 1000
"""Sub-folders that are looked into for a data set."""


@dataclass(frozen=True)
class TopLevel:
    """Data set files right in a folder, sorted.

    Attributes:
        splits: of Infinity.
        coco: caption files, also those in `annotations`.
        archives: tars and parquet files; parquet files also those in `data`.
        listings: other files that may list pictures.
    """

    splits: tuple[Path, ...]
    coco: tuple[Path, ...]
    archives: tuple[Path, ...]
    listings: tuple[Path, ...]


def top_level(folder: Path) -> TopLevel:
    """What data set files a folder holds."""
    files = _files(folder, (*ARCHIVES, *LISTINGS))
    archives = [file for file in files if file.suffix.lower() in ARCHIVES]
    if not archives and (folder / "data").is_dir():
        archives = _files(folder / "data", (".parquet",))
    coco = [file for file in files if _is_coco(file)]
    if not coco and (folder / ANNOTATIONS).is_dir():
        coco = [file for file in _files(folder / ANNOTATIONS, LISTINGS) if _is_coco(file)]
    splits = [file for file in files if is_split(file)]
    known = {*splits, *coco}
    listings = [file for file in files if file.suffix.lower() in LISTINGS and file not in known]
    return TopLevel(tuple(splits), tuple(coco), tuple(archives), tuple(listings))


def refuse_store(folder: Path) -> None:
    """Raises InputError for a folder that is a token store already."""
    places = (folder, *folder.glob("part-*-of-*"))
    if any((place / MANIFEST).is_file() and any(place.glob("shard-*.safetensors")) for place in places):
        raise InputError(f"{folder} is a token store, not pictures", f"bitgen train --data {folder} learns from it")


def refuse_mixed_splits(folder: Path, archives: Sequence[Path]) -> None:
    """Raises InputError for archives of two kinds, or parquet files of several splits, which belong apart."""
    kinds = {file.suffix.lower() for file in archives}
    if len(kinds) > 1:
        raise InputError(f"{folder} holds tars and parquet files", f"give one of them, for example {archives[0]}")
    splits: defaultdict[str, list[Path]] = defaultdict(list)
    for file in archives:
        found = _PARQUET_SPLIT.fullmatch(file.name)
        if found is not None:
            splits[found[1]].append(file)
    if len(splits) > 1:
        patterns = ", ".join(_pattern(files) for files in splits.values())
        raise InputError(f"{folder} holds several splits: {', '.join(splits)}", f"give one of them: {patterns}")


def refuse_data_set_below(folder: Path) -> None:
    """Raises InputError when not the folder but sub-folders of it are data sets with listings or archives."""
    below = [
        entry
        for entry in _folders(folder)
        for sets in [top_level(entry)]
        if sets.splits or sets.archives or any((entry / name).is_file() for name in METADATA)
    ]
    if below:
        places = shown([str(entry) for entry in below], 6)
        said = f"{folder} is no data set of its own: "
        if len(below) == 1:
            raise InputError(f"{said}a folder in it is one", f"give {places}")
        raise InputError(f"{said}{len(below)} folders in it are", f"give one of them: {places}")


def refuse_metadata_json(folder: Path) -> None:
    """Raises InputError for a metadata.json, whose captions would be lost."""
    file = folder / "metadata.json"
    if file.is_file():
        raise InputError(
            f"{file} is not read: a listing is called {METADATA[0]}",
            f"write its objects into {folder / METADATA[0]}, one per line; COCO captions are read when "
            "the file itself is given",
        )


def with_remarks(source: FileSource, folder: Path, sets: TopLevel) -> FileSource:
    """The source of a plain folder, with where its captions or further pictures may be."""
    remarks = list(source.remarks)
    if sets.archives:
        remarks.append(f"{shown([file.name for file in sets.archives])} not read: give {sets.archives[0]} for that")
    if not source.given and not any(source.texts or ("captioned",)):
        real = folder.resolve()
        above = [real.parent / name for name in METADATA if (real.parent / name).is_file()]
        coco = real.parent / ANNOTATIONS / f"captions_{real.name}.json"
        if 0 < len(sets.listings) <= NAMED:
            remarks.append(f"captions may be in {sets.listings[0]}: give that file for them")
        elif above:
            remarks.append(f"captions may be in {above[0]}: give {real.parent} for them")
        elif coco.is_file():
            remarks.append(f"captions may be in {coco}: give that file for them")
    return replace(source, remarks=tuple(remarks))


def no_pictures(folder: Path, found: Found) -> tuple[str, str]:
    """Message and hint for a folder without pictures."""
    said = f"no pictures in {folder}"
    packed = _files(folder, COMPRESSED)
    if packed:
        return said, f"unpack {packed[0].name} first: compressed archives are not read"
    listings = _files(folder, LISTINGS)
    if listings:
        return said, f"give {listings[0]} itself, with --image-root where its pictures are elsewhere"
    there = f"; there are {_counts(found)}" if found.others else ""
    return said, f"looked for {', '.join(SUFFIXES)}, sub-folders included{there}"


def no_data_file(file: Path) -> tuple[str, str]:
    """Message and hint for a file that is no data set."""
    name = file.name.lower()
    if name.endswith(COMPRESSED):
        return f"{file} is compressed: its pictures cannot be read one by one", "unpack it, or make a plain tar of it"
    if name.endswith(SUFFIXES):
        return f"{file} is a single picture", f"give the folder: {file.parent}"
    if any((file.parent / other).is_file() for other in METADATA) or _holds_pictures(file.parent):
        return f"{file} is no data set", f"give the folder: {file.parent}"
    kinds = ", ".join((*LISTINGS, *ARCHIVES))
    return f"{file} is no data set", f"give a folder of pictures, or a file of {kinds}"


def nothing_there(path: Path) -> tuple[str, str]:
    """Message and hint for a path that does not exist."""
    if re.match(r"(https?|hf|s3|gs)s?:/", str(path)):
        return f"{path} is an address", "only files on this machine are read: download it first"
    usual = "give a folder of pictures, or world:N for N drawn ones"
    return f"{path} does not exist", similar(path) or usual


def similar(path: Path) -> str | None:
    """A hint at an existing path of nearly the same name."""
    parts = path.absolute().parts
    place = Path(parts[0])
    changed = False
    for part in parts[1:]:
        if os.path.exists(place / part):
            place /= part
            continue
        try:
            names = os.listdir(place)
        except OSError:
            return None
        stems = {os.path.splitext(name)[0].lower(): name for name in names}
        lower = {name.lower(): name for name in names}
        close = difflib.get_close_matches(part.lower(), [*lower, *stems], 1, 0.7)
        if not close:
            return None
        place /= lower.get(close[0]) or stems[close[0]]
        changed = True
    if not changed:
        return None
    return f"did you mean {place if path.is_absolute() else os.path.relpath(place)}?"


def _pattern(files: Sequence[Path]) -> str:
    """The files of one split as they are typed."""
    found = _PARQUET_SPLIT.fullmatch(files[0].name)
    last = _PARQUET_SPLIT.fullmatch(files[-1].name)
    assert found is not None
    assert last is not None
    if len(files) == 1:
        return str(files[0])
    return f"'{files[0].parent / found[1]}-{{{found[2]}..{last[2]}}}-of-{found[3]}.parquet'"


def _is_coco(file: Path) -> bool:
    return file.suffix.lower() == ".json" and file.stem.lower().startswith("captions")


def _holds_pictures(folder: Path) -> bool:
    return any(entry.name.lower().endswith(SUFFIXES) for entry in _entries(folder))


def _counts(found: Found) -> str:
    return ", ".join(f"{count} {suffix or 'without a suffix'}" for suffix, count in found.others.most_common(5))


def _files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The files right in a folder whose names end so and that are not hidden, by name."""
    names = (entry.name for entry in _entries(folder) if entry.name.lower().endswith(suffixes))
    return [folder / name for name in sorted(names) if os.path.isfile(folder / name)]


def _folders(folder: Path) -> list[Path]:
    """Folders below a folder, two deep, that are not hidden and no links."""
    found: list[Path] = []
    for entry in _entries(folder):
        if entry.is_dir(follow_symlinks=False):
            found.append(Path(entry.path))
            found += [Path(e.path) for e in _entries(Path(entry.path)) if e.is_dir(follow_symlinks=False)]
        if len(found) > _MOST:
            break
    return sorted(found[:_MOST])


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from (entry for entry in entries if not entry.name.startswith("."))
    except OSError as error:
        raise explain(error, folder, "read") from error
