"""A learned subject: one safetensors file, kept under a name, and put onto a model for as long as it is drawn.

    base_model.model.text_encoder.token_row                      (width,) embedding of the token
    base_model.model.text_encoder.token_start                    (width,) what it was begun with
    base_model.model.transformer.blocks.0.ffn.up.lora_A.weight   (rank, in), and lora_B (out, rank): names as in PEFT
    base_model.model.transformer.blocks.0.ffn.up.weight.delta    what is added to a weight of the base model

The header says which token, class and base model it belongs to, and the recipe. A subject fits its base model alone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from bitgen_cli.engine.lora import product
from bitgen_cli.engine.model_folder import Model, fingerprint
from bitgen_cli.engine.parts import SubjectKind
from bitgen_cli.engine.tensors import save_tensors
from bitgen_cli.engine.vocabulary import PromptReader
from bitgen_cli.errors import InputError, UsageError
from bitgen_cli.files import atomic_path, data_folder, explain

PREFIX = "base_model.model."
ROW, START = f"{PREFIX}text_encoder.token_row", f"{PREFIX}text_encoder.token_start"
LORA_A, LORA_B, DELTA = ".lora_A.weight", ".lora_B.weight", ".delta"
SUFFIX = ".safetensors"
HEADER = "bitgen_subject"
LONGEST_TOKEN = 40
"""Characters of a token."""

_IN_BRACKETS = re.compile(r"\[[^\[\]\n]+\]")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Header(BaseModel):
    """What a subject file says about itself.

    Attributes:
        token: as it stands in prompts.
        class_word: what kind of thing it is.
        kind: `token` changes no weight, `lora` carries adapters, `delta` differences of whole weights.
        scale: alpha / rank of the adapters.
        base: fingerprints of the base model's parts.
        base_name: what the base model was called.
        recipe: how it was learned.
        pictures: file name and sha256 of each photo.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    token: str = Field(min_length=1, max_length=LONGEST_TOKEN)
    class_word: str = Field(min_length=1)
    kind: SubjectKind
    scale: float = Field(default=1.0, allow_inf_nan=False)
    base: dict[str, str]
    base_name: str
    recipe: dict[str, Any]
    pictures: list[dict[str, str]]


@dataclass(frozen=True)
class Subject:
    """A subject file.

    Attributes:
        name: in the registry, else the file's stem.
        file: where it lies.
        header: what it says.
    """

    name: str
    file: Path
    header: Header

    @property
    def token(self) -> str:
        """As it stands in prompts."""
        return self.header.token

    @property
    def phrase(self) -> str:
        """Token and class: what prompts say for it."""
        return f"{self.token} {self.header.class_word}"

    @cached_property
    def sha256(self) -> str:
        """Of its file."""
        return fingerprint(self.file)

    @cached_property
    def changes_text_encoder(self) -> bool:
        """Whether it changes weights of the text encoder, beyond its token's embedding.

        Raises:
            InputError: the file is gone or damaged.
        """
        with _reading(self.file), safe_open(str(self.file), framework="pt") as stored:
            own = {name for name in stored.keys() if name.startswith(f"{PREFIX}text_encoder.")}  # noqa: SIM118
        return not own <= {ROW, START}

    def tensors(self) -> dict[str, Tensor]:
        """Everything it changes, by name.

        Raises:
            InputError: the file is gone or damaged.
        """
        with _reading(self.file), safe_open(str(self.file), framework="pt") as stored:
            return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118


@dataclass(frozen=True)
class Worn:
    """A subject to draw with, and how strongly: 1 is as learned, 0 is the base model."""

    subject: Subject
    scale: float = 1.0


# -- files and names ---------------------------------------------------------------------------------------------------


