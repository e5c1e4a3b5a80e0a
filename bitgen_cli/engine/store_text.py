"""Text features kept beside a shard of a token store, so that training needs no text encoder.

    shard-00000.text.safetensors
        pictures (n + 1) int64    where each picture's captions begin among all captions of the shard
        captions (m) int64        which of the distinct captions each of them is
        starts (d + 1) int64      where the rows of each distinct caption begin
        features (r, width) bfloat16

Equal captions are encoded and stored once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from bitgen_cli.engine.store_format import Corrupt, map_tensors
from bitgen_cli.engine.text import TextEncoder

_DTYPES = {torch.int64: "I64", torch.bfloat16: "BF16"}
"""Names of number types in a safetensors header."""


@dataclass(frozen=True)
class ShardText:
    """The text features of one shard, memory-mapped.

    Attributes:
        pictures, captions, starts, features: as stored.
    """

    pictures: Tensor
    captions: Tensor
    starts: Tensor
    features: Tensor

    @classmethod
    def map(cls, path: Path, count: int, width: int) -> ShardText:
        """The features in a file.

        Args:
            path: of the file.
            count: pictures of the shard.
            width: channels.

        Raises:
            InputError: it is corrupt.
        """
        tensors = map_tensors(path)
        shapes = {"pictures": torch.int64, "captions": torch.int64, "starts": torch.int64, "features": torch.bfloat16}
        if {name: tensor.dtype for name, tensor in tensors.items()} != shapes:
            raise Corrupt(path, "its tensors are not text features")
        found = cls(**tensors)
        if not found._fits(count, width):
            raise Corrupt(path, "its text features do not fit its pictures")
        return found

    def row(self, picture: int, caption: int) -> Tensor:
        """Features (T, width) bfloat16 of a caption of a picture of the shard."""
        first, end = self.pictures[picture : picture + 2].tolist()
        if not 0 <= caption < end - first:
            raise ValueError(f"caption {caption} of a picture with {end - first}")
        distinct = int(self.captions[first + caption])
        start, stop = self.starts[distinct : distinct + 2].tolist()
        return self.features[start:stop]

    def _fits(self, count: int, width: int) -> bool:
        """Whether every picture has a caption and every caption its rows."""
        flat = self.pictures.ndim == self.captions.ndim == self.starts.ndim == 1
        if not flat or self.features.ndim != 2 or self.features.shape[1] != width or len(self.starts) < 2:
            return False
        distinct = len(self.starts) - 1
        return (
            len(self.pictures) == count + 1
            and _counts_up(self.pictures, len(self.captions))
            and _counts_up(self.starts, self.features.shape[0])
            and bool(((self.captions >= 0) & (self.captions < distinct)).all())
        )


def write_shard_text(
    file: BinaryIO,
    captions: Sequence[Sequence[str]],
    encoder: TextEncoder,
    batch_size: int,
    autocast: Callable[[], torch.autocast],
) -> None:
    """Writes the text features of a shard; a batch of them is in memory at a time.

    Args:
        file: open for writing, empty.
        captions: of each picture, at least one.
        encoder: fixed.
        batch_size: captions encoded at once; those of like length together.
        autocast: the number type it computes in.

    Raises:
        OSError: it cannot be written.
    """
    distinct = {caption: number for number, caption in enumerate(dict.fromkeys(c for own in captions for c in own))}
    ids = encoder.tokenise(list(distinct))
    starts = list(accumulate((len(tokens) for tokens in ids), initial=0))
    tensors = {
        "pictures": torch.tensor(list(accumulate(map(len, captions), initial=0))),
        "captions": torch.tensor([distinct[caption] for own in captions for caption in own]),
        "starts": torch.tensor(starts),
        "features": torch.empty((starts[-1], encoder.width), dtype=torch.bfloat16, device="meta"),
    }
    file.write(_header(tensors))
    for name in ("pictures", "captions", "starts"):
        file.write(tensors[name].numpy().astype("<i8").tobytes())
    begin = file.tell()
    order = sorted(range(len(ids)), key=lambda number: len(ids[number]), reverse=True)
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        with torch.inference_mode(), autocast():
            encoded = encoder.encode_ids([ids[number] for number in batch])
        rows = encoded.features.to("cpu", torch.bfloat16)
        for number, row, length in zip(batch, rows, encoded.lengths, strict=True):
            file.seek(begin + 2 * encoder.width * starts[number])
            file.write(row[:length].contiguous().view(torch.uint8).numpy().tobytes())


def _header(tensors: dict[str, Tensor]) -> bytes:
    """The header of a safetensors file whose tensors follow in this order."""
    described, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.itemsize
        described[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _counts_up(places: Tensor, end: int) -> bool:
    """Whether places begin at 0, grow with every step and stop at `end`."""
    return int(places[0]) == 0 and int(places[-1]) == end and bool((places.diff() > 0).all())
