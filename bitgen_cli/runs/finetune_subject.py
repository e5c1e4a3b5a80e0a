"""`bitgen finetune-subject`: a few photos to a subject file that `bitgen sample` finds by its token."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bitgen_cli import __version__
from bitgen_cli.config import Config, SubjectTraining
from bitgen_cli.engine.checkpoint import RunFolder
from bitgen_cli.engine.data import SUFFIXES, load_picture, to_float, to_tensor
from bitgen_cli.engine.device import DTYPES, bf16_is_fast, free_memory
from bitgen_cli.engine.memory import BYTES, TrainingMemory, parameters, sampling_memory, subject_training_memory
from bitgen_cli.engine.model_folder import (
    TOKENIZER_FILE,
    TRANSFORMER_FILE,
    Model,
    find_model,
    fingerprint,
    load_model,
    read_model_config,
    save_model,
)
from bitgen_cli.engine.parts import kind_of
from bitgen_cli.engine.sampling import plan
from bitgen_cli.engine.scales import Schedule, nearest_ratio, schedule
from bitgen_cli.engine.subject import (
    Header,
    Subject,
    Worn,
    check_token,
    find_subject,
    read_subject,
    registered_file,
    wearing,
)
from bitgen_cli.engine.subject_stage import (
    AT_ONCE,
    CLASS,
    SUBJECT,
    UNRELATED,
    ClassBits,
    Lesson,
    Material,
    Probe,
    SubjectStage,
    class_bits,
    likeliest,
)
from bitgen_cli.engine.tensors import save_tensors, stored_dtype
from bitgen_cli.engine.tokenizer import Tokenizer
from bitgen_cli.errors import InputError, ResourceError, UsageError
from bitgen_cli.files import atomic_path, explain, read_json, write_json
from bitgen_cli.presets import DEFAULT, Resolved
from bitgen_cli.report import Report
from bitgen_cli.runs.gen_priors import PriorOptions, check_class, gen_priors, read_priors, with_article
from bitgen_cli.runs.recipes import subject_recipe
from bitgen_cli.runs.train import TrainResult, fit, prepare_device

VERB = "finetune-subject"
LESSONS, CAPTIONS = "lessons.safetensors", "lessons.json"
LESSON_PARTS, BITS_PARTS = ("photos", "priors"), ("distilled", "others")
"""Fields of Material that are kept as pictures' latents, and as bits."""
FEW = 3
"""Fewer photos than this are warned of."""
LEAK = 0.5
"""When more than this of what was learned is there without the token too, the class turns into the subject."""
MANY = 64
"""More photos than this are no few photos any more, but a data set."""


@dataclass(frozen=True)
class SubjectOptions:
    """What to learn and how; None leaves a value to the recipe.

    Attributes:
        photos: folder of the photos, or a photo.
        class_word: what kind of thing the subject is.
        token: what prompts call it.
        name: it is kept under; None takes the token's letters.
        model: `demo`, a model folder or a run folder.
        out: folder of the run; None makes one in the current folder.
        priors: folder of class pictures; None keeps those of the base model among the user's data.
        preset: whose recipe is taken; None takes the built-in model's for that model, else the defaults.
        config_file, overrides, flags: as in presets.resolve.
        merge: a whole model folder with the subject in it is written there too.
        overwrite: whether a subject of that name may be replaced.
        device: as in engine.device.
    """

    photos: Path
    class_word: str
    token: str = "[V]"
    name: str | None = None
    model: str = "demo"
    out: Path | None = None
    priors: Path | None = None
    preset: str | None = None
    config_file: Path | None = None
    overrides: tuple[str, ...] = ()
    flags: Mapping[str, Any] | None = None
    merge: Path | None = None
    overwrite: bool = False
    device: str = "auto"


