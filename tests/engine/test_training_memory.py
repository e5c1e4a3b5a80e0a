"""Estimates of training memory: what a rehearsal counts, what follows from it, and that it leaves nothing behind.

tests/runs/test_fitting.py compares with real trainings.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitgen_cli.config import Config
from bitgen_cli.engine import memory, training_memory
from bitgen_cli.engine.codec import Codec
from bitgen_cli.engine.losses import bit_loss, one_rank
from bitgen_cli.engine.rehearsal import Peak, Watched, infer, rehearsal, rehearse
from bitgen_cli.engine.scales import Schedule, schedule
from bitgen_cli.engine.tokenizer import Tokenizer
from bitgen_cli.engine.tokenizer_stage import forward_loss
from bitgen_cli.engine.trained_tokenizer import TrainedTokenizer
from bitgen_cli.engine.training_memory import (
    CPU,
    Layout,
    TrainingMemory,
    subject_training_memory,
    tokenizer_training_memory,
    transformer_training_memory,
)
from bitgen_cli.engine.transformer import TextFeatures, Transformer
from bitgen_cli.presets import resolve

FP32 = "training.transformer.precision=fp32"
RECOMPUTED = "training.transformer.checkpoint_activations=true"


def config_of(*overrides: str, preset: str = "demo") -> Config:
    return resolve(preset, overrides=overrides, environment={}).config


def square(config: Config) -> Schedule:
    return schedule(config.model.scales, patchify=config.model.transformer.patchify)


Of = Callable[..., TrainingMemory | None]


def estimate(of: Of, *overrides: str, layout: Layout = CPU, preset: str = "demo", **more: Any) -> TrainingMemory:
    config = config_of(*overrides, preset=preset)
    found = of(config, memory.parameters(config.model), square(config), *more.values(), layout)
    assert found is not None
    return found


def subject(parts: str, *overrides: str, layout: Layout = CPU) -> TrainingMemory:
    names = json.dumps(parts.split(","))
    return estimate(subject_training_memory, f"training.subject.train={names}", *overrides, layout=layout, tokens=6)


# -- rehearsals --------------------------------------------------------------------------------------------------------


def test_storages_are_counted_once_and_until_they_go() -> None:
    with Watched() as watched:
        a = torch.zeros(1000)
        b = a.view(10, 100)[3:]
        assert watched.peak.working == 4000
        c = b + 1
        assert watched.peak.working == 4000 + 2800
        del a, b
        d = torch.zeros(1000)
        assert watched.peak.working == 2800 + 4000
        c.add_(1)
        assert watched.peak.working == 6800
        watched.as_gradient(d)
        watched.mark("begun")
        watched.mark("ended")
        watched.mark("ended")
        assert [name for name, _ in watched.passed] == ["begun", "ended"]
        assert watched.passed[1][1] == Peak(2800, 6800)
    del c, d


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_rehearsal_counts_what_a_real_step_holds(precision: str) -> None:
    """The same step with and without contents, byte by byte."""

    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(30, 50), nn.GELU(), nn.LayerNorm(50), nn.Linear(50, 7))

    def loss(module: nn.Module) -> Callable[[], Tensor]:
        def of() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                return module(torch.zeros(11, 30)).float().square().mean()

        return of

    with rehearsal(torch.device("cpu")) as entered:
        module = network()
        assert module[0].weight.device.type == "cpu"  # type: ignore[union-attr, index]
        found = rehearse(entered, module, loss(module))
        looked = infer(entered, module, loss(module))
    real = network()
    with Watched() as watched:
        watched.begin(real)
        loss(real)().backward()  # type: ignore[no-untyped-call]
        assert found.peak.step == watched.peak.step
        watched.begin(real)
        with torch.no_grad():
            loss(real)()
        assert looked == watched.peak.working


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokenizing_while_training_is_counted(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As much as one thread's encoder really holds, for each thread; a store costs nothing. 16 pictures go together."""
    overrides = ("base_channels=16", "channel_multipliers=[1,8,2,2]", "res_blocks=1")
    named = (f"model.tokenizer.{override}" for override in overrides)
    config = config_of("training.transformer.batch_size=40", "model.transformer.depth=2", *named)
    counts, scales = memory.parameters(config.model), square(config)
    tokenizer = Tokenizer(config.model.tokenizer).requires_grad_(False)
    codec = Codec(tokenizer, config.model.tokenizer.bits, torch.device("cpu"), dtype)
    pixels = torch.zeros(16, 3, 64, 64, dtype=torch.uint8)
    codec.latent(pixels[:1])
    with Watched() as watched:
        held = infer(watched, tokenizer, lambda: codec.latent(pixels))
    stored = transformer_training_memory(config, counts, scales)
    assert stored is not None
    assert stored.encoding == 0
    for cores, threads in ((1, 1), (8, 3)):
        monkeypatch.setattr(torch, "get_num_threads", lambda cores=cores: cores)
        found = transformer_training_memory(config, counts, scales, tokenized=dtype)
        assert found is not None
        encoded = found.encoding - found.weights - found.average
        assert encoded == pytest.approx(threads * held, rel=0.03)
        derived = found.frozen - stored.frozen
        assert (derived > 0) == (dtype == torch.float32), "bfloat16 takes no products of Winograd's"


