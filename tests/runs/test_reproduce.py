"""`bitgen sample --recipe`: the same picture again, what is said where it may not be, and recipes of strangers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from bitgen_cli.config import SamplingConfig
from bitgen_cli.engine.model_folder import read_model_config
from bitgen_cli.engine.subject import ROW, START, Header, registered_file, save_subject
from bitgen_cli.errors import BitgenError, InputError, UsageError
from bitgen_cli.report import Silent
from bitgen_cli.runs.jobs import SampleOptions
from bitgen_cli.runs.recipe_file import LARGEST, read_recipe
from bitgen_cli.runs.sample import sample
from bitgen_cli.runs.sample_result import SampledPicture

pytestmark = pytest.mark.usefixtures("known")


def draw(report: Silent | None = None, **options: Any) -> SampledPicture:
    (picture,) = sample(SampleOptions(**options), report or Silent()).pictures
    return picture


def pixels(picture: SampledPicture | Path) -> bytes:
    with Image.open(picture if isinstance(picture, Path) else picture.path) as image:
        return image.tobytes()


def carrying(recipe: Any, name: str = "strange.png") -> str:
    info = PngInfo()
    info.add_itxt("bitgen", recipe if isinstance(recipe, str) else json.dumps(recipe))
    Image.new("RGB", (4, 4)).save(name, pnginfo=info)
    return name


WAYS: list[dict[str, Any]] = [
    {},
    {"cfg": "3,2,1", "tau": "0.5", "negative_prompt": "a cat", "top_p": 0.9},
    {"target_confidence": 0.7, "aspect": "1:2", "cfg_layer": 1},
    {"fast": 3, "overrides": ("sampling.cfg=5",)},
    {"greedy": True, "dtype": "bf16", "text_dtype": "fp32"},
]


@pytest.mark.parametrize("way", WAYS)
def test_a_picture_is_drawn_again_from_itself(tiny: Path, way: dict[str, Any]) -> None:
    first = draw(prompts=("a red dog on the moon",), model=str(tiny), output="a.png", **way)
    report = Silent()
    again = draw(report, recipe="a.png", model=None, output="b.png")
    assert pixels(again) == pixels(first)
    assert again.recipe == first.recipe
    assert report.notices == []
    Path("recipe.json").write_text(json.dumps(first.recipe))
    assert pixels(draw(recipe="recipe.json", model=None, output="c.png")) == pixels(first)


def test_the_built_in_model_is_found_by_its_name() -> None:
    first = draw(prompts=("a blue car",), output="a.png")
    assert pixels(draw(recipe="a.png", model=None, output="b.png")) == pixels(first)


def test_the_recipes_sampling_wins_over_the_models_own(tiny: Path, known: Path) -> None:
    first = draw(prompts=("a red dog",), model=str(tiny), output="a.png")
    config = known / "config.json"
    stored = json.loads(config.read_text())
    stored["config"]["sampling"] = SamplingConfig(cfg=9, tau=3, target_confidence=0.6).model_dump(mode="json")
    config.write_text(json.dumps(stored))
    assert read_model_config(known)[1].cfg == 9
    assert pixels(draw(recipe="a.png", model=None, output="b.png")) == pixels(first)


@pytest.mark.parametrize(
    ("given", "key", "value"),
    [
        ({"seed": 6}, "seed", 6),
        ({"prompts": ("a cat",)}, "prompt", "a cat"),
        ({"cfg": "1"}, "cfg", 1.0),
        ({"aspect": "1:1"}, "ratio", 1.0),
        ({"negative_prompt": "a tree"}, "negative_prompt", "a tree"),
        ({"dtype": "bf16"}, "dtype", "bf16"),
        ({"tau": "0.9"}, "target_confidence", None),
        ({"greedy": True, "overrides": ("sampling.target_confidence=null",)}, "top_k", 1),
    ],
)
def test_what_is_said_wins_over_the_recipe(tiny: Path, given: dict[str, Any], key: str, value: object) -> None:
    first = draw(
        prompts=("a red dog",), model=str(tiny), seed=5, target_confidence=0.8, aspect="1:2", output="a.png"
    )
    again = draw(recipe="a.png", model=None, output="b.png", **given)
    assert again.recipe[key] == value
    changed = {name for name, found in again.recipe.items() if found != first.recipe[name]}
    allowed = {key, "tau", "target_confidence", "width", "text_dtype"}
    assert key in changed
    assert changed <= allowed


def test_prompts_of_a_file_take_the_recipe_as_their_default(tiny: Path) -> None:
    draw(prompts=("a red dog",), model=str(tiny), seed=5, cfg="2", output="a.png")
    Path("p.jsonl").write_text('a cat\n{"prompt": "the moon", "cfg": 1}\n')
    pictures = sample(SampleOptions(recipe="a.png", model=None, prompts_file="p.jsonl", output="o/"), Silent()).pictures
    assert [(one.prompt, one.seed, one.recipe["cfg"]) for one in pictures] == [("a cat", 5, 2.0), ("the moon", 5, 1.0)]


def test_what_may_make_it_another_picture_is_told(tiny: Path) -> None:
    first = draw(prompts=("a red dog",), model=str(tiny), output="a.png")
    other = {
        **first.recipe, "bitgen": "0.0.1", "libraries": {"torch": "1.0"}, "hardware": "NVIDIA H100", "width": 99,
        "device": "cuda", "fingerprints": {**first.recipe["fingerprints"], "transformer": "0" * 64},
    }  # fmt: skip
    report = Silent()
    draw(report, recipe=carrying(other), model=None, output="b.png")
    weights, rest = report.notices
    assert "other weights than the recipe's: transformer" in weights
    for said in (
        "bitgen 0.0.1, now", "torch 1.0, now", "transformers not recorded", "device cuda, now cpu", "NVIDIA H100",
        "size 99x16, now 16x16",
    ):  # fmt: skip
        assert said in rest
    old = {key: value for key, value in first.recipe.items() if key not in ("libraries", "hardware", "text_dtype")}
    report = Silent()
    draw(report, recipe=carrying(old), model=None, output="c.png")
    assert "torch not recorded" in report.notices[0]
    assert "dtype" not in report.notices[0]


def test_a_subject_is_found_by_its_content_and_missed_by_its_name(tiny: Path) -> None:
    import torch

    prints = read_model_config(tiny)[2]
    header = Header(
        token="[V]", class_word="dog", kind="token", base=prints, base_name="tiny", recipe={}, pictures=[]
    )  # fmt: skip
    file = registered_file("rex")
    row = torch.full((32,), 0.5)
    save_subject(file, header, {ROW: row, START: row.clone()}, torch.float32)
    first = draw(prompts=("a [V] dog",), model=str(tiny), output="a.png", subjects=("rex:0.5",))
    assert first.recipe["subjects"][0]["scale"] == 0.5
    file.rename(file.with_name(file.name.replace("rex", "max")))
    again = draw(recipe="a.png", model=None, output="b.png")
    assert pixels(again) == pixels(first)
    assert again.recipe["subjects"][0]["scale"] == 0.5
    assert draw(recipe="a.png", model=None, prompts=("a dog",), output="c.png").recipe["subjects"] == []
    renamed = file.with_name(file.name.replace("rex", "max"))
    renamed.unlink()
    with pytest.raises(UsageError, match=r"subject 'rex' .* not known here"):
        draw(recipe="a.png", model=None, output="d.png")
    save_subject(file, header, {ROW: row + 1, START: row.clone()}, torch.float32)
    report = Silent()
    draw(report, recipe="a.png", model=None, output="e.png")
    assert any("subject rex is another one" in notice for notice in report.notices)


@pytest.mark.parametrize("name", ["./tiny", "/etc", "../models/tiny", "models/tiny", "nowhere", "tiny/", ".", "a\x00b"])
def test_a_model_that_is_no_name_of_the_users_is_not_opened(tiny: Path, name: str) -> None:
    shutil.copytree(tiny, "tiny")
    shutil.copytree(tiny, "models/tiny")
    first = draw(prompts=("a red dog",), model=str(tiny), output="a.png")
    strange = carrying({**first.recipe, "model": name})
    with pytest.raises(UsageError, match="none of that name is known here"):
        draw(recipe=strange, model=None, output="b.png")
    assert pixels(draw(recipe=strange, model=str(tiny), output="b.png")) == pixels(first)


def test_a_published_model_is_not_fetched_for_a_recipe(tiny: Path) -> None:
    first = draw(prompts=("a red dog",), model=str(tiny), output="a.png")
    with pytest.raises(UsageError, match="--model infinity-8b fetches it"):
        draw(recipe=carrying({**first.recipe, "model": "infinity-8b"}), model=None)


def test_keys_that_nobody_knows_are_left_out_with_a_notice(tiny: Path) -> None:
    first = draw(prompts=("a red dog",), model=str(tiny), output="a.png")
    report = Silent()
    more = {f"key{number}": "/etc/passwd" for number in range(9)}
    again = draw(report, recipe=carrying({**first.recipe, **more, "output": "/tmp/x.png"}), model=None, output="b.png")
    assert pixels(again) == pixels(first)
    (notice,) = report.notices
    assert "'key0', 'key1'" in notice
    assert "and 5 more" in notice
    assert "passwd" not in notice


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seed": "1"}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"seed": True}, "seed"),
        ({"ratio": 1e308}, "ratio"),
        ({"bits": 10**9}, "bits"),
        ({"width": 10**9}, "width"),
        ({"cfg": float("nan")}, "cfg"),
        ({"tau": -1}, "tau"),
        ({"fast": 99}, "fast"),
        ({"dtype": "float128"}, "dtype"),
        ({"device": "cuda:7"}, "device"),
        ({"subjects": [{"name": "../x", "token": "[V]", "scale": 1}]}, "subjects"),
        ({"subjects": [{"name": "x", "token": "[V]", "scale": 3.0, "sha256": "0" * 64}]}, "subjects"),
        ({"fingerprints": {str(n): "x" for n in range(99)}}, "fingerprints"),
        ({"unknown": ["x"]}, "unknown"),
        ({"prompt": None}, "prompt"),
    ],
)
def test_a_strangers_recipe_is_bounded(tiny: Path, change: dict[str, Any], says: str) -> None:
    first = draw(prompts=("a red dog",), model=str(tiny), output="a.png")
    with pytest.raises(InputError, match=says):
        read_recipe(Path(carrying({**first.recipe, **change})))


@pytest.mark.parametrize(
    ("change", "error"),
    [({"cfg": [1.0] * 5}, "5 numbers"), ({"bits": 7}, "7 bits"), ({"resolution": "1M"}, "resolution"),
     ({"cfg_layer": 50}, "cfg_layer = 50")],
)  # fmt: skip
def test_a_recipe_of_another_model_is_told_as_an_option_would_be(
    tiny: Path, change: dict[str, Any], error: str
) -> None:
    first = draw(prompts=("a red dog",), model=str(tiny), output="a.png")
    with pytest.raises(BitgenError, match=error):
        draw(recipe=carrying({**first.recipe, **change}), model=None)


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000, '{"prompt": "a"}', "{}", '{"recipe": 3}'])
def test_what_is_no_recipe_is_one_line(text: str) -> None:
    Path("r.json").write_text(text)
    with pytest.raises(InputError, match=r"r\.json"):
        read_recipe(Path("r.json"))
    with pytest.raises(InputError, match=r"strange\.png"):
        read_recipe(Path(carrying(text)))


def test_a_file_that_is_too_large_or_missing_or_a_photo_is_no_recipe() -> None:
    Path("large.json").write_text(" " * LARGEST + "{}")
    Image.new("RGB", (4, 4)).save("photo.jpg")
    for name, says in (("large.json", "more than"), ("no.png", "no.png"), ("photo.jpg", "carries no recipe")):
        with pytest.raises(InputError, match=says):
            read_recipe(Path(name))
