"""`tokenize` by several processes, `--verify`, and text features up to the training that reads them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_tokenize import CONFIG, contents, options, save_pictures
from test_tokenize import model as model
from test_tokenize import small_shards as small_shards

from bitgen_cli.__main__ import main
from bitgen_cli.config import Config, ModelConfig, SamplingConfig
from bitgen_cli.engine import text as text_module
from bitgen_cli.engine.checkpoint import RunFolder
from bitgen_cli.engine.draws import Draws
from bitgen_cli.engine.model_folder import save_model
from bitgen_cli.engine.store import TokenStore
from bitgen_cli.engine.text import load_text_encoder, new_text_encoder
from bitgen_cli.engine.tokenizer import Tokenizer
from bitgen_cli.errors import InputError, UsageError
from bitgen_cli.files import only_writer
from bitgen_cli.report import Silent
from bitgen_cli.runs import start, text_features
from bitgen_cli.runs.resume import resume
from bitgen_cli.runs.start import Init
from bitgen_cli.runs.tokenize import tokenize
from bitgen_cli.runs.tokens import Data
from bitgen_cli.runs.train import TrainOptions, fit_for, train, transformer_stage


def test_parts_hold_what_one_store_holds(tmp_path: Path, model: Path) -> None:
    save_pictures(tmp_path / "data", 23)
    tokenize(options(tmp_path / "data", tmp_path / "one", model), Silent())
    for number in (3, 1, 2):
        report = Silent()
        result = tokenize(options(tmp_path / "data", tmp_path / "s", model, shard=f"{number}/3"), report)
        assert result.part == f"{number}/3"
        assert (result.missing == []) == (number == 2)
        assert any("can be used when all parts are there" in said for said in report.notices) == (number != 2)
        assert json.loads(json.dumps(result.to_json()))["out"] == str(tmp_path / "s")
    one, joined = TokenStore.open(tmp_path / "one"), TokenStore.open(tmp_path / "s")
    assert sorted(joined.keys) == sorted(one.keys)
    assert len(joined) == 23
    places = {key: index for index, key in enumerate(one.keys)}
    for index, key in enumerate(joined.keys):
        assert joined.captions[index] == one.captions[places[key]]
        assert joined.ratio(index) == one.ratio(places[key])
        same = [
            (a == b).float().mean() for a, b in zip(joined.bits([index]), one.bits([places[key]]), strict=True)
        ]
        # batches of other sizes may round differently
        assert min(same) > 0.9


def test_the_report_of_a_joined_store_is_on_the_pictures_of_all_parts(tmp_path: Path, model: Path) -> None:
    save_pictures(tmp_path / "data", 220)
    for number in (50, 170):
        (tmp_path / "data" / f"{number:03d}.png").write_text("no picture")
    tokenize(options(tmp_path / "data", tmp_path / "one", model, batch_size=16), Silent())
    for name, order in (("a", (1, 2)), ("b", (2, 1))):
        for number in order:
            shard = {"shard": f"{number}/2", "batch_size": 16}
            result = tokenize(options(tmp_path / "data", tmp_path / name, model, **shard), Silent())
            assert (result.report.found, result.report.used, len(result.report.bad)) == (110, 109, 1)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    whole, joined = (json.loads((tmp_path / name / "data_report.json").read_text()) for name in ("one", "a"))
    assert (joined["found"], joined["used"]) == (220, 218)
    assert [entry["key"] for entry in joined["bad"]] == ["050.png", "170.png"]
    assert joined["cropped"] == pytest.approx(whole.pop("cropped"))
    for bucket in whole["buckets"] + joined["buckets"]:
        bucket["cropped"] = pytest.approx(bucket["cropped"])
    assert {name: joined[name] for name in whole} == whole


def test_what_one_left_that_was_killed_while_it_joined_goes(tmp_path: Path, model: Path) -> None:
    save_pictures(tmp_path / "data", 4)
    first, second = (options(tmp_path / "data", tmp_path / "s", model, shard=f"{number}/2") for number in (1, 2))
    tokenize(first, Silent())
    left = tmp_path / "s" / ".data_report.json.1.partial"
    left.write_text("{")
    assert tokenize(second, Silent()).missing == []
    assert not left.exists()


def test_a_part_without_its_report_is_not_joined(tmp_path: Path, model: Path) -> None:
    tokenize(options("world:5", tmp_path / "s", model, shard="1/2"), Silent())
    file = tmp_path / "s" / "part-1-of-2" / "data_report.json"
    for content in ("[]", "{}", '{"bad": [1]}', '{"bad": [{"key": "a"}]}', '{"bad": 3}'):
        file.write_text(content)
        with pytest.raises(InputError, match="is no report on data"):
            tokenize(options("world:5", tmp_path / "s", model, shard="2/2"), Silent())
        assert not (tmp_path / "s" / "manifest.json").exists()
    tokenize(options("world:5", tmp_path / "s", model, shard="1/2"), Silent())
    assert len(TokenStore.open(tmp_path / "s")) == 5


def test_torchrun_says_which_part(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        assert tokenize(options("world:5", tmp_path / "s", model), Silent()).part == f"{rank + 1}/2"
    assert len(TokenStore.open(tmp_path / "s")) == 5
    with pytest.raises(UsageError, match="--shard 1/2 in process 2 of 2"):
        tokenize(options("world:5", tmp_path / "s", model, shard="1/2"), Silent())


@pytest.mark.parametrize("shard", ["0/2", "3/2", "2", "1/0", "a/b", "-1/2", "1/2/3"])
def test_what_is_no_part_is_wrong_usage(tmp_path: Path, model: Path, shard: str) -> None:
    with pytest.raises(UsageError, match="no part of a store"):
        tokenize(options("world:5", tmp_path / "s", model, shard=shard), Silent())
    assert not (tmp_path / "s").exists()


def test_a_finished_part_is_left_as_it_is(tmp_path: Path, model: Path) -> None:
    for number in (1, 2):
        tokenize(options("world:7", tmp_path / "s", model, shard=f"{number}/2"), Silent())
    before, report = contents(tmp_path / "s"), Silent()
    result = tokenize(options("world:7", tmp_path / "s", model, shard="1/2", reconstruct=2), report)
    assert (result.added, result.missing) == (0, [])
    assert any("nothing to do" in said for said in report.notices)
    shutil.rmtree(tmp_path / "s" / "part-1-of-2" / "reconstructions")
    assert contents(tmp_path / "s") == before


def test_two_processes_do_not_write_one_store(tmp_path: Path, model: Path) -> None:
    program = (
        "import sys, pathlib\nfrom bitgen_cli.files import only_writer\n"
        "with only_writer(pathlib.Path(sys.argv[1])): print('mine', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "s")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(InputError, match="another process is writing to"):
            tokenize(options("world:5", tmp_path / "s", model), Silent())
    assert tokenize(options("world:5", tmp_path / "s", model), Silent()).count == 5
    with only_writer(tmp_path / "s"):
        pass


def test_verify_tells_ok_or_every_bad_file(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = str(tmp_path / "s")
    tokenize(options("world:12", tmp_path / "s", model), Silent())
    assert main(["tokenize", "--verify", store]) == 0
    assert "12 pictures in 3 shards: OK" in capsys.readouterr().out
    (tmp_path / "s" / "shard-00000.safetensors").write_bytes(b"short")
    rows = (tmp_path / "s" / "shard-00002.jsonl").read_bytes()
    (tmp_path / "s" / "shard-00002.jsonl").write_bytes(rows.replace(b"00000011", b"00000000"))
    assert main(["tokenize", "--verify", store]) == 4
    shown = capsys.readouterr()
    assert "shard-00000.safetensors: it has 5 bytes instead of" in shown.out
    assert "shard-00002.jsonl: its contents are not what was written" in shown.out
    assert "is broken: 2 files" in shown.err
    assert main(["tokenize", "--verify", store, "--json"]) == 4
    found = json.loads(capsys.readouterr().out)
    assert [fault["file"] for fault in found["faults"]] == ["shard-00000.safetensors", "shard-00002.jsonl"]


def test_verify_finds_a_picture_that_is_there_twice(tmp_path: Path, model: Path) -> None:
    tokenize(options("world:12", tmp_path / "s", model), Silent())
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    manifest["shards"][1] = manifest["shards"][0]
    (tmp_path / "s" / "manifest.json").write_text(json.dumps(manifest))
    assert main(["tokenize", "--verify", str(tmp_path / "s")]) == 4


def test_verify_of_an_unfinished_store_fails(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenize(options("world:7", tmp_path / "s", model, shard="1/2"), Silent())
    assert main(["tokenize", "--verify", str(tmp_path / "s")]) == 4
    assert "part 2 of 2 is missing" in capsys.readouterr().err
    assert main(["tokenize", "--verify", str(tmp_path / "nowhere")]) == 4


def text_model(folder: Path, source: str, seed: int = 0) -> Path:
    """A model folder that names a fixed text encoder."""
    torch.manual_seed(seed)
    config = ModelConfig.model_validate({**CONFIG, "text_encoder": {"source": source}})
    save_model(folder, config, SamplingConfig(), tokenizer=Tokenizer(config.tokenizer))
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A transformers folder of a T5 with random weights."""
    folder = tmp_path_factory.mktemp("t5") / "encoder"
    config = ModelConfig.model_validate(CONFIG)
    made = new_text_encoder(config.text_encoder, ["caption 1 2 3", "a dog"], config.transformer.text_length, seed=0)
    made.model.save_pretrained(folder)
    made.vocabulary.save(str(folder / "tokenizer.json"))
    return str(folder)


