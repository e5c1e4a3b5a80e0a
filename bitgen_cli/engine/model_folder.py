"""The model folder: configuration, tokenizer, transformer and text encoder under one roof, with fingerprints.

    config.json               {"format": 1, "config": ..., "fingerprints": ...}
    tokenizer.safetensors     autoencoder weights
    transformer.safetensors   absent while only the tokenizer is trained
    text_encoder/             a transformers folder; absent when the configuration names a hub repository
    origin.json               only of a model made from published files: which, and what became of every key
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from bitgen_cli.config import ModelConfig, SamplingConfig
from bitgen_cli.engine.infinity_weights import require_match
from bitgen_cli.engine.streaming import StreamedBlocks, at_home
from bitgen_cli.engine.tensors import Unfilled, save_tensors, weights
from bitgen_cli.engine.text import TextEncoder, load_text_encoder
from bitgen_cli.engine.tokenizer import Tokenizer
from bitgen_cli.engine.transformer import Transformer
from bitgen_cli.errors import InputError, UsageError
from bitgen_cli.files import atomic_folder, explain, read_json, write_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FORMAT = 1
BUILT_IN = "demo"
TOKENIZER_FILE = "tokenizer.safetensors"
TRANSFORMER_FILE = "transformer.safetensors"
TEXT_FOLDER = "text_encoder"
ORIGIN_FILE = "origin.json"
_INCIDENTAL = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")
"""Values of a text encoder's configuration that say how it came to be."""


@dataclass
class Model:
    """A loaded model; parts not asked for, or not there, are None.

    Attributes:
        folder: where it was loaded from.
        config: what defines it.
        sampling: defaults it was saved with.
        fingerprints: sha256 of each part's file, for example `tokenizer`.
        revisions: repositories of the hub that parts were fetched from, and the commit of each.
    """

    folder: Path
    config: ModelConfig
    sampling: SamplingConfig
    fingerprints: dict[str, str]
    tokenizer: Tokenizer | None = None
    transformer: Transformer | None = None
    text_encoder: TextEncoder | None = None
    revisions: Mapping[str, str] = field(default_factory=dict)


def find_model(name: str) -> Path:
    """The folder of a model: `demo` is the built-in one; else a model folder, or a run folder that left one.

    A folder of yours that is called demo is named ./demo.

    Raises:
        InputError: there is none.
    """
    if name == BUILT_IN:
        return Path(__file__).parent.parent / "demo" / "model"
    folder = Path(name)
    for candidate in (folder / "model", folder):
        if (candidate / TOKENIZER_FILE).is_file():
            return candidate
    if not folder.exists():
        raise InputError(f"no model at {name}", "give a model folder, a run folder, or demo")
    raise InputError(f"{name} holds no model: {TOKENIZER_FILE} is missing", "has the run saved one yet?")


def model_name(folder: Path) -> str:
    """What a model folder is called: its own name, or that of the run it lies in."""
    folder = folder.absolute()
    return folder.parent.name or folder.name if folder.name == "model" else folder.name


def fingerprint(path: Path) -> str:
    """The sha256 of a file, or of the files of a folder (names and contents), as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    for file in files:
        if file != path:
            digest.update(file.relative_to(path).as_posix().encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def save_model(
    folder: Path,
    config: ModelConfig,
    sampling: SamplingConfig,
    *,
    tokenizer: Tokenizer | Path,
    transformer: Transformer | None = None,
    text_encoder: TextEncoder | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes a model folder whole or not at all.

    Args:
        folder: replaced when it is there.
        config, sampling: stored resolved.
        tokenizer: weights, or the tokenizer file of another model folder, copied byte for byte so that token stores
            made with it stay valid.
        transformer, text_encoder: left out when None.
        dtype: number type of the stored weights.

    Raises:
        ResourceError: no space left; an older folder is as it was.
        InputError: not allowed to write there.
    """
    with atomic_folder(folder) as temporary:
        parts = {}
        if isinstance(tokenizer, Path):
            shutil.copyfile(tokenizer, temporary / TOKENIZER_FILE)
        else:
            save_tensors(weights(tokenizer), temporary / TOKENIZER_FILE, dtype)
        parts["tokenizer"] = fingerprint(temporary / TOKENIZER_FILE)
        if transformer is not None:
            save_tensors(weights(transformer), temporary / TRANSFORMER_FILE, dtype)
            parts["transformer"] = fingerprint(temporary / TRANSFORMER_FILE)
        if text_encoder is not None:
            _save_text_encoder(text_encoder, temporary / TEXT_FOLDER, dtype)
            parts["text_encoder"] = fingerprint(temporary / TEXT_FOLDER)
        describe_model(temporary, config, sampling, parts)


