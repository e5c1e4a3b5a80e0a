"""The command surface: what can be typed, and the one place where errors become exit codes.

A command builds its options, calls its run (imported inside the body, so that `bitgen --help` loads no torch)
and shows the result. Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitgen_cli import __version__
from bitgen_cli.errors import BitgenError, DivergedError, ExitCode, InputError, Interrupted, Terminated, UsageError
from bitgen_cli.examples import EXAMPLES
from bitgen_cli.place import place

if TYPE_CHECKING:
    from bitgen_cli.runs.fitting import Fit
    from bitgen_cli.runs.train import TrainOptions

OFFLINE = "HF_HUB_OFFLINE"
"""Environment variable of the hub's client: --offline sets it."""
TRACEBACK = "BITGEN_TRACEBACK"
"""Environment variable: set to 1, errors come with the place in the program they come from."""
_AFTER_THE_FIRST = 4.0
"""Seconds that other ranks keep an error to themselves."""


class _Plain:
    """A command whose --help is shown like every flag, and costs nothing where it is not asked for."""

    def get_help_option(self, ctx: Any) -> Any:
        option = super().get_help_option(ctx)  # type: ignore[misc]
        option.metavar, option.default = "", False  # without a default, typer loads pydantic to check it
        return option

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Prints the help and, last, what can be typed to begin with."""
        super().format_help(ctx, formatter)  # type: ignore[misc]
        from bitgen_cli import console

        if self.epilog is None:  # type: ignore[attr-defined]
            print()
        console.show_examples(EXAMPLES["" if ctx.parent is None else ctx.info_name])


class _Group(_Plain, typer.core.TyperGroup):
    """The program."""


class _Command(_Plain, typer.core.TyperCommand):
    """A subcommand."""


app = typer.Typer(
    name="bitgen",
    help="Bitwise autoregressive text-to-image models: sample, train, tokenize.",
    epilog=f"Exit codes: {'; '.join(f'{code.value} {code.meaning}' for code in ExitCode)}.",
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["--help", "-h"]},
)

def _stay_offline(wanted: bool) -> bool:
    """Keeps this process and those it starts from the network, before anything looks whether it may be used."""
    if wanted:
        os.environ[OFFLINE] = "1"
    return wanted


_DRAWING, _OUTPUT, _COMPUTING, _CONFIGURING = "Drawing", "Output", "Computing", "Configuration"
_READING, _STORING, _LEARNING, _TRYING = "Reading pictures", "What is kept", "Learning", "Trying out"


def _option(
    metavar: str,
    help: str,
    panel: str | None = None,
    names: tuple[str, ...] = (),
    least: int | None = None,
    most: int | None = None,
) -> Any:
    """An option with a value. The completions go by the metavar too (completions/generate.py).

    Args:
        metavar: what the value is.
        help: one line.
        panel: heading in the help; None is the first one, for what a newcomer needs first.
        names: with their dashes, where they are not the parameter's.
        least, most: smallest and largest value of a number.
    """
    return typer.Option(*names, metavar=metavar, help=help, rich_help_panel=panel, min=least, max=most)


def _flag(names: str, help: str, panel: str | None = None) -> Any:
    """An option without a value."""
    return typer.Option(names, metavar="", help=help, rich_help_panel=panel)


Json = Annotated[bool, _flag("--json", "Print one JSON object.", _OUTPUT)]
Device = Annotated[str, _option("DEVICE", "auto, cpu, cuda, cuda:N or mps.", _COMPUTING)]
Devices = Annotated[
    int | None,
    _option("N", "Train in N processes of this machine, a GPU for each; torchrun works too.", _COMPUTING, least=1),
]
Strategy = Annotated[
    str,
    _option(
        "STRATEGY",
        "What several processes share: ddp the pictures, fsdp also weights, gradients and optimizer state.",
        _COMPUTING,
    ),
]
DryRun = Annotated[
    bool,
    _flag(
        "--dry-run",
        "Do everything up to the first step, show the memory and disk needed, leave nothing behind.",
        _TRYING,
    ),
]
Dtype = Annotated[str, _option("DTYPE", "auto, fp32, bf16 or fp16.", _COMPUTING)]
Model = Annotated[
    str,
    _option("MODEL", "A model or run folder, published weights by name (infinity-2b) or file, or demo, the built-in."),
]
TextDtype = Annotated[
    str, _option("TYPE", "Of the text encoder: auto, fp32, bf16, or int8, which takes the least memory.", _COMPUTING)
]
NoTextCache = Annotated[
    bool,
    _flag("--no-text-cache", "Read prompts anew: do not take text features from disk, nor keep them.", _COMPUTING),
]
Offline = Annotated[
    bool,
    typer.Option(
        "--offline",
        metavar="",
        help="Ask nothing of the network: what is not on this machine is an error.",
        rich_help_panel=_COMPUTING,
        callback=_stay_offline,
    ),
]
_BUDGET = "Pixel budget: 0.06M, 0.25M, 0.60M or 1M."
_BIT_COUNT = "Bits per latent position, where a model may be used with several."
Aspects = Annotated[
    str | None,
    _option("SHAPES", "Crop pictures to these shapes alone, for example 1:1,16:9.", _READING, ("--aspect",)),
]
CaptionKey = Annotated[
    str | None,
    _option("FIELD", "Field or column that holds the captions; none reads no captions.", _READING),
]
ImageRoot = Annotated[
    Path | None,
    _option("FOLDER", "Where the pictures of a listing are, if not beside it; links may lead there.", _READING),
]
Overrides = Annotated[
    list[str] | None,
    _option(
        "KEY=VALUE",
        "Set a configuration value, for example sampling.cfg=4. May be repeated.",
        _CONFIGURING,
        ("--set",),
    ),
]
ConfigFile = Annotated[
    Path | None,
    _option("FILE", "A YAML file with values that replace the preset's.", _CONFIGURING, ("--config",)),
]
Sweep = Annotated[
    str | None,
    _option(
        "HOW",
        "Try every combination of the values of keys that --set names several times: print shows the commands, "
        "run trains one after the other, in folders below --out.",
        _TRYING,
    ),
]
Logs = Annotated[
    list[str] | None,
    _option("LOG", "Also log to tensorboard or wandb; may be repeated.", _OUTPUT, ("--log",)),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"bitgen {__version__}")
        raise typer.Exit()


@app.callback(cls=_Group, invoke_without_command=True)
def _bitgen(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", metavar="", callback=_print_version, is_eager=True, help="Show the version."
        ),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(ExitCode.USAGE)


@app.command(cls=_Command)
def sample(
    context: typer.Context,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT", help="What to draw; a picture for each.", show_default=False),
    ] = None,
    model: Model = "demo",
    num_images: Annotated[
        int, _option("N", "Pictures per prompt.", names=("--num-images", "-n"), least=1)
    ] = 1,
    prompts_file: Annotated[
        str | None,
        _option(
            "FILE",
            "Prompts from a file, one a line, or JSON lines with options of their own; - reads stdin. Called again it "
            "goes on.",
            names=("--prompts",),
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        _option("FILE", "Draw a picture again: a PNG made by bitgen, or its recipe as JSON. Other options win."),
    ] = None,
    original: Annotated[
        str | None,
        _option(
            "PICTURE",
            "Go on from a picture: one made by bitgen, or a photo; - reads it from stdin. Say how with --mask, "
            "--keep-scales or --refine.",
            names=("--from",),
        ),
    ] = None,
    seed: Annotated[
        int | None,
        _option("SEED", "Same seed, same picture; without one it is drawn and told."),
    ] = None,
    mask: Annotated[
        str | None,
        _option(
            "MASK",
            "With --from: draw a part anew and keep the rest; X,Y,WIDTH,HEIGHT in its pixels, or a picture of its size "
            "that is white there.",
            _DRAWING,
        ),
    ] = None,
    keep_scales: Annotated[
        int | None,
        _option("K", "With --from: keep the first K scales and draw finer ones anew.", _DRAWING, least=1),
    ] = None,
    cfg: Annotated[
        str | None,
        _option(
            "NUMBERS",
            "Guidance: how strictly the prompt is followed; one number, or one per scale with commas.",
            _DRAWING,
        ),
    ] = None,
    cfg_layer: Annotated[
        int | None,
        _option("N", "0 guides the logits; n the output of the n-th block from the end.", _DRAWING, least=0),
    ] = None,
    tau: Annotated[
        str | None,
        _option(
            "NUMBERS",
            "Temperature: less is safer, more is livelier; one number, or one per scale with commas.",
            _DRAWING,
        ),
    ] = None,
    target_confidence: Annotated[
        float | None,
        _option(
            "P",
            "In place of --tau: at each scale the temperature with which bits are so sure on average, 0.5 to 1; "
            "less is livelier.",
            _DRAWING,
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        _option("N", "1 takes the likelier value of every bit; 0 draws it.", _DRAWING, least=0),
    ] = None,
    top_p: Annotated[
        float | None,
        _option("P", "Drop a bit's unlikelier value at a probability of at most 1 - P.", _DRAWING),
    ] = None,
    fast: Annotated[
        int | None,
        _option(
            "LEVEL",
            "Less work on fine scales, 1 to 3: no guidance, and ever fewer positions predicted; 0 leaves nothing out.",
            _DRAWING,
            least=0,
            most=3,
        ),
    ] = None,
    refine: Annotated[
        int | None,
        _option(
            "N",
            "Turn over the bits of the finished picture that the model finds unlikely, in up to N rounds.",
            _DRAWING,
            least=0,
            most=16,
        ),
    ] = None,
    greedy: Annotated[
        bool,
        _flag("--greedy", "Always the likelier value: the same as --top-k 1.", _DRAWING),
    ] = False,
    negative_prompt: Annotated[
        str | None,
        _option("TEXT", "What the guidance leads away from.", _DRAWING),
    ] = None,
    aspect: Annotated[
        str | None,
        _option("W:H", "Shape of the picture, for example 16:9.", _DRAWING),
    ] = None,
    resolution: Annotated[str | None, _option("RESOLUTION", _BUDGET, _DRAWING)] = None,
    bits: Annotated[int | None, _option("N", _BIT_COUNT, _DRAWING, least=1)] = None,
    subjects: Annotated[
        list[str] | None,
        _option(
            "SUBJECT",
            "A learned subject: NAME or FILE, and :SCALE. Those named in the prompt are found anyway.",
            _DRAWING,
            ("--subject",),
        ),
    ] = None,
    output: Annotated[
        str | None,
        _option(
            "PATH",
            "A file, a folder, or a template such as out/{prompt}-{seed}.png; - writes one PNG to stdout.",
            _OUTPUT,
            ("--output", "-o"),
        ),
    ] = None,
    overwrite: Annotated[bool, _flag("--overwrite", "Replace pictures that are there.", _OUTPUT)] = False,
    grid: Annotated[
        bool,
        _flag("--grid", "Also write all pictures as one.", _OUTPUT),
    ] = False,
    save_scales: Annotated[
        str | None,
        _option(
            "FORMAT",
            "Beside each picture, what it is after each scale: strip, a PNG at most 4096 pixels wide, or webp, an "
            "animation at full size.",
            _OUTPUT,
        ),
    ] = None,
    no_metadata: Annotated[
        bool,
        _flag("--no-metadata", "Leave the recipe out of the picture.", _OUTPUT),
    ] = False,
    embed_bits: Annotated[
        bool,
        _flag("--embed-bits", "Let pictures carry their bits, so that --from need not find them again.", _OUTPUT),
    ] = False,
    preview: Annotated[
        bool,
        _flag("--preview/--no-preview", "Show the pictures small in the terminal.", _OUTPUT),
    ] = True,
    as_json: Json = False,
    batch_size: Annotated[
        int | None,
        _option(
            "N", "Pictures drawn at once, by itself up to 8 if they fit; no influence on them.", _COMPUTING, least=1
        ),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    offload: Annotated[
        str,
        _option(
            "MODE",
            "auto: what does not fit into a GPU's memory waits in the CPU's; none: all is on the GPU; "
            "cpu: all that can waits. The pictures are the same but for rounding.",
            _COMPUTING,
        ),
    ] = "auto",
    compile: Annotated[
        bool,
        _flag("--compile", "Record a GPU's work and play it back: sooner from a third similar picture on.", _COMPUTING),
    ] = False,
    text_dtype: TextDtype = "auto",
    no_text_cache: NoTextCache = False,
    offline: Offline = False,
    overrides: Overrides = None,
) -> None:
    """Draw pictures from prompts."""
    from bitgen_cli import console
    from bitgen_cli.runs.jobs import STDOUT, SampleOptions
    from bitgen_cli.runs.sample import sample as draw

    options = SampleOptions(
        prompts=tuple(prompts or ()),
        prompts_file=prompts_file,
        recipe=recipe,
        original=original,
        mask=mask,
        keep_scales=keep_scales,
        model=model if (recipe is None and original is None) or _is_given(context, "model") else None,
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
    if embed_bits and no_metadata:
        raise UsageError("--embed-bits writes what --no-metadata leaves out", "choose one")
    if output == STDOUT and as_json:
        raise UsageError("--output - writes a picture to stdout, and --json writes there too", "choose one")
    if output == STDOUT and sys.stdout.isatty():
        raise UsageError("--output - writes a picture, which a terminal cannot show", "send it to a file or a program")
    # on a terminal the bar is there, and names come when it is gone
    at_once = prompts_file is not None and not as_json and output != STDOUT and not sys.stdout.isatty()
    with _terminable(), console.listening(apart=True) as report:
        result = draw(options, report, *([console.show_picture] if at_once else []))
    if as_json:
        console.show_json(result.to_json())
    elif output == STDOUT:
        sys.stdout.buffer.write(result.png or b"")
        console.show_seeds(result)
    else:
        console.show_samples(result, with_preview=preview, named=at_once)
    if result.failures:
        console.show_failures(result.failures)
        raise typer.Exit(ExitCode.INPUT)


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


def _is_given(context: typer.Context, name: str) -> bool:
    """Whether an option was typed."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


