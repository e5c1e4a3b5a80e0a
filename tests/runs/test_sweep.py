"""`--sweep`: which combinations, under which names, and what happens to runs that fail, stop or are there already."""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import bitgen_cli
from bitgen_cli.__main__ import main
from bitgen_cli.errors import UsageError
from bitgen_cli.report import Silent
from bitgen_cli.runs import sweep as module
from bitgen_cli.runs.sweep import SweepOptions, combinations, sweep

RATE, WEIGHT = "training.tokenizer.optimizer.learning_rate", "training.tokenizer.l1_weight"
TWO = (f"{RATE}=0.1", f"{RATE}=0.2")


def options(out: Path, *overrides: str, **changes: Any) -> SweepOptions:
    given = {"verb": "train", "shared": ("--data", "d"), "computing": ("--device", "cpu"), **changes}
    return SweepOptions(overrides=overrides or TWO, out=out, **given)


# -- combinations ------------------------------------------------------------------------------------------------------


def test_every_value_meets_every_other_and_the_rest_is_shared() -> None:
    found = combinations([f"{RATE}=0.1", "name=mine", f"{WEIGHT}=1", f"{RATE}=0.2", f"{WEIGHT}=2"])
    assert [combination.name for combination in found] == [
        "learning_rate=0.1,l1_weight=1",
        "learning_rate=0.1,l1_weight=2",
        "learning_rate=0.2,l1_weight=1",
        "learning_rate=0.2,l1_weight=2",
    ]
    assert found[1].values == {RATE: "0.1", WEIGHT: "2"}
    assert found[1].overrides == ("name=mine", f"{RATE}=0.1", f"{WEIGHT}=2")


def test_keys_of_the_same_last_part_are_named_in_full() -> None:
    keys = ("training.tokenizer.seed", "training.transformer.seed")
    (first, *_) = combinations([f"{key}={value}" for key in keys for value in (1, 2)])
    assert first.name == "training.tokenizer.seed=1,training.transformer.seed=1"


def test_names_are_safe_as_file_names_and_stay_different() -> None:
    values = ["[1, 2]", "[1, 3]", "../../etc/passwd", "a/b", "a:b", "ä", "x" * 300, "x" * 301, "3", "", "*", "-1"]
    names = [combination.name for combination in combinations([f"sampling.cfg={value}" for value in values])]
    assert len(set(names)) == len(values)
    assert all(len(name.encode()) < 200 and not set(name) - module_letters() for name in names)
    assert "cfg=3" in names
    assert "cfg=-1" in names


def module_letters() -> set[str]:
    return set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._+-=,")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["a=1", "b=2"], "nothing to try"),
        ([], "nothing to try"),
        (["a=1", "a=2", "a= 1"], "a= 1 is given twice"),
        (["a=[1, 2]", "a=[1,2]"], "given twice"),
        ([f"{key}={value}" for key in "abcd" for value in range(6)], "1296 runs"),
    ],
)
def test_what_makes_no_sweep_is_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        combinations(overrides)


def test_one_and_true_are_not_the_same() -> None:
    assert len(combinations(["a=1", "a=true", "a=1.0"])) == 3


