"""What a training begins with: fresh weights, those of a model, or published files; every key is accounted for."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from bitgen_cli.config import Config, ModelConfig, ScalesConfig, TextEncoderConfig
from bitgen_cli.engine.active_bits import bits_in_use
from bitgen_cli.engine.beginning import SHOWN, Misshapen, PartReport, begin, not_allowed, unused
from bitgen_cli.engine.checkpoint import RunFolder
from bitgen_cli.engine.conversion import TEXT_ENCODER
from bitgen_cli.engine.infinity_weights import fit_rows
from bitgen_cli.engine.memory import text_geometry
from bitgen_cli.engine.model_folder import (
    TEXT_FOLDER,
    TOKENIZER_FILE,
    TRANSFORMER_FILE,
    Model,
    load_model,
    read_model_config,
    save_model,
)
from bitgen_cli.engine.scales import nearest_ratio, schedule
from bitgen_cli.engine.text import TextEncoder, load_text_encoder, new_text_encoder
from bitgen_cli.engine.tokenizer import Tokenizer
from bitgen_cli.engine.tokens import Tokens
from bitgen_cli.engine.transformer import Transformer
from bitgen_cli.engine.weight_files import TOKENIZER, TRANSFORMER, PartWeights, is_weight_file, read_weight_file
from bitgen_cli.errors import UsageError
from bitgen_cli.files import write_json
from bitgen_cli.report import Report
from bitgen_cli.runs.local_files import AVERAGED
from bitgen_cli.runs.models import provide_model, published_parts
from bitgen_cli.runs.text_features import has_features_for
from bitgen_cli.runs.tokens import Data, open_tokens

REPORT_FILE = "init_report.json"
ALLOW = "--allow-init-mismatch"

_CPU = torch.device("cpu")
_PUBLISHED = ScalesConfig(published=True, resolution="1M")
"""Scales that published transformers know."""


@dataclass(frozen=True)
class Init:
    """What --init and its companion say.

    Attributes:
        models: each a model folder, a run folder, `demo`, a published model's name, or a file in a published layout
            or ours; behind it may stand `:tokenizer` or `:transformer`, to take that part alone, or `:ema`, for the
            averaged weights of a published trainer. The last one that has a part gives it.
        allowed: keys that may differ: a key, its beginning up to a dot, or a pattern.
    """

    models: tuple[str, ...] = ()
    allowed: tuple[str, ...] = ()


NOTHING = Init()
"""Fresh weights."""


@dataclass(frozen=True)
class Parts:
    """What a transformer's training needs besides its recipe.

    Attributes:
        tokens: bits, captions, latents.
        model: folder and tokenizer of the model that makes or made the bits.
        transformer: with the weights the run begins with.
        text_encoder: the same; None where a store has its features.
        tokenizer_file: the tokenizer's weights in a model folder; None when they come from a published file.
    """

    tokens: Tokens
    model: Model
    transformer: Transformer
    text_encoder: TextEncoder | None
    tokenizer_file: Path | None = None


def first_tokenizer(config: Config, init: Init, seed: int, report: Report) -> tuple[Tokenizer, list[PartReport]]:
    """A tokenizer with fresh weights, or with those that `init` gives.

    Raises:
        UsageError: `init` holds no tokenizer, or one that does not fit and is not allowed to.
        InputError: it cannot be read.
    """
    tokenizer = Tokenizer(config.model.tokenizer)
    tokenizer.autoencoder.initialise(torch.Generator().manual_seed(seed))
    source = _last(_sources(init.models, (TOKENIZER,), report), TOKENIZER)
    if init.models and source is None:
        raise UsageError(f"stage tokenizer begins with a tokenizer, and {' and '.join(init.models)} holds none")
    found = PartReport(TOKENIZER, None if source is None else source.name)
    if source is None:
        found.new += sorted(tokenizer.state_dict())
    else:
        tensors, unknown = _tensors(source, TOKENIZER, found)
        begin(tokenizer, tensors, found, unknown)
        if source.config is not None:
            own, theirs = config.model.tokenizer.norm_groups, source.config.tokenizer.norm_groups
            if own != theirs:
                found.misshapen.append(Misshapen("norm_groups", str(theirs), str(own)))
    _conclude(config, [found], init.allowed, report)
    return tokenizer, [found]


def first_parts(
    config: Config, data: Data, init: Init, seed: int, report: Report, device: torch.device = _CPU
) -> tuple[Parts, list[PartReport]]:
    """Tokens, tokenizer, and a transformer with fresh weights or with those that `init` gives.

    Args:
        device: where pictures are tokenized; everything is made on the CPU.

    Raises:
        UsageError: no tokenizer, another one than a store's, or weights that do not fit and are not allowed to.
        InputError: something cannot be read.
    """
    sources = _sources(init.models, (TOKENIZER, TRANSFORMER), report)
    tokenizer = _last(sources, TOKENIZER)
    if tokenizer is None:
        raise UsageError(
            f"{' and '.join(init.models) or 'nothing to begin with'}: no tokenizer",
            f"add --init MODEL with {'the one that made the store' if data.is_store else 'one, to tokenize pictures'}",
        )
    model = _tokenizer_of(config, tokenizer)
    tokens = open_tokens(config, data, model, device, report)
    transformer = Transformer(config.model)
    transformer.initialise(torch.Generator().manual_seed(seed))
    source = _last(sources, TRANSFORMER)
    found = PartReport(TRANSFORMER, None if source is None else source.name)
    if source is None:
        found.new += sorted(transformer.state_dict())
    else:
        tensors, unknown = _tensors(source, TRANSFORMER, found)
        known = config.model.model_copy(update={"scales": _PUBLISHED}) if source.config is None else source.config
        _adapt(transformer, tensors, known, config.model, found)
        begin(transformer, tensors, found, unknown)
    text_source = None if source is None else _last(sources, TEXT_ENCODER)
    text_report, folder = _text_report(config.model, source, text_source)
    reports = [found, *([] if text_report is None else [text_report])]
    _conclude(config, reports, init.allowed, report)
    text_encoder = text_encoder_for(config, folder, tokens, seed, report)
    if text_report is not None and text_encoder is not None:
        names = sorted(text_encoder.model.state_dict())
        (text_report.new if folder is None else text_report.loaded).extend(names)
    return Parts(tokens, model, transformer, text_encoder, tokenizer.file(TOKENIZER_FILE)), reports


def save_start(run: RunFolder, config: Config, parts: Parts) -> None:
    """Copies what a resumed run needs: the tokenizer, and the vocabulary of a trained text encoder."""
    assert parts.model.tokenizer is not None
    save_model(
        run.start,
        config.model,
        config.sampling,
        tokenizer=parts.tokenizer_file or parts.model.tokenizer,
        text_encoder=parts.text_encoder if config.model.text_encoder.source == "new" else None,
    )


def save_report(run: RunFolder, reports: Sequence[PartReport]) -> None:
    """Writes what became of every key into the run's folder."""
    write_json(run.path / REPORT_FILE, [found.to_json() for found in reports])


