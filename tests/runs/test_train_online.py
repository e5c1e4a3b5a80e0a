"""A transformer that learns from pictures, tokenized while it trains, ends where one on a store of them does."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from data_sets import put, write_coco
from PIL import Image
from test_ranks import require_same
from tiny_training import LOOP, MODEL, StopAt, contents, measured, resolved

from bitgen_cli.engine import pictures as pictures_module
from bitgen_cli.engine import store_writer
from bitgen_cli.engine.codec import Codec
from bitgen_cli.engine.model_folder import save_model
from bitgen_cli.engine.online import OnlineTokens
from bitgen_cli.engine.sources import open_source
from bitgen_cli.engine.store import TokenStore
from bitgen_cli.engine.tokenizer import Tokenizer
from bitgen_cli.errors import InputError, Interrupted, UsageError
from bitgen_cli.report import Silent
from bitgen_cli.runs import overfit
from bitgen_cli.runs.resume import resume
from bitgen_cli.runs.start import Init
from bitgen_cli.runs.tokenize import TokenizeOptions, tokenize
from bitgen_cli.runs.train import TrainOptions, fit_for, train, try_out

SHAPES = {
    **MODEL,
    "tokenizer": {**MODEL["tokenizer"], "base_channels": 8, "norm_groups": 4},
    "scales": {
        "published": False,
        "custom": {"1.0": [[1, 1], [2, 2], [4, 4]], "2.0": [[1, 1], [4, 2], [8, 4]], "0.5": [[1, 1], [2, 4], [4, 8]]},
    },
}
TINY = {**MODEL, "tokenizer": SHAPES["tokenizer"]}
FP32 = {"precision": "fp32"}
LATENT = 2 * 8 * 4 * 4
"""Bytes of a latent."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a tokenizer alone."""
    config = resolved("tokenizer", SHAPES).config
    made = Tokenizer(config.model.tokenizer)
    made.autoencoder.initialise(torch.Generator().manual_seed(0))
    folder = tmp_path_factory.mktemp("tokenizer") / "model"
    save_model(folder, config.model, config.sampling, tokenizer=made)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """105 pictures of three shapes, the ninth of them without a head, with up to three captions each."""
    folder = tmp_path_factory.mktemp("data")
    generator, names = random.Random(0), {number: f"{number:03d}.png" for number in range(105)}
    for name in names.values():
        width, height = generator.choice([(16, 16), (30, 16), (16, 33)])
        Image.frombytes("RGB", (width, height), generator.randbytes(3 * width * height)).save(folder / name)
    (folder / names[8]).write_bytes(b"no picture")
    captions = [
        (number, f"caption {place} of {number}") for number in range(105) for place in range(generator.randrange(4))
    ]
    write_coco(folder / "captions.json", names, captions)
    return folder


def options_for(data: Path | str, out: Path, tokenizer: Path, model: dict[str, Any] = TINY, **changes: Any) -> Any:
    recipe = resolved("transformer", model, **{**FP32, **changes})
    return TrainOptions(recipe, "transformer", str(data), out, Init((str(tokenizer),)), "cpu")


def require_equal(ours: Path, theirs: Path) -> None:
    found, expected = contents(ours), contents(theirs)
    assert found.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(found[name], expected[name])]
    assert measured(ours) == measured(theirs)


