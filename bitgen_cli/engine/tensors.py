"""Writing safetensors files, so that a full disk is told like for any other file, and modules to read them into."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""Of safetensors."""


class Unfilled(TorchFunctionMode):
    """Modules that are made in the block get no initial values: their weights are read from a file.

    On the meta device there is nothing to fill, and trying to loads the whole of torch's compiler.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return given["tensor"] if "tensor" in given else args[0]
        return func(*args, **given)


def save_tensors(
    tensors: Mapping[str, Tensor],
    file: Path,
    dtype: torch.dtype | None = None,
    metadata: dict[str, str] | None = None,
) -> None:
    """Writes a safetensors file.

    Args:
        tensors: by name, on any device.
        file: to write.
        dtype: number type of the stored tensors; None keeps each one's own.
        metadata: stored in the file's header.

    Raises:
        OSError: as for any other file; safetensors has an error of its own for a full disk.
    """
    stored = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
    try:
        save_file(stored, file, metadata=metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code), str(file)) from error


def stream_tensors(
    tensors: Mapping[str, Tensor],
    file: Path,
    dtype: torch.dtype,
    metadata: dict[str, str] | None = None,
    advance: Callable[[int], None] | None = None,
) -> None:
    """Writes the file that `save_tensors` would, byte for byte, with one tensor at a time in memory.

    Args:
        tensors: by name, on the CPU; mapped from a file, they take no memory before their turn.
        file: to write.
        dtype: number type of the stored tensors.
        metadata: stored in the file's header.
        advance: is told the bytes of each tensor that is written.

    Raises:
        OSError: as for any other file.
    """
    names, end = sorted(tensors), 0
    header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    for name in names:
        begin, end = end, end + tensors[name].numel() * dtype.itemsize
        header[name] = {
            "dtype": _DTYPE_NAMES[dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            written = _write_tensor(stream, tensors[name], dtype)
            if advance is not None:
                advance(written)


def _write_tensor(stream: BinaryIO, tensor: Tensor, dtype: torch.dtype) -> int:
    """Writes the bytes of one tensor, which are gone before the next one's are made; their number."""
    stored = tensor.detach().to(dtype).contiguous().view(-1).view(torch.uint8).numpy()
    stream.write(stored.data)
    return stored.nbytes


def weights(module: nn.Module) -> dict[str, Tensor]:
    """The parameters of a module by name, those that occur under several names under the first; no module has buffers.

    state_dict would hand out parts where a module is shared between ranks, even while it holds everything.
    """
    return dict(module.named_parameters())


def stored_dtype(file: Path) -> torch.dtype:
    """The number type of a safetensors file's first tensor; the file has been read before."""
    with safe_open(str(file), framework="pt") as stored:
        first: torch.dtype = stored.get_tensor(next(iter(stored.keys()))).dtype
    return first
