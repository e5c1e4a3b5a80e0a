"""Text features beside a store: what the encoder makes of every caption, to the last stored digit."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_store import fill, open_writer
from tiny import text_encoder_folder

from bitgen_cli.engine.model_folder import fingerprint
from bitgen_cli.engine.store import TokenStore
from bitgen_cli.engine.store_check import check_store
from bitgen_cli.engine.store_format import StoredText
from bitgen_cli.engine.store_text import ShardText, write_shard_text
from bitgen_cli.engine.text import TextEncoder, encoder_fingerprint, load_text_encoder
from bitgen_cli.errors import InputError
from bitgen_cli.report import Silent

CAPTIONS = [["a red dog", "a dog in the snow and on the moon"], [""], ["a cat"], ["a red dog"], ["dog", "cat", "a cat"]]
WIDTH = 16


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(text_encoder_folder(tmp_path_factory.mktemp("t5") / "encoder", WIDTH))


@pytest.fixture(scope="module")
def encoder(source: str) -> TextEncoder:
    return load_text_encoder(source, 8, torch.device("cpu"), torch.float32)


def autocast() -> torch.autocast:
    return torch.autocast("cpu", enabled=False)


def write(path: Path, encoder: TextEncoder) -> Path:
    with path.open("wb") as file:
        write_shard_text(file, CAPTIONS, encoder, 2, autocast)
    return path


def test_every_caption_has_the_features_the_encoder_makes(tmp_path: Path, encoder: TextEncoder) -> None:
    text = ShardText.map(write(tmp_path / "t", encoder), len(CAPTIONS), WIDTH)
    for picture, captions in enumerate(CAPTIONS):
        for number, caption in enumerate(captions):
            with torch.inference_mode():
                alone = encoder.encode([caption])
            row = text.row(picture, number)
            assert row.shape == (alone.lengths[0], WIDTH)
            assert (row.float() - alone.features[0]).abs().max() <= 0.01 * alone.features.abs().max()
        with pytest.raises(ValueError, match="of a picture with"):
            text.row(picture, len(captions))
    assert max(len(text.row(0, number)) for number in (0, 1)) == 8  # the longest caption is cut


def test_equal_captions_are_stored_once_in_an_ordinary_file(tmp_path: Path, encoder: TextEncoder) -> None:
    tensors = load_file(write(tmp_path / "t", encoder))
    assert tensors["pictures"].tolist() == [0, 2, 3, 4, 5, 8]
    assert tensors["captions"].tolist() == [0, 1, 2, 3, 0, 4, 5, 3]
    assert len(tensors["starts"]) == 7
    assert tensors["features"].shape == (tensors["starts"][-1], WIDTH)
    assert (tmp_path / "t").read_bytes() == write(tmp_path / "again", encoder).read_bytes()


def with_text(path: Path, encoder: TextEncoder) -> StoredText:
    """A store whose every shard has text features."""
    text = StoredText(encoder="ef" * 32, width=WIDTH, length=8)
    writer = open_writer(path)
    fill(writer)
    writer.flush()
    for number, shard in enumerate(writer.manifest.shards):
        own = [[f"caption \u2028 {row}"] for row in range(shard.count)]
        features = partial(write_shard_text, captions=own, encoder=encoder, batch_size=4, autocast=autocast)
        assert not writer.manifest.has_text
        writer.add_text(number, text, features)
    writer.finish()
    return text


def test_a_store_hands_out_features_of_any_pictures(tmp_path: Path, encoder: TextEncoder) -> None:
    with_text(tmp_path / "s", encoder)
    store = TokenStore.open(tmp_path / "s")
    assert store.manifest.has_text
    chosen = [11, 0, 0, 5]
    found = store.text_features(chosen)
    assert found is not None
    assert found.features.dtype == torch.float32
    for row, length, index in zip(found.features, found.lengths, chosen, strict=True):
        own = store._text(int(store._shard_of[index])).row(int(store._row_of[index]), 0)
        assert torch.equal(row[:length], own.float())
    assert check_store(tmp_path / "s", Silent()).faults == []
    plain = open_writer(tmp_path / "plain")
    fill(plain)
    plain.finish()
    assert TokenStore.open(tmp_path / "plain").text_features([0]) is None


def test_features_of_two_encoders_are_not_mixed(tmp_path: Path, encoder: TextEncoder) -> None:
    with_text(tmp_path / "s", encoder)
    writer = open_writer(tmp_path / "s")
    with pytest.raises(InputError, match="has another text encoder: efefefefefef, not abababababab"):
        writer.require_text(StoredText(encoder="ab" * 32, width=WIDTH, length=8))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("captions", lambda t: t + 10),
        ("captions", lambda t: t - 1),
        ("pictures", lambda t: t.flip(0)),
        ("pictures", lambda t: t[:-1]),
        ("starts", lambda t: t + 1),
        ("features", lambda t: t[:, 1:].contiguous()),
        ("features", lambda t: t.float()),
    ],
)
def test_a_file_that_points_elsewhere_is_refused(
    tmp_path: Path, encoder: TextEncoder, name: str, change: object
) -> None:
    tensors = load_file(write(tmp_path / "t", encoder))
    assert callable(change)
    save_file(tensors | {name: change(tensors[name])}, tmp_path / "t")
    with pytest.raises(InputError, match="corrupt"):
        ShardText.map(tmp_path / "t", len(CAPTIONS), WIDTH)


def test_verify_reads_the_features_too(tmp_path: Path, encoder: TextEncoder) -> None:
    with_text(tmp_path / "s", encoder)
    file = tmp_path / "s" / "shard-00001.text.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    faults = check_store(tmp_path / "s", Silent()).faults
    assert [fault.file for fault in faults] == ["shard-00001.text.safetensors"]


def test_the_fingerprint_is_that_of_all_the_features_depend_on(tmp_path: Path, source: str) -> None:
    before = encoder_fingerprint(source)
    assert before is not None
    folder = Path(source)
    assert encoder_fingerprint(str(folder)) == before
    (tmp_path / "copy").mkdir()
    for file in folder.iterdir():
        (tmp_path / "copy" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "copy" / "README.md").write_text("anything")
    assert encoder_fingerprint(str(tmp_path / "copy")) == before
    assert fingerprint(tmp_path / "copy") != fingerprint(folder)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        original = (tmp_path / "copy" / name).read_bytes()
        (tmp_path / "copy" / name).write_bytes(original + b" ")
        assert encoder_fingerprint(str(tmp_path / "copy")) != before
        (tmp_path / "copy" / name).write_bytes(original)
    (tmp_path / "copy" / "model.safetensors").unlink()
    assert encoder_fingerprint(str(tmp_path / "copy")) is None
    assert encoder_fingerprint("no-such-owner/no-such-repository") is None
    assert encoder_fingerprint(str(tmp_path / "missing" / "deep" / "folder")) is None
    assert json.loads((folder / "config.json").read_text())["d_model"] == WIDTH
