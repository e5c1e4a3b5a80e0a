"""`tokenize`: folders and the demo world to a store, with a tiny tokenizer of random weights."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_sets import write_coco, write_tar
from PIL import Image

from bitgen_cli.config import ModelConfig, SamplingConfig
from bitgen_cli.engine import pyramid
from bitgen_cli.engine.data import load_picture, to_float, to_tensor
from bitgen_cli.engine.losses import psnr
from bitgen_cli.engine.model_folder import load_model, save_model
from bitgen_cli.engine.scales import schedule
from bitgen_cli.engine.sources import open_source
from bitgen_cli.engine.store import TokenStore
from bitgen_cli.engine.store_check import check_store
from bitgen_cli.engine.store_writer import StoreWriter
from bitgen_cli.engine.tokenizer import Tokenizer
from bitgen_cli.errors import InputError, Interrupted, ResourceError, UsageError
from bitgen_cli.report import Silent
from bitgen_cli.runs import tokenize as module
from bitgen_cli.runs.encoding import Reader
from bitgen_cli.runs.tokenize import TokenizeOptions, tokenize

NAMES = {0: "000.png", 1: "001.png", 2: "002.png"}

CONFIG: dict[str, Any] = {
    "tokenizer": {
        "bits": 6,
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
        "text_width": 32,
        "text_length": 8,
        "patchify": False,
    },
    "text_encoder": {
        "source": "new",
        "vocabulary": 64,
        "width": 32,
        "layers": 1,
        "heads": 2,
        "ffn_width": 32,
    },
    "scales": {
        "published": False,
        "custom": {"1.0": [[1, 1], [2, 2], [4, 4]], "0.5": [[1, 1], [2, 4], [3, 6]], "2.0": [[1, 1], [6, 3]]},
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = ModelConfig.model_validate(CONFIG)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model(folder, config, SamplingConfig(), tokenizer=Tokenizer(config.tokenizer))
    return folder


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of 5 pictures, which batches of 2 do not divide."""

    class SmallShards(StoreWriter):
        def __init__(self, path: Path, **values: Any) -> None:
            super().__init__(path, **values, shard_size=5)

    monkeypatch.setattr(module, "StoreWriter", SmallShards)


def options(data: str | Path, out: Path, model: Path, **changes: Any) -> TokenizeOptions:
    values = {"batch_size": 2, "device": "cpu", "dtype": "fp32"}
    return TokenizeOptions(data=str(data), out=out, model=str(model), **{**values, **changes})


