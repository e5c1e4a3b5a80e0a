"""Files that list pictures with their captions: metadata.jsonl and .csv, Infinity's splits, COCO captions.

Infinity's splits: INFINITY_FORMAT section 6, Data.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from bitgen_cli.engine.captions import MAX_TEXT, captions_of_row, one_line, parse_json, require_key, several
from bitgen_cli.engine.folders import Fence, FileSource, file_state, shown
from bitgen_cli.engine.scales import PUBLISHED
from bitgen_cli.errors import InputError
from bitgen_cli.files import explain

METADATA = ("metadata.jsonl", "metadata.csv")
"""Listings that a folder's pictures are read by, the first there is."""
FILE_KEYS = ("file_name", "image_path")
MAX_JSON = 1 << 30
"""Bytes of a JSON file that is read whole."""
MISSING_SHARE = 0.01
"""More missing files than this share are an error at once; fewer are bad pictures."""

_SPLIT = re.compile(r"(\d+(?:\.\d+)?)_(\d+)\.jsonl")


def open_listing(
    file: Path, *, caption_key: str | None = None, image_root: Path | None = None, folder: Path | None = None
) -> FileSource:
    """The pictures a metadata.jsonl or .csv lists, in its order; a picture listed again has a further caption.

    Args:
        file: one object with `file_name` (or `image_path`) a line, or a header with that column.
        caption_key: field of the caption; None takes the first of CAPTION_KEYS.
        image_root: where the pictures are, if not beside the listing.
        folder: of the data, where that is not the listing's own.

    Raises:
        InputError: a row is wrong, more than 1 % of the pictures are missing, or one lies outside of the folder.
        UsageError: no row has that field.
    """
    root = image_root or folder or file.parent
    fence, fields = Fence(root, image_root), dict[str, None]()
    listed: dict[str, tuple[str, ...]] = {}
    count = 0
    for where, row in _rows(file):
        count += 1
        fields |= dict.fromkeys(row)
        name = _inside(_file_name(row, where), root, fence, where)
        captions = captions_of_row(row, caption_key, where)
        listed[name] = (*listed[name], *captions) if name in listed else captions
    if not listed:
        raise InputError(f"{file} lists no pictures", 'one object per line: {"file_name": ..., "text": ...}')
    require_key(caption_key, fields, str(file))
    rows = "" if count == len(listed) else f" in {count} rows"
    layout = f"{file.name}: {len(listed)} pictures{rows}"
    return _listed(file, root, fence, listed, layout, _choice(file.name, caption_key))


def open_splits(
    files: Sequence[Path], *, caption_key: str | None = None, image_root: Path | None = None
) -> FileSource:
    """The pictures of Infinity's JSONL splits; the long caption and the short one take turns.

    An `image_path` is relative to the image root, or to the splits' folder; an absolute one must lie below one of them.

    Args:
        files: named by height / width and the number of their rows; both are checked.
        caption_key: field of the caption; None takes both.
        image_root: where the pictures are, if not below the splits' folder.

    Raises:
        InputError: as `open_listing`, or a split has another number of rows than its name says.
        UsageError: no row has that field.
    """
    root = image_root or files[0].parent
    fence, fields = Fence(files[0].parent, image_root), dict[str, None]()
    listed: dict[str, tuple[str, ...]] = {}
    claimed: dict[str, float] = {}
    strangers: list[str] = []
    for file in files:
        ratio, count, promised = split_ratio(file), 0, _promised(file)
        for where, row in _rows(file):
            count += 1
            fields |= dict.fromkeys(row)
            name = _inside(_file_name(row, where), root, fence, where)
            keys = ("long_caption", "text") if caption_key is None else (caption_key,)
            captions = [text for key in keys for text in captions_of_row(row, key, where)]
            listed[name] = several(*listed.get(name, ()), *captions)
            claimed[name] = ratio
            own = row.get("h_div_w")
            if isinstance(own, int | float) and _template(own) != _template(ratio):
                strangers.append(where)
        if count != promised:
            whole = file.with_name(f"{file.name.rpartition('_')[0]}_{count:09d}.jsonl")
            raise InputError(
                f"{file} holds {count} rows, its name says {promised}",
                f"copy it again; if it is whole, rename it to {whole.name}",
            )
    if not listed:
        raise InputError(f"{files[0].parent} lists no pictures: its splits are empty")
    require_key(caption_key, fields, str(files[0].parent))
    splits = "1 split" if len(files) == 1 else f"{len(files)} splits"
    layout = f"Infinity's JSONL, {splits}: {len(listed)} pictures"
    odd = f"rows of another h_div_w than their split's name says: {shown(strangers)}"
    choice, ratios = _choice("splits", caption_key), tuple(claimed[name] for name in listed)
    return _listed(files[0], root, fence, listed, layout, choice, (odd,) if strangers else (), ratios)


