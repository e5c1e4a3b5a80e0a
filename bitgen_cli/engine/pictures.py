"""Pictures of a source as tensors for training: read ahead by other processes, kept while there is room."""

from __future__ import annotations

import signal
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bitgen_cli.config import Config, TokenizerTraining
from bitgen_cli.engine.data import PictureSource, to_tensor
from bitgen_cli.engine.scales import Schedule, budgeted, largest, nearest_ratio, ratios
from bitgen_cli.errors import InputError, ResourceError
from bitgen_cli.report import Report

BAD_SHARE = 0.01
"""More unreadable pictures than this share are an error."""


class Pictures:
    """The pictures of a source as tensors of the size their schedule asks for, read ahead and kept.

    Args:
        source: where they come from.
        config: its scales decide the sizes.
        training: workers that read ahead, and memory for what was read.
        report: hears of pictures that cannot be read.
    """

    def __init__(
        self, source: PictureSource, config: Config, training: TokenizerTraining, report: Report
    ) -> None:
        self._source = source
        self._config = config
        self._report = report
        self._kept: dict[int, Tensor] = {}
        self._room = int(training.picture_cache * 2**30)
        self._largest = largest(training.resolutions)
        self._bad: set[int] = set()
        self._ratios = self._find_ratios()
        self._coming: dict[int, Future[npt.NDArray[np.uint8]]] = {}
        self._pool = None
        if training.workers:
            # a fresh process each: a fork of a process that computes with threads may hang
            self._pool = ProcessPoolExecutor(training.workers, get_context("spawn"), _start_reader, (source,))

    def __getitem__(self, index: int) -> Tensor:
        """(3, height, width) uint8; of an unreadable picture, the next readable one of its size.

        Raises:
            InputError: too many pictures are unreadable.
            ResourceError: a reading process died.
        """
        known = self._kept.get(index)
        if known is not None:
            return known
        picture = self._read(index)
        if self._room >= picture.nbytes:
            self._room -= picture.nbytes
            self._kept[index] = picture
        return picture

    def ahead(self, indices: list[int]) -> None:
        """Lets the workers read pictures that are asked for soon."""
        if self._pool is None:
            return
        for index in indices:
            if index not in self._kept and index not in self._coming:
                self._coming[index] = self._pool.submit(_read_picture, index, self._size(index))

    def name(self, index: int) -> str:
        """The picture's own name."""
        return self._source.key(index)

    def ratio(self, index: int) -> float:
        """The table's aspect ratio nearest to the picture's."""
        return ratios(self._config.model.scales)[0] if self._ratios is None else self._ratios[index]

    def schedule(self, index: int, budget: str | int | None = None) -> Schedule:
        """The scales of the picture; of the size it has here, or with another of the recipe's budgets."""
        model = self._config.model
        patchify, budget = model.transformer.patchify, budget or self._largest
        return budgeted(model.scales, patchify=patchify, ratio=self.ratio(index), budget=budget)

    def close(self) -> None:
        """Ends the workers."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _size(self, index: int) -> tuple[int, int]:
        return self.schedule(index).pixels(self._config.model.tokenizer.patch_size)

    def _read(self, index: int) -> Tensor:
        coming = self._coming.pop(index, None)
        try:
            if coming is not None:
                return torch.from_numpy(coming.result())
            return to_tensor(self._source.image(index), self._size(index))
        except BrokenProcessPool as error:
            raise ResourceError("a process that reads pictures died", "use fewer workers, or 0") from error
        except InputError as error:
            self._note_bad(index, error)
        count = len(self._source)
        others = (other % count for other in range(index + 1, index + count))
        following = next(
            (i for i in others if i not in self._bad and self.ratio(i) == self.ratio(index)), None
        )
        if following is None:
            raise InputError(f"no picture of aspect ratio {self.ratio(index)} is readable")
        return self[following]

    def _find_ratios(self) -> list[float] | None:
        """The ratio of every picture; None when the model has one ratio alone."""
        scales = self._config.model.scales
        if len(ratios(scales)) == 1:
            return None
        found = []
        for index in range(len(self._source)):
            try:
                width, height = self._source.size(index)
                found.append(nearest_ratio(height / width, scales))
            except InputError as error:
                self._note_bad(index, error)
                found.append(found[-1] if found else nearest_ratio(1.0, scales))
        return found

    def _note_bad(self, index: int, error: InputError) -> None:
        if index in self._bad:
            return
        self._bad.add(index)
        self._report.warning(f"left out: {error.message}")
        if len(self._bad) > BAD_SHARE * len(self._source):
            raise InputError(
                f"{len(self._bad)} of {len(self._source)} pictures are unreadable, more than 1 %",
                "repair or remove them",
            ) from error


_reader_source: PictureSource | None = None
"""In a reading process: where its pictures come from."""


def _start_reader(source: PictureSource) -> None:
    global _reader_source
    _reader_source = source
    torch.set_num_threads(1)
    # Ctrl-C reaches the whole group of processes; when to stop is the training's decision
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _read_picture(index: int, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    assert _reader_source is not None
    return to_tensor(_reader_source.image(index), size).numpy()
