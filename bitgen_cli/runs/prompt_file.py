"""Prompts and options as they were typed, and as the lines of a prompt file say them."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from bitgen_cli.errors import BitgenError, InputError, UsageError
from bitgen_cli.files import explain
from bitgen_cli.place import Place
from bitgen_cli.runs.jobs import SampleOptions
from bitgen_cli.runs.output import below, output_folder

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
    "refine": int,
    "keep_scales": int,
}  # fmt: skip
"""What a line of a JSONL prompt file may say, and the types it may say it in."""
MOST_OF_A_LINE = 10_000
"""Pictures that one line may ask for."""


@dataclass(frozen=True)
class Request:
    """A prompt and how to draw it.

    Attributes:
        options: with that prompt alone.
        first: number of its first picture among all.
        line: of the prompt file, from 1; 0 for a prompt that was typed.
        text: the line.
    """

    options: SampleOptions
    first: int
    line: int = 0
    text: str = ""


@dataclass(frozen=True)
class Failure:
    """A line of a prompt file that could not be drawn, or not all of it, and why."""

    line: int
    message: str


def requested(options: SampleOptions, here: Place) -> tuple[list[Request], list[Failure]]:
    """The options of every prompt: those of the command line, with what its line of the prompt file says on top.

    Args:
        options: of the command line.
        here: of several processes each gets every so manyth line.

    Returns:
        Prompts, and the lines that say nothing that can be drawn.

    Raises:
        UsageError: a typed prompt is empty.
        InputError: the prompt file cannot be read.
    """
    found: list[Request] = []
    failures: list[Failure] = []
    count = 0
    for prompt in options.prompts:
        if not prompt.strip():
            raise UsageError("the prompt is empty", "say what to draw")
        found.append(Request(replace(options, prompts=(prompt,)), count))
        count += options.num_images
    if options.prompts_file is None:
        return found, failures
    lines = enumerate(_read_lines(options.prompts_file), 1)
    for place, (number, line) in enumerate((number, line) for number, line in lines if line.strip()):
        mine = place % here.count == here.rank
        try:
            own = _of_line(options, line)
        except BitgenError as error:
            failures += [Failure(number, str(error))] if mine else []
            count += 1
            continue
        if mine:
            found.append(Request(own, count, number, line))
        count += own.num_images
    return found, failures


def _read_lines(file: str) -> list[str]:
    """Lines as editors count them: other characters that end a line in Unicode do not."""
    path = Path(file)
    try:
        data = sys.stdin.buffer.read() if file == "-" else path.read_bytes()
        return data.decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except OSError as error:
        raise explain(error, path, "read") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{'standard input' if file == '-' else path} is not UTF-8 text") from error


def _of_line(options: SampleOptions, line: str) -> SampleOptions:
    if not line.lstrip().startswith("{"):
        return replace(options, prompts=(line.strip(),))
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not valid JSON: {error}") from error
    for key, value in row.items():
        if key not in LINE_KEYS:
            raise UsageError(f"unknown key {key[:40]!r}", f"known: {', '.join(LINE_KEYS)}")
        if isinstance(value, bool) or not isinstance(value, LINE_KEYS[key]):
            raise UsageError(f"{key} cannot be {str(value)[:60]!r}")
        if isinstance(value, str) and not value.isascii() and value != value.encode("utf-8", "replace").decode():
            raise UsageError(f"{key} has halves of characters, which are no text")
    if not row.get("prompt", "").strip():
        raise UsageError("the prompt is empty" if "prompt" in row else "needs a prompt")
    if not 1 <= row.get("num_images", 1) <= MOST_OF_A_LINE:
        raise UsageError(f"num_images must be from 1 to {MOST_OF_A_LINE}")
    changed = {key: value for key, value in row.items() if key != "prompt"}
    for key in ("cfg", "tau"):
        if key in changed:
            changed[key] = ",".join(map(str, changed[key])) if isinstance(changed[key], list) else str(changed[key])
    if "output" in changed:
        changed["output"] = below(output_folder(options.output), changed["output"])
    return replace(options, prompts=(row["prompt"],), **changed)