def describe_model(
    folder: Path, config: ModelConfig, sampling: SamplingConfig, fingerprints: Mapping[str, str]
) -> None:
    """Writes config.json of a model folder, whole or not at all.

    Args:
        folder: whose parts are there.
        config, sampling: stored resolved.
        fingerprints: of each part.
    """
    stored = {"model": config.model_dump(mode="json"), "sampling": sampling.model_dump(mode="json")}
    write_json(folder / "config.json", {"format": FORMAT, "config": stored, "fingerprints": dict(fingerprints)})


def read_model_config(folder: Path) -> tuple[ModelConfig, SamplingConfig, dict[str, str]]:
    """Configuration, sampling defaults and fingerprints of a model folder, without its weights.

    Raises:
        InputError: not a model folder, or its config.json is broken or of another format.
    """
    file = folder / "config.json"
    stored = read_json(file)
    try:
        if stored["format"] != FORMAT:
            raise InputError(f"{file} is of format {stored['format']}, this bitgen reads {FORMAT}")
        config = ModelConfig.model_validate(stored["config"]["model"])
        sampling = SamplingConfig.model_validate(stored["config"]["sampling"])
        fingerprints = {str(part): str(value) for part, value in stored["fingerprints"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{file} does not describe a model: {reason}") from error
    return config, sampling, fingerprints


@dataclass(frozen=True)
class Origin:
    """Where the parts of a model that was made from published files come from.

    Attributes:
        revisions: repositories of the hub, and the commit of each that is used.
        files: files of the user's own, by their paths: bytes and time of the last change in nanoseconds.
        reports: of each part, what became of every key (beginning.PartReport).
    """

    revisions: dict[str, str] = field(default_factory=dict)
    files: dict[str, list[int]] = field(default_factory=dict)
    reports: dict[str, Any] = field(default_factory=dict)


def read_origin(folder: Path) -> Origin:
    """Where a model comes from; empty for one that was trained here.

    Raises:
        InputError: its origin.json is damaged.
    """
    file = folder / ORIGIN_FILE
    if not file.is_file():
        return Origin()
    stored = read_json(file)
    names = Origin.__dataclass_fields__.keys()
    if not isinstance(stored, dict) or stored.keys() != names or not all(isinstance(v, dict) for v in stored.values()):
        raise InputError(f"{file} is damaged: it must hold {', '.join(names)}")
    return Origin(**stored)


def write_origin(folder: Path, origin: Origin) -> None:
    """Keeps where a model comes from, whole or not at all."""
    write_json(folder / ORIGIN_FILE, vars(origin))


def load_model(
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    parts: tuple[str, ...] = ("tokenizer", "transformer", "text_encoder"),
    waiting: Sequence[int] = (),
) -> Model:
    """Loads the named parts of a model folder, in evaluation mode, without gradients.

    Modules are built on the meta device and filled from memory-mapped files.

    Args:
        folder: from `find_model`.
        device, dtype: where the weights go and as what.
        parts: of `tokenizer`, `transformer`, `text_encoder`; one that is not in the folder stays None.
        waiting: blocks of the transformer whose weights take turns on the device (streaming.py).

    Raises:
        InputError: the folder is no model, a file is corrupt, or its weights belong to another geometry.
    """
    device = torch.device(device)
    config, sampling, fingerprints = read_model_config(folder)
    model = Model(folder, config, sampling, fingerprints, revisions=read_origin(folder).revisions)
    if "tokenizer" in parts:
        with torch.device("meta"), Unfilled():
            model.tokenizer = Tokenizer(config.tokenizer)
        _fill(model.tokenizer, folder / TOKENIZER_FILE, device, dtype)
    if "transformer" in parts and (folder / TRANSFORMER_FILE).is_file():
        with torch.device("meta"), Unfilled():
            model.transformer = Transformer(config)
        homes = tuple(f"blocks.{index}." for index in waiting)
        _fill(model.transformer, folder / TRANSFORMER_FILE, device, dtype, homes)
        if waiting:
            model.transformer.in_turn = StreamedBlocks(list(model.transformer.each_block), waiting, device)
    source = text_source(folder, config)
    if "text_encoder" in parts and source is not None:
        encoder = load_text_encoder(source, config.transformer.text_length, device, dtype)
        model.text_encoder = encoder.requires_grad_(False)
    return model


def text_source(folder: Path, config: ModelConfig) -> str | None:
    """Where a model's text encoder is: its own folder, or what the configuration names; None while it has none."""
    own = folder / TEXT_FOLDER
    if own.is_dir():
        return os.fspath(own)
    return None if config.text_encoder.source == "new" else config.text_encoder.source


def read_tensors(
    file: Path,
    expected: dict[str, Tensor],
    device: torch.device,
    dtype: torch.dtype,
    waiting: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """Tensors of a memory-mapped safetensors file, matched against names and shapes.

    Args:
        file: which.
        expected: name to a tensor of the right shape.
        device, dtype: where they go and as what.
        waiting: what the names of those begin with that wait for the device in the CPU's memory.

    Raises:
        InputError: missing or corrupt file; unknown, missing or misshapen tensors.
    """
    try:
        with safe_open(str(file), framework="pt") as stored:
            tensors = {
                name: at_home(stored.get_tensor(name).to(dtype=dtype), device)
                if name.startswith(waiting)
                else stored.get_tensor(name).to(device, dtype)
                for name in stored.keys()  # noqa: SIM118
            }
    except SafetensorError as error:
        raise InputError(f"{file} is not a readable safetensors file: {error}") from error
    except OSError as error:
        raise explain(error, file, "read") from error
    require_match(tensors, expected, [], file.stem)
    return tensors


def require_same_tokenizer(model: Model, other: str, what: str) -> None:
    """Raises UsageError when `what` (for example a token store) was made with a tokenizer of another fingerprint."""
    own = model.fingerprints["tokenizer"]
    if own != other:
        raise UsageError(
            f"{what} was made with another tokenizer ({other[:12]}) than the one of {model.folder} ({own[:12]})",
            "tokenize again with this model, or use the model it was made with",
        )


def _fill(
    module: nn.Module, file: Path, device: torch.device, dtype: torch.dtype, waiting: tuple[str, ...] = ()
) -> None:
    tensors = read_tensors(file, module.state_dict(), device, dtype, waiting)
    module.load_state_dict(tensors, assign=True)
    module.eval().requires_grad_(False)


def _save_text_encoder(encoder: TextEncoder, folder: Path, dtype: torch.dtype) -> None:
    folder.mkdir()
    describe_text_encoder(folder, encoder.model.config)
    save_tensors(weights(encoder.model), folder / "model.safetensors", dtype, metadata={"format": "pt"})
    encoder.vocabulary.save(str(folder / "tokenizer.json"))


def describe_text_encoder(folder: Path, config: PretrainedConfig) -> None:
    """Writes config.json of a text encoder: only what defines it.

    Where it was loaded from, and as what, must not change its fingerprint.
    """
    values = {name: value for name, value in config.to_diff_dict().items() if name not in _INCIDENTAL}
    write_json(folder / "config.json", values)