@dataclass(frozen=True)
class SubjectResult:
    """What was learned.

    Attributes:
        name: the subject is known under.
        token, class_word: what prompts call it.
        file: the registered subject file.
        run: its folder.
        steps: done in all.
        validation: losses and drift after the last step (SubjectStage.validate).
        merged: the whole model folder, when one was asked for.
        seconds: this call took.
    """

    name: str
    token: str
    class_word: str
    file: Path
    run: Path
    steps: int
    validation: dict[str, float]
    merged: Path | None
    seconds: float

    @property
    def phrase(self) -> str:
        """What prompts say for it."""
        return f"{self.token} {self.class_word}"

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON values."""
        merged = None if self.merged is None else str(self.merged)
        return {**asdict(self), "file": str(self.file), "run": str(self.run), "merged": merged}


def finetune_subject(options: SubjectOptions, report: Report) -> SubjectResult:
    """Learns a subject and registers it under its name.

    Raises:
        UsageError: options that do not fit the model or each other, a name that is taken, a token that is a word.
        InputError: no photos, unreadable ones, or a model that cannot be read.
        ResourceError: no such device, not enough memory, or no space left.
        DivergedError: the loss is no longer a number; the last checkpoint is good.
        Interrupted: stopped by the user; the run is saved.
    """
    started = time.perf_counter()
    class_word = check_class(options.class_word)
    if options.merge is not None:
        _refuse_used(options.merge)
    name = options.name or _name_of(options.token)
    target = registered_file(name)
    if target.exists() and not options.overwrite:
        raise UsageError(f"a subject {name} is known already", "--name gives another name, --overwrite replaces it")
    device = prepare_device(options.device)
    run = RunFolder(options.out or _run_folder(name, fresh=target.exists()))
    run.refuse_used()
    files = find_photos(options.photos, report)
    photos = [load_picture(file) for file in files]
    folder = find_model(options.model)
    resolved = _resolve(options, Model(folder, *read_model_config(folder)), device)
    training = _training(resolved.config)
    model = _whole_model(folder, options.model, device, training.precision)
    assert model.text_encoder is not None
    check_token(options.token, model.text_encoder)
    header = _header(options, class_word, model, resolved.config, files)

    if model.text_encoder.has_no_word_for(class_word):
        report.warning(f"the model's text encoder has no word for {class_word!r}; a class that it knows teaches better")
    _learn_token(model, header)
    lessons = _photo_lessons(photos, files, header, model, training, device)
    if any(_cut(model, caption) for lesson in lessons for caption in lesson.captions):
        report.notice("captions longer than the text encoder takes are cut")
    at_once = _check_memory(resolved.config, model, lessons, device, report)
    priors, distilled = _class_samples(options, header, model, resolved.config, device, at_once, report)
    others = _other_samples(header, model, resolved.config, at_once, report)
    material = Material(lessons, priors, distilled, others)
    run.create(
        {
            "verb": VERB,
            "name": name,
            "model": str(folder.resolve()) if options.model != "demo" else "demo",
            "header": header.model_dump(mode="json"),
            "config": resolved.config.model_dump(mode="json"),
            "origins": resolved.origins,
            "drawn_at_once": at_once,
            "merge": None if options.merge is None else str(options.merge.expanduser().resolve()),
        }
    )
    _save_material(run, material)
    stage = _stage(resolved.config, model, material, header, device, at_once)
    trained = fit(SUBJECT, stage, resolved.config, run, _WatchesClass(report, header), device, started)
    return _finish(name, header, run, trained, model, options.merge, report, started, replace=True)


def resume_subject(
    run: RunFolder, description: dict[str, Any], report: Report, *, steps: int | None, device: str
) -> SubjectResult:
    """Continues a run of `finetune_subject` from its last whole checkpoint; the photos are not needed any more.

    Raises: as `finetune_subject`; InputError also when the base model is another one by now.
    """
    started = time.perf_counter()
    file = run.path / "config.json"
    try:
        name, base, merge = description["name"], description["model"], description["merge"]
        header = Header.model_validate(description["header"])
        at_once = int(description["drawn_at_once"])
        config = Config.model_validate(description["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file} does not describe a training: {error}") from error
    training = _training(config)
    if steps is not None:
        training = training.model_copy(update={"steps": training.steps + steps})
        config = config.model_copy(update={"training": config.training.model_copy(update={"subject": training})})
        header = header.model_copy(update={"recipe": {**header.recipe, "steps": training.steps}})
    done = max(run.steps(), default=0)
    if done >= training.steps:
        raise UsageError(f"{run.path} is finished: {done} of {training.steps} steps", "--steps N trains N more")
    where = prepare_device(device)
    model = _whole_model(find_model(base), base, where, training.precision)
    if model.fingerprints != header.base:
        raise InputError(f"the base model {base} has changed since {run.path} was begun", "learn the subject again")
    _learn_token(model, header)
    stage = _stage(config, model, _load_material(run, model, config), header, where, at_once)
    if steps is not None:
        stored = {"config": config.model_dump(mode="json"), "header": header.model_dump(mode="json")}
        run.describe({**description, **stored})
    trained = fit(SUBJECT, stage, config, run, _WatchesClass(report, header), where, started, resumed=True)
    out = None if merge is None else Path(merge)
    return _finish(name, header, run, trained, model, out, report, started, replace=False)


def merge_subject(name: str, base: str, out: Path, report: Report) -> Path:
    """Writes a whole model folder with a subject in it, and returns that folder.

    Args:
        name: of the subject, or its file.
        base: the model it was learned on.
        out: the folder, new or empty.

    Raises:
        UsageError: no such subject, one of another model, or a folder that is in use.
        InputError: a file cannot be read or written.
    """
    subject = find_subject(name)
    model = _whole_model(find_model(base), base, torch.device("cpu"), "fp32")
    return _merge(subject, model, out, report)


# -- photos ------------------------------------------------------------------------------------------------------------


def find_photos(place: Path, report: Report) -> list[Path]:
    """The photos of a folder, by name; what else lies there is named.

    Raises:
        InputError: no such folder, or no photos in it.
        UsageError: far too many.
    """
    place = place.expanduser()
    if place.is_file():
        found, others = [place], []
    elif place.is_dir():
        try:
            entries = sorted(entry for entry in place.iterdir() if not entry.name.startswith("."))
        except OSError as error:
            raise explain(error, place, "read") from error
        found = [entry for entry in entries if entry.is_file() and entry.name.lower().endswith(SUFFIXES)]
        captions = {entry.with_suffix(".txt") for entry in found}
        others = [entry.name for entry in entries if entry not in found and entry not in captions]
    else:
        raise InputError(f"no photos at {place}: it does not exist", "give the folder of 3 to 5 photos")
    if others:
        shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        report.notice(f"not photos, left out: {shown}")
    if not found:
        raise InputError(f"no photos in {place}", f"looked for {', '.join(SUFFIXES)}")
    if len(found) > MANY:
        raise UsageError(f"{len(found)} photos in {place}: at most {MANY}", "3 to 5 good ones teach a subject best")
    if len(found) < FEW:
        count = "only 1 photo" if len(found) == 1 else f"only {len(found)} photos"
        report.warning(f"{count}: 3 to 5 on different grounds teach better")
    return found


def _captions(file: Path, header: Header, training: SubjectTraining) -> tuple[str, ...]:
    """What a photo may be called: its own caption, else the templates.

    In a caption that says neither {subject} nor the token, the class word stands for the subject; where that is missing
    too, the subject is put before it.
    """
    subject = f"{header.token} {header.class_word}"
    own = file.with_suffix(".txt")
    if own.is_file():
        try:
            text = " ".join(own.read_text(encoding="utf-8-sig").split())
        except OSError as error:
            raise explain(error, own, "read") from error
        except UnicodeDecodeError as error:
            raise InputError(f"{own} is not UTF-8 text", "save it as UTF-8") from error
        if "{subject}" not in text and header.token not in text:
            word = re.compile(rf"(?<!\w){re.escape(header.class_word)}(?!\w)", re.IGNORECASE)
            text = word.sub("{subject}", text, count=1) if word.search(text) else f"{{subject}}, {text}".rstrip(", ")
        return (text.replace("{subject}", subject),)
    return tuple(template.replace("{subject}", subject) for template in training.photo_templates)


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


def _photo_lessons(
    photos: Sequence[Image.Image],
    files: Sequence[Path],
    header: Header,
    model: Model,
    training: SubjectTraining,
    device: torch.device,
) -> list[Lesson]:
    lessons = []
    for number, (photo, file) in enumerate(zip(photos, files, strict=True)):
        scales = _schedule(model, training, photo.height / photo.width if training.buckets else 1.0)
        crops = views(photo, scales.pixels(model.config.tokenizer.patch_size), training, number)
        captions = _captions(file, header, training)
        latents = _latents(torch.stack(crops), model, device)
        if training.likely_captions and not file.with_suffix(".txt").is_file():
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


def _schedule(model: Model, training: SubjectTraining, ratio: float) -> Schedule:
    scales, nearest = model.config.scales, nearest_ratio(ratio, model.config.scales)
    patchify = model.config.transformer.patchify
    return schedule(scales, patchify=patchify, ratio=nearest, resolution=training.resolution)


# -- class samples -----------------------------------------------------------------------------------------------------


def _class_samples(
    options: SubjectOptions,
    header: Header,
    model: Model,
    config: Config,
    device: torch.device,
    at_once: int,
    report: Report,
) -> tuple[list[Lesson], ClassBits | None]:
    """What keeps the class: pictures that the base model made or the user has, or the base model's own bits."""
    training = _training(config)
    if not training.keeps_class:
        return [], None
    scales = _schedule(model, training, 1.0)
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
            model=options.model,
            output=options.priors,
            templates=tuple(training.prior_templates),
            resolution=training.resolution,
            batch_size=at_once,
            sampling=config.sampling,
            device=options.device,
        ),
        report,
        model,
    )
    found = read_priors(made.folder, header.class_word, model.fingerprints)
    size = scales.pixels(model.config.tokenizer.patch_size)
    pixels = torch.stack([to_tensor(load_picture(prior.file), size) for prior in found])
    latents = _latents(pixels, model, device)
    return [Lesson(latent, (prior.prompt,), scales) for latent, prior in zip(latents, found, strict=True)], None


