"""Whether a training fits: estimates beside real trainings, what is refused, and what would help."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import CONFIG, photos, save

from bitgen_cli.__main__ import main
from bitgen_cli.config import Config
from bitgen_cli.engine import device
from bitgen_cli.engine.model_folder import TOKENIZER_FILE
from bitgen_cli.engine.training_memory import CPU, Layout, TrainingMemory
from bitgen_cli.errors import ResourceError
from bitgen_cli.files import HOME
from bitgen_cli.presets import Resolved
from bitgen_cli.report import Silent
from bitgen_cli.runs import fitting
from bitgen_cli.runs.finetune_subject import SubjectOptions, try_out_subject
from bitgen_cli.runs.fitting import PROGRAM, Fit, fit_of
from bitgen_cli.runs.start import Init
from bitgen_cli.runs.tokenize import TokenizeOptions, tokenize
from bitgen_cli.runs.train import TrainOptions, train, try_out
from tests.benchmarks import memory as benchmark
from tests.benchmarks.memory import Case

MIB = 2**20
RECIPE: dict[str, Any] = {
    "steps": 4,
    "batch_size": 8,
    "ema_decay": 0.9,
    "optimizer": {"learning_rate": 0.001},
    "validation_images": 4,
}


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv(HOME, str(tmp_path / "home"))
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def config_of(**changes: Any) -> Config:
    training = {stage: {**RECIPE, **changes} for stage in ("tokenizer", "transformer", "subject")}
    model = CONFIG.model_dump(mode="json")
    return Config.model_validate({"name": "tiny", "model": model, "training": training})


# prompts are cut to 8 tokens, so that all of them are as long as the estimate takes them to be; a third block is
# estimated from two
FEW = ("batch_size=4", "model.transformer.text_length=8", "model.transformer.depth=3")


@pytest.mark.parametrize(
    "case",
    [
        Case("tokenizer", "tokenizer", "demo", ("batch_size=4", "precision=fp32", "accumulation=2")),
        Case("transformer, bf16", "transformer", "demo", FEW),
        Case("transformer, recomputed", "transformer", "demo",
             (*FEW, "precision=fp32", "checkpoint_activations=true", "ema_decay=0")),
        Case("subject", "subject", "demo", ("batch_size=2", 'train=["token", "lora"]', "likely_captions=[]")),
    ],
    ids=lambda case: case.name,
)  # fmt: skip
def test_estimates_are_within_15_percent_of_what_trainings_hold(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "PICTURES", 24)
    small = replace(case, overrides=(*case.overrides, "validation_images=4"))
    benchmark.prepare(tmp_path, small, "cpu")
    ratio = benchmark.estimated(small, "cpu") / benchmark.measured(tmp_path, small, "cpu", tensors=True)
    assert 0.87 < ratio < 1.15


# -- what is refused ---------------------------------------------------------------------------------------------------


def memory_of(config: Config, layout: Layout) -> TrainingMemory:
    """100 MiB for each picture of a rank, 400 for weights and what belongs to them, and what settings add."""
    training = config.training.transformer
    assert training is not None
    share = layout.ranks if layout.sharded else 1
    weights = 100 * MIB // share
    pictures = layout.rows(training.batch_size) * (20 if training.checkpoint_activations else 100) * MIB
    average = weights if training.ema_decay else 0
    drawing = 5 * MIB if training.sample_every else 0
    step = pictures // (2 if training.precision == "bf16" else 1)
    return TrainingMemory(weights, weights, 2 * weights, average, 0, 0, 0, step, step, 0, drawing)


def fit_with(free: int, monkeypatch: pytest.MonkeyPatch, out: Path, **options: Any) -> Fit:
    monkeypatch.setattr(fitting, "free_memory", lambda device: free * MIB + PROGRAM)
    return fit_of(config_of(), "transformer", CPU, memory_of, out, **options)


def test_flags_are_named_with_what_they_reach(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Needed are 8 x 100 for pictures, 300 for weights and optimizer, 100 for averages: 1200 MiB."""
    found = fit_with(900, monkeypatch, tmp_path)
    assert not found.fits
    assert found.total == 1200 * MIB + PROGRAM
    reached = {choice.flags: ((choice.total - PROGRAM) // MIB, choice.fits) for choice in found.choices}
    smaller = "--batch-size 5 --set training.transformer.accumulation=2"
    recomputed, rounded = (
        f"--set training.transformer.{it}" for it in ("checkpoint_activations=true", "precision=bf16")
    )
    without = "--set training.transformer.ema_decay=0"
    grid = "--set training.transformer.sample_every=0"
    together = f"{smaller} {recomputed} {rounded} {without} {grid}"
    assert reached == {
        together: (350, True),
        recomputed: (560, True),
        rounded: (800, True),
        smaller: (900, True),
        without: (1100, False),
    }, "a grid changes nothing here"
    with pytest.raises(ResourceError) as caught:
        found.require()
    said = str(caught.value)
    assert "stage transformer needs about 1.7 GiB of memory, cpu has 1.4 GiB free" in said
    assert f"{recomputed}: 1.0 GiB" in said
    assert without not in said.replace(together, ""), "what helps but not enough is not an answer"
    assert caught.value.exit_code == 3


def test_devices_are_added_until_it_fits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = fit_with(320, monkeypatch, tmp_path, may_shard=True)
    shared = [choice for choice in found.choices if "fsdp" in choice.flags]
    assert [(choice.flags, choice.fits) for choice in shared] == [("--strategy fsdp on 4 devices", True)]
    assert shared[0].total == 300 * MIB + PROGRAM
    assert not any("fsdp" in choice.flags for choice in fit_with(320, monkeypatch, tmp_path).choices)


def test_what_fits_needs_no_advice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = fit_with(1200, monkeypatch, tmp_path)
    assert found.fits
    assert found.choices == ()
    found.require()
    assert not fit_with(1200, monkeypatch, tmp_path, data=MIB).fits
    assert fit_with(1100, monkeypatch, tmp_path, returns=100 * MIB).fits


def test_a_full_disk_is_seen_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = fit_with(2000, monkeypatch, tmp_path / "runs" / "new")
    # weights, two averages of the optimizer, averaged weights: 16 bytes each; two last, one in the making, the best
    assert found.disk.checkpoint == 400 * MIB
    assert found.disk.kept == 4
    assert found.disk.models == 2 * 100 * MIB
    assert found.disk.free is not None
    full = replace(found, disk=replace(found.disk, free=1799 * MIB))
    assert not full.fits
    with pytest.raises(ResourceError, match=r"up to 1\.8 GiB on disk.*keep_last=1"):
        full.require()
    replace(found, disk=replace(found.disk, free=1800 * MIB)).require()


def test_every_value_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = fit_with(900, monkeypatch, tmp_path)
    facts = found.to_json()
    assert facts["fits"] is False
    assert facts["memory"]["total"] == found.total
    assert len(facts["choices"]) == 5
    memory, disk, less = found.tables()
    rows = {row[0]: row[1] for row in memory.rows}
    assert (rows["Trained parameters"], rows["Peak"], rows["Free"]) == (f"{25 * MIB:,}", "1.7 GiB", "1.4 GiB")
    assert "It does not fit" in rows
    assert disk.rows[1] == ["4 of them at most", "1.6 GiB"]
    assert len(less.rows) == 5


# -- dry runs ----------------------------------------------------------------------------------------------------------


def options_for(stage: str, data: str, out: Path, model: Path) -> TrainOptions:
    init = Init((str(model),)) if stage == "transformer" else Init()
    return TrainOptions(Resolved(config_of(), {}), stage, data, out, init, "cpu")


@pytest.mark.parametrize("stage", ["tokenizer", "transformer"])
def test_a_dry_run_leaves_nothing_behind(stage: str, tiny: Path, tmp_path: Path) -> None:
    data = "world:12"
    if stage == "transformer":
        data = str(tmp_path / "store")
        tokenize(TokenizeOptions("world:12", Path(data), str(tiny), device="cpu", dtype="fp32"), Silent())
    found = try_out(options_for(stage, data, tmp_path / "run", tiny), Silent())
    assert found.fits
    assert (found.stage, found.device) == (stage, "cpu")
    assert found.data > 0
    assert next(part["part"] for part in found.init) == stage
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage", ["tokenizer", "transformer"])
def test_a_doomed_training_is_refused_before_anything_is_built(
    stage: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = "world:12"
    if stage == "transformer":
        data = str(tmp_path / "store")
        tokenize(TokenizeOptions("world:12", Path(data), str(tiny), device="cpu", dtype="fp32"), Silent())
    monkeypatch.setattr(fitting, "free_memory", lambda device: PROGRAM)
    broken = tmp_path / "broken"
    save(broken)
    (broken / TOKENIZER_FILE).write_bytes(b"")  # would be met on the way
    options = replace(options_for(stage, data, tmp_path / "run", broken), init=Init((str(broken),)))
    for start in (train, lambda options, report: try_out(options, report).require()):
        with pytest.raises(ResourceError, match=rf"stage {stage} needs about .*--batch-size 1 --set"):
            start(options, Silent())
    assert not (tmp_path / "run").exists()


def test_the_command_shows_the_table_and_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["train", "--preset", "demo", "--data", "world:20", "--out", str(tmp_path / "run"), "--dry-run"]
    assert main(line) == 0
    assert "It fits" in capsys.readouterr().out
    monkeypatch.setattr(fitting, "free_memory", lambda device: PROGRAM)
    assert main([*line, "--json"]) == 3
    said = capsys.readouterr()
    assert '"fits": false' in said.out
    assert "error: stage tokenizer needs about" in said.err
    assert not (tmp_path / "run").exists()


def test_a_dry_run_of_a_subject_draws_no_class_pictures(tiny: Path, tmp_path: Path) -> None:
    options = SubjectOptions(photos(tmp_path / "photos"), "dog", model=str(tiny), out=tmp_path / "run", device="cpu")
    found = try_out_subject(options, Silent())
    assert found.fits
    assert found.stage == "subject"
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "home").exists()


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    assert device._left_of_group(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 150\n")
    assert device._left_of_group(tmp_path) == 450
    (tmp_path / "memory.max").write_text("max\n")
    assert device._left_of_group(tmp_path) is None
