"""The token store: pictures as packed bits on disk, read by training as tensors.

    manifest.json               what is in it, made by which tokenizer, with the sha256 of every file
    shard-00000.safetensors     `bits` (n, L, ceil(K / 8)) uint8, raster order over all scales;
                                `latents` (n, C, H, W) bfloat16 where they are kept
    shard-00000.jsonl           of each of its pictures the key, all captions, and the size it had

A shard holds pictures of one aspect ratio. Pictures are numbered through all shards in order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from bitgen_cli.engine import bits as bit_math
from bitgen_cli.engine.scales import Schedule
from bitgen_cli.errors import InputError
from bitgen_cli.files import PARTIAL, atomic_path, explain, read_json, write_json

MANIFEST = "manifest.json"
VERSION: Final = 2
SHARD_SIZE = 1024
"""Pictures per shard; an interrupted run loses at most this many per aspect ratio."""

_Positive = Annotated[int, Field(gt=0)]
_Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StoredSchedule(_Record):
    """The scales of one aspect ratio."""

    ratio: Annotated[float, Field(gt=0)]
    sizes: Annotated[list[tuple[_Positive, _Positive]], Field(min_length=1)]
    rope_grid: tuple[_Positive, _Positive]


class StoredFile(_Record):
    """A file of the store."""

    file: Annotated[str, Field(pattern=r"^shard-[0-9]{5,}\.(safetensors|jsonl)$")]
    bytes: _Positive
    sha256: _Sha256


class StoredShard(_Record):
    """Pictures of one aspect ratio, stored together."""

    count: _Positive
    ratio: float
    tokens: StoredFile
    captions: StoredFile


class Manifest(_Record):
    """Everything there is to know about a store without opening its shards.

    Attributes:
        tokenizer: fingerprint of the tokenizer that made the bits.
        source: name of the pictures' source.
        bits: latent channels C.
        patch_size: pixels per latent position along one side.
        cell: 2 when the transformer predicts 2x2 latent positions at once (K = 4C), else 1 (K = C).
        latents: whether the latents are kept beside the bits.
        buckets: aspect ratios that pictures were sorted into, whether or not there were such pictures.
        complete: whether every picture of the source has been read.
    """

    format: Literal["bitgen token store"] = "bitgen token store"
    version: Literal[2] = VERSION
    tokenizer: _Sha256
    source: str
    bits: Annotated[int, Field(ge=1, le=64)]
    patch_size: _Positive
    cell: Literal[1, 2]
    latents: bool
    buckets: list[float]
    complete: bool
    count: Annotated[int, Field(ge=0)]
    schedules: list[StoredSchedule]
    shards: list[StoredShard]

    @property
    def bits_per_position(self) -> int:
        """K."""
        return self.bits * self.cell**2

    @property
    def bytes(self) -> int:
        """Size of all shards and captions on disk."""
        return sum(shard.tokens.bytes + shard.captions.bytes for shard in self.shards)

    def schedule(self, ratio: float) -> Schedule:
        """The schedule of an aspect ratio that occurs in the store."""
        stored = next(entry for entry in self.schedules if entry.ratio == ratio)
        return Schedule(stored.ratio, tuple(stored.sizes), stored.rope_grid, self.cell)


class TokenStore:
    """A store opened for reading; made by `TokenStore.open`.

    Shards are memory-mapped when first read: what is used often stays in memory, and a store may be larger.

    Attributes:
        path: its folder.
        manifest: what it says about itself.
        keys: one per picture.
        captions: of each picture all of them; empty when it has none.
        sizes: (width, height) that each picture had.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        keys: list[str],
        captions: list[tuple[str, ...]],
        sizes: list[tuple[int, int]],
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.keys = keys
        self.captions = captions
        self.sizes = sizes
        counts = torch.tensor([shard.count for shard in manifest.shards])
        self._shard_of = torch.arange(len(counts)).repeat_interleave(counts)
        self._row_of = torch.arange(len(keys)) - (counts.cumsum(0) - counts)[self._shard_of]
        self._opened: dict[int, dict[str, Tensor]] = {}

    @classmethod
    def open(cls, path: Path) -> TokenStore:
        """The store in a folder. Files are checked by size; `verify` checks their contents.

        Raises:
            InputError: missing, not a store, unfinished, or one of its files is missing or of another size.
        """
        manifest = read_manifest(path)
        if not manifest.complete:
            raise InputError(
                f"the token store {path} is unfinished: {manifest.count} pictures so far",
                "run the same `bitgen tokenize` again; it goes on where it stopped",
            )
        if not manifest.shards:
            raise InputError(f"the token store {path} holds no pictures")
        return cls(path, manifest, *_read_rows(path, manifest))

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def ratios(self) -> list[float]:
        """Aspect ratios (height / width) that occur, ascending."""
        return sorted({shard.ratio for shard in self.manifest.shards})

    @property
    def texts(self) -> list[str]:
        """All captions of all pictures."""
        return [caption for several in self.captions for caption in several]

    def ratio(self, index: int) -> float:
        """Aspect ratio of a picture."""
        return self.manifest.shards[int(self._shard_of[index])].ratio

    def indices_of(self, ratio: float) -> list[int]:
        """All pictures of an aspect ratio, ascending."""
        chosen = torch.tensor([shard.ratio == ratio for shard in self.manifest.shards])
        indices: list[int] = chosen[self._shard_of].nonzero().flatten().tolist()
        return indices

    def schedule(self, ratio: float) -> Schedule:
        """The schedule of an aspect ratio that occurs in the store."""
        return self.manifest.schedule(ratio)

    def bits(self, indices: Sequence[int]) -> list[Tensor]:
        """Bits per scale, each (B, C, h, w) bool, of pictures of one aspect ratio.

        Raises:
            InputError: a shard is corrupt.
        """
        manifest = self.manifest
        schedule = manifest.schedule(self._common_ratio(indices))
        positions = bit_math.unpack(self._gather("bits", indices), manifest.bits_per_position)
        return [
            bit_math.to_grid(positions[:, part], size, manifest.cell)
            for part, size in zip(schedule.slices, schedule.sizes, strict=True)
        ]

    def latents(self, indices: Sequence[int]) -> Tensor | None:
        """Latents (B, C, H, W) float32 of pictures of one aspect ratio; None where the store keeps none.

        Raises:
            InputError: a shard is corrupt.
        """
        if not self.manifest.latents:
            return None
        self._common_ratio(indices)
        return self._gather("latents", indices).float()

    def verify(self) -> None:
        """Reads every file and compares it with the manifest.

        Raises:
            InputError: names the first file whose sha256 differs.
        """
        for shard in self.manifest.shards:
            for stored in (shard.tokens, shard.captions):
                path = self.path / stored.file
                try:
                    with path.open("rb") as file:
                        found = hashlib.file_digest(file, "sha256").hexdigest()
                except OSError as error:
                    raise explain(error, path, "read") from error
                if found != stored.sha256:
                    raise _corrupt(path, "its contents are not what was written")

    def _common_ratio(self, indices: Sequence[int]) -> float:
        shards = set(self._shard_of[torch.as_tensor(indices, dtype=torch.long)].tolist())
        ratios: set[float] = {self.manifest.shards[shard].ratio for shard in shards}
        if len(ratios) != 1:
            raise ValueError(f"pictures of {len(ratios)} aspect ratios asked for at once")
        return ratios.pop()

    def _gather(self, name: str, indices: Sequence[int]) -> Tensor:
        """Rows of one tensor, (B, ...), from however many shards hold them."""
        wanted = torch.as_tensor(indices, dtype=torch.long)
        shards, rows = self._shard_of[wanted], self._row_of[wanted]
        used = sorted(set(shards.tolist()))
        first = self._shard(used[0])[name]
        if len(used) == 1:
            return first[rows]
        gathered = first.new_empty((len(wanted), *first.shape[1:]))
        for shard in used:
            here = (shards == shard).nonzero().flatten()
            gathered[here] = self._shard(shard)[name][rows[here]]
        return gathered

    def _shard(self, number: int) -> dict[str, Tensor]:
        """Memory-mapped tensors of a shard, checked against the manifest."""
        if number not in self._opened:
            shard = self.manifest.shards[number]
            self._opened[number] = _map_shard(self.path / shard.tokens.file, shard, self.manifest)
        return self._opened[number]


