"""`--sweep`: the same training with every combination of values, each a run of its own in a process of its own.

    OUT/sweep.json                      what all runs share, so that a later call goes on with nothing else
    OUT/learning_rate=0.001,depth=4/    run folders, named after what differs

No torch here: while one of the runs trains, nothing else takes its memory.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from operator import attrgetter
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from bitgen_cli.errors import ExitCode, InputError, UsageError
from bitgen_cli.files import explain, read_json, write_json
from bitgen_cli.presets import NOT_VALUES, PREFIX, parse_yaml
from bitgen_cli.report import Report
from bitgen_cli.runs.measurements import METRICS, Series, read_measurements

PRINT, RUN = "print", "run"
MOST_RUNS = 1000
FORMAT = 1
FINISHED, INTERRUPTED, DIVERGED, FAILED, NOT_STARTED = "finished", "interrupted", "diverged", "failed", "not started"
"""What can have become of a run."""

_LONGEST_NAME = 150
_UNSAFE = re.compile(r"[^A-Za-z0-9._+-]+")


@dataclass(frozen=True)
class Combination:
    """One value for every key.

    Attributes:
        values: of the keys that differ, as they were typed; in the order of the command line.
        overrides: `a.b=1` each: these, and what all combinations share.
        name: says what differs; safe as a file name.
    """

    values: dict[str, str]
    overrides: tuple[str, ...]
    name: str


@dataclass(frozen=True)
class SweepOptions:
    """What to run.

    Attributes:
        verb: `train` or `finetune-subject`.
        shared: the words of the command line that all runs share, without --out, --set and --sweep.
        computing: further ones such as `--device cpu` that `resume` takes too, and that change no result.
        overrides: `a.b=1` each; a key that occurs several times is tried with each of its values.
        out: folder of the run folders.
        config_file: its contents must be the same when the sweep goes on; `shared` names it.
        subject: names of the subjects begin so, each run has its own; None for runs without subjects.
    """

    verb: str
    shared: tuple[str, ...]
    computing: tuple[str, ...]
    overrides: tuple[str, ...]
    out: Path
    config_file: Path | None = None
    subject: str | None = None


@dataclass(frozen=True)
class SweepRun:
    """What became of a combination.

    Attributes:
        values: of the keys that differ.
        run: its folder.
        command: that makes it.
        state: FINISHED, INTERRUPTED, DIVERGED, FAILED or NOT_STARTED.
        exit_code: of its process; None where none was started.
        steps: done in all.
        loss, val_loss: the last measured; None where there is none, or it is no number.
        best_val_loss: the lowest.
        val_psnr: the last, in dB, of a tokenizer.
    """

    values: dict[str, str]
    run: Path
    command: str
    state: str = NOT_STARTED
    exit_code: int | None = None
    steps: int = 0
    loss: float | None = None
    val_loss: float | None = None
    best_val_loss: float | None = None
    val_psnr: float | None = None

    def planned_json(self) -> dict[str, Any]:
        """What is known before it is run, as plain JSON values."""
        return {"values": self.values, "run": str(self.run), "command": self.command}


@dataclass(frozen=True)
class SweepResult:
    """What a sweep did.

    Attributes:
        out: its folder.
        runs: of all combinations, in order.
        exit_code: 0, or that of the first run that failed.
    """

    out: Path
    runs: list[SweepRun]
    exit_code: int

    @property
    def best(self) -> SweepRun | None:
        """The finished run of the lowest held-out loss; of the lowest loss where there is no held-out one."""
        finished = [run for run in self.runs if run.state == FINISHED]
        for name in ("best_val_loss", "loss"):
            judged = [run for run in finished if getattr(run, name) is not None]
            if judged:
                return min(judged, key=attrgetter(name))
        return None

    @property
    def heads(self) -> list[str]:
        """Short names of the keys that differ."""
        return list(_short(list(self.runs[0].values)).values())

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON values."""
        best = self.best
        return {
            "out": str(self.out),
            "best": None if best is None else str(best.run),
            "runs": [{**asdict(run), "run": str(run.run)} for run in self.runs],
        }


