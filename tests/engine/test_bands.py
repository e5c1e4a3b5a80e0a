"""Decoding in bands of rows: the plain decoder's picture, in less memory."""

from __future__ import annotations

from math import sqrt

import pytest
import torch
from torch import Tensor, nn

from bitgen_cli.config import TokenizerConfig
from bitgen_cli.engine import autoencoder, bands, convolution, memory
from bitgen_cli.engine.bands import BAND, decode_in_bands
from bitgen_cli.engine.convolution import winograd
from bitgen_cli.engine.data import to_uint8
from bitgen_cli.engine.group_norm import affine_of
from bitgen_cli.engine.model_folder import find_model, load_model
from bitgen_cli.engine.rehearsal import Watched, infer
from bitgen_cli.engine.scales import Schedule, schedule
from bitgen_cli.engine.tokenizer import Tokenizer
from bitgen_cli.presets import resolve

NARROW = {"bits": 6, "patch_size": 4, "base_channels": 8, "channel_multipliers": [3, 1, 2], "norm_groups": 4}
WIDE = {"bits": 6, "patch_size": 4, "base_channels": 128, "channel_multipliers": [1, 1, 2]}
"""By Winograd's algorithm on a CPU, where the picture is large."""


def tokenizer(geometry: dict[str, object]) -> Tokenizer:
    """Random weights as training leaves them: norms of many sizes, channels that are not about zero."""
    made = Tokenizer(TokenizerConfig.model_validate({"res_blocks": 1, **geometry}))
    generator = torch.Generator().manual_seed(0)
    made.autoencoder.initialise(generator)

    def random(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator)

    with torch.no_grad():
        for module in made.modules():
            if isinstance(module, nn.GroupNorm):
                module.weight.add_(random(module.weight) * 0.4)
                module.bias.add_(random(module.bias) * 0.4)
            elif isinstance(module, nn.Conv2d):
                assert module.bias is not None
                module.bias.add_(random(module.bias))
        made.autoencoder.decoder.conv_out.weight.mul_(0.4)
        made.autoencoder.decoder.conv_out.bias.mul_(0.1)
    return made.eval().requires_grad_(False)


def quantised(of: Tokenizer, *shape: int) -> Tensor:
    """A sum (B, bits, H, W) of codes over some scales."""
    batch, height, width = shape
    generator = torch.Generator().manual_seed(sum(shape))
    signs = torch.randn((3, batch, of.config.bits, height, width), generator=generator).sign()
    return signs.sum(0) / sqrt(of.config.bits)


