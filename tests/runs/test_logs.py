"""Logs besides metrics.jsonl: what TensorBoard and W&B find, also after a crash, and what happens when they fail."""

from __future__ import annotations

import builtins
import json
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bitgen_cli.__main__ import main
from bitgen_cli.engine.checkpoint import RunFolder
from bitgen_cli.errors import Interrupted, UsageError
from bitgen_cli.presets import resolve
from bitgen_cli.report import Silent
from bitgen_cli.runs import logs
from bitgen_cli.runs.logs import add_logs, logged, plan_logs


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """W&B on this disk alone, with nobody's settings."""
    for name in ("WANDB_PROJECT", "WANDB_ENTITY", "WANDB_DIR", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb-home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_MODE", "offline")


def run_folder(path: Path, *names: str) -> RunFolder:
    resolved = resolve("demo", environment={}, overrides=["sampling.tau=2"])
    run = RunFolder(path)
    run.create(
        {
            "verb": "train",
            "stage": "tokenizer",
            "logs": plan_logs(names),
            "config": resolved.config.model_dump(mode="json"),
            "origins": resolved.origins,
        }
    )
    return run


def measure(run: RunFolder, steps: range, offset: float = 0.0) -> None:
    """What a trainer does at every step; at even ones it validates too and draws a picture."""
    for step in steps:
        run.log({"step": step, "loss": step + offset, "loss/0": 0.5, "bit_accuracy/0": 0.75})
        if step % 2 == 0:
            run.log({"step": step, "val_loss": step + 100 + offset})
            picture = run.samples / f"step-{step:07d}.png"
            Image.new("RGB", (6, 4), (step, 0, 0)).save(picture)
            run.show(step, picture)


def crash_and_resume(run: RunFolder) -> Silent:
    """Five steps, of which the last checkpoint knows three; then the rest of seven."""
    report = Silent()
    with suppress(RuntimeError), logged(run, report, 0, 0):
        measure(run, range(1, 6))
        raise RuntimeError("killed")
    time.sleep(1.1)  # W&B names its folders by the second
    heard = run.cut_log(3)
    assert heard == 5
    with logged(run, report, 3, heard):
        measure(run, range(4, 8), offset=0.25)
    return report


def test_tensorboard_finds_every_step_once_with_pictures_and_the_configuration(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = run_folder(tmp_path / "run", "tensorboard")
    crash_and_resume(run)
    found = EventAccumulator(str(run.path / "tensorboard"))
    found.Reload()
    assert set(found.Tags()["scalars"]) == {"loss", "loss/0", "bit_accuracy/0", "val_loss"}
    losses = [(event.step, event.value) for event in found.Scalars("loss")]
    assert losses == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.25), (5, 5.25), (6, 6.25), (7, 7.25)]
    assert [event.step for event in found.Scalars("val_loss")] == [2, 4, 6]
    pictures = found.Images("samples")
    assert [(picture.step, picture.width, picture.height) for picture in pictures] == [(2, 6, 4), (4, 6, 4), (6, 6, 4)]
    assert pictures[0].encoded_image_string.startswith(b"\x89PNG")
    text = found.Tensors("configuration/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "| sampling.tau | `2.0` | --set |" in text
    assert "| model.tokenizer.bits | `16` | preset demo |" in text
    described = found.Tensors("run/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "| stage | `tokenizer` |" in described


def records(file: Path) -> Iterator[Any]:
    """The records of an offline W&B run: blocks of 32 KiB with pieces of records, as in LevelDB's logs."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def ended(folder: Path) -> list[Any]:
    """All records of a run that has ended; the process that writes them takes a moment more."""
    for _ in range(100):
        found = [record for file in folder.glob("*.wandb") for record in records(file)]
        if found and found[-1].HasField("exit"):
            return found
        time.sleep(0.1)
    raise AssertionError(f"{folder} is not whole")


def test_wandb_finds_every_step_once_with_pictures_and_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "dogs")
    run = run_folder(tmp_path / "run", "wandb")
    monkeypatch.delenv("WANDB_PROJECT")
    report = crash_and_resume(run)
    folders = sorted((run.path / "wandb").glob("offline-run-*"))
    assert report.notices == [f"`wandb sync {folder}` uploads the measurements" for folder in folders]
    found = [ended(folder) for folder in folders]
    runs = [record.run for part in found for record in part if record.HasField("run")]
    plan = run.description()["logs"]["wandb"]
    assert {(each.run_id, each.project, each.display_name) for each in runs} == {(plan["id"], "dogs", "run")}
    history = []
    for record in (record for part in found for record in part if record.HasField("history")):
        items = record.history.item
        history.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    # steps 4 and 5 had been told before the crash
    assert [row["_step"] for row in history] == [1, 2, 3, 4, 5, 6, 7]
    assert [row["loss"] for row in history] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.25, 7.25]
    assert [row.get("val_loss") for row in history] == [None, 102.0, None, 104.0, None, 106.25, None]
    assert history[0]["loss/0"] == 0.5
    pictures = [row for row in history if "samples/path" in row or "samples" in row]
    assert [row["_step"] for row in pictures] == [2, 4, 6]
    assert len(list((run.path / "wandb").glob("offline-run-*/files/media/images/*.png"))) == 3
    updates = [record.config.update for part in found for record in part if record.HasField("config")]
    config = {update.key: update.value_json for each in updates for update in each}
    assert json.loads(config["sampling"])["tau"] == 2.0
    assert json.loads(config["origins"])["sampling.tau"] == "--set"
    assert json.loads(config["stage"]) == "tokenizer"
    ends = [record.exit.exit_code for part in found for record in part if record.HasField("exit")]
    assert ends == [1, 0]


def test_a_run_that_the_user_stopped_has_not_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []

    class Listens(logs._TensorBoard):
        def close(self, *, failed: bool) -> None:
            closed.append(failed)
            super().close(failed=failed)

    monkeypatch.setattr(logs, "_TensorBoard", Listens)
    run = run_folder(tmp_path / "run", "tensorboard")
    for error in (Interrupted("stopped"), ValueError("broken")):
        with pytest.raises(type(error)), logged(run, Silent(), 0, 0):
            raise error
    assert closed == [False, True]
    assert run.listeners == []


def test_a_log_that_cannot_be_opened_is_left_out(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", "tensorboard")
    (run.path / "tensorboard").write_text("a file where the folder should be")
    report = Silent()
    with logged(run, report, 0, 0):
        measure(run, range(1, 4))
    assert len(report.notices) == 1
    assert report.notices[0].startswith("tensorboard is left out from here on: ")
    assert len(run.metrics.read_text().splitlines()) == 4


@pytest.mark.parametrize("method", ["configuration", "scalars", "picture", "close"])
def test_a_log_that_fails_is_left_out_with_one_warning(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **named: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(logs._TensorBoard, method, full)
    run = run_folder(tmp_path / "run", "tensorboard")
    report = Silent()
    with logged(run, report, 0, 0):
        measure(run, range(1, 5))
    told = [notice for notice in report.notices if "left out" in notice]
    assert told == ["tensorboard is left out from here on: [Errno 28] No space left on device"]
    assert len(run.metrics.read_text().splitlines()) == 6


def test_a_remembered_log_without_its_package_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_folder(tmp_path / "run", "tensorboard")
    real = builtins.__import__

    def missing(name: str, *arguments: Any, **named: Any) -> Any:
        if name == "torch.utils.tensorboard":
            raise ModuleNotFoundError("No module named 'tensorboard'")
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", missing)
    report = Silent()
    with logged(run, report, 2, 2):
        measure(run, range(3, 4))
    assert report.notices == ["tensorboard is left out from here on: No module named 'tensorboard'"]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_told_with_what_installs_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logs, "find_spec", lambda wanted: None)
    command = ["train", "--preset", "demo", "--data", "world:20", "--out", str(tmp_path / "run"), "--log", name]
    assert main(command) == 2
    assert capsys.readouterr().err == (
        f'error: --log {name} needs the package {name} (pip install "bitgen[{name}]")\n'
    )
    assert not (tmp_path / "run").exists()


def test_a_folder_called_wandb_is_not_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "not_a_package").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not logs._installed("not_a_package")
    assert logs._installed("json")


def test_wandb_without_a_login_is_told_before_anything_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setattr(wandb, "setup", lambda: type("Setup", (), {"settings": wandb.Settings(mode="online")}))
    monkeypatch.setattr(wandb, "login", lambda *, prompt: False)
    with pytest.raises(UsageError, match="nobody is logged in"):
        plan_logs(["wandb"])


def test_unknown_logs_are_refused() -> None:
    with pytest.raises(UsageError, match="tensorboard or wandb"):
        plan_logs(["mlflow"])


def test_a_log_can_be_added_later_and_others_stay(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", "wandb")
    first = run.description()["logs"]["wandb"]
    added = add_logs(run, run.description(), ["tensorboard", "wandb"])
    assert added["logs"] == {"wandb": first, "tensorboard": {}}
    assert run.description()["logs"] == added["logs"]


TINY = """
extends: demo
model:
  tokenizer: {base_channels: 8, channel_multipliers: [1, 1, 1, 1]}
training:
  tokenizer: {steps: 2, batch_size: 2, log_every: 1, validate_every: 2, sample_every: 2, validation_images: 2}
"""


def test_train_and_resume_log_to_the_same_place_and_train_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tmp_path / "c.yaml").write_text(TINY)
    weights = []
    for name, more in (("run", ["--log", "tensorboard"]), ("plain", [])):
        run = str(tmp_path / name)
        words = ["--config", str(tmp_path / "c.yaml"), "--data", "world:20", "--out", run, "--device", "cpu"]
        assert main(["train", *words, "--set", "training.tokenizer.precision=fp32", *more]) == 0
        assert main(["resume", run, "--steps", "1", "--device", "cpu"]) == 0
        weights.append((tmp_path / name / "model" / "tokenizer.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert "left out" not in capsys.readouterr().err
    found = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    found.Reload()
    assert [event.step for event in found.Scalars("loss")] == [1, 2, 3]
    assert [picture.step for picture in found.Images("samples")] == [2, 3]
    assert {"val_loss", "val_psnr", "learning_rate"} <= set(found.Tags()["scalars"])