def save_subject(file: Path, header: Header, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Writes a subject file whole or not at all; token rows are kept in float32.

    Raises:
        ResourceError: no space left; an older file is as it was.
        InputError: not allowed to write there.
    """
    stored = {name: t.float() if name in (ROW, START) else t.to(dtype) for name, t in tensors.items()}
    with atomic_path(file) as temporary:
        save_tensors(stored, temporary, metadata={HEADER: header.model_dump_json(), "format": "pt"})


def read_subject(file: Path, name: str | None = None) -> Subject:
    """A subject file without its tensors.

    Raises:
        InputError: missing, damaged, or no subject file.
    """
    with _reading(file), safe_open(str(file), framework="pt") as stored:
        found = (stored.metadata() or {}).get(HEADER)
    if found is None:
        raise InputError(f"{file} is not a subject file", "bitgen finetune-subject makes one")
    try:
        header = Header.model_validate_json(found)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise InputError(f"{file} does not describe a subject: {where}: {problem['msg']}") from error
    return Subject(name or file.stem, file, header)


def registry() -> Path:
    """Folder of the subjects that are known by name."""
    return data_folder() / "subjects"


def registered_file(name: str) -> Path:
    """Where the subject of that name is kept.

    Raises:
        UsageError: not a name.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r} cannot be the name of a subject", "letters, digits, dots, dashes, at most 64")
    return registry() / f"{name}{SUFFIX}"


def known_subjects() -> list[Subject]:
    """Every readable subject of the registry, by name."""
    return [subject for subject in _registered().values() if subject is not None]


def unreadable_subjects() -> list[Path]:
    """Files of the registry that are no subjects any more."""
    return [file for file, subject in _registered().items() if subject is None]


def _registered() -> dict[Path, Subject | None]:
    found: dict[Path, Subject | None] = {}
    for file in sorted(registry().glob(f"*{SUFFIX}")) if registry().is_dir() else []:
        if file.name.startswith("."):
            continue
        try:
            found[file] = read_subject(file)
        except InputError:
            found[file] = None
    return found


def find_subject(name: str) -> Subject:
    """A subject by its name or file.

    Raises:
        UsageError: there is none of that name.
        InputError: the file is missing or no subject file.
    """
    if Path(name).suffix == SUFFIX or "/" in name:
        return read_subject(Path(name).expanduser())
    file = registered_file(name)
    if not file.is_file():
        raise UsageError(f"no subject {name!r}", _known_hint(known_subjects(), unreadable_subjects()))
    return read_subject(file, name)


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise InputError(f"{file} is not a readable safetensors file: {error}") from error
    except OSError as error:
        raise explain(error, file, "read") from error


# -- tokens in prompts -------------------------------------------------------------------------------------------------


def check_token(token: str, reader: PromptReader) -> None:
    """Refuses what cannot be a token of a subject.

    Raises:
        UsageError: empty, too long, with white space, or an ordinary word of the vocabulary.
    """
    if not token or len(token) > LONGEST_TOKEN or any(c.isspace() or not c.isprintable() for c in token):
        raise UsageError(f"--token {token!r} cannot be a token", f"1 to {LONGEST_TOKEN} characters without white space")
    if reader.knows(token):
        raise UsageError(
            f"--token {token} is an ordinary word of the text encoder's vocabulary, whose meaning would be lost",
            "take one that means nothing, for example [V]",
        )


def tokens_in(prompt: str, candidates: Iterable[str]) -> list[str]:
    """The candidates and everything in brackets that stand in a prompt, in their order, each once.

    Of several that overlap, the one that begins first counts, and of those the longest.
    """
    patterns = [re.compile(rf"(?<!\w){re.escape(t)}(?!\w)" if t[0].isalnum() else re.escape(t)) for t in candidates]
    spans = [match.span() for pattern in (_IN_BRACKETS, *patterns) for match in pattern.finditer(prompt)]
    found, free = [], 0
    for start, end in sorted(spans, key=lambda span: (span[0], -span[1])):
        if start >= free:
            found.append(prompt[start:end])
            free = end
    return list(dict.fromkeys(found))


