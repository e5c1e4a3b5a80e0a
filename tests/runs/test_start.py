"""What a training begins with: models, published files, and what becomes of every key."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_model import CONFIG, save
from torch import Tensor

from bitgen_cli.config import Config, ModelConfig
from bitgen_cli.engine.beginning import PartReport
from bitgen_cli.engine.infinity_weights import published_transformer_name
from bitgen_cli.engine.model_folder import TOKENIZER_FILE, TRANSFORMER_FILE, load_model, save_model
from bitgen_cli.errors import InputError, UsageError
from bitgen_cli.presets import Resolved
from bitgen_cli.report import Silent
from bitgen_cli.runs.start import Init, Parts, first_parts, first_tokenizer, save_start
from bitgen_cli.runs.tokenize import TokenizeOptions, tokenize
from bitgen_cli.runs.tokens import Data
from bitgen_cli.runs.train import TrainOptions, train

LOOP = {"steps": 1, "batch_size": 2, "optimizer": {"learning_rate": 0.001}, "sample_every": 0, "validation_images": 0}


def configured(changes: dict[str, Any] | None = None) -> Config:
    """The tiny model's configuration with other values of its model, by dotted key."""
    model = CONFIG.model_dump(mode="json")
    for key, value in (changes or {}).items():
        section, _, name = key.rpartition(".")
        (model[section] if section else model)[name] = value
    training = {"tokenizer": LOOP, "transformer": LOOP}
    return Config.model_validate({"name": "tiny", "model": model, "training": training})


