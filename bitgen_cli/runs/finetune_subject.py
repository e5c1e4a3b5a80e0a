"""`bitgen finetune-subject`: a few photos to a subject file that `bitgen sample` finds by its token."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from bitgen_cli import __version__
from bitgen_cli.config import Config, SubjectTraining
from bitgen_cli.engine.checkpoint import RunFolder
from bitgen_cli.engine.data_report import FILE, DataReport, count_captions, data_report
from bitgen_cli.engine.device import DTYPES, bf16_is_fast
from bitgen_cli.engine.folders import FileSource
from bitgen_cli.engine.memory import parameters
from bitgen_cli.engine.model_folder import (
    TOKENIZER_FILE,
    TRANSFORMER_FILE,
    Model,
    fingerprint,
    load_model,
    read_model_config,
    save_model,
)
from bitgen_cli.engine.parallel import Ranks
from bitgen_cli.engine.parts import kind_of
from bitgen_cli.engine.scales import Schedule, ratios
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
    Lesson,
    Material,
    Probe,
    SubjectStage,
)
from bitgen_cli.engine.tensors import stored_dtype
from bitgen_cli.engine.training_memory import Layout, TrainingMemory, subject_drawing, subject_training_memory
from bitgen_cli.errors import InputError, UsageError
from bitgen_cli.files import atomic_path, write_json
from bitgen_cli.presets import DEFAULT, Resolved
from bitgen_cli.report import Report
from bitgen_cli.runs.class_words import check_class, with_article
from bitgen_cli.runs.fitting import PROGRAM, Fit, fit_of, lower_resolution, size, with_recipe
from bitgen_cli.runs.logs import plan_logs
from bitgen_cli.runs.models import provide_model
from bitgen_cli.runs.recipes import subject_recipe
from bitgen_cli.runs.subject_material import (
    class_samples,
    find_photos,
    in_turn,
    load_material,
    other_samples,
    photo_lessons,
    recipe_of,
    save_material,
    schedule_of,
    without_class,
)
from bitgen_cli.runs.train import TrainResult, fit, prepare_device, require_alone

VERB = "finetune-subject"
LEAK = 0.75
"""When more than this of what was learned is there without the token too, the class turns into the subject."""


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
        logs: as in TrainOptions.
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
    logs: tuple[str, ...] = ()


@dataclass(frozen=True)
class SubjectResult:
    """What was learned.

    Attributes:
        name: the subject is known under.
        token: what prompts call it.
        class_word: what they call any thing of its kind.
        file: the registered subject file.
        run: its folder.
        steps: done in all.
        validation: losses and drift after the last step.
        merged: the whole model folder, when one was asked for.
        seconds: it took.
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
        ResourceError: no such device, not enough memory or disk.
        DivergedError: the loss is no longer a number; the last checkpoint is good.
        Interrupted: stopped by the user; the run is saved.
    """
    started = time.perf_counter()
    require_alone()
    begun = _begin(options, report)
    begun.fit.require()
    header, model, config, device, run = begun.header, begun.model, begun.resolved.config, begun.device, begun.run
    training, at_once = recipe_of(config), begun.at_once
    priors, distilled = class_samples(
        header, model, config, device, at_once, report, base=options.model, folder=options.priors
    )
    others = other_samples(header, model, config, at_once, report)
    material = Material(begun.lessons, priors, distilled, others)
    run.create(
        {
            "verb": VERB,
            "name": begun.name,
            "model": str(model.folder.resolve()) if options.model != "demo" else "demo",
            "header": header.model_dump(mode="json"),
            "config": config.model_dump(mode="json"),
            "origins": begun.resolved.origins,
            "logs": begun.logs,
            "drawn_at_once": at_once,
            "first_whole_step": training.first_whole_step,
            "merge": None if options.merge is None else str(options.merge.expanduser().resolve()),
        }
    )
    save_material(run, material)
    write_json(run.path / FILE, _report_on(begun.photos, begun.source, training, model).to_json())
    stage = _stage(config, model, material, header, device, at_once, training.first_whole_step)
    trained = fit(SUBJECT, stage, config, run, _WatchesClass(report, header), Ranks(device=device), started)
    return _finish(begun.name, header, run, trained, model, options.merge, report, started, replace=True)


def try_out_subject(options: SubjectOptions, report: Report) -> Fit:
    """Does everything that comes before class pictures are drawn: what learning the subject needs, and whether it fits.

    Raises: as `finetune_subject`.
    """
    return _begin(options, report).fit


@dataclass(frozen=True)
class _Begun:
    """What is there before class pictures are drawn.

    Attributes:
        name: of the subject.
        header: of its file.
        resolved: the configuration.
        model: the base model, which reads the token.
        lessons: from the photos.
        source, photos: the photos.
        logs: besides metrics.jsonl.
        run: the unused folder.
        device: where it is computed.
        fit: what the training needs.
        at_once: pictures that can be drawn together.
    """

    name: str
    header: Header
    resolved: Resolved
    model: Model
    lessons: list[Lesson]
    source: FileSource
    photos: list[Image.Image]
    logs: dict[str, Any]
    run: RunFolder
    device: torch.device
    fit: Fit
    at_once: int


def _begin(options: SubjectOptions, report: Report) -> _Begun:
    class_word = check_class(options.class_word)
    if options.merge is not None:
        _refuse_used(options.merge)
    name = options.name or _name_of(options.token)
    target = registered_file(name)
    if target.exists() and not options.overwrite:
        raise UsageError(f"a subject {name} is known already", "--name gives another name, --overwrite replaces it")
    logs = plan_logs(options.logs)
    device = prepare_device(options.device)
    run = RunFolder(options.out or _run_folder(name, fresh=target.exists()))
    run.refuse_used()
    source = find_photos(options.photos, report)
    photos = [source.image(index) for index in range(len(source))]
    folder = provide_model(options.model, report)
    resolved = _resolve(options, Model(folder, *read_model_config(folder)), device)
    training = recipe_of(resolved.config)
    model = _whole_model(folder, options.model, device, training.precision)
    assert model.text_encoder is not None
    check_token(options.token, model.text_encoder)
    header = _header(options, class_word, model, resolved.config, source)

    if model.text_encoder.has_no_word_for(class_word):
        report.warning(f"the model's text encoder has no word for {class_word!r}; a class that it knows teaches better")
    _learn_token(model, header)
    lessons = photo_lessons(photos, source, header, model, training, device)
    if any(_cut(model, caption) for lesson in lessons for caption in lesson.captions):
        report.notice("captions longer than the text encoder takes are cut")
    if set(training.train) == {"token"} and training.prior != "none":
        report.notice("the token alone cannot change its class: no class pictures are drawn or used")
    found, at_once = _fit(resolved.config, model, lessons, device, run, report)
    return _Begun(name, header, resolved, model, lessons, source, photos, logs, run, device, found, at_once)


def resume_subject(
    run: RunFolder, description: dict[str, Any], report: Report, *, steps: int | None, device: str
) -> SubjectResult:
    """Continues a run of `finetune_subject` from its last whole checkpoint; the photos are not needed any more.

    Raises: as `finetune_subject`; InputError also when the base model is another one by now.
    """
    started = time.perf_counter()
    require_alone()
    file = run.path / "config.json"
    try:
        name, base, merge = description["name"], description["model"], description["merge"]
        header = Header.model_validate(description["header"])
        at_once = int(description["drawn_at_once"])
        first_whole_step = int(description["first_whole_step"])
        config = Config.model_validate(description["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file} does not describe a training: {error}") from error
    training = recipe_of(config)
    if steps is not None:
        training = training.model_copy(update={"steps": training.steps + steps})
        config = config.model_copy(update={"training": config.training.model_copy(update={"subject": training})})
        header = header.model_copy(update={"recipe": {**header.recipe, "steps": training.steps}})
    run.refuse_finished(training.steps)
    where = prepare_device(device)
    model = _whole_model(provide_model(base, report), base, where, training.precision)
    if model.fingerprints != header.base:
        raise InputError(f"the base model {base} has changed since {run.path} was begun", "learn the subject again")
    _learn_token(model, header)
    stage = _stage(config, model, load_material(run, model, config), header, where, at_once, first_whole_step)
    if steps is not None:
        stored = {"config": config.model_dump(mode="json"), "header": header.model_dump(mode="json")}
        run.describe({**description, **stored})
    watching = _WatchesClass(report, header)
    trained = fit(SUBJECT, stage, config, run, watching, Ranks(device=where), started, resumed=True)
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
    model = _whole_model(provide_model(base, report), base, torch.device("cpu"), "fp32")
    return _merge(subject, model, out, report)


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
    training = recipe_of(resolved.config).model_copy(update={"precision": "bf16"})
    stages = resolved.config.training.model_copy(update={SUBJECT: training})
    config = resolved.config.model_copy(update={"training": stages})
    return Resolved(config, {**resolved.origins, "training.subject.precision": f"device {device.type}"})


CHOICES = ("token", "token,lora", "token,cross,ffn", "all")
"""What the memory is told of besides the choice that was made, where that takes more than half of what is free."""


def _fit(
    config: Config, model: Model, lessons: Sequence[Lesson], device: torch.device, run: RunFolder, report: Report
) -> tuple[Fit, int]:
    """What the training will need, and how many pictures can be drawn at once; says what other choices would need."""
    training = recipe_of(config)
    assert model.text_encoder is not None
    counts = parameters(config.model)
    captions = {caption for lesson in lessons for caption in lesson.captions}
    if training.keeps_class:
        captions.update(training.prior_templates, training.other_prompts)
    tokens = max(len(ids) for ids in model.text_encoder.tokenise(sorted(captions)))
    ratios = sorted({lesson.schedule.ratio for lesson in lessons})

    def largest(config: Config) -> Schedule:
        shapes = [schedule_of(model, recipe_of(config), ratio) for ratio in ratios]
        return max(shapes, key=lambda scales: scales.positions)

    def needed(config: Config, layout: Layout) -> TrainingMemory:
        return subject_training_memory(config, counts, largest(config), tokens, layout)

    def more(config: Config) -> Iterator[tuple[str, Config]]:
        if training.train != ["token", "lora"]:
            yield "--train token,lora", with_recipe(config, SUBJECT, train=["token", "lora"])
        if training.keeps_class:
            yield "--prior none", with_recipe(config, SUBJECT, prior="none")
        lower = lower_resolution(training.resolution or config.model.scales.resolution)
        if lower is not None:
            yield f"--resolution {lower}", with_recipe(config, SUBJECT, resolution=lower)

    layout, name = Layout(device), ",".join(training.train)
    loaded = sum(
        p.nbytes for part in (model.transformer, model.text_encoder, model.tokenizer) if part for p in part.parameters()
    )
    found = fit_of(config, SUBJECT, layout, needed, run.path, returns=loaded, more=more)
    told = f"memory for --train {name}: about {size(found.memory.total)}"
    if found.free is not None and 2 * found.memory.total > found.free - PROGRAM:
        others = {choice: with_recipe(config, SUBJECT, train=choice.split(",")) for choice in CHOICES if choice != name}
        needs = [f"{choice} {size(needed(other, layout).total)}" for choice, other in others.items()]
        told += f"; it would be {', '.join(needs)}"
    report.notice(told)
    if found.free is None:
        return found, AT_ONCE
    # everything but the step is there while pictures are drawn
    room = found.free - PROGRAM - (found.memory.total - max(found.memory.step, found.memory.drawing))
    aside = found.memory.gradients + found.memory.average
    scales = largest(config)
    at_once = next(
        (n for n in (AT_ONCE, 4, 2) if aside + subject_drawing(config, counts, scales, layout, n) <= room), 1
    )
    return found, at_once


def _header(
    options: SubjectOptions, class_word: str, model: Model, config: Config, source: FileSource
) -> Header:
    training = recipe_of(config)
    recipe = training.model_dump(mode="json")
    return Header(
        token=options.token,
        class_word=class_word,
        kind=kind_of(training.train),
        scale=training.lora_alpha / training.lora_rank,
        base=model.fingerprints,
        base_name=options.model,
        recipe={"bitgen": __version__, "sampling": config.sampling.model_dump(mode="json"), **recipe},
        pictures=[{"file": file.name, "sha256": fingerprint(file)} for file in map(source.path, range(len(source)))],
    )


def _report_on(
    photos: Sequence[Image.Image], source: FileSource, training: SubjectTraining, model: Model
) -> DataReport:
    """What the photos are and what is cut off them."""
    assert model.text_encoder is not None
    keys = [source.key(index) for index in range(len(source))]
    captions = [source.captions(index) for index in range(len(source))]
    shapes = ratios(model.config.scales) if training.buckets else (1.0,)
    patch = model.config.tokenizer.patch_size
    pixels = {ratio: schedule_of(model, training, ratio).pixels(patch) for ratio in shapes}
    counts = count_captions(keys, captions, model.text_encoder.max_length, model.text_encoder.vocabulary)
    return data_report(source, keys, [photo.size for photo in photos], [], pixels, counts)


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
    first_whole_step: int,
) -> SubjectStage:
    training = recipe_of(config)
    if model.tokenizer is not None:
        model.tokenizer.to("cpu")  # on the device for picture grids alone
    probes = [
        Probe(SUBJECT, _probe(training, f"{header.token} {header.class_word}")),
        Probe(CLASS, _probe(training, header.class_word)),
        Probe(UNRELATED, _unrelated(training, header.class_word)),
    ]
    scales = schedule_of(model, training, 1.0)
    return SubjectStage(config, model, material, header, probes, scales, device, at_once, first_whole_step)


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
                f"{self._header.token}; fewer steps or a larger --prior-weight keep the class"
            )


PLACES = ("", " on the moon", " on the beach", " in the snow")
"""Where the subject and its class are looked at while it is learned."""


def _probe(training: SubjectTraining, thing: str) -> tuple[str, ...]:
    return in_turn([with_article("a {class}", thing) + place for place in PLACES], training.validation_images)


def _unrelated(training: SubjectTraining, class_word: str) -> tuple[str, ...]:
    """The unrelated prompts but those that name the class."""
    others = without_class(training.unrelated_prompts, class_word)
    return in_turn(others or training.unrelated_prompts, training.validation_images)


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
