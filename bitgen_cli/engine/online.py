"""Pictures tokenized while a transformer learns from them: what a token store of them would hold, without the store.

A training ends with the same weights as one on the store that `bitgen tokenize` makes of the same pictures in one
piece, on a CPU bit for bit: pictures are numbered as there, latents rounded as there, and none hangs on its company
(codec.py). A picture that turns out to be damaged would not be in the store; here the next one of its shape takes its
place.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from bitgen_cli.config import ModelConfig
from bitgen_cli.engine import pyramid
from bitgen_cli.engine.codec import Codec, Encoder
from bitgen_cli.engine.data_report import BadPicture
from bitgen_cli.engine.pictures import Pictures, Unreadable
from bitgen_cli.engine.scales import Schedule, buckets, nearest, schedule
from bitgen_cli.engine.sources import PictureSource
from bitgen_cli.engine.store_writer import order_in_store, shard_sizes
from bitgen_cli.errors import InputError
from bitgen_cli.report import Report

TOGETHER = 1 << 22
"""Pixels that a GPU encodes together: enough work for it, in bounded memory."""


class OnlineTokens:
    """The pictures of a source as tokens, made when they are asked for.

    The head and the captions of every picture are read at once, the pictures themselves while it trains. Memory: keys
    and captions, about 300 bytes a picture with captions of 100 letters; latents up to `room` bytes; what the reading
    processes have read ahead.

    Args:
        source: the pictures.
        model: its scales decide the sizes.
        codec: the tokenizer at work, with as many bits as the model has.
        aspects: shapes W:H that pictures are cropped to, the nearest one each; all of the model's without any.
        workers: processes that read ahead; 0 reads in this one.
        room: bytes of latents that are kept once they are made.
        report: hears of pictures that cannot be read.

    Attributes:
        keys, captions: as in `Tokens`.
        sizes: (width, height) of each picture.
        bad: pictures whose heads or captions cannot be read; they are left out.
        pixels: (h, w) that pictures are resized to, for each aspect ratio in use.

    Raises:
        InputError: too many pictures cannot be read.
        UsageError: a shape that the model does not have.
    """

    has_latents = True
    text = None

    def __init__(
        self,
        source: PictureSource,
        model: ModelConfig,
        codec: Codec,
        *,
        aspects: Sequence[str],
        workers: int,
        room: int,
        report: Report,
    ) -> None:
        self.source = source
        self._codec = codec
        self._schedules = online_schedules(model, aspects)
        self.pixels = {ratio: entry.pixels(model.tokenizer.patch_size) for ratio, entry in self._schedules.items()}
        unreadable = Unreadable(len(source), report)
        looked, self.bad = _look(source, tuple(self._schedules), unreadable, report)
        sizes = shard_sizes(self._schedules, codec.bits, latents=True)
        looked = [looked[place] for place in order_in_store([picture.ratio for picture in looked], sizes)]
        self.keys = [picture.key for picture in looked]
        self.captions = [picture.captions for picture in looked]
        self.sizes = [picture.size for picture in looked]
        self._ratios = [picture.ratio for picture in looked]
        self._place = [picture.index for picture in looked]
        self._number = {place: number for number, place in enumerate(self._place)}
        of_source = [next(iter(self._schedules))] * len(source)
        for picture in looked:
            of_source[picture.index] = picture.ratio
        self._pictures = Pictures(
            source, model, aspects=aspects, workers=workers, room=0, unreadable=unreadable, ratios=of_source
        )
        largest = max(height * width for height, width in self.pixels.values())
        self._encoder = Encoder(codec, largest, TOGETHER)
        self._threads = ThreadPoolExecutor(self._encoder.division.threads, "encode")
        self._room = room
        self._kept: dict[int, Tensor] = {}
        self._instead: dict[int, int] = {}
        self._waiting: dict[int, Tensor] = {}

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def bit_count(self) -> int:
        return self._codec.bits

    @property
    def ratios(self) -> list[float]:
        return sorted(set(self._ratios))

    def __len__(self) -> int:
        return len(self.keys)

    def ratio(self, index: int) -> float:
        return self._ratios[index]

    def schedule(self, ratio: float) -> Schedule:
        return self._schedules[ratio]

    def keep(self, device: torch.device) -> None:
        """Nothing to do yet: what is made is kept in main memory, which has more room than a GPU's."""

    def ahead(self, indices: Sequence[int]) -> None:
        """Lets the reading processes read what is not kept as latents."""
        coming = [self._instead.get(index, index) for index in indices]
        self._pictures.ahead([self._place[index] for index in coming if index not in self._kept])

    def readable(self, indices: Sequence[int]) -> list[int]:
        """These pictures; in the place of one that cannot be read, the next one of its aspect ratio.

        Raises:
            InputError: too many pictures cannot be read.
            ResourceError: a reading process died.
        """
        found = []
        for asked in indices:
            index = self._instead.get(asked, asked)
            if index not in self._kept and index not in self._waiting:
                place, pixels = self._pictures.read(self._place[index])
                index = self._number[place]
                if index != asked:
                    self._instead[asked] = index
                if index not in self._kept:
                    self._waiting[index] = pixels
            found.append(index)
        return found

    def bits(self, indices: Sequence[int]) -> list[Tensor]:
        """Bits per scale, each (B, C, h, w) bool, of pictures of one aspect ratio. Raises: as `readable`."""
        return pyramid.encode(self.latents(indices), self._schedules[self._ratios[indices[0]]])[0]

    def latents(self, indices: Sequence[int]) -> Tensor:
        """Latents (B, C, H, W) float32 of pictures of one aspect ratio, on the CPU. Raises: as `readable`."""
        wanted = self.readable(indices)
        missing = [index for index in dict.fromkeys(wanted) if index not in self._kept]
        made: dict[int, Tensor] = {}
        if missing:
            encoded = self._encode(torch.stack([self._waiting.pop(index) for index in missing]))
            made = dict(zip(missing, encoded, strict=True))
        found = torch.stack([made[index] if index in made else self._kept[index] for index in wanted])
        for index, latent in made.items():
            if self._room >= latent.nbytes:
                self._room -= latent.nbytes
                self._kept[index] = latent.clone()
        return found.float()

    def text_features(self, indices: Sequence[int], captions: Sequence[int] | None = None) -> None:
        """None: prompts are encoded while it trains."""

    def close(self) -> None:
        """Ends the reading processes and the threads."""
        self._pictures.close()
        self._threads.shutdown(cancel_futures=True)

    def _encode(self, pixels: Tensor) -> Tensor:
        """Latents (B, C, H, W) of pictures (B, 3, h, w), as a store keeps them."""
        with self._encoder.sharing_cores():
            parts = list(self._threads.map(self._encoder.latents, self._encoder.parts(pixels)))
        return torch.cat(parts).to("cpu", torch.bfloat16)


