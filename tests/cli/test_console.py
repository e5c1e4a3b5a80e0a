"""What the terminal shows, and what a file gets instead."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from bitgen_cli.console.pictures import preview
from bitgen_cli.console.progress import LINE_EVERY, ConsoleReport, _Bar, _CountColumn, listening
from bitgen_cli.console.tables import plain_table
from bitgen_cli.console.training_panel import TrainingPanel, accuracy_bar, sparks
from bitgen_cli.console.words import duration, pace, per_scale
from bitgen_cli.report import Table

Capture = pytest.CaptureFixture[str]

MEASURED = {
    "loss": 0.5,
    "bit_accuracy/0": 0.9,
    "bit_accuracy/10": 0.5,
    "bit_accuracy/2": 0.7,
    "learning_rate": 0.0015,
    "images_per_second": 312.34,
    "seconds_left": 3700.0,
    "epoch": 1.5,
}


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0.0 s"),
        (9.94, "9.9 s"),
        (59.4, "59 s"),
        (60, "1 min"),
        (185, "3 min 5 s"),
        (3700, "1 h 1 min"),
        (90000, "1 d 1 h"),
        (float("nan"), "?"),
        (float("inf"), "?"),
        (-1, "?"),
    ],
)
def test_durations_are_said_in_two_units(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_sparks_show_the_course() -> None:
    assert sparks([1.0, 0.5, 0.0]) == "█▅▁"
    assert sparks([2.0, 2.0]) == "▁▁"
    assert sparks([float("nan"), 1.0, float("inf"), 0.0]) == "█▁"
    assert sparks([]) == ""


def test_scales_come_in_the_order_of_their_numbers() -> None:
    assert per_scale(MEASURED, "bit_accuracy/") == [0.9, 0.7, 0.5]
    assert per_scale(MEASURED, "val_bit_accuracy/") == []


def test_an_accuracy_bar_marks_chance() -> None:
    chance, half, full = accuracy_bar(0.5), accuracy_bar(0.75), accuracy_bar(1.0)
    assert chance.plain == "━" * 12 + "│" + " " * 11
    assert half.plain == "━" * 12 + "│" + "━" * 5 + " " * 6
    assert full.plain == "━" * 12 + "│" + "━" * 11
    assert {span.style for span in chance.spans} == {"red", "bold"}
    assert {span.style for span in half.spans} == {"green", "bold"}


def test_a_table_is_aligned_with_spaces() -> None:
    table = Table("scales", ["scale", "size"], [["1", "1x1"], ["10", "[16]x16"]])
    assert plain_table(table) == "scales\nscale  size\n1      1x1\n10     [16]x16"
    assert plain_table(Table("none", ["a", "b"], [])) == "none\na  b"
    assert plain_table(Table("", ["k"], [["a\nerror: \x1b[2J"]])) == "\nk\na\\nerror: \\x1b[2J"


def test_the_training_panel_shows_every_scale_and_keeps_what_was_held_out() -> None:
    panel = TrainingPanel()
    panel.update(10, 200, {"loss": 0.7} | MEASURED)
    panel.update(10, 200, {"val_loss": 0.25, "val_bit_accuracy/0": 0.625, "val_loss/0": 0.3})
    panel.update(20, 200, MEASURED)
    file = io.StringIO()
    Console(file=file, width=100).print(panel)
    shown = file.getvalue()
    assert "step 20 of 200" in shown
    assert re.search(r"scale 0 +━{12}│━{9} +90\.0 % +62\.5 %", shown)
    assert re.search(r"scale 2 +━{12}│ +50\.0 %", shown)
    assert re.search(r"held-out loss +0\.2500", shown)
    assert re.search(r"learning rate +1\.50e-03", shown)
    assert "312.3 img/s" in shown
    assert "1 h 1 min left" in shown


def test_a_file_gets_a_line_of_training_now_and_then(capsys: Capture) -> None:
    clock = Clock()
    with ConsoleReport(clock) as report:
        for step in range(1, 6):
            report.metrics(step, 5, MEASURED)
            clock.now += LINE_EVERY * 0.4
        report.metrics(5, 5, {"val_loss": 0.25, "val_bit_accuracy/0": 0.625})
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 1/5", "step 4/5", "step 5/5", "step 5/5"]
    measured = "loss 0.5000, learning rate 1.50e-03, bit accuracy 90.0 70.0 50.0 %"
    assert lines[0] == f"step 1/5: {measured}, 312.3 img/s, 1 h 1 min left"
    assert lines[-1] == "step 5/5: held-out loss 0.2500, held-out bit accuracy 62.5 %"


def test_a_file_gets_a_line_of_a_long_task_now_and_then(capsys: Capture) -> None:
    clock = Clock()
    with ConsoleReport(clock) as report, report.task("tokenize", 100) as task:
        task.advance(40)
        for _ in range(50):
            clock.now += LINE_EVERY / 20
            task.status("dog.png")
            task.advance()
    assert capsys.readouterr().err.splitlines() == [
        "tokenize: 60/100, 2.0/s, 20 s left, dog.png",
        "tokenize: 80/100, 2.0/s, 10 s left, dog.png",
        "tokenize: 90/100, 2.0/s, 5.0 s left, dog.png",
    ]


def test_a_file_is_told_of_a_slow_unit_before_it_is_finished(capsys: Capture) -> None:
    clock = Clock()
    with ConsoleReport(clock) as report, report.task("drawing", 2) as task:
        for scale in range(1, 5):
            clock.now += LINE_EVERY * 0.75
            task.status(f"scale {scale} of 4")
            task.ahead(scale / 2)
        clock.now += LINE_EVERY
        task.advance()
        task.advance()
    assert capsys.readouterr().err.splitlines() == [
        "drawing: 0/2, 15 s each, 15 s left, scale 2 of 4",
        "drawing: 0/2, 15 s each, scale 4 of 4",
        "drawing: 1/2, 20 s each, scale 4 of 4",
        "drawing: 2/2, 20 s each, scale 4 of 4",
    ]


def test_a_bar_counts_what_is_finished_and_is_ahead_of_it() -> None:
    progress = Progress()
    bar = _Bar(progress, progress.add_task("drawing", total=4, done=0.0, status=""))
    shown = []
    for amount in (0.75, 1.5, None, None):
        bar.advance() if amount is None else bar.ahead(amount)
        (task,) = progress.tasks
        shown.append((_CountColumn().render(task).plain, task.completed))
    assert shown == [("0/4", 0.75), ("0/4", 1.5), ("1/4", 1.5), ("2/4", 2)]


@pytest.mark.parametrize(("speed", "said"), [(12.34, "12.3/s"), (0.1, "0.1/s"), (0.05, "20 s each"), (0, "? each")])
def test_a_slow_pace_is_told_as_the_time_of_each(speed: float, said: str) -> None:
    assert pace(speed) == said


def test_short_tasks_say_nothing_in_a_file(capsys: Capture) -> None:
    with ConsoleReport(Clock()) as report:
        with report.task("pictures", 2) as task:
            task.advance(2)
        with report.task("unknown", None) as task:
            task.advance()
    assert capsys.readouterr().err == ""


def test_notices_are_whole_lines_and_are_taken_literally(capsys: Capture) -> None:
    with ConsoleReport() as report:
        report.notice("[red]" + "long " * 60)
        report.warning("skipped: a.jpg")
    shown = capsys.readouterr()
    assert shown.err == "note: [red]" + "long " * 60 + "\nwarning: skipped: a.jpg\n"
    assert shown.out == ""


def test_a_file_gets_no_preview(tmp_path: Path, capsys: Capture) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    preview([tmp_path / "red.png"])
    assert capsys.readouterr().out == ""


def on_terminal(program: str, *arguments: str, **environment: str) -> str:
    """What a program writes to a terminal of 100 x 40 characters, colours in 24 bits."""
    outer, inner = pty.openpty()
    colours = {"TERM": "xterm-256color", "COLORTERM": "truecolor", "COLUMNS": "100", "LINES": "40"}
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdin=inner,
        stdout=inner,
        stderr=inner,
        env=kept | colours | environment,
    )
    os.close(inner)
    shown, end = b"", time.monotonic() + 60
    while time.monotonic() < end:
        if select.select([outer], [], [], 0.1)[0]:
            try:
                shown += os.read(outer, 65536)
            except OSError:  # Linux: the other end is closed
                break
        elif process.poll() is not None:
            break
    os.close(outer)
    assert process.wait(timeout=60) == 0, shown.decode()
    return shown.decode()


PREVIEW = (
    "import sys, pathlib; from bitgen_cli.console.pictures import preview; preview([*map(pathlib.Path, sys.argv[1:])])"
)


def test_a_terminal_shows_pictures_beside_each_other(tmp_path: Path) -> None:
    for name, colour in {"red": (255, 0, 0), "blue": (0, 0, 255)}.items():
        Image.new("RGB", (64, 32), colour).save(tmp_path / f"{name}.png")
    shown = on_terminal(PREVIEW, str(tmp_path / "red.png"), str(tmp_path / "blue.png"))
    rows = shown.splitlines()
    assert len(rows) == 12  # 48 columns wide, half as high, two pixels a character
    for row in rows:
        assert row.count("▀") == 96
        assert "38;2;255;0;0" in row
        assert "48;2;0;0;255" in row
        assert len(re.sub(r"\x1b\[[\d;]*m", "", row)) <= 100


def test_a_preview_puts_two_pixels_into_a_character(tmp_path: Path) -> None:
    image = Image.new("RGB", (48, 48), "red")
    image.paste((0, 255, 0), (0, 1, 48, 2))
    image.save(tmp_path / "two.png")
    first = on_terminal(PREVIEW, str(tmp_path / "two.png")).splitlines()[0]
    assert re.search(r"\x1b\[38;2;255;0;0;48;2;0;255;0m▀", first)


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_a_terminal_without_colours_gets_no_preview(environment: dict[str, str], tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    assert on_terminal(PREVIEW, str(tmp_path / "red.png"), **environment) == ""


PROGRESS = """
import time
from bitgen_cli.console.progress import ConsoleReport
with ConsoleReport() as report:
    with report.task("pictures", 2) as task, report.task("scales", 3) as inner:
        inner.status("4x4")
        task.advance()
        report.notice("told above the bars")
        time.sleep(0.2)
    if TRAINING:
        report.metrics(3, 4, {"loss": 0.5, "bit_accuracy/0": 0.75})
print("done")
"""


@pytest.mark.parametrize("training", [False, True])
def test_bars_are_live_and_gone_at_the_end(training: bool) -> None:
    shown = on_terminal(PROGRESS.replace("TRAINING", str(training)))
    assert "pictures" in shown
    assert "1/2" in shown
    assert "4x4" in shown
    assert "note: " in shown
    assert shown.index("\x1b[?25l") < shown.rindex("\x1b[?25h")  # the cursor is hidden, and shown again
    after = shown[shown.rindex("\x1b[?25h") :]
    assert "done" in after
    assert ("scale 0" in shown) == training


def test_of_several_processes_the_first_speaks_and_those_with_a_share_of_their_own_warn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    for apart, said in ((False, ""), (True, "warning: rank 2: skipped a.png\n")):
        with listening(apart=apart) as report:
            report.notice("reading")
            report.warning("skipped a.png")
            with report.task("tokenize", 3) as task:
                task.advance()
        shown = capsys.readouterr()
        assert (shown.out, shown.err) == ("", said)