def is_split(file: Path) -> bool:
    """Whether a file has the name of one of Infinity's splits."""
    return _SPLIT.fullmatch(file.name) is not None


def split_ratio(file: Path) -> float:
    """Height / width that a split's name says."""
    return float(_parts(file)[0])


def _promised(file: Path) -> int:
    return int(_parts(file)[1])


def _parts(file: Path) -> tuple[str, str]:
    found = _SPLIT.fullmatch(file.name)
    assert found is not None
    return found[1], found[2]


def _template(ratio: float) -> float:
    return min(PUBLISHED, key=lambda known: abs(known - min(ratio, max(PUBLISHED))))


def open_coco(
    file: Path, *, caption_key: str | None = None, image_root: Path | None = None, folder: Path | None = None
) -> FileSource:
    """The pictures of a COCO captions file, each with all its captions.

    Args:
        file: JSON with `images` and `annotations`.
        caption_key: field of an annotation's caption; None is `caption`.
        image_root: where the pictures are; None looks where COCO has them: beside the file, or beside its folder under
            the name of the file without `captions_`.
        folder: of the data, where that is not the file's own.

    Raises:
        InputError: not such a file, no captions in it, or its pictures are not there.
        UsageError: no annotation has that field.
    """
    content = _json_file(file)
    images, annotations = _records(content, "images", file), _records(content, "annotations", file)
    key = caption_key or "caption"
    fields = dict.fromkeys(name for row in annotations for name in row)
    if caption_key is None and annotations and key not in fields:
        raise InputError(f"{file} has annotations without captions", _captions_file_beside(file))
    require_key(caption_key, fields, str(file))
    texts: dict[Any, list[str]] = {}
    for number, row in enumerate(annotations):
        where = f"{file}, annotation {number}"
        texts.setdefault(_identity(row, "image_id", where), []).extend(captions_of_row(row, key, where))
    named = [
        (_file_name(row, f"{file}, image {n}"), _identity(row, "id", f"{file}, image {n}"))
        for n, row in enumerate(images)
    ]
    if not named:
        raise InputError(f"{file} lists no pictures")
    root = image_root or _coco_pictures(file, folder, [name for name, _ in named[:20]])
    fence = Fence(root, image_root)
    listed: dict[str, tuple[str, ...]] = {}
    for number, (name, identity) in enumerate(named):
        inside = _inside(name, root, fence, f"{file}, image {number}")
        listed[inside] = several(*listed.get(inside, ()), *texts.pop(identity, ()))
    remarks = (f"captions of {len(texts)} pictures that {file.name} does not list",) if texts else ()
    count = sum(len(captions) for captions in listed.values())
    layout = f"COCO captions {file.name}: {len(listed)} pictures, {count} captions"
    return _listed(file, root, fence, listed, layout, _choice(file.name, caption_key), remarks)


def coco_parts(file: Path) -> str:
    """The name of the pictures' folder that a COCO file's name says, such as train2017 of captions_train2017.json."""
    return file.stem.partition("_")[2] or file.stem


def _coco_pictures(file: Path, folder: Path | None, names: Sequence[str]) -> Path:
    """The first usual place where the first pictures are; the file's own folder when none has them."""
    part = coco_parts(file)
    above = file.parent.parent
    places = [file.parent, file.parent / "images", file.parent / part, above / part, above / "images" / part]
    places += [above / "images", *([] if folder is None else [folder])]
    for place in places:
        if any(file_state(os.path.join(place, name))[0] for name in names if _plain(name)):
            return place
    return file.parent


def _captions_file_beside(file: Path) -> str:
    """A hint at the file with the captions of the same pictures."""
    other = file.with_name(f"captions_{coco_parts(file)}.json")
    if other.is_file():
        return f"give {other}"
    return "COCO keeps captions in a file of their own, captions_NAME.json; --caption-key names another field"


def _json_file(file: Path) -> Any:
    try:
        size = file.stat().st_size
        if size > MAX_JSON:
            raise InputError(f"{file} has {size >> 20} MiB, more than the {MAX_JSON >> 20} MiB that are read whole")
        content = file.read_bytes()
    except OSError as error:
        raise explain(error, file, "read") from error
    return parse_json(content, str(file))


def _records(content: Any, name: str, file: Path) -> list[Mapping[str, Any]]:
    rows = content.get(name) if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(
            f"{file} is no COCO captions file: it needs lists `images` and `annotations`",
            "pictures with one caption each are listed in a metadata.jsonl, one object per line",
        )
    return rows


def _identity(row: Mapping[str, Any], key: str, where: str) -> int | str:
    value = row.get(key)
    if not isinstance(value, int | str):
        raise InputError(f"{where}: needs {key!r}")
    return value


