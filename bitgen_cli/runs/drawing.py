"""A model that draws: how it computes, where its parts are, and a batch of pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from bitgen_cli.engine.data import to_pil, to_uint8
from bitgen_cli.engine.device import keep_freed_memory, pick_device, pick_dtype
from bitgen_cli.engine.editing import Given
from bitgen_cli.engine.graphs import RecordedTransformer
from bitgen_cli.engine.memory import parameters
from bitgen_cli.engine.model_folder import (
    BUILT_IN,
    TRANSFORMER_FILE,
    Model,
    load_model,
    model_name,
    read_model_config,
)
from bitgen_cli.engine.refine import Refined
from bitgen_cli.engine.sampling import generate, plan
from bitgen_cli.engine.subject import Subject, known_subjects, wearing
from bitgen_cli.engine.text_precision import TextPrecision, pick_text_precision
from bitgen_cli.engine.transformer import Predictor, TextFeatures
from bitgen_cli.errors import InputError, UsageError
from bitgen_cli.report import Report, Task
from bitgen_cli.runs.jobs import Job, SampleOptions
from bitgen_cli.runs.models import provide_model
from bitgen_cli.runs.pace import Pace
from bitgen_cli.runs.placement import Placement, Wanted, check_offload, place
from bitgen_cli.runs.prompts import Prompt, TextModel, find_text_model, text_features
from bitgen_cli.runs.scale_pictures import Frames

SMALL_WIDTH = 512
"""Transformers narrower than this are drawn in fp32 on a CPU: bf16 saves them nothing."""


@dataclass(frozen=True)
class Setting:
    """What pictures are drawn with.

    Attributes:
        name: of the model, for recipes.
        model: its configuration; weights are loaded when they are needed.
        text: its text encoder.
        precision: number types of the text encoder.
        dtype, device: of everything else.
        known: subjects that are found by their tokens.
        taken: names of files that were written or will be.
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
class Painter:
    """A model that draws.

    Attributes:
        model: with its weights; subjects are put onto them.
        predictor: its transformer, or what stands in for it.
        placement: where its parts are.
    """

    model: Model
    predictor: Predictor
    placement: Placement


def setting_of(options: SampleOptions, report: Report) -> Setting:
    """The model without its weights, and how to compute.

    Raises:
        UsageError, ResourceError: a device or number type that is none, or that this machine has not.
        InputError: no such model, or one that cannot draw.
    """
    device = pick_device(options.device)
    _check_computing(options, device)
    asked = options.model or BUILT_IN
    folder = provide_model(asked, report)
    dtype = drawing_dtype(options.dtype, folder, device)
    precision = pick_text_precision(options.text_dtype, dtype, device)
    model = load_model(folder, parts=())
    if not (folder / TRANSFORMER_FILE).is_file():
        raise InputError(f"the model {folder} has no transformer yet", "bitgen train makes one")
    name = asked if asked == BUILT_IN else model_name(folder)
    return Setting(name, model, find_text_model(model, report), precision, dtype, device, known_subjects())


def _check_computing(options: SampleOptions, device: torch.device) -> None:
    """Raises UsageError where options of computing are none, or none of this device: before a model is fetched."""
    check_offload(options.offload)
    pick_dtype(options.dtype, device)
    pick_text_precision(options.text_dtype, torch.float32, device)
    if options.compile and device.type != "cuda":
        raise UsageError(f"--compile records what a GPU is given to do, and the device is {device}")


@dataclass(frozen=True)
class Features:
    """Text features (T, width) of a picture's prompt, and of its negative one."""

    prompt: Tensor
    negative: Tensor | None


def features_of(jobs: Sequence[Job], setting: Setting, options: SampleOptions, report: Report) -> list[Features]:
    """The text features of every picture, on the CPU; the text encoder is gone when they are there."""
    prompts = [Prompt(job.prompt, job.subjects) for job in jobs]
    negatives = [Prompt(job.negative, job.subjects) for job in jobs if job.negative is not None]
    found = text_features(
        setting.text, prompts + negatives, setting.precision, setting.device, report, cached=options.text_cache
    )
    rest = iter(found[len(jobs) :])
    return [
        Features(own, None if job.negative is None else next(rest)) for job, own in zip(jobs, found, strict=False)
    ]


