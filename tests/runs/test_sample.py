"""`bitgen sample`: pictures, their recipes and names, and what a user can get wrong."""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_model
from PIL import Image

from bitgen_cli.engine import model_folder
from bitgen_cli.errors import BitgenError, ConfigError, InputError, ResourceError, UsageError
from bitgen_cli.report import Silent
from bitgen_cli.runs.jobs import SampleOptions
from bitgen_cli.runs.output import slug
from bitgen_cli.runs.sample import sample
from bitgen_cli.runs.sample_result import SampledPicture

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = tiny_model.config("1.0", "0.5", text_length=12)
    return str(tiny_model.save(tmp_path_factory.mktemp("models") / "tiny", config=config))


def draw(model: str, *prompts: str, **options: object) -> list[SampledPicture]:
    return sample(SampleOptions(prompts=prompts, model=model, **options), Silent()).pictures  # type: ignore[arg-type]


def pixels(picture: SampledPicture) -> bytes:
    with Image.open(picture.path) as image:
        return image.tobytes()


def test_picture_carries_its_recipe(model: str) -> None:
    (picture,) = draw(model, "a red dog on the moon", seed=7, cfg="2", negative_prompt="a cat")
    assert picture.path == Path("a-red-dog-on-the-moon-7.png")
    with Image.open(picture.path) as image:
        image.load()
        assert image.size == (16, 16)
        recipe = json.loads(image.text["bitgen"])
        parameters = image.text["parameters"]
    assert recipe["prompt"] == "a red dog on the moon"
    assert recipe["seed"] == 7
    assert recipe["cfg"] == 2.0
    assert recipe["fingerprints"].keys() == {"tokenizer", "transformer", "text_encoder"}
    assert parameters.startswith("a red dog on the moon\nNegative prompt: a cat\nCFG scale: 2.0,")
    assert "Seed: 7, Size: 16x16" in parameters


def test_no_metadata_leaves_the_recipe_out(model: str) -> None:
    (picture,) = draw(model, "a dog", seed=1, metadata=False)
    with Image.open(picture.path) as image:
        image.load()
        assert image.text == {}  # type: ignore[attr-defined]


def test_pictures_do_not_depend_on_the_batch(model: str) -> None:
    together = draw(model, "a red dog", "the moon", seed=3, num_images=3, output="together/")
    alone = draw(model, "a red dog", "the moon", seed=3, num_images=3, output="alone/", batch_size=1)
    assert [p.seed for p in together] == [3, 4, 5, 3, 4, 5]
    assert [pixels(p) for p in together] == [pixels(p) for p in alone]
    assert len({pixels(p) for p in together}) > 1


def test_a_seed_is_drawn_when_none_is_given(model: str) -> None:
    first, second = draw(model, "a dog")[0], draw(model, "a dog")[0]
    assert first.seed != second.seed


def test_nothing_is_overwritten_unless_that_is_wanted(model: str) -> None:
    first, second = draw(model, "a dog", seed=1)[0], draw(model, "a dog", seed=1)[0]
    assert (first.path.name, second.path.name) == ("a-dog-1.png", "a-dog-1-2.png")
    before = first.path.read_bytes()
    with pytest.raises(UsageError, match=r"a-dog-1\.png is there already .* --overwrite replaces it"):
        draw(model, "a dog", seed=2, output="a-dog-1.png")
    assert first.path.read_bytes() == before
    named = draw(model, "a dog", seed=2, output="a-dog-1.png", overwrite=True)[0]
    assert named.path.name == "a-dog-1.png"
    assert pixels(named) == pixels(draw(model, "a dog", seed=2)[0])


def test_output_template_cannot_leave_its_folder(model: str) -> None:
    (picture,) = draw(model, "../../etc/passwd", seed=1, output="out/{prompt}-{seed}-{index}.png")
    assert picture.path == Path("out/etc-passwd-1-0000.png")


