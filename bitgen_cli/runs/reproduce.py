"""A picture again from its recipe: the options it stands for, and what may make the new picture another one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from bitgen_cli.engine.device import hardware, is_there
from bitgen_cli.engine.model_folder import BUILT_IN, TRANSFORMER_FILE
from bitgen_cli.engine.subject import Worn, find_subject, known_subjects
from bitgen_cli.errors import UsageError
from bitgen_cli.files import data_folder
from bitgen_cli.report import Report
from bitgen_cli.runs.drawing import Setting
from bitgen_cli.runs.jobs import Job, Remembered, SampleOptions
from bitgen_cli.runs.models import MODELS
from bitgen_cli.runs.output import short_dtype, versions
from bitgen_cli.runs.published import CATALOGUE
from bitgen_cli.runs.recipe_file import Recipe, RecipeSubject, read_recipe

SHOWN = 5
"""Unknown keys that are named."""

_NAME = re.compile(r"\w[\w.@-]{0,199}")


def recalled(options: SampleOptions, recipe: Recipe, report: Report) -> SampleOptions:
    """The options with the recipe's values for all that was left open.

    Args:
        options: of the command line; what they say wins.
        recipe: of the picture.
        report: gets notices about what cannot be as it was.

    Raises:
        UsageError: a model or subject that the user has not by that name, or a mask that only the user has.
    """
    if recipe.unknown:
        more = f" and {len(recipe.unknown) - SHOWN} more" if len(recipe.unknown) > SHOWN else ""
        names = ", ".join(repr(key[:40]) for key in recipe.unknown[:SHOWN])
        report.notice(f"the recipe says more than this version of bitgen understands, and goes without: {names}{more}")
    prompts = options.prompts
    if not prompts and options.prompts_file is None:
        prompts = (recipe.prompt,)
    seen = recipe.device if recipe.device is not None and is_there(recipe.device) else "auto"
    chosen = {
        "prompts": prompts,
        "model": _model_of(recipe) if options.model is None else options.model,
        "seed": recipe.seed if options.seed is None else options.seed,
        "negative_prompt": recipe.negative_prompt if options.negative_prompt is None else options.negative_prompt,
        "resolution": recipe.resolution if options.resolution is None else options.resolution,
        "bits": recipe.bits if options.bits is None else options.bits,
        "keep_scales": recipe.keep_scales if options.keep_scales is None else options.keep_scales,
        "device": seen if options.device == "auto" else options.device,
        "dtype": (recipe.dtype or "auto") if options.dtype == "auto" else options.dtype,
        "text_dtype": (recipe.text_dtype or "auto") if options.text_dtype == "auto" else options.text_dtype,
    }
    if recipe.mask is not None and recipe.mask.box is not None and options.mask is None:
        chosen["mask"] = ",".join(map(str, recipe.mask.box))
    elif recipe.mask is not None and options.mask is None:
        raise UsageError("the recipe's picture was drawn under a mask from a file", "--mask FILE says where it is")
    texts = [*prompts, *([chosen["negative_prompt"]] if chosen["negative_prompt"] else [])]
    needed = [one for one in recipe.subjects if options.prompts_file or any(one.token in str(text) for text in texts)]
    worn = [] if options.subjects else [_subject_of(one, report) for one in needed]
    remembered = Remembered(recipe.sampling, recipe.ratio, tuple(worn))
    return replace(options, remembered=remembered, **chosen)  # type: ignore[arg-type]


def _model_of(recipe: Recipe) -> str:
    """A model that the user has by the name the recipe gives; nothing is fetched, no other folder looked into."""
    name = recipe.model
    folder = data_folder() / MODELS / name
    if name == BUILT_IN:
        return name
    if _NAME.fullmatch(name) and (folder / TRANSFORMER_FILE).is_file():
        return name if name.partition("@")[0] in CATALOGUE else str(folder)
    hint = "say where it is: --model FOLDER"
    if name.partition("@")[0] in CATALOGUE:
        hint = f"--model {name} fetches it"
    raise UsageError(f"the recipe was drawn with the model {name[:60]!r}, and none of that name is known here", hint)


def _subject_of(wanted: RecipeSubject, report: Report) -> Worn:
    """A known subject of the same content, else of the same name."""
    known = known_subjects()
    for subject in known:
        if subject.sha256 == wanted.sha256:
            return Worn(subject, wanted.scale)
    if wanted.name not in {subject.name for subject in known}:
        raise UsageError(
            f"the recipe was drawn with the subject {wanted.name!r} ({wanted.token}), which is not known here",
            "--subject FILE says where it is; another prompt draws without it",
        )
    report.notice(f"subject {wanted.name} is another one than the recipe's: the picture will differ")
    return Worn(find_subject(wanted.name), wanted.scale)


def tell_differences(recipe: Recipe, jobs: Sequence[Job], setting: Setting, report: Report) -> None:
    """Says why a picture may not be the recipe's to the last bit; says nothing where it will be.

    Args:
        recipe: of the picture.
        jobs: what is drawn.
        setting: with what.
        report: gets at most two notices, one of them for other weights.
    """
    edit = jobs[0].edit if jobs else None
    if recipe.original is not None and edit is not None and edit.original.sha256 != recipe.original.sha256:
        report.notice(f"{edit.original.file} is another picture than the recipe's: the picture will differ")
    mask = None if edit is None or edit.mask is None else edit.mask.facts
    if edit is not None and mask != (recipe.mask and recipe.mask.model_dump(mode="json", exclude_none=True)):
        report.notice("another mask than the recipe's: the picture will differ")
    prints: Mapping[str, str] = setting.model.fingerprints
    others = [part for part, found in recipe.fingerprints.items() if prints.get(part) != found]
    if others:
        report.notice(f"other weights than the recipe's: {', '.join(sorted(others))}; the picture will differ")
    now = versions()
    pairs: list[tuple[str, str | None, str | None]] = [
        ("bitgen", recipe.bitgen, now.pop("bitgen")),
        *((name, (recipe.libraries or {}).get(name), version) for name, version in now.items()),
        ("device", recipe.device, setting.device.type),
        ("hardware", recipe.hardware, hardware(setting.device)),
        ("dtype", recipe.dtype, short_dtype(setting.dtype)),
        ("text dtype", recipe.text_dtype or recipe.dtype, setting.precision.name),
    ]
    sizes = {job.schedule.pixels(setting.model.config.tokenizer.patch_size) for job in jobs}
    if recipe.height is not None and recipe.width is not None:
        pairs += [("size", f"{recipe.width}x{recipe.height}", f"{width}x{height}") for height, width in sizes]
    found = [f"{name} {then or 'not recorded'}, now {here}" for name, then, here in pairs if then != here]
    if found:
        report.notice(f"perhaps not the same picture to the last bit; the recipe has {'; '.join(found)}")


def load_recipe(options: SampleOptions, report: Report) -> tuple[SampleOptions, Recipe | None]:
    """The options with those of the recipe file that they name, and the recipe.

    Raises:
        InputError: the file holds no recipe.
        UsageError: a model or subject that the user has not by that name.
    """
    if options.recipe is None:
        return options, None
    recipe = read_recipe(Path(options.recipe))
    return recalled(options, recipe, report), recipe

