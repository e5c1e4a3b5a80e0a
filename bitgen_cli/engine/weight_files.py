"""Weight files of other programs and of our model folders: which parts they hold, and their tensors.

Read are safetensors files and torch's own, whole or in shards with an index. Nothing but tensors is ever unpickled.

Source of the published layouts: INFINITY_FORMAT section 2.
"""

from __future__ import annotations

import pickle
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bitgen_cli.engine.infinity_weights import Renamed, renamed_tokenizer, renamed_transformer
from bitgen_cli.errors import InputError, ResourceError
from bitgen_cli.files import explain, read_json

TOKENIZER, TRANSFORMER = "tokenizer", "transformer"
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
INDEX_SUFFIX = ".index.json"
FOLDER_NAMES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
"""What transformers calls the weights of a folder; the first that is there is taken."""
LARGEST_INDEX = 64 * 2**20
"""Bytes of an index of shards that are read."""

_TRAINED, _AVERAGED = ("gpt_fsdp", "gpt_wo_ddp"), ("gpt_ema_fsdp", "gpt_ema_for_vis")
"""Where a checkpoint of the published trainer keeps the transformer, and its averaged weights."""
_OURS = {TRANSFORMER: "bit_embedding.weight", TOKENIZER: "autoencoder.encoder.conv_in.weight"}
"""A name that only weights in our names have."""
_PUBLISHED = {
    TRANSFORMER: re.compile(r"^(word_embed\.|pos_start$|block_chunks\.|blocks\.\d+\.(sa|ca|ffn)\.)"),
    TOKENIZER: re.compile(r"^(encoder|decoder)\."),
}


@dataclass(frozen=True)
class PartWeights:
    """The weights of one part in our names, memory-mapped where the file allows it.

    Attributes:
        part: `tokenizer` or `transformer`.
        source: where they come from, for people.
        renamed: the tensors, and the names that have no place with us.
    """

    part: str
    source: str
    renamed: Renamed


def is_weight_file(path: Path) -> bool:
    """Whether a path is a file of weights, an index of shards, or a folder with such an index."""
    if path.is_dir():
        return any(path.glob(f"*{INDEX_SUFFIX}"))
    return path.name.endswith((*SUFFIXES, INDEX_SUFFIX))


def read_weight_file(path: Path, *, averaged: bool = False) -> list[PartWeights]:
    """The parts a file of weights holds.

    Args:
        path: a file, an index of shards, or a folder with one.
        averaged: take the averaged weights of a trainer's checkpoint, not the trained ones.

    Raises:
        InputError: missing or damaged, holds other things than tensors, or no part of a model.
    """
    parts = _parts(path, read_content(path), averaged=averaged)
    return [_renamed(part, source, _tensors(state, source)) for part, source, state in parts]


def read_content(path: Path) -> dict[str, Any]:
    """What a file, an index of shards or a folder with one holds, by the names it has there.

    Raises:
        InputError: missing or damaged, or holds other things than tensors.
    """
    return _read_shards(path) if path.is_dir() or path.name.endswith(INDEX_SUFFIX) else _read(path)


def find_index(path: Path) -> Path:
    """The index of shards that a path is, or that a folder has.

    Raises:
        InputError: there is none, or several.
    """
    indices = sorted(path.glob(f"*{INDEX_SUFFIX}")) if path.is_dir() else [path]
    if len(indices) != 1:
        raise InputError(f"{path} holds {len(indices)} indices of shards: which one?", "name the file")
    return indices[0]


def shard_names(index: Path) -> list[str]:
    """The files of an index of shards, all of which must lie beside it.

    Raises:
        InputError: it is no such index, or names other places.
    """
    return sorted(set(_weight_map(index).values()))