@app.command(cls=_Command)
def tokenize(
    context: typer.Context,
    data: Annotated[
        str | None,
        typer.Argument(
            metavar="DATA",
            help="A folder of pictures or tars, a .jsonl, .csv, .json, .tar or .parquet file, or world:N.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="Folder of the token store.", show_default=False)
    ] = None,
    model: Model = "demo",
    resolution: Annotated[str | None, _option("RESOLUTION", _BUDGET, _READING)] = None,
    aspect: Aspects = None,
    caption_key: CaptionKey = None,
    image_root: ImageRoot = None,
    bits: Annotated[int | None, _option("N", _BIT_COUNT, _STORING, least=1)] = None,
    latents: Annotated[
        bool,
        _flag(
            "--latents/--no-latents",
            "Keep the latents too, which training with flipped bits needs to be exact.",
            _STORING,
        ),
    ] = True,
    reconstruct: Annotated[
        int,
        _option("N", "Decode N pictures again, beside their originals, and measure PSNR and SSIM.", _STORING, least=0),
    ] = 0,
    text_features: Annotated[
        bool,
        _flag(
            "--text-features",
            "Keep what the model's text encoder makes of the captions, if it is a fixed one.",
            _STORING,
        ),
    ] = False,
    verify: Annotated[
        Path | None,
        _option("STORE", "Read a whole store and tell whether it is what was written; nothing else is done."),
    ] = None,
    as_json: Json = False,
    shard: Annotated[
        str | None,
        _option("I/N", "Make one of N parts, which N processes can do at once; with torchrun they do.", _COMPUTING),
    ] = None,
    batch_size: Annotated[int, _option("N", "Pictures encoded at once.", _COMPUTING, least=1)] = 32,
    workers: Annotated[int, _option("N", "Processes that read pictures ahead.", _COMPUTING, least=0)] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    offline: Offline = False,
) -> None:
    """Turn pictures into bits: a token store to train on.

    Started again, it goes on where it stopped.
    """
    if verify is not None:
        _verify(context, verify, as_json)
        return
    if data is None or out is None:
        raise UsageError("tokenize needs pictures and a folder for the store", "bitgen tokenize DATA OUT")

    from bitgen_cli import console
    from bitgen_cli.runs.tokenize import TokenizeOptions
    from bitgen_cli.runs.tokenize import tokenize as encode

    options = TokenizeOptions(
        data=data,
        out=out,
        model=model,
        batch_size=batch_size,
        latents=latents,
        reconstruct=reconstruct,
        resolution=resolution,
        bits=bits,
        device=device,
        dtype=dtype,
        workers=workers,
        aspects=_shapes(aspect),
        caption_key=caption_key,
        image_root=image_root,
        shard=shard,
        text_features=text_features,
    )
    with console.listening(apart=True) as report:
        result = encode(options, report)
    if as_json:
        console.show_json(result.to_json())
    else:
        console.show_store(result)


def _start_several(context: typer.Context, devices: int | None) -> None:
    """Runs the same command in several processes, and ends as they end; returns where that is done or not asked for."""
    if devices is None or devices == 1 or place().count > 1:
        return
    from bitgen_cli.runs.launch import launch

    raise typer.Exit(launch(context.obj, devices))


def _verify(context: typer.Context, store: Path, as_json: bool) -> None:
    """`tokenize --verify`: shows what is wrong with a store, and fails when something is."""
    given = []
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        if source is not None and source.name == "COMMANDLINE" and parameter.name not in ("verify", "as_json"):
            given.append(parameter.opts[0] if parameter.opts[0].startswith("-") else parameter.opts[0].upper())
    if given:
        raise UsageError(f"--verify reads a store and takes nothing else, but there is {', '.join(given)}")

    from bitgen_cli import console
    from bitgen_cli.runs.verify import verify

    with console.listening() as report:
        result = verify(store, report)
    if as_json:
        console.show_json(result.to_json())
    else:
        console.show_check(result)
    if result.faults:
        files = "1 file" if len(result.faults) == 1 else f"{len(result.faults)} files"
        raise InputError(f"the token store {store} is broken: {files}", "tokenize again into a new folder")


@app.command(cls=_Command)
def train(
    context: typer.Context,
    data: Annotated[
        str,
        _option("DATA", "Pictures as for tokenize; for a transformer also a token store."),
    ],
    out: Annotated[Path, _option("RUN", "Folder of the run, new or empty.")],
    preset: Annotated[
        str | None,
        _option("PRESET", "The model and its recipe."),
    ] = None,
    stage: Annotated[
        str | None,
        _option("STAGE", "tokenizer or transformer; without it, what DATA is for."),
    ] = None,
    init: Annotated[
        list[str] | None,
        _option(
            "MODEL",
            "Start from this model or weight file, of Infinity too; may be repeated. A transformer needs a tokenizer: "
            "of a store the one that made it.",
        ),
    ] = None,
    aspect: Aspects = None,
    caption_key: CaptionKey = None,
    image_root: ImageRoot = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    steps: Annotated[
        int | None,
        _option("N", "Optimizer steps.", _LEARNING, least=1),
    ] = None,
    batch_size: Annotated[
        int | None,
        _option("N", "Pictures per micro-batch.", _LEARNING, least=1),
    ] = None,
    seed: Annotated[
        int | None,
        _option("SEED", "Of everything random.", _LEARNING),
    ] = None,
    allow_init_mismatch: Annotated[
        list[str] | None,
        _option("NAME", "Weights of --init that may be missing, left over or misshapen. May be repeated.", _LEARNING),
    ] = None,
    logs: Logs = None,
    dry_run: DryRun = False,
    overfit_check: Annotated[
        bool,
        _flag(
            "--overfit-check",
            "See whether four pictures can be memorised, PASS or FAIL, and leave nothing behind.",
            _TRYING,
        ),
    ] = False,
    sweep: Sweep = None,
    device: Device = "auto",
    offline: Offline = False,
    devices: Devices = None,
    strategy: Strategy = "ddp",
    as_json: Json = False,
) -> None:
    """Train a tokenizer on pictures, or a transformer on a token store or on pictures.

    Ctrl-C finishes the step and saves; `bitgen resume` continues.
    """
    if sweep is None and not dry_run and not overfit_check:
        _start_several(context, devices)

    from bitgen_cli import console
    from bitgen_cli.presets import resolve

    given: dict[str, Any] = {"steps": steps, "batch_size": batch_size, "seed": seed}
    flags: dict[str, Any] = {}
    if aspect is not None or any(value is not None for value in given.values()):
        section = stage
        if stage is None or (aspect is not None and stage == "transformer"):
            from bitgen_cli.runs.train import stage_for

            usual = stage_for(data)
            section = stage or usual
            if aspect is not None and section == usual == "transformer":
                raise UsageError("--aspect is for pictures", "a token store has the shapes `bitgen tokenize` was told")
        given["aspects"] = None if aspect is None else list(_shapes(aspect))
        flags = {f"training.{section}.{name}": value for name, value in given.items() if value is not None}
    if sweep is not None:
        from bitgen_cli.runs.sweep import SweepOptions, combinations

        if dry_run or overfit_check:
            raise UsageError("--sweep does not go with --dry-run and --overfit-check", "try one combination out")
        tried = SweepOptions("train", *_shared_words(context), tuple(overrides or ()), out, config)
        for combination in combinations(tried.overrides):
            # every mistake is told before the first run begins
            resolve(preset, config_file=config, overrides=combination.overrides, flags=flags)
        _sweep(tried, sweep, as_json)
        return
    resolved = resolve(preset, config_file=config, overrides=tuple(overrides or ()), flags=flags)

    from bitgen_cli.runs.start import Init
    from bitgen_cli.runs.train import TrainOptions, try_out
    from bitgen_cli.runs.train import train as start

    options = TrainOptions(
        resolved=resolved,
        stage=stage,
        data=data,
        out=out,
        init=Init(tuple(init or ()), tuple(allow_init_mismatch or ())),
        device=device,
        devices=devices or 1,
        strategy=strategy,
        image_root=image_root,
        logs=tuple(logs or ()),
        caption_key=caption_key,
    )
    if overfit_check:
        _check_overfit(options, as_json=as_json)
        return
    if dry_run:
        with console.listening() as report:
            found = try_out(options, report)
        _show_fit(found, as_json=as_json)
        return
    with console.listening() as report:
        result = start(options, report)
    if as_json:
        console.show_json(result.to_json())
    else:
        console.show_training(result)


def _shapes(text: str | None) -> tuple[str, ...]:
    """Shapes W:H with commas between them."""
    return tuple(part.strip() for part in text.split(",")) if text else ()


def _check_overfit(options: TrainOptions, *, as_json: bool) -> None:
    """Shows whether a few pictures can be memorised; fails when they cannot."""
    from bitgen_cli import console
    from bitgen_cli.runs.overfit import overfit_check

    with console.listening() as report:
        result = overfit_check(options, report)
    if as_json:
        console.show_json(result.to_json())
    else:
        console.show_tables(result.tables())
    if not result.passed:
        raise DivergedError(
            f"FAIL: {len(result.pictures)} pictures were not memorised in {result.steps} steps",
            "look at the pictures, their captions and the learning rate",
        )


def _show_fit(found: Fit, *, as_json: bool) -> None:
    """Shows what a training needs; refuses one that does not fit."""
    from bitgen_cli import console

    if as_json:
        console.show_json(found.to_json())
    else:
        console.show_tables(found.tables())
    found.require()


@app.command("finetune-subject", cls=_Command)
def finetune_subject(
    context: typer.Context,
    photos: Annotated[
        Path | None,
        typer.Argument(metavar="PHOTOS", help="Folder with 3 to 5 photos of one thing.", show_default=False),
    ] = None,
    class_word: Annotated[
        str | None, _option("WORD", "What kind of thing it is, for example dog.", names=("--class",))
    ] = None,
    token: Annotated[str, _option("TOKEN", "What prompts call it.")] = "[V]",
    name: Annotated[str | None, _option("NAME", "Keep it under this name; without one, the token's letters.")] = None,
    model: Model = "demo",
    out: Annotated[Path | None, _option("RUN", "Folder of the run; without one, ./subject-NAME.")] = None,
    train: Annotated[
        list[str] | None,
        _option("PARTS", "What learns: token, text, cross, ffn, self, lora, all; several with commas.", _LEARNING),
    ] = None,
    prior: Annotated[
        str | None,
        _option("KIND", "What keeps the class: images, distill or none.", _LEARNING),
    ] = None,
    prior_weight: Annotated[float | None, _option("WEIGHT", "Weight of the class's loss.", _LEARNING)] = None,
    priors: Annotated[
        Path | None,
        _option("FOLDER", "Class pictures, yours or made by gen-priors; missing ones are made.", _LEARNING),
    ] = None,
    flip: Annotated[
        bool | None,
        _flag("--flip/--no-flip", "Also learn from mirrored photos; wrong where left and right differ.", _LEARNING),
    ] = None,
    resolution: Annotated[
        str | None,
        _option("RESOLUTION", "Learn at this pixel budget: 0.06M, 0.25M, 0.60M or 1M.", _LEARNING),
    ] = None,
    preset: Annotated[
        str | None,
        _option("PRESET", "Take this preset's recipe.", _CONFIGURING),
    ] = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    steps: Annotated[int | None, _option("N", "Optimizer steps.", _LEARNING, least=1)] = None,
    seed: Annotated[int | None, _option("SEED", "Of everything random.", _LEARNING)] = None,
    overwrite: Annotated[bool, _flag("--overwrite", "Replace a subject of the same name.", _OUTPUT)] = False,
    merge: Annotated[
        Path | None,
        _option("FOLDER", "Also write a whole model with the subject in it; with --subject, that alone.", _OUTPUT),
    ] = None,
    subject: Annotated[str | None, _option("SUBJECT", "A learned subject, NAME or FILE, to --merge.", _OUTPUT)] = None,
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
    from bitgen_cli import console

    if subject is not None and merge is not None and photos is None:
        from bitgen_cli.runs.finetune_subject import merge_subject

        with console.listening() as report:
            folder = merge_subject(subject, model, merge, report)
        console.show_json({"merged": str(folder)}) if as_json else print(folder)
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
        words = _shared_words(context)
        folder = out or Path(f"sweep-{base}")
        _sweep(SweepOptions("finetune-subject", *words, tuple(overrides or ()), folder, config, base), sweep, as_json)
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
        with console.listening() as report:
            found = try_out_subject(options, report)
        _show_fit(found, as_json=as_json)
        return
    with console.listening() as report:
        result = learn(options, report)
    if as_json:
        console.show_json(result.to_json())
    else:
        console.show_subject(result)


@app.command("gen-priors", cls=_Command)
def gen_priors(
    class_word: Annotated[str, _option("WORD", "What the pictures show, for example dog.", names=("--class",))],
    count: Annotated[int, _option("N", "Pictures there are to be; your own in the folder count too.", least=1)] = 64,
    model: Model = "demo",
    templates: Annotated[
        list[str] | None,
        _option(
            "TEXT",
            "A prompt with {class} in it; repeated, they take turns. Without one, those of finetune-subject.",
            names=("--template",),
        ),
    ] = None,
    seed: Annotated[int, _option("SEED", "Of the first picture; the next ones count up.", least=0)] = 0,
    output: Annotated[
        Path | None,
        _option(
            "FOLDER",
            "Their folder; without one, they are kept where finetune-subject with the same settings finds them.",
            _OUTPUT,
            ("--output", "-o"),
        ),
    ] = None,
    as_json: Json = False,
    batch_size: Annotated[
        int | None,
        _option("N", "Pictures drawn at once; no influence on them.", _COMPUTING, least=1),
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
    from bitgen_cli import console
    from bitgen_cli.runs.gen_priors import PriorOptions
    from bitgen_cli.runs.gen_priors import gen_priors as draw

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
    with console.listening() as report:
        result = draw(options, report)
    if as_json:
        console.show_json(result.to_json())
    else:
        console.show_priors(result)


@app.command(cls=_Command)
def resume(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run.")],
    steps: Annotated[
        int | None,
        _option("N", "Train N steps more than was planned.", least=1),
    ] = None,
    logs: Logs = None,
    device: Device = "auto",
    offline: Offline = False,
    devices: Devices = None,
    strategy: Strategy = "ddp",
    as_json: Json = False,
) -> None:
    """Continue a training from its last checkpoint, as if it had never stopped."""
    _start_several(context, devices)

    from bitgen_cli import console
    from bitgen_cli.runs.finetune_subject import SubjectResult
    from bitgen_cli.runs.resume import resume as go_on

    with console.listening() as report:
        result = go_on(run, report, steps=steps, device=device, strategy=strategy, logs=tuple(logs or ()))
    if as_json:
        console.show_json(result.to_json())
    elif isinstance(result, SubjectResult):
        console.show_subject(result)
    else:
        console.show_training(result)


@app.command("inspect-config", cls=_Command)
def inspect_config(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TARGET",
            help="A preset, a configuration file, a run, a model, a subject or a picture made by bitgen; "
            "with --plot, one run or several.",
            show_default=False,
        ),
    ] = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    schema: Annotated[
        bool,
        _flag("--schema", "Print the JSON schema of a configuration instead."),
    ] = False,
    plot: Annotated[
        Path | None,
        _option("FILE", "Draw the course of a run's training instead: FILE.png, .svg or .pdf."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show every value and where it comes from, the scales, sizes, and the memory needed."""
    if not targets and not schema:
        raise UsageError(
            "nothing to inspect", "name a preset, file, run, model, subject or picture, or ask for --schema"
        )
    from bitgen_cli import console

    if plot is not None:
        if schema or overrides or config is not None:
            raise UsageError("--plot goes with runs alone", "leave --schema, --set and --config away")
        from bitgen_cli.runs.plot import plot as draw

        with console.listening() as report:
            drawn = draw([Path(target) for target in targets or ()], plot, report)
        console.show_json(drawn.to_json()) if as_json else print(drawn.file)
        return
    if targets and len(targets) > 1:
        raise UsageError(f"{len(targets)} targets", "several belong to --plot alone, which takes runs")
    from bitgen_cli.runs.inspect_config import InspectOptions, inspect

    options = InspectOptions(
        target=targets[0] if targets else "", overrides=list(overrides or ()), schema=schema, config_file=config
    )
    with console.listening() as report:
        result = inspect(options, report)
    if as_json or schema:
        console.show_json(result.to_json())
    else:
        console.show_tables(result.sections)


_OF_EACH_RUN = ("out", "overrides", "sweep", "name", "as_json")
_COMPUTES = ("device", "devices", "strategy", "logs", "offline")


def _shared_words(context: typer.Context) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What was typed for all runs of a sweep: words that change the result, and words that do not."""
    shared: list[str] = []
    computing: list[str] = []
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        if source is None or source.name != "COMMANDLINE" or parameter.name in _OF_EACH_RUN:
            continue
        value = context.params[str(parameter.name)]
        words = computing if parameter.name in _COMPUTES else shared
        if parameter.param_type_name == "argument":
            words.append(str(value))
        elif isinstance(value, bool):
            words.append([*parameter.opts, *parameter.secondary_opts][0 if value else -1])
        else:
            for item in value if isinstance(value, list | tuple) else [value]:
                words += [parameter.opts[0], str(item)]
    return tuple(shared), tuple(computing)


def _sweep(options: Any, how: str, as_json: bool) -> None:
    """Shows the commands of a sweep, or runs them and shows what they reached."""
    from bitgen_cli import console
    from bitgen_cli.runs import sweep

    if how not in (sweep.PRINT, sweep.RUN):
        raise UsageError(f"--sweep {how}: must be {sweep.PRINT} or {sweep.RUN}")
    if how == sweep.PRINT:
        planned = sweep.plan(options)
        if as_json:
            console.show_json({"runs": [run.planned_json() for run in planned]})
        else:
            print("\n".join(run.command for run in planned))
        return
    with console.listening() as report:
        result = sweep.sweep(options, report)
    if as_json:
        console.show_json(result.to_json())
    else:
        console.show_sweep(result)
    if result.exit_code:
        raise typer.Exit(result.exit_code)


def run(arguments: list[str]) -> int:
    """The exit code of one command; every error becomes a line on stderr here and nowhere else."""
    for stream in (sys.stdout, sys.stderr):
        # a terminal without UTF-8, or a file name that is none, must not end a command
        if stream.errors == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if place().rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  the first of several processes speaks for all
    try:
        code = _invoke(arguments)
        sys.stdout.flush()
        return code
    except typer.TyperException as error:
        return _usage_error(error)
    except Interrupted as end:
        return _fail(str(end), end.exit_code, kind="interrupted")
    except BitgenError as error:
        return _fail(str(error), error.exit_code)
    except BrokenPipeError:  # whoever read our output has enough
        _drain_stdout()
        return ExitCode.OK
    except (KeyboardInterrupt, typer.Abort):
        return _fail("stopped by Ctrl-C", ExitCode.INTERRUPTED, kind="interrupted")
    except Exception as error:
        if _no_space(error):  # files tell where they are: this is stdout
            hint = "what was done is saved; free some space or send it elsewhere"
            return _fail(f"cannot write to standard output: no space left ({hint})", ExitCode.RESOURCES)
        if _out_of_memory(error):
            return _fail(
                "out of memory (a smaller --batch-size or --resolution needs less)", ExitCode.RESOURCES
            )
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        hint = "" if _wants_traceback() else f" ({TRACEBACK}=1 shows where)"
        return _fail(f"{reason}{hint}", ExitCode.INTERNAL, kind="internal error")


def _invoke(arguments: list[str]) -> int:
    command = typer.main.get_command(app)
    try:
        with command.make_context("bitgen", arguments, obj=arguments) as context:
            command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    return ExitCode.OK


def _usage_error(error: typer.TyperException) -> int:
    context = getattr(error, "ctx", None)
    path = "bitgen" if context is None else context.command_path
    return _fail(f"{error.format_message().rstrip('.')} (see {path} --help)", ExitCode.USAGE)


def _fail(message: str, code: int, kind: str = "error") -> int:
    from bitgen_cli import console

    _drain_stdout()
    rank = place().rank
    if rank:
        if code in (ExitCode.INTERRUPTED, ExitCode.TERMINATED):
            return int(code)
        # what all ranks meet is told by the first; whoever started them ends the others meanwhile
        time.sleep(_AFTER_THE_FIRST)
        message = f"rank {rank}: {message}"
    if _wants_traceback():
        import traceback

        traceback.print_exc()
    console.show_error(message, kind)
    return int(code)


def _drain_stdout() -> None:
    """Writes what is left, or drops it where nobody takes it: the interpreter must not try once more."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _no_space(error: Exception) -> bool:
    """Whether a disk is full, or what the user may have of it."""
    from bitgen_cli.files import NO_SPACE

    return isinstance(error, OSError) and error.errno in NO_SPACE


def _out_of_memory(error: Exception) -> bool:
    """Whether the machine or the accelerator had no memory left, in the words of Python and torch."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def _wants_traceback() -> bool:
    return os.environ.get(TRACEBACK, "") not in ("", "0")
