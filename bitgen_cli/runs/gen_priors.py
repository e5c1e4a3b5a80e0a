"""`bitgen gen-priors`: pictures of a class, made by the base model, which keep the class while a subject is learned.

    manifest.json    base model, class, templates, sampling, and prompt, seed and sha256 of every picture
    0000.png ...     the pictures, each with its recipe

Picture k is a function of the base model, the class, the templates, the sampling and seed + k alone, so a folder that
is asked for again is topped up or mended, and otherwise never changed. Pictures that the manifest does not list are the
user's own: counted, never touched.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from bitgen_cli.config import SamplingConfig, SubjectTraining
from bitgen_cli.engine.captions import captions_beside
from bitgen_cli.engine.data import SUFFIXES, picture_size, to_pil, to_uint8
from bitgen_cli.engine.device import keep_freed_memory, pick_device
from bitgen_cli.engine.memory import parameters
from bitgen_cli.engine.model_folder import (
    BUILT_IN,
    TRANSFORMER_FILE,
    Model,
    fingerprint,
    load_model,
    model_name,
    read_model_config,
)
from bitgen_cli.engine.sampling import draw_bits, plan
from bitgen_cli.engine.scales import Schedule, nearest_ratio, schedule
from bitgen_cli.engine.text_precision import pick_text_precision
from bitgen_cli.engine.transformer import TextFeatures
from bitgen_cli.errors import InputError, Interrupted, UsageError
from bitgen_cli.files import PARTIAL, data_folder, explain, read_json, write_json
from bitgen_cli.report import Report, Task
from bitgen_cli.runs.drawing import drawing_dtype
from bitgen_cli.runs.jobs import SampleOptions, chosen_sampling
from bitgen_cli.runs.models import provide_model
from bitgen_cli.runs.output import Carried, base_recipe, slug, write_picture
from bitgen_cli.runs.pace import Pace
from bitgen_cli.runs.placement import AT_ONCE, Wanted, place
from bitgen_cli.runs.prompts import Prompt, find_text_model, tell_cut, text_features
from bitgen_cli.runs.recipes import subject_recipe

MANIFEST = "manifest.json"
CLASS = "{class}"
"""Stands for the class in templates and captions."""
COUNT = SubjectTraining().prior_images
LONGEST_CLASS = 60
"""Characters of a class word."""
SEEDS = 2**63
"""First seeds are below this."""
NAMED = 5
"""Files named one by one in a message; further ones are only counted."""

_AN = re.compile(r"(?:[aeiou]|8|11\b|18\b|hour|honest|honou?r|heir)", re.IGNORECASE)
_NOT_AN = re.compile(r"(?:uni(?!n|m)|us[aeiu]|ut[ei]|ura|uri|uku|ufo|u\b|eu|ewe|once|one\b|onesie)", re.IGNORECASE)
_ARTICLE = re.compile(r"\b([Aa])n?(\s+)(?=\{class\})")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


_Seed = Annotated[int, Field(ge=0, lt=2 * SEEDS)]


class Made(_Record):
    """A picture the base model made.

    Attributes:
        file: its name in the folder; nothing that leads out of it.
        prompt, seed: it was drawn from.
        sha256: of the file.
    """

    file: Annotated[str, Field(pattern=r"^[0-9]{4,12}(-[0-9]{1,12})?\.png$")]
    prompt: str
    seed: _Seed
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Manifest(_Record):
    """What the pictures of a folder were made with, and which they are.

    Attributes:
        base: fingerprints of the base model's parts.
        base_name: what the base model was called; for people.
        class_word, templates: what the prompts were made of.
        seed: of picture 0.
        size: width and height of the pictures in pixels.
        pictures: in the order of their seeds.
    """

    format: Literal["bitgen priors"] = "bitgen priors"
    version: Literal[1] = 1
    base: dict[str, str]
    base_name: str
    class_word: str
    templates: Annotated[list[str], Field(min_length=1)]
    seed: _Seed
    sampling: SamplingConfig
    size: tuple[int, int]
    pictures: list[Made]

    @model_validator(mode="after")
    def _each_once(self) -> Manifest:
        for what in ("file", "seed"):
            if len({getattr(picture, what) for picture in self.pictures}) != len(self.pictures):
                raise ValueError(f"a {what} is listed twice")
        if any(picture.seed < self.seed for picture in self.pictures):
            raise ValueError("a picture has a seed before the first")
        return self

    @property
    def files(self) -> set[str]:
        """Names of the listed pictures."""
        return {picture.file for picture in self.pictures}


@dataclass(frozen=True)
class Prior:
    """A class picture to learn from, and what it shows."""

    file: Path
    prompt: str


@dataclass(frozen=True)
class PriorOptions:
    """Which pictures to have; None leaves a value to the model.

    Attributes:
        class_word: what they show, a word or a few.
        count: pictures there are to be, at least; the user's own counted in.
        model: `demo`, a model folder or a run folder.
        output: their folder; None keeps them among the user's data, apart for everything that decides what they show.
        templates: prompts with {class}, used in turn; None takes those `bitgen finetune-subject` would, so that both
            share their pictures.
        seed: of the first picture; the next ones count up.
        resolution: pixel budget; None takes the model's own.
        batch_size: pictures drawn at once; no influence on them.
        sampling: settings; None takes the model's own.
        overrides: sampling.KEY=VALUE, on top of them.
        device, dtype: as in engine.device.
        text_cache: as in sample.SampleOptions.
    """

    class_word: str
    count: int = COUNT
    model: str = BUILT_IN
    output: Path | None = None
    templates: tuple[str, ...] | None = None
    seed: int = 0
    resolution: str | None = None
    batch_size: int | None = None
    sampling: SamplingConfig | None = None
    overrides: tuple[str, ...] = ()
    device: str = "auto"
    dtype: str = "auto"
    text_cache: bool = True


@dataclass(frozen=True)
class PriorResult:
    """What a folder holds now, and what this call did.

    Attributes:
        folder: of the pictures.
        class_word: what they show.
        made: pictures drawn by this call.
        remade: names of those among them that had been made before, but were missing or damaged.
        reused: pictures the base model had made before.
        own: pictures of the user.
        pictures: all of them, the user's own last.
        seconds: it took.
    """

    folder: Path
    class_word: str
    made: int
    remade: tuple[str, ...]
    reused: int
    own: int
    pictures: tuple[Prior, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The result as one JSON object."""
        return {
            "folder": str(self.folder),
            "class": self.class_word,
            "count": len(self.pictures),
            "made": self.made,
            "remade": list(self.remade),
            "reused": self.reused,
            "own": self.own,
            "pictures": [{"path": str(prior.file), "prompt": prior.prompt} for prior in self.pictures],
            "seconds": round(self.seconds, 3),
        }