def save_pictures(folder: Path, count: int) -> None:
    """Pictures of three proportions in turn, every other one with a caption."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        size = [(20, 20), (40, 20), (15, 31)][number % 3]
        noise = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(folder / f"{number:03d}.png")
        if number % 2:
            (folder / f"{number:03d}.txt").write_text(f"caption {number}")


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_a_store_holds_what_the_tokenizer_says(tmp_path: Path, model: Path) -> None:
    save_pictures(tmp_path / "data", 20)
    report = Silent()
    result = tokenize(options(tmp_path / "data", tmp_path / "s", model, latents=False), report)
    store = TokenStore.open(tmp_path / "s")
    assert check_store(tmp_path / "s", Silent()).faults == []
    loaded = load_model(model, parts=("tokenizer",))
    assert loaded.tokenizer is not None
    assert store.manifest.tokenizer == loaded.fingerprints["tokenizer"]
    assert store.ratios == [0.5, 1.0, 2.0]
    source = open_source(str(tmp_path / "data"))
    indices = {source.key(i): i for i in range(len(source))}
    compared = 0
    assert sorted(store.keys) == sorted(indices)
    for number, key in enumerate(store.keys):
        entry = schedule(loaded.config.scales, patchify=False, ratio=store.ratio(number))
        image = to_tensor(source.image(indices[key]), entry.pixels(4))
        with torch.inference_mode():
            latent = loaded.tokenizer.latent(to_float(image)[None])
            expected, _ = loaded.tokenizer.encode(to_float(image)[None], entry)
        # a batch of two may round differently from a batch of one: latents near zero are left out
        if latent.abs().min() > 1e-5:
            compared += 1
            assert all(torch.equal(a, b) for a, b in zip(store.bits([number]), expected, strict=True)), key
        assert store.captions[number] == source.captions(indices[key])
    assert compared >= 10
    assert (result.count, result.added, result.without_caption, result.bad) == (20, 20, 10, [])
    assert [(entry.ratio, entry.count, entry.positions, entry.bits) for entry in result.ratios] == [
        (0.5, 7, 27, 162),
        (1.0, 7, 21, 126),
        (2.0, 6, 19, 114),
    ]
    assert result.bits_per_image == pytest.approx((7 * 162 + 7 * 126 + 6 * 114) / 20)
    assert result.bytes_per_image == pytest.approx(
        sum(len(content) for name, content in contents(tmp_path / "s").items() if name.startswith("shard"))
        / 20
    )
    assert report.notices == [f"{tmp_path / 'data'}: pictures with .txt files: 10 of 20 have one"]
    assert json.loads(json.dumps(result.to_json()))["ratios"][0]["positions"] == 27


def test_stored_bits_are_the_bits_of_the_stored_latents(tmp_path: Path, model: Path) -> None:
    tokenize(options("world:9", tmp_path / "s", model), Silent())
    store = TokenStore.open(tmp_path / "s")
    latents = store.latents(range(9))
    assert latents is not None
    expected, _ = pyramid.encode(latents, store.schedule(1.0))
    assert all(torch.equal(a, b) for a, b in zip(store.bits(range(9)), expected, strict=True))
    assert store.captions == [open_source("world:9").captions(i) for i in range(9)]


@pytest.mark.parametrize("stop_at", [1, 7, 13, 19, 22])
def test_interrupted_and_continued_equals_straight(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    """Ctrl-C at any picture: the second run leaves the files an undisturbed run leaves."""
    save_pictures(tmp_path / "data", 23)
    tokenize(options(tmp_path / "data", tmp_path / "straight", model), Silent())

    read = Reader.__getitem__

    def read_or_stop(self: Any, number: int) -> Any:
        if number == stop_at:
            raise KeyboardInterrupt
        return read(self, number)

    monkeypatch.setattr(Reader, "__getitem__", read_or_stop)
    with pytest.raises(Interrupted, match="same command"):
        tokenize(options(tmp_path / "data", tmp_path / "stopped", model), Silent())
    monkeypatch.setattr(Reader, "__getitem__", read)
    result = tokenize(options(tmp_path / "data", tmp_path / "stopped", model), Silent())
    assert result.count == 23
    assert contents(tmp_path / "stopped") == contents(tmp_path / "straight")


def test_reading_ahead_in_processes_changes_nothing(tmp_path: Path, model: Path) -> None:
    save_pictures(tmp_path / "data", 12)
    tokenize(options(tmp_path / "data", tmp_path / "one", model), Silent())
    tokenize(options(tmp_path / "data", tmp_path / "two", model, workers=2), Silent())
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_threads_that_encode_at_the_same_time_change_nothing(tmp_path: Path, model: Path) -> None:
    save_pictures(tmp_path / "data", 23)
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        tokenize(options(tmp_path / "data", tmp_path / f"{threads}", model), Silent())
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


def test_a_reading_process_that_dies_is_one_clear_line(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Reader, "__getitem__", lambda self, number: os._exit(1))
    with pytest.raises(ResourceError, match="a reading process ended"):
        tokenize(options("world:3", tmp_path / "s", model, workers=1), Silent())


def test_a_complete_store_has_nothing_to_do(tmp_path: Path, model: Path) -> None:
    tokenize(options("world:7", tmp_path / "s", model), Silent())
    before, report = contents(tmp_path / "s"), Silent()
    result = tokenize(options("world:7", tmp_path / "s", model), report)
    assert (result.count, result.added, result.images_per_second) == (7, 0, 0.0)
    assert any("nothing to do" in notice for notice in report.notices)
    assert contents(tmp_path / "s") == before


def test_a_larger_world_is_added_to_the_store(tmp_path: Path, model: Path) -> None:
    tokenize(options("world:7", tmp_path / "s", model), Silent())
    result = tokenize(options("world:12", tmp_path / "s", model), Silent())
    assert (result.count, result.added) == (12, 5)
    assert len(set(TokenStore.open(tmp_path / "s").keys)) == 12


def test_bf16_and_batches_make_the_same_kind_of_store(tmp_path: Path, model: Path) -> None:
    tokenize(options("world:6", tmp_path / "fp32", model), Silent())
    tokenize(options("world:6", tmp_path / "bf16", model, dtype="bf16", batch_size=4), Silent())
    full, half = TokenStore.open(tmp_path / "fp32"), TokenStore.open(tmp_path / "bf16")
    assert full.keys == half.keys
    pairs = zip(full.bits(range(6)), half.bits(range(6)), strict=True)
    assert torch.cat([(a == b).flatten() for a, b in pairs]).float().mean() > 0.9


def test_a_few_bad_pictures_are_named_and_skipped(tmp_path: Path, model: Path) -> None:
    save_pictures(tmp_path / "data", 110)
    whole = (tmp_path / "data" / "050.png").read_bytes()
    (tmp_path / "data" / "050.png").write_bytes(whole[: len(whole) // 2])
    report = Silent()
    result = tokenize(options(tmp_path / "data", tmp_path / "s", model, batch_size=8), report)
    assert (result.count, result.added) == (109, 109)
    assert [entry.key for entry in result.bad] == ["050.png"]
    assert any("050.png is damaged" in notice for notice in report.notices)
    again = Silent()
    result = tokenize(options(tmp_path / "data", tmp_path / "s", model), again)
    assert (result.count, result.added, len(result.bad)) == (109, 0, 1)
    assert any("nothing to do" in notice for notice in again.notices)


def test_more_than_one_percent_bad_is_an_error(tmp_path: Path, model: Path) -> None:
    save_pictures(tmp_path / "data", 30)
    for number in (3, 4):
        (tmp_path / "data" / f"{number:03d}.png").write_bytes(b"not a picture")
    with pytest.raises(InputError, match=r"2 of 30 pictures are unreadable.*: 003\.png, 004\.png"):
        tokenize(options(tmp_path / "data", tmp_path / "s", model), Silent())
    with pytest.raises(InputError, match="unfinished"):
        TokenStore.open(tmp_path / "s")
    save_pictures(tmp_path / "data", 30)
    assert tokenize(options(tmp_path / "data", tmp_path / "s", model), Silent()).count == 30


def test_many_bad_pictures_end_the_run_early(tmp_path: Path, model: Path) -> None:
    save_pictures(tmp_path / "data", 3)
    for number in range(300):
        (tmp_path / "data" / f"x{number:03d}.jpg").write_bytes(b"not a picture")
    report = Silent()
    with pytest.raises(InputError, match=r"98 of 101 pictures are unreadable.* and 88 more"):
        tokenize(options(tmp_path / "data", tmp_path / "s", model), report)
    assert len([notice for notice in report.notices if notice.startswith("skipped:")]) == 10


@pytest.mark.parametrize("change", [{"latents": False}, {"data": "world:7:1"}])
def test_another_choice_needs_another_folder(tmp_path: Path, model: Path, change: dict[str, Any]) -> None:
    tokenize(options("world:7", tmp_path / "s", model), Silent())
    with pytest.raises(InputError, match="choose a new folder"):
        tokenize(options(**{"data": "world:7", "out": tmp_path / "s", "model": model, **change}), Silent())


def test_a_store_of_another_tokenizer_is_not_continued(tmp_path: Path, model: Path) -> None:
    tokenize(options("world:7", tmp_path / "s", model), Silent())
    torch.manual_seed(1)
    config = ModelConfig.model_validate(CONFIG)
    save_model(tmp_path / "other", config, SamplingConfig(), tokenizer=Tokenizer(config.tokenizer))
    with pytest.raises(InputError, match="has another tokenizer"):
        tokenize(options("world:9", tmp_path / "s", tmp_path / "other"), Silent())


def test_wrong_input_leaves_no_store(tmp_path: Path, model: Path) -> None:
    (tmp_path / "empty").mkdir()
    wrong: list[tuple[type[Exception], TokenizeOptions]] = [
        (InputError, options(tmp_path / "empty", tmp_path / "s", model)),
        (InputError, options("world:3", tmp_path / "s", tmp_path / "no model")),
        (UsageError, options("world:x", tmp_path / "s", model)),
        (UsageError, options("world:3", tmp_path / "s", model, resolution="1M")),
        (ResourceError, options("world:3", tmp_path / "s", model, device="cuda:99")),
    ]
    for error, given in wrong:
        with pytest.raises(error):
            tokenize(given, Silent())
    assert not (tmp_path / "s").exists()


def test_the_report_says_what_was_found_and_what_became_of_it(tmp_path: Path, model: Path) -> None:
    save_pictures(tmp_path / "data", 120)
    (tmp_path / "data" / "060.png").write_bytes(b"no picture")
    (tmp_path / "data" / "notes.md").touch()
    result = tokenize(options(tmp_path / "data", tmp_path / "s", model, batch_size=16), Silent())
    told = result.report
    assert json.loads((tmp_path / "s" / "data_report.json").read_text()) == json.loads(json.dumps(told.to_json()))
    assert (told.found, told.used, [entry.key for entry in told.bad]) == (120, 119, ["060.png"])
    assert "060.png is not a JPEG" in told.bad[0].reason
    assert told.remarks == ["left out: 1 .md"]
    # 15 x 31 becomes 12 x 24, 40 x 20 becomes 24 x 12, 20 x 20 becomes 16 x 16
    wanted = [("2:1", 0.5, 24, 12, 40, 0.0), ("1:1", 1.0, 16, 16, 39, 0.0), ("1:2", 2.0, 12, 24, 40, 0.0)]
    shapes = [(b.aspect, b.ratio, b.width, b.height, b.count, round(b.cropped, 3)) for b in told.buckets]
    assert shapes == wanted
    assert told.enlarged == 0
    captions = told.captions
    assert captions is not None
    assert (captions.count, captions.missing, captions.several) == (60, 59, 0)
    assert captions.cut is None, "a model without text encoder cannot tell"
    # a later run that has nothing to do says the same
    again = tokenize(options(tmp_path / "data", tmp_path / "s", model, batch_size=16), Silent())
    assert again.report == told


def test_shapes_can_be_restricted(tmp_path: Path, model: Path) -> None:
    save_pictures(tmp_path / "data", 9)
    result = tokenize(options(tmp_path / "data", tmp_path / "s", model, aspects=("1:1", "7:4")), Silent())
    assert [(entry.ratio, entry.count) for entry in result.ratios] == [(0.5, 3), (1.0, 6)]
    (wide, square) = result.report.buckets
    assert (wide.cropped, round(square.cropped, 3)) == (0, round(3 / 6 * (1 - 16 / 33), 3))
    assert [entry.key for entry in result.report.most_cropped] == ["002.png", "005.png", "008.png"]
    with pytest.raises(InputError, match="another choice of aspect ratios"):
        tokenize(options(tmp_path / "data", tmp_path / "s", model), Silent())
    with pytest.raises(UsageError, match="'1x1' is not W:H"):
        tokenize(options(tmp_path / "data", tmp_path / "t", model, aspects=("1x1",)), Silent())


def test_all_captions_of_a_picture_are_stored(tmp_path: Path, model: Path) -> None:
    save_pictures(tmp_path / "data" / "train2017", 3)
    captions = [(0, "a"), (1, "b"), (0, "c"), (0, "d")]
    file = write_coco(tmp_path / "data" / "annotations" / "captions_train2017.json", NAMES, captions)
    report = Silent()
    result = tokenize(options(file, tmp_path / "s", model), report)
    store = TokenStore.open(tmp_path / "s")
    stored = dict(zip(store.keys, store.captions, strict=True))
    assert stored == {"000.png": ("a", "c", "d"), "001.png": ("b",), "002.png": ()}
    assert dict(zip(store.keys, store.sizes, strict=True))["001.png"] == (40, 20)
    assert report.notices == [f"{file}: COCO captions captions_train2017.json: 3 pictures, 4 captions"]
    assert result.report.captions is not None
    assert (result.report.captions.several, result.without_caption) == (1, 1)
    with pytest.raises(InputError, match="another pictures' source"):
        tokenize(options(file, tmp_path / "s", model, caption_key="caption"), Silent())


@pytest.mark.parametrize("workers", [0, 2])
def test_tars_are_tokenized_by_several_processes(tmp_path: Path, model: Path, workers: int) -> None:
    save_pictures(tmp_path / "data", 12)
    members = {file.name: file.read_bytes() for file in sorted((tmp_path / "data").iterdir())}
    write_tar(tmp_path / "a.tar", members)
    tokenize(options(tmp_path / "a.tar", tmp_path / "s", model, workers=workers), Silent())
    tokenize(options(tmp_path / "data", tmp_path / "plain", model), Silent())
    tars, plain = TokenStore.open(tmp_path / "s"), TokenStore.open(tmp_path / "plain")
    assert [f"a.tar/{Path(key).stem}" for key in plain.keys] == tars.keys
    assert plain.captions == tars.captions
    assert all(torch.equal(a, b) for a, b in zip(plain.bits([0, 1]), tars.bits([0, 1]), strict=True))


def test_reconstructions_are_written_and_measured(tmp_path: Path, model: Path) -> None:
    save_pictures(tmp_path / "data", 12)
    result = tokenize(options(tmp_path / "data", tmp_path / "s", model, reconstruct=6), Silent())
    folder = tmp_path / "s" / "reconstructions"
    written = json.loads((folder / "reconstructions.json").read_text())
    assert (written["psnr"], written["ssim"]) == (result.psnr, result.ssim)
    rows = written["pictures"]
    store = TokenStore.open(tmp_path / "s")
    assert [row["key"] for row in rows] == [store.keys[i] for i in sorted(range(0, 12, 2), key=store.ratio)]
    assert result.psnr == pytest.approx(sum(row["psnr"] for row in rows) / 6)
    for row in rows:
        pair = np.asarray(load_picture(folder / row["file"]))
        width = (pair.shape[1] - 4) // 2
        original, decoded = (
            to_float(torch.from_numpy(half.copy()).permute(2, 0, 1))[None]
            for half in (pair[:, :width], pair[:, -width:])
        )
        kept = to_tensor(load_picture(tmp_path / "data" / row["key"]), (pair.shape[0], width))
        assert torch.equal(to_float(kept)[None], original)
        assert psnr(original, decoded).item() == pytest.approx(row["psnr"], abs=1e-3)
    sheet = load_picture(folder / "contact_sheet.png")
    assert sheet.size == (6 * (24 + 4) + 4, 2 * (24 + 4) + 4)
    # a store with its reconstructions is still the same store
    assert tokenize(options(tmp_path / "data", tmp_path / "s", model, reconstruct=0), Silent()).added == 0


def test_more_reconstructions_than_pictures_are_all_of_them(tmp_path: Path, model: Path) -> None:
    tokenize(options("world:3", tmp_path / "s", model, reconstruct=50), Silent())
    written = json.loads((tmp_path / "s" / "reconstructions" / "reconstructions.json").read_text())
    assert len(written["pictures"]) == 3
