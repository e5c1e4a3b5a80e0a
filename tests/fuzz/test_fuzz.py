"""Every reader against a few hostile inputs, always the same ones; `python -m tests.fuzz` tries as many as you like."""

from __future__ import annotations

import json
from pathlib import Path

import hostile
import pytest
from guard import SECRET, Box, attempt
from hypothesis import HealthCheck, Phase, given, settings
from readers import READERS, Prepared


@pytest.fixture
def box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Box:
    (tmp_path / "box").mkdir()
    box = Box(tmp_path / "box")
    monkeypatch.chdir(box.here)
    return box


@pytest.mark.parametrize("name", [name for name, reader in READERS.items() if reader.short])
def test_hostile_inputs_are_read_or_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "parquet":
        pytest.importorskip("pyarrow")
    (tmp_path / "box").mkdir()
    prepared = Prepared.of(READERS[name], tmp_path / "box")
    monkeypatch.chdir(prepared.box.here)
    refused = []

    @settings(
        max_examples=READERS[name].short,
        database=None,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(prepared.inputs())
    def search(content: bytes) -> None:
        outcome = prepared.attempt(content)
        assert outcome.failure is None, f"{outcome.failure} of {content!r:.500}"
        refused.append(outcome.refused)

    search()
    assert any(refused) or name in ("text cache", "sweep state")


# -- the watch itself --------------------------------------------------------------------------------------------------


def _writes_beside(file: Path) -> None:
    (file.parent.parent / "escaped").write_text("x")


def _reads_the_secret(file: Path) -> None:
    (file.parent / ".." / SECRET).read_text()


def _runs_a_program(file: Path) -> None:
    import subprocess

    subprocess.run(["true"], check=True)


def _prints_an_escape(file: Path) -> object:
    class Result:
        sections = ()

        @staticmethod
        def to_json() -> dict[str, str]:
            print("\x1b[2J")
            return {}

    return Result()


def _breaks(file: Path) -> None:
    raise KeyError("x")


@pytest.mark.parametrize(
    ("read", "told"),
    [
        (_writes_beside, "writes"),
        (_reads_the_secret, "reads"),
        (_runs_a_program, "subprocess.Popen"),
        (_prints_an_escape, "to the terminal"),
        (_breaks, "KeyError"),
    ],
)
def test_the_watch_sees(read: object, told: str, box: Box) -> None:
    outcome = attempt(read, box.data / "x", b"", box)  # type: ignore[arg-type]
    assert outcome.failure is not None
    assert told in outcome.failure
    assert not (box.folder / "escaped").exists()


def test_pickles_that_want_to_run_are_refused_and_run_nothing(box: Box) -> None:
    reader = READERS["weights.pth"]
    for payload in hostile.PICKLES:
        outcome = attempt(reader.read, box.data / reader.file, payload, box)
        assert outcome.failure is None
        assert outcome.refused


@pytest.mark.parametrize("name", ["recipe", "subject"])
def test_what_strangers_write_cannot_command_the_terminal(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from bitgen_cli.__main__ import main

    (tmp_path / "box").mkdir()
    prepared = Prepared.of(READERS[name], tmp_path / "box")
    command = "\x1b]0;owned\x07\x1b[2J\u202e\x9b31m [red]"
    told = json.dumps({"prompt": command, command: command, "seed": 3})
    if name == "recipe":
        seed = prepared.seeds[1]
        content = seed[:33] + hostile.chunk(b"tEXt", b"bitgen\0" + told.encode()) + seed[33:]
    else:
        seed = prepared.seeds[0]
        length = int.from_bytes(seed[:8], "little")
        header = json.loads(seed[8 : 8 + length])
        stored = json.loads(header["__metadata__"]["bitgen_subject"])
        stored |= {"recipe": json.loads(told), "base_name": command, "class_word": command}
        header["__metadata__"]["bitgen_subject"] = json.dumps(stored)
        written = json.dumps(header).encode()
        content = len(written).to_bytes(8, "little") + written + seed[8 + length :]
    file = prepared.file.with_name(f"\x1b[2J{prepared.file.name}")
    file.write_bytes(content)
    for arguments in (["inspect-config", str(file)], ["inspect-config", str(file), "--json"]):
        capsys.readouterr()
        assert main(arguments) == 0
        shown = capsys.readouterr()
        assert "owned" in shown.out
        assert "[red]" in shown.out
        assert all(character.isprintable() or character == "\n" for character in shown.out + shown.err)
