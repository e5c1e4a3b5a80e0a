"""Where configuration values come from: defaults < preset < --config file < environment < flags < --set.

A preset or a file may say `extends: NAME`: that preset lies beneath it. Every value keeps its origin. All
problems of all layers are told at once. No torch here.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from bitgen_cli.config import Config, ModelConfig, Section
from bitgen_cli.config_keys import flatten, known_keys, nearest, problems, section_of, show
from bitgen_cli.errors import ConfigError, UsageError
from bitgen_cli.files import explain

DEFAULT = "default"
"""Origin of the values nobody gave."""
EXTENDS = "extends"
"""The key of a file that names the preset beneath it."""
PREFIX = "BITGEN_"
"""Environment variables that set values: BITGEN_SAMPLING__CFG=4 sets sampling.cfg."""
NOT_VALUES = frozenset({"BITGEN_HOME", "BITGEN_TRACEBACK", "BITGEN_PARITY"})
"""Environment variables of that prefix that are no configuration values."""

MOST_VALUES = 100_000
"""Of a file, each alias counted as what it stands for."""

_NO_FLAGS: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Resolved:
    """A whole configuration.

    Attributes:
        config: validated.
        origins: of every value by its dotted key: `default`, `preset demo`, `file x.yaml`,
            `environment BITGEN_...`, `flag --steps` or `--set`.
    """

    config: Config
    origins: dict[str, str]


def preset_names() -> list[str]:
    """Names of the presets that come with bitgen, sorted."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def preset_path(name: str) -> Path:
    """The file of a preset.

    Raises:
        UsageError: there is none of that name.
    """
    names = preset_names()
    if name not in names:
        close = difflib.get_close_matches(name, names, 1)
        meant = f"did you mean {close[0]}? " if close else ""
        raise UsageError(f"unknown preset {name!r}", f"{meant}known: {', '.join(names)}")
    return _folder() / f"{name}.yaml"


def resolve(
    preset: str | None,
    *,
    config_file: Path | None = None,
    overrides: Sequence[str] = (),
    flags: Mapping[str, Any] = _NO_FLAGS,
    environment: Mapping[str, str] | None = None,
) -> Resolved:
    """The configuration that all layers together give.

    Args:
        preset: its name; None when the file says everything or extends one.
        config_file: YAML.
        overrides: `a.b=1` each, the value in YAML; every key once.
        flags: dotted key to value; the flag is called like the key's last part. None was not given.
        environment: None takes the process's own; empty variables count as not set.

    Raises:
        ConfigError: values or keys are wrong; carries every problem.
        UsageError: no preset, an unknown one, or a file that is not YAML.
        InputError: a file cannot be read.
    """
    file = None if config_file is None else _read(config_file)
    base = preset if file is None else file.base or preset
    if base is None and file is None:
        raise UsageError("no configuration given", f"name a preset: {', '.join(preset_names())}")
    if preset is not None and base != preset:
        raise UsageError(f"{config_file} extends {base}, but preset {preset} is asked for too", "choose one")
    layers = _Layers()
    for below in [] if base is None else _chain(base):
        layers.add_file(below, f"preset {below.path.stem}")
    if file is not None:
        layers.add_file(file, f"file {config_file}")
    layers.add_environment(os.environ if environment is None else environment)
    layers.add_flags(flags)
    layers.add_overrides(overrides)
    return layers.validated(f"preset {preset}" if config_file is None else str(config_file))


def resolve_stored(
    stored: Mapping[str, Any],
    origins: Mapping[str, str],
    *,
    where: str,
    flags: Mapping[str, Any] = _NO_FLAGS,
    overrides: Sequence[str] = (),
) -> Resolved:
    """A configuration that was resolved and stored before, with flags and `--set` on top. The environment is left out.

    Args:
        stored: the configuration.
        origins: of its values; `where` stands for those that are not known.
        where: names the file it was stored in.
        flags, overrides: as in `resolve`.

    Raises:
        ConfigError: values or keys are wrong; carries every problem.
    """
    layers = _Layers()
    layers.add(stored, lambda key: _Source(origins.get(key, where), where))
    layers.add_flags(flags)
    layers.add_overrides(overrides)
    return layers.validated(where)


