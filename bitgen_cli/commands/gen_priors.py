"""`bitgen gen-priors`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from bitgen_cli.commands.options import (
    COMPUTING,
    OUTPUT,
    Device,
    Dtype,
    Json,
    Model,
    NoTextCache,
    Offline,
    Overrides,
    option,
)


def gen_priors(
    class_word: Annotated[str, option("WORD", "What the pictures show, for example dog.", names=("--class",))],
    count: Annotated[int, option("N", "Pictures there are to be; your own in the folder count too.", least=1)] = 64,
    model: Model = "demo",
    templates: Annotated[
        list[str] | None,
        option(
            "TEXT",
            "A prompt with {class} in it; repeated, they take turns. Without one, those of finetune-subject.",
            names=("--template",),
        ),
    ] = None,
    seed: Annotated[int, option("SEED", "Of the first picture; the next ones count up.", least=0)] = 0,
    output: Annotated[
        Path | None,
        option(
            "FOLDER",
            "Their folder; without one, they are kept where finetune-subject with the same settings finds them.",
            OUTPUT,
            ("--output", "-o"),
        ),
    ] = None,
    as_json: Json = False,
    batch_size: Annotated[
        int | None,
        option("N", "Pictures drawn at once; no influence on them.", COMPUTING, least=1),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    no_text_cache: NoTextCache = False,
    offline: Offline = False,
    overrides: Overrides = None,
) -> None:
    """Draw pictures of a class, which keep the class while a subject is learned.

    What is there already is reused. Started again, it goes on where it stopped.
    """
    from bitgen_cli.console.pictures import show_priors
    from bitgen_cli.console.progress import listening
    from bitgen_cli.console.terminal import show_result
    from bitgen_cli.runs.gen_priors import gen_priors as draw
    from bitgen_cli.runs.prior_options import PriorOptions

    options = PriorOptions(
        class_word=class_word,
        count=count,
        model=model,
        output=output,
        templates=tuple(templates) if templates else None,
        seed=seed,
        batch_size=batch_size,
        overrides=tuple(overrides or ()),
        device=device,
        dtype=dtype,
        text_cache=not no_text_cache,
    )
    with listening() as report:
        result = draw(options, report)
    show_result(result, show_priors, as_json=as_json)