def gen_priors(options: PriorOptions, report: Report, model: Model | None = None) -> PriorResult:
    """Makes the pictures that are missing.

    Args:
        options: which.
        report: gets a bar over the missing pictures, and notices of what is reused or made again.
        model: the base model, when it is loaded already, where and in the type it is to draw in; None loads it if there
            is anything to draw.

    Raises:
        UsageError: options that do not fit the model or each other, or a folder with pictures of another base model,
            class, templates, seed or sampling.
        InputError: the model or the folder cannot be read or written.
        ResourceError: no such device, or no space left; the pictures made so far are kept.
        Interrupted: stopped by the user; the pictures made so far are kept.
    """
    started = time.perf_counter()
    base = _without_weights(options.model, report) if model is None else model
    wanted, scales = _wanted(options, base)
    place = default_folder(wanted) if options.output is None else options.output
    place = place.expanduser()
    known = _open(place, wanted)
    own, unreadable = _own_pictures(place, known)
    for reason in unreadable:
        report.warning(f"not counted: {reason}")
    bad = _bad(place, known)
    due = [_Due(made.file, made.prompt, made.seed) for made in known.pictures if made.file in bad]
    due += _new(place, known, options.count - len(own) - len(known.pictures))
    reused = len(known.pictures) - len(bad)
    _tell(place, report, reused=reused, own=len(own), bad=bad, done=not due)
    if due:
        artist = _artist(options, base, known.sampling, scales, [one.prompt for one in due], report)
        known = _make(place, known, due, artist, report, before=reused + len(own))
    return PriorResult(
        folder=place,
        class_word=wanted.class_word,
        made=len(due),
        remade=tuple(bad),
        reused=reused,
        own=len(own),
        pictures=tuple(_priors(place, known, own, wanted.class_word)),
        seconds=time.perf_counter() - started,
    )


