"""`bitgen sample`: prompts to pictures, each with the recipe to draw it again."""

from __future__ import annotations

import json
import re
import secrets
import string
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from bitgen_cli import __version__
from bitgen_cli.config import SamplingConfig
from bitgen_cli.engine.active_bits import bits_in_use
from bitgen_cli.engine.data import grid, to_pil, to_tensor, to_uint8
from bitgen_cli.engine.device import DTYPES, keep_freed_memory, pick_device, pick_dtype
from bitgen_cli.engine.graphs import RecordedTransformer
from bitgen_cli.engine.memory import parameters
from bitgen_cli.engine.model_folder import TRANSFORMER_FILE, Model, load_model, read_model_config
from bitgen_cli.engine.sampling import generate, plan
from bitgen_cli.engine.scales import Schedule, buckets, ratios, schedule
from bitgen_cli.engine.subject import Subject, Worn, choose_subjects, find_subject, known_subjects, wearing
from bitgen_cli.engine.text_precision import TextPrecision, pick_text_precision
from bitgen_cli.engine.transformer import Predictor, TextFeatures
from bitgen_cli.errors import InputError, UsageError
from bitgen_cli.files import atomic_path, explain
from bitgen_cli.presets import resolve_stored
from bitgen_cli.report import Report, Task
from bitgen_cli.runs.inspect_config import RECIPE
from bitgen_cli.runs.models import provide_model
from bitgen_cli.runs.placement import Placement, Wanted, place
from bitgen_cli.runs.prompts import Prompt, TextModel, find_text_model, tell_cut, text_features

SMALL_WIDTH = 512
"""Transformers narrower than this are drawn in fp32 on a CPU: bf16 saves them nothing."""
_SHORT = {dtype: name for name, dtype in DTYPES.items()}
LINE_KEYS: dict[str, type | tuple[type, ...]] = {
    "prompt": str,
    "negative_prompt": str,
    "seed": int,
    "num_images": int,
    "aspect": str,
    "resolution": str,
    "bits": int,
    "output": str,
    "cfg": (int, float, list),
    "cfg_layer": (int, list),
    "tau": (int, float, list),
    "target_confidence": (int, float),
    "top_k": int,
    "top_p": (int, float),
    "fast": int,
}  # fmt: skip
"""What a line of a JSONL prompt file may say, and the types it may say it in."""


@dataclass(frozen=True)
class SampleOptions:
    """What to draw and how; None leaves a value to the model's own defaults.

    Attributes:
        prompts: a picture, or `num_images` of them, for each.
        prompts_file: more prompts, one a line or JSON lines with options of their own; `-` is stdin.
        model: as in models.provide_model.
        num_images: per prompt.
        batch_size: pictures drawn at once; no influence on them. None takes as many as fit.
        seed: of each prompt's first picture, the next ones count up; None draws one.
        cfg, tau: a number, or one per scale with commas.
        cfg_layer, target_confidence, top_k, top_p: as in the sampling section of the configuration.
        fast: from 0, all of the work, to 3.
        greedy: top_k 1.
        negative_prompt: what guidance leads away from.
        aspect: W:H.
        resolution: pixel budget of a published schedule.
        bits: per latent position, the first ones; None draws as many as the model was trained for.
        subjects: NAME or FILE, with :SCALE or without; those whose tokens stand in a prompt are found anyway.
        output: a file, a folder, or a template with {prompt}, {seed}, {index}, {model}.
        grid: also writes all pictures as one.
        metadata: whether pictures carry their recipe.
        device, dtype: as in engine.device.
        offload: what may wait in the CPU's memory, as in runs.placement.
        compile: records scales as CUDA graphs (engine.graphs).
        text_dtype: of the text encoder, as in engine.text_precision.
        text_cache: whether text features are kept on disk, and taken from there.
        overrides: sampling.KEY=VALUE.
    """

    prompts: tuple[str, ...] = ()
    prompts_file: str | None = None
    model: str = "demo"
    num_images: int = 1
    batch_size: int | None = None
    seed: int | None = None
    cfg: str | None = None
    cfg_layer: int | None = None
    tau: str | None = None
    target_confidence: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    fast: int | None = None
    greedy: bool = False
    negative_prompt: str | None = None
    aspect: str | None = None
    resolution: str | None = None
    bits: int | None = None
    subjects: tuple[str, ...] = ()
    output: str | None = None
    grid: bool = False
    metadata: bool = True
    device: str = "auto"
    dtype: str = "auto"
    offload: str = "auto"
    compile: bool = False
    text_dtype: str = "auto"
    text_cache: bool = True
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class SampledPicture:
    """One picture that was written."""

    path: Path
    prompt: str
    seed: int
    recipe: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Its path and recipe."""
        return {"path": str(self.path), **self.recipe}


@dataclass(frozen=True)
class SampleResult:
    """Everything that was written.

    Attributes:
        pictures: in the order of the prompts.
        grid: all of them as one, when asked for.
        seconds: drawing and writing took, without loading.
    """

    pictures: list[SampledPicture]
    grid: Path | None
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The result as one JSON object."""
        return {
            "pictures": [picture.to_json() for picture in self.pictures],
            "grid": None if self.grid is None else str(self.grid),
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True)
class _Job:
    """One picture to draw."""

    prompt: str
    negative: str | None
    seed: int
    sampling: SamplingConfig
    schedule: Schedule
    resolution: str | None
    bits: int
    output: str | None
    subjects: tuple[Worn, ...]

    def together(self) -> tuple[object, ...]:
        """Pictures with the same value are drawn in one batch."""
        worn = tuple((worn.subject.file, worn.scale) for worn in self.subjects)
        return self.sampling.model_dump_json(), self.schedule, self.bits, self.negative is None, worn


