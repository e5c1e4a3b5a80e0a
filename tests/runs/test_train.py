"""`bitgen train` and `bitgen resume` on both stages, end to end with tiny models."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from data_sets import put, write_coco, write_lines
from PIL import Image
from safetensors.torch import load_file
from tiny_training import MODEL, StopAt, World, contents, measured, options_for, resolved

from bitgen_cli.engine import pictures as pictures_module
from bitgen_cli.engine.model_folder import load_model
from bitgen_cli.engine.transformer_stage import TransformerStage
from bitgen_cli.errors import ExitCode, InputError, Interrupted, ResourceError, UsageError
from bitgen_cli.report import Silent
from bitgen_cli.runs.resume import resume
from bitgen_cli.runs.start import Init
from bitgen_cli.runs.tokenize import TokenizeOptions, tokenize
from bitgen_cli.runs.train import TrainOptions, TrainResult, train


@pytest.mark.parametrize("stage", ["tokenizer", "transformer"])
def test_interrupted_and_resumed_equals_straight_bit_for_bit(
    stage: str, world: World, tmp_path: Path
) -> None:
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    result = train(options_for(stage, world, straight), Silent())
    with pytest.raises(Interrupted, match="after step 3 of 7") as caught:
        train(options_for(stage, world, halves), StopAt(3))
    assert caught.value.exit_code == ExitCode.INTERRUPTED
    # what a kill leaves: measurements behind the checkpoint, and half of the next one
    with (halves / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "loss": 1.0}\n{"step": 5, "lo')
    (halves / "checkpoints" / ".step-0000004.1.partial").mkdir()
    resumed = resume(halves, Silent(), device="cpu")

    expected, found = contents(straight), contents(halves)
    assert expected.keys() == found.keys()
    differing = [name for name in expected if not torch.equal(expected[name], found[name])]
    assert not differing
    assert measured(straight) == measured(halves)
    assert (result.loss, result.validation) == (resumed.loss, resumed.validation)
    picture = f"samples/step-{7:07d}.png"
    assert (straight / picture).read_bytes() == (halves / picture).read_bytes()


def test_the_tokenizer_learns_and_leaves_a_model(tmp_path: Path) -> None:
    recipe = resolved(
        "tokenizer",
        steps=40,
        batch_size=8,
        accumulation=1,
        validate_every=10,
        sample_every=20,
        commitment_weight=0.02,
        entropy_weight=0.02,
        optimizer={"learning_rate": 0.005},
    )
    options = TrainOptions(recipe, None, "world:80", tmp_path / "run", device="cpu")
    result = train(options, Silent())
    lines = measured(tmp_path / "run")
    validations = [line for line in lines if "val_loss" in line]
    assert validations[-1]["val_loss"] < 0.8 * lines[0]["loss"]
    assert validations[-1]["val_psnr"] > validations[0]["val_psnr"] + 0.5
    assert set(result.validation) == {"val_loss", "val_psnr", "val_ssim", "val_bit_usage"}
    assert Image.open(tmp_path / "run" / "samples" / "step-0000040.png").size == (4 * 16, 2 * 16)
    assert load_model(result.model).tokenizer is not None
    assert json.loads((tmp_path / "run" / "state.json").read_text())["finished"] is True
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (stored["verb"], stored["stage"], stored["data"]) == ("train", "tokenizer", "world:80")
    assert stored["origins"] == {"name": "test"}


def test_the_transformer_learns_and_leaves_a_model_with_its_tokenizer(world: World, tmp_path: Path) -> None:
    recipe: dict[str, Any] = {"steps": 80, "accumulation": 1, "validate_every": 20}
    recipe["optimizer"] = {"learning_rate": 0.004, "warmup_steps": 2, "schedule": "cosine"}
    options = options_for("transformer", world, tmp_path / "run", **recipe)
    result = train(options, Silent())
    lines = measured(tmp_path / "run")
    assert {f"bit_accuracy/{k}" for k in range(3)} | {"epoch", "learning_rate", "grad_norm"} <= set(lines[0])
    validations = [line for line in lines if "val_loss" in line]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert sum(losses[-20:]) / 20 < 0.85 * losses[0]
    # four held-out pictures of 40 are too few to ask for as much
    assert validations[-1]["val_loss"] < 0.95 * losses[0]
    assert validations[-1]["val_bit_accuracy/2"] > 0.5
    model = load_model(result.model)
    assert model.transformer is not None
    assert model.text_encoder is not None
    theirs = load_model(world.tokenizer_run / "model", parts=("tokenizer",))
    assert model.fingerprints["tokenizer"] == theirs.fingerprints["tokenizer"]
    captions = (tmp_path / "run" / "samples" / "captions.txt").read_text().splitlines()
    assert len(captions) == 4
    assert TrainResult.to_json(result)["model"] == str(tmp_path / "run" / "model")


def test_every_part_that_should_learn_gets_gradients(world: World, tmp_path: Path) -> None:
    """After a few steps every tensor of the transformer and of its own text encoder has moved."""
    train(options_for("transformer", world, tmp_path / "run", steps=3, caption_dropout=0.5), Silent())
    moments = load_file(tmp_path / "run" / "checkpoints" / "step-0000003" / "optimizer.safetensors")
    still = [name for name, tensor in moments.items() if name.endswith("/exp_avg") and not tensor.any()]
    # tokens and relative positions that occur in no caption of the batches keep zeros only in part
    assert still == []
    weights = load_file(tmp_path / "run" / "checkpoints" / "step-0000003" / "weights.safetensors")
    assert {name.rsplit("/", 1)[0] for name in moments} == set(weights)
    assert any(name.startswith("text_encoder.") for name in weights)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_learn_the_same(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODEL | {"transformer": MODEL["transformer"] | {"depth": 1, "drop_path": 0.0}}
    changes: dict[str, Any] = {"steps": 3, "precision": "fp32", "sample_every": 0}
    losses = []
    for name in ("plain", "compiled"):
        options = options_for("transformer", world, tmp_path / name, model=model, compile=name == "compiled", **changes)
        train(options, Silent())
        losses.append([line["loss"] for line in measured(tmp_path / name) if "loss" in line])
    # fused products round differently
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ResourceError, match="no C\\+\\+ compiler no-such-compiler"):
        train(options_for("transformer", world, tmp_path / "none", compile=True), Silent())


def test_a_store_without_latents_trains_without_flips_alone(world: World, tmp_path: Path) -> None:
    store = tmp_path / "store"
    source = TokenizeOptions(
        "world:40", store, str(world.tokenizer_run), latents=False, device="cpu", dtype="fp32"
    )
    tokenize(source, Silent())

    def options(out: Path, **changes: Any) -> TrainOptions:
        init = Init((str(world.tokenizer_run),))
        return TrainOptions(resolved("transformer", steps=2, **changes), None, str(store), out, init, "cpu")

    with pytest.raises(UsageError, match=r"no latents.*flip_strength=0"):
        train(options(tmp_path / "refused"), Silent())
    assert not (tmp_path / "refused").exists()
    train(options(tmp_path / "plain", flip_strength=0), Silent())

    # without flips both stores give the same losses. Where latents are kept, the bits are those of the kept bfloat16
    # latent, so 4 of 6720 bits differ here; the gradient's norm shows that more than the losses do
    train(options_for("transformer", world, tmp_path / "latents", steps=2, flip_strength=0), Silent())
    for ours, theirs in zip(measured(tmp_path / "plain"), measured(tmp_path / "latents"), strict=True):
        assert ours.pop("grad_norm", 0) == pytest.approx(theirs.pop("grad_norm", 0), rel=1e-2)
        # how many bits are right hangs on predictions that stand on the edge; the losses do not
        ours, theirs = ({k: v for k, v in row.items() if "bit_accuracy" not in k} for row in (ours, theirs))
        assert ours == pytest.approx(theirs, rel=1e-3)


def test_a_store_of_another_tokenizer_is_refused(world: World, tmp_path: Path) -> None:
    other = tmp_path / "other"
    train(
        TrainOptions(resolved("tokenizer", steps=1, seed=9), None, "world:20", other, device="cpu"), Silent()
    )
    options = TrainOptions(
        resolved("transformer"), None, str(world.store), tmp_path / "run", Init((str(other),)), "cpu"
    )
    with pytest.raises(UsageError, match="another tokenizer"):
        train(options, Silent())
    assert not (tmp_path / "run").exists()


def test_the_transformer_needs_a_model_to_begin_with(world: World, tmp_path: Path) -> None:
    options = TrainOptions(resolved("transformer"), None, str(world.store), tmp_path / "run", device="cpu")
    with pytest.raises(UsageError, match="needs --init"):
        train(options, Silent())


def test_scales_of_another_model_are_refused(world: World, tmp_path: Path) -> None:
    model = {**MODEL, "scales": {"published": False, "custom": {"1.0": [[1, 1], [3, 3], [4, 4]]}}}
    init = Init((str(world.tokenizer_run),))
    options = TrainOptions(
        resolved("transformer", model), None, str(world.store), tmp_path / "run", init, "cpu"
    )
    with pytest.raises(UsageError, match="differ in the scales"):
        train(options, Silent())


def test_a_run_begins_with_the_whole_model_it_is_given(world: World, tmp_path: Path) -> None:
    first = train(options_for("transformer", world, tmp_path / "first", steps=4), Silent())
    tiny = {"learning_rate": 1e-12}
    init = Init((str(tmp_path / "first"),))
    again = resolved("transformer", steps=1, optimizer=tiny)
    second = train(TrainOptions(again, None, str(world.store), tmp_path / "second", init, "cpu"), Silent())
    assert second.validation == pytest.approx(first.validation, abs=1e-4)


def test_a_folder_with_a_bad_picture_trains_and_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a process that has imported torch already starts sooner
    monkeypatch.setattr(pictures_module, "get_context", lambda kind: processes.server())
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(120):
        Image.new("RGB", (20, 16), (number * 2, 90, 255 - number)).save(folder / f"{number:03d}.png")
    (folder / "007.png").write_bytes((folder / "007.png").read_bytes()[:40])
    report = Silent()
    recipe = resolved("tokenizer", steps=15, batch_size=8, workers=1, precision="fp32")
    options = TrainOptions(recipe, "tokenizer", str(folder), tmp_path / "run", device="cpu")
    train(options, report)
    assert sum("007.png" in notice for notice in report.notices) == 1

    for number in (8, 9):
        (folder / f"00{number}.png").write_bytes(b"")
    worse = TrainOptions(recipe, "tokenizer", str(folder), tmp_path / "worse", device="cpu")
    with pytest.raises(InputError, match="more than 1 %"):
        train(worse, Silent())


def test_pictures_of_two_aspect_ratios_train_together(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(24):
        size = (16, 16) if number % 3 else (16, 32)
        Image.new("RGB", size, (number * 9, 90, 255 - number)).save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(f"picture {number}")
    scales = {"1.0": [[1, 1], [2, 2], [4, 4]], "2.0": [[1, 1], [4, 2], [8, 4]]}
    model = {**MODEL, "scales": {"published": False, "custom": scales}}
    changes = {"steps": 3, "sample_every": 2}
    tokenizer = TrainOptions(
        resolved("tokenizer", model, **changes), None, str(folder), tmp_path / "a", device="cpu"
    )
    train(tokenizer, Silent())
    tokenize(TokenizeOptions(str(folder), tmp_path / "store", str(tmp_path / "a"), device="cpu"), Silent())
    transformer = TrainOptions(
        resolved("transformer", model, **changes),
        None,
        str(tmp_path / "store"),
        tmp_path / "b",
        Init((str(tmp_path / "a"),)),
        "cpu",
    )
    assert train(transformer, Silent()).steps == 3


def test_the_run_reports_on_its_pictures_and_keeps_to_the_shapes_asked_for(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(24):
        Image.new("RGB", (16, 16) if number % 3 else (16, 32), (number * 9, 90, 9)).save(folder / f"{number:03d}.png")
    scales = {"1.0": [[1, 1], [2, 2], [4, 4]], "2.0": [[1, 1], [4, 2], [8, 4]]}
    model = {**MODEL, "scales": {"published": False, "custom": scales}}
    for aspects, shapes, cropped in (([], [("1:1", 16), ("1:2", 8)], 0), (["1:1"], [("1:1", 24)], 8 / 24 / 2)):
        report, out = Silent(), tmp_path / f"run{len(aspects)}"
        recipe = resolved("tokenizer", model, steps=2, sample_every=0, aspects=aspects)
        train(TrainOptions(recipe, None, str(folder), out, device="cpu"), report)
        told = json.loads((out / "data_report.json").read_text())
        assert [(bucket["aspect"], bucket["count"]) for bucket in told["buckets"]] == shapes
        assert told["cropped"] == pytest.approx(cropped)
        assert (told["captions"], told["used"]) == (None, 24)
        assert f"{folder}: plain folder, 24 pictures; captions are not read" in report.notices
        assert any(notice.startswith("24 pictures (") for notice in report.notices)
        resumed = resume(out, Silent(), steps=1, device="cpu")
        assert isinstance(resumed, TrainResult)
        assert resumed.steps == 3


def test_pictures_of_an_image_root_train_and_resume(world: World, tmp_path: Path) -> None:
    put(tmp_path / "pictures", *(f"{number}.png" for number in range(12)), size=(16, 16))
    (tmp_path / "list").mkdir()
    rows = [{"file_name": f"{number}.png", "text": "x"} for number in range(12)]
    file = write_lines(tmp_path / "list" / "all.jsonl", *rows)
    recipe = resolved("tokenizer", steps=2, sample_every=0)
    root = tmp_path / "pictures"
    train(TrainOptions(recipe, None, str(file), tmp_path / "run", device="cpu", image_root=root), Silent())
    assert resume(tmp_path / "run", Silent(), steps=1, device="cpu").steps == 3  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="--image-root is for pictures"):
        train(replace(options_for("transformer", world, tmp_path / "t"), image_root=root), Silent())


def test_each_epoch_draws_another_caption_of_a_picture(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """14 pictures in batches of 4 with 3 captions each: in 3 epochs of 3 steps, each without 2 of them."""
    names = {number: f"{number}.png" for number in range(14)}
    put(tmp_path / "data", *names.values(), size=(16, 16))
    captions = [(number, f"caption {place} of {number}") for number in range(1, 14) for place in range(3)]
    write_coco(tmp_path / "data" / "captions.json", names, captions)
    tokenize(TokenizeOptions(str(tmp_path / "data"), tmp_path / "s", str(world.tokenizer_run), device="cpu"), Silent())
    seen: list[dict[int, int]] = []
    losses = TransformerStage._losses

    def watched(self: TransformerStage, indices: list[int], which: list[int], *rest: Any) -> Any:
        seen.append(dict(zip(indices, which, strict=True)))
        return losses(self, indices, which, *rest)

    monkeypatch.setattr(TransformerStage, "_losses", watched)
    recipe = resolved("transformer", steps=9, accumulation=1, validation_images=0, sample_every=9)
    run = tmp_path / "run"
    train(TrainOptions(recipe, None, str(tmp_path / "s"), run, Init((str(world.tokenizer_run),)), "cpu"), Silent())
    assert len(seen) == 9
    times = [sum(index in batch for batch in seen) for index in range(14)]
    assert (sum(times), max(times)) == (36, 3)
    for index in range(14):
        learned = [batch[index] for batch in seen if index in batch]
        # picture 0 has no caption and is learned with an empty prompt
        assert len(set(learned)) == (1 if index == 0 else len(learned))
    shown = (run / "samples" / "captions.txt").read_text().splitlines()
    assert all(line == "" or line.startswith("caption 0 of") for line in shown)


def test_resume_says_when_there_is_nothing_to_do_and_extends(world: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(options_for("tokenizer", world, run, steps=2), Silent())
    with pytest.raises(UsageError, match="finished: 2 of 2 steps"):
        resume(run, Silent(), device="cpu")
    assert resume(run, Silent(), steps=2, device="cpu").steps == 4
    with pytest.raises(UsageError, match="finished: 4 of 4 steps"):
        resume(run, Silent(), device="cpu")


def test_resume_never_starts_afresh(world: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(options_for("tokenizer", world, run, steps=2), Silent())
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(InputError, match="no whole checkpoint"):
        resume(run, Silent(), device="cpu")
    with pytest.raises(InputError, match="does not exist"):
        resume(tmp_path / "absent", Silent(), device="cpu")
    (run / "config.json").write_text('{"format": 1, "verb": "train", "stage": "tokenizer"}')
    with pytest.raises(InputError, match="does not describe a training"):
        resume(run, Silent(), device="cpu")


def test_a_used_folder_and_a_missing_recipe_are_refused(world: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(options_for("tokenizer", world, run, steps=1), Silent())
    with pytest.raises(UsageError, match="bitgen resume"):
        train(options_for("tokenizer", world, run), Silent())
    no_recipe = TrainOptions(resolved("transformer"), "tokenizer", "world:20", tmp_path / "new", device="cpu")
    with pytest.raises(UsageError, match="no recipe for stage tokenizer"):
        train(no_recipe, Silent())
    unknown = TrainOptions(resolved("tokenizer"), "tokeniser", "world:20", tmp_path / "new", device="cpu")
    with pytest.raises(UsageError, match="unknown stage"):
        train(unknown, Silent())