def read_priors(folder: Path, class_word: str, fingerprints: Mapping[str, str]) -> list[Prior]:
    """The class pictures of a folder: those of its manifest, and the user's own with the captions beside them.

    Of the user's own, those that cannot be read are left out; `gen_priors` names them.

    Args:
        folder: filled by `gen_priors`, or the user's own pictures alone, without a manifest.
        class_word: what they are to show.
        fingerprints: of the base model.

    Raises:
        InputError: no folder, no pictures, a broken manifest, or a listed picture that is missing or damaged.
        UsageError: they were made by another base model, or show another class.
    """
    folder, class_word = folder.expanduser(), " ".join(class_word.split())
    if not folder.is_dir():
        raise InputError(f"no class pictures at {folder}: there is no such folder", "bitgen gen-priors makes them")
    known = None
    if (folder / MANIFEST).exists():
        known = read_manifest(folder)
        _refuse(folder, [*_base_differences(known, fingerprints), *_class_difference(known, class_word)])
        bad = _bad(folder, known)
        if bad:
            raise InputError(f"{folder}: {_listed(bad)}", "bitgen gen-priors makes them again")
    found = list(_priors(folder, known, _own_pictures(folder, known)[0], class_word))
    if not found:
        raise InputError(f"no class pictures in {folder}", "bitgen gen-priors makes them, or put your own there")
    return found


def default_folder(wanted: Manifest) -> Path:
    """Where pictures are kept: apart for each base model, and for each class and way of drawing it."""
    base = "".join(f"{part}={wanted.base[part]}\n" for part in sorted(wanted.base))
    drawn = wanted.model_dump_json(include={"class_word", "templates", "seed", "sampling", "size"})
    model, way = (hashlib.sha256(text.encode()).hexdigest() for text in (base, drawn))
    return data_folder() / "priors" / model[:12] / f"{slug(wanted.class_word)}-{way[:8]}"


# -- words -------------------------------------------------------------------------------------------------------------


def with_article(template: str, class_word: str) -> str:
    """A template with its {class} filled in; "a" and "an" before it are made to fit."""
    n = "n" if _AN.match(class_word) and not _NOT_AN.match(class_word) else ""
    return _ARTICLE.sub(rf"\g<1>{n}\g<2>", template).replace(CLASS, class_word)


def check_class(text: str) -> str:
    """A class word with single spaces.

    Raises:
        UsageError: empty, too long, several lines, with characters that cannot be shown or mean something else in
            prompts, or with an article, which the templates bring.
    """
    word = " ".join(text.split())
    example = "a word or two, for example --class dog"
    if not word:
        raise UsageError("the class is empty", "say what kind of thing it is, for example --class dog")
    if len(text.strip().splitlines()) > 1 or not word.isprintable():
        raise UsageError(f"the class {text[:LONGEST_CLASS]!r} is not one line of text", example)
    if len(word) > LONGEST_CLASS:
        raise UsageError(f"the class has {len(word)} characters, at most {LONGEST_CLASS} can be", example)
    if set("{}[]") & set(word) or not any(character.isalnum() for character in word):
        raise UsageError(f"{word!r} cannot be a class", example)
    first, _, rest = word.partition(" ")
    if rest and first.lower() in ("a", "an"):
        raise UsageError(f"the class {word!r} has an article, which the prompts bring", f"write --class {rest!r}")
    return word


def _check_templates(templates: Sequence[str]) -> list[str]:
    """Templates with single spaces.

    Raises:
        UsageError: none, or one without {class}.
    """
    for template in templates or ("",):
        if CLASS not in template:
            raise UsageError(f"template {template!r} does not contain {CLASS}", f'for example "a photo of a {CLASS}"')
    return [" ".join(template.split()) for template in templates]


# -- what there is, and what there should be ---------------------------------------------------------------------------


def read_manifest(folder: Path) -> Manifest:
    """What the folder says about itself.

    Raises:
        InputError: missing or broken.
    """
    file = folder / MANIFEST
    try:
        return Manifest.model_validate(read_json(file))
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise InputError(
            f"{file} does not describe class pictures: {f'{where}: ' if where else ''}{problem['msg']}",
            "move that folder away, or choose another one",
        ) from error


def _without_weights(name: str, report: Report) -> Model:
    folder = provide_model(name, report)
    return Model(folder, *read_model_config(folder))


def _name(options: PriorOptions, model: Model) -> str:
    """What the base model is called in recipes, wherever it lies."""
    return options.model if options.model == BUILT_IN else model_name(model.folder)