@dataclass(frozen=True)
class _Setting:
    """What pictures are drawn with.

    Attributes:
        name: of the model, for recipes.
        model: its configuration; weights are loaded when they are needed.
        text: its text encoder.
        precision: number types of the text encoder.
        dtype, device: of everything else.
        known: subjects that are found by their tokens.
        taken: names of pictures that were written.
    """

    name: str
    model: Model
    text: TextModel
    precision: TextPrecision
    dtype: torch.dtype
    device: torch.device
    known: Sequence[Subject]
    taken: set[Path] = field(default_factory=set)


@dataclass(frozen=True)
class _Painter:
    """A model that draws.

    Attributes:
        model: with its weights; subjects are put onto them.
        predictor: its transformer, or what stands in for it.
        placement: where its parts are.
    """

    model: Model
    predictor: Predictor
    placement: Placement


def sample(options: SampleOptions, report: Report) -> SampleResult:
    """Draws the pictures and writes them.

    Args:
        options: what and how.
        report: gets one bar over the pictures and notices about prompts that were cut.

    Raises:
        UsageError: no prompt, an empty prompt, options that do not fit the model or each other.
        InputError: the model or the prompt file cannot be read, the output cannot be written.
    """
    keep_freed_memory()
    requests = list(_requests(options))
    if not requests:
        raise UsageError("no prompt", 'for example: bitgen sample "a red dog on the moon"')
    if not all(request.prompts[0].strip() for request in requests):
        raise UsageError("the prompt is empty", "say what to draw")
    setting = _setting(options, report)
    jobs = [job for request in requests for job in _jobs(request, setting)]
    _tell_subjects(jobs, report)
    if options.output is not None:
        _check_output(options.output, len(jobs))
    tell_cut((job.prompt for job in jobs), setting.text.reader, report)
    placement = _place(jobs, setting, options)
    features = _features(jobs, setting, options, report)
    painter = _load(setting, placement, options, report)
    setting = replace(setting, model=painter.model)
    started = time.perf_counter()
    pictures: dict[int, SampledPicture] = {}
    images: dict[int, Image.Image] = {}
    with report.task("drawing", len(jobs)) as task:
        for batch in _batches(jobs, placement.batch_size):
            drawn = _draw([jobs[i] for i in batch], [features[i] for i in batch], setting, painter, task)
            for index, image in zip(batch, drawn, strict=True):
                pictures[index] = _write(image, jobs[index], index, options, setting)
                if options.grid:
                    images[index] = image
                task.advance()
    ordered = [pictures[i] for i in range(len(jobs))]
    sheet = _write_grid([images[i] for i in range(len(jobs))], options, setting) if options.grid else None
    return SampleResult(ordered, sheet, time.perf_counter() - started)


# -- what to draw ------------------------------------------------------------------------------------------------


