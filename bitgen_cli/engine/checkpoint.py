"""The run folder of a training: its configuration, measurements and checkpoints, so that nothing is lost.

    config.json                what runs: verb, stage, data, resolved configuration, origins
    state.json                 how far it is, for people and tools; the checkpoints themselves are what counts
    metrics.jsonl              one JSON object a line
    start/                     what the training needs of the model it began with
    samples/                   picture grids
    checkpoints/step-0000500/  weights, averaged weights, optimizer; state.json is written last
    best/                      the checkpoint of the lowest validation loss
    model/                     the model folder the run leaves; subject.safetensors where it learns a subject

A checkpoint is written under a temporary name and renamed when it is whole; its state.json lists its files
and their sizes. What does not match that list is half written and never used. Where several ranks hold parts of every
tensor, each writes its own part (engine/sharded.py); any number of ranks can go on from it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bitgen_cli.engine import sharded
from bitgen_cli.engine.parallel import Ranks, fill
from bitgen_cli.engine.tensors import save_tensors
from bitgen_cli.errors import InputError, ResourceError, UsageError
from bitgen_cli.files import (
    PARTIAL,
    atomic_folder,
    atomic_path,
    explain,
    finish_folder,
    only_writer,
    read_json,
    write_json,
)
from bitgen_cli.report import MetricsLog, Report

FORMAT = 1
_STEP = re.compile(r"^step-(\d+)$")


@dataclass(frozen=True)
class Checkpoint:
    """Everything a training continues from.

    Attributes:
        step: steps done.
        tensors: by part, `weights`, `optimizer`, and `ema` when averages are kept; names to tensors.
        state: plain values, JSON.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]

    @property
    def bytes(self) -> int:
        """What the tensors take on disk; of shared ones, what this rank holds."""
        return sum(sharded.held_bytes(tensor) for part in self.tensors.values() for tensor in part.values())