def _wanted(options: PriorOptions, model: Model) -> tuple[Manifest, Schedule]:
    """A manifest without pictures for these options, and the scales of the pictures, the squarest the model draws.

    Raises:
        UsageError: options that do not fit the model.
    """
    class_word, templates = check_class(options.class_word), _check_templates(_templates(options, model))
    for flag, number in (("--count", options.count), ("--batch-size", options.batch_size)):
        if number is not None and number < 1:
            raise UsageError(f"{flag} {number} must be at least 1")
    if not 0 <= options.seed < SEEDS:
        raise UsageError(f"--seed {options.seed} must be from 0 to {SEEDS - 1}")
    sampling = chosen_sampling(
        SampleOptions(overrides=options.overrides), replace(model, sampling=options.sampling or model.sampling)
    )
    scales = _square(model, options.resolution)
    plan(sampling, len(scales))  # a list of another length is refused before anything is drawn
    height, width = scales.pixels(model.config.tokenizer.patch_size)
    manifest = Manifest(
        base=model.fingerprints,
        base_name=_name(options, model),
        class_word=class_word,
        templates=templates,
        seed=options.seed,
        sampling=sampling,
        size=(width, height),
        pictures=[],
    )
    return manifest, scales


def _templates(options: PriorOptions, model: Model) -> Sequence[str]:
    if options.templates is not None:
        return options.templates
    training = subject_recipe(model, options.model).config.training.subject
    assert training is not None
    return training.prior_templates


def _square(model: Model, resolution: str | None) -> Schedule:
    scales, ratio = model.config.scales, nearest_ratio(1.0, model.config.scales)
    return schedule(scales, patchify=model.config.transformer.patchify, ratio=ratio, resolution=resolution)


def _open(place: Path, wanted: Manifest) -> Manifest:
    """The folder's manifest, or the wanted one where there is none yet.

    Raises:
        UsageError: its pictures were made with something else, or it is a file.
    """
    try:
        if place.exists() and not place.is_dir():
            raise UsageError(f"{place} is a file", "choose a folder for the class pictures")
        if not (place / MANIFEST).exists():
            return wanted
    except OSError as error:  # a folder above may not be looked into
        raise explain(error, place, "read") from error
    found = read_manifest(place)
    differences = [*_base_differences(found, wanted.base), *_class_difference(found, wanted.class_word)]
    if found.templates != wanted.templates:
        differences.append(f"templates {', '.join(found.templates)!r}, not {', '.join(wanted.templates)!r}")
    for name in ("seed", "size"):
        if getattr(found, name) != getattr(wanted, name):
            differences.append(f"{name} {getattr(found, name)}, not {getattr(wanted, name)}")
    was, now = found.sampling.model_dump(), wanted.sampling.model_dump()
    differences += [f"sampling.{key} {was[key]}, not {now[key]}" for key in was if was[key] != now[key]]
    _refuse(place, differences)
    return found


def _base_differences(found: Manifest, fingerprints: Mapping[str, str]) -> list[str]:
    parts = sorted(p for p in {*found.base, *fingerprints} if found.base.get(p) != fingerprints.get(p))
    return [f"made by another base model, {found.base_name}, whose {' and '.join(parts)} differ"] if parts else []


def _class_difference(found: Manifest, class_word: str) -> list[str]:
    return [] if found.class_word == class_word else [f"class {found.class_word!r}, not {class_word!r}"]


def _refuse(place: Path, differences: Sequence[str]) -> None:
    if differences:
        raise UsageError(
            f"{place} holds other class pictures: {'; '.join(differences)}",
            "choose another folder with --output (--priors of finetune-subject), or move this one away",
        )


def _bad(place: Path, known: Manifest) -> dict[str, str]:
    """Listed files that are not there as they were made, with what is wrong."""
    bad = {}
    for picture in known.pictures:
        file = place / picture.file
        try:
            if not file.is_file():
                bad[picture.file] = "missing"
            elif fingerprint(file) != picture.sha256:
                bad[picture.file] = "damaged"
        except OSError as error:
            raise explain(error, file, "read") from error
    return bad


def _listed(bad: Mapping[str, str]) -> str:
    named = [f"{file} is {what}" for file, what in list(bad.items())[:NAMED]]
    return ", ".join(named) + (f" and {len(bad) - NAMED} more are not as they were" if len(bad) > NAMED else "")


def _own_pictures(place: Path, known: Manifest | None) -> tuple[list[Path], list[str]]:
    """The user's own pictures, by name, and why others of them cannot be read.

    Only their heads are read; what is damaged further down is told by whoever loads them.
    """
    listed = set() if known is None else known.files
    try:
        entries = sorted(place.iterdir()) if place.is_dir() else []
        names = [
            entry.name
            for entry in entries
            if entry.name.lower().endswith(SUFFIXES) and not entry.name.startswith(".") and entry.name not in listed
            if entry.is_file()
        ]
    except OSError as error:
        raise explain(error, place, "read") from error
    own, unreadable = [], []
    for name in names:
        try:
            picture_size(place / name)
            own.append(place / name)
        except InputError as error:
            unreadable.append(error.message)
    return own, unreadable


