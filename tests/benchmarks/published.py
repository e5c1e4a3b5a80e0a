"""How fast, and in how much memory, a published model draws on a GPU: random weights, bfloat16, guidance, full size.

    python -m tests.benchmarks.published speed [--preset infinity-2b] [--batch 1 4]
    python -m tests.benchmarks.published memory [--preset infinity-2b] [--limit 8]

`speed` draws with the plain form of the published algorithm (tests/benchmarks/sampling.py, under autocast), with bitgen
as it is, and with its scales recorded (--compile), whose bits must be equal; warm, the fastest of --repeat. Then each
scale: what it takes, and what it cannot be faster than: its products at the rate that the GPU reaches in a large one
(arithmetic), or reading the weights and the cache at the rate it copies with (memory), whichever is more.

`memory` writes a model folder with random weights and runs `bitgen sample` with no more than --limit GiB of a GPU's
memory, less what the program itself takes of a card; and with all of it: how many bits, and how far pixels differ.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bitgen_cli.config import Config
from bitgen_cli.demo import world
from bitgen_cli.engine.device import give_back
from bitgen_cli.engine.graphs import RecordedTransformer
from bitgen_cli.engine.model_folder import save_model
from bitgen_cli.engine.sampling import Drawn, draw_bits, plan
from bitgen_cli.engine.scales import Schedule, schedule
from bitgen_cli.engine.text import TextEncoder, new_vocabulary
from bitgen_cli.engine.tokenizer import Tokenizer
from bitgen_cli.engine.transformer import Predictor, TextFeatures, Transformer
from bitgen_cli.presets import resolve
from bitgen_cli.report import Silent
from bitgen_cli.runs.carried_bits import DIGEST
from bitgen_cli.runs.jobs import SampleOptions
from bitgen_cli.runs.recipe_file import carried
from bitgen_cli.runs.sample import sample
from tests.benchmarks.sampling import GUIDANCE, PROMPT_LENGTH, plain_draw

GIB = 1 << 30
BF16 = torch.bfloat16
CONTEXT = 0.6
"""GiB of a card that CUDA itself takes, which no allocator sees."""
RATE_SIZE = 8192
"""Rows of the square matrices whose product the GPU's rate is measured with."""


def random_model(config: Config, device: torch.device) -> tuple[Transformer, Tokenizer]:
    """Both with random weights, in bfloat16."""
    with device:
        transformer, tokenizer = Transformer(config.model), Tokenizer(config.model.tokenizer)
    for parameter in transformer.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    return transformer.to(BF16).eval().requires_grad_(False), tokenizer.to(BF16).eval().requires_grad_(False)


def wait(device: torch.device) -> None:
    """Until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def best(repeat: int, device: torch.device, function: Callable[[], object]) -> float:
    """Seconds of the fastest of `repeat` calls, after two to warm up: recordings are made in the second."""
    for _ in range(2):
        function()
    seconds = []
    for _ in range(repeat):
        wait(device)
        start = time.perf_counter()
        function()
        wait(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def rates(device: torch.device) -> tuple[float, float]:
    """Products and sums per second of a large matrix product, and bytes per second of copying, both measured."""
    size = RATE_SIZE if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=BF16) for _ in range(2))
    large = torch.empty(size * size * 16, device=device, dtype=torch.uint8)
    other = torch.empty_like(large)
    return (
        2 * size**3 / best(10, device, lambda: a @ b),
        2 * large.numel() / best(10, device, lambda: other.copy_(large)),
    )


def limits(config: Config, scales: Schedule, batch: int, flops: float, copied: float) -> list[tuple[float, float]]:
    """Seconds that each scale's arithmetic and its reading of memory take at these rates."""
    geometry, rows = config.model.transformer, 2 * batch
    width, ffn = geometry.width, geometry.ffn_width
    per_position = 2 * (6 * width**2 + 2 * width * ffn)
    weights = geometry.depth * (6 * width**2 + 2 * width * ffn) * 2
    found = []
    for count, part in zip(scales.counts, scales.slices, strict=True):
        attention = 4 * part.stop * width + 4 * PROMPT_LENGTH * width
        arithmetic = rows * count * geometry.depth * (per_position + attention)
        cache = rows * geometry.depth * part.stop * 2 * width * 2
        found.append((arithmetic / flops, (weights + cache) / copied))
    return found