def _parts(path: Path, content: Mapping[str, Any], *, averaged: bool) -> list[tuple[str, str, Mapping[str, Any]]]:
    """Part, source and state dict of everything in a file."""
    inner = content.get("trainer")
    if isinstance(inner, Mapping):
        wanted = _AVERAGED if averaged else _TRAINED
        found = [(TRANSFORMER, key) for key in wanted if isinstance(inner.get(key), Mapping)][:1]
        if not found:
            raise InputError(f"{path} holds no {'averaged ' if averaged else ''}transformer: {_some(inner)}")
        if isinstance(inner.get("vae_local"), Mapping):
            found.append((TOKENIZER, "vae_local"))
        return [(part, f"{path} ({key})", inner[key]) for part, key in found]
    if averaged:
        raise InputError(f"{path} holds no averaged weights", "only checkpoints of the published trainer do")
    if isinstance(content.get("vae"), Mapping):
        return [(TOKENIZER, str(path), content["vae"])]
    for part, names in _PUBLISHED.items():
        if _OURS[part] in content or any(names.match(key) for key in content):
            return [(part, str(path), content)]
    raise InputError(f"{path} holds neither a tokenizer nor a transformer: {_some(content)}")


def _some(names: Iterable[str]) -> str:
    """The first names, for an error."""
    listed = list(map(str, names))
    return f"it has {', '.join(listed[:4])}{' ...' if len(listed) > 4 else ''}" if listed else "it is empty"


def _renamed(part: str, source: str, tensors: dict[str, Tensor]) -> PartWeights:
    if _OURS[part] in tensors:
        return PartWeights(part, source, Renamed(tensors, [], []))
    renamed = renamed_transformer(tensors) if part == TRANSFORMER else renamed_tokenizer(tensors)
    return PartWeights(part, source, renamed)


def _tensors(state: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """The state dict, all of it plain tensors."""
    for key, value in state.items():
        plain = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized
        if not isinstance(key, str) or not plain:
            raise InputError(f"{source}: {key!r} is no plain tensor", "save the state dict alone")
    return dict(state)


def _read_shards(path: Path) -> dict[str, Any]:
    """All shards of an index."""
    index = find_index(path)
    names = _weight_map(index)
    found: dict[str, Any] = {}
    for name in sorted(set(names.values())):
        found.update(_read(index.parent / name))
    missing = sorted(names.keys() - found.keys())
    if missing:
        raise InputError(f"the shards of {index} lack {len(missing)} tensors: {', '.join(missing[:4])}")
    return found


def _weight_map(index: Path) -> dict[str, str]:
    """Tensors by name, and the file beside the index that each is in."""
    try:
        size = index.stat().st_size
    except OSError as error:
        raise explain(error, index, "read") from error
    if size > LARGEST_INDEX:
        raise InputError(f"{index} is too large for an index of shards: {size} bytes")
    stored = read_json(index)
    names = stored.get("weight_map") if isinstance(stored, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise InputError(f"{index} is no index of shards: weight_map is missing")
    for name in names.values():
        if Path(name).name != name or not name.endswith(SUFFIXES):
            raise InputError(f"{index} names {name!r}, which is no weight file beside it")
    return names


def _read(file: Path) -> dict[str, Any]:
    """What a file holds; tensors stay on disk until they are used, where the file allows it."""
    if not file.is_file():
        raise InputError(f"no file of weights at {file}")
    try:
        if file.suffix == ".safetensors":
            with safe_open(str(file), framework="pt") as stored:
                return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        content = _load(file)
    except SafetensorError as error:
        raise InputError(f"{file} is not a readable safetensors file: {error}") from error
    except OSError as error:
        raise explain(error, file, "read") from error
    except MemoryError as error:
        raise ResourceError(f"{file} asks for more memory than there is", "is it the whole file, as it was?") from error
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{file} holds other things than tensors, or is damaged; they are not opened", "save the state dict alone"
        ) from error
    except (KeyError, IndexError, AssertionError, struct.error) as error:
        # of torch's reader: the byte or the place that it stumbled over
        raise InputError(f"{file} is not a readable file of weights: torch did not write it") from error
    except (RuntimeError, EOFError, ValueError, TypeError, AttributeError) as error:
        reason = (str(error).splitlines() or ["it ends too early"])[0]
        raise InputError(f"{file} is not a readable file of weights: {reason}") from error
    if not isinstance(content, Mapping):
        raise InputError(f"{file} holds no named tensors")
    return dict(content)


def _load(file: Path) -> Any:
    with file.open("rb") as stream:
        is_archive = stream.read(4) == b"PK\x03\x04"  # files of torch before 1.6 are none and cannot be mapped
    return torch.load(file, map_location="cpu", weights_only=True, mmap=is_archive)
