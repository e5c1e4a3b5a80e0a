"""Every bitgen command of README.md and docs/ runs as it stands there, those of a page one after the other."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from bitgen_cli.__main__ import main

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
GENERATED = "reference.md"
"""Its examples stand for themselves: tests/cli/test_examples.py sees to them."""
SMALLER = {"world:40000": "world:24", "--steps 500": "--steps 1", "--count 100": "--count 4"}
"""The only changes to a command: fewer pictures and steps, so that nobody waits for them."""
LESS_WORK = {
    "BITGEN_TRAINING__TOKENIZER__STEPS": "2",
    "BITGEN_TRAINING__TRANSFORMER__STEPS": "2",
    "BITGEN_TRAINING__TOKENIZER__BATCH_SIZE": "4",
    "BITGEN_TRAINING__TRANSFORMER__BATCH_SIZE": "4",
    "BITGEN_TRAINING__TOKENIZER__VALIDATION_IMAGES": "4",
    "BITGEN_TRAINING__TRANSFORMER__VALIDATION_IMAGES": "4",
    # bfloat16 takes many times as long on a CPU that has no arithmetic for it
    "BITGEN_TRAINING__TOKENIZER__PRECISION": "fp32",
    "BITGEN_TRAINING__TRANSFORMER__PRECISION": "fp32",
    "BITGEN_TRAINING__SUBJECT__STEPS": "2",
    "BITGEN_TRAINING__SUBJECT__VIEWS": "2",
    "BITGEN_TRAINING__SUBJECT__PRIOR_IMAGES": "6",
    "BITGEN_TRAINING__SUBJECT__OTHER_IMAGES": "6",
    "BITGEN_TRAINING__SUBJECT__VALIDATION_IMAGES": "2",
}


def commands(page: Path) -> list[str]:
    """The lines of the fenced blocks that begin with bitgen, without their comments."""
    blocks = re.findall(r"^```\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines = [line for line in lines if line.startswith("bitgen ")]
    return [re.sub(r"\s+# .*", "", line) for line in lines]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the pages take for granted: captioned photos, COCO, tars, a prompt file with the line it quotes."""
    (tmp_path / "photos").mkdir()
    for number in range(4):
        Image.new("RGB", (80, 60), (60 * number, 90, 120)).save(tmp_path / "photos" / f"{number}.jpg")
        (tmp_path / "photos" / f"{number}.txt").write_text(f"photo number {number}")
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    shutil.copytree(tmp_path / "photos", tmp_path / "coco" / "train2017")
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in range(4)]
    notes = [{"image_id": number % 4, "caption": f"caption {number}"} for number in range(8)]
    listing = tmp_path / "coco" / "annotations" / "captions_train2017.json"
    listing.write_text(json.dumps({"images": images, "annotations": notes}))
    (tmp_path / "shards").mkdir()
    for shard in range(2):
        with tarfile.open(tmp_path / "shards" / f"{shard:05d}.tar", "w") as tar:
            for number in (2 * shard, 2 * shard + 1):
                (tmp_path / f"{number}.json").write_text(json.dumps({"caption": f"photo number {number}"}))
                tar.add(tmp_path / "photos" / f"{number}.jpg", f"{number}.jpg")
                tar.add(tmp_path / f"{number}.json", f"{number}.json")
    (quoted,) = re.findall(r"`(\{\"prompt\".*\})`", README.read_text())
    (tmp_path / "prompts.jsonl").write_text(quoted + "\n")
    return tmp_path


def pages() -> list[Path]:
    """Those that have commands."""
    found = [README, *sorted((ROOT / "docs").glob("*.md"))]
    return [page for page in found if page.name != GENERATED and commands(page)]


def test_the_readme_shows_every_command() -> None:
    assert {line.split()[1] for line in commands(README)} == {
        "sample", "tokenize", "train", "resume", "inspect-config", "finetune-subject", "gen-priors"
    }  # fmt: skip


@pytest.mark.usefixtures("estimated_once")
@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_the_commands_of_a_page_run(
    page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    for name, value in (LESS_WORK | {"BITGEN_HOME": str(folder / "home")}).items():
        monkeypatch.setenv(name, value)
    for line in commands(page):
        shorter = line
        for long, short in SMALLER.items():
            shorter = shorter.replace(long, short)
        # in this process: starting another one for each line takes longer than the commands themselves
        _, *words = shlex.split(shorter)
        words, target = (words[:-2], words[-1]) if ">" in words else (words, None)
        code = main(words)
        said = capsys.readouterr()
        assert code == 0, f"{line}\n{said.err}"
        if target is not None:
            Path(target).write_text(said.out)
