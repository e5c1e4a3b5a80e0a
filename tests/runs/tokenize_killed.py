"""Tokenizes in child processes that are killed with -9: at moments of the clock, and within a write.

    python tokenize_killed.py FILE

FILE holds JSON, a list of jobs: `options` of TokenizeOptions, `shard_size`, and `kills`, each of which is a share of
the time that a child takes, or `[event, n]`: at the n-th `half` written file, or the n-th `fsync` or `rename` of one.
One child writes to `out`-straight and is left alone; the others, one after each kill, to `out`, the last to its end.
Prints a line for each job: how its children ended, the number of the signal or 0.

Children are forked from a process that has loaded torch and computed nothing: loading takes longer than what is tested.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from bitgen_cli import files
from bitgen_cli.engine import store_writer
from bitgen_cli.engine.store_writer import StoreWriter
from bitgen_cli.report import Silent
from bitgen_cli.runs.tokenize import TokenizeOptions, tokenize


def die_at(event: str, number: int) -> None:
    """Lets this process die like by kill -9 at the n-th such event."""
    seen = 0

    def count() -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)

    fsync, replace, digest = files.os.fsync, Path.replace, store_writer.sha256

    def dying_fsync(descriptor: int) -> None:
        count()
        fsync(descriptor)

    def dying_replace(path: Path, target: Path) -> Path:
        count()
        return replace(path, target)

    def dying_half(path: Path) -> str:
        os.truncate(path, path.stat().st_size // 2)
        count()
        raise AssertionError("only the first file may be cut short")

    if event == "fsync":
        files.os.fsync = dying_fsync
    elif event == "rename":
        Path.replace = dying_replace  # type: ignore[assignment, method-assign]
    else:
        calls = iter(range(1, number + 1))
        store_writer.sha256 = lambda path: dying_half(path) if next(calls) == number else digest(path)  # type: ignore[assignment]
        number = 1


def child(options: dict[str, Any], shard_size: int, kill: float | list[Any] | None) -> int:
    """How a process that tokenizes ends: the signal, or its exit code."""
    pid = os.fork()
    if pid == 0:
        if isinstance(kill, list):
            die_at(*kill)
        StoreWriter.__init__.__kwdefaults__["shard_size"] = shard_size  # type: ignore[index]
        tokenize(TokenizeOptions(**{**options, "out": Path(options["out"])}), Silent())
        os._exit(0)
    if isinstance(kill, float):
        time.sleep(kill)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def main() -> None:
    for job in json.loads(Path(sys.argv[1]).read_text()):
        options, size = job["options"], job["shard_size"]
        started = time.perf_counter()
        straight = child({**options, "out": options["out"] + "-straight"}, size, None)
        took = time.perf_counter() - started
        kills = [kill * took if isinstance(kill, float) else kill for kill in job["kills"]]
        print(straight, *(child(options, size, kill) for kill in [*kills, None]), flush=True)


if __name__ == "__main__":
    main()