def _other_samples(header: Header, model: Model, config: Config, at_once: int, report: Report) -> ClassBits | None:
    """What keeps other things than the class, as the base model draws them."""
    training = _training(config)
    prompts = _without_class(training.other_prompts, header.class_word)
    if not training.keeps_class or not prompts or training.other_share == 0:
        return None
    scales = _schedule(model, training, 1.0)
    wanted, steps = _repeated(prompts, training.other_images), plan(config.sampling, len(scales))
    with report.task("drawing other things", len(wanted)) as task:
        return class_bits(model, wanted, scales, steps, training.seed, task, at_once)


# -- the run -----------------------------------------------------------------------------------------------------------


def _whole_model(folder: Path, name: str, device: torch.device, precision: str) -> Model:
    """All parts of a model, its weights in the training's number type: what learns gets float32 later."""
    model = load_model(folder, device=device, dtype=DTYPES[precision])
    if model.transformer is None or model.text_encoder is None or model.tokenizer is None:
        raise InputError(f"the model {name} has no transformer and text encoder yet", "bitgen train makes one")
    return model


def _resolve(options: SubjectOptions, model: Model, device: torch.device) -> Resolved:
    """The model's configuration with the recipe; bfloat16 where the device is faster with it and nobody chose."""
    resolved = subject_recipe(
        model,
        options.model,
        preset=options.preset,
        config_file=options.config_file,
        overrides=options.overrides,
        flags=options.flags,
    )
    if resolved.origins["training.subject.precision"] != DEFAULT or not bf16_is_fast(device):
        return resolved
    training = _training(resolved.config).model_copy(update={"precision": "bf16"})
    stages = resolved.config.training.model_copy(update={SUBJECT: training})
    config = resolved.config.model_copy(update={"training": stages})
    return Resolved(config, {**resolved.origins, "training.subject.precision": f"device {device.type}"})


