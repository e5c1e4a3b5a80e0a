"""The run folder: nothing half written is used, nothing whole is lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from bitgen_cli.engine import tensors as tensors_module
from bitgen_cli.engine.checkpoint import Checkpoint, RunFolder
from bitgen_cli.engine.tensors import save_tensors
from bitgen_cli.errors import ExitCode, InputError, ResourceError, UsageError
from bitgen_cli.report import Silent


def state_at(step: int) -> Checkpoint:
    tensors = {
        "weights": {"a.b": torch.full((3, 2), float(step))},
        "optimizer": {"a.b/step": torch.tensor(float(step))},
    }
    return Checkpoint(step, tensors, {"best": 0.5})


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.create({"verb": "train", "stage": "tokenizer"})
    return folder


def test_what_is_saved_is_what_is_loaded(run: RunFolder) -> None:
    run.save(state_at(5), keep_last=2)
    loaded = run.load_last(Silent())
    assert (loaded.step, loaded.state) == (5, {"best": 0.5})
    assert loaded.shapes("weights") == {"a.b": (3, 2)}
    assert loaded.shapes("ema") == {}
    into = {"weights": {"a.b": torch.zeros(3, 2)}, "optimizer": {"a.b/step": torch.zeros(())}}
    loaded.read(into)
    assert torch.equal(into["weights"]["a.b"], torch.full((3, 2), 5.0))
    assert into["optimizer"]["a.b/step"] == 5.0


def test_keeps_the_last_and_the_best(run: RunFolder) -> None:
    for step in (1, 2, 3, 4):
        folder = run.save(state_at(step), keep_last=2)
        if step == 1:
            run.save_best(folder)
    assert run.steps() == [3, 4]
    best = json.loads((run.path / "best" / "state.json").read_text())
    assert best["step"] == 1
    assert (run.path / "best" / "weights.safetensors").stat().st_size > 0


def test_keeps_those_of_every_so_many_steps(run: RunFolder) -> None:
    for step in range(1, 10):
        run.save(state_at(step), keep_last=2, keep_every=3)
    assert run.steps() == [3, 6, 8, 9]


def test_a_checkpoint_that_does_not_fit_is_not_begun(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    run.save(state_at(1), keep_last=1)
    free = namedtuple("free", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free(100, 80, state_at(2).bytes - 1))
    with pytest.raises(ResourceError, match="does not fit") as caught:
        run.save(state_at(2), keep_last=1)
    assert caught.value.exit_code == ExitCode.RESOURCES
    assert run.steps() == [1]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free(100, 80, state_at(2).bytes))
    run.save(state_at(2), keep_last=1)
    assert run.steps() == [2]


def test_half_written_checkpoints_are_left_out_with_a_notice(run: RunFolder) -> None:
    run.save(state_at(1), keep_last=3)
    folder = run.save(state_at(2), keep_last=3)
    weights = folder / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    unfinished = run.path / "checkpoints" / ".step-0000003.77.partial"
    unfinished.mkdir()
    (unfinished / "weights.safetensors").write_bytes(b"abc")
    report = Silent()
    assert run.load_last(report).step == 1
    assert any("step-0000002" in notice for notice in report.notices)
    assert any("step-0000003" in notice for notice in report.notices)
    assert not unfinished.exists()


def test_a_damaged_newer_checkpoint_does_not_push_out_whole_ones(run: RunFolder) -> None:
    run.save(state_at(1), keep_last=1)
    (run.save(state_at(9), keep_last=2) / "state.json").unlink()
    run.save(state_at(2), keep_last=1)
    assert run.load_last(Silent()).step == 2


def test_without_a_whole_checkpoint_nothing_is_started_afresh(run: RunFolder) -> None:
    with pytest.raises(InputError, match="no whole checkpoint"):
        run.load_last(Silent())


@pytest.mark.parametrize("failing", ["safetensors", "python"])
def test_a_full_disk_leaves_the_older_checkpoint(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    run.save(state_at(1), keep_last=1)

    def full(*args: object, **kwargs: object) -> None:
        if failing == "safetensors":
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tensors_module, "save_file", full)
    with pytest.raises(ResourceError, match="no space left") as caught:
        run.save(state_at(2), keep_last=1)
    assert caught.value.exit_code == ExitCode.RESOURCES
    assert run.load_last(Silent()).step == 1
    assert [folder.name for folder in (run.path / "checkpoints").iterdir()] == ["step-0000001"]


def test_a_failing_safetensors_names_the_cause(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file") as caught:
        save_tensors({"a": torch.zeros(1)}, tmp_path / "missing" / "a.safetensors")
    assert caught.value.errno == errno.ENOENT


def test_an_old_run_is_never_overwritten(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"had not saved anything yet.*remove it"):
        RunFolder(run.path).create({"verb": "train"})
    run.save(state_at(1), keep_last=1)
    with pytest.raises(UsageError, match=r"already holds a run.*bitgen resume"):
        RunFolder(run.path).create({"verb": "train"})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UsageError, match="not empty"):
        RunFolder(tmp_path / "mine").create({"verb": "train"})


def test_no_run_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        RunFolder(tmp_path / "absent").description()
    with pytest.raises(InputError, match=r"config\.json is missing"):
        RunFolder(tmp_path).description()


def test_lines_behind_a_step_and_cut_lines_leave_the_log(run: RunFolder) -> None:
    for step in (1, 2, 3):
        run.log({"step": step, "loss": 1 / 3})
    with run.metrics.open("a") as stream:
        stream.write('{"step": 2, "lo')
    run.cut_log(2)
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 0.333333}, {"step": 2, "loss": 0.333333}]
