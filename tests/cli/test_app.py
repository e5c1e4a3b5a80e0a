"""The command line: what reaches the runs, what comes out where, which exit codes end it. Runs are fakes."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import bitgen_cli
from bitgen_cli.__main__ import main
from bitgen_cli.errors import (
    BitgenError,
    ConfigError,
    DivergedError,
    InputError,
    Interrupted,
    ResourceError,
    UsageError,
)
from bitgen_cli.report import Report, Table
from bitgen_cli.runs.sample_result import SampledPicture, SampleResult

Capture = pytest.CaptureFixture[str]
Fake = Callable[..., list[tuple[Any, ...]]]

COMMANDS = ("sample", "tokenize", "train", "resume", "inspect-config")
RESULT: dict[str, Any] = {"picture": "ä.png", "seeds": [1, 2]}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Replaces a run by one that records its arguments, speaks to the report, and raises or returns."""

    def replace(run: str, name: str, outcome: Any) -> list[tuple[Any, ...]]:
        calls: list[tuple[Any, ...]] = []

        def stand_in(*arguments: Any, **named: Any) -> Any:
            calls.append((*arguments, named))
            report: Report = next(value for value in arguments if hasattr(value, "notice"))
            report.notice("a note")
            report.warning("a warning")
            with report.task("pictures", 2) as task:
                task.advance()
                task.status("half")
                task.advance()
            report.metrics(1, 2, {"loss": 0.5, "bit_accuracy/0": 0.75})
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        module = importlib.import_module(f"bitgen_cli.runs.{run}")
        monkeypatch.setattr(module, name, stand_in)
        return calls

    return replace


def picture(path: str, seed: int | None, scales: str | None = None) -> SampledPicture:
    return SampledPicture(Path(path), "a dog", seed, {}, None if scales is None else Path(scales))


def sampled(*pictures: SampledPicture, grid: Path | None = None) -> SimpleNamespace:
    seeds = SampleResult(list(pictures), grid, 1.0).seeds
    return SimpleNamespace(
        pictures=list(pictures), grid=grid, manifest=None, failures=(), seeds=seeds, to_json=lambda: RESULT
    )


def trained() -> SimpleNamespace:
    return SimpleNamespace(
        run=Path("run"),
        stage="transformer",
        steps=7,
        loss=0.5,
        validation={"val_loss": 0.25, "val_bit_accuracy/0": 0.75, "val_bit_accuracy/1": 0.5},
        model=Path("run/model"),
        seconds=3.0,
        to_json=lambda: RESULT,
    )


def reported() -> SimpleNamespace:
    bad = SimpleNamespace(key="evil\x1b[31m.png", reason="evil\x1b[31m.png is damaged")
    return SimpleNamespace(
        layout="plain folder, 13 pictures without captions",
        captions=SimpleNamespace(count=15, missing=1, several=2, limit=48, cut=3, longest=70, cut_of=["long.png"]),
        misclaimed=None,
        buckets=[
            SimpleNamespace(aspect="1:1", ratio=1.0, width=64, height=64, count=12, cropped=0.125, enlarged=0)
        ],
        most_cropped=[SimpleNamespace(key="pano.png", share=0.5), SimpleNamespace(key="fits.png", share=0.1)],
        bad=[bad] * 12,
    )


def stored() -> SimpleNamespace:
    return SimpleNamespace(
        out=Path("store"),
        part="2/4",
        missing=[],
        count=12,
        added=4,
        without_caption=1,
        bad=["one"],
        ratios=[SimpleNamespace(ratio=1.0, count=12, positions=30, bits=960)],
        text_features=True,
        bytes_per_image=130.0,
        bits_per_image=960.0,
        psnr=30.25,
        ssim=0.9,
        seconds=2.0,
        images_per_second=2.0,
        report=reported(),
        to_json=lambda: RESULT,
    )