def _training(config: Config) -> SubjectTraining:
    training = config.training.subject
    if training is None:
        raise InputError(f"{config.name} has no recipe for subjects")
    return training


CHOICES = ("token", "token,lora", "token,cross,ffn", "all")
"""What the memory is told of besides the choice that was made."""


def _check_memory(
    config: Config, model: Model, lessons: Sequence[Lesson], device: torch.device, report: Report
) -> int:
    """Says what the training will need, and what other choices would; returns how many pictures can be drawn at once.

    Raises:
        ResourceError: more than the device has.
    """
    training = _training(config)
    assert model.text_encoder is not None
    counts = parameters(config.model)
    captions = {caption for lesson in lessons for caption in lesson.captions}
    tokens = max(len(ids) for ids in model.text_encoder.tokenise(sorted(captions)))
    largest = max((lesson.schedule for lesson in lessons), key=lambda scales: scales.positions)

    def needed(train: Sequence[str]) -> TrainingMemory:
        chosen = training.model_copy(update={"train": list(train)})
        other = config.model_copy(update={"training": config.training.model_copy(update={SUBJECT: chosen})})
        return subject_training_memory(other, counts, largest, tokens, autoencoder=device.type == "cpu")

    memory, name = needed(training.train), ",".join(training.train)
    own = memory.total
    others = [f"{choice} {_size(needed(choice.split(',')).total)}" for choice in CHOICES if choice != name]
    report.notice(f"memory for --train {name}: about {_size(own)}; it would be {', '.join(others)}")
    free = free_memory(device)
    if free is None:
        return AT_ONCE
    free += sum(p.nbytes for part in (model.transformer, model.text_encoder) if part for p in part.parameters())
    if own + PROGRAM > free:
        raise ResourceError(
            f"--train {name} needs about {_size(own + PROGRAM)} of memory, {device} has {_size(free)} free",
            "what needs less: --train token,lora, --prior none, --set training.subject.batch_size=1, "
            "--set training.subject.checkpoint_activations=true, a smaller --resolution",
        )
    left = free - PROGRAM - (own - memory.activations)
    number = BYTES[training.precision]

    def drawing(pictures: int) -> int:
        found = sampling_memory(config.model, counts, largest, number, pictures)
        return found.total - found.weights

    return next((pictures for pictures in (AT_ONCE, 4, 2) if drawing(pictures) <= left), 1)


