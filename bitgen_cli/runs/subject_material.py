"""What a subject is learned from: photos, samples of its class and of other things, made and kept with the run."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bitgen_cli.config import Config, SubjectTraining
from bitgen_cli.engine.captions import captions_beside, text_beside
from bitgen_cli.engine.checkpoint import RunFolder
from bitgen_cli.engine.data import SUFFIXES, load_picture, to_float, to_tensor
from bitgen_cli.engine.folders import FileSource
from bitgen_cli.engine.listings import METADATA
from bitgen_cli.engine.model_folder import Model
from bitgen_cli.engine.sampling import plan
from bitgen_cli.engine.scales import Schedule, nearest_ratio, schedule
from bitgen_cli.engine.sources import open_source
from bitgen_cli.engine.subject import Header
from bitgen_cli.engine.subject_stage import ClassBits, Lesson, Material, class_bits, likeliest
from bitgen_cli.engine.tensors import save_tensors
from bitgen_cli.engine.tokenizer import Tokenizer
from bitgen_cli.errors import InputError, UsageError
from bitgen_cli.files import atomic_path, explain, read_json, write_json
from bitgen_cli.report import Report
from bitgen_cli.runs.class_words import with_article
from bitgen_cli.runs.gen_priors import gen_priors
from bitgen_cli.runs.prior_folder import read_priors
from bitgen_cli.runs.prior_options import PriorOptions

LESSONS, CAPTIONS = "lessons.safetensors", "lessons.json"
LESSON_PARTS, BITS_PARTS = ("photos", "priors"), ("distilled", "others")
"""Fields of Material that are kept as pictures' latents, and as bits."""
FEW = 3
"""Fewer photos than this are warned of."""
MANY = 64
"""More photos than this are no few photos any more, but a data set."""


# -- photos ------------------------------------------------------------------------------------------------------------


def find_photos(place: Path, report: Report) -> FileSource:
    """The photos of a folder, by name, or those that a listing names; what else lies in the folder is told.

    Args:
        place: a folder, one photo, or a listing as `open_source` reads them.
        report: who listens.

    Raises:
        InputError: no such folder, no photos in it, or a caption that cannot be read.
        UsageError: far too many, or photos that are no files.
    """
    place = place.expanduser()
    is_listing = place.is_file() and not place.name.lower().endswith(SUFFIXES)
    if is_listing or any((place / name).is_file() for name in METADATA):
        source = open_source(str(place))
        if not isinstance(source, FileSource):
            raise UsageError(f"{place} is an archive", "photos are files: give the folder they are in")
        report.notice(f"{place}: {source.layout}")
    else:
        files = _photo_files(place, report)
        given = tuple(_beside(file) for file in files)
        names = tuple(file.name for file in files)
        source = FileSource(files[0].parent, names, f"{len(files)} photos", given=given)
    if len(source) > MANY:
        raise UsageError(f"{len(source)} photos in {place}: at most {MANY}", "3 to 5 good ones teach a subject best")
    if len(source) < FEW:
        count = "only 1 photo" if len(source) == 1 else f"only {len(source)} photos"
        report.warning(f"{count}: 3 to 5 on different grounds teach better")
    return source


def _beside(photo: Path) -> tuple[str, ...]:
    """The caption beside a photo; an empty file says that it shows the subject and nothing else."""
    return captions_beside(photo) or (() if text_beside(photo) is None else ("",))


def _photo_files(place: Path, report: Report) -> list[Path]:
    """The photos right in a folder, or the one photo."""
    if place.is_file():
        found, others = [place], []
    elif place.is_dir():
        try:
            entries = sorted(entry for entry in place.iterdir() if not entry.name.startswith("."))
        except OSError as error:
            raise explain(error, place, "read") from error
        found = [entry for entry in entries if entry.is_file() and entry.name.lower().endswith(SUFFIXES)]
        captions = {text_beside(entry) for entry in found}
        others = [entry.name for entry in entries if entry not in found and entry not in captions]
    else:
        raise InputError(f"no photos at {place}: it does not exist", "give the folder of 3 to 5 photos")
    if others:
        shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        report.notice(f"not photos, left out: {shown}")
    if not found:
        raise InputError(f"no photos in {place}", f"looked for {', '.join(SUFFIXES)}")
    return found


def _captions(own: tuple[str, ...], header: Header, training: SubjectTraining) -> tuple[str, ...]:
    """What a photo may be called: its own captions, else the templates.

    In a caption that says neither {subject} nor the token, the class word stands for the subject; where that is missing
    too, the subject is put before it.
    """
    subject = f"{header.token} {header.class_word}"
    word = re.compile(rf"(?<!\w){re.escape(header.class_word)}(?!\w)", re.IGNORECASE)
    named = []
    for text in own or training.photo_templates:
        if "{subject}" not in text and header.token not in text:
            text = word.sub("{subject}", text, count=1) if word.search(text) else f"{{subject}}, {text}".rstrip(", ")
        named.append(text.replace("{subject}", subject))
    return tuple(named)


