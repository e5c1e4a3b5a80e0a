"""`bitgen tokenize`, and --verify of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitgen_cli.commands.options import (
    BIT_COUNT,
    BUDGETS,
    COMPUTING,
    READING,
    STORING,
    Aspects,
    CaptionKey,
    Device,
    Dtype,
    ImageRoot,
    Json,
    Model,
    Offline,
    flag,
    is_given,
    option,
    shapes,
)
from bitgen_cli.errors import InputError, UsageError


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
    resolution: Annotated[str | None, option("RESOLUTION", f"Pixel budget: {BUDGETS}.", READING)] = None,
    aspect: Aspects = None,
    caption_key: CaptionKey = None,
    image_root: ImageRoot = None,
    bits: Annotated[int | None, option("N", BIT_COUNT, STORING, least=1)] = None,
    latents: Annotated[
        bool,
        flag(
            "--latents/--no-latents",
            "Keep the latents too, which training with flipped bits needs to be exact.",
            STORING,
        ),
    ] = True,
    reconstruct: Annotated[
        int,
        option("N", "Decode N pictures again, beside their originals, and measure PSNR and SSIM.", STORING, least=0),
    ] = 0,
    text_features: Annotated[
        bool,
        flag(
            "--text-features",
            "Keep what the model's text encoder makes of the captions, if it is a fixed one.",
            STORING,
        ),
    ] = False,
    verify: Annotated[
        Path | None,
        option("STORE", "Read a whole store and tell whether it is what was written; nothing else is done."),
    ] = None,
    as_json: Json = False,
    shard: Annotated[
        str | None,
        option("I/N", "Make one of N parts, which N processes can do at once; with torchrun they do.", COMPUTING),
    ] = None,
    batch_size: Annotated[int, option("N", "Pictures encoded at once.", COMPUTING, least=1)] = 32,
    workers: Annotated[int, option("N", "Processes that read pictures ahead.", COMPUTING, least=0)] = 0,
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

    from bitgen_cli.console.progress import listening
    from bitgen_cli.console.stores import show_store
    from bitgen_cli.console.terminal import show_result
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
        aspects=shapes(aspect),
        caption_key=caption_key,
        image_root=image_root,
        shard=shard,
        text_features=text_features,
    )
    with listening(apart=True) as report:
        result = encode(options, report)
    show_result(result, show_store, as_json=as_json)


def _verify(context: typer.Context, store: Path, as_json: bool) -> None:
    """`tokenize --verify`: shows what is wrong with a store, and fails when something is."""
    given = []
    for parameter in context.command.params:
        if is_given(context, str(parameter.name)) and parameter.name not in ("verify", "as_json"):
            given.append(parameter.opts[0] if parameter.opts[0].startswith("-") else parameter.opts[0].upper())
    if given:
        raise UsageError(f"--verify reads a store and takes nothing else, but there is {', '.join(given)}")

    from bitgen_cli.console.progress import listening
    from bitgen_cli.console.stores import show_check
    from bitgen_cli.console.terminal import show_result
    from bitgen_cli.runs.verify import verify

    with listening() as report:
        result = verify(store, report)
    show_result(result, show_check, as_json=as_json)
    if result.faults:
        files = "1 file" if len(result.faults) == 1 else f"{len(result.faults)} files"
        raise InputError(f"the token store {store} is broken: {files}", "tokenize again into a new folder")
