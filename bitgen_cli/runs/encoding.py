"""Pictures of a source into a token store: read ahead by other processes, encoded in batches, written in shards.

Memory: at most a batch of pictures per aspect ratio waits to be encoded (32 of 1024x1024 at 15 ratios are 1.4 GiB) and
one for each thread of a CPU, 16 pictures wait for each reading process, threads compute within the bytes that codec.py
allows, and the store's writer takes what store_writer.py says.
"""

from __future__ import annotations

import ctypes
import math
import os
import signal
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bitgen_cli.engine import pyramid
from bitgen_cli.engine.codec import Codec, Encoder
from bitgen_cli.engine.data import to_tensor
from bitgen_cli.engine.data_report import BadPicture
from bitgen_cli.engine.device import keep_freed_memory
from bitgen_cli.engine.scales import Schedule, nearest
from bitgen_cli.engine.sources import PictureSource
from bitgen_cli.engine.store_writer import StoreWriter
from bitgen_cli.errors import InputError, ResourceError
from bitgen_cli.report import Report

BAD_SHARE = 0.01
"""More unreadable pictures than this share are an error."""
BAD_SHARE_EARLY, ENOUGH_READ = 0.05, 100
"""A share that ends the run before all is read, once that many are."""
NAMED = 10
"""Bad pictures named one by one; further ones are only counted."""
READ_TOGETHER = 8
"""Pictures that a reading process hands over at once."""
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class _Read:
    """One picture as the reading processes hand it over; without pixels where it could not be read."""

    key: str
    captions: tuple[str, ...] = ()
    size: tuple[int, int] = (0, 0)
    ratio: float = 1.0
    pixels: npt.NDArray[np.uint8] | None = None
    reason: str = ""


class Reader(Dataset[_Read]):
    """Reads, resizes and crops the pending pictures of a source, in its order."""

    def __init__(
        self,
        source: PictureSource,
        pending: list[int],
        pixels: Mapping[float, tuple[int, int]],
    ) -> None:
        self.source = source
        self.pending = pending
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pending)

    def __getitem__(self, number: int) -> _Read:
        index = self.pending[number]
        key = self.source.key(index)
        try:
            image, captions = self.source.image(index), self.source.captions(index)
        except InputError as error:
            return _Read(key, reason=str(error))
        ratio = nearest(image.height / image.width, tuple(self.pixels))
        return _Read(key, captions, image.size, ratio, to_tensor(image, self.pixels[ratio]).numpy())


@dataclass
class _Batch:
    """Pictures of one aspect ratio that are encoded together."""

    keys: list[str] = field(default_factory=list)
    captions: list[tuple[str, ...]] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    pixels: list[Tensor] = field(default_factory=list)


class _Encoders:
    """Threads that encode batches at the same time; the writer gets them in the order they came in.

    On a GPU there is one thread, so that reading goes on meanwhile.

    Args:
        codec: what they compute.
        schedules: of each aspect ratio.
        writer: gets the results.
        pixels: of the largest picture.
    """

    def __init__(
        self, codec: Codec, schedules: Mapping[float, Schedule], writer: StoreWriter, pixels: int
    ) -> None:
        self._encoder = Encoder(codec, pixels)
        self._schedules = schedules
        self._writer = writer
        self._pool = ThreadPoolExecutor(self._encoder.division.threads)
        self._coming: deque[tuple[float, _Batch, Future[tuple[list[Tensor], Tensor]]]] = deque()
        self._ending = ExitStack()

    def __enter__(self) -> _Encoders:
        self._ending.enter_context(self._encoder.sharing_cores())
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._ending.close()

    def room(self, ratio: float) -> int:
        """Pictures that the next batch of an aspect ratio may have, so that it ends where its shard ends."""
        coming = sum(len(batch.keys) for other, batch, _ in self._coming if other == ratio)
        return self._writer.room(ratio, coming)

    def encode(self, ratio: float, batch: _Batch) -> None:
        """Takes a batch, and waits for the first one when all threads have work."""
        self._coming.append((ratio, batch, self._pool.submit(self._encoded, ratio, batch)))
        if len(self._coming) > self._encoder.division.threads:
            self._finish_first()

    def finish(self) -> None:
        """Waits for all batches."""
        while self._coming:
            self._finish_first()

    def _finish_first(self) -> None:
        ratio, batch, coming = self._coming.popleft()
        bits, latent = coming.result()
        kept = latent if self._writer.manifest.latents else None
        self._writer.add(batch.keys, batch.captions, batch.sizes, ratio, bits, kept)

    def _encoded(self, ratio: float, batch: _Batch) -> tuple[list[Tensor], Tensor]:
        """Bits and latents of a batch."""
        latent = self._encoder.latents(torch.stack(batch.pixels))
        if self._writer.manifest.latents:
            # Quantise what is kept, so that bits and latents of the store belong together exactly.
            latent = latent.bfloat16().float()
        bits, _ = pyramid.encode(latent, self._schedules[ratio])
        return bits, latent