@pytest.fixture(scope="module")
def store(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "store"
    tokenize(TokenizeOptions("world:8", folder, str(tiny), device="cpu", dtype="fp32"), Silent())
    return folder


@pytest.fixture(scope="module")
def tokenizer_alone(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "tokenizer"
    found = load_model(tiny, parts=())
    save_model(folder, found.config, found.sampling, tokenizer=tiny / TOKENIZER_FILE)
    return folder


@pytest.fixture
def started(store: Path) -> Callable[..., tuple[Parts, list[PartReport], list[str]]]:
    """Parts, reports and what was told, for values of --init and --allow-init-mismatch and other model values."""

    def run(
        *models: Path | str, allow: tuple[str, ...] = (), **changes: Any
    ) -> tuple[Parts, list[PartReport], list[str]]:
        report = Silent()
        config = configured({key.replace("__", "."): value for key, value in changes.items()})
        parts, found = first_parts(config, Data(str(store)), Init(tuple(map(str, models)), allow), 0, report)
        return parts, found, report.notices

    return run


def published(model: Path, config: ModelConfig = CONFIG, chunks: int = 1) -> dict[str, Tensor]:
    """A model's transformer as Infinity stores it."""
    geometry = config.transformer.model_copy(update={"block_chunks": chunks})
    named = config.model_copy(update={"transformer": geometry})
    own = load_file(model / TRANSFORMER_FILE)
    return {published_transformer_name(name, named): tensor for name, tensor in own.items()}


def differing(module: torch.nn.Module, file: Path) -> set[str]:
    stored = load_file(file)
    return {
        name
        for name, tensor in module.state_dict().items()
        if name not in stored or stored[name].shape != tensor.shape or not torch.equal(stored[name], tensor)
    }


def test_a_whole_model_lends_all_its_weights(tiny: Path, started: Any) -> None:
    parts, (transformer, text), notices = started(tiny)
    assert not differing(parts.transformer, tiny / TRANSFORMER_FILE)
    assert set(transformer.loaded) == set(parts.transformer.state_dict())
    assert transformer.mismatches() == {}
    known = load_model(tiny).text_encoder
    assert known is not None
    assert all(
        torch.equal(a, b)
        for a, b in zip(parts.text_encoder.model.parameters(), known.model.parameters(), strict=True)
    )
    assert set(text.loaded) == set(known.model.state_dict())
    assert any(notice.startswith(f"transformer from {tiny}: {len(transformer.loaded)} loaded") for notice in notices)


def test_a_tokenizer_alone_leaves_the_rest_fresh(tokenizer_alone: Path, tiny: Path, started: Any) -> None:
    for source in (str(tokenizer_alone), f"{tiny}:tokenizer"):
        parts, (transformer, text), notices = started(source)
        assert transformer.source is text.source is None
        assert transformer.new == sorted(parts.transformer.state_dict())
        assert set(text.new) == set(parts.text_encoder.model.state_dict())
        assert notices == []


def test_published_files_beside_a_tokenizer(
    tiny: Path, tokenizer_alone: Path, started: Any, tmp_path: Path
) -> None:
    """Chunked names whatever the configuration's chunks; the text encoder they lack must be allowed to be new."""
    for chunks in (1, 2):
        file = tmp_path / f"{chunks}.pth"
        torch.save({"trainer": {"gpt_fsdp": published(tiny, chunks=chunks)}}, file)
        with pytest.raises(UsageError, match=r"1 new: text_encoder \(.*--allow-init-mismatch text_encoder\)$"):
            started(tokenizer_alone, file)
        parts, (transformer, text), _ = started(tokenizer_alone, file, allow=("text_encoder",))
        assert not differing(parts.transformer, tiny / TRANSFORMER_FILE)
        assert len(transformer.loaded) == len(parts.transformer.state_dict())
        assert "" not in text.loaded
        # a model's text encoder goes with a file of its transformer
        parts, (transformer, text), _ = started(tiny, file)
        assert (transformer.source, text.source) == (str(file), str(tiny))


def test_the_last_one_that_has_a_part_gives_it(tiny: Path, started: Any, tmp_path: Path) -> None:
    other = save(tmp_path / "other", seed=5)
    parts, (transformer, _), _ = started(tiny, other / TRANSFORMER_FILE)
    assert transformer.source == str(other / TRANSFORMER_FILE)
    assert not differing(parts.transformer, other / TRANSFORMER_FILE)
    parts, _, _ = started(other / TRANSFORMER_FILE, tiny)
    assert not differing(parts.transformer, tiny / TRANSFORMER_FILE)


def test_a_published_tokenizer_must_be_the_stores(tiny: Path, started: Any, tmp_path: Path) -> None:
    """It is written as in a model folder, so that its fingerprint says whether it made the store."""
    own = {name.removeprefix("autoencoder."): t for name, t in load_file(tiny / TOKENIZER_FILE).items()}
    torch.save({"vae": own}, tmp_path / "vae.pth")
    parts, (transformer, _), _ = started(tmp_path / "vae.pth")
    assert transformer.source is None

    class Run:
        start = tmp_path / "start"

    save_start(Run(), configured(), parts)  # type: ignore[arg-type]
    assert (Run.start / TOKENIZER_FILE).read_bytes() == (tiny / TOKENIZER_FILE).read_bytes()
    torch.save({"vae": {name: t + 1 for name, t in own.items()}}, tmp_path / "other.pth")
    with pytest.raises(UsageError, match="made with another tokenizer"):
        started(tmp_path / "other.pth")
    torch.save({"vae": dict(list(own.items())[1:])}, tmp_path / "part.pth")
    with pytest.raises(UsageError, match=r"must be tiny's, whole; 1 new: tokenizer\.autoencoder"):
        started(tmp_path / "part.pth", allow=("tokenizer",))


def test_another_geometry_is_refused_by_name_and_may_be_allowed(tiny: Path, started: Any) -> None:
    deeper = {"transformer__depth": 3}
    with pytest.raises(UsageError) as caught:
        started(tiny, **deeper)
    said = str(caught.value)
    assert "19 new: transformer.blocks.2.cross_attention.kv.weight" in said
    assert "and 15 more" in said
    assert "--allow-init-mismatch transformer.blocks" in said
    for name in ("transformer.blocks.2", "blocks.2", "transformer.blocks.2.*", "transformer"):
        parts, (transformer, _), _ = started(tiny, allow=(name,), **deeper)
        assert {key.split(".")[1] for key in transformer.new} == {"2"}
        fresh = differing(parts.transformer, tiny / TRANSFORMER_FILE)
        assert fresh == set(transformer.new)
    shallower, (transformer, _), _ = started(tiny, allow=("blocks.1",), transformer__depth=1)
    assert len(transformer.dropped) == 19
    assert not differing(shallower.transformer, tiny / TRANSFORMER_FILE)


def test_misshapen_weights_are_named_with_both_shapes(tiny: Path, started: Any) -> None:
    told = r"6 misshapen: .*transformer.blocks.0.ffn.down.weight is \(64, 256\), needs \(64, 512\)"
    with pytest.raises(UsageError, match=told):
        started(tiny, transformer__ffn_ratio=8)
    parts, (transformer, _), _ = started(tiny, allow=("*.ffn.*",), transformer__ffn_ratio=8)
    assert {wrong.key for wrong in transformer.misshapen} == differing(parts.transformer, tiny / TRANSFORMER_FILE)
    with pytest.raises(UsageError, match="needs"):
        started(tiny, allow=("blocks.0",), transformer__ffn_ratio=8)


def test_a_name_that_allows_nothing_is_told(tiny: Path, started: Any) -> None:
    _, _, notices = started(tiny, allow=("transformer.haed",))
    assert any("transformer.haed was not needed" in notice for notice in notices)


def test_other_dropout_and_chunks_are_the_same_model(tiny: Path, started: Any) -> None:
    parts, (transformer, _), _ = started(tiny, transformer__drop_path=0.3, transformer__block_chunks=2)
    assert not differing(parts.transformer, tiny / TRANSFORMER_FILE)
    assert transformer.mismatches() == {}


def test_a_model_of_other_scales_lends_its_weights(tiny: Path, tmp_path: Path) -> None:
    """Each scale begins with the embedding of the scale nearest in size; all other weights are taken as they are."""
    finer = {
        "transformer.scale_embeddings": 17,
        "scales.custom": {"1.0": [[1, 1], [2, 2], [3, 3], [4, 4]], "2.0": [[1, 1], [2, 1], [4, 2]]},
    }
    config = configured(finer)
    store = tmp_path / "store"
    found = load_model(tiny)
    save_model(tmp_path / "finer", config.model, found.sampling, tokenizer=tiny / TOKENIZER_FILE)
    tokenize(TokenizeOptions("world:4", store, str(tmp_path / "finer"), device="cpu", dtype="fp32"), Silent())
    report = Silent()
    parts, (transformer, _) = first_parts(config, Data(str(store)), Init((str(tiny),)), 1, report)
    rows = parts.transformer.scale_embedding.weight
    known = load_file(tiny / TRANSFORMER_FILE)["scale_embedding.weight"]
    # 1, 4, 9 and 16 positions, of 1, 4 and 16
    assert torch.equal(rows[:4], known[[0, 1, 2, 2]])
    assert rows[4:].std() > 0
    assert differing(parts.transformer, tiny / TRANSFORMER_FILE) == {"scale_embedding.weight"}
    assert set(transformer.adapted) == {"scale_embedding.weight"}
    assert "scale_embedding.weight" not in transformer.loaded
    assert any("nearest in size" in notice for notice in report.notices)


def test_a_longer_unconditional_prompt_is_cut_and_a_shorter_one_filled(tiny: Path, started: Any) -> None:
    known = load_file(tiny / TRANSFORMER_FILE)["null_text"]
    for length in (10, 20):
        parts, (transformer, _), _ = started(tiny, transformer__text_length=length)
        own = parts.transformer.null_text
        assert torch.equal(own[:10], known[:10])
        assert own.shape[0] == length
        assert own[-1].abs().sum() > 0
        assert transformer.adapted == {"null_text": f"16 rows to {length}"}


def test_another_text_encoder_must_be_allowed(tiny: Path, started: Any) -> None:
    wider = {"text_encoder__ffn_width": 64}
    with pytest.raises(UsageError, match=r"text_encoder\.ffn_width is 32, needs 64"):
        started(tiny, **wider)
    parts, (_, text), _ = started(tiny, allow=("text_encoder",), **wider)
    assert not differing(parts.transformer, tiny / TRANSFORMER_FILE)
    assert set(text.new) == set(parts.text_encoder.model.state_dict())
    assert parts.text_encoder.model.config.d_ff == 64


def test_a_tokenizer_begins_with_one_of_fewer_bits_where_that_is_allowed(tiny: Path, tmp_path: Path) -> None:
    wider = configured({"tokenizer.bits": 12})
    with pytest.raises(UsageError, match=r"autoencoder.encoder.conv_out.weight is \(8, .*needs \(12, "):
        first_tokenizer(wider, Init((str(tiny),)), 0, Silent())
    allowed = Init((str(tiny),), ("encoder.conv_out", "*.conv_out", "*.encoder.conv_out.*", "*.decoder.conv_in.*"))
    tokenizer, (found,) = first_tokenizer(wider, allowed, 0, Silent())
    fresh = differing(tokenizer, tiny / TOKENIZER_FILE)
    assert fresh == {wrong.key for wrong in found.misshapen}
    assert {name.removeprefix("autoencoder.").rpartition(".")[0] for name in fresh} == {
        "encoder.conv_out", "decoder.conv_in"
    }  # fmt: skip


def test_a_tokenizer_of_other_groups_is_another_one(tiny: Path) -> None:
    """The shapes are the same, what it computes is not."""
    config = configured({"tokenizer.norm_groups": 8})
    with pytest.raises(UsageError, match=r"tokenizer\.norm_groups is 4, needs 8"):
        first_tokenizer(config, Init((str(tiny),)), 0, Silent())
    first_tokenizer(config, Init((str(tiny),), ("norm_groups",)), 0, Silent())


def test_what_holds_no_part_of_use_is_refused(tiny: Path, started: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds none"):
        first_tokenizer(configured(), Init((str(tiny / TRANSFORMER_FILE),)), 0, Silent())
    with pytest.raises(UsageError, match="no tokenizer"):
        started(tiny / TRANSFORMER_FILE)
    with pytest.raises(UsageError, match="add --init MODEL"):
        started()
    with pytest.raises(UsageError, match=":ema belongs to"):
        started(f"{tiny}:ema")
    with pytest.raises(InputError, match="no model at"):
        started(tmp_path / "absent")


def test_the_run_keeps_the_report(tiny: Path, store: Path, tmp_path: Path) -> None:
    def resolved(changes: dict[str, Any]) -> Resolved:
        return Resolved(configured(changes), {"name": "test"})

    options = TrainOptions(resolved({}), None, str(store), tmp_path / "run", Init((str(tiny),)), "cpu")
    result = train(options, Silent())
    kept = json.loads((tmp_path / "run" / "init_report.json").read_text())
    assert kept == result.init == result.to_json()["init"]
    assert [part["part"] for part in kept] == ["transformer", "text_encoder"]
    assert len(kept[0]["loaded"]) > 50
    assert json.loads((tmp_path / "run" / "config.json").read_text())["init"] == [str(tiny)]
    refused = replace(options, resolved=resolved({"transformer.depth": 3}), out=tmp_path / "refused")
    with pytest.raises(UsageError):
        train(refused, Silent())
    assert not (tmp_path / "refused").exists()
