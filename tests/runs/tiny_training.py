"""Trainings of a few steps with a tiny model, and what they leave, that the tests of the runs share."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from bitgen_cli.config import Config
from bitgen_cli.report import Silent
from bitgen_cli.runs.start import Init
from bitgen_cli.runs.train import TrainOptions

LOOP: dict[str, Any] = {
    "steps": 7,
    "batch_size": 4,
    "accumulation": 2,
    "ema_decay": 0.9,
    "precision": "bf16",
    "optimizer": {"learning_rate": 0.002, "warmup_steps": 2, "schedule": "cosine"},
    "log_every": 1,
    "validate_every": 4,
    "save_every": 100,
    "sample_every": 4,
    "validation_images": 4,
}
"""40 pictures make 9 micro-batches an epoch: step 5 crosses into the second one."""

MODEL: dict[str, Any] = {
    "tokenizer": {
        "bits": 8,
        "patch_size": 4,
        "base_channels": 24,
        "channel_multipliers": [1, 1, 1],
        "res_blocks": 1,
    },
    "transformer": {
        "depth": 2,
        "width": 32,
        "heads": 2,
        "ffn_ratio": 8,
        "text_width": 16,
        "text_length": 24,
        "patchify": False,
        "drop_path": 0.2,
    },
    "text_encoder": {
        "source": "new",
        "vocabulary": 120,
        "width": 16,
        "layers": 1,
        "heads": 2,
        "ffn_width": 32,
    },
    "scales": {"published": False, "custom": {"1.0": [[1, 1], [2, 2], [4, 4]]}},
}


@dataclass(frozen=True)
class Resolved:
    """What the presets hand over: a configuration and where its values come from."""

    config: Config
    origins: dict[str, str] = field(default_factory=lambda: {"name": "test"})


def resolved(stage: str, model: dict[str, Any] = MODEL, **changes: Any) -> Any:
    config = {"name": "tiny", "model": model, "training": {stage: {**LOOP, **changes}}}
    return Resolved(Config.model_validate(config))


@dataclass
class World:
    """A trained tokenizer and the store made with it."""

    tokenizer_run: Path
    store: Path


def options_for(stage: str, world: World, out: Path, **changes: Any) -> TrainOptions:
    if stage == "tokenizer":
        return TrainOptions(resolved(stage, **changes), None, "world:40", out, device="cpu")
    init = Init((str(world.tokenizer_run),))
    return TrainOptions(resolved(stage, **changes), None, str(world.store), out, init, "cpu")


class StopAt(Silent):
    """Asks the run to stop once it has measured a step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def metrics(self, step: int, total_steps: int, values: Any) -> None:
        if step == self.step and "loss" in values:
            os.kill(os.getpid(), signal.SIGTERM)


def contents(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint and of the model folder."""
    newest = max((run / "checkpoints").iterdir())
    files = [*newest.glob("*.safetensors"), *(run / "model").rglob("*.safetensors")]
    found = {f"{file.stem}/{name}": tensor for file in files for name, tensor in load_file(file).items()}
    assert found
    return found


def measured(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines]