def _requests(options: SampleOptions) -> Iterator[SampleOptions]:
    """The options of every prompt: those of the command line, with what its line of the prompt file says on top."""
    for prompt in options.prompts:
        yield replace(options, prompts=(prompt,))
    if options.prompts_file is None:
        return
    name = "standard input" if options.prompts_file == "-" else options.prompts_file
    for number, line in enumerate(_read_lines(options.prompts_file), 1):
        if not line.strip():
            continue
        if line.lstrip().startswith("{"):
            yield _from_json(options, line, f"{name}, line {number}")
        else:
            yield replace(options, prompts=(line.strip(),))


def _read_lines(file: str) -> list[str]:
    if file == "-":
        return sys.stdin.read().splitlines()
    path = Path(file)
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise explain(error, path, "read") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text") from error


def _from_json(options: SampleOptions, line: str, where: str) -> SampleOptions:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: not valid JSON: {error}") from error
    for key, value in row.items():
        if key not in LINE_KEYS:
            raise UsageError(f"{where}: unknown key {key!r}", f"known: {', '.join(LINE_KEYS)}")
        if isinstance(value, bool) or not isinstance(value, LINE_KEYS[key]):
            raise UsageError(f"{where}: {key} cannot be {value!r}")
    if "prompt" not in row:
        raise UsageError(f"{where}: needs a prompt")
    if row.get("num_images", 1) < 1:
        raise UsageError(f"{where}: num_images must be at least 1")
    changed = {key: value for key, value in row.items() if key != "prompt"}
    for key in ("cfg", "tau"):
        if key in changed:
            changed[key] = ",".join(map(str, changed[key])) if isinstance(changed[key], list) else str(changed[key])
    return replace(options, prompts=(row["prompt"],), **changed)


def _jobs(options: SampleOptions, setting: _Setting) -> list[_Job]:
    prompt = options.prompts[0].strip()
    sampling = chosen_sampling(options, setting.model)
    scales = _schedule(options, setting.model)
    plan(sampling, len(scales))  # a list of another length is refused before anything is drawn
    depth = setting.model.config.transformer.depth
    layers = [sampling.cfg_layer] if isinstance(sampling.cfg_layer, int) else sampling.cfg_layer
    if max(layers) > depth:
        raise UsageError(f"cfg_layer {max(layers)} is more than the model's {depth} blocks")
    seed = secrets.randbelow(2**32) if options.seed is None else options.seed
    asked = [_worn(text) for text in options.subjects]
    subjects = choose_subjects(
        prompt, setting.model, setting.text.reader, setting.known, asked, options.negative_prompt
    )
    bits = bits_in_use(setting.model.config.tokenizer, options.bits)
    job = _Job(
        prompt, options.negative_prompt, seed, sampling, scales, options.resolution, bits, options.output, subjects
    )
    return [replace(job, seed=seed + k) for k in range(options.num_images)]


def _worn(text: str) -> Worn:
    """A subject from NAME, FILE, NAME:SCALE or FILE:SCALE."""
    name, colon, scale = text.rpartition(":")
    try:
        strength = float(scale) if colon else 1.0
    except ValueError:
        name, strength = text, 1.0  # a colon that belongs to the file's name
    if not 0 <= strength <= 2:
        raise UsageError(f"--subject {text}: the scale must be from 0 to 2", "1 is as learned")
    return Worn(find_subject(name if colon and name else text), strength)


def _tell_subjects(jobs: Sequence[_Job], report: Report) -> None:
    """Says which subjects are drawn, each once."""
    drawn = {(worn.subject.file, worn.scale): worn.subject for job in jobs for worn in job.subjects}
    for (file, scale), subject in drawn.items():
        strength = "" if scale == 1 else f", scale {scale:g}"
        report.notice(f"{subject.token} is subject {subject.name}, a {subject.header.class_word}{strength}: {file}")


