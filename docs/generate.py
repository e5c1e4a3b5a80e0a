"""Writes reference.md: `python -m docs.generate`.

All of it is what the code knows: commands, configuration keys, exit codes, and what --json prints. A test tells when it
is stale.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from bitgen_cli.app import TRACEBACK
from bitgen_cli.config import Config, LoopConfig, Section
from bitgen_cli.config_keys import accepts, section_of
from bitgen_cli.errors import ExitCode
from bitgen_cli.examples import EXAMPLES
from bitgen_cli.files import HOME
from bitgen_cli.presets import PREFIX, preset_names, resolve
from bitgen_cli.runs.finetune_subject import SubjectResult
from bitgen_cli.runs.fitting import Fit
from bitgen_cli.runs.gen_priors import PriorResult
from bitgen_cli.runs.overfit import OverfitResult
from bitgen_cli.runs.plot import PlotResult
from bitgen_cli.runs.published import CATALOGUE
from bitgen_cli.runs.sample_result import SampledPicture, SampleResult
from bitgen_cli.runs.sweep import SweepResult
from bitgen_cli.runs.tokenize import TokenizeResult
from bitgen_cli.runs.train import TrainResult
from bitgen_cli.runs.verify import VerifyResult
from bitgen_cli.surface import Command, Option, commands, first_line

PAGE = Path(__file__).parent / "reference.md"

RESULTS: dict[str, type] = {
    "sample": SampleResult,
    "tokenize": TokenizeResult,
    "tokenize --verify": VerifyResult,
    "train": TrainResult,
    "train --dry-run": Fit,
    "train --overfit-check": OverfitResult,
    "train --sweep run": SweepResult,
    "finetune-subject": SubjectResult,
    "gen-priors": PriorResult,
    "inspect-config --plot": PlotResult,
}
"""What is printed by --json, by the command."""

OF_A_PICTURE = ", ".join(f"`{key}`" for key in SampledPicture(Path("a.png"), "a cat", 1, {}).to_json())
"""What is told of each, before its recipe."""

MADE_UP = {
    ("sample", "pictures"): f"in the order of the prompts, each with {OF_A_PICTURE} and the keys of its recipe",
    ("sample", "failed"): "lines of the prompt file that could not be drawn, each with `line` and `error`",
    ("train --dry-run", "memory"): "bytes of each rank, by what holds them; `peak` is the most at once, `total` all",
    ("train --dry-run", "disk"): "bytes the run leaves, by what they are, with their `total` and what is `free`",
    ("train --sweep run", "runs"): "of all combinations, in order, each with `values`, `run`, `command`, `state`, "
    "`exit_code`, `steps`, `loss`, `val_loss`, `best_val_loss` and `val_psnr`",
    ("gen-priors", "class"): "what the pictures show",
    ("gen-priors", "count"): "pictures in the folder",
    ("gen-priors", "pictures"): "all of them, your own last, each with `path` and `prompt`",
    ("inspect-config --plot", "plot"): "the picture",
}
"""Of keys that are not told by the result's own attributes, or more of what they hold."""

INSPECTED = {
    "kind": "`preset`, `file`, `run`, `model`, `subject` or `picture`",
    "target": "as typed",
    "run, model": "what a run is and how far; a model's files and fingerprints",
    "config": "the whole configuration, as it could stand in a file",
    "values": "the same by dotted key, each with `value` and `origin`",
    "scales": "height, width, positions and bits of each",
    "picture": "one picture's pixels, positions, bits, and bytes in a token store",
    "ratios": "the aspect ratios there are",
    "parameters": "how many numbers each part has",
    "memory": "bytes that sampling and each training need, and those that are free",
}

ENVIRONMENT = {
    f"{PREFIX}SECTION__KEY": "a configuration value: `BITGEN_SAMPLING__CFG=4` is `sampling.cfg=4`",
    HOME: "folder for subjects, class pictures, converted models and what is kept of prompts, in place of your data "
    "and cache folders",
    TRACEBACK: "1: errors come with the place in the program they come from",
    "NO_COLOR": "no colours on a terminal",
    "HF_HOME": "where fetched files lie",
    "HF_ENDPOINT": "another hub",
    "HF_TOKEN": "who you are to the hub, for gated repositories",
    "HF_HUB_OFFLINE": "1: as `--offline`",
    "CUDA_VISIBLE_DEVICES": "which GPUs there are",
    "OMP_NUM_THREADS": "processor cores a process computes on; `--devices` shares them out where it is not set",
    "CXX": "the C++ compiler of `training.transformer.compile`",
    "RANK, WORLD_SIZE, LOCAL_RANK": "set by torchrun and `--devices`: which of several processes this is",
    "WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY, WANDB_DIR, WANDB_RUN_GROUP": "where `--log wandb` writes",
}
"""What is read of the environment, by us or by the libraries beneath."""


