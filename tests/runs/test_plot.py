"""`bitgen inspect-config RUN --plot FILE`: what is drawn of which run, in which formats, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bitgen_cli.__main__ import main
from bitgen_cli.errors import InputError, UsageError
from bitgen_cli.presets import resolve
from bitgen_cli.report import Silent
from bitgen_cli.runs import plot as module
from bitgen_cli.runs.measurements import Series, per_scale, read_measurements
from bitgen_cli.runs.plot import plot

TRANSFORMER = [
    *({"step": step, "loss": 1 / step, **{f"loss/{k}": 0.6 - k / 100 for k in range(4)},
       **{f"bit_accuracy/{k}": 0.6 + k / 100 for k in range(4)}, "grad_norm": 0.5, "learning_rate": 1e-3,
       "images_per_second": 9.0, "epoch": step / 10} for step in range(1, 71)),
    {"step": 70, "val_loss": 0.6, "val_loss/0": 0.5, "val_bit_accuracy/0": 0.6},
]  # fmt: skip
TOKENIZER = [
    {"step": 1, "loss": 0.7, "l1": 0.6, "structure": 0.9, "bit_usage": 0.5, "grad_norm": 0.0, "learning_rate": 1e-3},
    {"step": 1, "val_loss": 0.7, "val_psnr": 12.0, "val_ssim": 0.4, "val_bit_usage": 0.6},
]
SUBJECT = [
    {"step": 1, "loss": 0.7, "subject_loss": 0.6, "bit_accuracy/0": 0.5, "learning_rate": 1e-3},
    {"step": 2, "loss": 0.6, "subject_loss": 0.5, "prior_loss": 0.1, "bit_accuracy/0": 0.75, "learning_rate": 1e-3},
    {"step": 2, "val_loss": 0.6, "val_subject_loss": 0.5, "drift_class_leak": 0.1, "drift_class_agreement": 0.9},
]
SHORT = [{"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.6}]
"""Enough where it does not matter what is drawn: a panel takes a tenth of a second."""


def run(path: Path, lines: list[dict[str, float]], **changes: Any) -> Path:
    path.mkdir()
    config = resolve("demo", environment={}).config.model_dump(mode="json")
    described = {"format": 1, "verb": "train", "stage": "transformer", "config": config, **changes}
    (path / "config.json").write_text(json.dumps(described))
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def texts(file: Path) -> list[str]:
    """What is written in an SVG: matplotlib leaves it as comments beside the letters' outlines."""
    return [text.strip() for text in re.findall(r"<!-- (.*?) -->", file.read_text())]


def test_a_transformer_shows_losses_and_bits_of_every_scale(tmp_path: Path) -> None:
    result = plot([run(tmp_path / "run", TRANSFORMER)], tmp_path / "curves.svg", Silent())
    assert result.panels == [
        "loss", "loss per scale", "bit accuracy per scale", "norm of the gradient", "learning rate"
    ]  # fmt: skip
    written = texts(tmp_path / "curves.svg")
    assert written.count("chance") == 3
    assert written.count("held out") == 3
    assert {"run: transformer", "0 (1x1)", "3 (8x8)", "training"} <= set(written)


def test_a_tokenizer_shows_its_reconstructions_and_parts(tmp_path: Path) -> None:
    result = plot([run(tmp_path / "run", TOKENIZER, stage="tokenizer")], tmp_path / "curves.svg", Silent())
    assert result.panels == [
        "loss", "parts of the loss", "bits: how unsure, how evenly used", "PSNR in dB, held out", "SSIM, held out",
        "norm of the gradient", "learning rate",
    ]  # fmt: skip
    assert "chance" not in texts(tmp_path / "curves.svg")


def test_numbers_of_bits_share_a_panel(tmp_path: Path) -> None:
    counts = (16, 32, 64)
    lines = [
        {"step": 1, "loss": 0.7, **{f"l1_{bits}_bits": 0.5 for bits in counts}},
        {"step": 1, "val_loss": 0.7, **{f"val_psnr_{bits}_bits": 20.0 + bits / 32 for bits in counts}},
    ]
    result = plot([run(tmp_path / "run", lines, stage="tokenizer")], tmp_path / "curves.svg", Silent())
    assert result.panels == ["loss", "L1", "PSNR in dB, held out"]
    written = texts(tmp_path / "curves.svg")
    assert [written.count(f"{bits} bits") for bits in counts] == [2, 2, 2]


def test_a_subject_shows_its_drift(tmp_path: Path) -> None:
    header = {"token": "[V]", "class_word": "dog"}
    folder = run(tmp_path / "run", SUBJECT, verb="finetune-subject", header=header)
    result = plot([folder], tmp_path / "curves.svg", Silent())
    assert result.panels == [
        "loss", "bit accuracy per scale", "photos and class", "drift from the base model", "learning rate"
    ]  # fmt: skip
    assert {"run: [V] dog", "class leak", "prior loss"} <= set(texts(tmp_path / "curves.svg"))


def test_a_measurement_nobody_knows_gets_a_panel_and_its_name_is_taken_literally(tmp_path: Path) -> None:
    lines = [{"step": 1, "loss": 0.5, "$\\frac": 1.0, "_hidden": 2.0, "val_new/16": 3.0, "bad": float("nan")}]
    result = plot([run(tmp_path / "run", lines)], tmp_path / "curves.svg", Silent())
    assert result.panels == ["loss", "val new per scale", "$\\frac", " hidden", "bad"]
    assert "$\\frac" in texts(tmp_path / "curves.svg")