def chosen_sampling(options: SampleOptions, model: Model) -> SamplingConfig:
    """The model's defaults, then the flags, then --set."""
    flags: dict[str, Any] = {
        "cfg": _numbers(options.cfg, "--cfg"),
        "tau": _numbers(options.tau, "--tau"),
        "cfg_layer": options.cfg_layer,
        "target_confidence": options.target_confidence,
        "top_k": 1 if options.greedy else options.top_k,
        "top_p": options.top_p,
        "fast": options.fast,
    }
    if options.greedy and options.top_k not in (None, 1):
        raise UsageError(f"--greedy is --top-k 1 and cannot go with --top-k {options.top_k}")
    if options.target_confidence is not None and options.tau is not None:
        raise UsageError("--target-confidence finds the temperatures, and cannot go with --tau")
    for override in options.overrides:
        if not override.startswith("sampling."):
            raise UsageError(f"--set {override}: only sampling values can be set here", "for example sampling.cfg=4")
    given = {key: value for key, value in flags.items() if value is not None}
    own = model.sampling.model_dump(mode="json")
    if options.tau is not None:
        own["target_confidence"] = None  # the model's own gives way
    stored = {
        "name": parts_name(model.folder),
        "model": model.config.model_dump(mode="json"),
        "sampling": own | given,
    }
    found = resolve_stored(stored, {}, where="sampling options", overrides=options.overrides).config.sampling
    if found.target_confidence is not None and found.top_k == 1:
        raise UsageError("the likelier value of every bit is the same at every temperature: no target_confidence")
    return found


def parts_name(folder: Path) -> str:
    """What a model folder is called: its own name, or that of the run it lies in."""
    return folder.parent.name if folder.name == "model" else folder.name


def _numbers(text: str | None, flag: str) -> float | list[float] | None:
    """One number, or several with commas."""
    if text is None:
        return None
    try:
        numbers = [float(number) for number in text.split(",")]
    except ValueError:
        raise UsageError(f"{flag} {text!r} is not a number, nor numbers with commas") from None
    return numbers[0] if len(numbers) == 1 else numbers


def _schedule(options: SampleOptions, model: Model) -> Schedule:
    scales = model.config.scales
    ratio = 1.0 if 1.0 in ratios(scales) else ratios(scales)[0]
    if options.aspect is not None:
        (ratio,) = buckets(scales, [options.aspect])
    return schedule(scales, patchify=model.config.transformer.patchify, ratio=ratio, resolution=options.resolution)


# -- drawing -----------------------------------------------------------------------------------------------------


def _setting(options: SampleOptions, report: Report) -> _Setting:
    """The model without its weights, and how to compute.

    Raises:
        UsageError, ResourceError: a device or number type that is none, or that this machine has not.
        InputError: no such model, or one that cannot draw.
    """
    device = pick_device(options.device)
    folder = provide_model(options.model, report)
    dtype = drawing_dtype(options.dtype, folder, device)
    precision = pick_text_precision(options.text_dtype, dtype, device)
    model = load_model(folder, parts=())
    if not (folder / TRANSFORMER_FILE).is_file():
        raise InputError(f"the model {folder} has no transformer yet", "bitgen train makes one")
    name = options.model if options.model == "demo" else parts_name(folder)
    return _Setting(name, model, find_text_model(model, report), precision, dtype, device, known_subjects())


@dataclass(frozen=True)
class _Features:
    """Text features (T, width) of a picture's prompt, and of its negative one."""

    prompt: Tensor
    negative: Tensor | None


def _features(jobs: Sequence[_Job], setting: _Setting, options: SampleOptions, report: Report) -> list[_Features]:
    """The text features of every picture, on the CPU; the text encoder is gone when they are there."""
    prompts = [Prompt(job.prompt, job.subjects) for job in jobs]
    negatives = [Prompt(job.negative, job.subjects) for job in jobs if job.negative is not None]
    found = text_features(
        setting.text, prompts + negatives, setting.precision, setting.device, report, cached=options.text_cache
    )
    rest = iter(found[len(jobs) :])
    return [
        _Features(own, None if job.negative is None else next(rest)) for job, own in zip(jobs, found, strict=False)
    ]


def _place(jobs: Sequence[_Job], setting: _Setting, options: SampleOptions) -> Placement:
    """Where the parts of the model go.

    Raises:
        ResourceError: it does not fit.
        UsageError: options that this device has not.
    """
    if options.compile and setting.device.type != "cuda":
        raise UsageError(f"--compile records what a GPU is given to do, and the device is {setting.device}")
    prompts = {text for job in jobs for text in (job.prompt, job.negative) if text is not None}
    wanted = Wanted(
        setting.model.config,
        parameters(setting.model.config),
        list({job.schedule for job in jobs}),
        len(jobs),
        options.batch_size,
        setting.dtype.itemsize,
        max(map(len, setting.text.reader.tokenise(list(prompts)))),
    )
    return place(wanted, options.offload, setting.device)


