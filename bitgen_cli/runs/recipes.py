"""The recipe a model's subjects are learned with, which says too how its class pictures are drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bitgen_cli.engine.memory import parameters
from bitgen_cli.engine.model_folder import BUILT_IN, Model
from bitgen_cli.presets import Resolved, resolve_for_model

STAGE = "subject"
LARGE, LARGE_PARAMETERS = "infinity-2b", 1e9
"""Whose recipe is made for models that are large for one graphics card, and from how many parameters on it is taken."""


def subject_recipe(
    model: Model,
    name: str,
    *,
    preset: str | None = None,
    config_file: Path | None = None,
    overrides: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> Resolved:
    """The model's configuration with a recipe for subjects.

    Args:
        model: the base model; its weights are not needed.
        name: what the user calls it.
        preset: whose recipe is taken; None takes the built-in model's for that model, that of infinity-2b for models of
            a billion parameters and more, else the defaults.
        config_file, overrides, flags: as in presets.resolve_for_model.

    Raises:
        ConfigError: values or keys are wrong; carries every problem.
        UsageError: an unknown preset, or a value that would change the model.
        InputError: a file cannot be read.
    """
    stored = {
        "name": name,
        "model": model.config.model_dump(mode="json"),
        "sampling": model.sampling.model_dump(mode="json"),
        "training": {STAGE: {}},
    }
    return resolve_for_model(
        stored,
        STAGE,
        where=f"the model {name}",
        preset=preset or _preset_of(model, name),
        config_file=config_file,
        overrides=overrides,
        flags=flags or {},
    )


def _preset_of(model: Model, name: str) -> str | None:
    if name == BUILT_IN:
        return BUILT_IN
    return LARGE if parameters(model.config).transformer >= LARGE_PARAMETERS else None
