"""Published Infinity state dicts to our names and back: one table, strict, reported both ways.

Source: INFINITY_FORMAT sections 2-4. The published loaders ignore unknown keys and keep missing ones at their
initialisation; here every key is accounted for, or the error names it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bitgen_cli.config import ModelConfig
from bitgen_cli.errors import InputError

TRANSFORMER_NAMES = {
    "cfg_uncond": "null_text",
    "pos_start": "start",
    "lvl_embed.weight": "scale_embedding.weight",
    "text_norm.weight": "text_norm",
    "text_proj_for_sos.ca.mat_q": "text_pool.query",
    "text_proj_for_sos.ca.mat_kv.weight": "text_pool.kv.weight",
    "text_proj_for_sos.ca.v_bias": "text_pool.v_bias",
    "text_proj_for_sos.ca.proj.weight": "text_pool.proj.weight",
    "text_proj_for_sos.ca.proj.bias": "text_pool.proj.bias",
    "text_proj_for_ca.0.weight": "text_proj.0.weight",
    "text_proj_for_ca.0.bias": "text_proj.0.bias",
    "text_proj_for_ca.2.weight": "text_proj.2.weight",
    "text_proj_for_ca.2.bias": "text_proj.2.bias",
    "word_embed.weight": "bit_embedding.weight",
    "word_embed.bias": "bit_embedding.bias",
    "shared_ada_lin.1.weight": "modulation.weight",
    "shared_ada_lin.1.bias": "modulation.bias",
    "head_nm.ada_lin.1.weight": "head_modulation.weight",
    "head_nm.ada_lin.1.bias": "head_modulation.bias",
    "head.weight": "head.weight",
    "head.bias": "head.bias",
}
"""Published names outside the blocks, and ours."""

BLOCK_NAMES = {
    "ada_gss": "modulation",
    "sa.mat_qkv.weight": "self_attention.qkv.weight",
    "sa.q_bias": "self_attention.q_bias",
    "sa.v_bias": "self_attention.v_bias",
    "sa.scale_mul_1H11": "self_attention.log_scale",
    "sa.proj.weight": "self_attention.proj.weight",
    "sa.proj.bias": "self_attention.proj.bias",
    "ca_norm.weight": "cross_norm.weight",
    "ca_norm.bias": "cross_norm.bias",
    "ca.mat_q.weight": "cross_attention.q.weight",
    "ca.mat_q.bias": "cross_attention.q.bias",
    "ca.mat_kv.weight": "cross_attention.kv.weight",
    "ca.v_bias": "cross_attention.v_bias",
    "ca.proj.weight": "cross_attention.proj.weight",
    "ca.proj.bias": "cross_attention.proj.bias",
    "ffn.fc1.weight": "ffn.up.weight",
    "ffn.fc1.bias": "ffn.up.bias",
    "ffn.fc2.weight": "ffn.down.weight",
    "ffn.fc2.bias": "ffn.down.bias",
}
"""Published names inside a block, and ours."""

_BLOCK = re.compile(r"^(?:block_chunks\.(\d+)\.module|blocks)\.(\d+)\.(.+)$")
_CONVOLUTION = re.compile(
    r"(conv_in|conv_out|conv1|conv2|nin_shortcut|downsample\.conv|upsample\.conv)\.conv\.(weight|bias)$"
)
_NORM = re.compile(r"(norm1|norm2|norm_out)\.norm\.(weight|bias)$")
_BUFFERS = ("quantizer.lfq.mask", "quantize.lfq.mask")
_DROPPED = ("lvl_1L", "attn_bias_for_masking", "Infinity_visible_kvlen", "Infinity_invisible_qlen")


def published_transformer_name(ours: str, config: ModelConfig) -> str:
    """The published name of one of our transformer tensors, in chunked form where the model has chunks."""
    if ours.startswith("blocks."):
        _, number, rest = ours.split(".", 2)
        published = {name: key for key, name in BLOCK_NAMES.items()}[rest]
        chunks = config.transformer.block_chunks
        if chunks == 1:
            return f"blocks.{number}.{published}"
        per_chunk = config.transformer.depth // chunks
        return f"block_chunks.{int(number) // per_chunk}.module.{int(number) % per_chunk}.{published}"
    return {name: key for key, name in TRANSFORMER_NAMES.items()}[ours]


def our_tokenizer_name(published: str) -> str:
    """Our name (plain LDM style) of a tokenizer tensor in nested published or in plain style."""
    plain = _CONVOLUTION.sub(r"\1.\2", published)
    return "autoencoder." + _NORM.sub(r"\1.\2", plain)


@dataclass(frozen=True)
class Renamed:
    """A published state dict in our names.

    Attributes:
        tensors: by our names.
        unknown: published names that we have none for.
        unneeded: published names of what follows from other tensors or is computed.
    """

    tensors: dict[str, Tensor]
    unknown: list[str]
    unneeded: list[str]


def renamed_transformer(published: Mapping[str, Tensor]) -> Renamed:
    """A published transformer, `block_chunks.*` or `blocks.*` keys, in our names.

    Raises:
        InputError: non-zero key biases.
    """
    per_chunk = 1 + max((int(m[2]) for m in map(_BLOCK.match, published) if m and m[1] is not None), default=0)
    found = Renamed({}, [], [])
    for key, tensor in published.items():
        ours = _our_transformer_name(key, per_chunk)
        if key in _DROPPED:
            found.unneeded.append(key)
        elif key.endswith(".zero_k_bias"):
            if torch.any(tensor != 0):
                raise InputError(f"{key} is not zero", "this is not a published Infinity transformer")
            found.unneeded.append(key)
        elif ours is None:
            found.unknown.append(key)
        else:
            found.tensors[ours] = tensor
    return found


def _our_transformer_name(published: str, per_chunk: int) -> str | None:
    """Our name of a published transformer tensor; None when we have no such tensor."""
    block = _BLOCK.match(published)
    if block is None:
        return TRANSFORMER_NAMES.get(published)
    chunk, index, rest = block.groups()
    number = int(index) + (int(chunk) * per_chunk if chunk is not None else 0)
    ours = BLOCK_NAMES.get(rest)
    return None if ours is None else f"blocks.{number}.{ours}"


def renamed_tokenizer(published: Mapping[str, Tensor]) -> Renamed:
    """A published tokenizer, nested or plain names, in our names."""
    unneeded = [key for key in published if key in _BUFFERS]
    tensors = {our_tokenizer_name(key): tensor for key, tensor in published.items() if key not in _BUFFERS}
    return Renamed(tensors, [], unneeded)


def transformer_state(published: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict of a published transformer state dict.

    Args:
        published: flat dict of tensors, block_chunks.* or blocks.* keys.
        expected: our state dict (meta tensors will do): names and shapes to meet. The unconditional prompt may be of
            another length, see `fit_rows`.

    Raises:
        InputError: unknown, missing or misshapen tensors, all of them named; non-zero key biases.
    """
    found = renamed_transformer(published)
    if "null_text" in found.tensors and "null_text" in expected:
        found.tensors["null_text"] = fit_rows(found.tensors["null_text"], expected["null_text"])
    require_match(found.tensors, expected, found.unknown, "transformer")
    return found.tensors