def combinations(overrides: Sequence[str]) -> list[Combination]:
    """Every combination of the values of keys that occur several times; the last key changes fastest.

    Raises:
        UsageError: no key occurs several times, a value occurs twice, or there are too many combinations.
    """
    by_key: dict[str, list[str]] = {}
    for override in overrides:
        key, _, value = override.partition("=")
        by_key.setdefault(key.strip(), []).append(value)
    swept = {key: values for key, values in by_key.items() if len(values) > 1}
    if not swept:
        raise UsageError(
            "--sweep has nothing to try",
            "give --set a key several times: --set sampling.cfg=2 --set sampling.cfg=3",
        )
    for key, values in swept.items():
        meanings = [_meaning(value) for value in values]
        for place, value in enumerate(values):
            if meanings[place] in meanings[:place]:
                raise UsageError(f"--set {key}={value} is given twice", "--sweep tries each value once")
    count = 1
    for values in swept.values():
        count *= len(values)
    if count > MOST_RUNS:
        raise UsageError(f"--sweep would make {count} runs", f"at most {MOST_RUNS}")
    fixed = [override for override in overrides if override.partition("=")[0].strip() not in swept]
    short = _short(list(swept))
    made = []
    for one_of_each in itertools.product(*swept.values()):
        chosen = dict(zip(swept, one_of_each, strict=True))
        own = [f"{key}={value}" for key, value in chosen.items()]
        name = _file_name([(short[key], value) for key, value in chosen.items()])
        made.append(Combination(chosen, (*fixed, *own), name))
    return made


def plan(options: SweepOptions) -> list[SweepRun]:
    """The run of every combination, none of them started.

    Raises:
        UsageError: as `combinations`.
    """
    return [
        SweepRun(found.values, options.out / found.name, shlex.join(["bitgen", *_words(options, found)]))
        for found in combinations(options.overrides)
    ]


def sweep(options: SweepOptions, report: Report) -> SweepResult:
    """Trains every combination, one after the other; finished ones are left alone, unfinished ones resumed.

    Ctrl-C lets the current one save, and ends the sweep.

    Raises:
        UsageError: as `combinations`; OUT holds another sweep or something else.
        InputError: OUT cannot be read or written.
    """
    planned = plan(options)
    _claim(options, planned)
    found = combinations(options.overrides)
    names = _short(list(planned[0].values))
    ended: list[SweepRun] = []
    with _Child(report) as child:
        for number, (run, combination) in enumerate(zip(planned, found, strict=True), start=1):
            code: int | None = None
            if not child.stopping and _state(run.run).get("finished") is not True:
                told = ", ".join(f"{names[key]}={value}" for key, value in run.values.items())
                report.notice(f"run {number} of {len(planned)}: {told}")
                code = child.run(_next_words(options, combination, run.run), options.out.resolve().name)
            ended.append(_judge(run, code, report))
    codes = [run.exit_code for run in ended if run.exit_code]
    stopped = ExitCode.INTERRUPTED if child.stopping else ExitCode.OK
    return SweepResult(options.out, ended, int(stopped or next(iter(codes), ExitCode.OK)))


def subject_name(token: str) -> str:
    """What the names of a sweep's subjects begin with when none is given: the token's letters."""
    return re.sub("[^a-z0-9_-]", "", token.lower()) or "subject"


# -- names and words ---------------------------------------------------------------------------------------------------


def _meaning(text: str) -> str:
    """A value as its run will read it, told apart from others: 1 is not true."""
    try:
        return repr(parse_yaml(text))
    except (yaml.YAMLError, ValueError, RecursionError):
        return text  # the run will say what is wrong with it


def _short(keys: Sequence[str]) -> dict[str, str]:
    """Keys by their last part, where that names one of them alone."""
    last = {key: key.rpartition(".")[2] for key in keys}
    return {key: key if list(last.values()).count(part) > 1 else part for key, part in last.items()}


def _file_name(parts: Sequence[tuple[str, str]]) -> str:
    """`key=value,...` without what file systems and shells dislike; what is changed gets a mark of its own."""
    exact = ",".join(f"{key}={value}" for key, value in parts)
    safe = ",".join(f"{_UNSAFE.sub('_', key)}={_UNSAFE.sub('_', value)}" for key, value in parts)
    if safe == exact and len(safe) <= _LONGEST_NAME:
        return safe
    mark = hashlib.sha256(exact.encode("utf-8", "backslashreplace")).hexdigest()[:8]
    return f"{safe[:_LONGEST_NAME]}-{mark}"


def _words(options: SweepOptions, combination: Combination) -> list[str]:
    """The command line of a run, without the program."""
    words = [options.verb, *options.shared, *options.computing, "--out", str(options.out / combination.name)]
    if options.subject is not None:
        name = f"{options.subject}-{re.sub('[^A-Za-z0-9._-]', '-', combination.name)}"
        mark = hashlib.sha256(combination.name.encode()).hexdigest()[:8]
        words += ["--name", name if len(name) <= 64 else f"{name[:55]}-{mark}"]
    for override in combination.overrides:
        words += ["--set", override]
    return words