def read_manifest(path: Path) -> Manifest:
    """The manifest of a store whose files all have the size it says.

    Raises:
        InputError: missing, not a store, or a file is missing or of another size.
    """
    file = path / MANIFEST
    if not file.is_file():
        what = "is not a token store: it has no manifest.json" if path.exists() else "does not exist"
        raise InputError(f"{path} {what}", "make one with `bitgen tokenize DATA OUT`")
    content = read_json(file)
    version = content.get("version") if isinstance(content, dict) else None
    if isinstance(version, int) and version != VERSION:
        raise InputError(
            f"{path} is a token store of version {version}, this bitgen reads version {VERSION}",
            "tokenize the pictures again into a new folder",
        )
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "top level"
        raise InputError(f"{file} does not describe a token store: {where}: {problem['msg']}") from error
    known = {entry.ratio for entry in manifest.schedules}
    if not {shard.ratio for shard in manifest.shards} <= known:
        raise InputError(f"{file} does not describe a token store: a shard's aspect ratio has no schedule")
    if sum(shard.count for shard in manifest.shards) != manifest.count:
        raise InputError(f"{file} does not describe a token store: its counts do not add up")
    for shard in manifest.shards:
        for stored in (shard.tokens, shard.captions):
            _check_size(path / stored.file, stored.bytes)
    return manifest


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
        shard_size: pictures per shard.

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
        shard_size: int = SHARD_SIZE,
    ) -> None:
        cells = {schedule.cell for schedule in schedules.values()}
        fresh = Manifest.model_validate(
            {
                "tokenizer": tokenizer,
                "source": source,
                "bits": bits,
                "patch_size": patch_size,
                "cell": cells.pop(),
                "latents": latents,
                "buckets": sorted(schedules),
                "complete": False,
                "count": 0,
                "schedules": [],
                "shards": [],
            }
        )
        self.path = path
        self.done_keys: set[str] = set()
        self._schedules = dict(schedules)
        self._shard_size = shard_size
        self._buffers: dict[float, _Buffer] = {}
        if _is_empty(path):
            self.manifest = fresh
            self._write_manifest({})
            return
        self.manifest = read_manifest(path)
        self._require_same(fresh)
        self.done_keys.update(_read_rows(path, self.manifest)[0])
        for leftover in path.glob(f".shard-*{PARTIAL}"):
            leftover.unlink(missing_ok=True)

    def room(self, ratio: float) -> int:
        """Pictures of that aspect ratio that still fit into the shard being filled; at least 1."""
        return self._shard_size - len(self._buffers.get(ratio, _Buffer()).keys)

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
        buffer = self._buffers.setdefault(ratio, _Buffer())
        start = 0
        while start < len(keys):
            part = slice(start, start + self._shard_size - len(buffer.keys))
            buffer.keys += keys[part]
            buffer.captions += captions[part]
            buffer.sizes += sizes[part]
            buffer.packed.append(packed[part])
            if stored_latents is not None:
                buffer.latents.append(stored_latents[part])
            if len(buffer.keys) == self._shard_size:
                self._write_shard(ratio)
                buffer = self._buffers[ratio]
            start = part.stop

    def finish(self) -> None:
        """Writes what is left and marks the store complete.

        Raises:
            ResourceError: no space left; the shards before are safe.
            InputError: it cannot be written.
        """
        for ratio in sorted(self._buffers):
            if self._buffers[ratio].keys:
                self._write_shard(ratio)
        if not self.manifest.complete:
            self._write_manifest({"complete": True})

    def _write_shard(self, ratio: float) -> None:
        buffer = self._buffers[ratio]
        name = f"shard-{len(self.manifest.shards):05d}"
        tensors = {"bits": torch.cat(buffer.packed)}
        if buffer.latents:
            tensors["latents"] = torch.cat(buffer.latents)
        rows = [
            {"key": key, "captions": captions, "size": size}
            for key, captions, size in zip(buffer.keys, buffer.captions, buffer.sizes, strict=True)
        ]
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        shard = {
            "count": len(buffer.keys),
            "ratio": ratio,
            "tokens": self._write_file(f"{name}.safetensors", save(tensors)),
            "captions": self._write_file(f"{name}.jsonl", ("\n".join(lines) + "\n").encode()),
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
        self._buffers[ratio] = _Buffer()

    def _write_file(self, name: str, content: bytes) -> StoredFile:
        with atomic_path(self.path / name) as temporary:
            temporary.write_bytes(content)
        return StoredFile(file=name, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())

    def _write_manifest(self, changes: dict[str, Any]) -> None:
        manifest = self.manifest.model_copy(update=changes)
        write_json(self.path / MANIFEST, manifest.model_dump(mode="json"))
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
        for entry in self.manifest.schedules:
            schedule = self._schedules.get(entry.ratio)
            if schedule is None or _stored_schedule(schedule) != entry:
                new = "none" if schedule is None else str(schedule.sizes)
                raise _other_store(
                    self.path, f"schedule of ratio {entry.ratio}", str(tuple(entry.sizes)), new
                )


def _map_shard(path: Path, shard: StoredShard, manifest: Manifest) -> dict[str, Tensor]:
    """The tensors of a shard, memory-mapped, of the shapes that the manifest promises."""
    schedule = manifest.schedule(shard.ratio)
    packed = (shard.count, schedule.positions, -(-manifest.bits_per_position // 8))
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"bits": (packed, torch.uint8)}
    if manifest.latents:
        expected["latents"] = ((shard.count, manifest.bits, *schedule.latent_sizes[-1]), torch.bfloat16)
    try:
        with safe_open(str(path), framework="pt") as stored:
            names = set(stored.keys())
            tensors = {name: stored.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise _corrupt(path, str(error)) from error
    except OSError as error:
        raise explain(error, path, "read") from error
    if {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()} != expected:
        raise _corrupt(path, "its tensors are not those the manifest promises")
    return tensors


def _read_rows(
    path: Path, manifest: Manifest
) -> tuple[list[str], list[tuple[str, ...]], list[tuple[int, int]]]:
    """Keys, captions and sizes of all pictures."""
    keys: list[str] = []
    captions: list[tuple[str, ...]] = []
    sizes: list[tuple[int, int]] = []
    for shard in manifest.shards:
        file = path / shard.captions.file
        try:
            rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
            keys += [row["key"] for row in rows]
            captions += [_listed(row["captions"]) for row in rows]
            sizes += [(int(row["size"][0]), int(row["size"][1])) for row in rows]
        except OSError as error:
            raise explain(error, file, "read") from error
        except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            raise _corrupt(file, "a line is not a key with its captions") from error
        if len(rows) != shard.count:
            raise _corrupt(file, f"{len(rows)} captions for {shard.count} pictures")
    texts = (*keys, *(caption for several in captions for caption in several))
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"the captions of the token store {path} are corrupt", "tokenize again")
    return keys, captions, sizes


def _listed(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise TypeError(f"a list is needed, not {type(value).__name__}")
    return tuple(value)


def _stored_schedule(schedule: Schedule) -> StoredSchedule:
    return StoredSchedule(ratio=schedule.ratio, sizes=list(schedule.sizes), rope_grid=schedule.rope_grid)


def _is_empty(path: Path) -> bool:
    """Whether a store may be started there: no folder yet, or one without anything in it."""
    if not path.exists():
        return True
    try:
        contents = [entry for entry in path.iterdir() if not entry.name.endswith(PARTIAL)]
    except OSError as error:
        raise explain(error, path, "write") from error
    if contents and not (path / MANIFEST).is_file():
        raise InputError(f"{path} is not empty and not a token store", "choose a new or an empty folder")
    return not contents


def _check_size(path: Path, size: int) -> None:
    try:
        found = path.stat().st_size
    except FileNotFoundError as error:
        raise _corrupt(path, "it is missing") from error
    except OSError as error:
        raise explain(error, path, "read") from error
    if found != size:
        raise _corrupt(path, f"it has {found} bytes instead of {size}")


def _corrupt(path: Path, reason: str) -> InputError:
    return InputError(f"{path} is corrupt: {reason}", "tokenize again into a new folder")


def _other_store(path: Path, name: str, old: str, new: str) -> InputError:
    return InputError(f"the token store {path} has another {name}: {old}, not {new}", "choose a new folder")


def _short(value: object) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text
