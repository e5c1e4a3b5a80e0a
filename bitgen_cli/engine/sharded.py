"""Checkpoints of tensors that several ranks hold a part of each, as torch.distributed.checkpoint writes them.

Each rank writes a safetensors file of its parts, whose header tells where in the whole tensors they belong. They are
read into tensors shared by any number of ranks, or into whole ones. No pickle is involved.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitgen_cli.engine.parallel import local
from bitgen_cli.errors import InputError


@dataclass(frozen=True)
class Writing:
    """A checkpoint that is being written in the background."""

    _future: Future[Any]

    def wait(self) -> None:
        """Returns when this rank's part, on the first rank every part, is on disk.

        Raises:
            Exception: whatever went wrong.
        """
        self._future.result()


def held_bytes(tensor: Tensor) -> int:
    """Bytes of what this rank holds of a tensor."""
    return local(tensor).nbytes


def begin(tensors: Mapping[str, Mapping[str, Tensor]], folder: Path, group: Any) -> Writing:
    """Copies the tensors, by part and name, and begins to write the copies; all ranks must call this.

    Args:
        tensors: what is written.
        folder: where to.
        group: processes that write, in a group of their own: training goes on in the other one.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import async_save

    with _quiet():
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        # a new dictionary each time: what it copies into must not be reused while it is written
        future = async_save(_flat(tensors), storage_writer=writer, process_group=group)
    assert isinstance(future, Future)
    return Writing(future)


def shapes(folder: Path, part: str) -> dict[str, torch.Size]:
    """Names and shapes of the whole tensors of a part.

    Raises:
        InputError: the files are damaged.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    with _reading(folder):
        stored = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    prefix = f"{part}/"
    return {
        name.removeprefix(prefix): entry.size  # type: ignore[union-attr]
        for name, entry in stored.items()
        if name.startswith(prefix)
    }


def read(folder: Path, into: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Fills tensors, shared or whole, by part and name; all ranks of a shared one must call this.

    Raises:
        InputError: the files are damaged.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    with _reading(folder):
        load(_flat(into), storage_reader=HuggingFaceStorageReader(str(folder)))


def _flat(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    return {f"{part}/{name}": tensor.detach() for part, named in tensors.items() for name, tensor in named.items()}


@contextmanager
def _quiet() -> Iterator[None]:
    """torch warns of saving without several processes, of missing fsspec features, and the like."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    try:
        with _quiet():
            yield
    except Exception as error:  # torch wraps what its readers raise in errors of many kinds
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise InputError(f"{folder} is damaged: {reason}") from error