def text_encoder_for(
    config: Config, folder: Path | None, tokens: Tokens, seed: int, report: Report
) -> TextEncoder | None:
    """The configured text encoder: fixed; or trained, from a model folder that has one, else new.

    None where it is fixed and its features are there.
    """
    length = config.model.transformer.text_length
    text = config.model.text_encoder
    if has_features_for(tokens.text, config.model):
        return None
    if tokens.text is not None:
        report.notice(f"the text features of {tokens.name} were not made by {text.source} and are not used")
    if text.source != "new":
        return load_text_encoder(text.source, length, _CPU, torch.float32, report)
    if folder is not None:
        return load_text_encoder(str(folder / TEXT_FOLDER), length, _CPU, torch.float32)
    captions = [caption for several in tokens.captions for caption in several]
    return new_text_encoder(text, captions, length, seed)


# -- sources -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """One --init.

    Attributes:
        name: as it was given.
        folder: of a model, with its configuration; None for files.
        config: of the model; None for files, which say nothing of themselves.
        weights: parts of a file.
        only: the part that is to be taken; None takes all.
    """

    name: str
    folder: Path | None = None
    config: ModelConfig | None = None
    weights: tuple[PartWeights, ...] = ()
    only: str | None = None

    def has(self, part: str) -> bool:
        """Whether a part can be taken from here."""
        if self.only not in (None, part) and not (self.only == TRANSFORMER and part == TEXT_ENCODER):
            return False
        if self.folder is None:
            return any(weights.part == part for weights in self.weights)
        name = {TOKENIZER: TOKENIZER_FILE, TRANSFORMER: TRANSFORMER_FILE, TEXT_ENCODER: TEXT_FOLDER}[part]
        return (self.folder / name).exists()

    def file(self, name: str) -> Path | None:
        """A file of the model folder."""
        return None if self.folder is None else self.folder / name


def _sources(models: Sequence[str], parts: Sequence[str], report: Report) -> list[_Source]:
    """Each --init; of published models the parts alone that a training begins with."""
    return [_source(name, parts, report) for name in models]


def _source(name: str, parts: Sequence[str], report: Report) -> _Source:
    place, _, only = name.rpartition(":")
    if only not in (TOKENIZER, TRANSFORMER, AVERAGED) or not place or Path(name).exists():
        place, only = name, ""
    path = Path(place).expanduser()
    if is_weight_file(path):
        weights = tuple(read_weight_file(path, averaged=only == AVERAGED))
        return _Source(name, weights=weights, only=TRANSFORMER if only == AVERAGED else only or None)
    if only == AVERAGED:
        raise UsageError(f"--init {name}: :{AVERAGED} belongs to a file of the published trainer")
    wanted = (only,) if only else parts
    folder = provide_model(place, report, [part for part in wanted if part in published_parts(place)])
    return _Source(name, folder, read_model_config(folder)[0], only=only or None)


def _last(sources: Sequence[_Source], part: str) -> _Source | None:
    return next((source for source in reversed(sources) if source.has(part)), None)


def _tensors(source: _Source, part: str, report: PartReport) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors of a part by our names, and names that have none with us."""
    if source.folder is None:
        weights = next(weights for weights in source.weights if weights.part == part)
    else:
        file = source.folder / {TOKENIZER: TOKENIZER_FILE, TRANSFORMER: TRANSFORMER_FILE}[part]
        weights = read_weight_file(file)[0]
    report.unneeded += weights.renamed.unneeded
    return dict(weights.renamed.tensors), weights.renamed.unknown


