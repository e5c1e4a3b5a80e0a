"""`bitgen gen-priors`: class pictures that are made once, topped up, mended, and never mixed up with the user's own."""

from __future__ import annotations

import errno
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_model
import torch
from PIL import Image

from bitgen_cli.__main__ import main
from bitgen_cli.engine.model_folder import Model, load_model, read_model_config
from bitgen_cli.errors import BitgenError, ConfigError, InputError, Interrupted, ResourceError, UsageError
from bitgen_cli.report import Silent
from bitgen_cli.runs import gen_priors as module
from bitgen_cli.runs import prior_artist
from bitgen_cli.runs.class_words import LONGEST_CLASS, check_class, with_article
from bitgen_cli.runs.gen_priors import PriorResult, gen_priors
from bitgen_cli.runs.jobs import SampleOptions
from bitgen_cli.runs.prior_folder import MANIFEST, Prior, read_priors
from bitgen_cli.runs.prior_options import PriorOptions
from bitgen_cli.runs.sample import sample

pytestmark = pytest.mark.usefixtures("home")
CONFIG = tiny_model.config("0.5", "1.0", text_length=40)

Straight = Callable[[int], dict[str, bytes]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.save(tmp_path_factory.mktemp("models") / "tiny", config=CONFIG)


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.save(tmp_path_factory.mktemp("models") / "other", 1, CONFIG)


@pytest.fixture(scope="module")
def straight(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Straight:
    """What a folder of so many pictures of a dog holds when nothing disturbs its making."""

    @functools.cache
    def made(count: int) -> dict[str, bytes]:
        folder = tmp_path_factory.mktemp("straight")
        make(model, folder, count=count)
        return contents(folder)

    return made


CACHED_LOAD = functools.cache(load_model)


@pytest.fixture(autouse=True)
def load_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are only read by what is tested here, so each is loaded once for all tests."""
    monkeypatch.setattr(prior_artist, "load_model", CACHED_LOAD)


def make(model: Path, folder: Path | str | None = "p", report: Silent | None = None, **changes: Any) -> PriorResult:
    values = {"class_word": "dog", "count": 5, "batch_size": 2, **changes}
    output = None if folder is None else Path(folder)
    return gen_priors(PriorOptions(model=str(model), output=output, **values), report or Silent())


def contents(folder: Path | str) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def manifest(folder: Path | str) -> dict[str, Any]:
    stored: dict[str, Any] = json.loads((Path(folder) / MANIFEST).read_text())
    return stored


def fingerprints(model: Path) -> dict[str, str]:
    return read_model_config(model)[2]


def save_own(file: Path, colour: str = "red") -> bytes:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 10), colour).save(file)
    return file.read_bytes()


def forbid_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("nothing is to be loaded or drawn")

    monkeypatch.setattr(prior_artist, "load_model", refuse)
    monkeypatch.setattr(prior_artist, "draw_bits", refuse)


# -- what is made ------------------------------------------------------------------------------------------------------


def test_pictures_are_those_that_sample_draws(model: Path) -> None:
    result = make(model, templates=("a {class}", "the {class} on the moon"), seed=7, class_word="orange  dog ")
    assert (result.made, result.reused, result.own, result.remade) == (5, 0, 0, ())
    prompts = ["an orange dog", "the orange dog on the moon"]
    assert result.pictures == tuple(Prior(Path(f"p/{k:04d}.png"), prompts[k % 2]) for k in range(5))
    for number, prior in enumerate(result.pictures):
        options = SampleOptions(prompts=(prior.prompt,), model=str(model), seed=7 + number, output="s/")
        (drawn,) = sample(options, Silent()).pictures
        with Image.open(drawn.path) as expected, Image.open(prior.file) as picture:
            picture.load()
            assert picture.size == (16, 16)
            assert picture.tobytes() == expected.tobytes()
            assert json.loads(picture.text["bitgen"]) == drawn.recipe  # type: ignore[attr-defined]
            assert picture.text["parameters"].startswith(prior.prompt)  # type: ignore[attr-defined]
    assert len({file.read_bytes() for file in Path("p").glob("*.png")}) > 1


def test_the_manifest_tells_everything(model: Path) -> None:
    make(model, overrides=("sampling.cfg=2", "sampling.tau=[1,0.5,0.5]"))
    stored = manifest("p")
    listed = stored.pop("pictures")
    assert stored == {
        "format": "bitgen priors",
        "version": 1,
        "base": fingerprints(model),
        "base_name": "tiny",
        "class_word": "dog",
        "templates": ["a {class}", "a photo of a {class}", "one {class}", "the {class}"],
        "seed": 0,
        "sampling": {
            "cfg": 2.0, "cfg_layer": 0, "tau": [1.0, 0.5, 0.5], "target_confidence": None, "top_k": 0, "top_p": 1.0,
            "fast": 0,
            "refine": 0,
        },
        "size": [16, 16],
    }
    assert fingerprints(model).keys() == {"tokenizer", "transformer", "text_encoder"}
    assert [(row["file"], row["seed"]) for row in listed] == [(f"{k:04d}.png", k) for k in range(5)]
    assert [row["prompt"] for row in listed] == ["a dog", "a photo of a dog", "one dog", "the dog", "a dog"]


def test_the_batch_size_has_no_influence(model: Path) -> None:
    for size in (1, 3, 8):
        make(model, f"p{size}", batch_size=size, count=8)
    assert contents("p1") == contents("p3") == contents("p8")


def test_a_loaded_model_draws_the_same_and_is_left_as_it_was(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(model, "alone")
    loaded = load_model(model)
    assert loaded.transformer is not None
    before = {name: tensor.clone() for name, tensor in loaded.transformer.state_dict().items()}
    monkeypatch.setattr(prior_artist, "load_model", None)
    gen_priors(PriorOptions("dog", 5, str(model), Path("given")), Silent(), loaded)
    assert contents("alone") == contents("given")
    assert all(torch.equal(before[name], tensor) for name, tensor in loaded.transformer.state_dict().items())


def test_a_model_without_a_transformer_is_told(model: Path) -> None:
    loaded = load_model(model, parts=("tokenizer",))
    with pytest.raises(InputError, match="no transformer"):
        gen_priors(PriorOptions("dog", 5, str(model), Path("p")), Silent(), loaded)
    assert not Path("p").exists()


# -- asked for again ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [5, 2])
def test_what_is_there_is_not_made_again(model: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    make(model)
    before = contents("p")
    times = {file: file.stat().st_mtime_ns for file in Path("p").iterdir()}
    forbid_drawing(monkeypatch)
    report = Silent()
    result = make(model, report=report, count=count)
    assert (result.made, result.reused, len(result.pictures)) == (0, 5, 5)
    assert report.notices == ["nothing to make: p holds 5 class pictures"]
    assert contents("p") == before
    assert {file: file.stat().st_mtime_ns for file in Path("p").iterdir()} == times


def test_a_larger_count_tops_up(model: Path, straight: Straight) -> None:
    make(model, count=3)
    report = Silent()
    result = make(model, report=report, count=7, batch_size=3)
    assert (result.made, result.reused) == (4, 3)
    assert report.notices == ["reused: p holds 3 class pictures"]
    assert contents("p") == straight(7)


@pytest.mark.parametrize("batches", [0, 1, 3])
def test_interrupted_and_continued_equals_straight(
    model: Path, straight: Straight, monkeypatch: pytest.MonkeyPatch, batches: int
) -> None:
    """Ctrl-C while a batch is drawn loses that batch alone."""
    real, calls = prior_artist.draw_bits, []

    def draw_or_stop(*given: Any, **named: Any) -> Any:
        if len(calls) == batches:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*given, **named)

    monkeypatch.setattr(prior_artist, "draw_bits", draw_or_stop)
    with pytest.raises(Interrupted, match=f"holds {2 * batches} of 7 class pictures"):
        make(model, count=7)
    monkeypatch.setattr(prior_artist, "draw_bits", real)
    assert len(contents("p")) == 2 * batches + 1
    result = make(model, count=7)
    assert (result.made, result.reused, result.own) == (7 - 2 * batches, 2 * batches, 0)
    assert contents("p") == straight(7)


@pytest.mark.parametrize("call", range(9))
def test_killed_while_a_batch_is_written_no_picture_passes_for_the_users(
    model: Path, straight: Straight, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """Whatever the last rename was before the end: the next run ends where an undisturbed one does."""

    class Killed(BaseException):
        pass

    undisturbed = straight(4)
    real, calls = Path.replace, []

    def replace_or_die(self: Path, target: Path) -> Path:
        if len(calls) == call:
            raise Killed
        calls.append(target)
        return real(self, target)

    with monkeypatch.context() as dying:
        dying.setattr(Path, "replace", replace_or_die)
        dying.setattr(shutil, "rmtree", lambda *_, **__: None)  # nobody tidies up after kill -9
        with pytest.raises(Killed):
            make(model, count=4)
    assert make(model, count=4).own == 0
    assert {name: data for name, data in contents("p").items() if name[0] != "."} == undisturbed
    assert [prior.file.name for prior in read_priors(Path("p"), "dog", fingerprints(model))] == [
        f"{k:04d}.png" for k in range(4)
    ]


def test_what_another_process_lists_meanwhile_stays_listed(
    model: Path, straight: Straight, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = prior_artist.draw_bits

    def draw_while_another_does(*given: Any, **named: Any) -> Any:
        monkeypatch.setattr(prior_artist, "draw_bits", real)
        with torch.inference_mode(False):
            make(model, count=7)
        return real(*given, **named)

    monkeypatch.setattr(prior_artist, "draw_bits", draw_while_another_does)
    result = make(model, count=3)
    assert (len(result.pictures), len(manifest("p")["pictures"])) == (7, 7)
    assert contents("p") == straight(7)


def test_missing_and_damaged_pictures_are_made_again_and_named(model: Path) -> None:
    make(model)
    before = contents("p")
    Path("p/0001.png").unlink()
    Path("p/0003.png").write_bytes(before["0003.png"][:-20])
    report = Silent()
    result = make(model, report=report, count=1)
    assert (result.made, result.reused, result.remade) == (2, 3, ("0001.png", "0003.png"))
    assert report.notices[1] == "made again: 0001.png is missing, 0003.png is damaged"
    assert contents("p") == before


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"class_word": "Dog"}, "class 'dog', not 'Dog'"),
        ({"templates": ("the {class}",)}, "templates 'a {class}, a photo of a {class}.*', not 'the {class}'"),
        ({"seed": 1}, "seed 0, not 1"),
        ({"overrides": ("sampling.cfg=2", "sampling.top_k=1")}, r"sampling.cfg 3.0, not 2.0; sampling.top_k 0, not 1"),
    ],
)
def test_other_pictures_need_another_folder(model: Path, changes: dict[str, Any], says: str) -> None:
    make(model)
    before = contents("p")
    with pytest.raises(UsageError, match=f"p holds other class pictures: {says}.*--output") as refused:
        make(model, count=9, **changes)
    assert "\n" not in str(refused.value)
    assert contents("p") == before
    assert make(model, "another", **changes).made == 5


def test_pictures_of_another_base_model_are_refused(model: Path, other_model: Path) -> None:
    make(model)
    before = contents("p")
    with pytest.raises(UsageError, match="another base model, tiny, whose text_encoder and tokenizer and transformer"):
        make(other_model)
    with pytest.raises(UsageError, match="another base model, tiny"):
        read_priors(Path("p"), "dog", fingerprints(other_model))
    assert contents("p") == before


def test_each_base_model_and_class_has_its_default_folder(model: Path, other_model: Path, home: Path) -> None:
    places = [
        make(made_with, None, class_word=word, count=1).folder
        for made_with in (model, other_model)
        for word in ("dog", "../orange car")
    ]
    assert len(set(places)) == 4
    names = [place.relative_to(home / "priors").parts[1].rpartition("-")[0] for place in places]
    assert names == ["dog", "orange-car"] * 2
    assert make(model, None, count=1).reused == 1
    # so does every way of drawing the class: none of them is in another's way
    others = ({"templates": ("the {class}",)}, {"seed": 5}, {"overrides": ("sampling.tau=0.5",)})
    places += [make(model, None, count=1, **other).folder for other in others]
    assert len(set(places)) == 7


# -- the user's own pictures -------------------------------------------------------------------------------------------


def test_own_pictures_count_and_are_never_touched(model: Path) -> None:
    own = {name: save_own(Path(name), colour) for name, colour in (("p/0001.png", "red"), ("p/me.jpg", "blue"))}
    Path("p/me.txt").write_text("a {class} in\n the snow")
    Path("p/notes.md").write_text("not a picture")
    Path("p/folder.png").mkdir()
    report = Silent()
    result = make(model, report=report, class_word="otter")
    assert (result.made, result.reused, result.own, len(result.pictures)) == (3, 0, 2, 5)
    assert report.notices == ["reused: p holds 2 class pictures, 2 of them your own"]
    assert {name: Path(name).read_bytes() for name in own} == own
    assert [row["file"] for row in manifest("p")["pictures"]] == ["0000.png", "0001-2.png", "0002.png"]
    assert result.pictures[3:] == (
        Prior(Path("p/0001.png"), "an otter"),
        Prior(Path("p/me.jpg"), "an otter in the snow"),
    )
    assert make(model, class_word="otter").made == 0
    make(model, "without", class_word="otter", count=3)
    assert Path("p/0001-2.png").read_bytes() == Path("without/0001.png").read_bytes()


def test_enough_own_pictures_need_no_model(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        save_own(Path(f"p/{number}.png"))
    before = contents("p")
    forbid_drawing(monkeypatch)
    result = make(model, count=3)
    assert (result.made, result.own) == (0, 3)
    assert contents("p") == before
    assert read_priors(Path("p"), "dog", {"tokenizer": "any"}) == list(result.pictures)


def test_own_pictures_that_cannot_be_read_are_named_and_not_counted(model: Path) -> None:
    save_own(Path("p/good.png"))
    Path("p/bad.png").write_bytes(b"not a picture")
    report = Silent()
    result = make(model, report=report, count=3)
    assert (result.made, result.own) == (2, 1)
    assert report.notices[0] == "not counted: p/bad.png is not a JPEG, PNG, WebP or BMP picture"
    assert Path("p/bad.png").read_bytes() == b"not a picture"
    assert len(read_priors(Path("p"), "dog", fingerprints(model))) == 3


def test_a_caption_that_is_no_text_is_told(model: Path) -> None:
    save_own(Path("p/me.png"))
    Path("p/me.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InputError, match=r"me\.txt is not UTF-8"):
        read_priors(Path("p"), "dog", fingerprints(model))


# -- reading -----------------------------------------------------------------------------------------------------------


def test_priors_are_read_as_they_were_made(model: Path) -> None:
    save_own(Path("p/me.png"))
    result = make(model)
    assert read_priors(Path("p"), " dog", fingerprints(model)) == list(result.pictures)
    with pytest.raises(UsageError, match="class 'dog', not 'cat'"):
        read_priors(Path("p"), "cat", fingerprints(model))
    Path("p/0002.png").unlink()
    with pytest.raises(InputError, match=r"0002\.png is missing.*makes them again"):
        read_priors(Path("p"), "dog", fingerprints(model))


def test_no_class_pictures_are_told(model: Path) -> None:
    with pytest.raises(InputError, match="no class pictures at p: there is no such folder"):
        read_priors(Path("p"), "dog", fingerprints(model))
    Path("p").mkdir()
    Path("p/notes.txt").write_text("a dog")
    with pytest.raises(InputError, match="no class pictures in p"):
        read_priors(Path("p"), "dog", fingerprints(model))


# -- words -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "class_word", "prompt"),
    [
        ("a {class}", "dog", "a dog"),
        ("a {class}", "orange car", "an orange car"),
        ("A {class} and an {class}", "Owl", "An Owl and an Owl"),
        ("an {class}", "dog", "a dog"),
        ("a photo of a {class}", "umbrella", "a photo of an umbrella"),
        ("a photo of a {class} on a hill", "apple", "a photo of an apple on a hill"),
        ("a {class}", "unicorn", "a unicorn"),
        ("a {class}", "used car", "a used car"),
        ("a {class}", "hourglass", "an hourglass"),
        ("a {class}", "house", "a house"),
        ("a {class}", "one-eyed cat", "a one-eyed cat"),
        ("a {class}", "onion", "an onion"),
        ("a {class}", "urn", "an urn"),
        ("the {class}", "apple", "the apple"),
        ("pizza {class}", "apple", "pizza apple"),
        ("a red {class}", "apple", "a red apple"),
        ("{class}", "犬", "犬"),
        ("a {class}", r"\1", r"a \1"),
    ],
)
def test_the_article_fits_the_class(template: str, class_word: str, prompt: str) -> None:
    assert with_article(template, class_word) == prompt


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "the class is empty"),
        (" \n ", "the class is empty"),
        ("dog\ncat", "not one line"),
        ("dog\x1b[31m", "not one line"),
        ("x" * (LONGEST_CLASS + 1), "61 characters"),
        ("[V] dog", "cannot be a class"),
        ("{class}", "cannot be a class"),
        ("...", "cannot be a class"),
        ("A dog", "has an article.*--class 'dog'"),
    ],
)
def test_a_class_is_a_word_or_two(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        check_class(text)


def test_a_class_may_begin_with_a_letter_that_is_an_article() -> None:
    assert check_class(" a-frame   house ") == "a-frame house"
    assert check_class("A") == "A"
    assert check_class("x" * LONGEST_CLASS) == "x" * LONGEST_CLASS


# -- what can go wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"count": 0}, UsageError, "--count 0"),
        ({"batch_size": 0}, UsageError, "--batch-size 0"),
        ({"seed": -1}, UsageError, "--seed -1"),
        ({"seed": 2**63}, UsageError, "--seed 9223372036854775808"),
        ({"templates": ("a dog",)}, UsageError, "template 'a dog' does not contain {class}"),
        ({"templates": ()}, UsageError, "does not contain {class}"),
        ({"overrides": ("model.depth=3",)}, UsageError, "only sampling values"),
        ({"overrides": ("sampling.cfg=[1,2]",)}, UsageError, "2 numbers, the model has 3 scales"),
        ({"overrides": ("sampling.cfg_layer=9",)}, ConfigError, "sampling.cfg_layer = 9"),
        ({"overrides": ("sampling.tau=0",)}, ConfigError, "sampling.tau"),
        ({"device": "tpu"}, UsageError, "unknown device"),
        ({"device": "cuda:99"}, ResourceError, "does not exist"),
        ({"dtype": "int3"}, UsageError, "unknown dtype"),
        ({"model": "nowhere"}, InputError, "no model at nowhere"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    model: Path, changes: dict[str, Any], error: type[BitgenError], says: str
) -> None:
    with pytest.raises(error, match=says.replace("{", r"\{")):
        gen_priors(PriorOptions(**{"class_word": "dog", "model": str(model), "output": Path("p"), **changes}), Silent())
    assert not Path("p").exists()


def test_the_last_seed_can_be_drawn(model: Path) -> None:
    assert make(model, seed=2**63 - 1, count=2).made == 2
    assert make(model, seed=2**63 - 1, count=2).reused == 2


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (lambda stored: "{", "not valid JSON"),
        (lambda stored: [], "does not describe class pictures"),
        (lambda stored: {**stored, "version": 2}, "version"),
        (lambda stored: {**stored, "sampling": {"cfg": "red"}}, "sampling.cfg"),
        (lambda stored: {**stored, "pictures": stored["pictures"] * 2}, "a file is listed twice"),
        (lambda stored: with_file(stored, "../0000.png"), "pictures.0.file"),
        (lambda stored: with_file(stored, "/etc/0000.png"), "pictures.0.file"),
        (lambda stored: with_file(stored, "manifest.json"), "pictures.0.file"),
    ],
)
def test_a_broken_manifest_is_told_and_left(model: Path, broken: Any, says: str) -> None:
    make(model, count=1)
    value = broken(manifest("p"))
    Path("p", MANIFEST).write_text(value if isinstance(value, str) else json.dumps(value))
    before = contents("p")
    with pytest.raises(InputError, match=says) as told:
        make(model)
    assert "\n" not in str(told.value)
    with pytest.raises(InputError, match=says):
        read_priors(Path("p"), "dog", fingerprints(model))
    assert contents("p") == before


def with_file(stored: dict[str, Any], name: str) -> dict[str, Any]:
    return {**stored, "pictures": [{**stored["pictures"][0], "file": name}]}


def test_a_file_is_no_folder(model: Path) -> None:
    Path("file").write_text("mine")
    with pytest.raises(UsageError, match="file is a file"):
        make(model, "file")
    with pytest.raises(InputError, match="cannot write file/p"):
        make(model, "file/p")
    assert Path("file").read_text() == "mine"


def test_a_folder_that_cannot_be_written_to_is_told_before_drawing(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    def draw(*_: object, **__: object) -> None:
        raise AssertionError("drawn for nothing")

    monkeypatch.setattr(prior_artist, "draw_bits", draw)
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(InputError, match=r"cannot write p.*permission denied"):
        make(model)


def test_a_full_disk_loses_the_batch_alone(model: Path, straight: Straight, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = straight(5)
    real, calls = Image.Image.save, []

    def full(self: Image.Image, *given: Any, **named: Any) -> None:
        calls.append(1)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, *given, **named)

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(ResourceError, match="no space left"):
        make(model)
    monkeypatch.setattr(Image.Image, "save", real)
    assert sorted(contents("p")) == ["0000.png", "0001.png", MANIFEST]
    assert make(model).reused == 2
    assert contents("p") == undisturbed


def test_a_long_prompt_is_cut_with_a_notice(model: Path) -> None:
    report = Silent()
    make(model, report=report, templates=("a {class} on the moon " * 9,), count=1)
    assert any("only the first 40 tokens" in notice for notice in report.notices)


# -- the command line --------------------------------------------------------------------------------------------------


def test_the_command_line(model: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["gen-priors", "--class", "apple", "--count", "3", "--model", str(model)]
    assert main([*command, "--template", "a {class}", "--template", "one {class}", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["class"], made["count"], made["made"], made["reused"], made["own"]) == ("apple", 3, 3, 0, 0)
    assert [picture["prompt"] for picture in made["pictures"]] == ["an apple", "one apple", "an apple"]
    assert all(Path(picture["path"]).is_relative_to(home / "priors") for picture in made["pictures"])
    assert main([*command, "--output", str(Path(made["folder"]))]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "holds other class pictures: templates" in shown.err
    assert main([*command, "--output", "p", "--seed", "3", "--set", "sampling.cfg=1"]) == 0
    assert "pictures  3 (3 new)" in capsys.readouterr().out
    assert (manifest("p")["seed"], manifest("p")["sampling"]["cfg"]) == (3, 1.0)
    assert main(["gen-priors", "--class", "dog", "--model", "nowhere"]) == 4
    assert main(["gen-priors", "--count", "3"]) == 2


def test_the_count_of_the_command_line_is_that_of_the_subject_training(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[PriorOptions] = []

    def note(options: PriorOptions, report: Silent, model: Model | None = None) -> None:
        asked.append(options)
        raise UsageError("enough")

    monkeypatch.setattr(module, "gen_priors", note)
    assert main(["gen-priors", "--class", "dog"]) == 2
    assert asked == [PriorOptions("dog")]
