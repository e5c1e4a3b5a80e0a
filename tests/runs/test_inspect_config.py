"""`bitgen inspect-config` for every kind of target, and what it refuses."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from bitgen_cli.config_keys import flatten
from bitgen_cli.errors import ConfigError, InputError, UsageError
from bitgen_cli.presets import resolve
from bitgen_cli.report import Silent
from bitgen_cli.runs.inspect_config import InspectOptions, InspectResult, inspect


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BITGEN_SAMPLING__CFG", raising=False)


def look(target: str | Path, *overrides: str, config_file: Path | None = None) -> InspectResult:
    result = inspect(InspectOptions(str(target), list(overrides), config_file=config_file), Silent())
    assert json.loads(json.dumps(result.to_json())) == result.to_json()
    for table in result.sections:
        assert all(len(row) == len(table.columns) for row in table.rows)
        assert all(isinstance(cell, str) for row in table.rows for cell in row)
    return result


def rows(result: InspectResult, title: str) -> dict[str, list[str]]:
    table = next(table for table in result.sections if table.title.startswith(title))
    return {row[0]: list(row[1:]) for row in table.rows}


def run_folder(path: Path, **changes: Any) -> Path:
    resolved = resolve("demo", overrides=["sampling.tau=2"], environment={})
    stored = {
        "format": 1,
        "verb": "train",
        "stage": "tokenizer",
        "data": "world:10",
        "config": resolved.config.model_dump(mode="json"),
        "origins": resolved.origins,
    }
    path.mkdir()
    (path / "config.json").write_text(json.dumps({**stored, **changes}))
    return path


def model_folder(path: Path, **changes: Any) -> Path:
    config = resolve("demo", environment={}).config.model_dump(mode="json")
    stored = {
        "format": 1,
        "config": {"model": config["model"], "sampling": config["sampling"]},
        "fingerprints": {"tokenizer": "ab12"},
    }
    path.mkdir()
    (path / "config.json").write_text(json.dumps({**stored, **changes}))
    (path / "tokenizer.safetensors").write_bytes(b"x" * 3000)
    return path


def picture(path: Path, recipe: str | None) -> Path:
    chunks = PngInfo()
    if recipe is not None:
        chunks.add_itxt("bitgen", recipe)
    Image.new("RGB", (6, 4)).save(path, pnginfo=chunks)
    return path


def test_a_preset_in_numbers() -> None:
    facts = look("32bit").to_json()
    assert facts["kind"] == "preset"
    assert facts["picture"] == {
        "ratio": 1.0,
        "height": 256,
        "width": 256,
        "scales": 7,
        "positions": 521,
        "bits_per_position": 32,
        "bits": 16672,
        "bits_per_pixel": 16672 / 65536,
        "bits_with": {"32": 16672},
        "store_bytes": {"bits": 521 * 4, "latents": 32 * 16 * 16 * 2},
    }
    assert facts["scales"][3] == {
        "scale": 3,
        "height": 6,
        "width": 6,
        "positions": 36,
        "positions_so_far": 57,
        "bits": 1152,
    }
    assert facts["parameters"] == {
        "tokenizer_encoder": 45_025_696,
        "tokenizer_decoder": 65_092_355,
        "transformer": 125_185_696,
        "text_encoder": 1_223_527_424,
        "total": 1_458_831_171,
    }
    assert len(facts["ratios"]) == 15
    assert set(facts["memory"]["sampling"]) == {"fp32", "bf16"}
    assert set(facts["memory"]["training"]) == {"tokenizer", "transformer", "subject"}


def test_every_value_is_there_with_its_origin() -> None:
    resolved = resolve("demo", overrides=["sampling.cfg=5"], environment={})
    result = look("demo", "sampling.cfg=5")
    values = result.to_json()["values"]
    assert values == {
        key: {"value": value, "origin": resolved.origins[key]} for key, value in flatten(resolved.config)
    }
    assert rows(result, "Values")["sampling.cfg"] == ["5.0", "--set"]
    assert result.to_json()["config"] == resolved.config.model_dump(mode="json")


def test_tables_of_a_preset() -> None:
    result = look("demo")
    titles = [table.title.partition(",")[0] for table in result.sections]
    assert titles == [
        "Values",
        "Scales of a picture of 64x64 pixels (height x width)",
        "One picture",
        "Parameters",
        "Memory for sampling one picture of 64x64 with guidance",
        "Memory for training",
    ]
    assert rows(result, "Scales")["3"] == ["8x8", "64", "85", "1,024"]
    assert rows(result, "One picture")["Bits per pixel"] == ["0.332"]
    assert rows(result, "Parameters")["Transformer"] == ["4,022,392", "4.0 M"]
    assert rows(result, "Memory for sampling")["Keys and values of all scales but the last"] == [
        "378.0 KiB",
        "189.0 KiB",
    ]


def test_memory_follows_the_configuration() -> None:
    small, large = (look("demo", f"training.tokenizer.batch_size={size}").to_json() for size in (2, 64))
    few, many = (facts["memory"]["training"]["tokenizer"] for facts in (small, large))
    assert few["activations"] < many["activations"]
    assert few["optimizer"] == many["optimizer"]
    assert look("demo", "training.tokenizer=null").to_json()["memory"]["training"]["tokenizer"] is None
    without = look("demo", *(f"training.{stage}=null" for stage in ("tokenizer", "transformer", "subject")))
    assert not any(table.title.startswith("Memory for training") for table in without.sections)


def test_patchified_latents_are_twice_as_wide() -> None:
    facts = look("infinity-8b").to_json()
    assert (facts["picture"]["height"], facts["picture"]["positions"]) == (1024, 10521)
    assert facts["picture"]["bits_per_position"] == 56
    assert facts["picture"]["store_bytes"] == {"bits": 10521 * 7, "latents": 14 * 128 * 128 * 2}


def test_an_unknown_text_encoder_is_told() -> None:
    heard = Silent()
    options = InspectOptions("32bit", ["model.text_encoder.source=somebody/t5"])
    result = inspect(options, heard)
    assert heard.notices == ["the size of text encoder somebody/t5 is not known; sums leave it out"]
    assert result.to_json()["parameters"]["text_encoder"] is None
    assert rows(result, "Parameters")["Text encoder"] == ["not known", ""]


def test_a_preset_with_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("sampling: {tau: 2}")
    values = look("demo", config_file=file).to_json()["values"]
    assert values["sampling.tau"] == {"value": 2.0, "origin": f"file {file}"}


def test_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("extends: demo\nname: mine\n")
    facts = look(file, "sampling.tau=3").to_json()
    assert (facts["kind"], facts["config"]["name"]) == ("file", "mine")
    assert facts["values"]["sampling.tau"]["origin"] == "--set"


def test_a_folder_of_a_presets_name_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_folder(tmp_path / "demo")
    heard = Silent()
    assert inspect(InspectOptions("demo"), heard).kind == "preset"
    assert heard.notices == ["demo is taken as the preset; ./demo would be what lies here"]
    assert inspect(InspectOptions("./demo"), heard).kind == "run"


def test_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITGEN_SAMPLING__CFG", "9")
    folder = run_folder(tmp_path / "run")
    (folder / "state.json").write_text('{"step": 5, "finished": false}')
    facts = look(folder).to_json()
    assert facts["run"] == {
        "verb": "train",
        "stage": "tokenizer",
        "data": "world:10",
        "step": 5,
        "finished": False,
    }
    assert facts["values"]["sampling.tau"] == {"value": 2.0, "origin": "--set"}
    assert facts["values"]["sampling.cfg"] == {"value": 3.0, "origin": "default"}
    assert rows(look(folder), "Run")["step"] == ["5"]
    changed = look(folder / "config.json", "sampling.cfg=2").to_json()
    assert changed["values"]["sampling.cfg"] == {"value": 2.0, "origin": "--set"}


def test_a_model(tmp_path: Path) -> None:
    result = look(model_folder(tmp_path / "mine"))
    facts = result.to_json()
    assert facts["kind"] == "model"
    assert facts["config"]["name"] == "mine"
    assert facts["model"]["fingerprints"] == {"tokenizer": "ab12"}
    assert facts["model"]["files"]["tokenizer.safetensors"] == 3000
    assert facts["values"]["model.tokenizer.bits"]["origin"] == "model mine"
    assert facts["values"]["training.tokenizer"] == {"value": None, "origin": "default"}
    assert rows(result, "Files")["tokenizer.safetensors"] == ["2.9 KiB"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "is not valid JSON"),
        ("[]", "describes neither a run nor a model of bitgen"),
        ('{"config": 3, "verb": "train"}', "describes neither a run nor a model of bitgen"),
        ('{"d_model": 512}', "describes neither a run nor a model of bitgen"),
        ('{"config": {}}', "describes neither a run nor a model of bitgen"),
        (
            '{"config": {}, "verb": "train"}',
            "holds no valid configuration: name: missing; must be text that is not empty, and 1 more",
        ),
        ('{"config": {"name": "x"}, "verb": "train", "origins": [1]}', "origins must be a mapping"),
        ('{"config": {}, "fingerprints": {}, "format": 7}', "is of format 7, this bitgen reads 1"),
        (
            '{"config": {"model": {}}, "fingerprints": {}, "format": 1}',
            "holds no valid configuration: model.tok",
        ),
    ],
)
def test_damaged_folders(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError) as caught:
        look(tmp_path)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_state(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    (folder / "state.json").write_text("[5]")
    with pytest.raises(InputError, match=r"state\.json is damaged"):
        look(folder)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no config\.json"):
        look(tmp_path)


def test_wrong_overrides_of_a_run_are_usage(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"depth = 0: must be a whole number above 0 and at most 200 \(--set\)"):
        look(run_folder(tmp_path / "run"), "model.transformer.depth=0")


def test_a_picture(tmp_path: Path) -> None:
    recipe = {"prompt": "a red dög", "seed": 3, "sampling": {"cfg": [1, 2]}, "nothing": {}}
    result = look(picture(tmp_path / "dog.png", json.dumps(recipe)))
    assert result.to_json()["recipe"] == recipe
    assert (result.to_json()["width"], result.to_json()["height"]) == (6, 4)
    shown = rows(result, "Recipe")
    assert shown["prompt"] == ["a red dög"]
    assert shown["sampling.cfg"] == ["[1, 2]"]
    assert shown["nothing"] == ["{}"]


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        (None, r"carries no recipe of bitgen \(it was made or saved by another program\)"),
        ("{", "carries a damaged recipe"),
        ("[1]", "carries a damaged recipe: it must hold keys and values"),
    ],
)
def test_pictures_without_a_whole_recipe(tmp_path: Path, recipe: str | None, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        look(picture(tmp_path / "dog.png", recipe))


def test_pictures_that_are_none(tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    with pytest.raises(InputError, match="is not a readable picture"):
        look(broken)
    photo = tmp_path / "photo.jpg"
    Image.new("RGB", (4, 4)).save(photo)
    with pytest.raises(InputError, match="only PNG pictures can, and this is JPEG"):
        look(photo)
    with pytest.raises(UsageError, match="--set belongs to configurations"):
        look(picture(tmp_path / "dog.png", "{}"), "sampling.cfg=3")


def test_a_huge_picture_is_not_decoded(tmp_path: Path) -> None:
    """60000 x 60000 pixels that are not there: the recipe is found, or the picture refused, in no time."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)

    header = (60000).to_bytes(4) * 2 + bytes([8, 2, 0, 0, 0])
    file = tmp_path / "bomb.png"
    file.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    )
    with pytest.raises(InputError, match="is not a readable picture"):
        look(file)


def test_targets_that_are_nothing(tmp_path: Path) -> None:
    for name in (str(tmp_path / "none"), "none.yaml", "none.png"):
        with pytest.raises(InputError, match="no such file or folder"):
            look(name)
    with pytest.raises(UsageError, match=r"unknown preset '23bit' \(did you mean 32bit\?"):
        look("23bit")
    with pytest.raises(UsageError, match="--config belongs to a preset"):
        look(run_folder(tmp_path / "run"), config_file=tmp_path / "x.yaml")


def test_all_problems_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        look("demo", "sampling.tau=0", "model.tokenizer.bits=99", "nme=1")
    assert len(caught.value.problems) == 3


def test_the_schema_describes_what_presets_say() -> None:
    schema = inspect(InspectOptions("", schema=True), Silent()).to_json()
    assert schema["title"] == "bitgen configuration"
    assert {"extends", "name", "description", "model", "sampling", "training"} == set(schema["properties"])
    bits = schema["$defs"]["TokenizerConfig"]["properties"]["bits"]
    assert (bits["minimum"], bits["maximum"]) == (1, 64)
    assert bits["description"]
    assert schema["$defs"]["TokenizerConfig"]["additionalProperties"] is False