def _tokenizer_of(config: Config, source: _Source) -> Model:
    """The tokenizer that made the store: all of its weights, in the configured geometry."""
    if source.folder is not None:
        assert source.config is not None
        theirs, wanted = source.config.tokenizer, config.model.tokenizer
        if theirs.model_copy(update={"active_bits": wanted.active_bits}) != wanted:
            raise UsageError(
                f"the tokenizer of {source.folder} has another geometry than {config.name}",
                "use the configuration it was made with",
            )
        for bits in wanted.bit_counts:
            bits_in_use(theirs, bits)
        return load_model(source.folder, parts=("tokenizer",))
    tokenizer = Tokenizer(config.model.tokenizer)
    found = PartReport(TOKENIZER, source.name)
    tensors, unknown = _tensors(source, TOKENIZER, found)
    begin(tokenizer, tensors, found, unknown)
    _refuse([found], (), f"the tokenizer that made a store must be {config.name}'s, whole")
    # as save_model writes it
    stored = save({name: tensor.contiguous() for name, tensor in tokenizer.state_dict().items()})
    prints = {"tokenizer": hashlib.sha256(stored).hexdigest()}
    model = Model(Path(source.name), config.model, config.sampling, prints)
    model.tokenizer = tokenizer.eval().requires_grad_(False)
    return model


# -- what is changed to fit --------------------------------------------------------------------------------------------