def inspected() -> SimpleNamespace:
    table = Table("scales", ["scale", "size"], [["1", "1x1"], ["10", "[2]x2"]])
    return SimpleNamespace(
        sections=[table, Table("memory", ["of", "MiB"], [["sampling", "12"]])], to_json=lambda: RESULT
    )


RUNS: dict[str, tuple[str, str, Callable[[], Any], list[str]]] = {
    "sample": ("sample", "sample", lambda: sampled(picture("a.png", 1)), ["a dog"]),
    "tokenize": ("tokenize", "tokenize", stored, ["pictures", "store"]),
    "train": ("train", "train", trained, ["--preset", "demo", "--data", "store", "--out", "run"]),
    "resume": ("resume", "resume", trained, ["run"]),
    "inspect-config": ("inspect_config", "inspect", inspected, ["demo"]),
}
"""Subcommand to its module, its function, a result, and arguments that are enough."""


def run_fake(fake: Fake, command: str, *more: str, outcome: Any = None) -> int:
    module, name, result, arguments = RUNS[command]
    fake(module, name, result() if outcome is None else outcome)
    return main([command, *arguments, *more])


def test_help_names_every_command_and_ends_well(capsys: Capture) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert [name for name in COMMANDS if name in shown] == list(COMMANDS)


def test_no_command_is_wrong_usage_and_shows_the_help(capsys: Capture) -> None:
    assert main([]) == 2
    assert "inspect-config" in capsys.readouterr().out


def test_version(capsys: Capture) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"bitgen {bitgen_cli.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sampel"], "No such command 'sampel'"),
        (["--verbose"], "No such option"),
        (["sample", "a dog", "--sed", "1"], "--seed"),
        (["sample", "a dog", "--seed", "red"], "'--seed'"),
        (["sample", "a dog", "-n", "0"], "'--num-images' / '-n'"),
        (["sample", "a dog", "--seed"], "'--seed' requires an argument"),
        (["tokenize", "pictures"], "needs pictures and a folder"),
        (["tokenize", "--verify", "store", "pictures", "--no-latents"], "nothing else, but there is DATA, --latents"),
        (["tokenize", "--verify", "store", "--workers", "2"], "--workers"),
        (["tokenize", "pictures", "store", "--reconstruct", "-1"], "'--reconstruct'"),
        (["train", "--preset", "demo", "--data", "store"], "'--out'"),
        (["resume"], "'RUN'"),
        (["resume", "run", "--steps", "0"], "'--steps'"),
        (["inspect-config"], "nothing to inspect"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments: list[str], said: str, capsys: Capture) -> None:
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert said in shown.err


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (BitgenError("it broke"), 1, "error: it broke"),
        (UsageError("top_p 2 is too much", "at most 1"), 2, "error: top_p 2 is too much (at most 1)"),
        (ResourceError("no space left"), 3, "error: no space left"),
        (InputError("no model at [x]", "give a folder"), 4, "error: no model at [x] (give a folder)"),
        (DivergedError("diverged at step 3"), 5, "error: diverged at step 3"),
        (Interrupted("stopped after step 3"), 130, "interrupted: stopped after step 3"),
        (KeyboardInterrupt(), 130, "interrupted: stopped by Ctrl-C"),
        (MemoryError(), 3, "error: out of memory (a smaller --batch-size or --resolution needs less)"),
        (
            ValueError("bad\nvalue"),
            1,
            "internal error: ValueError: bad\nvalue (BITGEN_TRACEBACK=1 shows where)",
        ),
    ],
)
def test_errors_become_a_line_and_an_exit_code(
    command: str, error: BaseException, code: int, line: str, fake: Fake, capsys: Capture
) -> None:
    assert run_fake(fake, command, outcome=error) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.endswith(f"\n{line}\n")
    assert "Traceback" not in shown.err


@pytest.mark.parametrize(
    "message", ["CUDA out of memory", "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"]
)
def test_torch_without_memory_is_a_matter_of_resources(message: str, fake: Fake, capsys: Capture) -> None:
    kind = type("OutOfMemoryError", (RuntimeError,), {}) if "CUDA" in message else RuntimeError
    assert run_fake(fake, "sample", outcome=kind(message)) == 3
    assert "out of memory" in capsys.readouterr().err


