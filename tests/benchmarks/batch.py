"""How many pictures a second a prompt file gets from the built-in model: several drawn at once against one at a time.

    python -m tests.benchmarks.batch [--pictures N] [--batch-size N] [--repeat N]

Drawing and writing PNGs are in it, loading is not; the best of the repetitions counts. Also told is how much memory a
job of ten times as many pictures takes beyond one of so many.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
from pathlib import Path

import torch

from bitgen_cli.demo.world import COLOURS, OBJECTS, PLACES
from bitgen_cli.report import Silent
from bitgen_cli.runs.jobs import SampleOptions
from bitgen_cli.runs.sample import sample

GOAL = 2.0


def draw(folder: Path, pictures: int, batch_size: int) -> float:
    """Pictures per second."""
    prompts = [f"a {colour} {thing} {place}" for colour in COLOURS for thing in OBJECTS for place in PLACES]
    file = folder / "prompts.txt"
    file.write_text("\n".join(prompts[n % len(prompts)] for n in range(pictures)))
    with tempfile.TemporaryDirectory(dir=folder) as out:
        options = SampleOptions(prompts_file=str(file), output=f"{out}/", seed=1, batch_size=batch_size, device="cpu")
        result = sample(options, Silent())
    assert len(result.pictures) == pictures
    return pictures / result.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=16, metavar="N")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N")
    parser.add_argument("--repeat", type=int, default=2, metavar="N")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        os.environ["BITGEN_HOME"] = name
        folder = Path(name)
        speeds: dict[int, float] = {1: 0.0, asked.batch_size: 0.0}
        for _ in range(asked.repeat):
            for size in speeds:
                speeds[size] = max(speeds[size], draw(folder, asked.pictures, size))
        for size, speed in speeds.items():
            print(f"batch size {size:3}: {speed:6.2f} pictures/s, {torch.get_num_threads()} threads")
        ratio = speeds[asked.batch_size] / speeds[1]
        print(f"ratio {ratio:.2f}, goal {GOAL:.1f}")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        draw(folder, 10 * asked.pictures, asked.batch_size)
        more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print(f"{10 * asked.pictures} pictures take {more / 1024:.0f} MiB more than {asked.pictures}")


if __name__ == "__main__":
    main()
