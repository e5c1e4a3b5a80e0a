"""What geometry weights are of, read off their shapes: published files do not say it themselves."""

from __future__ import annotations

import re
from collections.abc import Mapping

from pydantic import ValidationError
from torch import Tensor

from bitgen_cli.config import TokenizerConfig, TransformerConfig
from bitgen_cli.errors import InputError

PUBLISHED_RATIO = 4.0
"""Feed-forward width / width of every published transformer."""


def tokenizer_geometry(tensors: Mapping[str, Tensor], source: str) -> TokenizerConfig:
    """The geometry of a tokenizer's weights; GroupNorm as published, which leaves no trace in them.

    Args:
        tensors: by our names.
        source: for errors.

    Raises:
        InputError: the shapes are those of no tokenizer.
    """
    try:
        base = tensors["autoencoder.encoder.conv_in.weight"].shape[0]
        levels = _count(tensors, r"autoencoder\.encoder\.down\.(\d+)\.")
        return TokenizerConfig(
            bits=tensors["autoencoder.encoder.conv_out.weight"].shape[0],
            patch_size=2 ** (levels - 1),
            base_channels=base,
            channel_multipliers=[
                tensors[f"autoencoder.encoder.down.{level}.block.0.conv1.weight"].shape[0] // base
                for level in range(levels)
            ],
            res_blocks=_count(tensors, r"autoencoder\.encoder\.down\.0\.block\.(\d+)\."),
        )
    except (KeyError, IndexError, ValidationError) as error:
        raise _none(source, "tokenizer", error) from error


def transformer_geometry(tensors: Mapping[str, Tensor], bits: int | None, source: str) -> TransformerConfig:
    """The geometry of a transformer's weights.

    Args:
        tensors: by our names.
        bits: of the tokenizer it belongs to; None where that is not known, which counts as not patchified.
        source: for errors.

    Raises:
        InputError: the shapes are those of no transformer, or of one for another number of bits.
    """
    predicted = bits_per_position(tensors, source)
    if bits is not None and predicted not in (bits, 4 * bits):
        raise InputError(
            f"{source} predicts {predicted} bits per position, the tokenizer has {bits}",
            f"a tokenizer of {predicted} bits belongs to it, or of a quarter of them with half the stride",
        )
    try:
        width = tensors["bit_embedding.weight"].shape[0]
        inner = tensors["blocks.0.ffn.up.weight"].shape[0]
        is_published = inner == round(PUBLISHED_RATIO * width / 256) * 256
        return TransformerConfig(
            depth=_count(tensors, r"blocks\.(\d+)\."),
            width=width,
            heads=tensors["blocks.0.self_attention.log_scale"].numel(),
            ffn_ratio=PUBLISHED_RATIO if is_published else inner / width,
            text_width=tensors["null_text"].shape[1],
            text_length=tensors["null_text"].shape[0],
            patchify=bits is not None and predicted == 4 * bits,
            scale_embeddings=tensors["scale_embedding.weight"].shape[0],
        )
    except (KeyError, IndexError, ValidationError) as error:
        raise _none(source, "transformer", error) from error


def bits_per_position(tensors: Mapping[str, Tensor], source: str) -> int:
    """Bits that a transformer's weights predict per position.

    Raises:
        InputError: they are no transformer's.
    """
    embedding = tensors.get("bit_embedding.weight")
    if embedding is None or embedding.ndim != 2:
        raise InputError(f"{source} holds no Infinity transformer: the embedding of bits is missing")
    return embedding.shape[1]


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    """How many of something are numbered from 0 in names."""
    numbers = {int(found[1]) for found in map(re.compile(pattern).match, tensors) if found}
    return len(numbers)


def _none(source: str, part: str, error: Exception) -> InputError:
    reason = str(error).splitlines()[0]
    return InputError(f"{source} holds no {part} of a geometry that bitgen knows: {reason}")
