"""Runs a command in a process of its own that begins with torch imported: that takes longer than most commands."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import processes

from bitgen_cli.__main__ import main


def bitgen(folder: Path, *arguments: str, stdout: Path | None = None) -> subprocess.CompletedProcess[str]:
    """What a command says and how it ends, like subprocess.run.

    Args:
        folder: where the command is typed.
        arguments: behind `bitgen`.
        stdout: a file or terminal that it writes to; None reads what it says there.
    """
    with tempfile.TemporaryDirectory() as name:
        streams = stdout or Path(name) / "stdout", Path(name) / "stderr"
        process = processes.start(_command, folder, arguments, streams, environment=os.environ)
        process.join(240)
        process.kill()
        process.join()
        said = ["" if file == stdout else file.read_text() for file in streams]
    assert process.exitcode is not None
    return subprocess.CompletedProcess(arguments, process.exitcode, *said)


def _command(folder: Path, arguments: tuple[str, ...], streams: tuple[Path, Path]) -> None:
    for number, file in enumerate(streams, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(folder)
    sys.exit(main(arguments))