def test_without_sweep_a_repeated_key_is_an_error_that_names_the_flag(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--preset", "demo", "--data", "world:20", "--out", str(tmp_path / "run")]
    assert main([*words, "--set", TWO[0], "--set", TWO[1]]) == 2
    assert f"{RATE}: given twice by --set (0.1, 0.2); trainings try each with --sweep" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main(["inspect-config", "demo", *["--set", "sampling.cfg=1"] * 3]) == 2
    assert "given 3 times by --set (1, 1, 1)" in capsys.readouterr().err


# -- print -------------------------------------------------------------------------------------------------------------


def test_printed_commands_can_be_typed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "train", "--preset=demo", "--data", "my pictures", "--out", "o", "--steps", "3", "--device", "cpu",
        "--log", "tensorboard", "--set", "sampling.cfg=[1, 2]", "--set", "sampling.cfg=3", "--set", "name=a b",
    ]  # fmt: skip
    assert main([*words, "--sweep", "print"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    lines = shown.out.splitlines()
    assert shlex.split(lines[1]) == [
        "bitgen", "train", "--data", "my pictures", "--preset", "demo", "--steps", "3", "--log", "tensorboard",
        "--device", "cpu", "--out", "o/cfg=3", "--set", "name=a b", "--set", "sampling.cfg=3",
    ]  # fmt: skip
    assert main([*words, "--sweep", "print", "--json"]) == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert [run["command"] for run in runs] == lines
    assert runs[1]["values"] == {"sampling.cfg": "3"}
    assert runs[1]["run"] == "o/cfg=3"


def test_subjects_of_a_sweep_have_names_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    weight = "training.subject.prior_weight"
    words = ["finetune-subject", "photos", "--class", "dog", "--token", "[Rex]", "--train", "token,lora", "--no-flip"]
    assert main([*words, "--set", f"{weight}=1", "--set", f"{weight}=2", "--sweep", "print"]) == 0
    first, second = (shlex.split(line) for line in capsys.readouterr().out.splitlines())
    assert first[1:10] == words
    assert first[10:] == [
        "--out", "sweep-rex/prior_weight=1", "--name", "rex-prior_weight-1", "--set", f"{weight}=1"
    ]  # fmt: skip
    assert "rex-prior_weight-2" in second
    assert main([*words, "--set", f"{weight}=1", "--set", f"{weight}=2", "--sweep", "run", "--merge", "m"]) == 2
    assert "--merge" in capsys.readouterr().err


def test_long_names_of_subjects_stay_names() -> None:
    found = options(Path("o"), *(f"a={'x' * 80}{n}" for n in range(2)), verb="finetune-subject", subject="v")
    names = [shlex.split(run.command)[-3] for run in module.plan(found)]
    assert len(set(names)) == 2
    assert all(len(name) <= 64 for name in names)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--sweep", "try"], "must be print or run"),
        (["--sweep", "print", "--set", "training.tokenizer.setps=2"], "did you mean training.tokenizer.steps"),
        (["--sweep", "run", "--set", f"{RATE}=-1"], "learning_rate = -1"),
    ],
)
def test_mistakes_are_told_before_the_first_run(
    more: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--preset", "demo", "--data", "world:20", "--out", str(tmp_path / "o")]
    assert main([*words, "--set", TWO[0], "--set", TWO[1], *more]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_no_torch_is_loaded_for_a_sweep(tmp_path: Path) -> None:
    program = (
        "import sys; from bitgen_cli.__main__ import main; code = main(sys.argv[1:]); "
        "import bitgen_cli.runs.sweep; print(code, 'torch' in sys.modules, file=sys.stderr)"
    )
    words = ["train", "--preset", "demo", "--data", "world:9", "--out", "o", "--stage", "tokenizer", "--steps", "2"]
    command = [sys.executable, "-c", program, *words, "--set", TWO[0], "--set", TWO[1], "--sweep", "print"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=_environment())
    assert done.stderr.split() == ["0", "False"]


# -- run ---------------------------------------------------------------------------------------------------------------


def _environment() -> dict[str, str]:
    package = str(Path(bitgen_cli.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])}


def finish(run: Path, loss: float, *, step: int = 5, finished: bool = True) -> None:
    """What a training leaves."""
    (run / "checkpoints" / f"step-{step:07d}").mkdir(parents=True, exist_ok=True)
    (run / "config.json").write_text('{"verb": "train"}')
    (run / "state.json").write_text(json.dumps({"step": step, "finished": finished}))
    lines = [{"step": step, "loss": loss}, {"step": step, "val_loss": 2 * loss, "val_psnr": 20.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[str]]]:
    """Replaces the processes by functions, one for each, that get the run folder and return the exit code."""

    def replace(*behave: Callable[[Path], int]) -> list[list[str]]:
        started: list[list[str]] = []
        waiting = list(behave)

        def run(self: module._Child, words: Sequence[str], group: str) -> int:
            started.append(list(words))
            folder = words[1] if words[0] == "resume" else words[words.index("--out") + 1]
            code = waiting.pop(0)(Path(folder))
            self.stopping = self.stopping or code == 130
            return code

        monkeypatch.setattr(module._Child, "run", run)
        return started

    return replace


def leaves(loss: float, code: int = 0, **changes: Any) -> Callable[[Path], int]:
    def behave(run: Path) -> int:
        finish(run, loss, **changes)
        return code

    return behave


def fails(code: int) -> Callable[[Path], int]:
    return lambda run: code


def test_the_best_run_is_found(tmp_path: Path, runs: Any) -> None:
    started = runs(leaves(0.5), leaves(0.25), leaves(math.nan))
    result = sweep(options(tmp_path / "o", *TWO, f"{RATE}=0.3"), Silent())
    assert result.exit_code == 0
    assert result.best is result.runs[1]
    assert (result.best.loss, result.best.val_loss, result.best.val_psnr, result.best.steps) == (0.25, 0.5, 20.0, 5)
    assert started[0] == [
        "train", "--data", "d", "--device", "cpu", "--out", str(tmp_path / "o" / "learning_rate=0.1"), "--set", TWO[0]
    ]  # fmt: skip
    shown = json.loads(json.dumps(result.to_json()))
    assert shown["best"] == str(tmp_path / "o" / "learning_rate=0.2")
    assert shown["runs"][0] == {
        "values": {RATE: "0.1"}, "run": str(tmp_path / "o" / "learning_rate=0.1"),
        "command": shlex.join(["bitgen", *started[0]]), "state": "finished", "exit_code": 0, "steps": 5,
        "loss": 0.5, "val_loss": 1.0, "best_val_loss": 1.0, "val_psnr": 20.0,
    }  # fmt: skip


def test_a_run_that_fails_does_not_end_the_rest_and_gives_its_exit_code(tmp_path: Path, runs: Any) -> None:
    runs(leaves(0.1, code=5), fails(4), leaves(0.5))
    result = sweep(options(tmp_path / "o", *TWO, f"{RATE}=0.3"), Silent())
    assert result.exit_code == 5
    assert [run.state for run in result.runs] == ["diverged", "failed", "finished"]
    assert result.best is result.runs[2]


def test_a_stopped_sweep_goes_on_where_it_stopped(tmp_path: Path, runs: Any) -> None:
    overrides = (*TWO, f"{RATE}=0.3", f"{RATE}=0.4")
    runs(leaves(0.5), leaves(0.4, code=130, step=2, finished=False))
    first = sweep(options(tmp_path / "o", *overrides), Silent())
    assert first.exit_code == 130
    assert [run.state for run in first.runs] == ["finished", "interrupted", "not started", "not started"]
    # what kills leave before anything was saved
    unsaved, unborn = tmp_path / "o" / "learning_rate=0.3", tmp_path / "o" / "learning_rate=0.4"
    (unsaved / "samples").mkdir(parents=True)
    (unsaved / "config.json").write_text('{"verb": "train"}')
    (unborn / "samples").mkdir(parents=True)
    started = runs(leaves(0.3), leaves(0.2), leaves(0.6))
    second = sweep(options(tmp_path / "o", *overrides, computing=("--device", "cpu", "--log", "wandb")), Silent())
    assert [words[0] for words in started] == ["resume", "train", "train"]
    assert started[0][1:] == [str(tmp_path / "o" / "learning_rate=0.2"), "--device", "cpu", "--log", "wandb"]
    assert [run.exit_code for run in second.runs] == [None, 0, 0, 0]
    assert [run.state for run in second.runs] == ["finished"] * 4
    assert second.best is second.runs[2]


def test_more_values_may_be_added_but_nothing_else_may_differ(
    tmp_path: Path, runs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("name: a")
    base: dict[str, Any] = {"config_file": config}
    runs(leaves(0.5), leaves(0.4))
    sweep(options(tmp_path / "o", *TWO, **base), Silent())
    started = runs(leaves(0.3))
    assert len(sweep(options(tmp_path / "o", *TWO, f"{RATE}=0.3", **base), Silent()).runs) == 3
    assert len(started) == 1
    for changed in (
        options(tmp_path / "o", *TWO, "name=other", **base),
        options(tmp_path / "o", *TWO, shared=("--data", "e"), **base),
    ):
        with pytest.raises(UsageError, match="a sweep with other options"):
            sweep(changed, Silent())
    monkeypatch.setenv("BITGEN_SAMPLING__CFG", "9")
    with pytest.raises(UsageError, match="a sweep with other options"):
        sweep(options(tmp_path / "o", *TWO, **base), Silent())
    monkeypatch.delenv("BITGEN_SAMPLING__CFG")
    config.write_text("name: b")
    with pytest.raises(UsageError, match="a sweep with other options"):
        sweep(options(tmp_path / "o", *TWO, **base), Silent())


def test_folders_of_others_are_left_alone(tmp_path: Path, runs: Any) -> None:
    runs()
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds no sweep"):
        sweep(options(tmp_path / "o"), Silent())
    runs(leaves(0.5), leaves(0.5))
    sweep(options(tmp_path / "p"), Silent())
    theirs = tmp_path / "p" / "learning_rate=0.3"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("mine")
    runs()
    with pytest.raises(UsageError, match="holds no run"):
        sweep(options(tmp_path / "p", *TWO, f"{RATE}=0.3"), Silent())
    assert (theirs / "thesis.txt").read_text() == "mine"


def test_the_table_marks_the_best_and_says_how_the_others_ended(
    tmp_path: Path, runs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    runs(leaves(0.5), fails(4), leaves(0.25))
    words = ["train", "--preset", "demo", "--data", "world:20", "--out", str(tmp_path / "o"), "--sweep", "run"]
    assert main([*words, "--set", TWO[0], "--set", TWO[1], "--set", f"{RATE}=0.3"]) == 4
    shown = capsys.readouterr()
    assert shown.out.splitlines() == [
        str(tmp_path / "o"),
        "learning_rate  steps  loss    held-out loss  lowest  held-out PSNR  state",
        "0.1            5      0.5000  1.0000         1.0000  20.00          finished",
        "0.2            0                                                    failed, exit 4",
        "0.3            5      0.2500  0.5000         0.5000  20.00          finished        best",
    ]
    assert "run 2 of 3: learning_rate=0.2" in shown.err


TINY = """
extends: demo
model:
  tokenizer: {base_channels: 8, channel_multipliers: [1, 1, 1, 1]}
training:
  tokenizer: {steps: 400, batch_size: 2, log_every: 1, sample_every: 0, validation_images: 2, precision: fp32}
"""


def test_processes_train_stop_and_go_on(tmp_path: Path) -> None:
    """SIGTERM to the sweep alone: the running training saves, nothing further starts, and it goes on later."""
    (tmp_path / "c.yaml").write_text(TINY)
    command = [sys.executable, "-m", "bitgen_cli", "train", "--config", "c.yaml", "--data", "world:20", "--out", "o"]
    command += ["--device", "cpu", "--sweep", "run", "--set", TWO[0], "--set", TWO[1]]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "o" / "learning_rate=0.1" / "metrics.jsonl"
    while process.poll() is None and not metrics.exists():
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.05)
    process.send_signal(signal.SIGTERM)
    shown, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "everything is saved" in said
    assert [line.split()[-1] for line in shown.splitlines()[2:]] == ["interrupted", "started"]
    state = json.loads((tmp_path / "o" / "learning_rate=0.1" / "state.json").read_text())
    assert 0 < state["step"] < 400
    assert not (tmp_path / "o" / "learning_rate=0.2").exists()