PROGRAM = 2**29
"""Bytes that the program, its libraries and their work space take besides."""


def _size(number: int) -> str:
    return f"{number / 2**30:.1f} GB" if number >= 2**30 else f"{number / 2**20:.0f} MB"


def _header(
    options: SubjectOptions, class_word: str, model: Model, config: Config, files: Sequence[Path]
) -> Header:
    training = _training(config)
    recipe = training.model_dump(mode="json")
    return Header(
        token=options.token,
        class_word=class_word,
        kind=kind_of(training.train),
        scale=training.lora_alpha / training.lora_rank,
        base=model.fingerprints,
        base_name=options.model,
        recipe={"bitgen": __version__, "sampling": config.sampling.model_dump(mode="json"), **recipe},
        pictures=[{"file": file.name, "sha256": fingerprint(file)} for file in files],
    )


def _learn_token(model: Model, header: Header) -> None:
    assert model.text_encoder is not None
    model.text_encoder.learn(header.token, model.text_encoder.embedding_of(header.class_word))


def _cut(model: Model, caption: str) -> bool:
    assert model.text_encoder is not None
    return model.text_encoder.is_cut(caption)


def _stage(
    config: Config,
    model: Model,
    material: Material,
    header: Header,
    device: torch.device,
    at_once: int,
) -> SubjectStage:
    training = _training(config)
    if model.tokenizer is not None:
        model.tokenizer.to("cpu")  # on the device for picture grids alone
    probes = [
        Probe(SUBJECT, _probe(training, f"{header.token} {header.class_word}")),
        Probe(CLASS, _probe(training, header.class_word)),
        Probe(UNRELATED, _unrelated(training, header.class_word)),
    ]
    scales = _schedule(model, training, 1.0)
    return SubjectStage(config, model, material, header, probes, scales, device, at_once)


class _WatchesClass:
    """Passes everything on, and warns once when the class becomes the subject."""

    def __init__(self, report: Report, header: Header) -> None:
        self._report, self._header = report, header
        self._warned = False
        self.notice, self.warning, self.task = report.notice, report.warning, report.task

    def metrics(self, step: int, total_steps: int, values: Mapping[str, float]) -> None:
        """As Report says."""
        self._report.metrics(step, total_steps, values)
        if values.get("drift_class_leak", 0.0) > LEAK and not self._warned:
            self._warned = True
            self._report.warning(
                f"after {step} steps pictures of a {self._header.class_word} without the token turn into "
                f"{self._header.token}; fewer steps, --prior images or a larger --prior-weight keep the class"
            )


PLACES = ("", " on the moon", " on the beach", " in the snow")
"""Where the subject and its class are looked at while it is learned."""


def _probe(training: SubjectTraining, thing: str) -> tuple[str, ...]:
    return _repeated([with_article("a {class}", thing) + place for place in PLACES], training.validation_images)


def _unrelated(training: SubjectTraining, class_word: str) -> tuple[str, ...]:
    """The unrelated prompts but those that name the class."""
    others = _without_class(training.unrelated_prompts, class_word)
    return _repeated(others or training.unrelated_prompts, training.validation_images)


