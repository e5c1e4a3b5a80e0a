"""What refinement mends: the demo model's pictures with a tenth of their bits turned over, and as they were drawn.

    python -m tests.benchmarks.refine [--pictures 200] [--damages 10] [--rounds 2] [--seed 0] [--device cuda]

Pictures of triples that are never trained on. Damage turns over 10 % of the bits of all scales but the first, at
random, and is done so many times to each picture: it takes few of them from what was asked for, and recovery is a
share of these. Adherence is the share of pictures whose class, colour and place a classifier names as asked for.
Log-likelihood is that of all bits, of a pass over all scales. Time is what the fastest of many takes, for one picture
and for eight at once: a picture sampled again, its bits drawn and decoded, against what a refinement of bits that are
not as they were drawn adds before they are decoded, if its prompt has been read, and if not (`--from PICTURE`).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bitgen_cli.engine import pyramid
from bitgen_cli.engine.bits import to_positions
from bitgen_cli.engine.device import keep_freed_memory
from bitgen_cli.engine.refine import refine
from bitgen_cli.engine.sampling import draw_bits
from bitgen_cli.engine.scales import Schedule
from bitgen_cli.engine.transformer import Condition, TextFeatures, Transformer
from bitgen_cli.runs.placement import AT_ONCE
from tests.benchmarks.demo_pictures import DemoPictures
from tests.benchmarks.published import wait

DAMAGE = 0.1
"""Share of the bits that are turned over."""
TIMED = 60
"""Batches that are timed at most, in turn; the fastest counts."""


def damaged(bits: list[Tensor], seed: int) -> list[Tensor]:
    """The bits with some of those of all scales but the first turned over."""
    generator = torch.Generator().manual_seed(seed)
    rates = [DAMAGE * (k > 0) for k in range(len(bits))]
    flips = (torch.rand(grid.shape, generator=generator) < rate for grid, rate in zip(bits, rates, strict=True))
    return [grid ^ flip.to(grid.device) for grid, flip in zip(bits, flips, strict=True)]


@torch.inference_mode()
def likelihood(transformer: Transformer, text: TextFeatures, sizes: Schedule, bits: list[Tensor]) -> float:
    """Mean log-likelihood of a bit, nats, over all scales."""
    inputs = torch.cat([to_positions(grid) for grid in pyramid.inputs_from_bits(bits, sizes)], dim=1)
    pairs = torch.unflatten(transformer(inputs, text, sizes), -1, (-1, 2))
    of_one = pairs[..., 1] - pairs[..., 0]
    values = torch.cat([to_positions(grid.float()) for grid in bits], dim=1)
    return float(F.logsigmoid(torch.where(values > 0, of_one, -of_one)).mean())


def seconds(works: list[Callable[[int], object]], batches: int, device: torch.device) -> list[float]:
    """Time of each piece of work: that of the fastest batch, after one to warm up."""
    found = [float("inf")] * len(works)
    for index in range(-1, batches):
        for number, work in enumerate(works):
            start = time.perf_counter()
            work(max(0, index))
            wait(device)
            found[number] = min(found[number], time.perf_counter() - start) if index >= 0 else found[number]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pictures", type=int, default=200, metavar="N")
    parser.add_argument("--damages", type=int, default=10, metavar="N")
    parser.add_argument("--rounds", type=int, default=2, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    keep_freed_memory()
    demo = DemoPictures.prepare(given.pictures, given.seed, given.device)
    transformer, text, sizes, how, seeds = demo.transformer, demo.text, demo.sizes, demo.how, demo.seeds
    drawn = demo.draw()
    broken = [damaged(drawn, given.seed + number) for number in range(given.damages)]
    guidance = max(how.cfg)
    with torch.inference_mode():
        both = transformer.condition(_and_nothing(transformer, text))

    def refined(sets: list[list[Tensor]], rounds: int) -> list[list[Tensor]]:
        return [refine(transformer, both, sizes, bits, rounds, guidance=guidance).bits for bits in sets]

    print("| pictures | as asked for | lost | recovered | log-likelihood of a bit | bits changed of each scale |")
    print("|---|---|---|---|---|---|")
    wrong: dict[str, int] = {}

    def show(name: str, sets: list[list[Tensor]], before: list[list[Tensor]]) -> None:
        count = len(sets) * given.pictures
        wrong[name] = round(sum((1 - demo.shares(bits)["all three"]) * given.pictures for bits in sets))
        scales = zip(_by_scale(sets), _by_scale(before), strict=True)
        changes = [torch.cat([a != b for a, b in zip(*both, strict=True)]) for both in scales]
        changed = ", ".join(f"{change.float().mean():.1%}" for change in changes)
        likely = sum(likelihood(transformer, text, sizes, bits) for bits in sets) / len(sets)
        lost = wrong["damaged"] - wrong["as drawn"] * given.damages if "damaged" in wrong else 0
        share = f"{(wrong['damaged'] - wrong[name]) / lost:.0%}" if lost > 0 and name != "damaged" else ""
        print(f"| {name} | {1 - wrong[name] / count:.1%} | {wrong[name]} of {count} | {share} | "
              f"{likely:.4f} | {changed} |", flush=True)  # fmt: skip

    show("as drawn", [drawn], [drawn])
    for rounds in range(1, given.rounds + 1):
        show(f"as drawn, --refine {rounds}", refined([drawn], rounds), [drawn])
    show("damaged", broken, [drawn] * given.damages)
    for rounds in range(1, given.rounds + 1):
        show(f"damaged, --refine {rounds}", refined(broken, rounds), broken)

    print("\n| at once | bits | decoded | rounds | refining | of bits | of a picture | with prompts to read | of it |")
    print("|---|---|---|---|---|---|---|---|---|")
    rows = [row[:length] for row, length in zip(text.features, text.lengths, strict=True)]
    for together in (1, AT_ONCE):
        places = [slice(start, start + together) for start in range(0, len(rows) - together + 1, together)][:TIMED]
        own = [TextFeatures.from_rows(rows[at]) for at in places]
        parts = [[grid[at] for grid in broken[0]] for at in places]
        totals = [pyramid.decode(part, sizes) for part in parts]
        with torch.inference_mode():
            read = [transformer.condition(_and_nothing(transformer, some)) for some in own]

        def draw(n: int, own: list[TextFeatures] = own, at: list[slice] = places) -> None:
            draw_bits(transformer, own[n], sizes, how, seeds[at[n]])

        @torch.inference_mode()
        def decode(n: int, totals: list[Tensor] = totals) -> None:
            for total in totals[n].split(1):
                demo.tokenizer.decode(total)

        @torch.inference_mode()
        def again(
            n: int,
            rounds: int,
            known: bool,
            own: list[TextFeatures] = own,
            read: list[Condition] = read,
            parts: list[list[Tensor]] = parts,
        ) -> None:
            prompts = read[n] if known else transformer.condition(_and_nothing(transformer, own[n]))
            refine(transformer, prompts, sizes, parts[n], rounds, guidance=guidance)

        work: list[Callable[[int], object]] = [draw, decode]
        for rounds in range(1, given.rounds + 1):
            work += [partial(again, rounds=rounds, known=True), partial(again, rounds=rounds, known=False)]
        drawing, decoding, *others = seconds(work, len(places), transformer.device)
        whole = drawing + decoding
        for rounds, (known, unknown) in enumerate(zip(others[::2], others[1::2], strict=True), 1):
            times = (f"{1e3 * taken:.0f} ms" for taken in (drawing, decoding, known, unknown))
            bits, decoded, refining, with_prompts = times
            print(f"| {together} | {bits} | {decoded} | {rounds} | {refining} | {known / drawing:.2f} | "
                  f"{known / whole:.2f} | {with_prompts} | {unknown / whole:.2f} |", flush=True)  # fmt: skip


def _by_scale(sets: list[list[Tensor]]) -> list[list[Tensor]]:
    return [list(of_one_scale) for of_one_scale in zip(*sets, strict=True)]


def _and_nothing(transformer: Transformer, text: TextFeatures) -> TextFeatures:
    """Prompts, and those that are guided away from."""
    return TextFeatures.join([text, transformer.null_features(text.lengths)])


if __name__ == "__main__":
    main()
