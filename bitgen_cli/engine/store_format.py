"""What a token store looks like on disk; reading and writing share it.

    manifest.json                  what is in it, made by which tokenizer, with the sha256 of every file
    shard-00000.safetensors        `bits` (n, L, ceil(K / 8)) uint8, raster order over all scales;
                                   `latents` (n, C, H, W) bfloat16 where they are kept
    shard-00000.jsonl              of each of its pictures the key, all captions, and the size it had
    shard-00000.text.safetensors   text features of its captions where they are kept (store_text.py)

A shard holds pictures of one aspect ratio. Pictures are numbered through all shards in order. A store made by several
processes has a folder for each, part-1-of-4 and so on, a store of its own; its manifest names their files
(store_parts.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bitgen_cli.engine.scales import Schedule
from bitgen_cli.errors import InputError
from bitgen_cli.files import LOCK, PARTIAL, explain, read_json

MANIFEST = "manifest.json"
VERSION: Final = 2

_Positive = Annotated[int, Field(gt=0)]
_Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_FILE = (
    r"^(part-[1-9][0-9]{0,5}-of-[1-9][0-9]{0,5}/)?"
    r"shard-[0-9]{5,10}\.(safetensors|jsonl|text\.safetensors)$"
)
"""Files of a store: none lies outside its folder."""


class Corrupt(InputError):
    """A file of a store is not what was written.

    Args:
        path: of the file.
        reason: what is wrong with it.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} is corrupt: {reason}", "tokenize again into a new folder")
        self.reason = reason


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StoredSchedule(_Record):
    """The scales of one aspect ratio."""

    ratio: Annotated[float, Field(gt=0)]
    sizes: Annotated[list[tuple[_Positive, _Positive]], Field(min_length=1)]
    rope_grid: tuple[_Positive, _Positive]


class StoredFile(_Record):
    """A file of the store."""

    file: Annotated[str, Field(pattern=_FILE)]
    bytes: _Positive
    sha256: _Sha256


class StoredShard(_Record):
    """Pictures of one aspect ratio, stored together."""

    count: _Positive
    ratio: float
    tokens: StoredFile
    captions: StoredFile
    text: StoredFile | None = None

    @property
    def files(self) -> list[StoredFile]:
        """All that it consists of."""
        return [self.tokens, self.captions, *([] if self.text is None else [self.text])]


class StoredText(_Record):
    """What made the text features.

    Attributes:
        encoder: fingerprint of the text encoder.
        width: channels.
        length: longest caption in tokens; longer ones were cut.
    """

    encoder: _Sha256
    width: _Positive
    length: _Positive


