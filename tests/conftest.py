"""What all tests share: one thread for each process, a user who has nothing yet, and estimates that are made once.

Several processes run the tests at once, and what they compute is small. Garbage is looked for as in a command: seldom.
"""

import functools
import gc
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from bitgen_cli.__main__ import GARBAGE_COLLECTION

os.environ.setdefault("OMP_NUM_THREADS", "1")
gc.set_threshold(*GARBAGE_COLLECTION)

ASIDE = {
    *("steps", "log_every", "validate_every", "save_every", "keep_last", "keep_every", "seed", "optimizer"),
    *("token_learning_rate", "token_head_start", "prior_images", "other_images", "views", "crop", "flip"),
    *("photo_templates", "likely_captions", "prior_templates", "other_prompts", "unrelated_prompts"),
}
"""What no memory hangs on: how long and how fast a recipe learns, and from how many pictures of what."""


@pytest.fixture(scope="session", autouse=True)
def _nothing_of_the_users(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps what is in the folders of whoever runs the tests out of them, and them out of these folders."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITGEN_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="session")
def estimated_once() -> Iterator[None]:
    """Lets the runs estimate the memory of a training once for each model, recipe and layout.

    An estimate takes as long as the rest of a tiny training, and asked the same it says the same: tests/engine sees to
    what it says.
    """
    from bitgen_cli.engine import training_memory
    from bitgen_cli.runs import finetune_subject, inspect_config, train

    with pytest.MonkeyPatch.context() as patch:
        for stage in ("tokenizer", "transformer", "subject"):
            name = f"{stage}_training_memory"
            once = _once(stage, getattr(training_memory, name))
            for module in (training_memory, finetune_subject, inspect_config, train):
                if hasattr(module, name):
                    patch.setattr(module, name, once)
        yield


def _once(stage: str, estimate: Callable[..., Any]) -> Callable[..., Any]:
    """An estimate that remembers what it has said."""
    said: dict[str, Any] = {}

    @functools.wraps(estimate)
    def remembered(config: Any, *given: Any, **named: Any) -> Any:
        recipe = getattr(config.training, stage)
        told = recipe and recipe.model_dump_json(exclude=ASIDE)
        # a default says the same where it is spelt out
        asked = repr((config.model.model_dump_json(), told, given, sorted(item for item in named.items() if item[1])))
        if asked not in said:
            said[asked] = estimate(config, *given, **named)
        return said[asked]

    return remembered