def page() -> str:
    """The whole page."""
    parts = [
        "# Reference",
        "Every command, configuration key, exit code and JSON key. This page is written by `python -m docs.generate` "
        "from the code; do not edit it. `bitgen COMMAND --help` tells the same at the terminal.",
        _contents(),
        *(_command(command) for command in commands()),
        _configuration(),
        _exit_codes(),
        _environment(),
        _json(),
    ]
    return "\n\n".join(parts) + "\n"


def _contents() -> str:
    names = [f"bitgen {command.name}" for command in commands()]
    names += ["Configuration", "Exit codes", "Environment", "JSON"]
    return "\n".join(f"- [{name}](#{name.lower().replace(' ', '-')})" for name in names)


def _command(command: Command) -> str:
    usage = " ".join(
        ["bitgen", command.name, "[OPTIONS]", *(_place(a.value, a.required, a.several) for a in command.arguments)]
    )
    shown = "\n\n".join(f"# {example.does}\n{example.command}" for example in EXAMPLES[command.name])
    parts = [f"## bitgen {command.name}", _escaped(command.help), f"```\n{usage}\n\n{shown}\n```"]
    if command.arguments:
        rows = [[f"`{a.value}`", _escaped(a.help)] for a in command.arguments]
        parts.append(_table(["argument", "meaning"], rows))
    by_panel = sorted(command.options, key=lambda option: _panels(command).index(option.panel))
    for panel, options in groupby(by_panel, key=lambda option: option.panel):
        parts.append(f"**{panel}**")
        parts.append(_table(["option", "value", "meaning", "default"], [_option(option) for option in options]))
    return "\n\n".join(parts)


def _panels(command: Command) -> list[str]:
    """The headings in the order of the help: the first one first, though --help is there last."""
    first = command.options[-1].panel
    return list(dict.fromkeys([first, *(option.panel for option in command.options)]))


def _place(value: str, required: bool, several: bool) -> str:
    return (value if required else f"[{value}]") + ("..." if several else "")


def _option(option: Option) -> list[str]:
    names = ", ".join(f"`{name}`" for name in (*option.names, *option.off))
    value = f"`{option.value}`" if option.value else ""
    if option.limits:
        value += f", {option.limits}"
    default = f"`{option.default}`" if option.default else "must be given" if option.required else ""
    again = " May be repeated." if option.repeated and "repeated" not in option.help else ""
    return [names, value, _escaped(option.help + again), default]


def _configuration() -> str:
    presets = [[f"`{name}`", _escaped(resolve(name, environment={}).config.description)] for name in preset_names()]
    parts = [
        "## Configuration",
        "A value comes from, the later the stronger: the default below, the preset, `--config FILE`, the environment, "
        "flags, `--set section.key=value`. `bitgen inspect-config PRESET` shows every value and its origin, `bitgen "
        "inspect-config --schema` prints the same rules as a JSON schema. Where no default is told, a preset or file "
        "must give the value. A file may begin with `extends: PRESET`.",
        "**Presets**",
        _table(["preset", "meaning"], presets),
        f"Published weights that `--model` takes by name: {', '.join(f'`{name}`' for name in CATALOGUE)}.",
        *_sections(),
    ]
    return "\n\n".join(parts)


def _sections() -> Iterator[str]:
    """A chapter for each section, those of trainings after what they have in common."""
    yield _keys("", Config, {})
    for name in ("tokenizer", "transformer", "text_encoder", "scales"):
        yield _keys(f"model.{name}", _inner(Config, f"model.{name}"), {})
    yield _keys("sampling", _inner(Config, "sampling"), {})
    common = dict(LoopConfig.model_fields)
    yield _keys("training.STAGE", LoopConfig, {}, "training.subject")
    yield _keys("training.STAGE.optimizer", _inner(LoopConfig, "optimizer"), {}, "training.subject.optimizer")
    for stage in ("tokenizer", "transformer", "subject"):
        yield _keys(f"training.{stage}", _inner(Config, f"training.{stage}"), common)


def _inner(section: type[Section], key: str) -> type[Section]:
    """The section that a dotted key names."""
    for name in key.split("."):
        found = section_of(section.model_fields[name])
        assert found is not None
        section = found
    return section