def test_prompt_file_with_options_of_its_own(model: str) -> None:
    Path("prompts.txt").write_text(
        'a red dog\n\n{"prompt": "the moon", "seed": 9, "num_images": 2, "cfg": [1, 2, 3], "aspect": "2:1"}\n'
    )
    pictures = draw(model, prompts_file="prompts.txt", seed=1)
    assert [(p.prompt, p.seed) for p in pictures] == [("a red dog", 1), ("the moon", 9), ("the moon", 10)]
    assert pictures[1].recipe["cfg"] == [1.0, 2.0, 3.0]
    assert (pictures[1].recipe["width"], pictures[1].recipe["height"]) == (16, 8)


def test_grid_shows_every_picture(model: str) -> None:
    options = SampleOptions(prompts=("a dog",), model=model, num_images=3, seed=1, grid=True, output="o/")
    result = sample(options, Silent())
    assert result.grid == Path("o/grid.png")
    with Image.open(result.grid) as sheet:
        assert sheet.size == (48, 16)
    assert result.to_json()["grid"] == "o/grid.png"


def test_greedy_is_the_same_for_every_seed(model: str) -> None:
    first, second = draw(model, "a dog", greedy=True, seed=1), draw(model, "a dog", greedy=True, seed=2)
    assert pixels(first[0]) == pixels(second[0])


def test_a_target_confidence_takes_the_place_of_the_temperature(model: str) -> None:
    (picture,) = draw(model, "a dog", seed=1, target_confidence=0.8)
    assert picture.recipe["target_confidence"] == 0.8
    with Image.open(picture.path) as image:
        image.load()
        assert "Temperature: for a confidence of 0.8" in image.text["parameters"]
    (lively,), (plain,) = draw(model, "a dog", seed=1, target_confidence=0.55), draw(model, "a dog", seed=1)
    assert pixels(lively) != pixels(plain)


def test_what_is_left_out_stands_in_the_recipe(model: str, tmp_path: Path) -> None:
    lines = ('{"prompt": "a dog", "fast": 2}', '{"prompt": "a dog"}', '{"prompt": "a dog", "fast": 0}')
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    pictures = sample(
        SampleOptions(prompts_file=str(tmp_path / "p.jsonl"), model=model, seed=1, fast=3, output="f/"), Silent()
    ).pictures
    assert [picture.recipe["fast"] for picture in pictures] == [2, 3, 0]
    (whole,) = draw(model, "a dog", seed=1)
    assert whole.recipe["fast"] == 0
    assert pixels(pictures[2]) == pixels(whole) != pixels(pictures[1])


def test_a_long_prompt_is_cut_with_a_notice(model: str) -> None:
    report = Silent()
    sample(SampleOptions(prompts=("a red dog on the moon " * 9,), model=model, seed=1), report)
    assert any("only the first 12 tokens" in notice for notice in report.notices)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({}, UsageError, "no prompt"),
        ({"prompts": ("  ",)}, UsageError, "empty"),
        ({"prompts": ("a",), "cfg": "red"}, UsageError, "--cfg 'red'"),
        ({"prompts": ("a",), "cfg": "1,2"}, UsageError, "2 numbers, the model has 3 scales"),
        ({"prompts": ("a",), "tau": "0"}, ConfigError, r"^sampling options: sampling\.tau = 0.* \(flag --tau\)$"),
        ({"prompts": ("a",), "top_p": 3.0}, ConfigError, "sampling.top_p"),
        ({"prompts": ("a",), "aspect": "wide"}, UsageError, "not W:H"),
        ({"prompts": ("a",), "resolution": "1M"}, UsageError, "one size per aspect ratio"),
        ({"prompts": ("a",), "device": "tpu"}, UsageError, "unknown device"),
        ({"prompts": ("a",), "device": "cuda:99"}, ResourceError, "does not exist"),
        ({"prompts": ("a",), "dtype": "int3"}, UsageError, "unknown dtype"),
        ({"prompts": ("a",), "num_images": 2, "output": "one.png"}, UsageError, "one file for 2 pictures"),
        ({"prompts": ("a",), "output": "x/one.JPG"}, UsageError, r"written as PNGs.*name it x/one\.png"),
        ({"prompts": ("a",), "output": "{seed}.webp"}, UsageError, "written as PNGs"),
        ({"prompts": ("a",), "output": "{what}.png"}, UsageError, "unknown field {what}"),
        ({"prompts": ("a",), "output": "{prompt.real}.png"}, UsageError, "unknown field"),
        ({"prompts": ("a",), "output": "{seed:>99999999999}.png"}, UsageError, "its name alone"),
        ({"prompts": ("a",), "output": "out/{seed}/../../x.png"}, UsageError, "leads out"),
        ({"prompts": ("a",), "seed": 2**64}, UsageError, "64 bits"),
        ({"prompts": ("a",), "overrides": ("model.depth=3",)}, UsageError, "only sampling values"),
        ({"prompts": ("a",), "greedy": True, "top_k": 5}, UsageError, "--greedy"),
        ({"prompts": ("a",), "greedy": True, "target_confidence": 0.8}, UsageError, "target_confidence"),
        ({"prompts": ("a",), "tau": "1", "target_confidence": 0.8}, UsageError, "--target-confidence"),
        ({"prompts": ("a",), "target_confidence": 0.4}, ConfigError, "target_confidence"),
        ({"prompts": ("a",), "fast": 4}, ConfigError, "sampling.fast"),
        ({"prompts_file": "missing.txt"}, InputError, "missing.txt"),
    ],
)
def test_mistakes_are_told(model: str, options: dict[str, object], error: type[BitgenError], says: str) -> None:
    with pytest.raises(error, match=says.replace("{", r"\{")):
        sample(SampleOptions(model=model, **options), Silent())  # type: ignore[arg-type]
    assert not list(Path().glob("*.png"))