class StoredPart(_Record):
    """Which share of a source a part of a store holds.

    Attributes:
        number: 1 ... of.
        of: parts in all.
        total: pictures of the source; each part reads a range of them (`range`).
    """

    number: _Positive
    of: _Positive
    total: Annotated[int, Field(ge=0)]

    @property
    def name(self) -> str:
        """Folder of the part in that of the store."""
        return f"part-{self.number}-of-{self.of}"

    @property
    def range(self) -> range:
        """Indices of its pictures: one after the other, so that folders and archives are read from front to back."""
        return range((self.number - 1) * self.total // self.of, self.number * self.total // self.of)

    @model_validator(mode="after")
    def _fits(self) -> StoredPart:
        if self.number > self.of:
            raise ValueError(f"there is no part {self.number} of {self.of}")
        return self


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
        part: in a part of a store, which one it is.
        parts: in a store joined of parts, how many.
        text: what made the text features; a store in the making may lack those of some shards (`has_text`).
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
    part: StoredPart | None = None
    parts: _Positive | None = None
    text: StoredText | None = None

    @property
    def bits_per_position(self) -> int:
        """K."""
        return self.bits * self.cell**2

    @property
    def bytes(self) -> int:
        """Size of all shards, captions and text features on disk."""
        return sum(stored.bytes for shard in self.shards for stored in shard.files)

    @property
    def has_text(self) -> bool:
        """Whether there are text features of every picture."""
        return self.text is not None and all(shard.text is not None for shard in self.shards)

    def schedule(self, ratio: float) -> Schedule:
        """The schedule of an aspect ratio that occurs in the store."""
        stored = next(entry for entry in self.schedules if entry.ratio == ratio)
        return Schedule(stored.ratio, tuple(stored.sizes), stored.rope_grid, self.cell)


class StoredRow(NamedTuple):
    """What is kept of a picture besides its bits.

    Attributes:
        key: its name, unlike every other picture's.
        captions: all of them; empty when it has none.
        size: (width, height) that it had.
    """

    key: str
    captions: tuple[str, ...]
    size: tuple[int, int]


def parse_manifest(path: Path) -> Manifest:
    """The manifest of the store in a folder.

    Raises:
        InputError: missing, or it does not describe a store.
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
    if manifest.text is None and any(shard.text is not None for shard in manifest.shards):
        raise InputError(f"{file} does not describe a token store: nothing is said of its text features")
    return manifest


def read_manifest(path: Path) -> Manifest:
    """The manifest of a store whose files all have the size it says.

    Raises:
        InputError: missing, not a store, or a file is missing or of another size.
    """
    manifest = parse_manifest(path)
    for shard in manifest.shards:
        for stored in shard.files:
            check_size(path, stored)
    return manifest


def map_shard(store: Path, shard: StoredShard, manifest: Manifest) -> dict[str, Tensor]:
    """The tensors of a shard, memory-mapped, of the shapes that the manifest promises.

    Raises:
        InputError: the file is corrupt.
    """
    schedule = manifest.schedule(shard.ratio)
    packed = (shard.count, schedule.positions, -(-manifest.bits_per_position // 8))
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"bits": (packed, torch.uint8)}
    if manifest.latents:
        expected["latents"] = ((shard.count, manifest.bits, *schedule.latent_sizes[-1]), torch.bfloat16)
    tensors = map_tensors(store / shard.tokens.file)
    if {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()} != expected:
        raise Corrupt(store / shard.tokens.file, "its tensors are not those the manifest promises")
    return tensors


def map_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, memory-mapped.

    Raises:
        InputError: the file is corrupt.
    """
    try:
        with safe_open(str(path), framework="pt") as stored:
            return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise Corrupt(path, str(error)) from error
    except OSError as error:
        raise explain(error, path, "read") from error


def read_rows(path: Path, shard: StoredShard) -> list[StoredRow]:
    """What is kept of each picture of a shard besides its bits.

    Raises:
        InputError: the file is corrupt.
    """
    file = path / shard.captions.file
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
        found = [StoredRow(row["key"], _listed(row["captions"]), _sized(row["size"])) for row in rows]
    except OSError as error:
        raise explain(error, file, "read") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Corrupt(file, "a line is not a key with its captions") from error
    if len(found) != shard.count:
        raise Corrupt(file, f"{len(found)} captions for {shard.count} pictures")
    if not all(isinstance(text, str) for row in found for text in (row.key, *row.captions)):
        raise Corrupt(file, "a key or a caption is not text")
    return found


def check_size(store: Path, stored: StoredFile) -> None:
    """Raises InputError when a file of the store is missing or of another size than the manifest says."""
    path, size = store / stored.file, stored.bytes
    try:
        found = path.stat().st_size
    except FileNotFoundError as error:
        raise Corrupt(path, "it is missing") from error
    except OSError as error:
        raise explain(error, path, "read") from error
    if found != size:
        raise Corrupt(path, f"it has {found} bytes instead of {size}")


def is_empty(path: Path) -> bool:
    """Whether a store may be started there: no folder yet, or one without anything in it.

    Raises:
        InputError: there is something else.
    """
    if not path.exists():
        return True
    try:
        contents = [entry for entry in path.iterdir() if entry.name != LOCK and not entry.name.endswith(PARTIAL)]
    except OSError as error:
        raise explain(error, path, "write") from error
    if contents and not (path / MANIFEST).is_file():
        raise InputError(f"{path} is not empty and not a token store", "choose a new or an empty folder")
    return not contents


def _listed(value: Any) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise TypeError(f"a list is needed, not {type(value).__name__}")
    return tuple(value)


def _sized(value: Any) -> tuple[int, int]:
    width, height = _listed(value)
    return int(width), int(height)
