"""`tokenize` killed with -9 at any moment and started again leaves the bytes that an undisturbed run leaves."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_tokenize import contents, save_pictures
from test_tokenize import model as model

from bitgen_cli.engine.store import TokenStore
from bitgen_cli.engine.store_check import check_store
from bitgen_cli.report import Silent

SCRIPT = Path(__file__).with_name("tokenize_killed.py")
IN_A_WRITE = [["half", 1], ["rename", 1], ["half", 4], ["fsync", 5], ["rename", 4], ["fsync", 6], ["half", 3]]
"""In the first shard, before the first manifest, in a later shard, and so on, each in what the one before has left."""
MOMENTS = [random.uniform(0.1, 1) for _ in range(6)]
JOBS: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "whole": ({}, IN_A_WRITE),
    "readers": ({"workers": 2}, [["half", 2], ["fsync", 8], MOMENTS[0]]),
    "parts": ({"shard": "1/2"}, [["rename", 5], *MOMENTS[:3]]),
    "parts again": ({"shard": "2/2", "workers": 1}, [["half", 3], *MOMENTS[3:]]),
}
"""Options and kills of each job; the two parts go into one store."""


@pytest.fixture(scope="module")
def stores(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what all jobs have left."""
    folder = tmp_path_factory.mktemp("killed")
    save_pictures(folder / "data", 23)
    always = {"data": str(folder / "data"), "model": str(model), "batch_size": 2, "device": "cpu", "dtype": "fp32"}
    jobs = [
        {"options": {**always, **options, "out": str(folder / name.split()[0])}, "shard_size": 5, "kills": kills}
        for name, (options, kills) in JOBS.items()
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, SCRIPT, folder / "jobs.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    for (_, kills), line in zip(JOBS.values(), done.stdout.splitlines(), strict=True):
        straight, *killed, last = map(int, line.split())
        assert straight == last == 0, done.stderr
        assert all(code == 9 for code, kill in zip(killed, kills, strict=True) if isinstance(kill, list)), line
        assert set(killed) <= {0, 9}, done.stderr
    return folder


@pytest.mark.parametrize("name", ["whole", "readers", "parts"])
def test_the_store_is_that_of_an_undisturbed_run(stores: Path, name: str) -> None:
    assert contents(stores / name) == contents(stores / f"{name}-straight"), MOMENTS
    assert check_store(stores / name, Silent()).faults == []
    assert len(TokenStore.open(stores / name)) == 23
    assert TokenStore.open(stores / name).ratios == [0.5, 1.0, 2.0]