def test_missing_corrupt_and_foreign_models(model: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no model at nowhere"):
        draw("nowhere", "a dog")
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    (broken / "transformer.safetensors").write_bytes(b"no tensors here")
    with pytest.raises(InputError, match=r"transformer\.safetensors is not a readable safetensors"):
        draw(str(broken), "a dog")
    (broken / "transformer.safetensors").write_bytes((Path(model) / "tokenizer.safetensors").read_bytes())
    with pytest.raises(InputError, match="not of this transformer"):
        draw(str(broken), "a dog")


def test_demo_is_the_built_in_model_whatever_lies_here() -> None:
    Path("demo").mkdir()
    assert model_folder.find_model("demo").joinpath("transformer.safetensors").is_file()
    with pytest.raises(InputError, match="holds no model"):
        model_folder.find_model("./demo")


def test_a_full_disk_leaves_no_half_picture(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(ResourceError, match="no space left"):
        draw(model, "a dog", seed=1)
    assert list(Path().iterdir()) == []


def test_slug() -> None:
    assert slug("A red dog, on the MOON!") == "a-red-dog-on-the-moon"
    assert slug("../..") == "picture"
    assert len(slug("x" * 500)) == 60


def test_refinement_is_told_and_kept_in_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    notices: list[str] = []

    class Listening(Silent):
        def notice(self, text: str) -> None:
            notices.append(text)

    drawn = SampleOptions(prompts=("a dog on the moon",), num_images=2, seed=1, tau="2", refine=3, output="r/")
    pictures = sample(drawn, Listening()).pictures
    for picture in pictures:
        assert picture.recipe["refine"] == 3
        changed, likelihood = (picture.recipe["refined"][key] for key in ("bits_changed", "log_likelihood"))
        assert len(changed) == 4
        assert 1 <= len(likelihood) <= 3
        assert (likelihood[-1] > likelihood[0]) == (sum(changed) > 0)
        gain = picture.recipe["refined"]["log_likelihood_gain"]
        assert gain > likelihood[-1] - likelihood[0] - 0.01, "what guidance turns over may be less likely without it"
    total = sum(sum(picture.recipe["refined"]["bits_changed"]) for picture in pictures)
    assert total > 0
    assert any(f"refined: {total} bits changed; log-likelihood of a bit -" in notice for notice in notices)
    plain = sample(replace(drawn, refine=0), Silent()).pictures
    assert all("refined" not in picture.recipe for picture in plain)
    again = sample(SampleOptions(recipe=pictures[0].path, output="again.png"), Listening()).pictures[0]
    assert again.path.read_bytes() == pictures[0].path.read_bytes()
    assert not any("understands" in notice for notice in notices)
