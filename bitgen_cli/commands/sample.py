"""`bitgen sample`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from bitgen_cli.commands.options import (
    BIT_COUNT,
    BUDGETS,
    COMPUTING,
    DRAWING,
    OUTPUT,
    Device,
    Dtype,
    Json,
    Model,
    NoTextCache,
    Offline,
    Overrides,
    TextDtype,
    flag,
    is_given,
    option,
)
from bitgen_cli.errors import ExitCode, Interrupted, Terminated, UsageError

_CHOICES = ("seed", "tau", "target_confidence", "top_k", "top_p", "greedy", "fast", "cfg_layer")
"""Options that say how bits are chosen when they are drawn."""


def sample(
    context: typer.Context,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT", help="What to draw; a picture for each.", show_default=False),
    ] = None,
    model: Model = "demo",
    num_images: Annotated[
        int, option("N", "Pictures per prompt.", names=("--num-images", "-n"), least=1)
    ] = 1,
    prompts_file: Annotated[
        str | None,
        option(
            "FILE",
            "Prompts from a file, one a line, or JSON lines with options of their own; - reads stdin. Called again it "
            "goes on.",
            names=("--prompts",),
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        option("FILE", "Draw a picture again: a PNG made by bitgen, or its recipe as JSON. Other options win."),
    ] = None,
    original: Annotated[
        str | None,
        option(
            "PICTURE",
            "Go on from a picture: one made by bitgen, or a photo; - reads it from stdin. Say how with --mask, "
            "--keep-scales or --refine.",
            names=("--from",),
        ),
    ] = None,
    seed: Annotated[
        int | None,
        option("SEED", "Same seed, same picture; without one it is drawn and told."),
    ] = None,
    mask: Annotated[
        str | None,
        option(
            "MASK",
            "With --from: draw a part anew and keep the rest; X,Y,WIDTH,HEIGHT in its pixels, or a picture of its size "
            "that is white there.",
            DRAWING,
        ),
    ] = None,
    keep_scales: Annotated[
        int | None,
        option("K", "With --from: keep the first K scales and draw finer ones anew.", DRAWING, least=1),
    ] = None,
    cfg: Annotated[
        str | None,
        option(
            "NUMBERS",
            "Guidance: how strictly the prompt is followed; one number, or one per scale with commas.",
            DRAWING,
        ),
    ] = None,
    cfg_layer: Annotated[
        int | None,
        option("N", "0 guides the logits; n the output of the n-th block from the end.", DRAWING, least=0),
    ] = None,
    tau: Annotated[
        str | None,
        option(
            "NUMBERS",
            "Temperature: less is safer, more is livelier; one number, or one per scale with commas.",
            DRAWING,
        ),
    ] = None,
    target_confidence: Annotated[
        float | None,
        option(
            "P",
            "In place of --tau: at each scale the temperature with which bits are so sure on average, 0.5 to 1; "
            "less is livelier.",
            DRAWING,
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        option("N", "1 takes the likelier value of every bit; 0 draws it.", DRAWING, least=0),
    ] = None,
    top_p: Annotated[
        float | None,
        option("P", "Drop a bit's unlikelier value at a probability of at most 1 - P.", DRAWING),
    ] = None,
    fast: Annotated[
        int | None,
        option(
            "LEVEL",
            "Less work on fine scales, 1 to 3: no guidance, and ever fewer positions predicted; 0 leaves nothing out.",
            DRAWING,
            least=0,
            most=3,
        ),
    ] = None,
    refine: Annotated[
        int | None,
        option(
            "N",
            "Turn over the bits of the finished picture that the model finds unlikely, in up to N rounds.",
            DRAWING,
            least=0,
            most=16,
        ),
    ] = None,
    greedy: Annotated[
        bool,
        flag("--greedy", "Always the likelier value: the same as --top-k 1.", DRAWING),
    ] = False,
    negative_prompt: Annotated[
        str | None,
        option("TEXT", "What the guidance leads away from.", DRAWING),
    ] = None,
    aspect: Annotated[
        str | None,
        option("W:H", "Shape of the picture, for example 16:9.", DRAWING),
    ] = None,
    resolution: Annotated[str | None, option("RESOLUTION", f"Pixel budget: {BUDGETS}.", DRAWING)] = None,
    bits: Annotated[int | None, option("N", BIT_COUNT, DRAWING, least=1)] = None,
    subjects: Annotated[
        list[str] | None,
        option(
            "SUBJECT",
            "A learned subject: NAME or FILE, and :SCALE. Those named in the prompt are found anyway.",
            DRAWING,
            ("--subject",),
        ),
    ] = None,
    output: Annotated[
        str | None,
        option(
            "PATH",
            "A file, a folder, or a template such as out/{prompt}-{seed}.png; - writes one PNG to stdout.",
            OUTPUT,
            ("--output", "-o"),
        ),
    ] = None,
    overwrite: Annotated[bool, flag("--overwrite", "Replace pictures that are there.", OUTPUT)] = False,
    grid: Annotated[
        bool,
        flag("--grid", "Also write all pictures as one.", OUTPUT),
    ] = False,
    save_scales: Annotated[
        str | None,
        option(
            "FORMAT",
            "Beside each picture, what it is after each scale: strip, a PNG at most 4096 pixels wide, or webp, an "
            "animation at full size.",
            OUTPUT,
        ),
    ] = None,
    no_metadata: Annotated[
        bool,
        flag("--no-metadata", "Leave the recipe out of the picture.", OUTPUT),
    ] = False,
    embed_bits: Annotated[
        bool,
        flag("--embed-bits", "Let pictures carry their bits, so that --from need not find them again.", OUTPUT),
    ] = False,
    preview: Annotated[
        bool,
        flag("--preview/--no-preview", "Show the pictures small in the terminal.", OUTPUT),
    ] = True,
    as_json: Json = False,
    batch_size: Annotated[
        int | None,
        option(
            "N", "Pictures drawn at once, by itself up to 8 if they fit; no influence on them.", COMPUTING, least=1
        ),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    offload: Annotated[
        str,
        option(
            "MODE",
            "auto: what does not fit into a GPU's memory waits in the CPU's; none: all is on the GPU; "
            "cpu: all that can waits. The pictures are the same but for rounding.",
            COMPUTING,
        ),
    ] = "auto",
    compile: Annotated[
        bool,
        flag("--compile", "Record a GPU's work and play it back: sooner from a third similar picture on.", COMPUTING),
    ] = False,
    text_dtype: TextDtype = "auto",
    no_text_cache: NoTextCache = False,
    offline: Offline = False,
    overrides: Overrides = None,
) -> None:
    """Draw pictures from prompts."""
    from bitgen_cli.console.pictures import show_failures, show_picture, show_samples, show_seeds
    from bitgen_cli.console.progress import listening
    from bitgen_cli.console.terminal import show_json
    from bitgen_cli.runs.jobs import STDOUT, SampleOptions
    from bitgen_cli.runs.sample import sample as draw

    options = SampleOptions(
        prompts=tuple(prompts or ()),
        prompts_file=prompts_file,
        recipe=recipe,
        original=original,
        mask=mask,
        keep_scales=keep_scales,
        model=model if (recipe is None and original is None) or is_given(context, "model") else None,
        num_images=num_images,
        batch_size=batch_size,
        seed=seed,
        cfg=cfg,
        cfg_layer=cfg_layer,
        tau=tau,
        target_confidence=target_confidence,
        top_k=top_k,
        top_p=top_p,
        fast=fast,
        refine=refine,
        greedy=greedy,
        negative_prompt=negative_prompt,
        aspect=aspect,
        resolution=resolution,
        bits=bits,
        subjects=tuple(subjects or ()),
        output=output,
        overwrite=overwrite,
        grid=grid,
        save_scales=save_scales,
        metadata=not no_metadata,
        embed_bits=embed_bits,
        device=device,
        dtype=dtype,
        offload=offload,
        compile=compile,
        text_dtype=text_dtype,
        text_cache=not no_text_cache,
        overrides=tuple(overrides or ()),
    )
    if original is not None and refine and recipe is None and mask is None and keep_scales is None:
        _refuse_choices(context)
    if embed_bits and no_metadata:
        raise UsageError("--embed-bits writes what --no-metadata leaves out", "choose one")
    if output == STDOUT and as_json:
        raise UsageError("--output - writes a picture to stdout, and --json writes there too", "choose one")
    if output == STDOUT and sys.stdout.isatty():
        raise UsageError("--output - writes a picture, which a terminal cannot show", "send it to a file or a program")
    # on a terminal the bar is there, and names come when it is gone
    at_once = prompts_file is not None and not as_json and output != STDOUT and not sys.stdout.isatty()
    with _terminable(), listening(apart=True) as report:
        result = draw(options, report, *([show_picture] if at_once else []))
    if as_json:
        show_json(result.to_json())
    elif output == STDOUT:
        sys.stdout.buffer.write(result.png or b"")
        show_seeds(result)
    else:
        show_samples(result, with_preview=preview, named=at_once)
    if result.failures:
        show_failures(result.failures)
        raise typer.Exit(ExitCode.INPUT)


def _refuse_choices(context: typer.Context) -> None:
    """Refuses what says how bits are drawn, where none is."""
    for parameter in context.command.params:
        if parameter.name in _CHOICES and is_given(context, parameter.name):
            raise UsageError(
                f"{parameter.opts[0]} says how bits are drawn, and --refine alone draws none",
                "leave it out, or draw something with --mask or --keep-scales",
            )


@contextmanager
def _terminable() -> Iterator[None]:
    """Lets SIGTERM end the block as Ctrl-C does, with whole files, and by an exit code of its own."""
    asked: list[int] = []

    def stop(number: int, _: object) -> None:
        asked.append(number)
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread: signals are somebody else's
        yield
        return
    try:
        yield
    except (KeyboardInterrupt, Interrupted) as error:
        if not asked:
            raise
        raise Terminated(str(error) or "stopped by SIGTERM") from error
    finally:
        signal.signal(signal.SIGTERM, before)
