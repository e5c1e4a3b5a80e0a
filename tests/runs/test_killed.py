"""A training that is killed with -9 again and again ends where one that was left alone does, bit for bit."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from safetensors.torch import load_file
from tiny_training import World, options_for

from bitgen_cli import files
from bitgen_cli.engine.checkpoint import RunFolder
from bitgen_cli.engine.pictures import Pictures, Unreadable
from bitgen_cli.engine.sources import open_source
from bitgen_cli.errors import InputError
from bitgen_cli.presets import resolve
from bitgen_cli.report import Silent
from bitgen_cli.runs.resume import resume
from bitgen_cli.runs.train import train

KILLS = 20
RECIPE: dict[str, Any] = {
    "steps": 60,
    "save_every": 3,
    "validate_every": 7,
    "sample_every": 0,
    "keep_every": 20,
    "log_every": 1,
    "validation_images": 4,
}
"""A checkpoint every few steps: a process that is killed after a second has got somewhere."""


def train_or_resume(stage: str, world: World, run: Path, changes: dict[str, Any], slow: bool) -> None:
    """What a user types after a crash; `slow` makes writing take long enough to be killed in the middle of it."""
    if slow:
        flush = os.fsync

        def slowly(descriptor: int) -> None:
            time.sleep(0.02)
            flush(descriptor)

        files.os.fsync = slowly  # type: ignore[assignment]
    if RunFolder(run).steps():
        resume(run, Silent(), device="cpu")
        return
    if run.exists():
        shutil.rmtree(run)
    train(options_for(stage, world, run, **{**RECIPE, **changes}), Silent())


def results(run: Path) -> dict[str, Any]:
    """Everything a run leaves, but for how fast it was."""
    found: dict[str, Any] = {}
    for file in sorted(run.rglob("*")):
        name = file.relative_to(run).as_posix()
        if file.suffix == ".safetensors":
            found |= {f"{name}: {key}": tensor for key, tensor in load_file(file).items()}
        elif file.name == "metrics.jsonl":
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            found[name] = [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]
        elif file.is_file() and name != "config.json":
            found[name] = file.read_bytes()
    return found


def require_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        same = torch.equal(value, theirs[name]) if isinstance(value, torch.Tensor) else value == theirs[name]
        assert same, name


def lines(run: Path) -> int:
    """Measurements written so far."""
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.is_file() else 0


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("transformer", {"precision": "fp16", "accumulation": 2}),
        ("tokenizer", {"precision": "fp32", "accumulation": 1, "workers": 1, "steps": 24}),
    ],
)
def test_killed_at_random_moments(world: World, tmp_path: Path, stage: str, changes: dict[str, Any]) -> None:
    """Mid-epoch and in saves, with accumulation, averages, fp16, flips, dropout, and workers that read."""
    processes.finish([processes.start(train_or_resume, stage, world, tmp_path / "straight", changes, False)])
    rng = random.Random(0)
    run, reached = tmp_path / "killed", []
    for kill in range(KILLS if stage == "transformer" else KILLS // 4):
        process = processes.start(train_or_resume, stage, world, run, changes, True)
        written, wanted = lines(run), rng.randrange(10)
        while process.is_alive():
            # every other kill falls into a save
            if kill % 2 and any(run.rglob("*.partial")):
                break
            if kill % 2 == 0 and lines(run) >= written + wanted:
                break
            time.sleep(0.002)
        time.sleep(rng.uniform(0.0, 0.1))
        if process.is_alive():
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        reached.append(max(RunFolder(run).steps(), default=0))
        if process.exitcode == 0:
            break
    assert len(set(reached)) > 2, f"killed too early to have shown anything: {reached}"
    if not RunFolder(run).state().get("finished"):
        processes.finish([processes.start(train_or_resume, stage, world, run, changes, False)])
    require_same(results(run), results(tmp_path / "straight"))


def read_for_ever(folder: Path, data: str) -> None:
    model, unreadable = resolve("demo", environment={}).config.model, Unreadable(10, Silent())
    pictures = Pictures(open_source(data, 64), model, aspects=(), workers=1, room=0, unreadable=unreadable)
    pictures.ahead([0])
    pictures.read(0)
    (reader,) = (child.pid for child in multiprocessing.active_children())
    files.write_text(folder / "reader", str(reader))
    time.sleep(300)


def test_readers_end_with_the_training_they_read_for(tmp_path: Path) -> None:
    process = processes.start(read_for_ever, tmp_path, "world:10")
    while not (tmp_path / "reader").is_file():
        assert process.is_alive()
        time.sleep(0.05)
    reader = int((tmp_path / "reader").read_text())
    process.kill()
    process.join()
    until = time.monotonic() + 30
    while alive(reader):
        assert time.monotonic() < until, "the reader outlives its training"
        time.sleep(0.05)


def hold(run: Path) -> None:
    with files.only_writer(run):
        files.write_text(run / "held", "")
        time.sleep(300)


def test_a_run_is_trained_by_one_process_at_a_time(world: World, tmp_path: Path) -> None:
    train(options_for("transformer", world, tmp_path / "run", **{**RECIPE, "steps": 2}), Silent())
    process = processes.start(hold, tmp_path / "run")
    while not (tmp_path / "run" / "held").is_file():
        assert process.is_alive()
        time.sleep(0.05)
    before, described = results(tmp_path / "run"), (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(InputError, match="another process is writing"):
        resume(tmp_path / "run", Silent(), steps=2, device="cpu")
    require_same(results(tmp_path / "run"), before)
    assert (tmp_path / "run" / "config.json").read_bytes() == described
    process.kill()
    process.join()
    assert resume(tmp_path / "run", Silent(), steps=2, device="cpu").steps == 4


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_killed_between_a_checkpoint_and_what_follows_it(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last checkpoint is whole, but the model and the best one are not there yet: resuming makes them."""
    changes = {**RECIPE, "steps": 4, "validate_every": 4}
    train(options_for("transformer", world, tmp_path / "straight", **changes), Silent())

    class Killed(BaseException):
        pass

    def killed(self: RunFolder, folder: Path) -> None:
        raise Killed

    monkeypatch.setattr(RunFolder, "save_best", killed)
    with pytest.raises(Killed):
        train(options_for("transformer", world, tmp_path / "run", **changes), Silent())
    monkeypatch.undo()
    assert not (tmp_path / "run" / "best").exists()
    resume(tmp_path / "run", Silent(), device="cpu")
    require_same(results(tmp_path / "run"), results(tmp_path / "straight"))


def test_nothing_saved_is_an_error_and_no_fresh_start(world: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(options_for("transformer", world, run, steps=2, sample_every=0), Silent())
    for folder in (run / "checkpoints").iterdir():
        (folder / "weights.safetensors").write_bytes(b"")
    (run / "state.json").unlink()
    with pytest.raises(InputError, match="no whole checkpoint"):
        resume(run, Silent(), device="cpu")