def _rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of a listing with its place."""
    return _csv_rows(file) if file.suffix.lower() == ".csv" else _json_rows(file)


def _json_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(_lines(file), start=1):
        text = line.strip()
        if not text:
            continue
        where = f"{file}, line {number}"
        if number == 1 and text.startswith("["):
            raise InputError(f"{where}: a JSON array", "write one object per line, without commas between them")
        row = parse_json(text, where)
        if not isinstance(row, dict):
            raise InputError(f'{where}: needs an object with "file_name"')
        yield where, row


def _csv_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(_lines(file), strict=True)
    try:
        columns = reader.fieldnames or ()
        if not set(FILE_KEYS) & set(columns):
            found = ", ".join(map(one_line, columns)) or "nothing"
            hint = "separate the columns with commas" if ";" in found or "\t" in "".join(columns) else None
            raise InputError(f"{file}, line 1: needs a column file_name, found {found[:200]}", hint)
        for row in reader:
            where = f"{file}, line {reader.line_num}"
            if None in row:
                raise InputError(f"{where}: more fields than line 1 has", 'put captions with commas into "quotes"')
            yield where, {name: value for name, value in row.items() if value is not None}
    except csv.Error as error:
        raise InputError(f"{file}, line {reader.line_num + 1}: {error}") from error


def _lines(file: Path) -> Iterator[str]:
    """Lines of a text file, none of them longer than MAX_TEXT bytes."""
    number = 0
    try:
        with file.open("rb") as opened:
            while line := opened.readline(MAX_TEXT + 1):
                number += 1
                if len(line) > MAX_TEXT:
                    raise InputError(f"{file}, line {number}: longer than {MAX_TEXT >> 20} MiB")
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except OSError as error:
        raise explain(error, file, "read") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file}, line {number} is not UTF-8 text", "save it as UTF-8") from error


def _file_name(row: Mapping[str, Any], where: str) -> str:
    name = next((row[key] for key in FILE_KEYS if key in row), None)
    if not isinstance(name, str) or not name:
        others = ", ".join(one_line(key) for key in list(row)[:8])
        raise InputError(f'{where}: needs "file_name"', f"found {others[:200]}" if others else None)
    return name


def _inside(name: str, root: Path, fence: Fence, where: str) -> str:
    """The path of a listed picture below the root, or an absolute one that the fence holds."""
    if _plain(name):
        return os.path.normpath(name).replace(os.sep, "/")
    if os.path.isabs(name) and "\0" not in name and fence.holds(os.path.normpath(name), is_link=False):
        normal = os.path.normpath(name)
        below = str(root.resolve()) + os.sep
        return normal[len(below) :] if normal.startswith(below) else normal
    place = os.path.dirname(os.path.normpath(os.path.join(root, name)).replace("\0", "?"))
    raise InputError(f"{where}: {one_line(name)!r} lies outside the folder {root}", f"--image-root {place} allows it")


def _plain(name: str) -> bool:
    """Whether a path is relative, leads upwards nowhere, and can be a path at all."""
    if os.path.isabs(name) or "\0" in name:
        return False
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return os.path.normpath(name).split(os.sep)[0] != ".."


def _choice(listing: str, caption_key: str | None) -> str:
    return f", {one_line(listing)}" + ("" if caption_key is None else f", captions from {one_line(caption_key)}")


def _listed(
    file: Path,
    root: Path,
    fence: Fence,
    listed: Mapping[str, tuple[str, ...]],
    layout: str,
    choice: str,
    remarks: tuple[str, ...] = (),
    claimed: tuple[float, ...] | None = None,
) -> FileSource:
    """The source of listed pictures, when nearly all of them are there."""
    missing, outside = [], []
    for index, name in enumerate(listed):
        path = os.path.join(root, name)
        there, is_link = file_state(path)
        if not there:
            missing.append(name)
        elif not fence.holds(path, is_link=is_link):
            outside.append(index)
    if missing:
        noun = "file that is" if len(missing) == 1 else "files that are"
        said = f"{file} names {len(missing)} {noun} missing: {shown(missing, 10)}"
        if len(missing) > MISSING_SHARE * len(listed):
            raise InputError(said, _place_of(missing, root))
        remarks = (*remarks, said)
    source = FileSource(
        root, tuple(listed), layout, remarks, tuple(listed.values()), None, frozenset(outside), claimed, choice
    )
    if len(outside) > MISSING_SHARE * len(listed):
        source.path(outside[0])
    return source


def _place_of(names: Iterable[str], root: Path) -> str | None:
    """A hint at a folder, above or right below the root, where missing files are."""
    name = next(iter(names))
    above = [root.resolve(), *list(root.resolve().parents)[:6]]
    try:
        below = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError:
        below = []
    for place in [*below[:100], *above]:
        with suppress(OSError, ValueError):  # a name that no file can have
            if (place / name).is_file():
                return f"--image-root {place} has them"
    return None
