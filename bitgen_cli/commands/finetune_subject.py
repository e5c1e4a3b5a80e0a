"""`bitgen finetune-subject`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitgen_cli.commands.options import (
    BUDGETS,
    CONFIGURING,
    LEARNING,
    OUTPUT,
    ConfigFile,
    Device,
    DryRun,
    Json,
    LearningSeed,
    Logs,
    Model,
    Offline,
    Overrides,
    Steps,
    Sweep,
    flag,
    option,
)
from bitgen_cli.commands.trainings import shared_words, show_fit, try_combinations
from bitgen_cli.errors import UsageError


def finetune_subject(
    context: typer.Context,
    photos: Annotated[
        Path | None,
        typer.Argument(metavar="PHOTOS", help="Folder with 3 to 5 photos of one thing.", show_default=False),
    ] = None,
    class_word: Annotated[
        str | None, option("WORD", "What kind of thing it is, for example dog.", names=("--class",))
    ] = None,
    token: Annotated[str, option("TOKEN", "What prompts call it.")] = "[V]",
    name: Annotated[str | None, option("NAME", "Keep it under this name; without one, the token's letters.")] = None,
    model: Model = "demo",
    out: Annotated[Path | None, option("RUN", "Folder of the run; without one, ./subject-NAME.")] = None,
    train: Annotated[
        list[str] | None,
        option("PARTS", "What learns: token, text, cross, ffn, self, lora, all; several with commas.", LEARNING),
    ] = None,
    prior: Annotated[
        str | None,
        option("KIND", "What keeps the class: images, distill or none.", LEARNING),
    ] = None,
    prior_weight: Annotated[float | None, option("WEIGHT", "Weight of the class's loss.", LEARNING)] = None,
    priors: Annotated[
        Path | None,
        option("FOLDER", "Class pictures, yours or made by gen-priors; missing ones are made.", LEARNING),
    ] = None,
    flip: Annotated[
        bool | None,
        flag("--flip/--no-flip", "Also learn from mirrored photos; wrong where left and right differ.", LEARNING),
    ] = None,
    resolution: Annotated[
        str | None,
        option("RESOLUTION", f"Learn at this pixel budget: {BUDGETS}.", LEARNING),
    ] = None,
    preset: Annotated[
        str | None,
        option("PRESET", "Take this preset's recipe.", CONFIGURING),
    ] = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    steps: Steps = None,
    seed: LearningSeed = None,
    overwrite: Annotated[bool, flag("--overwrite", "Replace a subject of the same name.", OUTPUT)] = False,
    merge: Annotated[
        Path | None,
        option("FOLDER", "Also write a whole model with the subject in it; with --subject, that alone.", OUTPUT),
    ] = None,
    subject: Annotated[str | None, option("SUBJECT", "A learned subject, NAME or FILE, to --merge.", OUTPUT)] = None,
    logs: Logs = None,
    dry_run: DryRun = False,
    sweep: Sweep = None,
    device: Device = "auto",
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Teach the model one thing from a few photos, to draw it with a token such as [V].

    Ctrl-C finishes the step and saves; `bitgen resume` continues.
    """
    from bitgen_cli.console.progress import listening
    from bitgen_cli.console.terminal import show_json, show_result
    from bitgen_cli.console.trainings import show_subject

    if subject is not None and merge is not None and photos is None:
        from bitgen_cli.runs.finetune_subject import merge_subject

        with listening() as report:
            folder = merge_subject(subject, model, merge, report)
        show_json({"merged": str(folder)}) if as_json else print(folder)
        return
    if subject is not None:
        raise UsageError("--subject goes with --merge alone", "photos teach a new subject, without --subject")
    if photos is None or class_word is None:
        missing = "no photos" if photos is None else "no --class"
        raise UsageError(missing, "for example: bitgen finetune-subject ./photos --class dog")
    if sweep is not None:
        from bitgen_cli.runs.sweep import SweepOptions, subject_name

        if dry_run:
            raise UsageError("--sweep does not go with --dry-run", "try one combination out")
        if merge is not None:
            raise UsageError("--merge does not go with --sweep", "merge the best one with --subject and --merge")
        base = name or subject_name(token)
        words = shared_words(context)
        folder = out or Path(f"sweep-{base}")
        tried = SweepOptions("finetune-subject", *words, tuple(overrides or ()), folder, config, base)
        try_combinations(tried, sweep, as_json)
        return

    from bitgen_cli.runs.finetune_subject import SubjectOptions, try_out_subject
    from bitgen_cli.runs.finetune_subject import finetune_subject as learn

    parts = None if train is None else [part.strip() for some in train for part in some.split(",")]
    given = {
        "train": parts,
        "prior": prior,
        "prior_weight": prior_weight,
        "flip": flip,
        "resolution": resolution,
        "steps": steps,
        "seed": seed,
    }
    options = SubjectOptions(
        photos=photos,
        class_word=class_word,
        token=token,
        name=name,
        model=model,
        out=out,
        priors=priors,
        preset=preset,
        config_file=config,
        overrides=tuple(overrides or ()),
        flags={f"training.subject.{key}": value for key, value in given.items() if value is not None},
        merge=merge,
        overwrite=overwrite,
        device=device,
        logs=tuple(logs or ()),
    )
    if dry_run:
        with listening() as report:
            found = try_out_subject(options, report)
        show_fit(found, as_json=as_json)
        return
    with listening() as report:
        result = learn(options, report)
    show_result(result, show_subject, as_json=as_json)
