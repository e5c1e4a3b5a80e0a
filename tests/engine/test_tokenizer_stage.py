"""Stage `tokenizer`: what its losses are made of, and what they reach."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from bitgen_cli.config import Config
from bitgen_cli.engine import pyramid
from bitgen_cli.engine.active_bits import active, widened
from bitgen_cli.engine.adversary import hinge_loss
from bitgen_cli.engine.draws import Draws
from bitgen_cli.engine.losses import quantiser_loss, reconstruction_loss
from bitgen_cli.engine.optimizer import Pace
from bitgen_cli.engine.sources import open_source
from bitgen_cli.engine.tokenizer import Tokenizer
from bitgen_cli.engine.tokenizer_stage import TokenizerStage, kept_scales
from bitgen_cli.errors import UsageError
from bitgen_cli.report import Silent

LOOP: dict[str, Any] = {"steps": 4, "batch_size": 4, "optimizer": {"learning_rate": 0.002}, "validation_images": 4}
GAN: dict[str, Any] = {"adversarial_weight": 0.5, "discriminator_channels": 8, "discriminator_layers": 1}


def config(active_bits: list[int] | None = None, **recipe: Any) -> Config:
    model = tiny.config(8).model_dump(mode="json")
    model["tokenizer"]["active_bits"] = active_bits
    return Config.model_validate({"name": "tiny", "model": model, "training": {"tokenizer": {**LOOP, **recipe}}})


@pytest.fixture
def stages() -> Iterator[Any]:
    """Makes stages, and closes them."""
    made: list[TokenizerStage] = []

    def make(active_bits: list[int] | None = None, **recipe: Any) -> TokenizerStage:
        whole = config(active_bits, **recipe)
        tokenizer = Tokenizer(whole.model.tokenizer)
        tokenizer.autoencoder.initialise(torch.Generator().manual_seed(0))
        source = open_source("world:40", 16)
        made.append(TokenizerStage(whole, source, tokenizer, torch.device("cpu"), Silent()))
        return made[-1]

    yield make
    for stage in made:
        stage.close()


def loss(stage: TokenizerStage, step: int = 0, seed: int = 0, indices: tuple[int, ...] = (0, 1, 2, 3)) -> Any:
    return stage.loss(list(indices), Draws(seed, range(len(indices))), step)


def gradients(stage: TokenizerStage) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in stage.module.named_parameters() if p.grad is not None}
    stage.module.zero_grad(set_to_none=True)
    return found


def test_the_plain_loss_is_made_of_its_parts(stages: Any) -> None:
    stage = stages(l2_weight=0.3)
    total, parts = loss(stage)
    weighed = {"l1": 1, "l2": 0.3, "structure": 0.1, "bit_entropy": 0.05, "bit_usage": -0.05, "commitment": 0.02}
    assert parts.keys() == weighed.keys()
    assert total.item() == pytest.approx(sum(weighed[name] * parts[name].item() for name in weighed), rel=1e-5)


def test_one_number_of_bits_is_drawn_per_batch(stages: Any) -> None:
    stage = stages([2, 4, 8])
    drawn = {next(iter(loss(stage, seed=seed)[1])) for seed in range(20)}
    assert drawn == {"l1_2_bits", "l1_4_bits", "l1_8_bits"}
    assert torch.equal(loss(stage, seed=3)[0], loss(stage, seed=3)[0]), "the generator decides"


def test_every_number_of_bits_is_decoded_from_one_pass_of_the_encoder(stages: Any) -> None:
    stage = stages([2, 4, 8], every_bit_count=True)
    passes = []
    stage.module.tokenizer.autoencoder.encoder.register_forward_hook(lambda *_: passes.append(1))
    total, _ = loss(stage)
    assert len(passes) == 1
    autoencoder = stage.module.tokenizer.autoencoder
    image, scales = stage._images([0, 1, 2, 3])
    latent = autoencoder.encode(image)
    expected = []
    for bits in (2, 4, 8):
        first = active(latent, bits)
        _, summed = pyramid.encode(first.detach(), scales)
        decoded = autoencoder.decoder(widened(summed, 8))
        likeness, _ = reconstruction_loss(image, decoded, stage.training)
        quantisation, _ = quantiser_loss(first, summed, stage.training)
        expected.append(likeness + quantisation)
    torch.testing.assert_close(total, torch.stack(expected).mean())


def test_all_bits_are_trained_as_a_tokenizer_without_choice(stages: Any) -> None:
    plain, elastic = stages(), stages([8])
    assert torch.equal(loss(plain)[0], loss(elastic)[0])


def test_gradients_go_straight_to_the_active_channels_alone(stages: Any) -> None:
    stage = stages([2, 4, 8])
    seed = next(seed for seed in range(20) if "l1_2_bits" in loss(stage, seed=seed)[1])
    loss(stage, seed=seed)[0].backward()
    found = gradients(stage)
    last = found["tokenizer.autoencoder.encoder.conv_out.weight"]
    assert last[:2].abs().sum() > 0
    assert last[2:].abs().sum() == 0
    assert found["tokenizer.autoencoder.decoder.conv_in.weight"][:, 2:].abs().sum() == 0


def test_validation_measures_each_number_of_bits(stages: Any) -> None:
    with torch.no_grad():
        found = stages([2, 4, 8]).validate()
        alone = stages().validate()
    kinds = ("psnr", "ssim", "bit_usage")
    assert found.keys() == {"val_loss", *(f"val_{kind}_{bits}_bits" for kind in kinds for bits in (2, 4, 8))}
    assert alone.keys() == {"val_loss", *(f"val_{kind}" for kind in kinds)}
    assert found["val_psnr_8_bits"] == pytest.approx(alone["val_psnr"])


def test_bits_that_would_learn_nothing_are_refused(stages: Any) -> None:
    with pytest.raises(UsageError, match=r"ends with 4: the last of 8 bits would learn nothing"):
        stages([2, 4])


def test_the_adversary_waits_for_its_step(stages: Any) -> None:
    stage, plain = stages(**GAN, adversarial_start=3, discriminator_pace=0.5), stages()
    assert stage.paces == {"discriminator.": Pace(0.5, 3)}
    assert torch.equal(loss(stage, step=2)[0], loss(plain, step=2)[0])
    loss(stage, step=2)[0].backward()
    assert not any(name.startswith("discriminator.") for name in gradients(stage))
    total, parts = loss(stage, step=3)
    assert {"generator", "discriminator", "adversarial_weight"} <= parts.keys()
    assert torch.equal(total, loss(plain, step=3)[0]), "its gradients count; its value is no measure of the training"
    total.backward()
    assert any(name.startswith("discriminator.") for name in gradients(stage))


def test_autoencoder_and_discriminator_each_learn_from_their_own_loss(stages: Any) -> None:
    stage = stages(**GAN)
    total, parts = loss(stage)
    total.backward()
    both = gradients(stage)
    image, scales = stage._images([0, 1, 2, 3])

    found = stage.module(image, scales, (8,), judged=True)
    hinge_loss(found.real, found.reconstructions[0].fake).backward()
    alone = gradients(stage)
    assert alone
    assert all(name.startswith("discriminator.") for name in alone)
    for name, gradient in alone.items():
        torch.testing.assert_close(both[name], gradient)

    found = stage.module(image, scales, (8,), judged=True)
    reconstruction = found.reconstructions[0]
    likeness, _ = reconstruction_loss(image, reconstruction.image, stage.training)
    quantisation, _ = quantiser_loss(reconstruction.latent, reconstruction.total, stage.training)
    weight = parts["adversarial_weight"]
    (likeness + quantisation - weight * reconstruction.fooling.mean()).backward()
    alone = gradients(stage)
    assert all(name.startswith("tokenizer.") for name in alone)
    assert alone.keys() == {name for name in both if name.startswith("tokenizer.")}
    for name, gradient in alone.items():
        torch.testing.assert_close(both[name], gradient)


def test_the_adaptive_weight_balances_the_last_layer(stages: Any) -> None:
    """With weight 1 the adversary's gradient of the decoder's last layer is as long as that of the reconstruction."""
    stage = stages(**{**GAN, "adversarial_weight": 1.0})
    stage.module.discriminator.layers[-1].weight.data.mul_(100)  # so that 1e-4 beside its norm is nothing
    _, parts = loss(stage)
    image, scales = stage._images([0, 1, 2, 3])
    reconstruction = stage.module(image, scales, (8,), judged=True).reconstructions[0]
    layer = stage.module.tokenizer.autoencoder.decoder.conv_out.weight
    likeness, _ = reconstruction_loss(image, reconstruction.image, stage.training)
    of_likeness = torch.autograd.grad(likeness, layer, retain_graph=True)[0].norm()
    fooling = -parts["adversarial_weight"] * reconstruction.fooling.mean()
    torch.testing.assert_close(torch.autograd.grad(fooling, layer)[0].norm(), of_likeness, rtol=1e-2, atol=0)
    fixed = stages(**GAN, adversarial_adaptive=False)
    assert loss(fixed)[1]["adversarial_weight"] == 0.5


def test_dropped_scales_are_missing_from_what_the_decoder_sees(stages: Any) -> None:
    stage = stages()
    image, scales = stage._images([0, 1, 2, 3])
    module = stage.module
    seen: list[Tensor] = []
    module.tokenizer.autoencoder.decoder.conv_in.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    kept = torch.tensor([1, 4, 2, 4])
    whole = module(image, scales, (8,)).reconstructions[0]
    cut = module(image, scales, (8,), kept).reconstructions[0]
    assert torch.equal(whole.total, cut.total), "the latent is asked to be near the sum of all scales"
    totals = [total for _, total in pyramid.walk(whole.latent.detach(), scales)]
    for row, count in enumerate(kept.tolist()):
        torch.testing.assert_close(seen[1][row], totals[count - 1][row])
    every = module(image, scales, (8,), torch.full((4,), 4)).reconstructions[0]
    assert torch.equal(every.image, whole.image)


def test_scales_are_dropped_as_often_as_configured_and_for_each_picture_alone() -> None:
    def kept(indices: range | list[int], **recipe: Any) -> Tensor | None:
        training = config(**recipe).training.tokenizer
        assert training is not None
        return kept_scales(list(indices), 4, training, torch.Generator().manual_seed(0))

    assert kept(range(9)) is None
    many = kept(range(4000), scale_dropout=0.25, scale_dropout_keep=2)
    assert many is not None
    assert sorted(many.unique().tolist()) == [2, 3, 4]
    assert (many < 4).float().mean().item() == pytest.approx(0.25, abs=0.03)
    part = kept([7, 3999, 12], scale_dropout=0.25, scale_dropout_keep=2)
    assert torch.equal(part, many[[7, 3999, 12]])
    every = kept(range(50), scale_dropout=1.0, scale_dropout_keep=4)
    assert every is not None
    assert every.tolist() == [4] * 50


def test_one_of_the_resolutions_is_drawn_per_batch(stages: Any) -> None:
    stage = stages(resolutions=[3, 4])
    sizes = set()
    stage.module.register_forward_pre_hook(lambda _, args: sizes.add((tuple(args[0].shape[-2:]), len(args[1]))))
    for seed in range(12):
        loss(stage, seed=seed)
    assert sizes == {((12, 12), 3), ((16, 16), 4)}
    sizes.clear()
    with torch.no_grad():
        stage.validate()
    assert sizes == {((16, 16), 4)}, "held-out pictures are of the largest size"


def test_pictures_too_small_for_the_recipe_are_refused(stages: Any) -> None:
    with pytest.raises(UsageError, match=r"8x8 pixels are too small for training\.tokenizer: SSIM needs 11"):
        stages(resolutions=[2, 4])
    with pytest.raises(UsageError, match=r"16x16 pixels .*: discriminator_layers needs 24"):
        stages(**{**GAN, "discriminator_layers": 3})


def test_lpips_counts_with_its_weight(stages: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "bitgen_cli.engine.tokenizer_stage.perceptual_distance", lambda device: lambda a, b: (a - b).square().mean() + 1
    )
    plain, with_it = loss(stages())[0], loss(stages(perceptual_weight=0.5))
    assert with_it[1]["perceptual"].item() == pytest.approx(1 + with_it[1]["l2"].item(), rel=1e-5)
    assert with_it[0].item() == pytest.approx(plain.item() + 0.5 * with_it[1]["perceptual"].item(), rel=1e-5)