def features_of(encoder: str, captions: list[str]) -> list[torch.Tensor]:
    loaded = load_text_encoder(encoder, CONFIG["transformer"]["text_length"], torch.device("cpu"), torch.float32)
    with torch.inference_mode():
        encoded = loaded.encode(captions)
    return [row[:length] for row, length in zip(encoded.features, encoded.lengths, strict=True)]


@pytest.mark.parametrize("in_parts", [False, True])
def test_text_features_are_kept_and_can_be_added_later(
    tmp_path: Path, encoder: str, monkeypatch: pytest.MonkeyPatch, in_parts: bool
) -> None:
    """At once, later, and after a stop between two shards: the same bytes."""
    save_pictures(tmp_path / "data", 23)
    model = text_model(tmp_path / "model", encoder)
    shards = ["1/2", "2/2"] if in_parts else [None]

    def make(name: str, **changes: Any) -> None:
        for shard in shards:
            tokenize(options(tmp_path / "data", tmp_path / name, model, shard=shard, **changes), Silent())

    make("at once", text_features=True)
    make("later")
    make("later", text_features=True)
    calls, write = [], text_features.write_shard_text

    def write_or_stop(*given: Any, **named: Any) -> None:
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write(*given, **named)

    monkeypatch.setattr(text_features, "write_shard_text", write_or_stop)
    with pytest.raises(Exception, match="stopped"):
        make("stopped", text_features=True)
    monkeypatch.undo()
    with pytest.raises(InputError, match="unfinished"):
        TokenStore.open(tmp_path / "stopped")
    make("stopped", text_features=True)
    assert contents(tmp_path / "at once") == contents(tmp_path / "later") == contents(tmp_path / "stopped")
    store = TokenStore.open(tmp_path / "at once")
    found = store.text_features(range(23))
    assert found is not None
    for row, length, expected in zip(
        found.features, found.lengths, features_of(encoder, [(*own, "")[0] for own in store.captions]), strict=True
    ):
        assert (row[:length] - expected).abs().max() <= 0.01 * expected.abs().max()
    assert main(["tokenize", "--verify", str(tmp_path / "at once")]) == 0