def views(photo: Image.Image, size: tuple[int, int], training: SubjectTraining, number: int) -> list[Tensor]:
    """Crops of a photo as (3, h, w) uint8 of the size (h, w); the first is the largest one at the centre.

    Args:
        photo: RGB, upright.
        size: of the crops.
        training: how many, how much smaller, and whether half of them are mirrored.
        number: of the photo: decides the crops together with the recipe's seed.
    """
    rng = random.Random(f"{training.seed}:{number}")
    height, width = size
    whole = min(photo.width / width, photo.height / height)
    left, top = (photo.width - whole * width) / 2, (photo.height - whole * height) / 2
    found = []
    for index in range(training.views):
        less = 0.0 if index == 0 else rng.uniform(0, training.crop)
        x, y = rng.random() * less * whole * width, rng.random() * less * whole * height
        side = whole * (1 - less)
        box = (left + x, top + y, left + x + side * width, top + y + side * height)
        crop = photo.crop((round(box[0]), round(box[1]), round(box[2]), round(box[3])))
        if training.flip and index % 2:
            crop = ImageOps.mirror(crop)
        found.append(to_tensor(crop, size))
    return found


def photo_lessons(
    photos: Sequence[Image.Image],
    source: FileSource,
    header: Header,
    model: Model,
    training: SubjectTraining,
    device: torch.device,
) -> list[Lesson]:
    """Views of the photos with what each may be called.

    Args:
        photos, source: pictures, and where they come from with their captions.
        header: of the subject.
        model: the base model, all of it; it says which of the recipe's likely captions fits a photo.
        training: the recipe.
        device: where it is computed.
    """
    lessons = []
    for number, photo in enumerate(photos):
        scales = schedule_of(model, training, photo.height / photo.width if training.buckets else 1.0)
        crops = views(photo, scales.pixels(model.config.tokenizer.patch_size), training, number)
        own = source.captions(number)
        captions = _captions(own, header, training)
        latents = _latents(torch.stack(crops), model, device)
        if training.likely_captions and not own:
            templates = [caption.replace("{subject}", "{class}") for caption in training.likely_captions]
            known = [with_article(template, header.class_word) for template in templates]
            chosen = templates[likeliest(model, latents[0], known, scales, device)]
            captions = (with_article(chosen, f"{header.token} {header.class_word}"),) * len(captions) + captions
        lessons += [Lesson(latent, captions, scales) for latent in latents]
    return lessons


@torch.inference_mode()
def _latents(pixels: Tensor, model: Model, device: torch.device) -> Tensor:
    """(M, C, H, W) of pictures (M, 3, h, w) uint8, on the CPU, a few at a time."""
    assert isinstance(model.tokenizer, Tokenizer)
    tokenizer = model.tokenizer.to(device)
    dtype = next(tokenizer.parameters()).dtype
    found = [tokenizer.latent(to_float(part.to(device)).to(dtype)).float().cpu() for part in torch.split(pixels, 4)]
    return torch.cat(found).clone()


def schedule_of(model: Model, training: SubjectTraining, ratio: float) -> Schedule:
    """The scales that a picture of that height / width is learned at."""
    scales, nearest = model.config.scales, nearest_ratio(ratio, model.config.scales)
    patchify = model.config.transformer.patchify
    return schedule(scales, patchify=patchify, ratio=nearest, resolution=training.resolution)


# -- class samples -----------------------------------------------------------------------------------------------------


def class_samples(
    header: Header,
    model: Model,
    config: Config,
    device: torch.device,
    at_once: int,
    report: Report,
    *,
    base: str,
    folder: Path | None,
) -> tuple[list[Lesson], ClassBits | None]:
    """What keeps the class: pictures that the base model made or the user has, or the base model's own bits.

    Args:
        header: of the subject.
        model: the base model, all of it.
        config: the whole configuration.
        device: where it is computed.
        at_once: pictures drawn at once.
        report: told how far it is.
        base: name of the model, as on the command line.
        folder: of class pictures; None takes those among the user's data.

    Returns:
        Pictures, or bits, as the recipe's prior says.

    Raises:
        UsageError: the folder holds pictures of another model or class.
        InputError: pictures cannot be read or written.
    """
    training = recipe_of(config)
    if not training.keeps_class:
        return [], None
    scales = schedule_of(model, training, 1.0)
    prompts = [with_article(template, header.class_word) for template in training.prior_templates]
    if training.prior == "distill":
        wanted = [prompts[i % len(prompts)] for i in range(training.prior_images)]
        steps = plan(config.sampling, len(scales))
        with report.task("drawing class samples", len(wanted)) as task:
            return [], class_bits(model, wanted, scales, steps, training.seed, task, at_once)
    made = gen_priors(
        PriorOptions(
            class_word=header.class_word,
            count=training.prior_images,
            model=base,
            output=folder,
            templates=tuple(training.prior_templates),
            resolution=training.resolution,
            batch_size=at_once,
            sampling=config.sampling,
            device=str(device),
        ),
        report,
        model,
    )
    found = read_priors(made.folder, header.class_word, model.fingerprints)
    size = scales.pixels(model.config.tokenizer.patch_size)
    pixels = torch.stack([to_tensor(load_picture(prior.file), size) for prior in found])
    latents = _latents(pixels, model, device)
    return [Lesson(latent, (prior.prompt,), scales) for latent, prior in zip(latents, found, strict=True)], None


