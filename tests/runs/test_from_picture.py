"""`bitgen sample --from`: where the bits come from, what stays, and what is said where it cannot be."""

from __future__ import annotations

import io
import json
import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from tiny_model import photos, save
from torch import Tensor

from bitgen_cli.engine import sampling
from bitgen_cli.engine.codec import Codec
from bitgen_cli.engine.data import to_float, to_tensor
from bitgen_cli.engine.model_folder import load_model
from bitgen_cli.engine.refine import refine
from bitgen_cli.engine.scales import schedule
from bitgen_cli.errors import InputError, UsageError
from bitgen_cli.report import Silent
from bitgen_cli.runs.carried_bits import DIGEST, packed
from bitgen_cli.runs.jobs import SampleOptions
from bitgen_cli.runs.original import Mask, read_mask, read_original
from bitgen_cli.runs.recipe_file import BITS, RECIPE, carried, picture_recipe, read_recipe
from bitgen_cli.runs.sample import SampledPicture, SampleResult, sample

pytestmark = pytest.mark.usefixtures("known")
PROMPT = "a red dog on the moon"


def run(report: Silent | None = None, **options: Any) -> SampleResult:
    return sample(SampleOptions(**{"model": None, **options}), report or Silent())


def draw(report: Silent | None = None, **options: Any) -> SampledPicture:
    (picture,) = run(report, **options).pictures
    return picture


def first(tiny: Path, **options: Any) -> SampledPicture:
    return draw(prompts=(PROMPT,), model=str(tiny), seed=1, output="a.png", **options)


def pixels(file: str | Path) -> np.ndarray[Any, Any]:
    with Image.open(file) as image:
        return np.asarray(image).astype(int)


def bits_in(file: Path) -> bytes | None:
    _, content = carried(file.read_bytes(), str(file))
    return content and content[DIGEST:]


def white_box(box: tuple[int, int, int, int], name: str = "mask.png", size: tuple[int, int] = (16, 16)) -> str:
    mask = Image.new("L", size)
    mask.paste(255, box)
    mask.save(name)
    return name


@pytest.mark.parametrize("how", ["carried", "drawn again", "tokenized"])
def test_bits_are_those_of_the_picture(tiny: Path, how: str) -> None:
    """Kept but for the last scale, and drawn by the same seed, it is the same picture; but not where it is a photo."""
    own = first(tiny, embed_bits=how == "carried")
    source = "a.png"
    if how == "tokenized":
        with Image.open(source) as image:
            image.convert("RGB").save("photo.png")
        source = "photo.png"
    report = Silent()
    again = draw(report, prompts=(PROMPT,), model=str(tiny), original=source, keep_scales=2, seed=1, output="b.png")
    assert again.recipe["original"]["bits"] == how
    assert again.recipe["original"]["name"] == source
    assert again.recipe["keep_scales"] == 2
    assert "original" not in own.recipe
    assert bool(report.notices) == (how == "tokenized")
    assert np.array_equal(pixels("a.png"), pixels("b.png")) == (how != "tokenized")


def test_a_tokenized_photo_is_what_tokenize_makes_of_it(tiny: Path) -> None:
    photo = photos(Path("photos"), 1, 40) / "0.png"
    made = draw(prompts=("a dog",), model=str(tiny), original=str(photo), mask="0,0,40,9", output="b.png")
    carried, model = bits_in(made.path), load_model(tiny)
    assert carried is not None
    assert model.tokenizer is not None
    of = schedule(model.config.scales, patchify=False)
    with torch.inference_mode():
        image = to_float(to_tensor(read_original(str(photo), Silent()).image, (16, 16)))
        bits, _ = model.tokenizer.encode(image[None], of)
    expected = packed([grid[0] for grid in bits], Image.new("RGB", (1, 1)))[DIGEST:]
    assert len(expected) == len(carried)
    assert carried[9:] == expected[9:], "a byte a position; the first of the last scale's four rows is drawn"


