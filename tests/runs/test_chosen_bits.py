"""One model used with several numbers of bits, end to end: trained, resumed, tokenized with, sampled from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_training import MODEL, Resolved, StopAt, measured

from bitgen_cli.config import Config
from bitgen_cli.engine.active_bits import active
from bitgen_cli.engine.model_folder import load_model
from bitgen_cli.engine.store import TokenStore
from bitgen_cli.errors import Interrupted, UsageError
from bitgen_cli.report import Silent
from bitgen_cli.runs.inspect_config import InspectOptions, inspect
from bitgen_cli.runs.jobs import SampleOptions
from bitgen_cli.runs.resume import resume
from bitgen_cli.runs.sample import sample
from bitgen_cli.runs.start import Init
from bitgen_cli.runs.tokenize import TokenizeOptions, tokenize
from bitgen_cli.runs.train import TrainOptions, train

LOOP: dict[str, Any] = {
    "steps": 6,
    "batch_size": 4,
    "accumulation": 2,
    "ema_decay": 0.9,
    "optimizer": {"learning_rate": 0.002},
    "log_every": 1,
    "validate_every": 3,
    "save_every": 100,
    "sample_every": 3,
    "validation_images": 4,
}
EVERYTHING: dict[str, Any] = {
    "l2_weight": 0.5,
    "adversarial_weight": 0.5,
    "adversarial_start": 2,
    "discriminator_channels": 8,
    "discriminator_layers": 1,
    "scale_dropout": 0.3,
    "resolutions": [3, 4],
}
"""The whole recipe but LPIPS, whose network is not here."""


def resolved(stage: str, active_bits: list[int] | None, **changes: Any) -> Any:
    model = {
        **MODEL,
        "tokenizer": {**MODEL["tokenizer"], "bits": 16, "active_bits": active_bits},
        "transformer": {**MODEL["transformer"], "drop_path": 0.0},
        "scales": {"published": False, "custom": {"1.0": [[1, 1], [2, 2], [3, 3], [4, 4]]}},
    }
    training = {stage: {**LOOP, **changes}}
    return Resolved(Config.model_validate({"name": "elastic", "model": model, "training": training}))


@dataclass
class World:
    """A tokenizer trained with 4, 8 and 16 bits, and the store of all of them."""

    tokenizer: Path
    store: Path


def store(world: World | None, tokenizer: Path, out: Path, **changes: Any) -> TokenStore:
    options = TokenizeOptions("world:40", out, str(tokenizer), device="cpu", dtype="fp32", **changes)
    tokenize(options, Silent())
    return TokenStore.open(out)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    options = TrainOptions(
        resolved("tokenizer", [4, 8, 16], steps=3), None, "world:40", folder / "tokenizer", device="cpu"
    )
    train(options, Silent())
    store(None, folder / "tokenizer", folder / "store")
    return World(folder / "tokenizer", folder / "store")


def transformer_options(world: World, out: Path, active_bits: list[int] | None, **changes: Any) -> TrainOptions:
    data = str(changes.pop("data", world.store))
    return TrainOptions(
        resolved("transformer", active_bits, **changes), None, data, out, Init((str(world.tokenizer),)), "cpu"
    )


def contents(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint and of the model folder."""
    newest = max((run / "checkpoints").iterdir())
    files = [*newest.glob("*.safetensors"), *(run / "model").rglob("*.safetensors")]
    return {f"{file.parent.name[:5]}/{file.stem}/{name}": t for file in files for name, t in load_file(file).items()}


@pytest.mark.parametrize("stage", ["tokenizer", "transformer"])
def test_resumed_equals_straight_bit_for_bit(stage: str, world: World, tmp_path: Path) -> None:
    def options(out: Path) -> TrainOptions:
        if stage == "transformer":
            return transformer_options(world, out, [4, 8, 16])
        return TrainOptions(resolved(stage, [4, 8, 16], **EVERYTHING), None, "world:40", out, device="cpu")

    straight, halves = tmp_path / "straight", tmp_path / "halves"
    train(options(straight), Silent())
    # the adversary has learned for a step, so that it has a state of its own
    with pytest.raises(Interrupted, match="after step 3 of 6"):
        train(options(halves), StopAt(3))
    resume(halves, Silent(), device="cpu")
    expected, found = contents(straight), contents(halves)
    assert expected.keys() == found.keys()
    assert not [name for name in expected if not torch.equal(expected[name], found[name])]
    assert measured(straight) == measured(halves)
    if stage == "tokenizer":
        assert any("discriminator" in name for name in expected if name.startswith("step-"))
        assert not any("discriminator" in name for name in expected if name.startswith("model"))
        losses = measured(straight)
        assert "generator" in losses[-2]
        assert "generator" not in losses[0]


def test_the_loss_of_the_whole_recipe_falls(tmp_path: Path) -> None:
    recipe = {**EVERYTHING, "steps": 30, "accumulation": 1, "validate_every": 5, "sample_every": 0}
    recipe |= {"adversarial_weight": 0.1, "optimizer": {"learning_rate": 0.008}}
    options = TrainOptions(
        resolved("tokenizer", [4, 8, 16], **recipe), None, "world:80", tmp_path / "run", device="cpu"
    )
    train(options, Silent())
    values = [row["val_loss"] for row in measured(tmp_path / "run") if "val_loss" in row]
    assert values[-1] < 0.93 * values[0]