def test_a_text_encoder_that_is_trained_has_no_lasting_features(tmp_path: Path, model: Path) -> None:
    with pytest.raises(UsageError, match="trains its own text encoder"):
        tokenize(options("world:5", tmp_path / "s", model, text_features=True), Silent())
    missing = text_model(tmp_path / "model", str(tmp_path / "no encoder"))
    with pytest.raises(InputError, match="cannot load the text encoder"):
        tokenize(options("world:5", tmp_path / "s", missing, text_features=True), Silent())
    assert not (tmp_path / "s").exists()


def test_training_reads_the_features_and_loads_no_encoder(
    tmp_path: Path, encoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same losses as with the encoder, but for the rounding of what is stored."""
    save_pictures(tmp_path / "data", 20)
    model = text_model(tmp_path / "model", encoder)
    loop: dict[str, Any] = {
        "steps": 3,
        "batch_size": 2,
        "precision": "fp32",
        "validation_images": 2,
        "flip_strength": 0.1,
        "flip_scales": 2,
        "optimizer": {"learning_rate": 0.001},
    }
    config = Config.model_validate(
        {
            "name": "tiny",
            "model": {**CONFIG, "text_encoder": {"source": encoder}},
            "training": {"transformer": loop},
        }
    )

    resolved: Any = SimpleNamespace(config=config, origins={})
    losses, frozen = {}, {}
    for name in ("plain", "kept"):
        tokenize(options(tmp_path / "data", tmp_path / name, model, text_features=name == "kept"), Silent())
        report = Silent()
        if name == "kept":
            monkeypatch.setattr(start, "load_text_encoder", lambda *given: pytest.fail("loaded"))
            monkeypatch.setattr(text_module, "load_text_encoder", lambda *given: pytest.fail("loaded"))
        given = TrainOptions(resolved, None, str(tmp_path / name), tmp_path / f"run {name}", Init((str(model),)), "cpu")
        frozen[name] = fit_for(given, "transformer", torch.device("cpu")).memory.frozen
        result = train(given, report)
        losses[name] = result.validation["val_loss"]
        assert not any("text features" in said for said in report.notices)
        with Image.open(next((tmp_path / f"run {name}" / "samples").glob("*.png"))) as drawn:
            assert drawn.size[1] > drawn.size[0] / 8
    assert losses["kept"] == pytest.approx(losses["plain"], rel=0.01)
    weights = load_file(Path(encoder) / "model.safetensors")
    assert frozen["plain"] - frozen["kept"] == sum(4 * weight.numel() for weight in weights.values())
    assert resume(tmp_path / "run kept", Silent(), steps=1, device="cpu").steps == 4  # type: ignore[union-attr]


def test_each_epoch_learns_from_the_features_of_another_caption(
    tmp_path: Path, encoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawn captions are the same with stored features as with the encoder."""
    save_pictures(tmp_path / "data", 12)
    rows = [
        {"file_name": f"{number:03d}.png", "text": [f"caption {number}", "a dog", "3 2 1"][: number % 4]}
        for number in range(12)
    ]
    (tmp_path / "data" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = text_model(tmp_path / "model", encoder)
    loop = {"steps": 40, "batch_size": 4, "precision": "fp32", "validation_images": 2, "caption_dropout": 0.0}
    config = Config.model_validate(
        {
            "name": "tiny",
            "model": {**CONFIG, "text_encoder": {"source": encoder}},
            "training": {"transformer": {**loop, "optimizer": {"learning_rate": 0.001}}},
        }
    )
    stages = []
    for kept in (False, True):
        out = tmp_path / str(kept)
        tokenize(options(tmp_path / "data", out, model, text_features=kept), Silent())
        parts, _ = start.first_parts(config, Data(str(out)), Init((str(model),)), 0, Silent())
        assert (parts.text_encoder is None) == kept
        stages.append(transformer_stage(config, parts, RunFolder(tmp_path / "run"), torch.device("cpu")))
    seen: dict[int, list[list[torch.Tensor]]] = {0: [], 1: []}
    for number, stage in enumerate(stages):
        text = stage._text

        def spy(indices: list[int], which: list[int], text: Any = text, number: int = number) -> Any:
            found = text(indices, which)
            seen[number].append([row[:length] for row, length in zip(found.features, found.lengths, strict=True)])
            return found

        monkeypatch.setattr(stage, "_text", spy)
    (group,) = (group for group in stages[0].groups if stages[0].tokens.ratio(group[0]) == 1.0)
    several = [len(stages[0].tokens.captions[index]) for index in group]
    assert max(several) > 1
    for step in range(0, 40, 4):
        draws = Draws(step, range(len(group)), epoch=step // 4)
        losses = [stage.loss(group, draws, step)[0].item() for stage in stages]
        assert losses[0] == pytest.approx(losses[1], rel=0.01)
    for made, stored in zip(seen[0], seen[1], strict=True):
        for row, other in zip(made, stored, strict=True):
            assert row.shape == other.shape
            assert (row - other).abs().max() <= 0.01 * row.abs().max()
    for place, count in enumerate(several):
        drawn = {tuple(batch[place].flatten().tolist()) for batch in seen[1]}
        assert len(drawn) == max(1, count)


def test_features_of_another_encoder_are_not_used(tmp_path: Path, encoder: str) -> None:
    shutil.copytree(encoder, tmp_path / "other")
    config_file = tmp_path / "other" / "config.json"
    config_file.write_text(config_file.read_text() + "\n")
    model = text_model(tmp_path / "model", encoder)
    tokenize(options("world:5", tmp_path / "s", model, text_features=True), Silent())
    store = TokenStore.open(tmp_path / "s")
    same = ModelConfig.model_validate({**CONFIG, "text_encoder": {"source": encoder}})
    other = ModelConfig.model_validate({**CONFIG, "text_encoder": {"source": str(tmp_path / "other")}})
    shorter = {**CONFIG["transformer"], "text_length": 4}
    cut = ModelConfig.model_validate({**CONFIG, "transformer": shorter, "text_encoder": {"source": encoder}})
    new = ModelConfig.model_validate(CONFIG)
    fits = [text_features.has_features_for(store.text, config) for config in (same, other, cut, new)]
    assert fits == [True, False, False, False]
    model = text_model(tmp_path / "model 2", str(tmp_path / "other"))
    with pytest.raises(InputError, match="has another text encoder"):
        tokenize(options("world:5", tmp_path / "s", model, text_features=True), Silent())