def resolve_for_model(
    stored: Mapping[str, Any],
    stage: str,
    *,
    where: str,
    preset: str | None = None,
    config_file: Path | None = None,
    overrides: Sequence[str] = (),
    flags: Mapping[str, Any] = _NO_FLAGS,
    environment: Mapping[str, str] | None = None,
) -> Resolved:
    """The configuration of a model that exists, with a recipe to train it further.

    The model's own values lie lowest, then the recipe of one stage in a preset, then all layers of `resolve`.

    Args:
        stored: name, model and sampling of the model, and an empty recipe of the stage.
        stage: whose recipe the preset gives.
        where: names the model.
        preset: its name; None takes the defaults.
        config_file, overrides, flags, environment: as in `resolve`.

    Raises:
        ConfigError: values or keys are wrong; carries every problem.
        UsageError: an unknown preset, a file that is not YAML, or a value that would change the model.
        InputError: a file cannot be read.
    """
    layers = _Layers()
    layers.add(stored, lambda _: _Source(where, where))
    for file in [] if preset is None else _chain(preset):
        recipe = file.values.get("training", {}).get(stage)
        if recipe is not None:
            only = _File(file.path, None, {"training": {stage: recipe}}, file.lines, file.problems)
            layers.add_file(only, f"preset {file.path.stem}")
    if config_file is not None:
        layers.add_file(_read(config_file), f"file {config_file}")
    layers.add_environment(os.environ if environment is None else environment, stage)
    layers.add_flags(flags)
    layers.add_overrides(overrides)
    resolved = layers.validated(where)
    if resolved.config.model != ModelConfig.model_validate(stored["model"]):
        changed = sorted(k for k, o in resolved.origins.items() if k.startswith("model.") and o not in (where, DEFAULT))
        raise UsageError(f"{where} exists: {', '.join(changed)} cannot be changed", "set training and sampling alone")
    return resolved


@dataclass(frozen=True)
class _Source:
    """Where a value comes from: its origin, and the exact place for error messages."""

    origin: str
    place: str


@dataclass(frozen=True)
class _File:
    """A YAML file of configuration values.

    Attributes:
        path: of the file.
        base: the preset it extends.
        values: the others.
        lines: of each key by its dotted name.
        problems: found while reading.
    """

    path: Path
    base: str | None
    values: dict[Any, Any]
    lines: dict[str, int]
    problems: list[str]


