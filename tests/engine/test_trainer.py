"""The loop: order, schedules, averages, divergence, interruption. Real stages: tests/runs/test_train.py."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitgen_cli.config import LoopConfig, ModelConfig, OptimizerConfig
from bitgen_cli.engine.checkpoint import RunFolder
from bitgen_cli.engine.draws import Draws, mix
from bitgen_cli.engine.optimizer import Pace, learning_rate, parameter_groups
from bitgen_cli.engine.order import batches, grouped, split
from bitgen_cli.engine.parallel import Ranks
from bitgen_cli.engine.trainer import _STEP, _TOGETHER, Trainer
from bitgen_cli.engine.transformer import Transformer
from bitgen_cli.errors import DivergedError, ExitCode, Interrupted
from bitgen_cli.report import Silent

CPU = torch.device("cpu")


@dataclass
class Line:
    """A stage that fits a noisy line, with all kinds of randomness in its loss.

    Attributes:
        seen: indices of every micro-batch.
        bad_step: step whose loss is not a number.
        on_loss: called with the step.
    """

    bad_step: int = -1
    on_loss: Any = None
    seen: list[list[int]] = field(default_factory=list)
    announced: list[list[int]] = field(default_factory=list)
    exported: list[Tensor] = field(default_factory=list)
    paces: Mapping[str, Pace] = field(default_factory=dict)
    groups: list[list[int]] = field(default_factory=lambda: [list(range(20)), list(range(20, 31))])

    def __post_init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.module: nn.Module = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.3), nn.Linear(4, 1))

    def ahead(self, indices: list[int]) -> None:
        self.announced.append(indices)

    def share(self, ranks: Ranks) -> None:
        raise AssertionError

    def names(self, indices: Sequence[int]) -> list[str]:
        return [f"{index}.jpg" for index in indices]

    def captions(self, indices: Sequence[int]) -> list[str]:
        return self.names(indices)

    def loss(self, indices: list[int], draws: Draws, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        self.seen.append(indices)
        if self.on_loss is not None:
            self.on_loss(step)
        x = torch.tensor(indices, dtype=torch.float32)[:, None].expand(-1, 3) / 31
        x = x + draws.uniform(3)
        loss = (self.module(x) - x.sum(1, keepdim=True)).square().mean()
        return loss * (math.nan if step == self.bad_step else 1), {"extra": loss.detach()}

    def validate(self) -> dict[str, float]:
        assert not self.module.training
        return {"val_loss": float(self.module(torch.ones(1, 3)))}

    def draw_samples(self, file: Path) -> None:
        file.write_bytes(b"")

    def export(self, run: RunFolder, *, best: bool) -> None:
        self.exported.append(next(self.module.parameters()).detach().clone())

    def close(self) -> None:
        pass


CONSTANT = {"learning_rate": 0.01, "warmup_steps": 3, "schedule": "constant"}


def loop(**changes: Any) -> LoopConfig:
    values = {
        "steps": 12,
        "batch_size": 4,
        "optimizer": {"learning_rate": 0.01, "warmup_steps": 3, "schedule": "cosine"},
        "accumulation": 2,
        "ema_decay": 0.9,
        "log_every": 2,
        "validate_every": 4,
        "save_every": 3,
        "sample_every": 6,
    }
    return LoopConfig.model_validate(values | changes)


def trainer(path: Path, stage: Line, config: LoopConfig, *, new: bool = True) -> Trainer:
    run = RunFolder(path)
    if new:
        run.create({"verb": "train"})
    made = Trainer(stage, config, run, Silent(), Ranks())
    if not new:
        made.load(run.load_last(Silent()))
    return made


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor for part in trainer.checkpoint().tensors.values() for name, tensor in part.items()}


def test_an_interrupted_run_ends_where_a_straight_one_does(tmp_path: Path) -> None:
    straight = trainer(tmp_path / "straight", Line(), loop())
    straight.fit()

    def stop(step: int) -> None:
        if step == 6 and len(first.seen) % 2:
            os.kill(os.getpid(), signal.SIGINT)

    first = Line(on_loss=stop)
    interrupted = trainer(tmp_path / "halves", first, loop())
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="after step 7 of 12") as caught:
        interrupted.fit()
    assert caught.value.exit_code == ExitCode.INTERRUPTED
    assert signal.getsignal(signal.SIGINT) is handler
    second = Line()
    resumed = trainer(tmp_path / "halves", second, loop(), new=False)
    assert resumed.progress.step == 7
    resumed.fit()

    assert isinstance(straight.stage, Line)
    assert first.seen + second.seen == straight.stage.seen
    expected, found = weights(straight), weights(resumed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert straight.progress == resumed.progress
    assert torch.equal(straight.stage.exported[-1], second.exported[-1])
    ours = [json.loads(line) for line in resumed.run.metrics.read_text().splitlines()]
    theirs = [json.loads(line) for line in straight.run.metrics.read_text().splitlines()]
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    assert [line.get("loss") for line in ours] == [line.get("loss") for line in theirs]


def test_the_model_leaves_with_averaged_weights_and_training_goes_on_with_its_own(tmp_path: Path) -> None:
    stage = Line()
    made = trainer(tmp_path / "run", stage, loop())
    made.fit()
    assert made.average is not None
    own = next(stage.module.parameters())
    average = next(iter(made.average.values()))
    assert torch.equal(stage.exported[-1], average)
    assert not torch.equal(own, average)


def test_a_loss_that_is_no_number_stops_before_it_reaches_the_weights(tmp_path: Path) -> None:
    made = trainer(tmp_path / "run", Line(bad_step=7), loop())
    with pytest.raises(DivergedError, match="step 8") as caught:
        made.fit()
    assert caught.value.exit_code == ExitCode.DIVERGED
    assert made.run.load_last(Silent()).step == 6
    assert all(tensor.isfinite().all() for tensor in weights(made).values())


def test_a_second_interrupt_stops_at_once(tmp_path: Path) -> None:
    def stop_twice(step: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1.2 * _TOGETHER)
        os.kill(os.getpid(), signal.SIGINT)

    made = trainer(tmp_path / "run", Line(on_loss=stop_twice), loop())
    with pytest.raises(KeyboardInterrupt):
        made.fit()
    assert made.run.steps() == []


def test_accumulated_batches_count_as_one(tmp_path: Path) -> None:
    """Two micro-batches have the gradient of their mean loss; the first moment is a tenth of it."""
    stage = Line()
    stage.module = nn.Sequential(nn.Linear(3, 1))
    made = trainer(tmp_path / "run", stage, loop(steps=1))
    start = [p.detach().clone() for p in stage.module.parameters()]
    made.fit()
    moment = made.optimizer.state[next(stage.module.parameters())]["exp_avg"]

    again = Line()
    again.module = nn.Sequential(nn.Linear(3, 1))
    with torch.no_grad():
        for parameter, value in zip(again.module.parameters(), start, strict=True):
            parameter.copy_(value)
    for micro, indices in enumerate(stage.seen):
        loss, _ = again.loss(indices, Draws(mix(0, _STEP, 0, micro), range(len(indices))), 0)
        (loss / 2).backward()
    nn.utils.clip_grad_norm_(again.module.parameters(), 5.0)
    gradient = next(again.module.parameters()).grad
    assert gradient is not None
    torch.testing.assert_close(moment, 0.1 * gradient)


def test_the_stage_hears_of_every_batch_before_it_is_asked_for(tmp_path: Path) -> None:
    stage = Line()
    trainer(tmp_path / "run", stage, loop()).fit()
    assert stage.announced[: len(stage.seen)] == stage.seen
    assert len(stage.announced) > len(stage.seen)


def test_an_epoch_shows_every_picture_once_in_batches_of_one_group() -> None:
    groups = [list(range(20)), list(range(20, 31)), [31, 32]]
    epoch = batches(groups, 4, seed=1, epoch=0)
    shown = [index for batch in epoch for index in batch]
    assert len(shown) == len(set(shown)) == 20 + 8 + 2
    assert all(any(set(batch) <= set(group) for group in groups) for batch in epoch)
    assert epoch == batches(groups, 4, seed=1, epoch=0)
    assert epoch != batches(groups, 4, seed=1, epoch=1)
    assert epoch != batches(groups, 4, seed=2, epoch=0)


def test_a_tenth_at_most_is_held_out() -> None:
    trained, held_out = split(100, 256, seed=3)
    assert (len(trained), len(held_out)) == (90, 10)
    assert sorted(trained + held_out) == list(range(100))
    assert split(1, 256, seed=3) == ([0], [])
    assert grouped([3, 1, 4, 6], lambda index: index % 2) == [[3, 1], [4, 6]]


def test_learning_rates() -> None:
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=4, schedule="cosine", final_learning_rate=0.1)
    rates = [learning_rate(step, 104, config) for step in range(105)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == 2.0
    assert rates[54] == pytest.approx(1.1)
    assert rates[104] == pytest.approx(0.2)
    assert learning_rate(103, 104, config.model_copy(update={"schedule": "constant"})) == 2.0
    late = [learning_rate(step, 104, config, start=50) for step in range(105)]
    assert late[:50] == [0.0] * 50
    assert late[50:53] == [0.5, 1.0, pytest.approx(min(1.5, rates[52]))]
    assert late[53:] == rates[53:], "from there on as if it had always been"


def test_a_late_parameter_waits_and_then_learns_exactly_as_resumed(tmp_path: Path) -> None:
    """Nothing of it moves or gathers momentum before its first step, also across a stop in the middle of the wait."""
    late = {"0.": Pace(start=5), "": Pace(rate=2.0)}
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    stage = Line(paces=late)
    module = stage.module

    def look(step: int) -> None:
        seen[step] = module[0].weight.detach().clone(), module[2].weight.detach().clone()  # type: ignore[index]

    stage.on_loss = look
    straight = trainer(tmp_path / "straight", stage, loop(ema_decay=0))
    straight.fit()
    assert all(torch.equal(seen[step][0], seen[0][0]) for step in range(6)), "step 5 begins with what step 0 did"
    assert not torch.equal(seen[1][1], seen[0][1])
    assert not torch.equal(seen[6][0], seen[5][0])

    for stop in (3, 5, 6):
        path = tmp_path / str(stop)
        trainer(path, Line(paces=late), loop(ema_decay=0, steps=stop, optimizer=CONSTANT)).fit()
        resumed = trainer(path, Line(paces=late), loop(ema_decay=0, optimizer=CONSTANT), new=False)
        resumed.fit()
        whole = trainer(tmp_path / f"whole{stop}", Line(paces=late), loop(ema_decay=0, optimizer=CONSTANT))
        whole.fit()
        ended = zip(resumed.trained.values(), whole.trained.values(), strict=True)
        assert all(torch.equal(one, other) for one, other in ended)


def test_weight_decay_leaves_out_what_the_recipe_leaves_out() -> None:
    model = ModelConfig.model_validate(
        {
            "tokenizer": {
                "bits": 8,
                "patch_size": 4,
                "base_channels": 32,
                "channel_multipliers": [1, 1, 1],
                "res_blocks": 1,
            },
            "transformer": {
                "depth": 1,
                "width": 32,
                "heads": 2,
                "ffn_ratio": 8,
                "text_width": 16,
                "text_length": 4,
                "patchify": False,
            },
            "text_encoder": {"source": "x"},
            "scales": {"published": True, "resolution": "0.06M"},
        }
    )
    module = nn.ModuleDict({"transformer": Transformer(model)})
    names = {parameter: name.removeprefix("transformer.") for name, parameter in module.named_parameters()}
    decayed, plain = parameter_groups(module, 0.005, {})
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.005, 0.0)
    matrices = {name for parameter, name in names.items() if parameter.ndim > 1}
    undecayed = {
        "null_text",
        "start",
        "scale_embedding.weight",
        "blocks.0.modulation",
        "blocks.0.self_attention.log_scale",
        "text_pool.query",
    }
    assert {names[p] for p in decayed["params"]} == matrices - undecayed
    assert {names[p] for p in plain["params"]} == set(names.values()) - (matrices - undecayed)