@dataclass(frozen=True)
class SavedCheckpoint:
    """A whole checkpoint on disk; its tensors are read when they are asked for.

    Attributes:
        folder: where it is.
        step: steps done.
        state: plain values.
        sharded: whether ranks wrote a part each.
    """

    folder: Path
    step: int
    state: dict[str, Any]
    sharded: bool

    def shapes(self, part: str) -> dict[str, torch.Size]:
        """Names and shapes of a part's tensors; empty when the checkpoint does not have it.

        Raises:
            InputError: the files are damaged.
        """
        if self.sharded:
            return sharded.shapes(self.folder, part)
        if not (self.folder / f"{part}.safetensors").is_file():
            return {}
        with self._opened(part) as stored:
            return {name: torch.Size(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118

    def read(self, into: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Fills tensors, by part and name, of the shapes that `shapes` tells; shared ones get their rank's part.

        Raises:
            InputError: the files are damaged.
        """
        if self.sharded:
            sharded.read(self.folder, into)
            return
        for part, tensors in into.items():
            if tensors:
                with self._opened(part) as stored:
                    for name, tensor in tensors.items():
                        fill(tensor, stored.get_tensor(name))

    @contextmanager
    def _opened(self, part: str) -> Iterator[Any]:
        file = self.folder / f"{part}.safetensors"
        try:
            with safe_open(str(file), framework="pt") as stored:
                yield stored
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} is damaged: {error}") from error


class RunFolder:
    """One training's folder.

    Args:
        path: of the run.

    Attributes:
        listeners: are told the measurements and picture grids too.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.listeners: list[MetricsLog] = []

    @property
    def model(self) -> Path:
        """The model folder the run leaves."""
        return self.path / "model"

    @property
    def subject(self) -> Path:
        """The subject file the run leaves."""
        return self.path / "subject.safetensors"

    @property
    def best_subject(self) -> Path:
        """The subject file as it was at the best checkpoint."""
        return self.path / "best" / "subject.safetensors"

    @property
    def start(self) -> Path:
        """What the training needs of the model it began with."""
        return self.path / "start"

    @property
    def samples(self) -> Path:
        """Picture grids drawn while training."""
        return self.path / "samples"

    @property
    def metrics(self) -> Path:
        """The measurements, one JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def _checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def refuse_used(self) -> None:
        """Raises UsageError when there is a run here already, or other files."""
        if (self.path / "config.json").exists():
            if not self.steps():
                raise UsageError(f"{self.path} holds a run that had not saved anything yet", "remove it and try again")
            raise UsageError(f"{self.path} already holds a run", f"`bitgen resume {self.path}` continues it")
        if self.path.is_file():
            raise UsageError(f"{self.path} is a file", "choose a new folder for the run")
        if self.path.is_dir() and any(self.path.iterdir()):
            raise UsageError(f"{self.path} is not empty", "choose a new folder for the run")

    def refuse_finished(self, steps: int) -> None:
        """Raises UsageError when all that many steps are done, and everything that follows the last one too."""
        done = max(self.steps(), default=0)
        if done >= steps and self.state().get("finished"):
            raise UsageError(f"{self.path} is finished: {done} of {steps} steps", "--steps N trains N more")

    def create(self, description: dict[str, Any]) -> None:
        """Makes the folder and writes config.json.

        Raises:
            UsageError: it holds a run already, or other files.
            InputError: not allowed to write there.
            ResourceError: no space left.
        """
        self.refuse_used()
        try:
            self.samples.mkdir(parents=True)
            self._checkpoints.mkdir()
        except OSError as error:
            raise explain(error, self.path, "create") from error
        self.describe(description)

    def describe(self, description: dict[str, Any]) -> None:
        """Writes config.json; never while the run is trained.

        Raises:
            InputError: another process trains it.
        """
        with only_writer(self.path):
            write_json(self.path / "config.json", {"format": FORMAT, **description})

    def description(self) -> dict[str, Any]:
        """What config.json says.

        Raises:
            InputError: there is no run here, or its config.json is broken.
        """
        if not self.path.is_dir():
            raise InputError(f"no run at {self.path}: the folder does not exist")
        file = self.path / "config.json"
        if not file.is_file():
            raise InputError(f"{self.path} holds no run: config.json is missing")
        stored = read_json(file)
        if not isinstance(stored, dict) or "verb" not in stored:
            raise InputError(f"{file} does not describe a run")
        if stored.pop("format", None) != FORMAT:
            raise InputError(f"{file} is of another format, this bitgen reads {FORMAT}")
        return stored

    def steps(self) -> list[int]:
        """Steps of the checkpoints, oldest first."""
        if not self._checkpoints.is_dir():
            return []
        found = (_STEP.match(folder.name) for folder in self._checkpoints.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def save(self, checkpoint: Checkpoint, keep_last: int, keep_every: int = 0) -> Path:
        """Writes a checkpoint whole or not at all, then removes the oldest beyond `keep_last`.

        Args:
            checkpoint: what is written.
            keep_last: how many are kept.
            keep_every: those of a step that this divides are kept besides; 0 is none.

        Returns:
            Its folder.

        Raises:
            ResourceError: not enough space; the older checkpoints are as they were.
            InputError: not allowed to write there.
        """
        self._require_space(checkpoint.bytes)
        folder = self.checkpoint(checkpoint.step)
        with atomic_folder(folder) as temporary:
            for part, tensors in checkpoint.tensors.items():
                save_tensors(tensors, temporary / f"{part}.safetensors")
            _mark_whole(temporary, checkpoint, shared=False)
        self._prune(checkpoint.step, keep_last, keep_every)
        return folder

    def begin_shared(self, checkpoint: Checkpoint, ranks: Ranks) -> sharded.Writing:
        """Begins to write a checkpoint of which each rank holds a part; `finish_shared` ends it.

        All ranks must call this; training may go on meanwhile.

        Raises:
            ResourceError: not enough space; the older checkpoints are as they were.
        """
        if ranks.first:
            self._require_space(checkpoint.bytes * ranks.count)
            shutil.rmtree(self._unfinished(checkpoint.step), ignore_errors=True)
        ranks.wait()
        return sharded.begin(checkpoint.tensors, self._unfinished(checkpoint.step), ranks.writers)

    def finish_shared(self, checkpoint: Checkpoint, keep_last: int, keep_every: int = 0) -> Path:
        """Marks what all ranks have written as whole; for the first rank alone. Returns its folder."""
        folder, unfinished = self.checkpoint(checkpoint.step), self._unfinished(checkpoint.step)
        try:
            _mark_whole(unfinished, checkpoint, shared=True)
            finish_folder(unfinished, folder)
        except OSError as error:
            raise explain(error, folder, "write") from error
        self._prune(checkpoint.step, keep_last, keep_every)
        return folder

    def save_best(self, folder: Path) -> None:
        """Makes a checkpoint the best one; its files are linked where the file system can, else copied."""
        with atomic_folder(self.path / "best") as temporary:
            for file in folder.iterdir():
                try:
                    os.link(file, temporary / file.name)
                except OSError:
                    shutil.copyfile(file, temporary / file.name)

    def load_last(self, report: Report, *, clean: bool = True) -> SavedCheckpoint:
        """The newest whole checkpoint; half-written newer ones are named in a notice and left out.

        Args:
            report: hears of what is left out.
            clean: also remove what was never finished; of several ranks only one may.

        Raises:
            InputError: there is none: a run is never started afresh instead.
        """
        for leftover in list(self.path.rglob(f".*{PARTIAL}")) if clean else ():
            report.notice(f"{leftover.name} was never finished; removed")
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
        for step in reversed(self.steps()):
            try:
                return _open(self.checkpoint(step))
            except InputError as error:
                report.warning(f"checkpoint {self.checkpoint(step).name} is left out: {error.message}")
        raise InputError(
            f"{self.path} holds no whole checkpoint to continue from", "remove it and train again"
        )

    def log(self, values: Mapping[str, float]) -> None:
        """Appends a line to metrics.jsonl, six significant digits a number, and tells the listeners.

        Raises:
            ResourceError: no space left.
        """
        rounded = {
            name: value if isinstance(value, int) else float(f"{value:.6g}") for name, value in values.items()
        }
        try:
            with self.metrics.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(rounded) + "\n")
        except OSError as error:
            raise explain(error, self.metrics, "write") from error
        measured = {name: value for name, value in values.items() if name != "step"}
        for listener in self.listeners:
            listener.scalars(int(values["step"]), measured)

    def show(self, step: int, file: Path) -> None:
        """Tells the listeners of a picture grid."""
        for listener in self.listeners:
            listener.picture(step, file)

    def cut_log(self, step: int) -> int:
        """Removes the lines of metrics.jsonl behind a step: a resumed run writes them again.

        Returns:
            The last step that was there; `step` where that is none behind it.
        """
        if not self.metrics.is_file():
            return step
        kept, last = [], step
        for line in self.metrics.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                measured = json.loads(line)["step"]
                if measured <= step:
                    kept.append(line + "\n")
                last = max(last, measured)
            except (ValueError, KeyError, TypeError, RecursionError):
                continue  # a line cut off in the middle of being written
        with atomic_path(self.metrics) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")
        return last

    def write_state(self, state: Mapping[str, Any]) -> None:
        """Writes state.json."""
        write_json(self.path / "state.json", dict(state))

    def state(self) -> dict[str, Any]:
        """What state.json says; empty before the first checkpoint.

        Raises:
            InputError: it cannot be read.
        """
        file = self.path / "state.json"
        stored = read_json(file) if file.is_file() else {}
        return stored if isinstance(stored, dict) else {}

    def _prune(self, step: int, keep_last: int, keep_every: int) -> None:
        # only older ones: a damaged newer one must not push out what is whole
        older = [known for known in self.steps() if known <= step]
        for known in older[:-keep_last]:
            if not (keep_every and known % keep_every == 0):
                shutil.rmtree(self.checkpoint(known), ignore_errors=True)

    def _require_space(self, needed: int) -> None:
        free = shutil.disk_usage(self._checkpoints).free
        if free < needed:
            raise ResourceError(
                f"a checkpoint of {needed / 2**30:.2f} GiB does not fit into the {free / 2**30:.2f} GiB that are free "
                f"in {self.path}",
                "free some space; the older checkpoints are as they were",
            )

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint after that step."""
        return self._checkpoints / f"step-{step:07d}"

    def _unfinished(self, step: int) -> Path:
        return self._checkpoints / f".step-{step:07d}{PARTIAL}"


def _mark_whole(folder: Path, checkpoint: Checkpoint, *, shared: bool) -> None:
    """Writes what makes a folder a checkpoint: the list of its files."""
    sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    marked = {"format": FORMAT, "step": checkpoint.step, "sharded": shared, "files": sizes, "state": checkpoint.state}
    write_json(folder / "state.json", marked)


def _open(folder: Path) -> SavedCheckpoint:
    """A whole checkpoint.

    Raises:
        InputError: half written or damaged.
    """
    stored = read_json(folder / "state.json")
    try:
        step, sizes, state = int(stored["step"]), dict(stored["files"]), dict(stored["state"])
        found = SavedCheckpoint(folder, step, state, bool(stored.get("sharded", False)))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder / 'state.json'} does not describe a checkpoint") from error
    for name, size in sizes.items():
        file = folder / name
        try:
            whole = file.is_file() and file.stat().st_size == size
        except (OSError, ValueError):  # a name that no file can have
            whole = False
        if not whole:
            raise InputError(f"{file} is half written or missing")
    if not found.sharded:
        for name in sizes:
            found.shapes(Path(name).stem)  # reads the header of each
    return found