def tokenizer_state(published: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict of a published tokenizer state dict (nested or plain names).

    Raises:
        InputError: unknown, missing or misshapen tensors, all of them named.
    """
    found = renamed_tokenizer(published)
    require_match(found.tensors, expected, found.unknown, "tokenizer")
    return found.tensors


def require_match(
    given: Mapping[str, Tensor], expected: Mapping[str, Tensor], unknown: Iterable[str], what: str
) -> None:
    """Raises InputError naming what is unknown, missing or misshapen in `given` against `expected`."""
    problems = [f"unknown {key}" for key in unknown]
    problems += [f"unknown {key}" for key in given.keys() - expected.keys()]
    problems += [f"missing {key}" for key in expected.keys() - given.keys()]
    problems += [
        f"{key} is {tuple(given[key].shape)}, needs {tuple(expected[key].shape)}"
        for key in given.keys() & expected.keys()
        if given[key].shape != expected[key].shape
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise InputError(f"these weights are not of this {what}: {shown}", "is it the right file and preset?")


def fit_rows(table: Tensor, expected: Tensor) -> Tensor:
    """A table (rows, channels) with as many rows as another one: cut, or the missing ones taken from there.

    On the meta device there is nothing to take: they are zero.
    """
    rows = expected.shape[0]
    if table.shape[0] >= rows:
        return table[:rows]
    if expected.is_meta:
        return F.pad(table, (0, 0, 0, rows - table.shape[0]))
    return torch.cat((table, expected[table.shape[0] :].to(table)))
