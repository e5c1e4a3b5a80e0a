"""Which class pictures are wanted, checked against the model that is to draw them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bitgen_cli.config import SamplingConfig, SubjectTraining
from bitgen_cli.engine.model_folder import BUILT_IN, Model, model_name
from bitgen_cli.engine.sampling import plan
from bitgen_cli.engine.scales import Schedule, nearest_ratio, schedule
from bitgen_cli.errors import UsageError
from bitgen_cli.runs.class_words import check_class, check_templates
from bitgen_cli.runs.jobs import SampleOptions, chosen_sampling
from bitgen_cli.runs.prior_folder import SEEDS, Manifest
from bitgen_cli.runs.recipes import subject_recipe

COUNT = SubjectTraining().prior_images


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


def wanted_pictures(options: PriorOptions, model: Model) -> tuple[Manifest, Schedule]:
    """A manifest without pictures for these options, and the scales of the pictures, the squarest the model draws.

    Raises:
        UsageError: options that do not fit the model.
    """
    class_word, templates = check_class(options.class_word), check_templates(_templates(options, model))
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
        base_name=base_name(options, model),
        class_word=class_word,
        templates=templates,
        seed=options.seed,
        sampling=sampling,
        size=(width, height),
        pictures=[],
    )
    return manifest, scales


def base_name(options: PriorOptions, model: Model) -> str:
    """What the base model is called in recipes, wherever it lies."""
    return options.model if options.model == BUILT_IN else model_name(model.folder)


def _templates(options: PriorOptions, model: Model) -> Sequence[str]:
    if options.templates is not None:
        return options.templates
    training = subject_recipe(model, options.model).config.training.subject
    assert training is not None
    return training.prior_templates


def _square(model: Model, resolution: str | None) -> Schedule:
    scales, ratio = model.config.scales, nearest_ratio(1.0, model.config.scales)
    return schedule(scales, patchify=model.config.transformer.patchify, ratio=ratio, resolution=resolution)