def _priors(place: Path, known: Manifest | None, own: Iterable[Path], class_word: str) -> Iterator[Prior]:
    """All pictures with what they show."""
    for picture in () if known is None else known.pictures:
        yield Prior(place / picture.file, picture.prompt)
    for file in own:
        yield Prior(file, _caption(file, class_word))


def _caption(file: Path, class_word: str) -> str:
    """What the user says a picture shows, else that it shows the class."""
    caption = next(iter(captions_beside(file)), f"a {CLASS}")
    return with_article(caption, class_word)


def _tell(place: Path, report: Report, *, reused: int, own: int, bad: Mapping[str, str], done: bool) -> None:
    """Says what is there already and what is made again."""
    pictures = "class picture" if reused + own == 1 else "class pictures"
    yours = f", {own} of them your own" if own else ""
    there = f"{place} holds {reused + own} {pictures}{yours}"
    if done:
        report.notice(f"nothing to make: {there}")
    elif reused + own:
        report.notice(f"reused: {there}")
    if bad:
        report.notice(f"made again: {_listed(bad)}")


# -- making what is missing --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Artist:
    """A loaded model, and how it draws.

    Attributes:
        model: with its weights.
        name: what recipes call it.
        features: text features (T, width) of its prompts.
        sampling, scales: of all pictures.
        batch_size: pictures drawn at once.
        in_bands: whether they are decoded in bands of rows.
    """

    model: Model
    name: str
    features: Mapping[str, Tensor]
    sampling: SamplingConfig
    scales: Schedule
    batch_size: int
    in_bands: bool = False

    @torch.inference_mode()
    def draw(self, prompts: Sequence[str], seeds: Sequence[int], task: Task) -> list[Image.Image]:
        """One picture of each prompt and seed.

        The bits are predicted together and decoded one by one: a decoder rounds otherwise in a batch of another size,
        and that shows in the pixels, while it decides no bit.
        """
        transformer, tokenizer = self.model.transformer, self.model.tokenizer
        assert transformer is not None
        assert tokenizer is not None
        rows = [self.features[prompt].to(transformer.device, transformer.dtype) for prompt in prompts]
        drawn = draw_bits(
            transformer,
            TextFeatures.from_rows(rows),
            self.scales,
            plan(self.sampling, len(self.scales)),
            seeds,
            on_scale=Pace(task, self.scales, len(seeds)),
        )
        total = drawn.total.to(next(tokenizer.parameters()).dtype)
        images = [tokenizer.decode(one, in_bands=self.in_bands) for one in torch.split(total, 1)]
        return [to_pil(to_uint8(image[0])) for image in images]

    def recipe(self, prompt: str, seed: int, image: Image.Image) -> dict[str, Any]:
        """Everything the picture can be drawn again from, as `bitgen sample` writes it."""
        return {
            **base_recipe(prompt, None, seed, self.name, self.model),
            "subjects": [],
            **self.sampling.model_dump(mode="json"),
            "width": image.width,
            "height": image.height,
            "ratio": self.scales.ratio,
            "resolution": None,
            "bits": self.model.config.tokenizer.most_bits,
        }


def _artist(
    options: PriorOptions,
    base: Model,
    sampling: SamplingConfig,
    scales: Schedule,
    prompts: Sequence[str],
    report: Report,
) -> _Artist:
    """A model that is ready to draw these prompts; says which of them are too long.

    Args:
        base: with its weights where they are loaded already.

    Raises:
        InputError: it has no transformer or text encoder.
        ResourceError: it does not fit.
    """
    pictures, prompts, name = len(prompts), list(dict.fromkeys(prompts)), _name(options, base)
    batch_size, in_bands = options.batch_size or AT_ONCE, False
    if base.tokenizer is None and (base.folder / TRANSFORMER_FILE).is_file():
        device = pick_device(options.device)
        dtype = drawing_dtype(options.dtype, base.folder, device)
        text, precision = find_text_model(base, report), pick_text_precision("auto", dtype, device)
        tell_cut(prompts, text.reader, report)
        tokens = max(map(len, text.reader.tokenise(prompts)))
        counts = parameters(base.config)
        wanted = Wanted(base.config, counts, [scales], pictures, options.batch_size, dtype.itemsize, tokens)
        placement = place(wanted, "auto", device)
        keep_freed_memory(placement.total)
        batch_size, in_bands = placement.batch_size, placement.in_bands
        rows = text_features(
            text, [Prompt(prompt) for prompt in prompts], precision, device, report, cached=options.text_cache
        )
        parts, waiting = ("tokenizer", "transformer"), placement.waiting
        model = load_model(base.folder, device=device, dtype=dtype, parts=parts, waiting=waiting)
        if (told := placement.told()) is not None:
            report.notice(told)
    elif base.transformer is None or base.text_encoder is None or base.tokenizer is None:
        raise InputError(f"the model {options.model} has no transformer and text encoder yet", "bitgen train makes one")
    else:
        model = base
        tell_cut(prompts, base.text_encoder, report)
        with torch.inference_mode():
            rows = base.text_encoder.encode_alone(prompts)
    return _Artist(model, name, dict(zip(prompts, rows, strict=True)), sampling, scales, batch_size, in_bands)


