"""Starts functions in processes of their own, forked from a server that has imported torch and more once."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable, Mapping
from multiprocessing import forkserver, get_context
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

HERE = str(Path(__file__).parent)


def server() -> ForkServerContext:
    """Where processes come from."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    found = os.pathsep.join([HERE, *filter(None, [os.environ.get("PYTHONPATH")])])
    with mock.patch.dict(os.environ, {"PYTHONPATH": found}):
        forkserver.ensure_running()
    return context


def start(function: Callable[..., None], *arguments: Any, environment: Mapping[str, str] | None = None) -> BaseProcess:
    """A process that runs the function with one thread."""
    process = server().Process(target=_run, args=(function, arguments, dict(environment or {})))
    process.start()
    return process


def start_ranks(count: int, function: Callable[..., None], *arguments: Any) -> list[BaseProcess]:
    """Processes that train together."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank), **shared} for rank in range(count)]
    return [start(function, *arguments, environment=rank) for rank in ranks]


def finish(processes: list[BaseProcess], seconds: float = 300) -> None:
    """Waits; fails when one of them failed."""
    for process in processes:
        process.join(seconds)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * len(processes)


def _run(function: Callable[..., None], arguments: tuple[Any, ...], environment: dict[str, str]) -> None:
    import torch

    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        function(*arguments)
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        os._exit(1)