def test_so_many_measurements_are_not_all_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_PANELS", 2)
    lines = [{"step": 1, **{f"m{number}": 1.0 for number in range(6)}}]
    report = Silent()
    result = plot([run(tmp_path / "run", lines)], tmp_path / "curves.png", report)
    assert result.panels == ["m0", "m1"]
    assert report.notices == ["4 measurements are not drawn: m2, m3, m4 ..."]


def test_the_loss_of_summed_bits_has_no_line_of_chance(tmp_path: Path) -> None:
    config = resolve("demo", environment={}, overrides=["training.transformer.bit_loss=sum"]).config
    lines = [{"step": 1, "loss/0": 5.0, "bit_accuracy/0": 0.5}]
    plot([run(tmp_path / "run", lines, config=config.model_dump(mode="json"))], tmp_path / "curves.svg", Silent())
    assert texts(tmp_path / "curves.svg").count("chance") == 1, "that of the bit accuracy"


def test_a_run_of_another_version_is_drawn_all_the_same(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", [{"step": 1, "loss/0": 5.0}], config={"unknown": 1})
    assert plot([folder], tmp_path / "curves.png", Silent()).panels == ["loss per scale"]


def test_several_runs_are_compared(tmp_path: Path) -> None:
    runs = [run(tmp_path / name, TRANSFORMER) for name in ("a", "b")]
    result = plot(runs, tmp_path / "curves.svg", Silent())
    assert result.panels == [
        "loss", "loss, held out", "bit accuracy, mean of the scales", "bit accuracy, mean of the scales, held out",
        "learning rate",
    ]  # fmt: skip
    assert {"a", "b"} <= set(texts(tmp_path / "curves.svg"))


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_the_suffix_says_the_format(suffix: str, start: bytes, tmp_path: Path) -> None:
    file = tmp_path / "new folder" / f"curves{suffix}"
    folder = run(tmp_path / "run", SHORT)
    plot([folder], file, Silent())
    first = file.read_bytes()
    assert first.startswith(start)
    plot([folder], file, Silent())
    assert file.read_bytes() == first, "the same picture each time, over the one that was named"
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_the_picture_is_large_enough_to_read(tmp_path: Path) -> None:
    plot([run(tmp_path / "run", SHORT)], tmp_path / "curves.png", Silent())
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width >= 600
        assert len(picture.convert("RGB").getcolors(2**20)) > 50


def test_the_command_prints_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, file = run(tmp_path / "run", SHORT), tmp_path / "curves.png"
    assert main(["inspect-config", str(folder), "--plot", str(file)]) == 0
    assert capsys.readouterr().out == f"{file}\n"
    assert main(["inspect-config", str(folder), str(folder), "--plot", str(file), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["plot"], shown["runs"]) == (str(file), [str(folder)] * 2)
    assert main(["inspect-config", str(folder), str(folder)]) == 2
    assert "--plot" in capsys.readouterr().err
    assert main(["inspect-config", str(folder), "--plot", str(file), "--set", "sampling.cfg=1"]) == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "metrics.jsonl holds no measurements yet"),
        ('{"step": 1, "loss": 0.5}\n{"step": 2, "lo\n{"step": 3}\n', "metrics.jsonl, line 2: not a measurement"),
        ('{"step": "one", "loss": 0.5}\n', "line 1: not a measurement"),
        ('{"loss": 0.5}\n', "line 1: not a measurement"),
        ('{"step": 1, "loss": "low"}\n', "line 1: not a measurement"),
        ('{"step": 1, "loss": [1]}\n', "line 1: not a measurement"),
        ("[1, 2]\n", "line 1: not a measurement"),
        ("[" * 100_000 + "\n", "line 1: not a measurement"),
        ('{"step": 1, "loss": 1' + "0" * 400 + "}\n", "line 1: not a measurement"),
    ],
)
def test_damaged_measurements_are_one_clear_line(text: str, said: str, tmp_path: Path) -> None:
    folder = run(tmp_path / "run", [])
    (folder / "metrics.jsonl").write_text(text)
    with pytest.raises(InputError) as caught:
        plot([folder], tmp_path / "curves.png", Silent())
    assert said in str(caught.value)
    assert not (tmp_path / "curves.png").exists()


def test_what_is_no_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run(tmp_path / "run", TOKENIZER)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for target in (tmp_path / "none", tmp_path / "model", Path("demo")):
        with pytest.raises(InputError, match="no run"):
            plot([target], tmp_path / "curves.png", Silent())
    (folder / "metrics.jsonl").rename(folder / "lost.jsonl")
    with pytest.raises(InputError, match=re.escape("metrics.jsonl: No such file")):
        plot([folder], tmp_path / "curves.png", Silent())
    with pytest.raises(UsageError, match=re.escape("must end in .png, .svg, .pdf")):
        plot([folder], tmp_path / "curves.gif", Silent())
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UsageError, match="is a folder"):
        plot([folder], tmp_path / "folder.png", Silent())
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=re.escape('pip install "bitgen[plot]"')):
        plot([folder], tmp_path / "curves.png", Silent())


def test_measurements_are_series_by_name(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", [])
    lines = ['{"step": 1, "loss": 0.5, "loss/10": 1, "loss/2": 2}', '{"step": 1, "val_loss": NaN}', '{"step": 2, "los']
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    found = read_measurements(folder)
    assert list(found) == ["loss", "loss/10", "loss/2", "val_loss"]
    assert found["loss"] == Series([1], [0.5])
    assert list(per_scale(found)["loss"]) == [2, 10]