@pytest.mark.parametrize(
    ("aspects", "cache"), [((), 2.0), (("1:1", "2:1"), 0.0)], ids=["three shapes", "two shapes, nothing kept"]
)
def test_pictures_and_their_store_teach_the_same_bit_for_bit(
    aspects: tuple[str, ...],
    cache: float,
    pictures: Path,
    tokenizer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Shards of ten pictures, so that their order counts; captions, flips and validation are drawn by number."""
    monkeypatch.setitem(store_writer.StoreWriter.__init__.__kwdefaults__, "shard_size", 10)  # type: ignore[arg-type]
    monkeypatch.setitem(store_writer.shard_sizes.__kwdefaults__, "most", 10)  # type: ignore[arg-type]
    store = tmp_path / "store"
    made = TokenizeOptions(str(pictures), store, str(tokenizer), device="cpu", aspects=aspects, batch_size=7)
    assert tokenize(made, Silent()).count == 104
    stored = TokenStore.open(store)
    assert (len(stored.ratios), stored.keys == sorted(stored.keys)) == (2 if aspects else 3, False)
    report = Silent()
    recipe: dict[str, Any] = {"steps": 10, "validate_every": 10, "sample_every": 10, "picture_cache": cache}
    train(options_for(store, tmp_path / "stored", tokenizer, SHAPES, **recipe), Silent())
    train(options_for(pictures, tmp_path / "online", tokenizer, SHAPES, aspects=list(aspects), **recipe), report)
    require_equal(tmp_path / "online", tmp_path / "stored")
    for file in sorted((tmp_path / "stored" / "samples").iterdir()):
        assert (tmp_path / "online" / "samples" / file.name).read_bytes() == file.read_bytes()
    told = json.loads((tmp_path / "online" / "data_report.json").read_text())
    expected = json.loads((store / "data_report.json").read_text())
    assert told == expected | {key: told[key] for key in ("bad", "captions")}
    assert [entry["key"] for entry in told["bad"]] == ["008.png"]
    assert told["captions"]["missing"] > 0
    assert sum("left out:" in notice and "008.png" in notice for notice in report.notices) == 1


def test_what_was_stopped_in_an_epoch_ends_where_one_that_was_not_does(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a process that reads ahead, and room for half of the latents: 40 of 8 x 4 x 4 numbers of 2 bytes."""
    # a process that has imported torch already starts sooner
    monkeypatch.setattr(pictures_module, "get_context", lambda kind: processes.server())
    cache: dict[str, Any] = {"picture_cache": 20 * LATENT / 2**30, "sample_every": 0}
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    result = train(options_for("world:40", straight, tokenizer, **cache), Silent())
    with pytest.raises(Interrupted, match="after step 3 of 7"):
        train(options_for("world:40", halves, tokenizer, workers=1, **cache), StopAt(3))
    resumed = resume(halves, Silent(), device="cpu")
    require_equal(halves, straight)
    assert (result.loss, result.validation) == (resumed.loss, resumed.validation)


def train_alone(tokenizer: Path, out: Path) -> None:
    recipe: dict[str, Any] = {"steps": 3, "validate_every": 3, "sample_every": 3}
    train(options_for("world:40", out, tokenizer, **recipe), Silent())


def test_two_processes_have_the_curve_of_one(tokenizer: Path, tmp_path: Path) -> None:
    train_alone(tokenizer, tmp_path / "alone")
    processes.finish(processes.start_ranks(2, train_alone, tokenizer, tmp_path / "both"))
    require_same(measured(tmp_path / "both"), measured(tmp_path / "alone"))


def tokens_of(folder: Path, report: Silent, **changes: Any) -> OnlineTokens:
    model = resolved("transformer", TINY).config.model
    codec = Codec(Tokenizer(model.tokenizer).eval(), 8, torch.device("cpu"), torch.float32)
    more = {"aspects": (), "workers": 0, "room": 1 << 20, **changes}
    return OnlineTokens(open_source(str(folder)), model, codec, report=report, **more)


def test_what_turns_out_to_be_damaged_is_replaced_with_its_caption(tmp_path: Path) -> None:
    put(tmp_path, *(f"{number:03d}.png" for number in range(120)), size=(16, 16))
    for number in range(120):
        (tmp_path / f"{number:03d}.txt").write_text(f"caption of {number}")
    whole = (tmp_path / "007.png").read_bytes()
    (tmp_path / "007.png").write_bytes(whole[:-30])
    report = Silent()
    tokens = tokens_of(tmp_path, report)
    try:
        assert len(tokens) == 120
        assert tokens.readable([3, 7, 7, 8]) == [3, 8, 8, 8]
        latents = tokens.latents([3, 7, 8])
        assert torch.equal(latents[1], latents[2])
        assert not torch.equal(latents[0], latents[1])
        assert [notice for notice in report.notices if "007.png" in notice] == [report.notices[-1]]
        for number in (20, 21):
            (tmp_path / f"0{number}.png").write_bytes(b"gone")
        with pytest.raises(InputError, match="2 of 120 pictures are unreadable, more than 1 %"):
            tokens.readable([20, 21])
    finally:
        tokens.close()


@pytest.mark.parametrize(("room", "encoded"), [(0, 24), (5 * LATENT, 3 * 8 - 2 * 5), (1 << 20, 8)])
def test_latents_are_made_once_where_there_is_room(
    room: int, encoded: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, *(f"{number}.png" for number in range(8)), size=(16, 16))
    seen = []
    encode = OnlineTokens._encode

    def watched(self: OnlineTokens, pixels: torch.Tensor) -> torch.Tensor:
        seen.append(len(pixels))
        return encode(self, pixels)

    monkeypatch.setattr(OnlineTokens, "_encode", watched)
    tokens = tokens_of(tmp_path, Silent(), room=room)
    try:
        first = tokens.latents(range(8))
        for _ in range(2):
            # a picture that is asked for twice is encoded once
            assert torch.equal(tokens.latents([*range(8), 2]), torch.cat((first, first[2:3])))
    finally:
        tokens.close()
    assert sum(seen) == encoded
    assert torch.equal(first, first.bfloat16().float())


def test_what_is_missing_or_too_much_is_said(tokenizer: Path, tmp_path: Path) -> None:
    fits = options_for("world:40", tmp_path / "run", tokenizer)
    with pytest.raises(UsageError, match=r"needs --init.*with the tokenizer that turns the pictures into bits"):
        train(replace(fits, init=Init()), Silent())
    with pytest.raises(UsageError, match=r"no tokenizer.*--init MODEL with one, to tokenize pictures"):
        train(replace(fits, init=Init((f"{tokenizer}:transformer",))), Silent())
    with pytest.raises(InputError, match="does not exist"):
        train(replace(fits, data=str(tmp_path / "picturs")), Silent())
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no pictures in"):
        train(replace(fits, data=str(tmp_path / "empty")), Silent())
    store = tmp_path / "store"
    tokenize(TokenizeOptions("world:12", store, str(tokenizer), device="cpu"), Silent())
    with pytest.raises(UsageError, match="--caption-key is for pictures"):
        train(replace(fits, data=str(store), caption_key="text"), Silent())
    with pytest.raises(UsageError, match="a tokenizer learns from no captions"):
        train(replace(fits, stage="tokenizer", resolved=resolved("tokenizer"), caption_key="text"), Silent())
    assert not (tmp_path / "run").exists()


def test_a_listing_trains_and_resumes_with_its_root_and_key(tokenizer: Path, tmp_path: Path) -> None:
    put(tmp_path / "pictures", *(f"{number}.png" for number in range(12)), size=(16, 16))
    (tmp_path / "list").mkdir()
    rows = [json.dumps({"file_name": f"{n}.png", "text": "wrong", "blip": f"right {n}"}) for n in range(12)]
    (tmp_path / "list" / "all.jsonl").write_text("\n".join(rows))
    options = replace(
        options_for(tmp_path / "list" / "all.jsonl", tmp_path / "run", tokenizer, steps=1, sample_every=1),
        image_root=tmp_path / "pictures",
        caption_key="blip",
    )
    train(options, Silent())
    assert resume(tmp_path / "run", Silent(), steps=1, device="cpu").steps == 2  # type: ignore[union-attr]
    captions = (tmp_path / "run" / "samples" / "captions.txt").read_text().splitlines()
    assert captions
    assert all(caption.startswith("right ") for caption in captions)


def test_a_dry_run_counts_the_encoder_and_what_is_kept(tokenizer: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    tokenize(TokenizeOptions("world:40", store, str(tokenizer), device="cpu"), Silent())
    cpu = torch.device("cpu")
    stored = fit_for(options_for(store, tmp_path / "run", tokenizer), "transformer", cpu)
    found = fit_for(options_for("world:40", tmp_path / "run", tokenizer), "transformer", cpu)
    assert stored.memory.encoding == 0
    assert found.memory.encoding > found.memory.weights + found.memory.average
    assert found.memory.to_json() == pytest.approx({**stored.memory.to_json(), "encoding": found.memory.encoding}, 0.01)
    assert found.data == stored.data == 40 * LATENT
    reads = options_for("world:40", tmp_path / "run", tokenizer, workers=2, picture_cache=0)
    assert fit_for(reads, "transformer", cpu).data == 8 * LOOP["batch_size"] * 3 * 16 * 16
    assert try_out(reads, Silent()).fits
    assert not (tmp_path / "run").exists()


def test_few_pictures_can_be_memorised(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overfit, "STEPS", 30)
    options = options_for("world:12", tmp_path / "run", tokenizer, optimizer={"learning_rate": 0.01})
    found = overfit.overfit_check(options, Silent())
    assert len(found.pictures) == 4
    assert all(name.startswith("world/0/") for name in found.pictures)
    assert found.loss < 0.4, "of bits that nobody knows it is 0.69"
