"""Whether a token store is what was written: every file read from its beginning to its end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bitgen_cli.engine.store_format import (
    MANIFEST,
    Corrupt,
    Manifest,
    StoredFile,
    StoredShard,
    check_size,
    map_shard,
    parse_manifest,
    read_rows,
)
from bitgen_cli.engine.store_parts import unfinished
from bitgen_cli.engine.store_text import ShardText
from bitgen_cli.errors import InputError
from bitgen_cli.files import sha256
from bitgen_cli.report import Report


@dataclass(frozen=True)
class Fault:
    """Something wrong in a store.

    Attributes:
        file: below the store's folder.
        reason: what is wrong with it.
    """

    file: str
    reason: str


@dataclass(frozen=True)
class StoreCheck:
    """What was found in a store.

    Attributes:
        manifest: what it says about itself.
        faults: everything that is wrong; empty when it is what was written.
    """

    manifest: Manifest
    faults: list[Fault]


def check_store(path: Path, report: Report) -> StoreCheck:
    """Reads a whole store: sizes, sha256, shapes and counts of its files, and that no picture is in it twice.

    Raises:
        InputError: there is no store, or its manifest is broken.
    """
    unjoined = None if (path / MANIFEST).is_file() else unfinished(path)
    if unjoined is not None:
        raise unjoined
    manifest = parse_manifest(path)
    faults: list[Fault] = []
    if not manifest.complete:
        faults.append(Fault(MANIFEST, f"the store is unfinished: {manifest.count} pictures so far"))
    seen: dict[str, str] = {}
    with report.task("verify", manifest.bytes) as task:
        for shard in manifest.shards:
            faults += _faults_of(path, shard, manifest, seen)
            task.advance(sum(stored.bytes for stored in shard.files))
    return StoreCheck(manifest, faults)


def _faults_of(path: Path, shard: StoredShard, manifest: Manifest, seen: dict[str, str]) -> list[Fault]:
    """What is wrong with the files of a shard; `seen` learns where each picture is."""
    readers: list[tuple[StoredFile, Callable[[], object]]] = [
        (shard.tokens, lambda: map_shard(path, shard, manifest)),
        (shard.captions, lambda: _read_new_rows(path, shard, seen)),
    ]
    if shard.text is not None and manifest.text is not None:
        file, width = shard.text, manifest.text.width
        readers.append((file, lambda: ShardText.map(path / file.file, shard.count, width)))
    faults = []
    for stored, read in readers:
        try:
            check_size(path, stored)
            if sha256(path / stored.file) != stored.sha256:
                raise Corrupt(path / stored.file, "its contents are not what was written")
            read()
        except InputError as error:
            faults.append(Fault(stored.file, error.reason if isinstance(error, Corrupt) else error.message))
        except OSError as error:
            faults.append(Fault(stored.file, f"it cannot be read: {error.strerror or error}"))
    return faults


def _read_new_rows(path: Path, shard: StoredShard, seen: dict[str, str]) -> None:
    """Reads keys and captions of a shard.

    Raises:
        Corrupt: a picture is there twice, or the file is corrupt.
    """
    for row in read_rows(path, shard):
        if row.key in seen:
            raise Corrupt(path / shard.captions.file, f"picture {row.key!r} is in {seen[row.key]} too")
        seen[row.key] = shard.captions.file