def test_all_problems_of_a_configuration_are_shown(fake: Fake, capsys: Capture) -> None:
    problems = [f"training.steps{number}: unknown" for number in range(3)]
    assert run_fake(fake, "inspect-config", outcome=ConfigError("x.yaml", problems)) == 2
    shown = capsys.readouterr().err
    assert "error: x.yaml: 3 problems\n" in shown
    assert all(f"  {problem}\n" in shown for problem in problems)


def test_an_unknown_preset_is_told_before_anything_is_loaded(capsys: Capture) -> None:
    assert main(["train", "--preset", "dmeo", "--data", "store", "--out", "run"]) == 2
    shown = capsys.readouterr().err
    assert "dmeo" in shown
    assert "demo" in shown


@pytest.mark.parametrize("error", [ValueError("bad value"), InputError("no model")])
def test_a_traceback_is_shown_on_demand(
    error: Exception, fake: Fake, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITGEN_TRACEBACK", "1")
    run_fake(fake, "sample", outcome=error)
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert "stand_in" in shown


@pytest.mark.parametrize("command", COMMANDS)
def test_json_is_one_object_and_alone_on_stdout(command: str, fake: Fake, capsys: Capture) -> None:
    assert run_fake(fake, command, "--json") == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out) == RESULT
    assert "a warning" in shown.err


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("colour", ["FORCE_COLOR", "NO_COLOR"])
def test_no_control_characters_without_a_terminal(
    command: str, colour: str, fake: Fake, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(colour, "1")
    assert run_fake(fake, command) == 0
    shown = capsys.readouterr()
    assert shown.out
    assert not [c for c in shown.out + shown.err if c < " " and c != "\n"]


def test_sample_hands_everything_over(fake: Fake) -> None:
    from bitgen_cli.runs.jobs import SampleOptions

    calls = fake("sample", "sample", sampled(picture("a.png", 1)))
    line = (
        "sample|a red dog|a blue cat|--model|m|-n|3|--batch-size|2|--seed|5|--cfg|4,3|--cfg-layer|1|--tau|0.5"
        "|--top-k|2|--top-p|0.9|--greedy|--negative-prompt|rain|--aspect|16:9|--resolution|1M|--prompts|p.txt|-o|out/|--overwrite|--grid|--save-scales|webp"
        "|--device|cpu|--dtype|bf16|--text-dtype|int8|--no-text-cache|--no-metadata|--set|sampling.tau=2|--set|sampling.cfg=1"
    )
    assert main(line.split("|")) == 0
    assert calls[0][0] == SampleOptions(
        prompts=("a red dog", "a blue cat"),
        prompts_file="p.txt",
        model="m",
        num_images=3,
        batch_size=2,
        seed=5,
        cfg="4,3",
        cfg_layer=1,
        tau="0.5",
        top_k=2,
        top_p=0.9,
        greedy=True,
        negative_prompt="rain",
        aspect="16:9",
        resolution="1M",
        output="out/",
        overwrite=True,
        grid=True,
        save_scales="webp",
        metadata=False,
        device="cpu",
        dtype="bf16",
        text_dtype="int8",
        text_cache=False,
        overrides=("sampling.tau=2", "sampling.cfg=1"),
    )


def test_sample_prints_paths_to_stdout_and_the_seed_to_stderr(fake: Fake, capsys: Capture) -> None:
    pictures = [picture("out/a.png", 7), picture("out/b.png", 8, "out/b-scales.png")]
    fake("sample", "sample", sampled(*pictures, grid=Path("out/grid.png")))
    assert main(["sample", "a dog", "-n", "2"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "out/a.png\nout/b.png\nout/b-scales.png\nout/grid.png\n"
    assert "seeds 7 to 8\n" in shown.err


def test_tokenize_hands_everything_over(fake: Fake, capsys: Capture) -> None:
    from bitgen_cli.runs.tokenize import TokenizeOptions

    calls = fake("tokenize", "tokenize", stored())
    line = (
        "tokenize world:9 store --model m --batch-size 4 --no-latents --reconstruct 2 --resolution 1M "
        "--device cpu --dtype fp32 --workers 3 --aspect 1:1,16:9 --caption-key blip --image-root pictures "
        "--shard 2/4 --text-features"
    )
    assert main(line.split()) == 0
    assert calls[0][0] == TokenizeOptions(
        data="world:9",
        out=Path("store"),
        model="m",
        batch_size=4,
        latents=False,
        reconstruct=2,
        resolution="1M",
        device="cpu",
        dtype="fp32",
        workers=3,
        aspects=("1:1", "16:9"),
        caption_key="blip",
        image_root=Path("pictures"),
        shard="2/4",
        text_features=True,
    )
    shown = capsys.readouterr().out
    assert "2/4, the store is complete" in shown
    assert "12 (4 new)" in shown
    assert "PSNR 30.25 dB" in shown
    told = "15; 2 pictures have several; 1 picture has none; 3 are cut after 48 tokens (the longest has 70)"
    assert f"captions         {told}\n" in shown
    assert re.search(r"1:1 +64 x 64 +12 +12\.5 % +30 +960\n", shown)
    assert re.search(r"most is cut off\npicture +share\npano.png +50\.0 %\n\n", shown)
    assert "long.png" in shown
    assert "\x1b" not in shown, "names cannot command the terminal"
    assert shown.count("evil\\x1b[31m.png is damaged\n") == 10
    assert "and 2 more" in shown


def test_a_transformer_may_learn_from_pictures(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitgen_cli import presets

    asked: dict[str, Any] = {}
    calls = fake("train", "train", trained())
    monkeypatch.setattr(presets, "resolve", lambda preset, **named: asked.update(named))
    line = ["train", "--data", "world:20", "--out", "run", "--stage", "transformer", "--init", "m"]
    assert main([*line, "--aspect", "1:1", "--caption-key", "blip", "--image-root", "pictures"]) == 0
    assert asked["flags"] == {"training.transformer.aspects": ["1:1"]}
    options = calls[0][0]
    assert (options.stage, options.caption_key, options.image_root) == ("transformer", "blip", Path("pictures"))


@pytest.mark.parametrize("more", [["--aspect", "1:1"], ["--stage", "transformer", "--aspect", "1:1"]])
def test_shapes_are_chosen_for_pictures_alone(more: list[str], tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    assert main(["train", "--preset", "demo", "--data", str(tmp_path), "--out", "run", *more]) == 2
    assert "--aspect is for pictures" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "flags"),
    [
        ([], {}),
        (["--stage", "tokenizer", "--steps", "5"], {"training.tokenizer.steps": 5}),
        (["--stage", "tokenizer", "--aspect", "1:1, 3:2"], {"training.tokenizer.aspects": ["1:1", "3:2"]}),
        (
            ["--batch-size", "4", "--seed", "0"],
            {"training.transformer.batch_size": 4, "training.transformer.seed": 0},
        ),
    ],
)
def test_train_hands_everything_over(
    more: list[str], flags: dict[str, Any], fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bitgen_cli.presets as presets
    from bitgen_cli.runs.start import Init

    (tmp_path / "manifest.json").write_text("{}")
    calls = fake("train", "train", trained())
    asked: dict[str, Any] = {}

    def resolve(preset: str | None, **named: Any) -> str:
        asked.update(named, preset=preset)
        return "resolved"

    monkeypatch.setattr(presets, "resolve", resolve)
    line = [
        "train",
        "--preset",
        "demo",
        "--data",
        str(tmp_path),
        "--out",
        "run",
        "--init",
        "m",
        "--init",
        "weights.pth",
        "--allow-init-mismatch",
        "transformer.head",
        "--device",
        "cpu",
    ]
    line += ["--log", "tensorboard", "--log", "wandb"]
    assert main([*line, "--config", "c.yaml", "--set", "a.b=1", "--set", "c=2", *more]) == 0
    assert asked == {
        "preset": "demo",
        "config_file": Path("c.yaml"),
        "overrides": ("a.b=1", "c=2"),
        "flags": flags,
    }
    options = calls[0][0]
    assert (options.resolved, options.data, options.out) == ("resolved", str(tmp_path), Path("run"))
    assert options.logs == ("tensorboard", "wandb")
    assert (options.stage, options.init, options.device) == (
        "tokenizer" if "--stage" in more else None,
        Init(("m", "weights.pth"), ("transformer.head",)),
        "cpu",
    )


def test_training_tells_what_it_reached(fake: Fake, capsys: Capture) -> None:
    calls = fake("resume", "resume", trained())
    assert main(["resume", "run", "--steps", "3", "--device", "cpu", "--log", "wandb"]) == 0
    assert calls[0][0] == Path("run")
    assert calls[0][-1] == {"steps": 3, "device": "cpu", "strategy": "ddp", "logs": ("wandb",)}
    shown = capsys.readouterr().out
    assert "run/model" in shown
    assert "held-out loss          0.2500\n" in shown
    assert "held-out bit accuracy  75.0 50.0 % per scale\n" in shown


def test_inspect_config_hands_everything_over(fake: Fake, capsys: Capture) -> None:
    from bitgen_cli.runs.inspect_config import InspectOptions

    calls = fake("inspect_config", "inspect", inspected())
    assert main(["inspect-config", "demo", "--set", "a=1", "--config", "c.yaml"]) == 0
    assert calls[0][0] == InspectOptions(
        target="demo", overrides=["a=1"], schema=False, config_file=Path("c.yaml")
    )
    assert (
        capsys.readouterr().out
        == "scales\nscale  size\n1      1x1\n10     [2]x2\n\nmemory\nof        MiB\nsampling  12\n"
    )


def test_the_schema_needs_no_target_and_is_json(fake: Fake, capsys: Capture) -> None:
    calls = fake("inspect_config", "inspect", inspected())
    assert main(["inspect-config", "--schema"]) == 0
    assert calls[0][0].schema
    assert json.loads(capsys.readouterr().out) == RESULT


def in_shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"BITGEN": f"{sys.executable} -m bitgen_cli"} | environment,
    )


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_enough_is_no_error(unbuffered: str) -> None:
    done = in_shell("$BITGEN --version | true", PYTHONUNBUFFERED=unbuffered)
    assert done.stderr == ""
    assert done.returncode == 0


def test_a_terminal_without_utf8_gets_the_line_all_the_same() -> None:
    done = in_shell("$BITGEN sämple", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 2
    assert "No such command 's\\xe4mple'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("streams", "code", "says"),
    [
        (">/dev/full", 3, "error: cannot write to standard output: no space left"),
        ("2>&1 >&-", 0, ""),
        ("2>&-", 0, ""),
        ("| head -c 1", 0, ""),
    ],
)
def test_streams_that_take_nothing(streams: str, code: int, says: str) -> None:
    """A full disk, and streams that are closed before the program starts or while it writes, end in no traceback."""
    done = in_shell(f"$BITGEN inspect-config --schema {streams}")
    assert done.returncode == code
    assert done.stderr.startswith(says)
    assert done.stderr.count("\n") == bool(says)


def test_a_full_disk_behind_stderr_hides_no_exit_code() -> None:
    assert in_shell("$BITGEN sämple 2>/dev/full").returncode == 2


@pytest.mark.parametrize("choice", ["--seed=3", "--tau=2", "--greedy", "--fast=1"])
def test_what_chooses_bits_is_refused_where_none_is_drawn(choice: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "--from", "missing.png", "--refine", "1", choice]) == 2
    assert choice.partition("=")[0] in capsys.readouterr().err
    assert main(["sample", "--from", "missing.png", "--refine", "1", "--mask", "0,0,8,8", choice]) == 4
