"""`bitgen sample --save-scales`: what a picture is after each scale, and the files beside pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_model import CONFIG

from bitgen_cli.engine import pyramid
from bitgen_cli.engine.data import to_pil, to_uint8
from bitgen_cli.engine.scales import schedule
from bitgen_cli.engine.tokenizer import Tokenizer
from bitgen_cli.engine.transformer import Transformer
from bitgen_cli.errors import InputError, UsageError
from bitgen_cli.report import Silent
from bitgen_cli.runs import sample as walk
from bitgen_cli.runs import scale_pictures
from bitgen_cli.runs.jobs import SampleOptions
from bitgen_cli.runs.sample import sample
from bitgen_cli.runs.sample_result import SampleResult
from bitgen_cli.runs.scale_pictures import GAP, Frames, write_scales

pytestmark = pytest.mark.usefixtures("here")
SCALES = 3


def run(model: str, *prompts: str, **options: Any) -> SampleResult:
    given = {"seed": 1, "save_scales": "strip", "output": "out/", **options}
    return sample(SampleOptions(prompts=prompts, model=model, **given), Silent())


def pixels(file: Path | str) -> bytes:
    with Image.open(file) as image:
        return image.convert("RGB").tobytes()


def names(folder: str = "out") -> set[str]:
    return {file.name for file in Path(folder).iterdir()}


def frames(in_bands: bool = False, ratio: float = 1.0) -> Frames:
    """Of random bits."""
    torch.manual_seed(3)
    tokenizer = Tokenizer(CONFIG.tokenizer).eval()
    entry = schedule(CONFIG.scales, patchify=False, ratio=ratio)
    bits = [torch.rand(1, 8, h, w) < 0.5 for h, w in entry.latent_sizes]
    with torch.inference_mode():
        (image,) = to_uint8(tokenizer.decode_bits(bits, entry, in_bands=in_bands))
    return Frames(tokenizer, [grid[0] for grid in bits], entry, to_pil(image), in_bands)


@pytest.mark.parametrize("in_bands", [False, True])
def test_frames_are_the_decoded_sums_and_the_last_is_the_picture(in_bands: bool) -> None:
    of = frames(in_bands)
    found = list(of)
    assert len(found) == len(of) == SCALES
    for count, frame in enumerate(found, 1):
        total = pyramid.decode([grid[None] for grid in of.bits[:count]], of.schedule)
        with torch.inference_mode():
            (image,) = to_uint8(of.tokenizer.decode(total, in_bands=in_bands))
        assert frame.tobytes() == to_pil(image).tobytes()
    assert found[-1].tobytes() == of.finished.tobytes()
    assert len({frame.tobytes() for frame in found}) == SCALES


def test_a_strip_has_every_frame_beside_the_other(here: Path) -> None:
    of, told = frames(ratio=2.0), []
    width, height = of.finished.size
    write_scales(here / "x.png", of, told.append)
    with Image.open(here / "x.png") as strip:
        assert strip.size == (SCALES * width + 2 * GAP, height)
        for number, frame in enumerate(of):
            left = number * (width + GAP)
            assert strip.crop((left, 0, left + width, height)).tobytes() == frame.tobytes()
        assert set(strip.crop((width, 0, width + GAP, height)).tobytes()) == {255}
    assert told == [1, 2, 3]


def test_a_strip_is_shrunk_to_the_widest(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale_pictures, "WIDEST", 35)
    write_scales(here / "x.png", frames())
    with Image.open(here / "x.png") as strip:
        assert strip.size == (SCALES * 9 + 2 * GAP, 9)


def test_an_animation_has_every_frame_without_loss_and_holds_the_last(here: Path) -> None:
    of = frames()
    write_scales(here / "x.webp", of)
    with Image.open(here / "x.webp") as animation:
        assert (animation.format, animation.n_frames, animation.info["loop"]) == ("WEBP", SCALES, 0)  # type: ignore[attr-defined]
        times = []
        for number, frame in enumerate(of):
            animation.seek(number)
            assert animation.convert("RGB").tobytes() == frame.tobytes()
            times.append(animation.info["duration"])
    assert times == [400, 400, 2000]


@pytest.mark.parametrize("refine", [0, 2])
def test_a_picture_has_its_scales_beside_it_and_is_what_it_was(
    model: str, refine: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    step, forward = Transformer.step, Transformer.forward
    monkeypatch.setattr(Transformer, "step", lambda self, *given: (steps.append(1), step(self, *given))[1])
    monkeypatch.setattr(Transformer, "forward", lambda self, *given: (steps.append(2), forward(self, *given))[1])
    plain = run(model, "a red dog", "a cat", num_images=2, save_scales=None, output="plain/", refine=refine)
    work, steps = steps, []
    shown = run(model, "a red dog", "a cat", num_images=2, refine=refine)
    assert steps == work != []
    assert len(shown.pictures) == 4
    for before, picture in zip(plain.pictures, shown.pictures, strict=True):
        assert picture.recipe == before.recipe
        assert before.scales is None
        assert before.to_json()["scales"] is None
        assert picture.scales == picture.path.with_name(f"{picture.path.stem}-scales.png")
        assert picture.to_json()["scales"] == str(picture.scales)
        assert pixels(picture.path) == pixels(before.path)
        with Image.open(picture.scales) as strip:
            last = strip.crop((strip.width - 16, 0, strip.width, 16))
            assert last.tobytes() == pixels(picture.path)


def test_a_free_name_is_one_whose_scales_are_free_too(model: str) -> None:
    Path("out").mkdir()
    Path("out/a-cat-1-scales.webp").write_bytes(b"mine")
    (picture,) = run(model, "a cat", save_scales="webp").pictures
    assert (picture.path, picture.scales) == (Path("out/a-cat-1-2.png"), Path("out/a-cat-1-2-scales.webp"))
    (picture,) = run(model, "a cat").pictures
    assert (picture.path, picture.scales) == (Path("out/a-cat-1.png"), Path("out/a-cat-1-scales.png"))
    # the name that the scales of another picture have taken
    two = run(model, "a cat", "a cat 1 scales", output="named/{prompt}.png").pictures
    three = run(model, "a cat", "a cat scales", output="same/{prompt}.png").pictures
    assert [one.path.name for one in two] == ["a-cat.png", "a-cat-1-scales.png"]
    assert [one.path.name for one in three] == ["a-cat.png", "a-cat-scales-2.png"]
    assert Path("out/a-cat-1-scales.webp").read_bytes() == b"mine"
    run(model, "a cat", save_scales="webp", overwrite=True)
    assert Path("out/a-cat-1-scales.webp").read_bytes() != b"mine"


def test_a_named_picture_whose_scales_are_there_is_refused(model: str) -> None:
    Path("x-scales.png").write_bytes(b"mine")
    with pytest.raises(UsageError, match=r"x-scales\.png is there already"):
        run(model, "a cat", output="x.png")
    assert not Path("x.png").exists()
    run(model, "a cat", output="x.png", save_scales=None)
    run(model, "a cat", output="x.png", overwrite=True)
    assert Path("x-scales.png").read_bytes() != b"mine"


@pytest.mark.parametrize(
    ("options", "says"), [({"save_scales": "gif"}, "use strip or webp"), ({"output": "-"}, "that alone")]
)
def test_mistakes_are_told_before_anything_is_drawn(model: str, options: dict[str, str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        run(model, "a cat", **options)


def test_scales_are_there_before_their_picture_and_a_stopped_job_goes_on(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("p.txt").write_text("a dog\na cat\nthe moon\n")
    options = {"prompts_file": "p.txt", "seed": None, "batch_size": 1}
    write = walk.write_picture

    def stop(path: Path, *rest: Any) -> None:
        if "cat" in path.name:
            assert path.with_name(f"{path.stem}-scales.png").exists()
            raise KeyboardInterrupt
        write(path, *rest)

    monkeypatch.setattr(walk, "write_picture", stop)
    with pytest.raises(BaseException, match="stopped after 1 of 3"):
        run(model, **options)
    left = names()
    assert not [name for name in left if "cat" in name], "no scales without a picture"
    monkeypatch.setattr(walk, "write_picture", write)
    again = run(model, **options)
    assert (again.kept, len(again.pictures)) == (1, 2)
    assert left < names()
    rows = [json.loads(line) for line in Path("out/manifest.jsonl").read_text().splitlines()]
    assert names() == {"manifest.jsonl"} | {row["file"] for row in rows} | {row["scales"] for row in rows}
    assert len(rows) == 3
    assert run(model, **options).kept == 3


def test_scales_asked_for_later_come_with_new_pictures_and_replace_nothing(model: str) -> None:
    Path("p.txt").write_text("a dog\na cat\nthe moon\n")
    first = run(model, prompts_file="p.txt", seed=1, save_scales=None)
    before = {one.path.name: pixels(one.path) for one in first.pictures}
    assert run(model, prompts_file="p.txt", seed=1).kept == 3
    assert names() == {*before, "manifest.jsonl"}
    Path("out/a-cat-1.png").unlink()
    Path("out/a-dog-1.png").unlink()
    Path("out/a-dog-1-scales.png").write_bytes(b"mine")
    again = run(model, prompts_file="p.txt", seed=1)
    assert [str(one.scales) for one in again.pictures] == ["out/a-cat-1-scales.png"]
    assert [(one.line, one.message) for one in again.failures] == [
        (1, "out/a-dog-1-scales.png is there already (--output gives another name, --overwrite replaces it)")
    ]
    assert pixels("out/a-cat-1.png") == before["a-cat-1.png"]
    assert Path("out/a-dog-1-scales.png").read_bytes() == b"mine"
    # what was listed with the picture is its own
    Path("out/a-cat-1.png").unlink()
    Path("out/a-cat-1-scales.png").write_bytes(b"half of a job that was killed")
    assert [one.path.name for one in run(model, prompts_file="p.txt", seed=1).pictures] == ["a-cat-1.png"]
    assert pixels("out/a-cat-1-scales.png")


def test_a_manifest_cannot_name_scales_elsewhere(model: str) -> None:
    Path("p.txt").write_text("a dog\n")
    Path("mine-scales.png").write_bytes(b"mine")
    run(model, prompts_file="p.txt", seed=1)
    row = json.loads(Path("out/manifest.jsonl").read_text())
    Path("out/a-dog-1.png").unlink()
    for evil in ("../mine-scales.png", "/etc/x", None, 3, ["x"]):
        Path("out/manifest.jsonl").write_text(json.dumps(row | {"scales": evil}) + "\n")
        (picture,) = run(model, prompts_file="p.txt", seed=1).pictures
        assert picture.path.name.startswith("a-dog-1-")
        picture.path.unlink()
    assert Path("mine-scales.png").read_bytes() == b"mine"


def test_files_that_lines_name_are_not_taken_by_others(model: str) -> None:
    lines = ["a dog", '{"prompt": "a cat", "output": "a-dog-1-scales.png"}', '{"prompt": "b", "output": "x.png"}']
    Path("p.txt").write_text("\n".join([*lines, '{"prompt": "c", "output": "x-scales.png"}']) + "\n")
    result = run(model, prompts_file="p.txt")
    assert sorted(one.path.name for one in result.pictures) == ["a-dog-1-2.png", "a-dog-1-scales.png", "x.png"]
    assert [(one.line, one.message) for one in result.failures] == [
        (4, "out/x-scales.png is the output of another line")
    ]


def test_scales_that_cannot_be_written_are_a_failed_line(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("p.txt").write_text("a dog\na cat\n")

    def fail(path: Path, *rest: Any) -> None:
        if "dog" in path.name:
            raise InputError(f"cannot write {path}: permission denied")
        write_scales(path, *rest)

    monkeypatch.setattr(walk, "write_scales", fail)
    result = run(model, prompts_file="p.txt")
    assert [failure.line for failure in result.failures] == [1]
    assert names() == {"a-cat-1.png", "a-cat-1-scales.png", "manifest.jsonl"}
