"""Published fixtures: our engine against numbers computed by the published code, read from the published layouts.

Every folder beside this file is a fixture; `kind` in its config.json says what it checks. More of them, in the same
form, are checked with BITGEN_PARITY=FOLDER pytest tests/parity. Weights, pictures and text features are stored as
float16 and were used as float32.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bitgen_cli.config import ModelConfig, OptimizerConfig, TransformerTraining
from bitgen_cli.engine import bits, infinity_weights, layers, pyramid, scales, self_correction
from bitgen_cli.engine.losses import bit_loss
from bitgen_cli.engine.sampling import SamplingPlan, bit_probabilities, draw_bits
from bitgen_cli.engine.tokenizer import Tokenizer
from bitgen_cli.engine.transformer import TextFeatures, Transformer

ROOT = Path(os.environ.get("BITGEN_PARITY", Path(__file__).parent))
FIXTURES = {path.parent.name: json.loads(path.read_text()) for path in sorted(ROOT.glob("*/config.json"))}

FLOATS = {"atol": 1e-4, "rtol": 0.0}
"""Two correct float32 evaluations of these networks differ by about 1e-5; the published tolerance is 1e-4."""


def of_kind(kind: str) -> pytest.MarkDecorator:
    names = [name for name, fixture in FIXTURES.items() if fixture["kind"] == kind]
    assert names, f"no fixture of kind {kind} in {ROOT}"
    return pytest.mark.parametrize("name", names)


def model_config(fixture: dict[str, Any]) -> ModelConfig:
    tokenizer = fixture["tokenizer"]
    assert tokenizer["encoder_ch_mult"] == tokenizer["decoder_ch_mult"]
    given = fixture.get("transformer")
    transformer = {
        "depth": 1, "width": 128, "heads": 2, "ffn_ratio": 4, "text_width": 128, "text_length": 8,
        "patchify": fixture["vae_scale_schedule"] != fixture["scale_schedule"],
    }  # fmt: skip
    if given is not None:
        transformer = {
            "depth": given["depth"],
            "width": given["embed_dim"],
            "heads": given["num_heads"],
            "ffn_ratio": given["mlp_ratio"],
            "text_width": given["text_channels"],
            "text_length": given["text_maxlen"],
            "patchify": bool(given["apply_spatial_patchify"]),
            "block_chunks": given["block_chunks"],
        }
    return ModelConfig.model_validate(
        {
            "tokenizer": {
                "bits": tokenizer["codebook_dim"],
                "patch_size": tokenizer["patch_size"],
                "base_channels": tokenizer["base_ch"],
                "channel_multipliers": tokenizer["encoder_ch_mult"],
                "res_blocks": tokenizer["num_res_blocks"],
            },
            "transformer": transformer,
            "text_encoder": {"source": "none"},
            "scales": {"published": True, "resolution": "0.06M"},
        }
    )


def as_float32(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}


@cache
def tensors_of(name: str) -> dict[str, Tensor]:
    merged: dict[str, Tensor] = {}
    for shard in sorted((ROOT / name).glob("*.safetensors")):
        merged.update(as_float32(load_file(shard)))
    return merged


def build_tokenizer(config: ModelConfig, files: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(config.tokenizer)
    published = as_float32(load_file(ROOT / files[0]))
    tokenizer.load_state_dict(infinity_weights.tokenizer_state(published, tokenizer.state_dict()))
    return tokenizer.eval().requires_grad_(False)


def build_transformer(config: ModelConfig, files: list[str]) -> Transformer:
    transformer = Transformer(config)
    published = as_float32(load_file(ROOT / files[0]))
    transformer.load_state_dict(infinity_weights.transformer_state(published, transformer.state_dict()))
    return transformer.eval()


def schedule_of(fixture: dict[str, Any], config: ModelConfig) -> scales.Schedule:
    schedule = scales.schedule(
        config.scales,
        patchify=config.transformer.patchify,
        ratio=fixture["h_div_w"],
        resolution=fixture["pn"],
    )
    assert [[1, h, w] for h, w in schedule.sizes] == fixture["scale_schedule"]
    assert [[1, h, w] for h, w in schedule.latent_sizes] == fixture["vae_scale_schedule"]
    return schedule


def published_bits(tensors: dict[str, Tensor], key: str) -> Tensor:
    """(B, 1, h, w, d) uint8 as published, to (B, C, h, w) bool."""
    return tensors[key][:, 0].permute(0, 3, 1, 2).bool()


def positions(grids: list[Tensor], cell: int) -> Tensor:
    return torch.cat([bits.to_positions(grid, cell) for grid in grids], dim=1)


@of_kind("quantiser")
def test_quantiser(name: str) -> None:
    tensors = tensors_of(name)
    chosen = bits.quantise(tensors["in.z"][:, :, 0])
    assert torch.equal(chosen, published_bits(tensors, "out.bits"))
    codes = bits.codes(chosen)
    # upstream's value is u + (code - u): the code up to one rounding
    torch.testing.assert_close(codes, tensors["out.quantised"][:, :, 0], atol=1e-6, rtol=0)
    torch.testing.assert_close(codes, tensors["out.codes_from_bits"][:, :, 0], atol=1e-6, rtol=0)
    grown = pyramid.resample(codes, (7, 5))
    torch.testing.assert_close(grown, tensors["out.codes_trilinear_7x5"][:, :, 0], atol=1e-6, rtol=0)
    shrunk = pyramid.residual_at(pyramid.resample(codes, (12, 12)), None, (5, 8))
    torch.testing.assert_close(shrunk, tensors["out.codes_12_area_5x8"][:, :, 0], atol=1e-6, rtol=0)


@of_kind("tokenizer")
def test_tokenizer(name: str) -> None:
    fixture, tensors = FIXTURES[name], tensors_of(name)
    config = model_config(fixture)
    tokenizer, schedule = build_tokenizer(config, fixture["weights"]), schedule_of(fixture, config)
    latent = tokenizer.latent(tensors["in.image"])
    torch.testing.assert_close(latent, tensors["out.features"], **FLOATS)
    found, total = tokenizer.encode(tensors["in.image"], schedule)
    for k, scale_bits in enumerate(found):
        assert torch.equal(scale_bits, published_bits(tensors, f"out.bits.{k}")), f"scale {k}"
    torch.testing.assert_close(total, tensors["out.z"], atol=1e-6, rtol=0)
    torch.testing.assert_close(tokenizer.decode(total), tensors["out.decoded"], **FLOATS)
    torch.testing.assert_close(tokenizer.decode_bits(found, schedule), tensors["out.decoded"], **FLOATS)


@of_kind("transformer_teacher_forced")
def test_transformer(name: str) -> None:
    fixture, tensors = FIXTURES[name], tensors_of(name)
    config = model_config(fixture)
    transformer, schedule = build_transformer(config, fixture["weights"]), schedule_of(fixture, config)
    text = TextFeatures.from_rows(tensors["in.kv_compact"].split(fixture["lens"]))
    with torch.no_grad():
        condition = transformer.condition(text)
        logits = transformer(tensors["in.x_BLC_wo_prefix"], text, schedule)
    torch.testing.assert_close(condition.pooled, tensors["out.cond_BD"], **FLOATS)
    torch.testing.assert_close(condition.modulation, tensors["out.ada6"], **FLOATS)
    torch.testing.assert_close(logits, tensors["out.logits"], **FLOATS)
    if "in.image" in tensors:
        tokenizer = build_tokenizer(config, fixture["tokenizer_weights"])
        targets, inputs = pyramid.teacher_inputs(tokenizer.latent(tensors["in.image"]), schedule)
        assert torch.equal(positions(targets, schedule.cell), tensors["out.gt_bits"].bool())
        torch.testing.assert_close(positions(inputs, schedule.cell), tensors["in.x_BLC_wo_prefix"], atol=1e-5, rtol=0)


@of_kind("bitwise_self_correction")
def test_self_correction(name: str) -> None:
    fixture, tensors = FIXTURES[name], tensors_of(name)
    config = model_config(fixture)
    schedule = schedule_of(fixture, config)

    def change(scale_bits: Tensor, scale: int) -> Tensor:
        key = f"in.flip_mask.{scale}"
        return self_correction.flip(scale_bits, published_bits(tensors, key)) if key in tensors else scale_bits

    targets, inputs = pyramid.teacher_inputs(tensors["in.raw_features"], schedule, change)
    assert torch.equal(positions(targets, schedule.cell), tensors["out.gt_bits"].bool())
    torch.testing.assert_close(positions(inputs, schedule.cell), tensors["out.x_BLC_wo_prefix"], atol=1e-5, rtol=0)


@of_kind("training_loss")
def test_training_loss(name: str) -> None:
    fixture, tensors = FIXTURES[name], tensors_of(name)
    source = FIXTURES[fixture["uses_inputs_of"]]
    inputs = tensors_of(fixture["uses_inputs_of"])
    config = model_config(fixture)
    transformer, schedule = build_transformer(config, fixture["weights"]), schedule_of(fixture, config)
    text = TextFeatures.from_rows(inputs["in.kv_compact"].split(source["lens"]))
    for variant, expected in fixture["variants"].items():
        training = TransformerTraining(
            steps=1,
            batch_size=1,
            optimizer=OptimizerConfig(learning_rate=1.0),
            scale_weighting="published" if expected["reweight_loss_by_scale"] else "positions",
            bit_loss=expected["bitloss_type"],
        )
        transformer.zero_grad(set_to_none=True)
        logits = transformer(inputs["in.x_BLC_wo_prefix"], text, schedule)
        loss, accuracy, per_scale = bit_loss(logits, inputs["out.gt_bits"].bool(), schedule, training)
        loss.backward()
        assert loss.item() == pytest.approx(expected["loss"], rel=1e-6)
        torch.testing.assert_close(per_scale, torch.tensor(fixture["mean_ce_per_scale"]), **FLOATS)
        mean_accuracy = sum(a.item() * n for a, n in zip(accuracy, schedule.counts, strict=True)) / schedule.positions
        assert mean_accuracy == pytest.approx(fixture["bit_accuracy"], abs=1e-5)
        for ours, parameter in transformer.named_parameters():
            key = infinity_weights.published_transformer_name(ours, config)
            norm = 0.0 if parameter.grad is None else parameter.grad.norm().item()
            # norms of float32 sums of a few hundred thousand terms
            assert norm == pytest.approx(expected["grad_norms"][key], rel=1e-4, abs=1e-7), f"{variant} {key}"
            recorded = tensors.get(f"out.grad.{variant}.{key}")
            if recorded is not None:
                assert parameter.grad is not None
                torch.testing.assert_close(parameter.grad, recorded, atol=1e-5, rtol=1e-4)


@of_kind("bit_filter")
def test_bit_filter(name: str) -> None:
    fixture, tensors = FIXTURES[name], tensors_of(name)
    logits = tensors["in.logits"].flatten(1)[None]
    for index, case in enumerate(fixture["cases"]):
        one = bit_probabilities(logits, case["top_k"], case["top_p"] or 1.0)[0, 0]
        kept = torch.stack((one < 1, one > 0), dim=-1)
        assert torch.equal(kept, tensors[f"out.kept.{index}"][0].bool()), case


def greedy_cases() -> list[tuple[str, str]]:
    return [
        (name, case)
        for name, fixture in FIXTURES.items()
        if fixture["kind"] == "sampling"
        for case, settings in fixture["cases"].items()
        if settings["greedy"]
    ]


@pytest.mark.parametrize(("name", "case"), greedy_cases())
def test_greedy_sampling(name: str, case: str) -> None:
    fixture, tensors = FIXTURES[name], tensors_of(name)
    settings = fixture["cases"][case]
    config = model_config(fixture)
    schedule = schedule_of(fixture, config)
    transformer = build_transformer(config, fixture["weights"])
    tokenizer = build_tokenizer(config, fixture["tokenizer_weights"])
    plan = SamplingPlan(
        cfg=tuple(settings["cfg_list"]),
        cfg_layers=tuple(-layer for layer in settings["cfg_insertion_layer"]),
        tau=tuple(settings["tau_list"]),
        top_k=settings["top_k"],
        top_p=settings["top_p"] or 1.0,
    )
    text = TextFeatures.from_rows([tensors["in.kv_compact"]])
    negative = TextFeatures.from_rows([tensors["in.neg_kv_compact"]]) if settings["negative_prompt"] else None
    seen: list[Tensor] = []
    drawn = draw_bits(
        transformer, text, schedule, plan, [0], negative=negative, on_logits=lambda _, logits: seen.append(logits)
    )
    for k, scale_bits in enumerate(drawn.bits):
        assert torch.equal(scale_bits, published_bits(tensors, f"{case}.out.bits.{k}")), f"scale {k}"
    logits = torch.cat(seen, dim=1).unflatten(-1, (-1, 2))
    torch.testing.assert_close(logits, tensors[f"{case}.out.logits"], **FLOATS)
    torch.testing.assert_close(drawn.total, tensors[f"{case}.out.summed_codes"], atol=1e-6, rtol=0)
    image = ((tokenizer.decode(drawn.total) + 1) / 2 * 255).to(torch.uint8)
    published = tensors[f"{case}.out.image_bgr_u8"].flip(-1).permute(0, 3, 1, 2)
    # truncation turns a rounding error of the decoder into at most one level
    assert (image.int() - published.int()).abs().max() <= 1


@of_kind("schedules")
def test_schedules(name: str) -> None:
    fixture = FIXTURES[name]
    assert list(scales.PUBLISHED) == fixture["ratios_in_order"]
    for ratio, budgets in fixture["schedules"].items():
        for resolution, expected in budgets.items():
            config = model_config_scales(resolution)
            schedule = scales.schedule(config, patchify=False, ratio=float(ratio))
            assert [list(size) for size in schedule.sizes] == expected["scales"]
            assert schedule.positions == expected["seq_len"]
            assert list(schedule.pixels(16)) == expected["pixel"]


def model_config_scales(resolution: str) -> Any:
    from bitgen_cli.config import ScalesConfig

    return ScalesConfig.model_validate({"published": True, "resolution": resolution})


@of_kind("rope2d")
def test_rope(name: str) -> None:
    fixture, tensors = FIXTURES[name], tensors_of(name)
    cpu = torch.device("cpu")

    def table(ratio: float, head_channels: int, resolution: str) -> tuple[layers.Rope, scales.Schedule]:
        schedule = scales.schedule(model_config_scales(resolution), patchify=False, ratio=ratio)
        return layers.rope_table(schedule, head_channels, cpu), schedule

    for key in (key for key in tensors if key.startswith("out.grid.")):
        channels, ratio = key.removeprefix("out.grid.head_dim").split(".ratio")
        rope, _ = table(float(ratio), int(channels), "0.06M")
        torch.testing.assert_close(torch.stack((rope.cos, rope.sin)), tensors[key], atol=1e-6, rtol=0)
    rope, schedule = table(1.0, 64, "0.06M")
    torch.testing.assert_close(layers.rotate(tensors["in.q"], rope), tensors["out.q_rotated"], atol=1e-6, rtol=0)
    third = layers.rotate(tensors["in.q"][:, :, :36], rope[schedule.slices[3]])
    torch.testing.assert_close(third, tensors["out.q_first36_rotated_as_scale3"], atol=1e-6, rtol=0)
    for ratio_key, rows_and_columns in fixture["index_tables"].items():
        _, schedule = table(float(ratio_key), 64, "1M")
        for size, expected in zip(schedule.sizes, rows_and_columns, strict=True):
            assert list(size) == expected["hw"]
            rows, columns = layers.grid_positions(size, schedule.rope_grid)
            assert rows.tolist() == expected["rows"]
            assert columns.tolist() == expected["cols"]