@dataclass(frozen=True)
class _Due:
    """A picture to make."""

    file: str
    prompt: str
    seed: int


def _new(place: Path, known: Manifest, count: int) -> list[_Due]:
    """The next `count` pictures that are not listed, under names that nothing in the folder has."""
    listed = {picture.seed for picture in known.pictures}
    found: list[_Due] = []
    number = 0
    while len(found) < count:
        seed = known.seed + number
        if seed not in listed:
            prompt = with_article(known.templates[number % len(known.templates)], known.class_word)
            found.append(_Due(_free_name(place, known, number), prompt, seed))
        number += 1
    return found


def _free_name(place: Path, known: Manifest, number: int) -> str:
    name, copy = f"{number:04d}.png", 1
    while name in known.files or os.path.lexists(place / name):
        copy += 1
        name = f"{number:04d}-{copy}.png"
    return name


def _make(
    place: Path,
    known: Manifest,
    due: Sequence[_Due],
    artist: _Artist,
    report: Report,
    *,
    before: int,
) -> Manifest:
    """Draws and writes pictures, and returns the manifest that lists them too.

    Args:
        before: pictures that are there already, for the message when the user stops.
    """
    done = 0
    try:
        known = _list(place, known, [])  # a folder that cannot be written to is told before anything is drawn
        with report.task(f"pictures of {known.class_word}", len(due)) as task:
            for start in range(0, len(due), artist.batch_size):
                some = due[start : start + artist.batch_size]
                images = artist.draw([one.prompt for one in some], [one.seed for one in some], task)
                known = _write(place, known, some, images, artist)
                done += len(some)
                task.advance(len(some))
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped: {place} holds {before + done} of {before + len(due)} class pictures",
            "the same command goes on from there",
        ) from None
    return known


def _write(
    place: Path, known: Manifest, some: Sequence[_Due], images: Sequence[Image.Image], artist: _Artist
) -> Manifest:
    """Writes a batch, and returns the manifest that lists it too.

    The manifest goes first: stopped in between, a listed picture is missing and made again. The other way round, a
    picture of ours that is not listed would pass for the user's own.
    """
    with _staging(place) as folder:
        made = []
        for one, image in zip(some, images, strict=True):
            file = folder / one.file
            write_picture(file, image, Carried(artist.recipe(one.prompt, one.seed, image)))
            made.append(Made(file=one.file, prompt=one.prompt, seed=one.seed, sha256=fingerprint(file)))
        known = _list(place, known, made)
        for one in some:
            (folder / one.file).replace(place / one.file)
    return known


@contextmanager
def _staging(place: Path) -> Iterator[Path]:
    """A hidden folder in `place` for pictures that the manifest does not list yet.

    Raises:
        ResourceError: no space left.
        InputError: not allowed to write there.
    """
    folder = place / f".batch.{os.getpid()}{PARTIAL}"
    try:
        folder.mkdir(exist_ok=True)
        yield folder
    except OSError as error:
        raise explain(error, place, "write") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _list(place: Path, known: Manifest, made: Sequence[Made]) -> Manifest:
    """Writes the manifest with these pictures put in; what another process has listed meanwhile stays listed."""
    stored = _open(place, known)
    listed = {picture.seed: picture for picture in (*known.pictures, *stored.pictures, *made)}
    known = known.model_copy(update={"pictures": [listed[seed] for seed in sorted(listed)]})
    write_json(place / MANIFEST, known.model_dump(mode="json"))
    return known