def other_samples(header: Header, model: Model, config: Config, at_once: int, report: Report) -> ClassBits | None:
    """What keeps other things than the class, as the base model draws them."""
    training = recipe_of(config)
    prompts = without_class(training.other_prompts, header.class_word)
    if not training.keeps_class or not prompts or training.other_share == 0:
        return None
    scales = schedule_of(model, training, 1.0)
    wanted, steps = in_turn(prompts, training.other_images), plan(config.sampling, len(scales))
    with report.task("drawing other things", len(wanted)) as task:
        return class_bits(model, wanted, scales, steps, training.seed, task, at_once)


# -- kept with the run -------------------------------------------------------------------------------------------------


def save_material(run: RunFolder, material: Material) -> None:
    """Keeps what is learned from in the run folder, so that resuming needs neither photos nor class pictures."""
    tensors: dict[str, Tensor] = {}
    captions: dict[str, Any] = {}
    for part in LESSON_PARTS:
        lessons: Sequence[Lesson] = getattr(material, part)
        tensors |= {f"{part}.{i}": lesson.latent for i, lesson in enumerate(lessons)}
        captions[part] = [{"captions": lesson.captions, "ratio": lesson.schedule.ratio} for lesson in lessons]
    for part in BITS_PARTS:
        samples: ClassBits | None = getattr(material, part)
        captions[part] = None if samples is None else samples.captions
        if samples is not None:
            tensors |= {f"{part}.bits.{k}": bits for k, bits in enumerate(samples.bits)}
            tensors[f"{part}.margins"] = samples.margins
    try:
        run.start.mkdir(exist_ok=True)
    except OSError as error:
        raise explain(error, run.start, "create") from error
    with atomic_path(run.start / LESSONS) as temporary:
        save_tensors(tensors, temporary)
    write_json(run.start / CAPTIONS, captions)


def load_material(run: RunFolder, model: Model, config: Config) -> Material:
    """What `save_material` kept.

    Raises:
        InputError: it cannot be read.
    """
    stored, training = read_json(run.start / CAPTIONS), recipe_of(config)
    file = run.start / LESSONS

    def lessons(part: str) -> list[Lesson]:
        rows = enumerate(stored[part])
        return [
            Lesson(tensors[f"{part}.{i}"], tuple(row["captions"]), schedule_of(model, training, float(row["ratio"])))
            for i, row in rows
        ]

    def samples(part: str) -> ClassBits | None:
        if stored[part] is None:
            return None
        scales = schedule_of(model, training, 1.0)
        bits = [tensors[f"{part}.bits.{k}"] for k in range(len(scales))]
        return ClassBits(bits, tensors[f"{part}.margins"], tuple(stored[part]), scales)

    try:
        tensors = load_file(file)
        return Material(lessons("photos"), lessons("priors"), samples("distilled"), samples("others"))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{run.start} does not hold what the run learns from: {error}") from error
    except OSError as error:
        raise explain(error, file, "read") from error


# -- helpers -----------------------------------------------------------------------------------------------------------


def recipe_of(config: Config) -> SubjectTraining:
    """The recipe for subjects.

    Raises:
        InputError: the configuration has none.
    """
    training = config.training.subject
    if training is None:
        raise InputError(f"{config.name} has no recipe for subjects")
    return training


def without_class(prompts: Sequence[str], class_word: str) -> list[str]:
    """The prompts but those that name the class."""
    word = re.compile(rf"(?<!\w){re.escape(class_word)}(?!\w)", re.IGNORECASE)
    return [prompt for prompt in prompts if not word.search(prompt)]


def in_turn(prompts: Sequence[str], count: int) -> tuple[str, ...]:
    """At least one, at most `count` prompts, in turn."""
    return tuple(prompts[i % len(prompts)] for i in range(max(1, count)))


