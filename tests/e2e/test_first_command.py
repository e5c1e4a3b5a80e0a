"""What a newcomer types first, in a fresh process and folder; mistakes, in processes that have torch already."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import forked
import pytest
from PIL import Image

from bitgen_cli.engine.model_folder import find_model


def bitgen(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bitgen_cli", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240, check=False)


def test_the_first_command_ends_with_a_picture(tmp_path: Path) -> None:
    done = bitgen(tmp_path, "sample", "a red dog on the moon")
    assert done.returncode == 0, done.stderr
    (picture,) = tmp_path.glob("*.png")
    assert done.stdout.strip() == picture.name
    with Image.open(picture) as image:
        assert image.size == (64, 64)
        assert len(image.getcolors(4096) or []) > 100  # not a blank sheet


def test_a_picture_tells_how_it_was_made(tmp_path: Path) -> None:
    done = bitgen(tmp_path, "sample", "a blue car", "--seed", "3", "--json", "-o", "car.png")
    assert done.returncode == 0, done.stderr
    (told,) = json.loads(done.stdout)["pictures"]
    assert told["seed"] == 3
    shown = forked.bitgen(tmp_path, "inspect-config", "car.png", "--json")
    assert json.loads(shown.stdout)["recipe"]["prompt"] == "a blue car"


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["sample", ""], 2, "empty"),
        (["sample", "a dog", "--model", "nowhere"], 4, "no model at nowhere"),
        (["sample", "a dog", "--device", "cuda:77"], 3, "does not exist"),
        (["inspect-config", "32bits"], 2, "32bit"),
        (["tokenize", "empty", "store"], 4, "no pictures"),
        (["resume", "nowhere"], 4, "nowhere"),
    ],
)
def test_mistakes_are_one_line_and_a_code(tmp_path: Path, arguments: list[str], code: int, says: str) -> None:
    (tmp_path / "empty").mkdir()
    done = forked.bitgen(tmp_path, *arguments)
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_the_built_in_model_is_small() -> None:
    files = [file for file in find_model("demo").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 12_000_000
