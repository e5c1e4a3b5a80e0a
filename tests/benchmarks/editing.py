"""What going on from a picture does: the demo model's pictures with their middle drawn anew, and varied.

    python -m tests.benchmarks.editing [--pictures 200] [--seed 0]

Pictures of triples that are never trained on. The middle, 48 of 64 pixels in width and height, is drawn anew by a
prompt of another class and colour in the same place, and then refined, the rest too. Told are the share of pictures
whose class, colour and place a classifier names as the new prompt does, and how far pixels are from what they were, of
255: at the edge, where latent positions are kept to the last bit, and everywhere. Varied, the first scales are kept and
the prompt is the picture's own.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from bitgen_cli.demo import world
from bitgen_cli.engine.editing import Given, drawn_positions, latent_mask
from bitgen_cli.engine.refine import refine
from bitgen_cli.engine.sampling import draw_bits
from bitgen_cli.engine.transformer import TextFeatures
from tests.benchmarks.demo_pictures import DemoPictures, read

EDGE = 8
"""Pixels at each side that are outside the mask."""


def other(scene: world.Scene, number: int) -> world.Scene:
    """A scene of another class and colour in the same place."""
    classes, colours = sorted({one.object_class for one in world.scenes(held_out=False)}), list(world.COLOURS)
    return world.Scene(
        classes[(classes.index(scene.object_class) + 1 + number % (len(classes) - 1)) % len(classes)],
        colours[(colours.index(scene.colour) + 1 + number % (len(colours) - 1)) % len(colours)],
        scene.place,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pictures", type=int, default=200, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    demo = DemoPictures.prepare(given.pictures, given.seed)
    transformer, sizes, how, scenes = demo.transformer, demo.sizes, demo.how, demo.scenes
    asked = [other(scene, number) for number, scene in enumerate(scenes)]
    others = [seed + 1_000_000 for seed in demo.seeds]
    new_text = read(demo.encoder, asked)
    pixels = torch.zeros(demo.pixels, dtype=torch.bool)
    pixels[EDGE:-EDGE, EDGE:-EDGE] = True
    old = demo.draw()
    middle = Given(old, drawn_positions(sizes, latent_mask(pixels, sizes)))
    masked = draw_bits(transformer, new_text, sizes, how, others, given=middle).bits
    with torch.inference_mode():
        both = transformer.condition(TextFeatures.join([new_text, transformer.null_features(new_text.lengths)]))
    mended = refine(transformer, both, sizes, masked, 2, guidance=max(how.cfg))
    found = {
        "as drawn, by its own prompt": (old, scenes),
        "as drawn, by the new one": (old, asked),
        "middle drawn anew": (masked, asked),
        "and refined": (mended.bits, asked),
        "drawn anew as a whole": (draw_bits(transformer, new_text, sizes, how, others).bits, asked),
    }
    before = demo.images(old)
    print("| pictures | class | colour | place | all three | edge differs by | all differs by |")
    print("|---|---|---|---|---|---|---|")

    def show(name: str, bits: list[Tensor], wanted: list[world.Scene]) -> None:
        apart = (demo.images(bits).float() - before.float()).abs()
        levels = f"{apart[..., ~pixels].mean():.1f} | {apart.mean():.1f}"
        told = " | ".join(f"{share:.1%}" for share in demo.shares(bits, wanted).values())
        print(f"| {name} | {told} | {levels} |", flush=True)

    for name, (bits, wanted) in found.items():
        show(name, bits, wanted)
    for keep in range(len(sizes) - 1, 0, -1):
        kept = Given(old, drawn_positions(sizes, None, keep))
        show(f"varied, {keep} of {len(sizes)} scales kept", draw_bits(
            transformer, demo.text, sizes, how, others, given=kept).bits, scenes)  # fmt: skip


if __name__ == "__main__":
    main()
