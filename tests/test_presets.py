"""Presets and the layers above them: which value wins, where it comes from, and every problem at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from bitgen_cli import presets
from bitgen_cli.config import Config
from bitgen_cli.config_keys import flatten
from bitgen_cli.engine.memory import parameters
from bitgen_cli.engine.tokenizer import Tokenizer
from bitgen_cli.engine.transformer import Transformer
from bitgen_cli.errors import ConfigError, InputError, UsageError
from bitgen_cli.presets import preset_names, preset_path, resolve, resolve_stored

PARAMETERS = {
    "16bit": (109_970_579, 125_148_800),
    "32bit": (110_118_051, 125_185_696),
    "64bit": (110_412_995, 125_259_488),
    "demo": (1_280_467, 4_022_392),
    "infinity-2b": (110_118_051, 2_204_564_032),
    "infinity-8b": (81_624_209, 8_375_791_824),
    "infinity-8b-512": (81_624_209, 8_375_791_824),
    "layer16": (110_118_051, 361_633_792),
    "layer24": (110_118_051, 940_944_832),
    "layer32": (110_118_051, 2_256_694_912),
    "layer40": (110_118_051, 4_716_421_888),
    "layer48": (110_118_051, 8_767_198_528),
}
"""Parameters of tokenizer and transformer. The published ones: 110.1 M for 32 bits, 125.2 M for layer12."""


def plain(name: str | None = "demo", **named: object) -> Config:
    return resolve(name, environment={}, **named).config  # type: ignore[arg-type]


def refused(
    *overrides: str, environment: dict[str, str] | None = None, file: Path | None = None
) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolve("demo", config_file=file, overrides=overrides, environment=environment or {})
    return caught.value.problems


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Presets of our own instead of those of bitgen: `base` is the demo."""
    (tmp_path / "base.yaml").write_text(preset_path("demo").read_text())
    monkeypatch.setattr(presets, "_folder", lambda: tmp_path)
    return tmp_path


def test_every_preset_has_its_parameters() -> None:
    assert preset_names() == sorted(PARAMETERS)


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_preset_builds_on_the_meta_device(name: str) -> None:
    config = plain(name)
    with torch.device("meta"):
        tokenizer, transformer = Tokenizer(config.model.tokenizer), Transformer(config.model)
    sizes = [sum(p.numel() for p in module.parameters()) for module in (tokenizer, transformer)]
    assert tuple(sizes) == PARAMETERS[name]
    counts = parameters(config.model)
    assert (counts.tokenizer, counts.transformer) == PARAMETERS[name]


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_preset_is_complete_and_called_like_its_file(name: str) -> None:
    config = plain(name)
    assert config.name == name
    assert config.description
    assert config.training.tokenizer is not None
    assert config.training.transformer is not None


@pytest.mark.parametrize("name", sorted(set(PARAMETERS) - {"demo"}))
def test_published_recipe(name: str) -> None:
    """INFINITY_FORMAT section 6: rate 6e-3 x pictures per step / 256, betas, decay, clip, flips, dropout."""
    recipe = plain(name).training.transformer
    assert recipe is not None
    assert recipe.optimizer.learning_rate == 6e-3 * recipe.batch_size * recipe.accumulation / 256
    assert (recipe.optimizer.betas, recipe.optimizer.weight_decay) == ((0.9, 0.97), 0.005)
    assert (recipe.optimizer.clip_norm, recipe.optimizer.schedule) == (5, "constant")
    assert (recipe.flip_strength, recipe.flip_scales, recipe.caption_dropout) == (0.3, 13, 0.1)
    assert (recipe.scale_weighting, recipe.checkpoint_activations) == ("published", True)


@pytest.mark.parametrize(
    ("name", "depth", "width", "heads", "chunks"),
    [
        ("32bit", 12, 768, 8, 4),
        ("layer16", 16, 1152, 12, 4),
        ("layer24", 24, 1536, 16, 4),
        ("layer32", 32, 2080, 20, 4),
        ("layer40", 40, 2688, 24, 4),
        ("layer48", 48, 3360, 28, 4),
        ("infinity-2b", 32, 2048, 16, 8),
        ("infinity-8b", 40, 3584, 28, 8),
        ("infinity-8b-512", 40, 3584, 28, 8),
    ],
)
def test_published_geometry(name: str, depth: int, width: int, heads: int, chunks: int) -> None:
    """INFINITY_FORMAT section 7."""
    geometry = plain(name).model.transformer
    assert (geometry.depth, geometry.width, geometry.heads) == (depth, width, heads)
    assert (geometry.block_chunks, geometry.drop_path, geometry.ffn_ratio) == (chunks, 0.1, 4)
    assert plain(name).model.bits_per_position == (56 if name.startswith("infinity-8b") else 32)