def placement_of(jobs: Sequence[Job], setting: Setting, options: SampleOptions) -> Placement:
    """Where the parts of the model go.

    Raises:
        ResourceError: it does not fit.
    """
    prompts = {text for job in jobs for text in (job.prompt, job.negative) if text is not None}
    wanted = Wanted(
        setting.model.config,
        parameters(setting.model.config),
        list({job.schedule for job in jobs}),
        len(jobs),
        options.batch_size,
        setting.dtype.itemsize,
        max(map(len, setting.text.reader.tokenise(list(prompts)))),
        options.compile,
    )
    return place(wanted, options.offload, setting.device)


def load_painter(setting: Setting, placement: Placement, options: SampleOptions, report: Report) -> Painter:
    """The model with the weights that drawing takes, each where it belongs."""
    keep_freed_memory(placement.total)
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
    if options.compile and not placement.recordings:
        report.notice("scales are not recorded (--compile): the GPU's memory has no room for it")
    predictor = RecordedTransformer(model.transformer) if placement.recordings else model.transformer
    return Painter(model, predictor, placement)


def drawing_dtype(name: str, folder: Path, device: torch.device) -> torch.dtype:
    """The number type a model is drawn with; `auto` takes float32 for small ones on a CPU."""
    config, _, _ = read_model_config(folder)
    small = device.type == "cpu" and config.transformer.width < SMALL_WIDTH
    return torch.float32 if name == "auto" and small else pick_dtype(name, device)


def batches(jobs: Sequence[Job], size: int) -> Iterator[list[int]]:
    """Indices of jobs that may be drawn together, at most `size` at a time."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, job in enumerate(jobs):
        groups.setdefault(job.together(), []).append(index)
    for group in groups.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]


@dataclass(frozen=True)
class Picture:
    """A picture as it was drawn.

    Attributes:
        image: RGB.
        refined: what refinement did, for recipes; None where it was not asked for.
        frames: what it is after each scale.
    """

    image: Image.Image
    refined: dict[str, Any] | None
    frames: Frames


@torch.inference_mode()
def draw(
    jobs: Sequence[Job],
    features: Sequence[Features],
    setting: Setting,
    painter: Painter,
    task: Task,
    given: Given | None = None,
) -> list[Picture]:
    """The pictures of one batch, in its order; of `given` ones, where they go on from any."""
    first, model, in_bands = jobs[0], painter.model, painter.placement.in_bands
    assert model.tokenizer is not None
    pace = Pace(task, first.schedule, len(jobs), "refining" if first.sampling.refine else "decoding")
    if given is not None and not given.draws:
        task.status("refining")
    negatives = [own.negative.to(setting.device, setting.dtype) for own in features if own.negative is not None]
    with wearing(model, first.subjects):
        images, drawn = generate(
            painter.predictor,
            model.tokenizer,
            TextFeatures.from_rows([own.prompt.to(setting.device, setting.dtype) for own in features]),
            first.schedule,
            plan(first.sampling, len(first.schedule)),
            [job.seed for job in jobs],
            bits=first.bits,
            negative=TextFeatures.from_rows(negatives) if negatives else None,
            given=given,
            on_scale=pace,
            in_bands=in_bands,
        )
    facts = [None] * len(jobs) if drawn.refined is None else _refined_facts(drawn.refined)
    pictures = [to_pil(image) for image in to_uint8(images)]
    frames = [
        Frames(model.tokenizer, [grid[row].cpu() for grid in drawn.bits], first.schedule, picture, in_bands)
        for row, picture in enumerate(pictures)
    ]
    return [Picture(*parts) for parts in zip(pictures, facts, frames, strict=True)]


def _refined_facts(refined: Refined) -> list[dict[str, Any]]:
    """Of each picture: bits changed of each scale; the log-likelihood of a bit as each round found it, and its gain."""
    rows = zip(refined.changed.tolist(), refined.likelihood.tolist(), refined.gain.tolist(), strict=True)
    return [
        {
            "bits_changed": changed,
            "log_likelihood": [round(found, 4) for found in likelihood if found == found],
            "log_likelihood_gain": round(gain, 4),
        }
        for changed, likelihood, gain in rows
    ]