def choose_subjects(
    prompt: str,
    model: Model,
    reader: PromptReader,
    known: Sequence[Subject],
    asked: Sequence[Worn],
    negative: str | None = None,
) -> tuple[Worn, ...]:
    """The subjects a prompt is drawn with: those asked for, and those whose tokens stand in it or its negative prompt.

    Args:
        prompt: what is drawn.
        model: the model it is drawn with; its weights are not needed.
        reader: of its prompts, which knows no subject yet.
        known: subjects that may be found by their token.
        asked: subjects chosen by the user, which win over known ones of the same token.
        negative: what the picture is to keep away from.

    Raises:
        UsageError: a token nobody knows, that means several subjects, or that stands behind the part of a long prompt
            that is read; a subject of another base model; one that was asked for and does not stand in the prompt;
            several that cannot be drawn together.
    """
    for token, count in Counter(worn.subject.token for worn in asked).items():
        if count > 1:
            raise UsageError(f"--subject names {token} {count} times", "one subject can go by a token")
    own = [subject for subject in known if subject.header.base == model.fingerprints]
    by_token: dict[str, list[Worn]] = {worn.subject.token: [worn] for worn in asked}
    for subject in own:
        if subject.token not in {worn.subject.token for worn in asked}:
            by_token.setdefault(subject.token, []).append(Worn(subject))
    chosen: list[Worn] = []
    texts = [prompt] if negative is None else [prompt, negative]
    for token in dict.fromkeys(token for text in texts for token in tokens_in(text, by_token)):
        found = by_token.get(token, [])
        if not found and reader.knows(token):
            continue  # a merged model has it in its vocabulary
        if not found:
            raise _unknown(token, known, own)
        if len(found) > 1:
            names = ", ".join(worn.subject.name for worn in found)
            raise UsageError(f"{token} stands for several subjects: {names}", "choose one with --subject NAME")
        chosen += found
    for text in texts:
        _require_read(text, [worn.subject.token for worn in chosen], reader)
    for worn in asked:
        require_base(worn.subject, model)
        if worn not in chosen:
            raise UsageError(
                f"the prompt {prompt[:60]!r} does not name {worn.subject.token}, so subject {worn.subject.name} would "
                "not be drawn",
                f'write for example "a {worn.subject.phrase}"',
            )
    whole = [worn.subject.name for worn in chosen if worn.subject.header.kind == "delta"]
    if whole and len(chosen) > 1:
        raise UsageError(
            f"subject {whole[0]} changes whole weights and cannot be drawn together with another",
            "learn both with --train token,lora, or with --train token",
        )
    return tuple(chosen)


def _require_read(text: str, tokens: Sequence[str], reader: PromptReader) -> None:
    """Raises UsageError when a subject's token stands behind the part of a long text that the encoder reads."""
    for token in tokens:
        before, found, _ = text.partition(token)
        others = sum(before.count(other) for other in tokens)
        for other in tokens:
            before = before.replace(other, " ")
        # the token itself and </s> come after them
        if found and others + len(reader.word_ids(before)) + 2 > reader.max_length:
            raise UsageError(
                f"{token} stands behind the first {reader.max_length} tokens of the prompt, which alone are read",
                "shorten what stands before it",
            )


def require_base(subject: Subject, model: Model) -> None:
    """Raises UsageError when the subject was learned on another base model."""
    different = sorted(
        part for part in {*subject.header.base, *model.fingerprints}
        if subject.header.base.get(part) != model.fingerprints.get(part)
    )  # fmt: skip
    if different:
        raise UsageError(
            f"subject {subject.name} was learned on another base model, {subject.header.base_name}: "
            f"{' and '.join(different)} differ from those of {model.folder}",
            "use the model it was learned on, or learn it again on this one",
        )


def _unknown(token: str, known: Sequence[Subject], own: Sequence[Subject]) -> UsageError:
    foreign = [subject.name for subject in known if subject.token == token]
    if foreign:
        return UsageError(
            f"{token} is subject {foreign[0]}, which was learned on another base model",
            "use --model with the one it was learned on, or learn it again on this one",
        )
    return UsageError(f"no subject is called {token}", _known_hint(own, unreadable_subjects()))