def test_presets_load_no_torch() -> None:
    program = (
        "import sys; from bitgen_cli.presets import resolve; resolve('demo'); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_unknown_preset() -> None:
    with pytest.raises(UsageError, match=r"unknown preset 'dmo' \(did you mean demo\? known: 16bit, 32bit"):
        resolve("dmo")
    with pytest.raises(UsageError, match=r"unknown preset '\.\./demo'"):
        preset_path("../demo")


def test_nothing_given() -> None:
    with pytest.raises(UsageError, match="name a preset: 16bit"):
        resolve(None, environment={})


def test_each_layer_wins_over_those_below(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    key, name = "training.transformer.batch_size", "BITGEN_TRAINING__TRANSFORMER__BATCH_SIZE"
    layers = [("preset demo", 16)]
    given = resolve("demo", environment={})
    file.write_text("training: {transformer: {batch_size: 2}}")
    layers.append((f"file {file}", 2))
    results = [given, resolve("demo", config_file=file, environment={})]
    environment = {name: "3"}
    layers.append((f"environment {name}", 3))
    results.append(resolve("demo", config_file=file, environment=environment))
    layers.append(("flag --batch-size", 4))
    results.append(resolve("demo", config_file=file, environment=environment, flags={key: 4}))
    layers.append(("--set", 6))
    results.append(
        resolve(
            "demo",
            config_file=file,
            environment=environment,
            flags={key: 4},
            overrides=[f"{key}=6"],
        )
    )
    for (origin, value), result in zip(layers, results, strict=True):
        assert result.config.training.transformer is not None
        assert (result.origins[key], result.config.training.transformer.batch_size) == (origin, value)


def test_every_value_has_an_origin() -> None:
    found = resolve(
        "layer16", environment={}, flags={"sampling.tau": None}, overrides=["training.tokenizer=null"]
    )
    assert list(found.origins) == [key for key, _ in flatten(found.config)]
    assert found.origins["model.transformer.depth"] == "preset layer16"
    assert found.origins["model.tokenizer.bits"] == "preset 32bit"
    assert found.origins["sampling.top_k"] == "default"
    assert found.origins["sampling.tau"] == "preset 32bit"
    assert found.origins["training.tokenizer"] == "--set"
    assert not any(key.startswith("training.tokenizer.") for key in found.origins)


def test_the_process_environment_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITGEN_SAMPLING__CFG", "[1, 2, 3.5, 4]")
    monkeypatch.setenv("BITGEN_SAMPLING__TAU", "")
    monkeypatch.setenv("BITGEN_HOME", "/tmp")
    found = resolve("demo")
    assert found.config.sampling.cfg == [1, 2, 3.5, 4]
    assert found.origins["sampling.cfg"] == "environment BITGEN_SAMPLING__CFG"
    assert found.origins["sampling.tau"] == "default"


def test_values_are_yaml() -> None:
    config = plain(
        overrides=[
            "training.transformer.optimizer.learning_rate=1e-4",
            "model.transformer.patchify=true",
            "description='a: b = c'",
            "sampling={cfg: 2, top_k: 1}",
            "model.scales.resolution=null",
        ]
    )
    assert config.training.transformer is not None
    assert config.training.transformer.optimizer.learning_rate == 1e-4
    assert config.model.transformer.patchify is True
    assert config.description == "a: b = c"
    assert (config.sampling.cfg, config.sampling.top_k, config.sampling.top_p) == (2, 1, 0.97)


def test_custom_sizes_are_one_value() -> None:
    config = plain(overrides=['model.scales.custom={"2.0": [[1, 1], [2, 1]]}'])
    assert config.model.scales.custom == {"2.0": [(1, 1), (2, 1)]}


def test_all_problems_of_all_layers_at_once(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "model:\n  tokenizer:\n    bitz: 3\n    patch_size: 12\n    patch_size: 12\nsampling:\n  tau: 0\n"
    )
    environment = {"BITGEN_SAMPLING__CGF": "4", "BITGEN_SAMPLING__TOP_P": "3"}
    found = refused("depth=2", "sampling.top_k", "name=[", environment=environment, file=file)
    assert found == [
        "model.tokenizer.patch_size: given twice (mine.yaml lines 4 and 5)",
        "model.tokenizer.bitz = 3: unknown key, did you mean model.tokenizer.bits? (mine.yaml line 3)",
        "environment variable BITGEN_SAMPLING__CGF names no key, did you mean BITGEN_SAMPLING__CFG?",
        "depth = 2: unknown key, did you mean model.transformer.depth? (--set)",
        "--set sampling.top_k: must be KEY=VALUE, for example sampling.cfg=4",
        "name = [: not valid YAML: while parsing a flow node, "
        "expected the node content, but found '<stream end>' (--set)",
        "model.tokenizer.patch_size = 12: must be a power of two (mine.yaml line 5)",
        "sampling.tau = 0: must be a number above 0, or a list that is not empty, each a number above 0"
        " (mine.yaml line 7)",
        "sampling.top_p = 3: must be a number above 0 and at most 1 (environment BITGEN_SAMPLING__TOP_P)",
    ]


def test_problems_name_the_file_or_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("extends: demo\nnme: x\n")
    with pytest.raises(ConfigError) as caught:
        resolve(None, config_file=file, environment={})
    assert str(caught.value) == f"{file}: nme = x: unknown key, did you mean name? (mine.yaml line 2)"
    with pytest.raises(ConfigError, match="preset demo: nme = x: unknown key"):
        resolve("demo", overrides=["nme=x"], environment={})


def test_a_file_may_say_everything(tmp_path: Path) -> None:
    file = tmp_path / "whole.yaml"
    file.write_text(yaml.safe_dump(plain().model_dump(mode="json")))
    found = resolve(None, config_file=file, environment={})
    assert found.config == plain()
    assert set(found.origins.values()) == {f"file {file}"}


def test_a_file_may_extend_a_preset(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("extends: layer16\nname: mine\n")
    found = resolve(None, config_file=file, environment={})
    assert found.origins["name"] == f"file {file}"
    assert found.origins["model.transformer.depth"] == "preset layer16"
    assert resolve("layer16", config_file=file, environment={}) == found
    with pytest.raises(UsageError, match="extends layer16, but preset demo is asked for too"):
        resolve("demo", config_file=file, environment={})


def test_presets_extend_presets(folder: Path) -> None:
    (folder / "middle.yaml").write_text("extends: base\nname: middle\nsampling: {cfg: 2, tau: 2}\n")
    (folder / "top.yaml").write_text("extends: middle\nname: top\nsampling: {tau: 3}\n")
    found = resolve("top", environment={})
    assert (found.config.name, found.config.sampling.cfg, found.config.sampling.tau) == ("top", 2, 3)
    assert found.origins["sampling.cfg"] == "preset middle"
    assert found.origins["sampling.tau"] == "preset top"
    assert found.origins["model.tokenizer.bits"] == "preset base"


def test_presets_in_a_circle(folder: Path) -> None:
    (folder / "a.yaml").write_text("extends: b")
    (folder / "b.yaml").write_text("extends: a")
    with pytest.raises(UsageError, match="a circle of presets: a extends b extends a"):
        resolve("a", environment={})
    (folder / "self.yaml").write_text("extends: self")
    with pytest.raises(UsageError, match="a circle of presets: self extends self"):
        resolve("self", environment={})


def test_extending_what_is_not_there(folder: Path) -> None:
    (folder / "top.yaml").write_text("extends: bas\nname: top\n")
    with pytest.raises(UsageError, match=r"unknown preset 'bas' \(did you mean base\?"):
        resolve("top", environment={})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            b"name: a\nmodel: [1, 2\n",
            ", line 3: not valid YAML: while parsing a flow sequence, expected ',' or ']'",
        ),
        (b"name: a\n\tmodel: 1\n", ", line 2: not valid YAML: "),
        (b"name: a\n---\nname: b\n", ", line 2: not valid YAML: expected a single document"),
        (
            b"name: a\nb: !!python/object/apply:os.getcwd []\n",
            ", line 2: not valid YAML: could not determine",
        ),
        (b"name: caf\xe9\n", ", line 1: not a text file in UTF-8"),
        (b"name: a\nb: \x00\n", ", line 2: not valid YAML: unacceptable character"),
        (b"- 1\n", ", line 1: must hold keys and values"),
        (b"[]\n", ", line 1: must hold keys and values"),
        (b"name: a\nextends: [demo]\n", ', line 2: extends must name a preset, not ["demo"]'),
        (b"name: 2024-99-99\n", ": not valid YAML: month must be in 1..12"),
        (b"[" * 5000, "not valid YAML: "),
    ],
)
def test_a_file_that_cannot_be_understood_is_one_line(tmp_path: Path, content: bytes, reason: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        resolve("demo", config_file=file, environment={})
    assert str(caught.value).startswith(str(file))
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, ConfigError)


def test_a_file_that_contains_itself(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("sampling: &here\n  cfg: *here\n")
    assert refused(file=file)[0].startswith("sampling.cfg = ")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*none\.yaml: No such file"):
        resolve("demo", config_file=tmp_path / "none.yaml", environment={})


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "empty.yaml"
    file.write_text("# nothing\n")
    assert resolve("demo", config_file=file, environment={}).config == plain()


def test_stored_configurations_keep_their_origins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITGEN_SAMPLING__CFG", "9")
    first = resolve("demo", environment={}, overrides=["sampling.tau=2"])
    stored = first.config.model_dump(mode="json")
    assert resolve_stored(stored, first.origins, where="run x") == first
    changed = resolve_stored(stored, {}, where="run x", overrides=["sampling.cfg=2"])
    assert changed.config.sampling.cfg == 2
    assert changed.origins["sampling.cfg"] == "--set"
    assert changed.origins["sampling.tau"] == "run x"