def _keys(title: str, section: type[Section], known: Mapping[str, FieldInfo], example: str | None = None) -> str:
    """The chapter of a section.

    Args:
        title: its dotted name.
        section: whose keys are told.
        known: keys told elsewhere, which are left out where they say the same here.
        example: a dotted name under which the keys are found, where that is not the title.
    """
    where = title if example is None else example
    rows = []
    for name, field in section.model_fields.items():
        if section_of(field) is not None:
            rows += _section_defaults(name, field)
        elif name not in known or _said(known[name]) != _said(field):
            range_ = accepts(f"{where}.{name}" if where else name)
            rows.append([f"`{name}`", _escaped(field.description or ""), _escaped(range_), _default(field)])
    about = _escaped(" ".join(inspect.cleandoc(section.__doc__ or "").split("\n\n")[0].split()))
    about = re.sub(r" \(INFINITY_FORMAT[^)]*\)", "", about)
    table = _table(["key", "meaning", "accepts", "default"], rows)
    return f"### {title or 'At the top'}\n\n{about}\n\n{table}"


def _section_defaults(name: str, field: FieldInfo) -> list[list[str]]:
    """Rows for the values of a section inside that are other ones here."""
    section = field.default
    if not isinstance(section, Section):
        return []
    inner = type(section).model_fields
    return [
        [f"`{name}.{key}`", _escaped(inner[key].description or ""), "as above", f"`{_shown(getattr(section, key))}`"]
        for key in inner
        if key in section.model_fields_set
    ]


def _said(field: FieldInfo) -> tuple[Any, ...]:
    return (field.description, field.default, str(field.annotation))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return ""
    return f"`{_shown(field.default)}`"


def _shown(value: Any) -> str:
    """As it could stand in a file."""
    return value if isinstance(value, str) and value else json.dumps(value)


def _exit_codes() -> str:
    rows = [[str(code.value), code.meaning] for code in ExitCode]
    return "## Exit codes\n\n" + _table(["code", "meaning"], rows)


def _environment() -> str:
    rows = [[", ".join(f"`{one}`" for one in names.split(", ")), text] for names, text in ENVIRONMENT.items()]
    return "## Environment\n\n" + _table(["variable", "meaning"], rows)


def _json() -> str:
    parts = [
        "## JSON",
        "`--json` prints one object to stdout, and nothing else is printed there; an error is a line on stderr and an "
        "exit code. `resume` prints what the command that began the run would. `finetune-subject --subject NAME "
        '--merge FOLDER` prints `{"merged": FOLDER}`, `--sweep print` an object with `runs`, each with its `values`, '
        "`run` and `command`.",
    ]
    for command, result in RESULTS.items():
        told = meanings(result)
        rows = [[f"`{key}`", _escaped(MADE_UP.get((command, key)) or told[key])] for key in printed(result)]
        parts += [f"### {command} --json", _table(["key", "meaning"], rows)]
    rows = [[", ".join(f"`{one}`" for one in keys.split(", ")), text] for keys, text in INSPECTED.items()]
    parts += [
        "### inspect-config --json",
        "Of a preset, file, run or model:",
        _table(["key", "meaning"], rows),
        "Of a picture `kind`, `target`, `width`, `height` and `recipe`; of a subject its name, file, token, class, "
        "base model, photos and recipe.",
    ]
    return "\n\n".join(parts)


@dataclass
class _Nothing:
    """What stands for a part that is itself an object."""

    total: int = 0
    peak: int = 0

    def to_json(self) -> dict[str, Any]:
        return {}


def printed(result: Any) -> list[str]:
    """The keys of a result with nothing in it, in their order."""
    assert is_dataclass(result)
    empty = {"pictures": (), "remade": (), "runs": (), "init": (), "choices": (), "seconds": 0.0, "failures": ()}
    values = {one.name: empty.get(one.name) for one in fields(result)}
    values |= {name: _Nothing() for name in ("memory", "disk") if name in values}
    values |= {name: 0 for name in ("data", "free") if name in values and result is Fit}
    found: Any = result
    return list(found(**values).to_json())


def meanings(result: type) -> dict[str, str]:
    """What the docstring of a result says of each attribute, and those of its properties of themselves."""
    attributes = inspect.cleandoc(result.__doc__ or "").partition("Attributes:\n")[2]
    found: dict[str, str] = {}
    for names, meaning in re.findall(r"^ {4}(\w[\w, ]*): ((?:.|\n {5,})*)", attributes, re.MULTILINE):
        text = " ".join(meaning.split()).removesuffix(".").replace("None", "null")
        found |= dict.fromkeys(names.split(", "), text)
    for name, value in vars(result).items():
        if isinstance(value, property):
            line = first_line(value.__doc__ or "")
            found[name] = line[:1].lower() + line[1:]
    return found


def _table(heads: list[str], rows: Iterable[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escaped(text: str) -> str:
    """Text for markdown: what looks like a tag or a column's end is not one."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("[V]", "\\[V]")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