def _load(setting: _Setting, placement: Placement, options: SampleOptions, report: Report) -> _Painter:
    """The model with the weights that drawing takes, each where it belongs."""
    model = load_model(
        setting.model.folder,
        device=setting.device,
        dtype=setting.dtype,
        parts=("tokenizer", "transformer"),
        waiting=placement.waiting,
    )
    assert model.transformer is not None
    if (told := placement.told()) is not None:
        report.notice(told)
    if options.compile and placement.waiting:
        report.notice("scales are not recorded (--compile): weights take turns")
    records = options.compile and not placement.waiting
    return _Painter(model, RecordedTransformer(model.transformer) if records else model.transformer, placement)


def drawing_dtype(name: str, folder: Path, device: torch.device) -> torch.dtype:
    """The number type a model is drawn with; `auto` takes float32 for small ones on a CPU."""
    config, _, _ = read_model_config(folder)
    small = device.type == "cpu" and config.transformer.width < SMALL_WIDTH
    return torch.float32 if name == "auto" and small else pick_dtype(name, device)


def _batches(jobs: Sequence[_Job], size: int) -> Iterator[list[int]]:
    """Indices of jobs that may be drawn together, at most `size` at a time."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, job in enumerate(jobs):
        groups.setdefault(job.together(), []).append(index)
    for group in groups.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]


@torch.inference_mode()
def _draw(
    jobs: Sequence[_Job], features: Sequence[_Features], setting: _Setting, painter: _Painter, task: Task
) -> list[Image.Image]:
    """The pictures of one batch, in its order."""
    first, model = jobs[0], painter.model
    assert model.tokenizer is not None
    negatives = [own.negative.to(setting.device, setting.dtype) for own in features if own.negative is not None]
    with wearing(model, first.subjects):
        images, _ = generate(
            painter.predictor,
            model.tokenizer,
            TextFeatures.from_rows([own.prompt.to(setting.device, setting.dtype) for own in features]),
            first.schedule,
            plan(first.sampling, len(first.schedule)),
            [job.seed for job in jobs],
            bits=first.bits,
            negative=TextFeatures.from_rows(negatives) if negatives else None,
            on_scale=lambda scale: task.status(f"scale {scale + 1} of {len(first.schedule)}"),
            in_bands=painter.placement.in_bands,
        )
    return [to_pil(image) for image in to_uint8(images)]


# -- writing -----------------------------------------------------------------------------------------------------


def _recipe(job: _Job, image: Image.Image, setting: _Setting) -> dict[str, Any]:
    """Everything the picture can be drawn again from."""
    return {
        **base_recipe(job.prompt, job.negative, job.seed, setting.name, setting.model),
        **({"text_dtype": text} if (text := setting.precision.name) != _SHORT[setting.dtype] else {}),
        "subjects": [
            {"name": worn.subject.name, "token": worn.subject.token, "scale": worn.scale, "sha256": worn.subject.sha256}
            for worn in job.subjects
        ],
        **job.sampling.model_dump(mode="json"),
        "width": image.width,
        "height": image.height,
        "ratio": job.schedule.ratio,
        "resolution": job.resolution,
        "bits": job.bits,
    }


def base_recipe(prompt: str, negative: str | None, seed: int, name: str, model: Model) -> dict[str, Any]:
    """The part of a recipe that says what was drawn, by which model, computed how."""
    assert model.transformer is not None
    return {
        "bitgen": __version__,
        "prompt": prompt,
        "negative_prompt": negative,
        "seed": seed,
        "model": name,
        "fingerprints": model.fingerprints,
        **({"revisions": dict(model.revisions)} if model.revisions else {}),
        "dtype": _SHORT[model.transformer.dtype],
        "device": model.transformer.device.type,
    }


def _parameters(recipe: Mapping[str, Any]) -> str:
    """The recipe as other tools read it from the `parameters` key."""
    negative = f"\nNegative prompt: {recipe['negative_prompt']}" if recipe["negative_prompt"] else ""
    target = recipe["target_confidence"]
    temperature = recipe["tau"] if target is None else f"for a confidence of {target}"
    return (
        f"{recipe['prompt']}{negative}\n"
        f"CFG scale: {recipe['cfg']}, Temperature: {temperature}, "
        f"Top k: {recipe['top_k']}, Top p: {recipe['top_p']}, "
        f"Seed: {recipe['seed']}, Size: {recipe['width']}x{recipe['height']}, Model: {recipe['model']}, "
        f"Version: bitgen {recipe['bitgen']}"
    )


def _write(image: Image.Image, job: _Job, index: int, options: SampleOptions, setting: _Setting) -> SampledPicture:
    recipe = _recipe(job, image, setting)
    path = _path(job, index, setting)
    write_picture(path, image, recipe if options.metadata else None)
    return SampledPicture(path, job.prompt, job.seed, recipe)


def write_picture(path: Path, image: Image.Image, recipe: Mapping[str, Any] | None) -> None:
    """Writes a PNG whole or not at all, with its recipe as JSON and as other tools read it; None leaves it out.

    Raises:
        ResourceError: no space left.
        InputError: not allowed to write there.
    """
    info = None
    if recipe is not None:
        info = PngImagePlugin.PngInfo()
        info.add_itxt("parameters", _parameters(recipe))
        info.add_itxt(RECIPE, json.dumps(recipe, ensure_ascii=False))
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def _write_grid(images: list[Image.Image], options: SampleOptions, setting: _Setting) -> Path:
    if len({image.size for image in images}) > 1:
        raise UsageError("--grid needs pictures of one size", "draw the others in another call")
    columns = min(len(images), max(1, round(len(images) ** 0.5)) if len(images) > 8 else len(images))
    stacked = torch.stack([to_tensor(image, (image.height, image.width)) for image in images])
    place = Path(options.output or ".")
    folder = place if _is_folder(options.output) else place.parent
    path = _free(folder / "grid.png", setting.taken)
    with atomic_path(path) as temporary:
        grid(stacked, columns).save(temporary, format="PNG")
    return path


def _check_output(output: str, count: int) -> None:
    fields = {name for _, name, _, _ in _fields(output) if name is not None}
    unknown = fields - {"prompt", "seed", "index", "model"}
    if unknown:
        known = "known: {prompt} {seed} {index} {model}"
        raise UsageError(f"--output {output}: unknown field {{{min(unknown)}}}", known)
    if count > 1 and not fields and not _is_folder(output):
        hint = "give a folder, or a template with {index}"
        raise UsageError(f"--output {output} is one file for {count} pictures", hint)


def _fields(output: str) -> list[tuple[str, str | None, str | None, str | None]]:
    try:
        return list(string.Formatter().parse(output))
    except ValueError as error:
        raise UsageError(f"--output {output}: {error}", "write {{ for a brace of the file name") from None


def _is_folder(output: str | None) -> bool:
    return output is None or output.endswith(("/", "\\")) or Path(output).is_dir() or not Path(output).suffix


def _path(job: _Job, index: int, setting: _Setting) -> Path:
    """Where a picture goes: a named file is replaced, every other name is a free one."""
    output = job.output
    if output is not None and not _is_folder(output):
        if not any(name is not None for _, name, _, _ in _fields(output)):
            return Path(output)
        prompt, model = slug(job.prompt), slug(setting.name)
        values = {"prompt": prompt, "seed": str(job.seed), "index": f"{index:04d}", "model": model}
        return _free(Path(string.Formatter().vformat(output, (), values)), setting.taken)
    return _free(Path(output or ".") / f"{slug(job.prompt)}-{job.seed}.png", setting.taken)


def _free(path: Path, taken: set[Path]) -> Path:
    """The path, or the same with -2, -3 ... when there is such a file already."""
    number, candidate = 1, path
    while candidate in taken or candidate.exists():
        number += 1
        candidate = path.with_stem(f"{path.stem}-{number}")
    taken.add(candidate)
    return candidate


def slug(text: str) -> str:
    """A text as part of a file name: letters, digits and dashes, at most 60 characters."""
    words = re.sub(r"[^\w]+", "-", text.lower()).strip("-")[:60].rstrip("-")
    return words or "picture"