def test_a_store_of_fewer_bits_is_the_beginning_of_that_of_all(world: World, tmp_path: Path) -> None:
    every = TokenStore.open(world.store)
    few = store(world, world.tokenizer, tmp_path / "few", bits=4, reconstruct=4)
    assert (every.manifest.bits, few.manifest.bits) == (16, 4)
    assert few.manifest.tokenizer == every.manifest.tokenizer
    indices = list(range(8))
    for ours, theirs in zip(few.bits(indices), every.bits(indices), strict=True):
        # latents are kept as bfloat16, which twice the value is too
        assert torch.equal(ours, theirs[:, :4])
    latents, whole = few.latents(indices), every.latents(indices)
    assert latents is not None
    assert whole is not None
    assert torch.equal(latents, active(whole, 4))
    model = load_model(world.tokenizer / "model", parts=("tokenizer",))
    assert model.tokenizer is not None
    few_pictures = model.tokenizer.decode_bits(few.bits(indices), few.schedule(1.0))
    every_pictures = model.tokenizer.decode_bits(every.bits(indices), every.schedule(1.0))
    assert not torch.equal(few_pictures, every_pictures)


def test_bits_nobody_trained_are_refused_before_anything_is_done(world: World, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot be used with 5 bits \(it was trained for: 4, 8, 16\)"):
        store(world, world.tokenizer, tmp_path / "store", bits=5)
    assert not (tmp_path / "store").exists()
    with pytest.raises(UsageError, match=r"cannot be used with 5 bits"):
        train(transformer_options(world, tmp_path / "run", [5]), Silent())
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def follower(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformer trained with each number of bits."""
    out = tmp_path_factory.mktemp("follower") / "run"
    train(transformer_options(world, out, [4, 8, 16], steps=4), Silent())
    return out


def test_a_transformer_follows(follower: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [row for row in measured(follower) if "val_loss" in row]
    each = [rows[-1][f"val_loss_{bits}_bits"] for bits in (4, 8, 16)]
    assert rows[-1]["val_loss"] == pytest.approx(sum(each) / 3, rel=1e-4)
    with Image.open(follower / "samples" / "step-0000003.png") as grid:
        assert grid.height == 4 * 16, "stored pictures, and drawn ones with 4, 8 and 16 bits"

    def drawn(**options: Any) -> tuple[dict[str, Any], bytes]:
        asked = SampleOptions(prompts=("a red dog",), model=str(follower), seed=1, device="cpu", **options)
        (picture,) = sample(asked, Silent()).pictures
        with Image.open(picture.path) as image:
            return json.loads(image.info["bitgen"]), image.tobytes()

    pictures = {bits: drawn(bits=bits) for bits in (4, 8, 16, None)}
    assert [pictures[bits][0]["bits"] for bits in (4, 8, 16, None)] == [4, 8, 16, 16]
    assert pictures[None][1] == pictures[16][1]
    assert len({pictures[bits][1] for bits in (4, 8, 16)}) == 3
    with pytest.raises(UsageError, match=r"cannot be used with 5 bits"):
        drawn(bits=5)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a red dog", "seed": 1, "bits": 4}\n{"prompt": "a red dog", "seed": 1}\n')
    result = sample(SampleOptions(prompts_file=str(prompts), model=str(follower), device="cpu"), Silent())
    assert [picture.recipe["bits"] for picture in result.pictures] == [4, 16]
    with Image.open(result.pictures[0].path) as image:
        assert image.tobytes() == pictures[4][1]


def test_bits_of_a_picture_are_told_for_each_number(follower: Path) -> None:
    found = inspect(InspectOptions(str(follower / "model")), Silent())
    assert found.facts["picture"]["bits_with"] == {"4": 30 * 4, "8": 30 * 8, "16": 30 * 16}
    (table,) = (table for table in found.sections if table.title == "One picture")
    assert [row for row in table.rows if "--bits" in row[0]] == [
        ["Bits with --bits 4", "120"],
        ["Bits with --bits 8", "240"],
    ]


def test_a_transformer_of_fewer_bits_predicts_no_others(world: World, tmp_path: Path) -> None:
    """From a store of those bits, and from one of all bits that keeps latents: the same numbers up to rounding."""
    few = store(world, world.tokenizer, tmp_path / "few", bits=4)
    train(transformer_options(world, tmp_path / "few-run", [4], steps=2, data=few.path), Silent())
    train(transformer_options(world, tmp_path / "every-run", [4], steps=2), Silent())
    rows = zip(measured(tmp_path / "few-run"), measured(tmp_path / "every-run"), strict=True)
    assert all(ours == pytest.approx(theirs, rel=1e-3) for ours, theirs in rows)
    model = load_model(tmp_path / "few-run" / "model")
    assert model.transformer is not None
    assert model.transformer.bits_per_position == 4
    with pytest.raises(UsageError, match=r"holds 4 bits a latent position, the model has 16 .*--bits 16"):
        train(transformer_options(world, tmp_path / "no", None, data=few.path), Silent())


def test_other_bits_than_stored_need_latents(world: World, tmp_path: Path) -> None:
    bare = store(world, world.tokenizer, tmp_path / "bare", latents=False)
    refused = transformer_options(world, tmp_path / "no", [4, 8, 16], flip_strength=0, data=bare.path)
    with pytest.raises(UsageError, match="no latents, which other numbers of bits than its 16 need"):
        train(refused, Silent())
    allowed = transformer_options(world, tmp_path / "run", None, flip_strength=0, steps=1, data=bare.path)
    train(allowed, Silent())
