"""In which numbers a text encoder computes, and weights of 8 bits, a quarter of float32's.

T5's activations leave float16's range, so no encoder computes in it. With int8 the weights of the linear layers are
rounded to 8 bits with a factor for each output channel; what they are multiplied with, and the sums, are not.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec

import torch
from torch import nn

from bitgen_cli.engine.conversion import read_text_encoder
from bitgen_cli.engine.device import DTYPES, bf16_is_fast
from bitgen_cli.engine.text import TextEncoder, load_text_encoder, text_folder
from bitgen_cli.engine.vocabulary import load_vocabulary
from bitgen_cli.errors import UsageError
from bitgen_cli.report import Report

INT8 = "int8"
TEXT_DTYPES = ("auto", "fp32", "bf16", INT8)
"""What can be asked for."""


@dataclass(frozen=True)
class TextPrecision:
    """The number types of a text encoder.

    Attributes:
        name: of its weights: fp32, bf16 or int8.
        dtype: it computes in.
    """

    name: str
    dtype: torch.dtype

    @property
    def libraries(self) -> str:
        """Versions of the libraries that compute."""
        names = ("torch", "transformers", *(("torchao",) if self.name == INT8 else ()))
        return " ".join(f"{name} {version(name)}" for name in names)


def pick_text_precision(name: str, dtype: torch.dtype, device: torch.device) -> TextPrecision:
    """The precision of that name; `auto` takes the model's number type, and another one in place of float16.

    Args:
        name: one of TEXT_DTYPES.
        dtype: the rest of the model computes in.
        device: where it computes.

    Raises:
        UsageError: not a number type for a text encoder, or a package is missing.
    """
    if name not in TEXT_DTYPES:
        why = "T5 cannot compute in fp16" if name == "fp16" else f"unknown text dtype {name!r}"
        raise UsageError(why, f"use {', '.join(TEXT_DTYPES)}")
    wide = torch.bfloat16 if device.type == "cuda" and bf16_is_fast(device) else torch.float32
    own = wide if dtype == torch.float16 else dtype
    if name == INT8:
        if find_spec("torchao") is None:
            raise UsageError("--text-dtype int8 needs the package torchao", 'pip install "bitgen[int8]"')
        return TextPrecision(INT8, own)
    found = own if name == "auto" else DTYPES[name]
    return TextPrecision(next(short for short, other in DTYPES.items() if other == found), found)


@contextmanager
def _silent() -> Iterator[None]:
    """Keeps from the user what torchao, which transformers loads too, says of kernels that it was not built for."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@_silent()
def load_text_encoder_as(
    precision: TextPrecision, source: str, max_length: int, device: torch.device, report: Report | None = None
) -> TextEncoder:
    """The encoder of a transformers folder or hub repository in that precision, fixed.

    Args, Raises: as `text.load_text_encoder`.
    """
    load = _load_int8 if precision.name == INT8 else load_text_encoder
    return load(source, max_length, device, precision.dtype, report).requires_grad_(False)


def _load_int8(
    source: str, max_length: int, device: torch.device, dtype: torch.dtype, report: Report | None = None
) -> TextEncoder:
    """Each weight is rounded as soon as it is read, so that no more than one is in memory with all its digits."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    folder = text_folder(source, report)
    model, tensors, _ = read_text_encoder(folder, source)
    for name, tensor in tensors.items():
        path, _, own = name.rpartition(".")
        module = model.get_submodule(path)
        # a copy, or the whole file would stay mapped for what is not rounded
        setattr(module, own, nn.Parameter(tensor.to(device, dtype, copy=True), requires_grad=False))
        if isinstance(module, nn.Linear):
            quantize_(module, Int8WeightOnlyConfig())
    model.set_input_embeddings(model.shared)  # type: ignore[no-untyped-call]
    return TextEncoder(model, load_vocabulary(folder), max_length).eval()