def _next_words(options: SweepOptions, combination: Combination, run: Path) -> list[str]:
    """The command line that begins a run or goes on with it; what was begun and never saved is removed."""
    if _is_saved(run):
        return ["resume", str(run), *options.computing]
    if run.is_dir():
        shutil.rmtree(run)
    return _words(options, combination)


# -- folders -----------------------------------------------------------------------------------------------------------


def _claim(options: SweepOptions, planned: Sequence[SweepRun]) -> None:
    """Writes sweep.json into a new or empty folder, or finds the same one there.

    Raises:
        UsageError: there is another sweep, or something else.
        InputError: it cannot be read or written.
    """
    out, file = options.out, options.out / "sweep.json"
    description = {
        "format": FORMAT,
        "verb": options.verb,
        "words": list(options.shared),
        "overrides": _fixed(options.overrides),
        "config": None if options.config_file is None else _digest(options.config_file),
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(PREFIX) and name not in NOT_VALUES and value.strip()
        },
    }
    if file.is_file():
        if read_json(file) != description:
            raise UsageError(f"{out} holds a sweep with other options, see {file}", "choose another --out")
    elif out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UsageError(f"{out} is not empty and holds no sweep", "choose another --out")
    else:
        write_json(file, description)
    for run in planned:
        if run.run.is_file() or (not (run.run / "config.json").is_file() and any(_files(run.run))):
            raise UsageError(f"{run.run} holds no run", "remove it, or choose another --out")


def _fixed(overrides: Sequence[str]) -> list[str]:
    """Those whose key occurs once, in a fixed order."""
    keys = [override.partition("=")[0].strip() for override in overrides]
    return sorted(override for key, override in zip(keys, overrides, strict=True) if keys.count(key) == 1)


def _digest(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise explain(error, file, "read") from error


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def _state(run: Path) -> dict[str, Any]:
    """What a run's state.json says; nothing where there is none yet, or a damaged one."""
    try:
        state = read_json(run / "state.json")
    except InputError:
        return {}
    return state if isinstance(state, dict) else {}


def _is_saved(run: Path) -> bool:
    """Whether there is something to resume."""
    return any((run / "checkpoints").glob("step-*"))


def _judge(run: SweepRun, code: int | None, report: Report) -> SweepRun:
    """What became of a run, and what it reached."""
    state = _state(run.run)
    if code is None:
        became = FINISHED if state.get("finished") is True else INTERRUPTED if _is_saved(run.run) else NOT_STARTED
    else:
        known: dict[int, str] = {ExitCode.OK: FINISHED, ExitCode.DIVERGED: DIVERGED, ExitCode.INTERRUPTED: INTERRUPTED}
        became = INTERRUPTED if code in (128 + signal.SIGINT, 128 + signal.SIGTERM) else known.get(code, FAILED)
    measured: dict[str, Series] = {}
    if (run.run / METRICS).is_file():
        try:
            measured = read_measurements(run.run)
        except InputError as error:
            report.warning(str(error))

    def last(name: str) -> float | None:
        value = measured[name].values[-1] if name in measured else math.nan
        return value if math.isfinite(value) else None

    steps = state.get("step")
    held_out = [value for value in measured.get("val_loss", Series()).values if math.isfinite(value)]
    return replace(
        run,
        state=became,
        exit_code=code,
        steps=steps if isinstance(steps, int) else 0,
        loss=last("loss"),
        val_loss=last("val_loss"),
        best_val_loss=min(held_out, default=None),
        val_psnr=last("val_psnr"),
    )


# -- processes ---------------------------------------------------------------------------------------------------------


class _Child:
    """Runs commands one after the other, each in a process of its own; as a context, it takes care of signals.

    Ctrl-C reaches the running process from the terminal, which saves and ends; SIGTERM is passed on to it. After
    either, no further process should be started.

    Attributes:
        stopping: whether the user asked to stop.
    """

    def __init__(self, report: Report) -> None:
        self.stopping = False
        self._report = report
        self._process: subprocess.Popen[bytes] | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Child:
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        except ValueError:
            pass  # not the main thread: signals are somebody else's
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run(self, words: Sequence[str], group: str) -> int:
        """The exit code of one command of bitgen; what it says is shown, its result is read from its folder.

        Args:
            words: the command line without the program.
            group: W&B shows runs of it together, where nothing else was asked for.
        """
        environment = {"WANDB_RUN_GROUP": group, **os.environ}
        with subprocess.Popen(
            [sys.executable, "-m", "bitgen_cli", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=environment,
        ) as self._process:
            code = self._process.wait()
        self._process = None
        code = 128 - code if code < 0 else code
        self.stopping = self.stopping or code == ExitCode.INTERRUPTED
        return code

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.stopping = True
        if number == signal.SIGTERM and self._process is not None:
            self._process.send_signal(number)