def test_a_rehearsal_leaves_nothing_behind() -> None:
    """What functions keep between calls must have contents again."""
    config = config_of()
    scales, training = square(config), config.training
    assert training.tokenizer is not None
    assert training.transformer is not None
    transformer, tokenizer = Transformer(config.model), Tokenizer(config.model.tokenizer)

    def losses() -> list[float]:
        image = torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64)
        trained = TrainedTokenizer(tokenizer, None, "fp32")
        seen = trained(image, scales, (config.model.tokenizer.bits,))
        inputs, targets = torch.zeros(1, 84, 16), torch.zeros(1, 85, 16, dtype=torch.bool)
        logits = transformer(inputs, TextFeatures(torch.zeros(1, 5, 128), (5,)), scales)
        reconstructed = forward_loss(image, seen, trained, training.tokenizer, None, one_rank)[0]
        return [reconstructed.item(), bit_loss(logits, targets, scales, training.transformer)[0].item()]

    for of in (tokenizer_training_memory, transformer_training_memory):
        estimate(of)
        before = losses()
        estimate(of)
        assert losses() == before


@pytest.mark.parametrize(
    "changes", [(FP32,), (RECOMPUTED,), (RECOMPUTED, "training.transformer.accumulation=2")], ids=len
)
def test_further_blocks_add_what_a_rehearsal_with_all_of_them_finds(
    monkeypatch: pytest.MonkeyPatch, changes: tuple[str, ...]
) -> None:
    few = ("training.transformer.batch_size=2", "model.transformer.depth=5", *changes)
    found = estimate(transformer_training_memory, *few)
    monkeypatch.setattr(training_memory, "_deep", lambda of, depth: of(depth))
    whole = estimate(transformer_training_memory, *few)
    assert found.to_json() == pytest.approx(whole.to_json(), rel=0.01)


def test_fewer_scales_hold_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    small = ("model.transformer.depth=2", "model.transformer.block_chunks=1", "training.transformer.batch_size=1")
    found = estimate(transformer_training_memory, *small, preset="32bit")
    monkeypatch.setattr(training_memory, "_merged", lambda scales: scales)
    whole = estimate(transformer_training_memory, *small, preset="32bit")
    assert found.activations == pytest.approx(whole.activations, rel=0.01)
    assert found.step == pytest.approx(whole.step, rel=0.01)


# -- what follows ------------------------------------------------------------------------------------------------------


