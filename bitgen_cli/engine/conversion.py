"""Published weights to the parts of a model folder: every key accounted for, one tensor in memory at a time."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bitgen_cli.config import ModelConfig
from bitgen_cli.engine.beginning import PartReport, account
from bitgen_cli.engine.infinity_weights import fit_rows, require_match
from bitgen_cli.engine.model_folder import describe_text_encoder
from bitgen_cli.engine.tensors import Unfilled, stream_tensors, weights
from bitgen_cli.engine.tokenizer import Tokenizer
from bitgen_cli.engine.transformer import Transformer
from bitgen_cli.engine.weight_files import FOLDER_NAMES, TOKENIZER, TRANSFORMER, PartWeights, read_content
from bitgen_cli.errors import InputError
from bitgen_cli.files import atomic_folder, atomic_path, read_json

if TYPE_CHECKING:
    from transformers import T5EncoderModel

TEXT_ENCODER = "text_encoder"
TOKENIZER_DTYPE = torch.float32
"""A tokenizer's bits are signs: they are decided in the numbers it was trained with."""
WEIGHTS_DTYPE = torch.bfloat16
"""Of transformers and text encoders, as the published programs compute."""
TEXT_CONFIG, VOCABULARY = "config.json", "tokenizer.json"

_OTHER_HALF = ("decoder.", "lm_head.")
"""Beginnings of the names of a T5 that its encoder does without."""
_ALIAS = "encoder.embed_tokens.weight"
"""Another name of a T5's embeddings."""

Advance = Callable[[int], None]


def write_tokenizer(found: PartWeights, config: ModelConfig, file: Path, advance: Advance | None = None) -> PartReport:
    """Writes the tokenizer of a model folder, whole or not at all.

    Args:
        found: the published weights.
        config: the geometry they must have.
        file: to write.
        advance: is told bytes that are written.

    Raises:
        InputError: keys are unknown, missing or misshapen.
        ResourceError: no space left.
    """
    with torch.device("meta"), Unfilled():
        expected = Tokenizer(config.tokenizer).state_dict()
    report = PartReport(TOKENIZER, found.source)
    return _write(found, dict(found.renamed.tensors), expected, report, file, TOKENIZER_DTYPE, advance)


def write_transformer(
    found: PartWeights, config: ModelConfig, file: Path, advance: Advance | None = None
) -> PartReport:
    """Writes the transformer of a model folder, whole or not at all; the unconditional prompt gets the model's length.

    Args, Raises: as `write_tokenizer`.
    """
    with torch.device("meta"), Unfilled():
        expected = Transformer(config).state_dict()
    report = PartReport(TRANSFORMER, found.source)
    tensors = dict(found.renamed.tensors)
    prompt, rows = tensors.get("null_text"), config.transformer.text_length
    if prompt is not None and prompt.ndim == 2 and len(prompt) != rows:
        tensors["null_text"] = fit_rows(prompt, _fresh_prompt(rows, prompt.shape[1]))
        report.adapted["null_text"] = f"{len(prompt)} rows to {rows}"
    return _write(found, tensors, expected, report, file, WEIGHTS_DTYPE, advance)


def write_text_encoder(source: Path, name: str, width: int, folder: Path, advance: Advance | None = None) -> PartReport:
    """Writes the encoder of a T5 as the text encoder of a model folder, whole or not at all.

    Args:
        source: folder with its config.json, tokenizer.json and weights, which may be those of a whole T5.
        name: what it is called, for people.
        width: channels the transformer takes.
        folder: to write.
        advance: is told bytes that are written.

    Raises:
        InputError: it is no T5, is of another width, or keys are unknown, missing or misshapen.
        ResourceError: no space left.
    """
    model, tensors, report = read_text_encoder(source, name)
    if model.config.d_model != width:
        raise InputError(f"the text encoder {name} has {model.config.d_model} channels, the transformer takes {width}")
    with atomic_folder(folder) as temporary:
        describe_text_encoder(temporary, model.config)
        shutil.copyfile(source / VOCABULARY, temporary / VOCABULARY)
        stream_tensors(tensors, temporary / "model.safetensors", WEIGHTS_DTYPE, {"format": "pt"}, advance)
    return report


def read_text_encoder(source: Path, name: str) -> tuple[T5EncoderModel, dict[str, Tensor], PartReport]:
    """The encoder of a T5 on the meta device, its weights by their names in it, and what became of every key.

    Args:
        source: folder with its config.json and weights, which may be those of a whole T5.
        name: what it is called, for people.

    Raises:
        InputError: it is no T5, or keys are unknown, missing or misshapen.
    """
    from transformers import T5Config, T5EncoderModel

    stored = read_json(source / TEXT_CONFIG)
    if not is_t5(stored):
        raise InputError(f"{source / TEXT_CONFIG} does not describe a T5", "text encoders of Infinity are T5s")
    with torch.device("meta"), Unfilled():
        model = T5EncoderModel(T5Config.from_dict(stored))
    tensors = read_content(text_weights(source))
    report = PartReport(TEXT_ENCODER, name)
    for key in list(tensors):
        if key.startswith(_OTHER_HALF) or (key == _ALIAS and "shared.weight" in tensors):
            report.unneeded.append(key)
            del tensors[key]
    if _ALIAS in tensors:
        tensors["shared.weight"] = tensors.pop(_ALIAS)
    expected = weights(model)
    account(expected, tensors, report)
    require_match(tensors, expected, [], f"text encoder ({name})")
    return model, tensors, report


def is_t5(config: object) -> bool:
    """Whether the value of a config.json describes a T5."""
    return isinstance(config, dict) and config.get("model_type") == "t5"


def text_weights(folder: Path) -> Path:
    """The weights of a text encoder's folder: a file, or an index of shards.

    Raises:
        InputError: there are none.
    """
    found = next((folder / name for name in FOLDER_NAMES if (folder / name).is_file()), None)
    if found is None:
        raise InputError(f"{folder} holds no weights of a text encoder", f"they are called {' or '.join(FOLDER_NAMES)}")
    return found


def _write(
    found: PartWeights,
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    report: PartReport,
    file: Path,
    dtype: torch.dtype,
    advance: Advance | None,
) -> PartReport:
    report.unneeded += found.renamed.unneeded
    account(expected, tensors, report, found.renamed.unknown)
    require_match(tensors, expected, found.renamed.unknown, f"{report.part} ({found.source})")
    with atomic_path(file) as temporary:
        stream_tensors(tensors, temporary, dtype, advance=advance)
    return report


def _fresh_prompt(rows: int, width: int) -> Tensor:
    """An unconditional prompt (rows, width) before training, as published (INFINITY_FORMAT section 6, Init)."""
    table = torch.empty(rows, width)
    generator = torch.Generator().manual_seed(0)
    nn.init.trunc_normal_(table, std=1.2 / math.sqrt(width), generator=generator)
    return table
