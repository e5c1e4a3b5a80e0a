"""From prompts to text features: those that are kept on disk, and the text encoder for the others.

The encoder is loaded for the length of one call and is gone before the transformer needs its memory; where all features
are kept, neither it nor transformers is loaded. Each prompt is encoded alone, so that its features are the same to the
last bit whether they are kept, and whatever it is drawn with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from bitgen_cli.config import TextEncoderConfig
from bitgen_cli.engine.device import free_memory, give_back
from bitgen_cli.engine.memory import BYTES, text_geometry
from bitgen_cli.engine.model_folder import TEXT_FOLDER, Model, text_source
from bitgen_cli.engine.subject import Worn, wearing
from bitgen_cli.engine.text import encoder_fingerprint, text_folder
from bitgen_cli.engine.text_cache import TextCache, TextKey
from bitgen_cli.engine.text_precision import INT8, TextPrecision, load_text_encoder_as
from bitgen_cli.engine.vocabulary import PromptReader, load_vocabulary
from bitgen_cli.errors import BitgenError, InputError, ResourceError, UsageError
from bitgen_cli.files import explain
from bitgen_cli.report import Report
from bitgen_cli.runs.fitting import PROGRAM, size


@dataclass(frozen=True)
class Prompt:
    """A text to draw, or to keep away from, and the subjects that it is read with."""

    text: str
    subjects: tuple[Worn, ...] = ()


@dataclass(frozen=True)
class TextModel:
    """A model's text encoder, not loaded.

    Attributes:
        model: whose it is; its weights are not needed.
        source: folder or repository of the encoder.
        fingerprint: of its files, of which one that is replaced makes another.
        reader: its vocabulary, which knows no subject.
    """

    model: Model
    source: str
    fingerprint: str
    reader: PromptReader


def find_text_model(model: Model, report: Report) -> TextModel:
    """The text encoder of a model; one that the hub has is fetched when it is not on this machine.

    Raises:
        InputError: there is none, it is damaged, or the hub cannot give it.
        ResourceError: no space left for what is fetched.
        Interrupted: stopped by the user while it was fetched.
    """
    source = text_source(model.folder, model.config)
    if source is None:
        raise InputError(f"the model {model.folder} has no text encoder yet", "bitgen train makes one")
    folder = text_folder(source, report)
    listed = model.fingerprints.get(TEXT_FOLDER) if folder == model.folder / TEXT_FOLDER else None
    found = encoder_fingerprint(source) if listed is None else _as_it_lies_there(folder, listed)
    if found is None:
        raise InputError(f"the text encoder {source} has no weights or no vocabulary")
    return TextModel(model, source, found, PromptReader(load_vocabulary(folder), model.config.transformer.text_length))


def _as_it_lies_there(folder: Path, listed: str) -> str:
    """A fingerprint that a model lists, with the size and time of the files: whoever replaces one does not change it.

    Raises:
        InputError: a file cannot be looked at.
    """
    digest = hashlib.sha256(listed.encode())
    try:
        for file in sorted(folder.iterdir()):
            facts = file.stat()
            digest.update(f"\n{file.name} {facts.st_size} {facts.st_mtime_ns}".encode())
    except OSError as error:
        raise explain(error, folder, "read") from error
    return digest.hexdigest()


def tell_cut(prompts: Iterable[str], reader: PromptReader, report: Report) -> None:
    """Says which prompts are longer than what is read of them, each once."""
    for prompt in dict.fromkeys(prompts):
        if reader.is_cut(prompt):
            limit = reader.max_length
            report.notice(f"only the first {limit} tokens are read of the long prompt {prompt[:60]!r}...")


def text_features(
    text: TextModel,
    prompts: Sequence[Prompt],
    precision: TextPrecision,
    device: torch.device,
    report: Report,
    *,
    cached: bool = True,
) -> list[Tensor]:
    """Features (T, width) of each prompt, unpadded, on the CPU. No encoder is left in memory.

    Args:
        text: the encoder.
        prompts: equal ones are encoded once.
        precision: number types it computes in.
        device: where it computes.
        report: gets a bar, and a notice where features cannot be kept.
        cached: whether features are looked for on disk, and kept there.

    Raises:
        InputError: the encoder or a subject is damaged.
        UsageError: a subject is of another base model, or changes weights that int8 has rounded.
    """
    keys = [_key(text, prompt, precision, device) for prompt in prompts]
    lacking = dict(zip(keys, prompts, strict=True))
    found: dict[TextKey, Tensor] = {}
    cache = TextCache()
    for key in list(lacking) if cached else []:
        features = cache.find(key)
        if features is not None:
            found[key] = features
            del lacking[key]
    if lacking:
        keeper = _Keeper(cache, report) if cached else None
        for key, features in _encode(text, lacking, precision, device, report):
            found[key] = features
            if keeper is not None:
                keeper.keep(key, features)
        if cached:
            cache.prune()
    return [found[key] for key in keys]


def _key(text: TextModel, prompt: Prompt, precision: TextPrecision, device: torch.device) -> TextKey:
    geometry = text.model.config.transformer
    return TextKey(
        encoder=text.fingerprint,
        dtype=f"{precision.name} {precision.dtype}",
        device=device.type,
        libraries=precision.libraries,
        length=geometry.text_length,
        width=geometry.text_width,
        prompt=prompt.text,
        subjects=tuple((worn.subject.sha256, worn.scale) for worn in prompt.subjects),
    )


def _encode(
    text: TextModel,
    prompts: dict[TextKey, Prompt],
    precision: TextPrecision,
    device: torch.device,
    report: Report,
) -> Iterator[tuple[TextKey, Tensor]]:
    """Each key with its features, from an encoder that is loaded at the first and dropped after the last."""
    if precision.name == INT8:
        _refuse_changes(prompts.values())
    geometry = text.model.config.transformer
    _require_memory(text.model.config.text_encoder, precision, device)
    encoder = load_text_encoder_as(precision, text.source, geometry.text_length, device, report)
    if encoder.width != geometry.text_width:
        raise InputError(
            f"the text encoder {text.source} has {encoder.width} channels, the model takes {geometry.text_width}"
        )
    model = replace(text.model, text_encoder=encoder, transformer=None, tokenizer=None)
    together: dict[tuple[tuple[str, float], ...], list[TextKey]] = {}
    for key in prompts:
        together.setdefault(key.subjects, []).append(key)
    with report.task("reading prompts", len(prompts)) as task:
        for keys in together.values():
            with wearing(model, prompts[keys[0]].subjects):
                for key in keys:
                    with torch.inference_mode():
                        (features,) = encoder.encode_alone([key.prompt])
                        features = features.cpu()
                    yield key, features
                    task.advance()
    del encoder, model
    give_back(device)


def _require_memory(config: TextEncoderConfig, precision: TextPrecision, device: torch.device) -> None:
    """Raises ResourceError where a text encoder does not fit."""
    known, free = text_geometry(config), free_memory(device)
    if known is None or free is None:
        return
    number = 1 if precision.name == INT8 else BYTES[precision.name]
    needs = known.parameters * number + PROGRAM
    if needs > free:
        less = {"fp32": "--text-dtype bf16 or int8", "bf16": "--text-dtype int8"}.get(precision.name)
        raise ResourceError(
            f"the text encoder needs about {size(needs)} of memory in {precision.name}, {device} has {size(free)} free",
            less,
        )


def _refuse_changes(prompts: Iterable[Prompt]) -> None:
    for worn in (worn for prompt in prompts for worn in prompt.subjects):
        if worn.subject.changes_text_encoder:
            raise UsageError(
                f"subject {worn.subject.name} changes weights of the text encoder, which int8 has rounded",
                "use --text-dtype bf16",
            )


class _Keeper:
    """Writes features to disk, each as soon as it is there; where that fails once, all are used without.

    Args:
        cache: where to.
        report: is told why features are not kept.
    """

    def __init__(self, cache: TextCache, report: Report) -> None:
        self._cache, self._report = cache, report
        self._fails = False

    def keep(self, key: TextKey, features: Tensor) -> None:
        """Writes one prompt's features (T, width)."""
        if self._fails:
            return
        try:
            self._cache.keep(key, features)
        except BitgenError as error:
            self._fails = True
            self._report.notice(f"text features are not kept: {error.message}")