def test_training_adds_up() -> None:
    counts = memory.parameters(config_of().model)
    weights = counts.tokenizer * 4
    found = estimate(tokenizer_training_memory, "training.tokenizer.accumulation=2", "training.tokenizer.ema_decay=0")
    assert found.weights == found.gradients == found.optimizer // 2 == weights
    assert found.average == found.frozen == found.gathered == 0
    assert found.step == weights + found.activations
    assert found.total == 3 * weights + found.step
    averaged = estimate(tokenizer_training_memory, "training.tokenizer.ema_decay=0.9")
    assert averaged.average == weights
    assert averaged.validation == found.validation + weights
    assert averaged.step < found.step, "gradients come as activations go"
    assert averaged.total == 4 * weights + max(averaged.step, averaged.validation, averaged.drawing)
    undrawn = estimate(transformer_training_memory, "training.transformer.sample_every=0")
    assert (undrawn.drawing, undrawn.average) == (0, undrawn.weights)


def test_no_recipe_no_estimate() -> None:
    config = config_of("training.tokenizer=null", "training.transformer=null")
    counts = memory.parameters(config.model)
    assert tokenizer_training_memory(config, counts, square(config)) is None
    assert transformer_training_memory(config, counts, square(config)) is None


def test_recomputed_blocks_hold_less() -> None:
    plain, recomputed = (estimate(transformer_training_memory, FP32, *more) for more in ((), (RECOMPUTED,)))
    assert recomputed.activations < 0.6 * plain.activations


def test_ranks_share_pictures_and_where_asked_for_weights() -> None:
    alone = estimate(transformer_training_memory, FP32)
    copied = estimate(transformer_training_memory, FP32, layout=Layout(CPU.device, 4))
    assert copied.weights == alone.weights
    assert copied.activations < 0.35 * alone.activations
    assert copied.step > copied.gradients, "buckets of gradients stay"
    shared = estimate(transformer_training_memory, FP32, layout=Layout(CPU.device, 4, sharded=True))
    for part in ("weights", "gradients", "optimizer", "average"):
        assert getattr(shared, part) == pytest.approx(getattr(alone, part) / 4, abs=4)
    assert shared.frozen == alone.frozen
    with torch.device("meta"):
        block = sum(p.numel() for p in Transformer(config_of().model).blocks[0].parameters())
    assert shared.gathered == 8 * block
    assert shared.total < copied.total
    odd = estimate(transformer_training_memory, FP32, layout=Layout(CPU.device, 5))
    assert odd.activations == copied.activations, "16 pictures are 4 on the fullest of 4 or 5 ranks"


def test_learning_a_subject_adds_up() -> None:
    found = {parts: subject(parts) for parts in ("token", "token,lora", "token,cross,ffn", "all")}
    assert found["token"].optimizer == 0
    totals = [each.total for each in found.values()]
    assert totals == sorted(totals)
    config = config_of()
    counts, everything = memory.parameters(config.model), found["all"]
    assert counts.text_encoder is not None
    table = 512 * 128
    assert everything.gradients == 4 * (counts.transformer + counts.text_encoder - table)
    assert everything.weights == 2 * everything.gradients, "the base model's are kept"
    derived = memory.derived_weights(config.model.tokenizer, square(config), 4, encoder=True)
    assert everything.frozen == 4 * (counts.tokenizer + table) + derived
    fewer = subject("token,cross,ffn", "training.subject.prior=none")
    assert found["token,cross,ffn"].activations == pytest.approx(2 * fewer.activations, rel=0.05)
    drawn = estimate(subject_training_memory, tokens=6)
    config = config_of()
    larger = subject_training_memory(config, counts, square(config), 6, at_once=8)
    assert larger.drawing - larger.validation == pytest.approx(8 * (drawn.drawing - drawn.validation), rel=0.01)


def test_the_2b_model_learns_a_subject_on_one_card() -> None:
    """LoRA, one photo and one class sample, recomputed activations, bfloat16: within 18 GB at 1024 px."""
    config = resolve("infinity-2b", environment={}).config
    counts = memory.parameters(config.model)
    found = subject_training_memory(config, counts, square(config), 12)
    assert found.total - 2 * counts.tokenizer < 18 * 2**30