def _without_class(prompts: Sequence[str], class_word: str) -> list[str]:
    word = re.compile(rf"(?<!\w){re.escape(class_word)}(?!\w)", re.IGNORECASE)
    return [prompt for prompt in prompts if not word.search(prompt)]


def _repeated(prompts: Sequence[str], count: int) -> tuple[str, ...]:
    """At least one, at most `count` prompts, in turn."""
    return tuple(prompts[i % len(prompts)] for i in range(max(1, count)))


def _save_material(run: RunFolder, material: Material) -> None:
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


def _load_material(run: RunFolder, model: Model, config: Config) -> Material:
    stored, training = read_json(run.start / CAPTIONS), _training(config)
    file = run.start / LESSONS

    def lessons(part: str) -> list[Lesson]:
        rows = enumerate(stored[part])
        return [
            Lesson(tensors[f"{part}.{i}"], tuple(row["captions"]), _schedule(model, training, float(row["ratio"])))
            for i, row in rows
        ]

    def samples(part: str) -> ClassBits | None:
        if stored[part] is None:
            return None
        scales = _schedule(model, training, 1.0)
        bits = [tensors[f"{part}.bits.{k}"] for k in range(len(scales))]
        return ClassBits(bits, tensors[f"{part}.margins"], tuple(stored[part]), scales)

    try:
        tensors = load_file(file)
        return Material(lessons("photos"), lessons("priors"), samples("distilled"), samples("others"))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{run.start} does not hold what the run learns from: {error}") from error
    except OSError as error:
        raise explain(error, file, "read") from error


def _finish(
    name: str,
    header: Header,
    run: RunFolder,
    trained: TrainResult,
    model: Model,
    merge: Path | None,
    report: Report,
    started: float,
    *,
    replace: bool,
) -> SubjectResult:
    """Registers the subject, unless its name went to another one meanwhile, and merges it where that was asked for."""
    target = registered_file(name)
    if not replace and _is_another(target, header):
        report.warning(
            f"{name} is another subject by now and stays it; `bitgen sample --subject {run.subject}` draws this one"
        )
        target = run.subject
    else:
        with atomic_path(target) as temporary:
            temporary.write_bytes(run.subject.read_bytes())
    merged = None
    if merge is not None:
        fresh = _whole_model(model.folder, header.base_name, torch.device("cpu"), "fp32")
        merged = _merge(read_subject(target, name), fresh, merge, report)
    return SubjectResult(
        name=name,
        token=header.token,
        class_word=header.class_word,
        file=target,
        run=run.path,
        steps=trained.steps,
        validation=trained.validation,
        merged=merged,
        seconds=time.perf_counter() - started,
    )


def _is_another(file: Path, header: Header) -> bool:
    """Whether a registered file holds something else than an earlier state of this subject."""
    if not file.exists():
        return False
    try:
        found = read_subject(file).header
    except InputError:
        return False  # damaged: nothing to keep

    def identity(header: Header) -> dict[str, Any]:
        values = header.model_dump()
        return {**values, "recipe": {key: value for key, value in values["recipe"].items() if key != "steps"}}

    return identity(found) != identity(header)


def _merge(subject: Subject, model: Model, out: Path, report: Report) -> Path:
    _refuse_used(out)
    assert model.text_encoder is not None
    with wearing(model, [Worn(subject)]):
        model.text_encoder.settle()
        save_model(
            out,
            model.config,
            model.sampling,
            tokenizer=model.folder / TOKENIZER_FILE,
            transformer=model.transformer,
            text_encoder=model.text_encoder,
            dtype=stored_dtype(model.folder / TRANSFORMER_FILE),
        )
    return out


def _refuse_used(out: Path) -> None:
    """Raises UsageError when a merged model would replace something."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UsageError(f"{out} is not empty", "choose a new folder for the merged model")


def _run_folder(name: str, *, fresh: bool) -> Path:
    """Where the run goes when nobody says; `fresh` goes beside the runs that made the subject before."""
    folder, number = Path(f"subject-{name}"), 2
    while fresh and folder.exists():
        folder, number = Path(f"subject-{name}-{number}"), number + 1
    return folder


def _name_of(token: str) -> str:
    """A token's letters as the name of its subject."""
    letters = "".join(c for c in token.lower() if c.isascii() and (c.isalnum() or c in "-_")).strip("-_")
    if not letters:
        raise UsageError(f"--token {token} gives the subject no name", "give one with --name")
    return letters
