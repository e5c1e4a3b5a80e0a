"""The report on a data set: shares, shapes, captions that are cut, claims that are wrong."""

from pathlib import Path

import pytest
from data_sets import put, write_lines
from tokenizers import Tokenizer

from bitgen_cli.config import ScalesConfig
from bitgen_cli.engine.data_report import BadPicture, count_captions, data_report, measure
from bitgen_cli.engine.scales import PUBLISHED, aspect_of, buckets, nearest, parse_aspect
from bitgen_cli.engine.sources import open_source
from bitgen_cli.engine.vocabulary import find_vocabulary, new_vocabulary
from bitgen_cli.errors import InputError, UsageError
from bitgen_cli.report import Silent

PIXELS = {0.5: (32, 64), 1.0: (64, 64)}


@pytest.fixture
def vocabulary() -> Tokenizer:
    return new_vocabulary(["a dog on the moon", "a cat"], 100)


def test_shares_are_means_and_the_worst_are_named(tmp_path: Path) -> None:
    put(tmp_path, "square.png", size=(80, 80))
    put(tmp_path, "wide.png", size=(200, 100))
    put(tmp_path, "tall.png", size=(100, 200))
    put(tmp_path, "small.png", size=(20, 10))
    (tmp_path / "bad.png").write_bytes(b"")
    source = open_source(str(tmp_path))
    keys, sizes, bad = measure(source, Silent())
    told = data_report(source, keys, sizes, bad, PIXELS)
    assert (told.found, told.used, told.captions, told.misclaimed) == (5, 4, None, None)
    assert told.bad == [BadPicture("bad.png", f"{tmp_path}/bad.png is not a JPEG, PNG, WebP or BMP picture")]
    assert [(b.aspect, b.width, b.height, b.count, b.cropped, b.enlarged) for b in told.buckets] == [
        ("2:1", 64, 32, 2, 0.0, 1),
        ("1:1", 64, 64, 2, 0.25, 0),
    ]
    assert told.cropped == pytest.approx(0.5 / 4)
    assert [(entry.key, entry.share) for entry in told.most_cropped] == [("tall.png", 0.5)]
    said = "4 pictures (2 of 2:1, 2 of 1:1), 1 unreadable; 12.5 % of their area is cut off"
    assert told.summary() == said


def test_captions_are_counted_as_the_text_encoder_reads_them(vocabulary: Tokenizer) -> None:
    captions = [("a dog on the moon",), (), ("a cat", "a dog on the moon and a cat"), ("a cat",)]
    lengths = [len(vocabulary.encode(text).ids) for several in captions for text in several]
    counts = count_captions(["0", "1", "2", "3"], captions, lengths[0], vocabulary)
    assert (counts.count, counts.missing, counts.several) == (4, 1, 1)
    assert (counts.cut, counts.longest, counts.cut_of) == (1, max(lengths), ["2"])
    assert count_captions(["0", "1", "2", "3"], captions, lengths[0] - 1, vocabulary).cut_of == ["0", "2"]
    unknown = count_captions(["0", "1", "2", "3"], captions, 1, None)
    assert (unknown.count, unknown.cut, unknown.longest, unknown.cut_of) == (4, None, None, [])
    assert count_captions([], [], 5, vocabulary).longest == 0


def test_a_vocabulary_is_found_without_weights_and_never_fetched(
    tmp_path: Path, vocabulary: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    assert find_vocabulary(str(tmp_path)) is None
    assert find_vocabulary("somebody/flan-t5-of-ours") is None
    vocabulary.enable_truncation(2)
    vocabulary.save(str(tmp_path / "tokenizer.json"))
    found = find_vocabulary(str(tmp_path))
    assert found is not None
    assert len(found.encode("a dog on the moon").ids) > 2, "what is saved with it does not cut"
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="is not a tokenizer file"):
        find_vocabulary(str(tmp_path))


def test_claimed_shapes_are_compared_with_real_ones(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "b.png", "c.png", size=(40, 20))
    put(tmp_path, "d.png", size=(20, 20))
    rows = [{"image_path": f"{name}.png", "text": name} for name in "abcd"]
    write_lines(tmp_path / "0.500_000000004.jsonl", *rows)
    source = open_source(str(tmp_path))
    told = data_report(source, *measure(source, Silent()), PIXELS)
    assert told.misclaimed == 1


# -- shapes ------------------------------------------------------------------------------------------------------------


def test_shapes_have_names_and_are_found_by_them() -> None:
    config = ScalesConfig(published=True, resolution="1M")
    names = {ratio: aspect_of(ratio) for ratio in PUBLISHED}
    assert list(names.values()) == [
        *("1:1", "4:5", "5:4", "3:4", "4:3", "2:3", "3:2", "4:7", "7:4", "1:2", "2:1", "2:5", "5:2", "1:3", "3:1")
    ]
    for ratio, name in names.items():
        assert buckets(config, [name]) == (ratio,)
    assert buckets(config) == tuple(PUBLISHED)
    assert buckets(config, ["16:9", "1:1", "7:4"]) == (1.0, 0.571)
    assert nearest(0.7, (1.0, 0.571)) == 0.571
    assert aspect_of(1 / 40) == "40:1"


@pytest.mark.parametrize(
    "aspect", ["", "16", "16:", "0:1", "1:0", "1.5:1", "-1:1", "a:b", "1:1:1", "²:1", "9" * 9 + ":1"]
)
def test_shapes_written_otherwise_are_refused(aspect: str) -> None:
    with pytest.raises(UsageError, match="is not W:H"):
        parse_aspect(aspect)


def test_a_model_of_one_shape_has_no_other() -> None:
    config = ScalesConfig.model_validate({"published": False, "custom": {"1.0": [[1, 1], [2, 2]]}})
    assert buckets(config, ["1:1"]) == (1.0,)
    with pytest.raises(UsageError, match="height / width 1 alone, not --aspect 2:1"):
        buckets(config, ["2:1"])