def assert_same_picture(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    assert (to_uint8(found).int() - to_uint8(wanted).int()).abs().max() <= 1
    assert wanted.std() > 0.1
    assert (wanted.abs() == 1).float().mean() < 0.3, "clamped pixels tell nothing"


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("numbers", [1, 3000, 20_000, BAND])
@pytest.mark.parametrize("shape", [(1, 9, 13), (2, 6, 4), (1, 1, 7), (1, 11, 1)])
def test_bands_are_the_plain_picture(
    shape: tuple[int, int, int], numbers: int, gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Odd sizes, rows that no band divides, one row a band; with the convolutions of a CPU and those of a GPU."""
    if gpu:
        for module in (autoencoder, bands, convolution):
            monkeypatch.setattr(module, "only_infers", lambda x: False)
    of = tokenizer(NARROW)
    total = quantised(of, *shape)
    with torch.inference_mode():
        found, wanted = decode_in_bands(of.autoencoder.decoder, total, numbers), of.decode(total)
    assert found.is_contiguous()
    assert_same_picture(found, wanted)


@pytest.mark.parametrize("numbers", [160_000, 300_000])
def test_bands_take_winograds_products(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    of = tokenizer(WIDE)
    total = quantised(of, 1, 17, 19)
    rows = []

    def noted(x: Tensor, *args: Tensor | None, framed: bool = False) -> Tensor:
        assert framed
        rows.append(x.shape[2] - 2)
        return winograd(x, *args, framed=framed)  # type: ignore[arg-type]

    monkeypatch.setattr(convolution, "winograd", noted)
    with torch.inference_mode():
        found = decode_in_bands(of.autoencoder.decoder, total, numbers)
    monkeypatch.undo()
    assert len(rows) > 10
    assert max(rows) < 4 * 17
    with torch.inference_mode():
        assert_same_picture(found, of.decode(total))


def test_bands_of_the_demo_model() -> None:
    of = load_model(find_model("demo"), parts=("tokenizer",)).tokenizer
    assert of is not None
    bits = torch.rand((2, 16, 8, 8), generator=torch.Generator().manual_seed(0)) < 0.5
    schedules = schedule(resolve("demo", environment={}).config.model.scales, patchify=False)
    with torch.inference_mode():
        total = of.encode(of.decode(torch.where(bits, 1.0, -1.0) / 4), schedules)[1]
        assert_same_picture(decode_in_bands(of.autoencoder.decoder, total, 10_000), of.decode(total))


def test_a_norm_of_bands_is_that_of_the_whole_picture() -> None:
    """Also where channels lie far from zero: a difference of squares would be wrong by a tenth."""
    generator = torch.Generator().manual_seed(0)
    x = 100 + torch.randn((1, 8, 37, 200), generator=generator) / 10
    norm = nn.GroupNorm(2, 8, eps=1e-6)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, 1, 0.3, generator=generator)
    wanted = norm.double()(x.double())
    found = affine_of(norm.float(), torch.split(x, 5, dim=2))
    torch.testing.assert_close(x.double() * found.scale + found.shift, wanted, rtol=0, atol=1e-3)


def test_a_picture_does_not_depend_on_its_company() -> None:
    of = tokenizer(NARROW)
    total = quantised(of, 3, 5, 6)
    together = of.decode(total, in_bands=True)
    for picture, alone in zip(together, torch.split(total, 1), strict=True):
        assert torch.equal(picture, of.decode(alone, in_bands=True)[0])


def test_bfloat16_is_as_near_as_without_bands() -> None:
    of = tokenizer(NARROW)
    total = quantised(of, 1, 9, 13).bfloat16()
    with torch.inference_mode():
        wanted = of.decode(total.float())
        half = of.bfloat16()
        found = [decode_in_bands(half.autoencoder.decoder, total, 3000), half.decode(total)]
    in_bands, plain = (float((image.float() - wanted).norm()) for image in found)
    assert found[0].dtype == torch.bfloat16
    assert in_bands < 1.1 * plain


def test_weights_that_learn_decode_too_and_get_no_gradient() -> None:
    of = tokenizer(NARROW).requires_grad_(True)
    total = quantised(of, 1, 4, 4).requires_grad_(True)
    found = of.decode(total, in_bands=True)
    assert not found.requires_grad
    assert_same_picture(found, of.decode(total).detach())


# -- memory ------------------------------------------------------------------------------------------------------------


def published(dtype: torch.dtype) -> Tokenizer:
    """The tokenizer of the published models, without contents."""
    with torch.device("meta"):
        made = Tokenizer(resolve("infinity-2b", environment={}).config.model.tokenizer)
    return made.requires_grad_(False).to(dtype)


def held(of: Tokenizer, total: Tensor, *, in_bands: bool) -> int:
    """Bytes that decoding holds beside the weights."""
    with Watched() as watched:
        return infer(watched, of, lambda: of.decode(total, in_bands=in_bands))


@pytest.mark.parametrize(("resolution", "dtype"), [("1M", torch.bfloat16), ("0.25M", torch.float32)])
def test_peak_of_the_published_decoder(resolution: str, dtype: torch.dtype) -> None:
    of = published(dtype)
    scales = schedule(resolve("infinity-2b", environment={}).config.model.scales, patchify=False, resolution=resolution)
    height, width = scales.latent_sizes[-1]
    total = torch.zeros((1, 32, height, width), dtype=dtype, device="meta")
    found = held(of, total, in_bands=True)
    assert memory.decoder_peak_in_bands(of.config, scales) * dtype.itemsize == pytest.approx(found, rel=0.05)
    if resolution == "1M":
        assert found < 0.55 * 2**30
    # what enters the last level, the same normed, and what the first convolution makes of that
    last = (256 + 256 + 128) * 16 * height * 16 * width
    assert held(of, total, in_bands=False) == pytest.approx(last * dtype.itemsize, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("numbers", [20_000, 60_000, BAND])
@pytest.mark.parametrize("geometry", [NARROW, {**NARROW, "channel_multipliers": [1, 3, 1]}])
def test_peak_in_bands(geometry: dict[str, object], numbers: int, dtype: torch.dtype) -> None:
    """On a CPU, with contents. What the weights are made into there is counted elsewhere, and is there already."""
    of = tokenizer(geometry).to(dtype)
    size = (24, 32)
    scales, total = Schedule(0.75, ((1, 1), size), size), quantised(of, 1, *size).to(dtype)
    with torch.inference_mode():
        decode_in_bands(of.autoencoder.decoder, total, numbers)
    with Watched() as watched:
        found = infer(watched, of, lambda: decode_in_bands(of.autoencoder.decoder, total, numbers))
    estimated = memory.decoder_peak_in_bands(of.config, scales, numbers) * dtype.itemsize
    assert estimated == pytest.approx(found, rel=0.15)
