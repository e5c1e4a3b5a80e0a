"""The token store as training reads it: pictures as packed bits on disk, handed out as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from bitgen_cli.engine import bits as bit_math
from bitgen_cli.engine.scales import Schedule
from bitgen_cli.engine.store_format import (
    MANIFEST,
    Manifest,
    StoredRow,
    StoredText,
    map_shard,
    read_manifest,
    read_rows,
)
from bitgen_cli.engine.store_parts import unfinished
from bitgen_cli.engine.store_text import ShardText
from bitgen_cli.engine.transformer import TextFeatures
from bitgen_cli.errors import InputError

IN_MEMORY = 2 << 30
"""Bytes of latents that are kept in memory; larger stores are read as they are needed."""
_AT_ONCE = 1024
"""Pictures whose latents are read into memory at once."""


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

    def __init__(self, path: Path, manifest: Manifest, rows: Sequence[StoredRow]) -> None:
        self.path = path
        self.manifest = manifest
        self.keys = [row.key for row in rows]
        self.captions = [row.captions for row in rows]
        self.sizes = [row.size for row in rows]
        counts = torch.tensor([shard.count for shard in manifest.shards])
        self._shard_of = torch.arange(len(counts)).repeat_interleave(counts)
        self._row_of = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[self._shard_of]
        self._opened: dict[int, dict[str, Tensor]] = {}
        self._texts: dict[int, ShardText] = {}
        self._kept: dict[float, Tensor] = {}
        self._place = torch.zeros(len(rows), dtype=torch.long)

    @classmethod
    def open(cls, path: Path) -> TokenStore:
        """The store in a folder. Files are checked by size; store_check.py checks their contents.

        Keys and captions are read into memory: about 300 bytes a picture with captions of 100 letters.

        Raises:
            InputError: missing, not a store, unfinished, or one of its files is missing or of another size.
        """
        unjoined = None if (path / MANIFEST).is_file() else unfinished(path)
        if unjoined is not None:
            raise unjoined
        manifest = read_manifest(path)
        if not manifest.complete:
            raise InputError(
                f"the token store {path} is unfinished: {manifest.count} pictures so far",
                "run the same `bitgen tokenize` again; it goes on where it stopped",
            )
        if not manifest.shards:
            raise InputError(f"the token store {path} holds no pictures")
        return cls(path, manifest, [row for shard in manifest.shards for row in read_rows(path, shard)])

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def name(self) -> str:
        """What errors call it."""
        return f"the token store {self.path}"

    @property
    def bit_count(self) -> int:
        """Bits a latent position."""
        return self.manifest.bits

    @property
    def has_latents(self) -> bool:
        """Whether there are latents beside the bits."""
        return self.manifest.latents

    @property
    def text(self) -> StoredText | None:
        """What made the text features of all captions; None where not all have some."""
        return self.manifest.text if self.manifest.has_text else None

    @property
    def ratios(self) -> list[float]:
        """Aspect ratios (height / width) that occur, ascending."""
        return sorted({shard.ratio for shard in self.manifest.shards})

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

    def kept_latents(self) -> int:
        """Bytes of the latents that `keep` keeps; 0 where they are too many, or there are none."""
        size = sum(2 * shape.numel() for shape in self._latent_shapes().values()) if self.has_latents else 0
        return size if size <= IN_MEMORY else 0

    def keep(self, device: torch.device) -> None:
        """Reads all latents into the memory of a device, where `latents` takes them from, if they fit.

        Raises:
            InputError: a shard is corrupt.
        """
        if not self.kept_latents():
            return
        for ratio, shape in self._latent_shapes().items():
            group = self.indices_of(ratio)
            self._place[group] = torch.arange(len(group))
            # they are stored as bfloat16 too: nothing is lost
            kept = torch.empty(shape, dtype=torch.bfloat16, device=device)
            for start in range(0, len(group), _AT_ONCE):
                kept[start : start + _AT_ONCE] = self._gather("latents", group[start : start + _AT_ONCE])
            self._kept[ratio] = kept

    def ahead(self, indices: Sequence[int]) -> None:
        """Nothing to do: a store needs no reading ahead."""

    def readable(self, indices: Sequence[int]) -> list[int]:
        """All of them: what cannot be read is in no store."""
        return list(indices)

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

        They are on the device that was told to `keep` where they fit, else on the CPU.

        Raises:
            InputError: a shard is corrupt.
        """
        if not self.manifest.latents:
            return None
        kept = self._kept.get(self._common_ratio(indices))
        if kept is not None:
            return kept[self._place[torch.as_tensor(indices, dtype=torch.long)].to(kept.device)].float()
        return self._gather("latents", indices).float()

    def text_features(self, indices: Sequence[int], captions: Sequence[int] | None = None) -> TextFeatures | None:
        """Features of a caption of each picture, float32; None where the store has none.

        Args:
            indices: pictures of any aspect ratios.
            captions: which of each picture's captions, 0 for the empty one of a picture that has none; None is the
                first.

        Raises:
            InputError: a shard is corrupt.
        """
        if not self.manifest.has_text:
            return None
        wanted = [0] * len(indices) if captions is None else captions
        rows = []
        for index, caption in zip(indices, wanted, strict=True):
            rows.append(self._text(int(self._shard_of[index])).row(int(self._row_of[index]), caption))
        return TextFeatures.from_rows([row.float() for row in rows])

    def close(self) -> None:
        """Nothing works in the background."""

    def _latent_shapes(self) -> dict[float, torch.Size]:
        """(N, C, H, W) of the latents of each aspect ratio."""
        return {
            ratio: torch.Size(
                (len(self.indices_of(ratio)), self.manifest.bits, *self.schedule(ratio).latent_sizes[-1])
            )
            for ratio in self.ratios
        }

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
            self._opened[number] = map_shard(self.path, shard, self.manifest)
        return self._opened[number]

    def _text(self, number: int) -> ShardText:
        """Memory-mapped text features of a shard."""
        if number not in self._texts:
            text, shard = self.manifest.text, self.manifest.shards[number]
            assert text is not None
            assert shard.text is not None
            self._texts[number] = ShardText.map(self.path / shard.text.file, shard.count, text.width)
        return self._texts[number]


def is_store(path: Path) -> bool:
    """Whether a folder holds a token store, or parts of one."""
    return any((folder / MANIFEST).is_file() for folder in (path, *path.glob("part-*-of-*")))