def online_schedules(model: ModelConfig, aspects: Sequence[str]) -> dict[float, Schedule]:
    """The schedule of each aspect ratio in use. Args: as of `OnlineTokens`."""
    return {
        ratio: schedule(model.scales, patchify=model.transformer.patchify, ratio=ratio)
        for ratio in buckets(model.scales, aspects)
    }


@dataclass(frozen=True)
class _Looked:
    """A picture of a source before it is read.

    Attributes:
        index: in the source.
        key, captions: its own.
        size: (width, height).
        ratio: height / width in use that is nearest to its own.
    """

    index: int
    key: str
    captions: tuple[str, ...]
    size: tuple[int, int]
    ratio: float


def _look(
    source: PictureSource, ratios: tuple[float, ...], unreadable: Unreadable, report: Report
) -> tuple[list[_Looked], list[BadPicture]]:
    """All pictures whose heads and captions can be read, and the others."""
    good: list[_Looked] = []
    bad: list[BadPicture] = []
    with report.task("looking at pictures", len(source)) as task:
        for index in range(len(source)):
            task.advance()
            key = source.key(index)
            try:
                (width, height), captions = source.size(index), source.captions(index)
            except InputError as error:
                unreadable.note(index, error)
                bad.append(BadPicture(key, str(error)))
                continue
            good.append(_Looked(index, key, captions, (width, height), nearest(height / width, ratios)))
    return good, bad
