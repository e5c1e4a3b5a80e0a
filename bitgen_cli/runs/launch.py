"""`--devices N`: the same command in N processes of this machine, which train together.

torchrun does this too, but ends with exit code 1 whatever happened, and answers Ctrl-C by killing what is being saved.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from bitgen_cli.errors import ExitCode

_POLL = 0.1
_GRACE, _UNTIL_KILLED = 2.0, 10.0
"""Seconds that the others get when one process has failed, and then until they are killed."""


def launch(arguments: Sequence[str], count: int) -> int:
    """The exit code of a command that runs in `count` processes.

    Args:
        arguments: of `bitgen`, the command among them.
        count: processes; their rank is in the environment as torchrun sets it.
    """
    command = [sys.executable, "-m", "bitgen_cli", *arguments]
    environment = {
        **os.environ,
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
    processes: list[subprocess.Popen[bytes]] = []

    def forward(number: int, frame: object) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for rank in range(count):
            own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen(command, env=own))
        return _first_failure(processes)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _first_failure(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """Waits for all; when one fails the others are ended. The code of the lowest rank that failed by itself."""
    deadline, ending = None, signal.SIGTERM
    failed: list[int] = []
    while True:
        codes = [process.poll() for process in processes]
        failed += [rank for rank, code in enumerate(codes) if code and rank not in failed and deadline is None]
        if all(code is not None for code in codes):
            break
        if failed and deadline is None:
            deadline = time.monotonic() + _GRACE
        if deadline is not None and time.monotonic() > deadline:
            for process in processes:
                if process.poll() is None:
                    process.send_signal(ending)
            deadline, ending = time.monotonic() + _UNTIL_KILLED, signal.SIGKILL
        time.sleep(_POLL)
    if not failed:
        return ExitCode.OK
    code = processes[min(failed)].returncode
    if code < 0:
        name = signal.Signals(-code).name
        sys.stderr.write(f"error: rank {min(failed)} was ended by {name}\n")
    return code if code > 0 else ExitCode.INTERNAL


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
