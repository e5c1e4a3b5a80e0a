"""A token store made by several processes: a part for each, and the manifest that joins them.

    part-1-of-2/manifest.json, part-1-of-2/shard-00000.safetensors, ...
    part-2-of-2/...
    manifest.json               written by whoever finishes last; names the files of all parts

A part holds a range of the source's pictures, not every n-th one: each process then reads its folders and archives from
front to back, and no file is read by two. The joined store lists part 1 before part 2; nothing is moved or copied.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from bitgen_cli.engine.store_format import (
    MANIFEST,
    Manifest,
    StoredFile,
    StoredPart,
    StoredShard,
    is_empty,
    parse_manifest,
    read_manifest,
    read_rows,
)
from bitgen_cli.errors import InputError
from bitgen_cli.files import PARTIAL, write_json

_FOLDER = re.compile(r"part-([1-9][0-9]{0,5})-of-([1-9][0-9]{0,5})")
_NAMED = 10
"""Parts or pictures named in a message."""
_SAME = ("tokenizer", "source", "bits", "patch_size", "cell", "latents", "buckets")


def divisions(path: Path) -> set[int]:
    """Into how many parts the store in a folder is divided: one number; none where there are no parts."""
    if not path.is_dir():
        return set()
    found = (_FOLDER.fullmatch(entry.name) for entry in path.iterdir() if entry.is_dir())
    return {int(match[2]) for match in found if match}


def require_division(path: Path, of: int | None) -> None:
    """Raises InputError when a folder holds something else than a store in `of` parts; None is a store in one piece."""
    found = divisions(path)
    if of is None and found:
        parts = max(found)
        raise InputError(
            f"the token store {path} is made in {parts} parts",
            f"go on with --shard 1/{parts} and so on, or choose a new folder",
        )
    if of is not None and found - {of}:
        raise InputError(
            f"the token store {path} is made in {max(found - {of})} parts, not in {of}",
            "go on with as many, or choose a new folder",
        )
    if of is not None and not found and not is_empty(path):
        raise InputError(f"the token store {path} is made in one piece, not in {of} parts", "choose a new folder")


def join(path: Path, of: int, before: Callable[[Manifest], None] | None = None) -> list[str]:
    """Writes the manifest of a store whose parts are all complete; the same one, whoever does and however often.

    Args:
        path: folder of the store; nobody else joins at the same time.
        of: number of parts.
        before: called with the manifest before it is written: what belongs to a store that is complete.

    Returns:
        What is missing, in words, such as "part 2 is unfinished (1024 pictures so far)"; empty when it is joined.

    Raises:
        InputError: a part is corrupt, parts do not belong together, or it cannot be written.
    """
    parts, missing = _parts(path, of)
    if missing:
        return missing
    first = parts[0]
    for number, part in enumerate(parts, start=1):
        for name in _SAME:
            if getattr(part, name) != getattr(first, name):
                raise _apart(path, number, f"another {name.replace('_', ' ')} than part 1")
        if part.part is None or (part.part.number, part.part.of) != (number, of):
            raise _apart(path, number, "another number in its manifest")
        if first.part is not None and part.part.total != first.part.total:
            raise _apart(path, number, f"a source of {part.part.total} pictures, part 1 one of {first.part.total}")
    _refuse_twice(path, parts)
    schedules = {entry.ratio: entry for part in parts for entry in part.schedules}
    for number, part in enumerate(parts, start=1):
        if any(schedules[entry.ratio] != entry for entry in part.schedules):
            raise _apart(path, number, "other scales")
    texts = {part.text for part in parts if part.shards}
    text = texts.pop() if len(texts) == 1 else None
    joined = Manifest.model_validate(
        {
            **{name: getattr(first, name) for name in _SAME},
            "complete": True,
            "count": sum(part.count for part in parts),
            "schedules": [schedules[ratio] for ratio in sorted(schedules)],
            "shards": [_below(name, shard, text is not None) for name, part in _named(parts) for shard in part.shards],
            "parts": of,
            "text": text,
        }
    )
    for leftover in path.glob(f".*{PARTIAL}"):  # of one that was killed while it joined
        leftover.unlink(missing_ok=True)
    if before is not None:
        before(joined)
    write_json(path / MANIFEST, joined.model_dump(mode="json", exclude_none=True))
    return []


def unfinished(path: Path) -> InputError | None:
    """The error for a store of which some parts are missing or unfinished; None where there are no parts."""
    found = divisions(path)
    if not found:
        return None
    if len(found) > 1:
        numbers = " and ".join(map(str, sorted(found)))
        return InputError(f"{path} holds parts of stores made in {numbers} parts", "tokenize again into a new folder")
    of = found.pop()
    _, missing = _parts(path, of)
    told = "; ".join(missing[:_NAMED]) + (f"; and {len(missing) - _NAMED} more" if len(missing) > _NAMED else "")
    return InputError(
        f"the token store {path} is unfinished: {told or 'its parts are not joined'}",
        f"run the same `bitgen tokenize` with --shard I/{of} for each; it goes on where it stopped",
    )


def _parts(path: Path, of: int) -> tuple[list[Manifest], list[str]]:
    """Manifests of the parts that are there, and what is missing in words."""
    parts, missing = [], []
    for number in range(1, of + 1):
        folder = path / StoredPart(number=number, of=of, total=0).name
        if not (folder / MANIFEST).is_file():
            missing.append(f"part {number} of {of} is missing")
            continue
        part = parse_manifest(folder)
        if part.complete:
            parts.append(read_manifest(folder))
        else:
            missing.append(f"part {number} of {of} is unfinished ({part.count} pictures so far)")
    return parts, missing


def _named(parts: list[Manifest]) -> list[tuple[str, Manifest]]:
    """Parts with the names of their folders."""
    return [(part.part.name, part) for part in parts if part.part is not None]


def _below(folder: str, shard: StoredShard, with_text: bool) -> StoredShard:
    """A shard of a part as the store names it."""

    def moved(stored: StoredFile) -> StoredFile:
        return stored.model_copy(update={"file": f"{folder}/{stored.file}"})

    text = moved(shard.text) if with_text and shard.text is not None else None
    changes = {"tokens": moved(shard.tokens), "captions": moved(shard.captions), "text": text}
    return shard.model_copy(update=changes)


def _refuse_twice(path: Path, parts: list[Manifest]) -> None:
    """Raises InputError when two parts hold the same picture, as when the source has changed between them."""
    known: set[str] = set()
    twice: list[str] = []
    for name, part in _named(parts):
        for shard in part.shards:
            for row in read_rows(path / name, shard):
                twice += [row.key] if row.key in known else []
                known.add(row.key)
    if twice:
        more = f" and {len(twice) - _NAMED} more" if len(twice) > _NAMED else ""
        raise InputError(
            f"parts of the token store {path} hold the same pictures: {', '.join(twice[:_NAMED])}{more}",
            "the source changed between them: tokenize again into a new folder",
        )


def _apart(path: Path, number: int, has: str) -> InputError:
    return InputError(f"part {number} of the token store {path} has {has}", "tokenize again into a new folder")
