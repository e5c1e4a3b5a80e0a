"""Writing a token store shard by shard, so that a process that is killed loses no whole shard.

What a store ends with is decided by the pictures and their order alone: a shard is written when its last picture has
come, and a store that is gone on with begins where one ended. Its files are therefore byte for byte the same, however
often the process was killed.

Memory: BUFFERED bytes of pictures that wait for their shards and three times the largest shard, which is at most
BUFFERED / aspect ratios; besides the keys that are done, about 150 bytes each.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save
from torch import Tensor

from bitgen_cli.engine import bits as bit_math
from bitgen_cli.engine.scales import Schedule
from bitgen_cli.engine.store_format import (
    MANIFEST,
    Manifest,
    StoredFile,
    StoredPart,
    StoredRow,
    StoredSchedule,
    StoredShard,
    StoredText,
    is_empty,
    read_manifest,
    read_rows,
)
from bitgen_cli.errors import InputError
from bitgen_cli.files import PARTIAL, atomic_path, sha256, write_json

SHARD_SIZE = 1024
"""Most pictures in a shard; a process that is killed loses at most this many per aspect ratio."""
BUFFERED = 1 << 30
"""Bytes of all buffers together; shards of large pictures are smaller, so that they stay below it."""


@dataclass
class _Buffer:
    """Pictures of one aspect ratio waiting for their shard."""

    keys: list[str] = field(default_factory=list)
    captions: list[tuple[str, ...]] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    packed: list[Tensor] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)


class StoreWriter:
    """Writes a store shard by shard; opened on an unfinished one it goes on after the last whole shard.

    Until `finish` the store counts as unfinished. What `add` was given and no shard holds yet is lost when
    the process ends.

    Args:
        path: folder of the store; made when it is not there.
        tokenizer: fingerprint of the tokenizer.
        source: name of the pictures' source.
        bits: latent channels C.
        patch_size: pixels per latent position along one side.
        schedules: the schedule of every aspect ratio that may be added.
        latents: whether latents are kept.
        part: which part of a store of several it is; None for a whole one.
        shard_size: most pictures in a shard.
        buffered: bytes of all pictures that may wait for their shards.

    Attributes:
        done_keys: keys of the pictures that are in shards.

    Raises:
        InputError: the folder holds something else, or a store of another tokenizer, source, schedule or
            layout; or it cannot be written.
    """

    def __init__(
        self,
        path: Path,
        *,
        tokenizer: str,
        source: str,
        bits: int,
        patch_size: int,
        schedules: Mapping[float, Schedule],
        latents: bool,
        part: StoredPart | None = None,
        shard_size: int = SHARD_SIZE,
        buffered: int = BUFFERED,
    ) -> None:
        cells = {schedule.cell for schedule in schedules.values()}
        fresh = Manifest(
            tokenizer=tokenizer,
            source=source,
            bits=bits,
            patch_size=patch_size,
            cell=cells.pop(),  # type: ignore[arg-type]
            latents=latents,
            buckets=sorted(schedules),
            complete=False,
            count=0,
            schedules=[],
            shards=[],
            part=part,
        )
        self.path = path
        self.done_keys: set[str] = set()
        self._schedules = dict(schedules)
        self._shard_sizes = shard_sizes(schedules, bits, latents=latents, most=shard_size, buffered=buffered)
        self._buffers: dict[float, _Buffer] = {}
        empty = is_empty(path)
        for leftover in path.glob(f".*{PARTIAL}"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
        if empty:
            self.manifest = fresh
            self._write_manifest({})
            return
        self.manifest = read_manifest(path)
        self._require_same(fresh)
        for shard in self.manifest.shards:
            self.done_keys.update(row.key for row in read_rows(path, shard))

    def room(self, ratio: float, coming: int = 0) -> int:
        """Pictures of that aspect ratio that fit into the shard being filled; at least 1.

        Args:
            ratio: a key of `schedules`.
            coming: pictures that will be added before them.
        """
        size = self._shard_sizes[ratio]
        return size - (len(self._buffers.get(ratio, _Buffer()).keys) + coming) % size

    def add(
        self,
        keys: Sequence[str],
        captions: Sequence[tuple[str, ...]],
        sizes: Sequence[tuple[int, int]],
        ratio: float,
        bits: Sequence[Tensor],
        latents: Tensor | None = None,
    ) -> None:
        """Takes pictures of one aspect ratio, and writes the shards that became full.

        Args:
            keys: one per picture, not in the store yet.
            captions: of each picture all of them.
            sizes: (width, height) that each picture has.
            ratio: a key of `schedules`.
            bits: per scale (B, C, h, w) bool.
            latents: (B, C, H, W) where the store keeps them, else None.

        Raises:
            ResourceError: no space left; the shards before are safe.
            InputError: it cannot be written.
        """
        if (latents is None) == self.manifest.latents:
            raise ValueError("latents must be given exactly when the store keeps them")
        schedule = self._schedules[ratio]
        grids = [bit_math.to_positions(grid.cpu(), schedule.cell) for grid in bits]
        packed = bit_math.pack(torch.cat(grids, dim=1))
        stored_latents = None if latents is None else latents.to("cpu", torch.bfloat16)
        start = 0
        while start < len(keys):
            buffer = self._buffers.setdefault(ratio, _Buffer())
            part = slice(start, start + self.room(ratio))
            buffer.keys += keys[part]
            buffer.captions += captions[part]
            buffer.sizes += sizes[part]
            buffer.packed.append(packed[part])
            if stored_latents is not None:
                buffer.latents.append(stored_latents[part])
            if len(buffer.keys) == self._shard_sizes[ratio]:
                self._write_shard(ratio)
            start = part.stop

    def flush(self) -> None:
        """Writes what is left into shards that are not full.

        Raises:
            ResourceError: no space left; the shards before are safe.
            InputError: it cannot be written.
        """
        for ratio in sorted(self._buffers):
            self._write_shard(ratio)

    def add_text(self, number: int, text: StoredText, write: Callable[[BinaryIO], None]) -> None:
        """Writes the text features of a shard.

        Args:
            number: of the shard.
            text: what made them; the same for all shards.
            write: writes the file.

        Raises:
            ResourceError: no space left; the shards before are safe.
            InputError: it cannot be written, or other features are there.
        """
        self.require_text(text)
        shard = self.manifest.shards[number]
        stored = self._write_file(shard.tokens.file.replace(".safetensors", ".text.safetensors"), write)
        shards = [*self.manifest.shards]
        shards[number] = shard.model_copy(update={"text": stored})
        self._write_manifest({"shards": shards, "text": text})

    def require_text(self, text: StoredText) -> None:
        """Raises InputError when the store has text features that something else made."""
        known = self.manifest.text
        if known is not None and known != text:
            raise _other_store(self.path, "text encoder", known.encoder[:12], text.encoder[:12])

    def finish(self) -> None:
        """Writes what is left and marks the store complete.

        Raises:
            ResourceError: no space left; the shards before are safe.
            InputError: it cannot be written.
        """
        self.flush()
        if not self.manifest.complete:
            self._write_manifest({"complete": True})

    def _write_shard(self, ratio: float) -> None:
        buffer = self._buffers[ratio]
        name = f"shard-{len(self.manifest.shards):05d}"
        tensors = {"bits": torch.cat(buffer.packed)}
        if buffer.latents:
            tensors["latents"] = torch.cat(buffer.latents)
        rows = map(StoredRow, buffer.keys, buffer.captions, buffer.sizes)
        lines = [json.dumps(row._asdict(), ensure_ascii=False) for row in rows]
        shard = {
            "count": len(buffer.keys),
            "ratio": ratio,
            "tokens": self._write_bytes(f"{name}.safetensors", save(tensors)),
            "captions": self._write_bytes(f"{name}.jsonl", ("\n".join(lines) + "\n").encode()),
        }
        shards = [*self.manifest.shards, StoredShard.model_validate(shard)]
        used = {entry.ratio: entry for entry in self.manifest.schedules}
        used.setdefault(ratio, _stored_schedule(self._schedules[ratio]))
        self._write_manifest(
            {
                "shards": shards,
                "count": sum(entry.count for entry in shards),
                "schedules": [used[key] for key in sorted(used)],
                "complete": False,
            }
        )
        self.done_keys.update(buffer.keys)
        del self._buffers[ratio]

    def _write_bytes(self, name: str, content: bytes) -> StoredFile:
        return self._write_file(name, lambda file: file.write(content))

    def _write_file(self, name: str, write: Callable[[BinaryIO], object]) -> StoredFile:
        with atomic_path(self.path / name) as temporary:
            with temporary.open("wb") as file:
                write(file)
            size, digest = temporary.stat().st_size, sha256(temporary)
        return StoredFile(file=name, bytes=size, sha256=digest)

    def _write_manifest(self, changes: dict[str, Any]) -> None:
        manifest = self.manifest.model_copy(update=changes)
        write_json(self.path / MANIFEST, manifest.model_dump(mode="json", exclude_none=True))
        self.manifest = manifest

    def _require_same(self, fresh: Manifest) -> None:
        """Refuses to go on with a store whose parts would not fit what is added."""
        names = {
            "tokenizer": "tokenizer",
            "source": "pictures' source",
            "bits": "number of bits",
            "patch_size": "patch size",
            "cell": "cell size",
            "latents": "choice of latents",
            "buckets": "choice of aspect ratios",
        }
        for key, name in names.items():
            old, new = getattr(self.manifest, key), getattr(fresh, key)
            if old != new:
                raise _other_store(self.path, name, _short(old), _short(new))
        if self.manifest.parts is not None:
            raise InputError(
                f"the token store {self.path} was made in {self.manifest.parts} parts",
                f"go on with --shard 1/{self.manifest.parts} and so on, or choose a new folder",
            )
        if self.manifest.part != fresh.part:
            raise _other_store(self.path, "share of the pictures", _share(self.manifest.part), _share(fresh.part))
        for entry in self.manifest.schedules:
            schedule = self._schedules.get(entry.ratio)
            if schedule is None or _stored_schedule(schedule) != entry:
                new = "none" if schedule is None else str(schedule.sizes)
                raise _other_store(
                    self.path, f"schedule of ratio {entry.ratio}", str(tuple(entry.sizes)), new
                )


def shard_sizes(
    schedules: Mapping[float, Schedule], bits: int, *, latents: bool, most: int = SHARD_SIZE, buffered: int = BUFFERED
) -> dict[float, int]:
    """Pictures in a full shard of each aspect ratio. Args: as of `StoreWriter`."""
    return {
        ratio: max(1, min(most, buffered // len(schedules) // _bytes(schedule, bits, latents=latents)))
        for ratio, schedule in schedules.items()
    }


def order_in_store(ratios: Sequence[float], sizes: Mapping[float, int]) -> list[int]:
    """The pictures, which come in the order 0, 1, ..., as a store in one piece keeps them.

    Args:
        ratios: of each picture.
        sizes: from `shard_sizes`.
    """
    order: list[int] = []
    waiting: dict[float, list[int]] = {}
    for index, ratio in enumerate(ratios):
        shard = waiting.setdefault(ratio, [])
        shard.append(index)
        if len(shard) == sizes[ratio]:
            order += waiting.pop(ratio)
    return order + [index for ratio in sorted(waiting) for index in waiting[ratio]]


def _stored_schedule(schedule: Schedule) -> StoredSchedule:
    return StoredSchedule(ratio=schedule.ratio, sizes=list(schedule.sizes), rope_grid=schedule.rope_grid)


def _other_store(path: Path, name: str, old: str, new: str) -> InputError:
    return InputError(f"the token store {path} has another {name}: {old}, not {new}", "choose a new folder")


def _bytes(schedule: Schedule, bits: int, *, latents: bool) -> int:
    """What a picture takes in memory while it waits for its shard."""
    packed = schedule.positions * -(-bits * schedule.cell**2 // 8)
    return packed + (2 * bits * math.prod(schedule.latent_sizes[-1]) if latents else 0)


def _share(part: StoredPart | None) -> str:
    return "all" if part is None else f"{part.name} of {part.total} pictures"


def _short(value: object) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text
