"""A tokenizer at work: a picture's latent hangs on the picture alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import tiny
import torch

from bitgen_cli.engine.codec import TOGETHER, Codec, Division, Encoder
from bitgen_cli.engine.tokenizer import Tokenizer

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_latent_is_the_same_in_any_company(dtype: torch.dtype) -> None:
    """Also with more cores, which kernels share out otherwise; 2 of these pictures are encoded together, or 1."""
    tokenizer = Tokenizer(tiny.config().tokenizer).eval().requires_grad_(False)
    tokenizer.autoencoder.initialise(torch.Generator().manual_seed(0))
    pixels = torch.randint(256, (7, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    codec = Codec(tokenizer, 6, CPU, dtype)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for at_once in (2, 3, 256):
            encoder = Encoder(codec, TOGETHER // at_once)
            assert encoder.division.at_once == at_once
            with encoder.sharing_cores():
                assert torch.get_num_threads() == 1
                for company in (1, 2, 4, 7):
                    found.append(torch.cat([encoder.latents(part) for part in pixels.split(company)]))
            assert torch.get_num_threads() == threads
    assert found[0].shape == (7, 6, 4, 4)
    for other in found[1:]:
        assert torch.equal(other, found[0])


def test_work_is_divided_so_that_it_fits() -> None:
    torch.set_num_threads(2)
    assert Division.of(CPU, 24, 64 * 64) == Division(threads=2, cores=1, at_once=16)
    # four float32 tensors of 160 channels at 1024 x 1024 are 2.5 GiB: there is room for one thread, with all cores
    assert Division.of(CPU, 160, 1024 * 1024) == Division(threads=1, cores=2, at_once=1)
    gpu = torch.device("cuda")
    assert Division.of(gpu, 160, 1024 * 1024).at_once is None
    assert Division.of(gpu, 160, 1024 * 1024, most=1 << 22).at_once == 4
    assert Division.of(gpu, 160, 4096 * 4096, most=1 << 22).at_once == 1
