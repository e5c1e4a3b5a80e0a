"""What to draw: options, and the pictures that follow from them; nothing is loaded."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from torch import Tensor

from bitgen_cli.config import SamplingConfig
from bitgen_cli.engine.active_bits import bits_in_use
from bitgen_cli.engine.editing import drawn_positions, latent_mask
from bitgen_cli.engine.model_folder import BUILT_IN, Model, model_name
from bitgen_cli.engine.sampling import plan
from bitgen_cli.engine.scales import Schedule, buckets, nearest_ratio, ratios, schedule
from bitgen_cli.engine.subject import Subject, Worn, choose_subjects, find_subject
from bitgen_cli.engine.vocabulary import PromptReader
from bitgen_cli.errors import UsageError
from bitgen_cli.presets import resolve_stored
from bitgen_cli.runs.original import Edit, Mask, check_edit, with_keep_scales

STDOUT = "-"
"""As --output: one picture that is not written to disk."""


@dataclass(frozen=True)
class Remembered:
    """What a recipe or another picture gives in place of the model's own defaults.

    Attributes:
        sampling: all of its values; None are the model's.
        ratio: height / width.
        subjects: the picture was drawn with.
    """

    sampling: SamplingConfig | None
    ratio: float
    subjects: tuple[Worn, ...] = ()


@dataclass(frozen=True)
class SampleOptions:
    """What to draw and how; None leaves a value to the model's own defaults.

    Attributes:
        prompts: a picture, or `num_images` of them, for each.
        prompts_file: more prompts, one a line or JSON lines with options of their own (prompt_file); `-` is stdin.
        recipe: a picture, or a JSON file, whose recipe gives what is not said here.
        original: a picture that is gone on from.
        mask: what of it may change: X,Y,WIDTH,HEIGHT or a picture; None is all.
        keep_scales: so many of its first scales stay.
        model: as in models.provide_model; None takes the recipe's.
        num_images: per prompt.
        batch_size: pictures drawn at once; no influence on them. None takes as many as fit.
        seed: of each prompt's first picture, the next ones count up; None draws one.
        cfg, tau: a number, or one per scale with commas.
        cfg_layer, target_confidence, top_k, top_p: as in the sampling section of the configuration.
        fast: from 0, all of the work, to 3.
        refine: rounds of it after drawing.
        greedy: top_k 1.
        negative_prompt: what guidance leads away from.
        aspect: W:H.
        resolution: pixel budget of a published schedule.
        bits: per latent position, the first ones; None draws as many as the model was trained for.
        subjects: NAME or FILE, with :SCALE or without; those whose tokens stand in a prompt are found anyway.
        output: a file, a folder, a template with {prompt}, {seed}, {index}, {model}, or STDOUT.
        overwrite: whether pictures that are there may be replaced.
        grid: also writes all pictures as one.
        save_scales: also writes what each picture is after each scale, in one of the formats of runs.scale_pictures.
        metadata: whether pictures carry their recipe.
        embed_bits: whether they carry their bits too; those that were made of another picture always do.
        device, dtype: as in engine.device.
        offload: what may wait in the CPU's memory, as in runs.placement.
        compile: records scales as CUDA graphs (engine.graphs).
        text_dtype: of the text encoder, as in engine.text_precision.
        text_cache: whether text features are kept on disk, and taken from there.
        overrides: sampling.KEY=VALUE.
        remembered: from the recipe or the original, once it is read.
        edit: from the original, once it is read.
    """

    prompts: tuple[str, ...] = ()
    prompts_file: str | None = None
    recipe: str | None = None
    original: str | None = None
    mask: str | None = None
    keep_scales: int | None = None
    model: str | None = BUILT_IN
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
    refine: int | None = None
    greedy: bool = False
    negative_prompt: str | None = None
    aspect: str | None = None
    resolution: str | None = None
    bits: int | None = None
    subjects: tuple[str, ...] = ()
    output: str | None = None
    overwrite: bool = False
    grid: bool = False
    save_scales: str | None = None
    metadata: bool = True
    embed_bits: bool = False
    device: str = "auto"
    dtype: str = "auto"
    offload: str = "auto"
    compile: bool = False
    text_dtype: str = "auto"
    text_cache: bool = True
    overrides: tuple[str, ...] = ()
    remembered: Remembered | None = None
    edit: Edit | None = None


@dataclass(frozen=True)
class Job:
    """One picture to draw; of another one, where there is an `edit`."""

    prompt: str
    negative: str | None
    seed: int
    sampling: SamplingConfig
    schedule: Schedule
    resolution: str | None
    bits: int
    output: str | None
    subjects: tuple[Worn, ...]
    edit: Edit | None = None

    @property
    def kind(self) -> tuple[Schedule, int]:
        """What its bits depend on besides what it shows: the schedule and the bits per latent position."""
        return self.schedule, self.bits

    @property
    def drawn_by(self) -> int | None:
        """The seed; None where no bit is drawn."""
        return self.seed if self.edit is None or self.edit.draws else None

    def together(self) -> tuple[object, ...]:
        """Pictures with the same value are drawn in one batch."""
        worn = tuple((worn.subject.file, worn.scale) for worn in self.subjects)
        keep = None if self.edit is None else self.edit.keep_scales
        return self.sampling.model_dump_json(), self.kind, self.negative is None, worn, keep


def jobs_of(options: SampleOptions, model: Model, reader: PromptReader, known: Sequence[Subject]) -> list[Job]:
    """The pictures of one prompt.

    Args:
        options: those of the prompt.
        model: its configuration; weights are not needed.
        reader: of prompts.
        known: subjects that are found by their tokens.

    Raises:
        UsageError: options that the model has not, or that do not go together.
    """
    prompt = options.prompts[0].strip()
    sampling = chosen_sampling(options, model)
    scales = _schedule(options, model)
    plan(sampling, len(scales))  # a list of another length is refused before anything is drawn
    depth = model.config.transformer.depth
    layers = [sampling.cfg_layer] if isinstance(sampling.cfg_layer, int) else sampling.cfg_layer
    if max(layers) > depth:
        raise UsageError(f"cfg_layer {max(layers)} is more than the model's {depth} blocks")
    edit = with_keep_scales(options.edit, options.keep_scales)
    seed = _new_seed(edit) if options.seed is None else options.seed
    if not -(2**63) <= seed <= 2**64 - options.num_images:
        raise UsageError(f"a seed has at most 64 bits, which {seed} has not")
    asked = [_worn(text) for text in options.subjects]
    if options.remembered is not None:
        texts = f"{prompt}\n{options.negative_prompt or ''}"
        asked += [worn for worn in options.remembered.subjects if worn.subject.token in texts]
    subjects = choose_subjects(
        prompt, model, reader, known, asked, options.negative_prompt
    )
    bits = bits_in_use(model.config.tokenizer, options.bits)
    job = Job(
        prompt,
        options.negative_prompt,
        seed,
        sampling,
        scales,
        options.resolution,
        bits,
        options.output,
        subjects,
        edit,
    )
    if edit is not None:
        check_edit(
            edit,
            scales,
            where_drawn(job, model.config.tokenizer.patch_size),
            refine=sampling.refine,
            pictures=options.num_images,
        )
    return [replace(job, seed=seed + k) for k in range(options.num_images)]


def _new_seed(edit: Edit | None) -> int:
    """A seed drawn at random; of a picture of which no bit is drawn its own one, 0 where that is not known."""
    if edit is not None and not edit.draws:
        return 0 if edit.original.recipe is None else edit.original.recipe.seed
    return secrets.randbelow(2**32)


def where_drawn(job: Job, patch_size: int) -> list[Tensor]:
    """Where a job that goes on from a picture draws bits, per scale (1, 1, h, w) bool: nowhere if it refines alone."""
    assert job.edit is not None
    keep = job.edit.keep_scales if job.edit.draws else len(job.schedule)
    return _where(job.edit.mask, keep, job.schedule, patch_size)


@lru_cache(maxsize=16)
def _where(mask: Mask | None, keep_scales: int, scales: Schedule, patch_size: int) -> list[Tensor]:
    """The same for all lines of a prompt file, as a large mask takes long to shrink."""
    places = None if mask is None else latent_mask(mask.pixels(scales.pixels(patch_size)), scales)
    return drawn_positions(scales, places, keep_scales)


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
        "refine": options.refine,
    }
    if options.greedy and options.top_k not in (None, 1):
        raise UsageError(f"--greedy is --top-k 1 and cannot go with --top-k {options.top_k}")
    if options.target_confidence is not None and options.tau is not None:
        raise UsageError("--target-confidence finds the temperatures, and cannot go with --tau")
    for override in options.overrides:
        if not override.startswith("sampling."):
            raise UsageError(f"--set {override}: only sampling values can be set here", "for example sampling.cfg=4")
    remembered = None if options.remembered is None else options.remembered.sampling
    own = (remembered or model.sampling).model_dump(mode="json")
    if options.tau is not None:
        own["target_confidence"] = None  # the model's own gives way
    stored = {
        "name": model_name(model.folder),
        "model": model.config.model_dump(mode="json"),
        "sampling": own,
    }
    found = resolve_stored(
        stored,
        {},
        where="sampling options",
        flags={f"sampling.{key}": value for key, value in flags.items()},
        overrides=options.overrides,
    ).config.sampling
    if found.target_confidence is not None and found.top_k == 1:
        raise UsageError("the likelier value of every bit is the same at every temperature: no target_confidence")
    return found


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
    if options.remembered is not None:
        ratio = nearest_ratio(options.remembered.ratio, scales)
    if options.aspect is not None:
        (ratio,) = buckets(scales, [options.aspect])
    return schedule(scales, patchify=model.config.transformer.patchify, ratio=ratio, resolution=options.resolution)
