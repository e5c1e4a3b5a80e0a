"""The configuration models: what they refuse, and in which words."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from bitgen_cli.config import Config, TokenizerTraining, TransformerTraining
from bitgen_cli.config_keys import accepts, flatten, known_keys, nearest, problems, show

Edit = Callable[[dict[str, Any]], None]

WHOLE: dict[str, Any] = {
    "name": "tiny",
    "model": {
        "tokenizer": {
            "bits": 8,
            "patch_size": 4,
            "base_channels": 24,
            "channel_multipliers": [1, 2, 2],
            "res_blocks": 1,
        },
        "transformer": {
            "depth": 2,
            "width": 64,
            "heads": 2,
            "ffn_ratio": 4,
            "text_width": 16,
            "text_length": 12,
            "patchify": False,
            "scale_embeddings": 3,
        },
        "text_encoder": {
            "source": "new",
            "vocabulary": 100,
            "width": 16,
            "layers": 1,
            "heads": 2,
            "ffn_width": 32,
        },
        "scales": {"published": False, "custom": {"1.0": [[1, 1], [2, 2], [4, 4]]}},
    },
    "training": {"transformer": {"steps": 10, "batch_size": 2, "optimizer": {"learning_rate": 1e-3}}},
}


def whole(**changes: Any) -> dict[str, Any]:
    """A valid configuration with values replaced by dotted key (double underscore for the dot)."""
    values = copy.deepcopy(WHOLE)
    for key, value in changes.items():
        *path, last = key.split("__")
        inner = values
        for name in path:
            inner = inner.setdefault(name, {})
        inner[last] = value
    return values


def lines(values: dict[str, Any]) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        Config.model_validate(values)
    return problems(caught.value, lambda key: "")


def test_a_whole_configuration_is_accepted() -> None:
    config = Config.model_validate(whole())
    assert config.model.bits_per_position == 8
    assert config.model.transformer.ffn_width == 256
    assert Config.model_validate(config.model_dump(mode="json")) == config


def test_the_most_active_bits_are_predicted() -> None:
    found = Config.model_validate(whole(model__tokenizer__active_bits=[2, 4])).model
    assert (found.tokenizer.bit_counts, found.tokenizer.most_bits, found.bits_per_position) == ((2, 4), 4, 4)
    assert Config.model_validate(whole()).model.tokenizer.bit_counts == (8,)


@pytest.mark.parametrize(
    ("scales", "recipe", "problem"),
    [
        (None, {"resolutions": [2, 3]}, None),
        (None, {"resolutions": [2, 4]}, "resolutions = [2, 4]: must be numbers of scales, at most 3"),
        (None, {"resolutions": ["0.06M"]}, 'resolutions = ["0.06M"]: must be numbers of scales, at most 3'),
        ("1M", {"resolutions": ["0.06M", "1M"]}, None),
        ("1M", {"resolutions": [3]}, "resolutions = [3]: must be pixel budgets: 0.06M, 0.25M, 0.60M or 1M"),
        (None, {"scale_dropout": 0.1, "scale_dropout_keep": 3}, None),
        (
            None,
            {"scale_dropout": 0.1, "scale_dropout_keep": 4},
            "scale_dropout_keep = 4: must be at most 3, the scales there are",
        ),
    ],
)
def test_a_tokenizers_recipe_fits_the_scales(
    scales: str | None, recipe: dict[str, Any], problem: str | None
) -> None:
    loop = {"steps": 1, "batch_size": 1, "optimizer": {"learning_rate": 1}}
    values = whole(training__tokenizer={**loop, **recipe})
    if scales is not None:
        values["model"]["scales"] = {"published": True, "resolution": scales}
        values["model"]["transformer"]["scale_embeddings"] = 13
    if problem is None:
        Config.model_validate(values)
    else:
        assert lines(values) == [f"training.tokenizer.{problem}"]


def test_patchify_quadruples_the_bits() -> None:
    assert Config.model_validate(whole(model__transformer__patchify=True)).model.bits_per_position == 32


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"model__tokenizer__active_bits": [4, 2]},
            "model.tokenizer.active_bits = [4, 2]: must be ascending, each number once",
        ),
        ({"model__tokenizer__active_bits": [4, 16]}, "model.tokenizer.active_bits = [4, 16]: must be at most bits 8"),
        ({"model__tokenizer__bits": 65}, "model.tokenizer.bits = 65: must be a whole number from 1 to 64"),
        ({"model__tokenizer__bits": 8.5}, "model.tokenizer.bits = 8.5: must be a whole number from 1 to 64"),
        (
            {"model__tokenizer__bits": True},
            "model.tokenizer.bits = true: must be a whole number from 1 to 64",
        ),
        ({"model__tokenizer__patch_size": 6}, "model.tokenizer.patch_size = 6: must be a power of two"),
        (
            {"model__tokenizer__patch_size": 8},
            "model.tokenizer.channel_multipliers = [1, 2, 2]: must have 4 entries for patch_size 8, has 3",
        ),
        (
            {"model__tokenizer__channel_multipliers": [1, 0, 2]},
            "model.tokenizer.channel_multipliers[1] = 0: "
            "must be a list that is not empty, each a whole number above 0",
        ),
        (
            {"model__tokenizer__base_channels": 25},
            "model.tokenizer.base_channels = 25: 50 channels (base_channels x 2) must divide by 32 or 24",
        ),
        ({"model__transformer__heads": 3}, "model.transformer.heads = 3: width 64 must divide by it"),
        (
            {"model__transformer__heads": 32},
            "model.transformer.heads = 32: width / heads = 2 must divide by 4 (2-D rotary embedding)",
        ),
        (
            {"model__transformer__block_chunks": 4},
            "model.transformer.block_chunks = 4: depth 2 must divide by it",
        ),
        (
            {"model__transformer__ffn_ratio": 0.5},
            "model.transformer.ffn_ratio = 0.5: ffn_ratio x width must be at least 128",
        ),
        (
            {"model__transformer__drop_path": 1},
            "model.transformer.drop_path = 1: must be a number from 0 to below 1",
        ),
        (
            {"model__transformer__scale_embeddings": 2},
            "model.transformer.scale_embeddings = 2: must be at least 3, the scales of the longest schedule",
        ),
        (
            {"model__text_encoder__width": 32},
            "model.text_encoder.width = 32: must equal transformer.text_width 16",
        ),
        ({"model__text_encoder__heads": 3}, "model.text_encoder.heads = 3: width 16 must divide by it"),
        (
            {"model__text_encoder__layers": None},
            "model.text_encoder.layers = null: must be given for source 'new'",
        ),
        (
            {"model__scales__resolution": "1M"},
            "model.scales.resolution = 1M: must be null with published: false",
        ),
        (
            {"model__scales__published": True, "model__scales__resolution": "1M"},
            'model.scales.custom = {"1.0": [[1, 1], [2, 2], [4, 4]]}: must be null with published: true',
        ),
        (
            {"model__scales__resolution": "2M"},
            "model.scales.resolution = 2M: must be one of 0.06M, 0.25M, 0.60M, 1M, or null",
        ),
        (
            {"model__scales__custom": {"1.0": [[1, 1], [2]]}},
            'model.scales.custom["1.0"][1][1] = [2]: must be a mapping that is not empty, or null, '
            'such as {"1.0": [[1, 1], [2, 2], [3, 3]]}',
        ),
        (
            {"sampling__tau": 0},
            "sampling.tau = 0: must be a number above 0, or a list that is not empty, each a number above 0",
        ),
        (
            {"sampling__tau": [1, 0]},
            "sampling.tau = [1, 0]: "
            "must be a number above 0, or a list that is not empty, each a number above 0",
        ),
        (
            {"sampling__cfg": float("nan")},
            "sampling.cfg = NaN: must be a number, or a list that is not empty, each a number",
        ),
        (
            {"sampling__cfg_layer": [0, 3]},
            "sampling.cfg_layer = [0, 3]: must be at most model.transformer.depth 2",
        ),
        (
            {"sampling__target_confidence": 1},
            "sampling.target_confidence = 1: must be a number above 0.5 and below 1, or null",
        ),
        ({"sampling__fast": 4}, "sampling.fast = 4: must be a whole number from 0 to 3"),
        ({"sampling__top_p": 0}, "sampling.top_p = 0: must be a number above 0 and at most 1"),
        (
            {"training__transformer__optimizer__betas": [0.9, 1]},
            "training.transformer.optimizer.betas[1] = 1: must be a list of 2, each a number from 0 to below",
        ),
        (
            {"training__transformer__steps": "many"},
            "training.transformer.steps = many: must be a whole number above 0",
        ),
        ({"training__tokenizer": {"steps": 1, "batch_size": 1}}, None),
        ({"model__transformer": 3}, None),
        ({"name": ""}, 'name = "": must be text that is not empty'),
    ],
)
def test_one_wrong_value_is_one_line(changes: dict[str, Any], line: str | None) -> None:
    found = lines(whole(**changes))
    assert len(found) == 1
    if line is not None:
        assert line in found[0]


@pytest.mark.parametrize(
    ("custom", "reason"),
    [
        ({"wide": [[1, 1]]}, "aspect ratio 'wide' is not a number (height / width)"),
        ({"0": [[1, 1]]}, "aspect ratio 0 must be above 0"),
        ({"1": [[1, 1]], "1.0": [[1, 1]]}, "aspect ratio 1.0 is there twice"),
        ({"1.0": [[2, 2]]}, "the schedule of ratio 1.0 must start with [1, 1]"),
        ({"1.0": [[1, 1], [3, 3], [2, 4]]}, "the schedule of ratio 1.0 must not shrink: 3x3 to 2x4"),
    ],
)
def test_wrong_schedules(custom: dict[str, Any], reason: str) -> None:
    assert lines(whole(model__scales__custom=custom))[0].endswith(f": {reason}")


def test_a_schedule_is_needed_and_a_budget_for_published_ones() -> None:
    assert lines(whole(model__scales={"published": False})) == [
        "model.scales.custom = null: must be given with published: false"
    ]
    assert lines(whole(model__scales={"published": True})) == [
        "model.scales.resolution = null: must be given with published: true: 0.06M, 0.25M, 0.60M or 1M"
    ]


def test_a_published_schedule_needs_embeddings_for_every_budget() -> None:
    found = lines(whole(model__scales={"published": True, "resolution": "0.06M"}))
    assert found == [
        "model.transformer.scale_embeddings = 3: must be at least 13, the scales of the longest schedule"
    ]


def test_ratios_may_be_written_as_numbers() -> None:
    custom = Config.model_validate(whole(model__scales__custom={1.0: [[1, 1]]})).model.scales.custom
    assert custom == {"1.0": [(1, 1)]}


def test_several_errors_of_one_section_are_told_together() -> None:
    found = lines(whole(model__transformer__heads=3, model__transformer__block_chunks=4, sampling__top_p=2))
    assert [line.partition(" ")[0] for line in found] == [
        "model.transformer.heads",
        "model.transformer.block_chunks",
        "sampling.top_p",
    ]


def test_what_defines_a_model_has_no_default() -> None:
    values = whole()
    for section in values["model"].values():
        section.clear()
    found = lines(values)
    assert all(": missing; must be " in line for line in found)
    missing = {line.partition(":")[0] for line in found}
    assert missing == {
        *(f"model.tokenizer.{k}" for k in WHOLE["model"]["tokenizer"]),
        *(f"model.transformer.{k}" for k in WHOLE["model"]["transformer"] if k != "scale_embeddings"),
        "model.text_encoder.source",
        "model.scales.published",
    }


def test_every_value_has_a_key_and_says_what_it_accepts() -> None:
    keys = list(known_keys())
    config = Config.model_validate(
        whole(training__tokenizer=whole()["training"]["transformer"], training__subject={})
    )
    assert [key for key, _ in flatten(config)] == keys
    assert all(accepts(key) for key in keys)
    assert accepts("model.scales.published") == "true or false"
    assert accepts("training.tokenizer.optimizer.schedule") == "one of constant, cosine"
    assert accepts("training.tokenizer.workers") == "a whole number of at least 0"
    assert accepts("model.scales") == "a section with published, resolution, custom"


def test_sections_that_are_not_there_are_one_value() -> None:
    flat = dict(flatten(Config.model_validate(whole())))
    assert flat["training.tokenizer"] is None
    assert flat["model.scales.custom"] == {"1.0": [[1, 1], [2, 2], [4, 4]]}


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("sampeling", "did you mean sampling?"),
        ("patchsize", "did you mean model.tokenizer.patch_size?"),
        ("zzz", "known here: name, description, model, sampling, training"),
    ],
)
def test_nearest_key(key: str, hint: str) -> None:
    assert nearest(key) == hint


def test_the_nearest_key_is_looked_for_near_the_mistake() -> None:
    for stage, section in (("tokenizer", TokenizerTraining), ("transformer", TransformerTraining)):
        hint = nearest("lerning_rate", section, f"training.{stage}.")
        assert hint == f"did you mean training.{stage}.optimizer.learning_rate?"


def test_long_values_are_cut() -> None:
    assert show("x" * 100) == "x" * 57 + "..."
    assert show({"a": [1, None]}) == '{"a": [1, null]}'
    assert show("two\nlines") == "two lines"