def fill(
    writer: StoreWriter,
    reader: Reader,
    codec: Codec,
    schedules: Mapping[float, Schedule],
    report: Report,
    *,
    batch_size: int,
    workers: int,
) -> list[BadPicture]:
    """Encodes everything the reader yields into the writer; returns the pictures that were skipped.

    Batches end where shards end, so that what a shard holds does not depend on where an earlier run stopped.
    """
    waiting: dict[float, _Batch] = {}
    bad: list[BadPicture] = []
    stored_before = writer.manifest.count
    largest = max(math.prod(size) for size in reader.pixels.values())
    with (
        report.task("tokenize", stored_before + len(reader)) as task,
        _Encoders(codec, schedules, writer, largest) as encoders,
    ):
        task.advance(stored_before)
        for read, item in enumerate(_ahead(reader, workers), start=1):
            task.advance()
            if item.pixels is None:
                bad.append(BadPicture(item.key, item.reason))
                if len(bad) <= NAMED:
                    report.warning(f"skipped: {item.reason}")
                if read > ENOUGH_READ and len(bad) > BAD_SHARE_EARLY * (stored_before + read):
                    raise _too_many(bad, stored_before + read)
                continue
            batch = waiting.setdefault(item.ratio, _Batch())
            batch.keys.append(item.key)
            batch.captions.append(item.captions)
            batch.sizes.append(item.size)
            batch.pixels.append(torch.from_numpy(item.pixels))
            if len(batch.keys) == min(batch_size, encoders.room(item.ratio)):
                encoders.encode(item.ratio, waiting.pop(item.ratio))
        for ratio in sorted(waiting):
            encoders.encode(ratio, waiting[ratio])
        encoders.finish()
    if len(bad) > NAMED:
        report.warning(f"skipped {len(bad)} unreadable pictures in all")
    if len(bad) > BAD_SHARE * (stored_before + len(reader)):
        raise _too_many(bad, stored_before + len(reader))
    return bad


def _ahead(reader: Reader, workers: int) -> Iterator[_Read]:
    """The reader's pictures in order, read ahead by that many processes."""
    loader = DataLoader(
        reader,
        batch_size=READ_TOGETHER,
        num_workers=workers,
        collate_fn=_as_they_are,
        worker_init_fn=partial(_start_reader, os.getpid()),
    )
    try:
        for several in loader:
            yield from several
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ResourceError("a reading process ended unexpectedly", "use fewer --workers") from error


def _as_they_are(several: list[_Read]) -> list[_Read]:
    return several


def _start_reader(parent: int, number: int) -> None:
    """Lets this reading process end with its parent, also where that is killed: torch's own way may wait for ever."""
    keep_freed_memory()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _too_many(bad: list[BadPicture], read: int) -> InputError:
    names = ", ".join(entry.key for entry in bad[:NAMED])
    more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
    return InputError(
        f"{len(bad)} of {read} pictures are unreadable, more than 1 %: {names}{more}",
        "repair or remove them and run the same command again",
    )
