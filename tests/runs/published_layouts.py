"""Random weights in the published layouts at reduced size, and the catalogue entries that say so."""

from __future__ import annotations

import io
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from bitgen_cli.config import TextEncoderConfig
from bitgen_cli.engine.tensors import weights
from bitgen_cli.engine.text import TextEncoder, new_text_encoder
from bitgen_cli.runs.published import REPOSITORY, Published

PARITY = Path(__file__).parents[1] / "parity" / "weights"
T5 = "google/flan-t5-xl"
TEXT_LENGTH = 32
_COMMON = (
    "model.tokenizer.base_channels=32",
    "model.tokenizer.res_blocks=1",
    "model.transformer.width=128",
    "model.transformer.heads=2",
    "model.transformer.text_width=256",
    f"model.transformer.text_length={TEXT_LENGTH}",
    "model.scales.resolution=0.06M",
    "sampling.cfg=1",
)
_PLAIN = (
    "model.tokenizer.channel_multipliers=[1,1,1,2,1]",
    "model.transformer.depth=4",
    "model.transformer.block_chunks=2",
)
_PATCHIFIED = (
    "model.tokenizer.channel_multipliers=[1,1,2,1]",
    "model.transformer.depth=3",
    "model.transformer.block_chunks=3",
)
SMALLER = {
    "infinity-2b": Published("infinity-2b", "infinity_vae_d32reg.pth", "infinity_2b_reg.pth", _COMMON + _PLAIN),
    "infinity-8b": Published(
        "infinity-8b", "infinity_vae_d56_f8_14_patchify.pth", "infinity_8b_weights", _COMMON + _PATCHIFIED
    ),
    "infinity-vae-d64": Published("64bit", "infinity_vae_d64.pth", overrides=_COMMON[:2] + _PLAIN[:1]),
}
"""The catalogue's entries, of these weights' geometry."""


@cache
def weights_of(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Weights in published names; buffers keep their type."""
    stored = load_file(PARITY / f"{name}.safetensors")
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in stored.items()}


def torch_file(content: Any) -> bytes:
    """A file as torch.save writes it."""
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def sharded(tensors: dict[str, Tensor], suffix: str, folder: str = "") -> dict[str, bytes]:
    """Two shards and their index, as transformers writes them."""
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names, files, where = sorted(tensors), {}, {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        name = f"{stem}-0000{number}-of-00002.{suffix}"
        shard = {key: tensors[key] for key in part}
        files[folder + name] = save(shard, {"format": "pt"}) if suffix == "safetensors" else torch_file(shard)
        where |= dict.fromkeys(part, name)
    files[f"{folder}{stem}.{suffix}.index.json"] = json.dumps({"metadata": {}, "weight_map": where}).encode()
    return files


def plain_blocks(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same transformer in `blocks.*` names."""
    places = [re.match(r"block_chunks\.(\d+)\.module\.(\d+)", key) for key in tensors]
    per_chunk = 1 + max(int(found[2]) for found in places if found)

    def renamed(key: str) -> str:
        return re.sub(
            r"^block_chunks\.(\d+)\.module\.(\d+)", lambda m: f"blocks.{int(m[1]) * per_chunk + int(m[2])}", key
        )

    return {renamed(key): value for key, value in tensors.items()}


def plain_tokenizer(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tokenizer in the plain names of latent diffusion."""
    return {re.sub(r"\.(conv|norm)\.(weight|bias)$", r".\2", key): value for key, value in tensors.items()}


@cache
def _encoder() -> TextEncoder:
    config = TextEncoderConfig(source="new", vocabulary=120, width=256, layers=1, heads=2, ffn_width=64)
    return new_text_encoder(config, ["a red dog on the moon", "a cat in the snow"], TEXT_LENGTH, 0)


def weights_of_text_encoder() -> dict[str, Tensor]:
    """The weights of the encoder in `text_encoder`."""
    return {name: value.detach().clone() for name, value in weights(_encoder().model).items()}


@cache
def text_encoder() -> dict[str, bytes]:
    """A whole T5 in shards with its configuration and vocabulary, 256 channels wide."""
    encoder, tensors = _encoder(), weights_of_text_encoder()
    half = {name.replace("encoder.", "decoder.", 1): value + 1 for name, value in tensors.items() if "encoder." in name}
    whole = tensors | half | {"lm_head.weight": tensors["shared.weight"] + 1}
    described = encoder.model.config.to_dict() | {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
    files = sharded({name: value.contiguous() for name, value in whole.items()}, "safetensors")
    files["config.json"] = json.dumps(described).encode()
    return files | {"tokenizer.json": encoder.vocabulary.to_str().encode()}


def repositories() -> dict[str, dict[str, bytes]]:
    """What the hub has: the model of every layout, and the text encoder."""
    plain, patchified = weights_of("transformer_tiny"), weights_of("transformer_patchify", torch.bfloat16)
    infinity = {
        "infinity_2b_reg.pth": torch_file(plain),
        "infinity_vae_d32reg.pth": torch_file({"vae": weights_of("tok_d32"), "ema": {}}),
        "infinity_vae_d56_f8_14_patchify.pth": torch_file({"vae": plain_tokenizer(weights_of("tok_d14_f8"))}),
        "infinity_vae_d64.pth": torch_file({"vae": weights_of("tok_d64")}),
        "README.md": b"# Infinity",
        **sharded(patchified, "bin", "infinity_8b_weights/"),
    }
    return {REPOSITORY: infinity, T5: dict(text_encoder())}
