"""pipeline.sh, which uses bitgen as a shell script does; and what a script gets wrong."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import forked
import pytest

from bitgen_cli.__main__ import main

SCRIPT = Path(__file__).with_name("pipeline.sh")


def test_bitgen_in_a_pipeline(tmp_path: Path) -> None:
    command = ["bash", SCRIPT, sys.executable]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert (done.returncode, done.stdout) == (0, "well\n"), done.stderr


def test_the_same_again_draws_nothing_and_nothing_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process: another one for each call takes longer than what is asked of it."""
    monkeypatch.chdir(tmp_path)
    lines, found = b'a red dog\n{"prompt": 3}\na cat on the beach\n', []
    for _ in range(2):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines)))
        assert main(["sample", "--prompts", "-", "--seed", "1", "--output", "out/", "--json"]) == 4
        shown = capsys.readouterr()
        assert "line 2: prompt cannot be '3'" in shown.err
        told = json.loads(shown.out)
        found.append((told["kept"], len(told["pictures"])))
    assert found == [(0, 2), (2, 0)]
    before = Path("out/a-red-dog-1.png").read_bytes()
    assert main(["sample", "a tree", "--output", "out/a-red-dog-1.png"]) == 2
    assert "a-red-dog-1.png is there already" in capsys.readouterr().err
    assert Path("out/a-red-dog-1.png").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["a dog", "--json"], "--json writes there too"),
        (["a dog", "-n", "2"], "one picture to stdout"),
        (["a dog", "a cat"], "one picture to stdout"),
        (["a dog", "--grid"], "one picture to stdout"),
        (["--prompts", "p.jsonl"], "one picture to stdout"),
    ],
)
def test_stdout_takes_one_picture_alone(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.jsonl").write_text('{"prompt": "a dog", "output": "x.png"}\n')
    assert main(["sample", *arguments, "--output", "-"]) == 2
    shown = capsys.readouterr()
    assert says in shown.err
    assert shown.out == ""
    assert [file.name for file in tmp_path.iterdir()] == ["p.jsonl"]


def test_a_terminal_gets_no_picture(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    done = forked.bitgen(tmp_path, "sample", "a dog", "--output", "-", stdout=Path(os.ttyname(theirs)))
    os.close(theirs)
    os.close(ours)
    assert done.returncode == 2
    assert "which a terminal cannot show" in done.stderr
