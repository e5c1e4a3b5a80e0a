"""What refinement mends: the demo model's pictures with a tenth of their bits turned over, and as they were drawn.

    python -m tests.benchmarks.refine [--pictures 200] [--rounds 2] [--seed 0] [--device cuda]

Pictures of triples that are never trained on. Damage turns over 10 % of the bits of all scales but the first, at
random. Adherence is the share of pictures whose class, colour and place a classifier names as asked for; what is
recovered is told as a share of what damage took. Log-likelihood is that of all bits, of a pass over all scales. Time is
what the fastest of many takes, for one picture and for eight at once: drawing again, against refining what was just
drawn (`--refine`: its prompt has been read), and what was not (`--from PICTURE --refine`).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bitgen_cli.engine import pyramid
from bitgen_cli.engine.bits import to_positions
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
    parser.add_argument("--rounds", type=int, default=2, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    demo = DemoPictures.prepare(given.pictures, given.seed, given.device)
    transformer, text, sizes, how, seeds = demo.transformer, demo.text, demo.sizes, demo.how, demo.seeds
    drawn = demo.draw()
    broken = damaged(drawn, given.seed)
    guidance = max(how.cfg)
    null = transformer.null_features(text.lengths)

    def refined(bits: list[Tensor], rounds: int) -> list[Tensor]:
        both = TextFeatures.join([text, null])
        return refine(transformer, text, sizes, bits, rounds, both=both, guidance=guidance).bits

    print("| pictures | as asked for | recovered | log-likelihood of a bit | bits changed of each scale |")
    print("|---|---|---|---|---|")
    found: dict[str, float] = {}

    def show(name: str, bits: list[Tensor], before: list[Tensor]) -> None:
        found[name] = demo.shares(bits)["all three"]
        changed = ", ".join(f"{(a != b).float().mean():.1%}" for a, b in zip(bits, before, strict=True))
        likely = likelihood(transformer, text, sizes, bits)
        lost = found["as drawn"] - found.get("damaged", found["as drawn"])
        share = f"{(found[name] - found['damaged']) / lost:.0%}" if lost > 0 and name != "damaged" else ""
        print(f"| {name} | {found[name]:.1%} | {share} | {likely:.4f} | {changed} |", flush=True)

    show("as drawn", drawn, drawn)
    for rounds in range(1, given.rounds + 1):
        show(f"as drawn, --refine {rounds}", refined(drawn, rounds), drawn)
    show("damaged", broken, drawn)
    for rounds in range(1, given.rounds + 1):
        show(f"damaged, --refine {rounds}", refined(broken, rounds), broken)

    print("\n| at once | drawing again | rounds | refining | of it | with prompts to read | of it |")
    print("|---|---|---|---|---|---|---|")
    rows = [row[:length] for row, length in zip(text.features, text.lengths, strict=True)]
    for together in (1, AT_ONCE):
        places = [slice(start, start + together) for start in range(0, len(rows) - together + 1, together)][:TIMED]
        own = [TextFeatures.from_rows(rows[at]) for at in places]
        both = [TextFeatures.join([some, transformer.null_features(some.lengths)]) for some in own]
        parts = [[grid[at] for grid in broken] for at in places]
        with torch.inference_mode():
            read = [transformer.condition(some) for some in both]

        def draw(n: int, own: list[TextFeatures] = own, at: list[slice] = places) -> None:
            draw_bits(transformer, own[n], sizes, how, seeds[at[n]])

        work: list[Callable[[int], object]] = [draw]
        for rounds in range(1, given.rounds + 1):
            again = partial(_refine, transformer, sizes, parts, rounds, guidance)
            work += [partial(again, [one.part(slice(together)) for one in read], read), partial(again, own, both)]
        whole, *others = seconds(work, len(places), transformer.device)
        for rounds, (known, unknown) in enumerate(zip(others[::2], others[1::2], strict=True), 1):
            print(f"| {together} | {1e3 * whole:.0f} ms | {rounds} | {1e3 * known:.0f} ms | {known / whole:.2f} | "
                  f"{1e3 * unknown:.0f} ms | {unknown / whole:.2f} |", flush=True)  # fmt: skip


def _refine(
    transformer: Transformer,
    sizes: Schedule,
    parts: list[list[Tensor]],
    rounds: int,
    guidance: float,
    own: Sequence[TextFeatures | Condition],
    both: Sequence[TextFeatures | Condition],
    number: int,
) -> None:
    refine(transformer, own[number], sizes, parts[number], rounds, both=both[number], guidance=guidance)


if __name__ == "__main__":
    main()
