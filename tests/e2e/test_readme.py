"""Every bitgen command of README.md runs as it stands there, one after the other in one folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

README = Path(__file__).parents[2] / "README.md"
SMALLER = {"world:40000": "world:300", "--steps 500": "--steps 1", "--count 100": "--count 6"}
"""The only changes to a command: fewer pictures and steps, so that nobody waits for them."""
LESS_WORK = {
    "BITGEN_TRAINING__TOKENIZER__STEPS": "2",
    "BITGEN_TRAINING__TRANSFORMER__STEPS": "2",
    "BITGEN_TRAINING__TOKENIZER__VALIDATION_IMAGES": "16",
    "BITGEN_TRAINING__TRANSFORMER__VALIDATION_IMAGES": "16",
    # bfloat16 takes many times as long on a CPU that has no arithmetic for it
    "BITGEN_TRAINING__TOKENIZER__PRECISION": "fp32",
    "BITGEN_TRAINING__TRANSFORMER__PRECISION": "fp32",
    "BITGEN_TRAINING__SUBJECT__STEPS": "2",
    "BITGEN_TRAINING__SUBJECT__PRIOR_IMAGES": "6",
    "BITGEN_TRAINING__SUBJECT__VALIDATION_IMAGES": "2",
}


def commands() -> list[str]:
    """The lines of the fenced blocks that begin with bitgen, without their comments."""
    blocks = re.findall(r"^```\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("bitgen ")]
    return [re.sub(r"\s+# .*", "", line) for line in lines]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the README takes for granted: photos with captions, and a prompt file with the line it quotes."""
    (tmp_path / "photos").mkdir()
    for number in range(4):
        Image.new("RGB", (80, 60), (60 * number, 90, 120)).save(tmp_path / "photos" / f"{number}.jpg")
        (tmp_path / "photos" / f"{number}.txt").write_text(f"photo number {number}")
    (quoted,) = re.findall(r"`(\{\"prompt\".*\})`", README.read_text())
    (tmp_path / "prompts.jsonl").write_text(quoted + "\n")
    return tmp_path


def test_the_commands_of_the_readme_run(folder: Path) -> None:
    found = commands()
    assert {line.split()[1] for line in found} == {
        "sample", "tokenize", "train", "resume", "inspect-config", "finetune-subject", "gen-priors"
    }  # fmt: skip
    for line in found:
        for long, short in SMALLER.items():
            line = line.replace(long, short)
        command = line.replace("bitgen", f"{sys.executable} -m bitgen_cli", 1)
        done = subprocess.run(
            command,
            shell=True,  # our own lines, with quotes and redirection
            cwd=folder,
            env=os.environ | LESS_WORK | {"BITGEN_HOME": str(folder / "home")},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stderr}"