def speed(config: Config, batches: list[int], repeat: int, device: torch.device) -> None:
    transformer, tokenizer = random_model(config, device)
    recorded = RecordedTransformer(transformer) if device.type == "cuda" else None
    scales = schedule(config.model.scales, patchify=config.model.transformer.patchify)
    how = plan(config.sampling.model_copy(update={"cfg": GUIDANCE, "cfg_layer": 0, "tau": 1.0}), len(scales))
    flops, copied = rates(device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    pixels = " x ".join(map(str, scales.pixels(config.model.tokenizer.patch_size)))
    print(f"{config.name}, {pixels}, {name}, torch {torch.__version__}: {flops / 1e12:.1f} TFLOP/s in a large product, "
          f"{copied / 1e12:.2f} TB/s read and written\n")  # fmt: skip
    print("| pictures at once | plain | bitgen | recorded | decoder | whole picture, recorded | memory |")
    print("|---|---|---|---|---|---|---|")
    details = []
    for batch in batches:
        features = torch.randn(batch, PROMPT_LENGTH, config.model.transformer.text_width, device=device)
        text = TextFeatures(features, (PROMPT_LENGTH,) * batch)

        def draw(predictor: Predictor, text: TextFeatures = text, batch: int = batch) -> Drawn:
            return draw_bits(predictor, text, scales, how, list(range(batch)))

        def plainly(text: TextFeatures = text) -> object:
            with torch.autocast(device.type, BF16):
                return plain_draw(transformer, text, scales)

        ways: list[Predictor] = [transformer, *([] if recorded is None else [recorded])]
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        drawn = [draw(way) for way in ways for _ in range(3)]
        peak = torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else 0.0
        for other in drawn[1:]:
            assert all(torch.equal(a, b) for a, b in zip(drawn[0].bits, other.bits, strict=True)), "bits differ"
        seconds = [best(repeat, device, lambda way=way: draw(way)) for way in ways]  # type: ignore[misc]
        one = drawn[0].total[:1].to(BF16)
        del drawn
        with torch.inference_mode():
            decoding = batch * best(repeat, device, lambda one=one: tokenizer.decode(one))  # type: ignore[misc]
        plain = best(max(1, repeat // 2), device, plainly)
        print(f"| {batch} | {plain:.3f} s | {seconds[0]:.3f} s | {seconds[-1]:.3f} s | {decoding:.3f} s | "
              f"{(seconds[-1] + decoding) / batch:.3f} s | {peak:.1f} GiB |", flush=True)  # fmt: skip
        details.append((batch, [each_scale(way, text, scales, repeat, device) for way in ways]))
    for batch, found in details:
        print(f"\n{batch} at once, milliseconds of each scale:\n")
        print("| scale | bitgen | recorded | arithmetic | memory |\n|---|---|---|---|---|")
        bounds = limits(config, scales, batch, flops, copied)
        for k, (arithmetic, memory) in enumerate(bounds):
            print(f"| {'x'.join(map(str, scales.sizes[k]))} | {1e3 * found[0][k]:.1f} | {1e3 * found[-1][k]:.1f} | "
                  f"{1e3 * arithmetic:.1f} | {1e3 * memory:.1f} |")  # fmt: skip
        print(f"| all | {1e3 * sum(found[0]):.0f} | {1e3 * sum(found[-1]):.0f} | "
              f"{1e3 * sum(a for a, _ in bounds):.0f} | {1e3 * sum(m for _, m in bounds):.0f} |")  # fmt: skip


@torch.inference_mode()
def each_scale(
    predictor: Predictor, text: TextFeatures, scales: Schedule, repeat: int, device: torch.device
) -> list[float]:
    """Seconds of each scale's step with guidance."""
    both = TextFeatures.join([text, predictor.null_features(text.lengths)])
    condition = predictor.condition(both)
    cache = predictor.new_cache(len(both.lengths), scales)
    seconds = []
    for k, count in enumerate(scales.counts):
        shape = (len(both.lengths), count, predictor.bits_per_position)
        seen = None if k == 0 else torch.randn(shape, device=device).sign()
        seconds.append(
            best(repeat, device, lambda k=k, seen=seen: predictor.step(k, seen, condition, scales, cache))  # type: ignore[misc]
        )
    return seconds


def save_random(folder: Path, config: Config, device: torch.device) -> None:
    """A model folder with random weights, and a text encoder of the size of the published one's."""
    from transformers import T5Config, T5EncoderModel

    vocabulary = new_vocabulary([world.caption_at(index, 0) for index in range(200)], 400)
    width = config.model.transformer.text_width
    geometry = T5Config(
        vocab_size=32128, d_model=width, d_kv=64, d_ff=5 * width // 2, num_layers=24, num_heads=width // 64,
        feed_forward_proj="gated-gelu", dropout_rate=0.0,
        pad_token_id=vocabulary.token_to_id("<pad>"), eos_token_id=vocabulary.token_to_id("</s>"),
    )  # fmt: skip
    transformer, tokenizer = random_model(config, device)
    with device:
        encoder = T5EncoderModel(geometry).to(BF16)
    text = TextEncoder(encoder, vocabulary, config.model.transformer.text_length)
    parts = {"tokenizer": tokenizer, "transformer": transformer, "text_encoder": text}
    save_model(folder, config.model, config.sampling, **parts, dtype=BF16)  # type: ignore[arg-type]


class Loud(Silent):
    """Prints notices."""

    def notice(self, text: str) -> None:
        print(f"  {text}", flush=True)


def memory(config: Config, limit: float, device: torch.device) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / config.name
        start = time.perf_counter()
        save_random(folder, config, device)
        print(f"{config.name} with random weights, written in {time.perf_counter() - start:.0f} s", flush=True)
        pictures, bits = [], []
        for offload, allowed in (("auto", limit - CONTEXT), ("none", None)):
            give_back(device)
            if device.type == "cuda":
                whole = torch.cuda.get_device_properties(device).total_memory
                torch.cuda.set_per_process_memory_fraction(1.0 if allowed is None else allowed * GIB / whole)
                torch.cuda.reset_peak_memory_stats()
            print(f"--offload {offload}, {'all memory' if allowed is None else f'{allowed:.1f} GiB'}:", flush=True)
            target = Path(place) / f"{offload}.png"
            options = SampleOptions(
                prompts=("a red dog on the moon",), model=str(folder), seed=1, offload=offload, device=device.type,
                dtype="bf16" if device.type == "cuda" else "fp32", text_cache=False, output=str(target),
                overwrite=True, embed_bits=True,
            )  # fmt: skip
            for _ in range(2):
                start = time.perf_counter()
                result = sample(options, Loud())
                print(f"  {time.perf_counter() - start:.1f} s in all, {result.seconds:.2f} s drawing", flush=True)
            if device.type == "cuda":
                print(f"  tensors {torch.cuda.max_memory_allocated() / GIB:.2f} GiB, "
                      f"held {torch.cuda.max_memory_reserved() / GIB:.2f} GiB", flush=True)  # fmt: skip
            pictures.append(levels(target))
            bits.append((carried(target.read_bytes(), str(target))[1] or b"")[DIGEST:])
        apart = (pictures[0] - pictures[1]).abs()
        differ = sum((a ^ b).bit_count() for a, b in zip(*bits, strict=True))
        print(f"{differ} of {8 * len(bits[0])} bits differ; pictures by {apart.max():.0f} levels at most, "
              f"{apart.mean():.5f} on average")  # fmt: skip


def levels(file: Path) -> torch.Tensor:
    """A picture's numbers, 0 to 255."""
    from PIL import Image

    from bitgen_cli.engine.data import to_tensor

    with Image.open(file) as image:
        return to_tensor(image.convert("RGB"), (image.height, image.width)).float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "memory"))
    parser.add_argument("--preset", default="infinity-2b")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--repeat", type=int, default=5, metavar="N")
    parser.add_argument("--limit", type=float, default=8, metavar="GIB", help="memory of the card")
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    config = resolve(given.preset, overrides=given.overrides, environment={}).config
    device = torch.device(given.device)
    if given.what == "speed":
        speed(config, given.batch, given.repeat, device)
    else:
        memory(config, given.limit, device)


if __name__ == "__main__":
    main()