def _adapt(
    transformer: Transformer, tensors: dict[str, Tensor], found: ModelConfig, wanted: ModelConfig, report: PartReport
) -> None:
    """Gives a file's unconditional prompt this model's length, and its scales this model's sizes."""
    prompt, own_prompt = tensors.get("null_text"), transformer.null_text.detach()
    if prompt is not None and _is_longer_or_shorter(prompt, own_prompt):
        tensors["null_text"] = fit_rows(prompt, own_prompt)
        report.adapted["null_text"] = f"{len(prompt)} rows to {len(own_prompt)}"
    rows, own_rows = tensors.get("scale_embedding.weight"), transformer.scale_embedding.weight.detach()
    if rows is None or rows.ndim != 2 or rows.shape[1:] != own_rows.shape[1:]:
        return
    own, others = (_counts(model) for model in (wanted, found))
    others = others[: len(rows)]
    if own == others[: len(own)] and rows.shape == own_rows.shape:
        return
    nearest = [min(range(len(others)), key=lambda k: abs(math.log(others[k] / count))) for count in own]
    changed = own_rows.clone()
    changed[: len(own)] = rows[nearest].to(changed)
    tensors["scale_embedding.weight"] = changed
    report.adapted["scale_embedding.weight"] = "each scale begins as the one nearest in size"


def _is_longer_or_shorter(table: Tensor, own: Tensor) -> bool:
    return table.ndim == own.ndim and table.shape[1:] == own.shape[1:] and len(table) != len(own)


def _counts(model: ModelConfig) -> tuple[int, ...]:
    """Positions of each scale of a square picture."""
    return schedule(model.scales, patchify=False, ratio=nearest_ratio(1.0, model.scales)).counts


def _text_report(
    model: ModelConfig, source: _Source | None, text_source: _Source | None
) -> tuple[PartReport | None, Path | None]:
    """The report on the text encoder, and the model folder it is taken from; None where it is not trained.

    A text encoder comes whole or not at all: its weights mean nothing without its vocabulary.
    """
    text = model.text_encoder
    if text.source != "new":
        if source is None or source.config is None or source.config.text_encoder.source == text.source:
            return None, None
        report = PartReport(TEXT_ENCODER, source.name)
        report.misshapen.append(Misshapen("", source.config.text_encoder.source, text.source))
        return report, None
    if source is None:
        return PartReport(TEXT_ENCODER, None), None
    report = PartReport(TEXT_ENCODER, source.name if text_source is None else text_source.name)
    if text_source is None or text_source.folder is None:
        report.new.append("")
        return report, None
    theirs = text_geometry(TextEncoderConfig(source=str(text_source.folder / TEXT_FOLDER)))
    own = text_geometry(text)
    assert theirs is not None
    assert own is not None
    for name in ("width", "layers", "heads", "head_width", "ffn_width"):
        if getattr(theirs, name) != getattr(own, name):
            report.misshapen.append(Misshapen(name, str(getattr(theirs, name)), str(getattr(own, name))))
    return report, None if report.misshapen else text_source.folder


# -- the verdict -------------------------------------------------------------------------------------------------------


def _conclude(config: Config, reports: Sequence[PartReport], allowed: Sequence[str], report: Report) -> None:
    """Tells what was taken; refuses what does not fit and is not allowed to."""
    _refuse(reports, allowed, f"{config.name} does not take all of these weights")
    for found in reports:
        if found.source is not None:
            report.notice(found.summary())
    for name in unused(reports, allowed):
        report.notice(f"{ALLOW} {name} was not needed: nothing of that name differs")


def _refuse(reports: Sequence[PartReport], allowed: Sequence[str], what: str) -> None:
    problems = not_allowed(reports, allowed)
    if not problems:
        return
    told = []
    for kind, keys in problems:
        more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
        told.append(f"{len(keys)} {kind}: {', '.join(keys[:SHOWN])}{more}")
    sources = ", ".join(sorted({str(found.source) for found in reports if found.mismatches()}))
    starts = sorted({_start(key) for _, keys in problems for key in keys})
    raise UsageError(
        f"{sources}: {what}; {'; '.join(told)}",
        f"another --preset fits, or these may differ: {' '.join(f'{ALLOW} {start}' for start in starts)}",
    )


def _start(key: str) -> str:
    """The part and the first name of a key."""
    return ".".join(key.split(" ", 1)[0].split(".")[:2])


def to_json(reports: Sequence[PartReport]) -> list[dict[str, Any]]:
    """The reports as plain JSON values."""
    return [found.to_json() for found in reports]
