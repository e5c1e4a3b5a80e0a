"""What the tests of the runs share: a tiny model, a trained tokenizer with its store, data sets, and one thread.

Sums over several threads come in another order, and runs are compared to the last bit.
"""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_model
import torch
from tiny_training import World, resolved

from bitgen_cli.report import Silent
from bitgen_cli.runs.tokenize import TokenizeOptions, tokenize
from bitgen_cli.runs.train import TrainOptions, train

sys.path.append(str(Path(__file__).parents[1] / "engine"))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def _estimates(estimated_once: None) -> None:
    """Most tests train something, and many of them the same."""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's folder, which tests only read."""
    return tiny_model.save(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def model(tiny: Path) -> str:
    """The same as an option names it."""
    return str(tiny)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    run, store = folder / "tokenizer", folder / "store"
    recipe = resolved("tokenizer", steps=2, sample_every=0)
    train(TrainOptions(recipe, None, "world:20", run, device="cpu"), Silent())
    tokenize(TokenizeOptions("world:40", store, str(run), device="cpu", dtype="fp32"), Silent())
    return World(run, store)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def home(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data folder of a user who has nothing yet, below an empty current folder."""
    monkeypatch.setenv("BITGEN_HOME", str(here / "home"))
    return here / "home"


@pytest.fixture
def known(tiny: Path, home: Path) -> Path:
    """The tiny model in the user's data folder, so that its name finds it."""
    return Path(shutil.copytree(tiny, home / "models" / "tiny"))