def test_a_photo_for_which_a_gpu_has_no_room_is_tokenized_on_the_cpu(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = {"prompts": ("a dog",), "model": str(tiny), "mask": "0,0,40,9", "seed": 3}
    call["original"] = str(photos(Path("photos"), 1, 40) / "0.png")
    expected = draw(**call, output="a.png")
    latent, tried = Codec.latent, []

    def scarce(codec: Codec, pixels: Tensor) -> Tensor:
        tried.append(codec.dtype)
        if len(tried) == 1:
            raise torch.OutOfMemoryError("full")
        return latent(codec, pixels)

    monkeypatch.setattr(Codec, "latent", scarce)
    found = draw(**call, output="b.png")
    assert len(tried) == 2
    assert np.array_equal(pixels(expected.path), pixels(found.path))


def test_the_recipe_is_gone_on_from_with_another_seed(tiny: Path) -> None:
    first(tiny, cfg="3,2,1", negative_prompt="a cat")
    one = draw(original="a.png", keep_scales=1, output="b.png")
    assert one.recipe["prompt"] == PROMPT
    assert one.recipe["cfg"] == [3, 2, 1]
    assert one.recipe["negative_prompt"] == "a cat"
    assert one.recipe["model"] == "tiny"
    assert one.recipe["seed"] != 1


def test_what_is_kept_is_kept(tiny: Path) -> None:
    """Of the first scales, and outside a mask: bits to the last one, whatever the prompt."""
    first(tiny, embed_bits=True)
    old = bits_in(Path("a.png"))
    draw(prompts=("a cat",), original="a.png", keep_scales=2, output="b.png")
    new = bits_in(Path("b.png"))
    assert old is not None
    assert new is not None
    assert len(old) == len(new) == 1 + 4 + 16
    assert old[:5] == new[:5]
    assert old[5:] != new[5:]
    for mask in ("0,0,16,4", white_box((0, 0, 16, 4))):
        draw(prompts=("a cat on the beach",), original="a.png", mask=mask, output="c.png", overwrite=True)
        new = bits_in(Path("c.png"))
        assert new is not None
        assert old[:5] == new[:5], "coarse codes reach below the mask"
        assert old[5:9] != new[5:9]
        assert old[9:] == new[9:]


def test_pictures_do_not_hang_on_the_batch(tiny: Path) -> None:
    first(tiny)
    together = run(original="a.png", mask="0,0,16,8", prompts=("a cat", "a dog"), num_images=2, seed=3, output="x/")
    alone = run(
        original="a.png", mask="0,0,16,8", prompts=("a cat", "a dog"), num_images=2, seed=3, output="y/", batch_size=1
    )
    for one, other in zip(together.pictures, alone.pictures, strict=True):
        assert np.array_equal(pixels(one.path), pixels(other.path))


def test_refining_alone_draws_nothing(tiny: Path) -> None:
    first(tiny, tau="3", embed_bits=True)
    old = bits_in(Path("a.png"))
    found = draw(original="a.png", refine=3, output="b.png")
    new = bits_in(Path("b.png"))
    changed = found.recipe["refined"]["bits_changed"]
    assert old is not None
    assert new is not None
    assert sum(changed) > 0
    assert sum(bin(a ^ b).count("1") for a, b in zip(old, new, strict=True)) == sum(changed)
    assert found.recipe["seed"] == 1
    assert found.seed is None
    photo = photos(Path("photos"), 1, 40) / "0.png"
    call = {"prompts": ("a dog",), "model": str(tiny), "original": str(photo), "refine": 1}
    made = [draw(**call, output=name) for name in ("c.png", "d.png")]
    assert made[0].path.read_bytes() == made[1].path.read_bytes(), "nothing of it is random"
    with pytest.raises(UsageError, match="one picture, not 2"):
        run(original="a.png", refine=1, num_images=2)


def test_a_recipe_tells_the_rounds_that_its_picture_had(tiny: Path) -> None:
    """Rounds that others of the batch had are none of its own."""
    pictures = run(prompts=(PROMPT,), model=str(tiny), seed=1, num_images=6, tau="3", refine=16, output="x/").pictures
    found = [picture.recipe["refined"]["log_likelihood"] for picture in pictures]
    assert len({len(rounds) for rounds in found}) > 1
    assert all(value < 0 for rounds in found for value in rounds)


@pytest.mark.parametrize(("call", "near"), [({}, True), ({"mask": "0,0,40,9"}, False)])
def test_only_a_photo_that_is_refined_alone_stays_near_what_it_was_made_of(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, call: dict[str, str], near: bool
) -> None:
    latents = []

    def seen(*given: Any, latent: Tensor | None, **more: Any) -> Any:
        latents.append(latent)
        return refine(*given, latent=latent, **more)

    monkeypatch.setattr(sampling, "refine", seen)
    photo = photos(Path("photos"), 1, 40) / "0.png"
    draw(prompts=("a dog",), model=str(tiny), original=str(photo), refine=1, output="a.png", **call)
    assert [latent is not None for latent in latents] == [near]


def test_a_picture_that_was_refined_is_not_refined_again_by_itself(tiny: Path) -> None:
    first(tiny, refine=2)
    assert draw(original="a.png", keep_scales=1, output="b.png").recipe["refine"] == 0
    with pytest.raises(UsageError, match="say what to do with it"):
        run(original="a.png")


def test_under_a_mask_refinement_leaves_the_rest_alone(tiny: Path) -> None:
    first(tiny, tau="3", embed_bits=True)
    old = bits_in(Path("a.png"))
    draw(original="a.png", mask="0,0,16,8", refine=3, output="b.png")
    new = bits_in(Path("b.png"))
    assert old is not None
    assert new is not None
    assert old[:1] == new[:1]
    assert old[5 + 8 :] == new[5 + 8 :]


def test_an_edit_is_drawn_again_from_its_recipe(tiny: Path) -> None:
    first(tiny)
    for name, mask in (("b.png", "2,2,12,14"), ("c.png", white_box((0, 0, 16, 9)))):
        made = draw(prompts=("a cat",), original="a.png", mask=mask, keep_scales=1, cfg="2", output=name)
        report = Silent()
        given = {} if mask[0].isdigit() else {"mask": mask}
        again = draw(report, recipe=name, original="a.png", output="again.png", overwrite=True, **given)
        assert np.array_equal(pixels(name), pixels("again.png"))
        assert again.recipe == made.recipe
        assert report.notices == []
    with pytest.raises(UsageError, match=r"was made of another one, 'a\.png'.*--from FILE"):
        run(recipe="b.png")
    with pytest.raises(UsageError, match="under a mask from a file"):
        run(recipe="c.png", original="a.png")
    first(tiny, overwrite=True, top_p=0.7)
    draw(report, recipe="b.png", original="a.png", mask="0,0,16,9", output="d.png")
    assert [text for text in report.notices if "another picture than the recipe's" in text]
    assert [text for text in report.notices if "another mask than the recipe's" in text]


def test_an_edit_goes_on_from_its_bits(tiny: Path) -> None:
    """Its recipe alone could not say them."""
    first(tiny)
    draw(prompts=("a cat",), original="a.png", mask="0,0,16,8", output="b.png")
    assert draw(original="b.png", keep_scales=2, output="c.png").recipe["original"]["bits"] == "carried"
    draw(prompts=("a cat",), original="a.png", mask="0,0,16,8", output="d.png", metadata=False)
    assert bits_in(Path("d.png")) is None
    report = Silent()
    draw(report, prompts=("a dog",), model=str(tiny), original="d.png", keep_scales=2, output="e.png")
    assert report.notices


def test_an_edit_without_its_bits_is_not_drawn_again(tiny: Path) -> None:
    """Its recipe draws another picture."""
    first(tiny)
    draw(prompts=("a cat",), original="a.png", mask="0,0,16,8", output="b.png")
    info = PngInfo()
    with Image.open("b.png") as image:
        info.add_itxt(RECIPE, image.info[RECIPE])
        image.save("c.png", pnginfo=info)
    report = Silent()
    assert draw(report, original="c.png", keep_scales=2, output="d.png").recipe["original"]["bits"] == "tokenized"
    assert not [text for text in report.notices if "drawn again" in text]


def test_carried_bits_of_another_number_are_left_alone(tiny: Path) -> None:
    """Seven bits take as many bytes as eight."""
    first(tiny, embed_bits=True)
    recipe, _ = picture_recipe(Path("a.png"))
    info = PngInfo()
    info.add_itxt(RECIPE, json.dumps({**recipe, "bits": recipe["bits"] - 1}))
    with Image.open("a.png") as image:
        info.add_itxt(BITS, image.info[BITS])
        image.save("b.png", pnginfo=info)
    found = draw(original="b.png", bits=recipe["bits"], keep_scales=2, output="c.png")
    assert found.recipe["original"]["bits"] == "tokenized"


def test_another_model_tokenizes(tiny: Path, tmp_path: Path) -> None:
    first(tiny, embed_bits=True)
    other = save(tmp_path / "other", seed=5)
    found = draw(original="a.png", model=str(other), keep_scales=2, output="b.png")
    assert found.recipe["original"]["bits"] == "tokenized"


def test_other_number_types_tokenize_without_drawing_first(tiny: Path) -> None:
    first(tiny)
    report = Silent()
    found = draw(report, original="a.png", dtype="bf16", text_dtype="fp32", keep_scales=2, output="b.png")
    assert found.recipe["original"]["bits"] == "tokenized"
    assert [text for text in report.notices if "a.png" in text] == [
        "a.png is tokenized at 16x16: what the tokenizer cannot show is lost"
    ]


def test_a_prompt_file_of_variations(tiny: Path) -> None:
    first(tiny)
    Path("lines.jsonl").write_text(
        '{"prompt": "a cat", "keep_scales": 1, "seed": 4}\n{"prompt": "a dog", "keep_scales": 9}\na boat\n'
    )
    result = run(original="a.png", keep_scales=2, prompts_file="lines.jsonl", output="out/", batch_size=8)
    assert [picture.recipe["keep_scales"] for picture in result.pictures] == [1, 2]
    assert [failure.line for failure in result.failures] == [2]
    for picture, keep in zip(result.pictures, (1, 2), strict=True):
        call = {"prompts": (picture.prompt,), "seed": picture.seed, "keep_scales": keep}
        alone = draw(**call, original="a.png", output=f"{keep}.png")
        assert np.array_equal(pixels(picture.path), pixels(alone.path)), "whatever is drawn beside it"
    again = run(original="a.png", keep_scales=2, prompts_file="lines.jsonl", output="out/")
    assert again.kept == 2
    other = run(original="a.png", keep_scales=1, prompts_file="lines.jsonl", output="out/")
    assert (other.kept, len(other.pictures)) == (1, 1), "the line that says it itself is there"
    assert run(prompts_file="lines.jsonl", output="new/", model=str(tiny)).failures[0].line == 1, "of what they stay"


def test_every_line_of_variations_has_a_seed_of_its_own(tiny: Path) -> None:
    first(tiny)
    Path("lines.jsonl").write_text(f'{{"prompt": "{PROMPT}", "keep_scales": 1}}\n' * 2 + PROMPT)
    seeds = [one.seed for one in run(original="a.png", refine=1, prompts_file="lines.jsonl", output="out/").pictures]
    assert len(set(seeds)) == 3
    assert seeds[2] is None, "which refines alone"


def test_the_same_call_goes_on_and_another_picture_or_mask_is_drawn(tiny: Path) -> None:
    first(tiny)
    Path("lines.txt").write_text("a cat\na dog\n")
    white_box((0, 0, 16, 9))
    call = {"original": "a.png", "prompts_file": "lines.txt", "output": "out/", "mask": "mask.png"}
    assert [run(**call).kept for _ in range(2)] == [0, 2]
    white_box((0, 0, 16, 12))
    assert run(**call).kept == 0
    assert run(**call | {"mask": "0,0,16,12"}).kept == 0
    first(tiny, overwrite=True, top_p=0.7)
    assert [run(**call).kept for _ in range(2)] == [0, 2]


def test_a_mask_is_shrunk_once_for_all_lines(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first(tiny)
    pixels_of, sizes = Mask.pixels, []

    def counted(mask: Mask, size: tuple[int, int]) -> Tensor:
        sizes.append(size)
        return pixels_of(mask, size)

    monkeypatch.setattr(Mask, "pixels", counted)
    Path("lines.jsonl").write_text("a cat\na dog\n" + '{"prompt": "a boat", "aspect": "1:2"}\n')
    result = run(original="a.png", mask="0,0,16,9", prompts_file="lines.jsonl", output="out/", batch_size=1)
    assert len(result.pictures) == 3
    assert sorted(sizes) == [(16, 8), (16, 16)]


def test_a_picture_from_stdin(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first(tiny)
    call = {"mask": "0,0,16,8", "seed": 3, "prompts": ("a cat",)}
    expected = draw(**call, original="a.png", output="b.png")
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(Path("a.png").read_bytes())))
    found = draw(**call, original="-", output="c.png")
    assert np.array_equal(pixels("b.png"), pixels("c.png"))
    assert found.recipe["original"] == expected.recipe["original"] | {"name": "standard input"}
    with pytest.raises(InputError, match="standard input is not a"):  # at its end now
        draw(**call, original="-")
    with pytest.raises(UsageError, match="cannot both read stdin"):
        run(original="-", prompts_file="-", keep_scales=1, output="out/")


def test_a_picture_or_mask_from_a_stream_is_read_once(tiny: Path) -> None:
    first(tiny, embed_bits=True)
    expected = draw(original="a.png", mask=white_box((0, 0, 16, 9)), seed=3, output="b.png")
    writers = []
    for pipe, source in (("one", "a.png"), ("two", "mask.png")):
        os.mkfifo(pipe)
        writers.append(threading.Thread(target=Path(pipe).write_bytes, args=(Path(source).read_bytes(),), daemon=True))
        writers[-1].start()
    found = draw(original="one", mask="two", seed=3, output="c.png")
    for writer in writers:
        writer.join()
    assert np.array_equal(pixels("b.png"), pixels("c.png"))
    assert found.recipe["mask"] == expected.recipe["mask"]
    assert found.recipe["original"] == expected.recipe["original"] | {"name": "one"}


def test_photos_of_other_shapes(tiny: Path) -> None:
    Image.effect_noise((80, 44), 90).convert("RGB").save("wide.png")
    Image.effect_noise((44, 80), 90).convert("RGB").save("tall.png")
    tall = draw(prompts=("a dog",), model=str(tiny), original="tall.png", keep_scales=1, output="b.png")
    assert (tall.recipe["width"], tall.recipe["height"]) == (8, 16)
    report = Silent()
    wide = draw(report, prompts=("a dog",), model=str(tiny), original="wide.png", keep_scales=1, output="c.png")
    assert "tokenized at 16x16 without the 45% of it that is cut off" in report.notices[0]
    Image.new("RGB", (3000, 7)).save("thread.png")
    draw(report, prompts=("a dog",), model=str(tiny), original="thread.png", keep_scales=1, output="e.png")
    assert "without the 99% of it that is cut off" in report.notices[-1]
    assert wide.recipe["width"] == wide.recipe["height"]
    crop = {"original": "wide.png", "aspect": "1:2", "keep_scales": 1}
    upright = draw(prompts=("a dog",), model=str(tiny), output="d.png", **crop)
    assert (upright.recipe["width"], upright.recipe["height"]) == (8, 16)


def test_a_name_that_is_no_text_is_written_as_well_as_can_be(tiny: Path) -> None:
    first(tiny)
    name = os.fsdecode(b"a\xff.png")
    shutil.copy("a.png", name)
    assert draw(original=name, keep_scales=2, output="b.png").recipe["original"]["name"] == r"a\xff.png"
    assert read_recipe(Path("b.png")).original is not None


def test_what_cannot_be_is_said(tiny: Path) -> None:
    first(tiny)
    with pytest.raises(UsageError, match="--mask says what of a picture stays"):
        run(prompts=(PROMPT,), mask="0,0,4,4")
    with pytest.raises(UsageError, match="--keep-scales says"):
        run(prompts=(PROMPT,), keep_scales=1)
    with pytest.raises(UsageError, match="--mask says what"):
        run(recipe="a.png", mask="0,0,4,4")
    with pytest.raises(UsageError, match="--keep-scales says"):
        run(recipe="a.png", keep_scales=1)
    with pytest.raises(UsageError, match="say what to do with it"):
        run(original="a.png")
    for keep in (3, -1):
        with pytest.raises(UsageError, match="3 scales"):
            run(original="a.png", mask="0,0,16,8", keep_scales=keep)
    for mask in ("1.5,2,3,4", "-1,0,4,4", "0,0,9999999,1", "a,b,c,d", "1,2,3", "", "-"):
        with pytest.raises(UsageError, match="neither a file nor four whole numbers"):
            run(original="a.png", mask=mask)
    for mask in ("8,8,9,8", "0,0,0,4", "16,0,1,1"):
        with pytest.raises(UsageError, match="not within the 16x16 pixels"):
            run(original="a.png", mask=mask)
    Image.effect_noise((16, 16), 90).convert("RGB").save("square.png")
    with pytest.raises(UsageError, match="nothing of the mask's white is left"):  # it is cut off
        run(prompts=("a dog",), model=str(tiny), original="square.png", mask="0,0,2,16", aspect="1:2")
    Image.new("RGB", (900, 900)).save("large.png")
    with pytest.raises(UsageError, match="nothing of the mask's white is left"):  # it is thinner than a pixel
        run(prompts=("a dog",), model=str(tiny), original="large.png", mask="400,400,1,1")
    Image.new("RGB", (16, 16)).save("photo.png")
    with pytest.raises(UsageError, match="no recipe that says what it shows"):
        run(original="photo.png", refine=1)
    with pytest.raises(InputError, match=r"missing\.png"):
        run(original="missing.png", refine=1)


def test_masks_that_are_none(tiny: Path) -> None:
    first(tiny)
    original = read_original("a.png", Silent())
    Image.new("L", (8, 16), 255).save("small.png")
    Image.new("L", (16, 16), 127).save("dark.png")
    Image.new("L", (16, 16), 128).save("bright.png")
    Image.new("RGBA", (16, 16), (255, 255, 255, 0)).save("clear.png")
    Path("no.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    for name, problem in (("small.png", "8x16 pixels"), ("dark.png", "nothing of it is white")):
        with pytest.raises(UsageError, match=problem):
            read_mask(name, original)
    for name, problem in (("clear.png", "transparency"), ("no.png", "no.png"), ("missing.png", "missing.png")):
        with pytest.raises(InputError, match=problem):
            read_mask(name, original)
    Image.new("RGBA", (16, 16), (255, 255, 255, 255)).save("opaque.png")
    assert read_mask("bright.png", original).pixels((16, 16)).all()
    assert read_mask("opaque.png", original).pixels((16, 16)).all()


def test_a_picture_that_another_program_has_changed_is_another_one(tiny: Path) -> None:
    """Some keep all texts in a file whose pixels they change."""
    first(tiny, embed_bits=True)
    with Image.open("a.png") as image:
        info = PngInfo()
        for key, text in image.text.items():  # type: ignore[attr-defined]
            info.add_itxt(key, text)
        ImageOps.invert(image.convert("RGB")).save("b.png", pnginfo=info)
    report = Silent()
    found = draw(report, original="b.png", keep_scales=2, output="c.png")
    assert found.recipe["original"]["bits"] == "tokenized"
    assert "changed since" in report.notices[0]


@pytest.mark.parametrize("text", ["", "!!!", "QUJD", "A" * 400, "bitgen \u00e9"])
def test_damaged_bits_are_left_out(tiny: Path, text: str) -> None:
    first(tiny)
    recipe, _ = picture_recipe(Path("a.png"))
    info = PngInfo()
    info.add_itxt(RECIPE, json.dumps(recipe))
    info.add_itxt(BITS, text)
    with Image.open("a.png") as image:
        image.save("strange.png", pnginfo=info)
    found = draw(original="strange.png", keep_scales=2, seed=1, output="b.png")
    assert found.recipe["original"]["bits"] == "drawn again"
    assert np.array_equal(pixels("a.png"), pixels("b.png"))


@pytest.mark.parametrize("text", ["{half", "[1]", "{}", '{"seed": "x"}', '{"prompt": "a", "tau": -5}', "[" * 100_000])
def test_a_picture_with_a_damaged_recipe_is_a_photo(tiny: Path, text: str) -> None:
    first(tiny, embed_bits=True)
    info = PngInfo()
    info.add_itxt(RECIPE, text)
    with Image.open("a.png") as image:
        info.add_itxt(BITS, image.info[BITS])
        image.save("strange.png", pnginfo=info)
    report = Silent()
    call = {"model": str(tiny), "original": "strange.png", "keep_scales": 2}
    found = draw(report, prompts=("a dog",), **call, output="b.png")
    assert found.recipe["original"]["bits"] == "tokenized"
    assert "recipe" in report.notices[0]
    assert "taken for a photo" in report.notices[0]
    with pytest.raises(UsageError, match="no recipe that says what it shows"):
        run(**call)
    with pytest.raises(InputError, match="recipe"):
        run(recipe="strange.png")


def test_a_recipe_is_told_by_the_name_of_its_value(tiny: Path) -> None:
    first(tiny)
    recipe, _ = picture_recipe(Path("a.png"))
    Path("a.json").write_text(json.dumps({**recipe, "tau": [1, -5]}))
    with pytest.raises(InputError, match=r"the recipe's tau(\.1)?: Input"):
        read_recipe(Path("a.json"))


def test_recipes_of_strangers_name_no_file(tiny: Path) -> None:
    """What a recipe says of another picture and its mask is checked, and opens nothing."""
    first(tiny)
    recipe, _ = picture_recipe(Path("a.png"))
    good = {"name": "../../etc/passwd", "sha256": "0" * 64, "bits": "carried"}
    Path("a.json").write_text(json.dumps({**recipe, "original": good, "mask": {"box": [0, 0, 4, 4]}, "keep_scales": 1}))
    assert read_recipe(Path("a.json")).original is not None
    with pytest.raises(UsageError, match=r"'\.\./\.\./etc/passwd'"):
        run(recipe="a.json")
    bad: list[dict[str, Any]] = [
        {"original": {**good, "sha256": "x"}},
        {"original": "a.png"},
        {"mask": {"box": [0, 0, -1, 4]}},
        {"mask": {"box": [0, 0, 1]}},
        {"mask": "mask.png"},
        {"keep_scales": 0},
        {"keep_scales": "1"},
    ]
    for keys in bad:
        Path("b.json").write_text(json.dumps({**recipe, **keys}))
        with pytest.raises(InputError, match="the recipe's"):
            read_recipe(Path("b.json"))


@pytest.mark.parametrize(("levels", "how"), [(1, "drawn again"), (40, "tokenized")])
def test_rounding_of_the_decoder_makes_no_other_picture(tiny: Path, levels: int, how: str) -> None:
    """With another number of threads a pixel may be a level off; what is farther off has been changed."""
    first(tiny)
    with Image.open("a.png") as image:
        info = PngInfo()
        info.add_itxt(RECIPE, image.info[RECIPE])
        changed = np.asarray(image).astype(int)
    changed[3, 4, 1] += levels if changed[3, 4, 1] < 128 else -levels
    Image.fromarray(changed.astype(np.uint8)).save("b.png", pnginfo=info)
    assert draw(original="b.png", keep_scales=2, output="c.png").recipe["original"]["bits"] == how