def _known_hint(subjects: Sequence[Subject], unreadable: Sequence[Path] = ()) -> str:
    listed = ", ".join(f"{subject.token} ({subject.name}, a {subject.header.class_word})" for subject in subjects)
    make = "`bitgen finetune-subject PHOTOS --class dog` makes one"
    damaged = f"; unreadable: {', '.join(map(str, unreadable))}" if unreadable else ""
    return (f"known: {listed}; {make}" if listed else f"none is known; {make}") + damaged


# -- putting subjects on a model ---------------------------------------------------------------------------------------


@dataclass
class _Change:
    """What subjects add to one parameter."""

    parameter: nn.Parameter
    added: list[Tensor] = field(default_factory=list)


@contextmanager
def wearing(model: Model, subjects: Sequence[Worn]) -> Iterator[None]:
    """Puts subjects onto the model's weights for the length of the block; afterwards they are as before, bit for bit.

    Of a model whose text encoder or transformer is not loaded, the other one alone wears them. Their tokens stay known
    to the text encoder.

    Raises:
        InputError: a file is damaged or of another geometry.
        UsageError: one is of another base model.
    """
    changes = _changes(model, subjects)
    kept = {name: change.parameter.data for name, change in changes.items()}
    try:
        for change in changes.values():
            value = change.parameter.data.float()
            for added in change.added:
                value = value + added
            change.parameter.data = value.to(change.parameter.dtype)
        yield
    finally:
        for name, change in changes.items():
            change.parameter.data = kept[name]


def _changes(model: Model, subjects: Sequence[Worn]) -> dict[str, _Change]:
    """Everything the subjects add, by the parameter's name; the encoder learns their tokens."""
    encoder = model.text_encoder
    loaded = {"transformer": model.transformer, "text_encoder": None if encoder is None else encoder.model}
    parts: dict[str, nn.Module] = {part: module for part, module in loaded.items() if module is not None}
    elsewhere = tuple(f"{PREFIX}{part}." for part in loaded.keys() - parts.keys())
    parameters = {f"{part}.{name}": p for part, module in parts.items() for name, p in module.named_parameters()}
    changes: dict[str, _Change] = {}
    for worn in subjects:
        require_base(worn.subject, model)
        tensors = worn.subject.tensors()
        try:
            row, start = tensors.pop(ROW), tensors.pop(START)
            if row.shape != (model.config.transformer.text_width,) or start.shape != row.shape:
                raise ValueError("its token has another width")
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(elsewhere)}
            for name, added in _added(tensors, worn):
                change = changes.setdefault(name, _Change(parameters[name]))
                if added.shape != change.parameter.shape:
                    raise ValueError(f"{name} has another shape")
                change.added.append(added.to(change.parameter.device))
        except (KeyError, ValueError) as error:
            raise InputError(f"{worn.subject.file} does not fit {model.folder}: {error}") from error
        if encoder is not None:
            encoder.learn(worn.subject.token, torch.lerp(start.float(), row.float(), worn.scale))
    return changes


def _added(tensors: Mapping[str, Tensor], worn: Worn) -> Iterator[tuple[str, Tensor]]:
    """Names of parameters and what is added to each, float32.

    Raises:
        ValueError: a tensor nobody knows.
    """
    for name, tensor in tensors.items():
        own = name.removeprefix(PREFIX)
        if own.endswith(LORA_A):
            module = name.removesuffix(LORA_A)
            b = tensors[module + LORA_B]
            yield f"{own.removesuffix(LORA_A)}.weight", product(tensor, b, worn.subject.header.scale * worn.scale)
        elif own.endswith(DELTA):
            yield own.removesuffix(DELTA), tensor.float() * worn.scale
        elif not own.endswith(LORA_B):
            raise ValueError(f"unknown tensor {name}")