class _Layers:
    """Values laid over each other, where they come from, and what is wrong with them."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}
        self._sources: dict[str, _Source] = {}
        self._problems: list[str] = []

    def add_file(self, file: _File, origin: str) -> None:
        """The values of a preset or a file."""
        self._problems += file.problems

        def source(key: str) -> _Source:
            line = f" line {file.lines[key]}" if key in file.lines else ""
            return _Source(origin, f"{file.path.name}{line}")

        self.add(file.values, source)

    def add_environment(self, environment: Mapping[str, str], stage: str | None = None) -> None:
        """The values of BITGEN_ variables; with a stage, those of other stages' recipes are left out."""
        names = {PREFIX + key.upper().replace(".", "__"): key for key in known_keys()}
        for name in sorted(environment):
            if not name.startswith(PREFIX) or name in NOT_VALUES or not environment[name].strip():
                continue
            key = names.get(name, "")
            if stage is not None and key.startswith("training.") and not key.startswith(f"training.{stage}."):
                continue
            if name in names:
                self._add_text(names[name], environment[name], f"environment {name}")
                continue
            close = difflib.get_close_matches(name, names, 1)
            last = name.removeprefix(PREFIX).rpartition("__")[2].lower()
            meant = f"did you mean {close[0]}?" if close else nearest(last)
            self._problems.append(f"environment variable {name} names no key, {meant}")

    def add_flags(self, flags: Mapping[str, Any]) -> None:
        """Puts the flags that were given on top, each called like its key's last part."""
        for key, value in flags.items():
            if value is not None:
                self.add_key(key, value, f"flag --{key.rpartition('.')[2].replace('_', '-')}")

    def add_overrides(self, overrides: Sequence[str]) -> None:
        """The values of --set."""
        given: dict[str, list[str]] = {}
        for override in overrides:
            key, equals, text = override.partition("=")
            if equals and key.strip():
                given.setdefault(key.strip(), []).append(text)
                self._add_text(key.strip(), text, "--set")
            else:
                self._problems.append(f"--set {override}: must be KEY=VALUE, for example sampling.cfg=4")
        for key, texts in given.items():
            if len(texts) > 1:
                times = "twice" if len(texts) == 2 else f"{len(texts)} times"
                values = ", ".join(show(text) for text in texts)
                self._problems.append(f"{key}: given {times} by --set ({values}); trainings try each with --sweep")

    def add_key(self, key: str, value: Any, origin: str) -> None:
        """One value by its dotted key."""
        for name in reversed(key.split(".")):
            value = {name: value}
        self.add(value, lambda _: _Source(origin, origin))

    def add(self, values: Mapping[Any, Any], source: Callable[[str], _Source]) -> None:
        """Values over those that are there; sections are merged, everything else is replaced."""
        self._merge(self._values, values, Config, "", source)

    def validated(self, where: str) -> Resolved:
        """The configuration all values make.

        Raises:
            ConfigError: with every problem found here and before.
        """
        config: Config | None = None
        try:
            config = Config.model_validate(self._values)
        except ValidationError as error:
            self._problems += problems(error, self._place)
        if config is None or self._problems:
            raise ConfigError(where, self._problems)
        origins = {
            key: self._sources[key].origin if key in self._sources else DEFAULT for key, _ in flatten(config)
        }
        return Resolved(config, origins)

    def _add_text(self, key: str, text: str, origin: str) -> None:
        """One value by its dotted key, written in YAML."""
        try:
            value = parse_yaml(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            self._problems.append(f"{key} = {show(text)}: not valid YAML: {_reason(error)} ({origin})")
        else:
            self.add_key(key, value, origin)

    def _merge(
        self,
        below: dict[str, Any],
        above: Mapping[Any, Any],
        section: type[Section],
        prefix: str,
        source: Callable[[str], _Source],
    ) -> None:
        for name, value in above.items():
            key = f"{prefix}{name}"
            known = section.model_fields.get(str(name))
            if known is None:
                hint = nearest(str(name), section, prefix)
                self._problems.append(f"{key} = {show(value)}: unknown key, {hint} ({source(key).place})")
                continue
            inner = section_of(known)
            if inner is not None and isinstance(value, Mapping):
                if not isinstance(below.get(name), dict):
                    below[name] = {}
                    self._sources.pop(key, None)
                self._merge(below[name], value, inner, f"{key}.", source)
                continue
            below[name] = value
            self._sources = {k: s for k, s in self._sources.items() if not k.startswith(f"{key}.")}
            self._sources[key] = source(key)

    def _place(self, key: str) -> str:
        return self._sources[key].place if key in self._sources else ""


def _folder() -> Path:
    """Where the presets are: in the package, or beside it in the source tree."""
    here = Path(__file__).resolve().parent
    packaged = here / "preset_files"
    return packaged if packaged.is_dir() else here.parent / "presets"


def _chain(name: str) -> list[_File]:
    """A preset and those it extends, the lowest first.

    Raises:
        UsageError: one of them is unknown, or they extend each other in a circle.
    """
    chain: list[_File] = []
    wanted: str | None = name
    while wanted is not None:
        names = [file.path.stem for file in reversed(chain)]
        if wanted in names:
            raise UsageError(f"a circle of presets: {' extends '.join([*names, wanted])}")
        chain.insert(0, _read(preset_path(wanted)))
        wanted = chain[0].base
    return chain


def _read(path: Path) -> _File:
    """A YAML file of configuration values.

    Raises:
        InputError: missing or unreadable.
        UsageError: not YAML, or no mapping of keys to values.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise explain(error, path, "read") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UsageError(f"{path}, line {line}: not a text file in UTF-8") from error
    lines: dict[str, int] = {}
    found: list[str] = []
    try:
        node = yaml.compose(text, yaml.SafeLoader)
        if node is not None:
            _refuse_multiplied(node)
            _note_lines(node, "", path.name, lines, found)
        values = {} if node is None else _constructed(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UsageError(f"{path}, line {line}: not valid YAML: {_reason(error)}") from error
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise UsageError(f"{path}, line {line}: not valid YAML: {_reason(error)}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not valid YAML: {_reason(error)}") from error
    if not isinstance(values, dict):
        raise UsageError(
            f"{path}, line 1: must hold keys and values, such as `name: mine`, not {show(values)}"
        )
    base = values.pop(EXTENDS, None)
    if base is not None and not isinstance(base, str):
        raise UsageError(f"{path}, line {lines[EXTENDS]}: extends must name a preset, not {show(base)}")
    return _File(path, base, values, lines, found)


def parse_yaml(text: str) -> Any:
    """The value of a text in YAML, as a value of --set is written.

    Raises:
        yaml.YAMLError: not YAML.
        ValueError: a value that is not what its tag says, or aliases that stand for too many values.
        RecursionError: nested too deeply.
    """
    node = yaml.compose(text, yaml.SafeLoader)
    if node is None:
        return None
    _refuse_multiplied(node)
    return _constructed(text)


def _constructed(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (ArithmeticError, LookupError, TypeError, AttributeError) as error:
        raise ValueError("a value is not what its tag says") from error


def _refuse_multiplied(node: yaml.Node) -> None:
    """Raises ValueError where aliases of aliases stand for more values than anybody writes down."""
    known: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) not in known:
            known[id(node)] = 1  # what it is itself part of counts once
            if isinstance(node, yaml.SequenceNode):
                known[id(node)] += sum(size(item) for item in node.value)
            elif isinstance(node, yaml.MappingNode):
                known[id(node)] += sum(size(part) for pair in node.value for part in pair)
        return known[id(node)]

    if size(node) > MOST_VALUES:
        raise ValueError(f"its aliases stand for more than {MOST_VALUES} values")


def _note_lines(
    node: yaml.Node,
    prefix: str,
    name: str,
    lines: dict[str, int],
    found: list[str],
    above: tuple[yaml.Node, ...] = (),
) -> None:
    """Notes the line of every key, and keys that are given twice: YAML itself would let the last one win."""
    if node in above:
        return  # an alias to what it is part of
    above = (*above, node)
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _note_lines(item, prefix, name, lines, found, above)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        key, line = f"{prefix}{key_node.value}", key_node.start_mark.line + 1
        if key in seen:
            found.append(f"{key}: given twice ({name} lines {seen[key]} and {line})")
        seen[key] = lines[key] = line
        _note_lines(value_node, f"{key}.", name, lines, found, above)


def _reason(error: Exception) -> str:
    """A YAML error in one line."""
    if isinstance(error, yaml.MarkedYAMLError):
        return " ".join(", ".join(part for part in (error.context, error.problem) if part).split())
    if isinstance(error, yaml.reader.ReaderError):
        return f"unacceptable character {error.character!r}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error).splitlines()[0]
