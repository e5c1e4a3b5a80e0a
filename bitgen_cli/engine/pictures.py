"""Pictures of a source as tensors for training: read ahead by other processes, kept while there is room."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from threading import Thread

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bitgen_cli.config import ModelConfig
from bitgen_cli.engine.data import to_tensor
from bitgen_cli.engine.scales import Schedule, buckets, budgeted, largest, nearest
from bitgen_cli.engine.sources import PictureSource
from bitgen_cli.errors import InputError, ResourceError
from bitgen_cli.report import Report

BAD_SHARE = 0.01
"""More unreadable pictures than this share are an error."""


class Unreadable:
    """The pictures of a source that cannot be read: each is told once, and too many are an error.

    Args:
        count: pictures of the source.
        report: hears of them.
    """

    def __init__(self, count: int, report: Report) -> None:
        self._count = count
        self._report = report
        self._known: set[int] = set()

    def __contains__(self, index: int) -> bool:
        return index in self._known

    def note(self, index: int, error: InputError) -> None:
        """Takes a picture that cannot be read.

        Raises:
            InputError: there are too many.
        """
        if index in self._known:
            return
        self._known.add(index)
        self._report.warning(f"left out: {error.message}")
        if len(self._known) > BAD_SHARE * self._count:
            raise InputError(
                f"{len(self._known)} of {self._count} pictures are unreadable, more than 1 %",
                "repair or remove them",
            ) from error


class Pictures:
    """The pictures of a source as tensors of the size their schedule asks for, read ahead and kept.

    Args:
        source: where they come from.
        model: its scales decide the sizes.
        aspects: shapes W:H that are used, all without any.
        budgets: pixel budgets or numbers of scales, of which the largest decides the sizes; None is the model's own.
        workers: processes that read ahead; 0 reads in this one.
        room: bytes for pictures that have been read.
        unreadable: takes pictures that cannot be read.
        ratios: height / width in use of every picture; None finds out.
    """

    def __init__(
        self,
        source: PictureSource,
        model: ModelConfig,
        *,
        aspects: Sequence[str],
        budgets: Sequence[str | int] | None = None,
        workers: int,
        room: int,
        unreadable: Unreadable,
        ratios: Sequence[float] | None = None,
    ) -> None:
        self._source = source
        self._model = model
        self._room = room
        self._kept: dict[int, Tensor] = {}
        self._instead: dict[int, int] = {}
        self._largest = largest(budgets)
        self._unreadable = unreadable
        self._buckets = buckets(model.scales, aspects)
        self._ratios = self._find_ratios() if ratios is None else ratios
        self._coming: dict[int, Future[npt.NDArray[np.uint8]]] = {}
        self._pool = None
        if workers:
            # a fresh process each: a fork of a process that computes with threads may hang
            self._pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_reader, (source,))

    def __getitem__(self, index: int) -> Tensor:
        """(3, height, width) uint8; of an unreadable picture, the next readable one of its size.

        Raises:
            InputError: too many pictures are unreadable.
            ResourceError: a reading process died.
        """
        return self.read(index)[1]

    def read(self, index: int) -> tuple[int, Tensor]:
        """The picture's index and itself; of an unreadable one, those of the next readable one of its size.

        Raises: as `__getitem__`.
        """
        asked, index = index, self._instead.get(index, index)
        while (picture := self._read(index)) is None:
            index = self._following(index)
        if index != asked:
            self._instead[asked] = index
        if index not in self._kept and self._room >= picture.nbytes:
            self._room -= picture.nbytes
            self._kept[index] = picture
        return index, picture

    def ahead(self, indices: Sequence[int]) -> None:
        """Lets the workers read pictures that are asked for soon."""
        if self._pool is None:
            return
        for index in indices:
            if index not in self._kept and index not in self._coming and index not in self._unreadable:
                self._coming[index] = self._pool.submit(_read_picture, index, self._size(index))

    def name(self, index: int) -> str:
        """The picture's own name."""
        return self._source.key(index)

    def ratio(self, index: int) -> float:
        """The aspect ratio in use that is nearest to the picture's."""
        return self._buckets[0] if self._ratios is None else self._ratios[index]

    def schedule(self, index: int, budget: str | int | None = None) -> Schedule:
        """The scales of the picture; of the size it has here, or with another of the recipe's budgets."""
        patchify, budget = self._model.transformer.patchify, budget or self._largest
        return budgeted(self._model.scales, patchify=patchify, ratio=self.ratio(index), budget=budget)

    def close(self) -> None:
        """Ends the workers."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _size(self, index: int) -> tuple[int, int]:
        return self.schedule(index).pixels(self._model.tokenizer.patch_size)

    def _read(self, index: int) -> Tensor | None:
        """The picture, from memory where it is kept; None when it cannot be read."""
        if index in self._kept:
            return self._kept[index]
        coming = self._coming.pop(index, None)
        try:
            if coming is not None:
                return torch.from_numpy(coming.result())
            return to_tensor(self._source.image(index), self._size(index))
        except BrokenProcessPool as error:
            raise ResourceError("a process that reads pictures died", "use fewer workers, or 0") from error
        except InputError as error:
            self._unreadable.note(index, error)
            return None

    def _following(self, index: int) -> int:
        """The next picture of a picture's size that is not known to be unreadable."""
        count, ratio = len(self._source), self.ratio(index)
        for other in (other % count for other in range(index + 1, index + count)):
            if other not in self._unreadable and self.ratio(other) == ratio:
                return other
        raise InputError(f"no picture of aspect ratio {ratio} is readable")

    def _find_ratios(self) -> list[float] | None:
        """The ratio of every picture; None when there is one ratio alone."""
        if len(self._buckets) == 1:
            return None
        found = []
        for index in range(len(self._source)):
            try:
                width, height = self._source.size(index)
                found.append(nearest(height / width, self._buckets))
            except InputError as error:
                self._unreadable.note(index, error)
                found.append(found[-1] if found else nearest(1.0, self._buckets))
        return found


_reader_source: PictureSource | None = None
"""In a reading process: where its pictures come from."""


def _start_reader(source: PictureSource) -> None:
    global _reader_source
    _reader_source = source
    torch.set_num_threads(1)
    # Ctrl-C reaches the whole group of processes; when to stop is the training's decision
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A training that is killed cannot tell its readers, which would wait for it for ever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _read_picture(index: int, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    assert _reader_source is not None
    return to_tensor(_reader_source.image(index), size).numpy()
