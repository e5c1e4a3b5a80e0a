"""Memory of real trainings beside what engine/training_memory.py says they take.

    python -m tests.benchmarks.memory                  # all of them, some minutes
    python -m tests.benchmarks.memory demo subject     # those with such words in their names
    python -m tests.benchmarks.memory --device cuda

Every training is run twice, each time in a process of its own, for two steps with a validation, a picture grid and a
checkpoint: once every tensor is counted as long as it lives, once the process is looked at from outside (the growth of
its resident memory, of which libraries, kernels' work space and what the allocator wastes are a part). The estimate is
of the first. On a GPU it is run once: torch's allocator says what all tensors took at most, and what it held for them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIB = 2**20
SHORT_RUN = ("steps=2", "validate_every=2", "save_every=2", "log_every=1", "workers=0")


@dataclass(frozen=True)
class Case:
    """A training to measure.

    Attributes:
        name: what it is called.
        stage, preset, overrides: what is trained; keys of the stage's recipe alone, or whole ones.
    """

    name: str
    stage: str
    preset: str
    overrides: tuple[str, ...] = ()

    def settings(self) -> list[str]:
        """Its overrides with those that keep the run short, as whole keys."""
        short = [*SHORT_RUN, "sample_every=2", f"validation_images={16 if self.stage != 'subject' else 2}"]
        if self.stage == "subject":
            short += ["prior_images=4", "other_images=4", "token_head_start=0", "views=2"]
        if self.stage == "tokenizer":
            short += ["picture_cache=0"]
        given = [
            override if override.startswith(("model.", "sampling.")) else f"training.{self.stage}.{override}"
            for override in (*short, *self.overrides)
        ]
        return list({override.split("=")[0]: override for override in given}.values())


RECOMPUTED = "checkpoint_activations=true"
SMALL_32BIT = (
    "model.tokenizer.base_channels=64",
    "model.tokenizer.res_blocks=1",
    "model.transformer.depth=4",
    "model.transformer.text_width=256",
    "model.transformer.text_length=64",
    "model.text_encoder.source=new",
    "model.text_encoder.vocabulary=256",
    "model.text_encoder.width=256",
    "model.text_encoder.layers=2",
    "model.text_encoder.heads=4",
    "model.text_encoder.ffn_width=512",
)
"""The 32bit preset at 256x256 with fewer blocks and channels, and a text encoder that needs no download."""

CASES = [
    Case("demo tokenizer fp32", "tokenizer", "demo", ("precision=fp32",)),
    Case("demo tokenizer bf16", "tokenizer", "demo"),
    Case("demo tokenizer fp32, accumulated, no average", "tokenizer", "demo",
         ("precision=fp32", "accumulation=2", "ema_decay=0")),
    Case("demo transformer fp32", "transformer", "demo", ("precision=fp32",)),
    Case("demo transformer bf16", "transformer", "demo"),
    Case("demo transformer fp32, recomputed", "transformer", "demo", ("precision=fp32", RECOMPUTED)),
    Case("demo transformer bf16, recomputed, accumulated", "transformer", "demo", (RECOMPUTED, "accumulation=2")),
    Case("demo transformer fp32, batch 2, no average", "transformer", "demo",
         ("precision=fp32", "batch_size=2", "ema_decay=0")),
    Case("256x256 tokenizer fp32", "tokenizer", "32bit", (*SMALL_32BIT, "precision=fp32", "batch_size=2")),
    Case("256x256 tokenizer bf16", "tokenizer", "32bit", (*SMALL_32BIT, "batch_size=2")),
    Case("256x256 transformer fp32", "transformer", "32bit",
         (*SMALL_32BIT, "precision=fp32", "batch_size=2", "checkpoint_activations=false")),
    Case("256x256 transformer bf16", "transformer", "32bit",
         (*SMALL_32BIT, "batch_size=2", "checkpoint_activations=false")),
    Case("256x256 transformer bf16, recomputed", "transformer", "32bit", (*SMALL_32BIT, "batch_size=2")),
    Case("demo subject fp32", "subject", "demo"),
    Case("demo subject bf16, adapters, recomputed", "subject", "demo",
         ("precision=bf16", 'train=["token", "lora"]', RECOMPUTED)),
    Case("demo subject fp32, everything, average", "subject", "demo", ('train=["all"]', "ema_decay=0.9")),
]  # fmt: skip


def prepare(folder: Path, case: Case, device: str) -> None:
    """What the training starts from: a token store and the fresh tokenizer that made it, or photos."""
    import random

    import torch

    from bitgen_cli.demo import world
    from bitgen_cli.engine.model_folder import save_model
    from bitgen_cli.engine.tokenizer import Tokenizer
    from bitgen_cli.presets import resolve
    from bitgen_cli.report import Silent
    from bitgen_cli.runs.tokenize import TokenizeOptions, tokenize

    if case.stage == "subject":
        (folder / "photos").mkdir()
        look = world.Look(coat=(240, 200, 150), patches=(60, 120, 110), accessory=(230, 40, 160))
        for number in range(4):
            scene = world.Scene("dog", "brown", world.PLACES[number])
            world.draw(scene, random.Random(number), 128, look).save(folder / "photos" / f"{number}.png")
    if case.stage == "transformer":
        config = resolve(case.preset, overrides=case.settings(), environment={}).config
        tokenizer = Tokenizer(config.model.tokenizer)
        tokenizer.autoencoder.initialise(torch.Generator().manual_seed(0))
        save_model(folder / "tokenizer", config.model, config.sampling, tokenizer=tokenizer)
        made = TokenizeOptions(f"world:{PICTURES}", folder / "store", str(folder / "tokenizer"), device=device)
        tokenize(made, Silent())


PICTURES = 200


def measured(folder: Path, case: Case, device: str, *, tensors: bool) -> int:
    """Runs the training in this process; bytes of its tensors, or by how much the process has grown.

    On a GPU: bytes that its tensors took, or that were held for them.
    """
    import contextlib
    from unittest import mock

    import torch

    from bitgen_cli.engine import trainer
    from bitgen_cli.engine.rehearsal import Watched
    from bitgen_cli.presets import resolve
    from bitgen_cli.report import Silent
    from bitgen_cli.runs import train as runs
    from bitgen_cli.runs.finetune_subject import SubjectOptions, finetune_subject
    from bitgen_cli.runs.start import Init

    torch.set_num_threads(1)
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # loads what optimizers load
    on_gpu = device.startswith("cuda")
    watched = Watched() if tensors and not on_gpu else None
    before = resident("VmRSS")
    fit = trainer.Trainer.fit

    def fit_watched(self: trainer.Trainer) -> dict[str, float]:
        if watched is not None:
            watched.mark("before")
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        return fit(self)

    report = Silent()
    with watched or contextlib.nullcontext(), mock.patch.object(trainer.Trainer, "fit", fit_watched):
        if case.stage == "subject":
            finetune_subject(
                SubjectOptions(
                    folder / "photos", "dog", preset=case.preset, overrides=tuple(case.settings()), out=folder / "run",
                    overwrite=True, device=device,
                ),
                report,
            )  # fmt: skip
        else:
            data = str(folder / "store") if case.stage == "transformer" else f"world:{PICTURES}"
            init = Init((str(folder / "tokenizer"),) if case.stage == "transformer" else ())
            resolved = resolve(case.preset, overrides=case.settings(), environment={})
            runs.train(runs.TrainOptions(resolved, case.stage, data, folder / "run", init, device), report)
    if on_gpu:
        return torch.cuda.max_memory_allocated() if tensors else torch.cuda.max_memory_reserved()
    if watched is None:
        return resident("VmHWM") - before
    watched.mark("fitted")
    return dict(watched.passed)["fitted"].step


def resident(field: str) -> int:
    """Bytes of this process, as the kernel tells them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def estimated(case: Case, device: str) -> int:
    """Bytes the estimate says."""
    import torch

    from bitgen_cli.engine.memory import parameters
    from bitgen_cli.engine.scales import schedule
    from bitgen_cli.engine.subject_stage import AT_ONCE
    from bitgen_cli.engine.training_memory import (
        Layout,
        subject_training_memory,
        tokenizer_training_memory,
        transformer_training_memory,
    )
    from bitgen_cli.presets import resolve

    config = resolve(case.preset, overrides=case.settings(), environment={}).config
    counts, scales = parameters(config.model), schedule(config.model.scales, patchify=config.model.transformer.patchify)
    layout = Layout(torch.device(device))
    if case.stage == "subject":
        return subject_training_memory(config, counts, scales, TOKENS, layout, at_once=AT_ONCE).total
    of = {"tokenizer": tokenizer_training_memory, "transformer": transformer_training_memory}[case.stage]
    memory = of(config, counts, scales, layout)
    assert memory is not None
    return memory.total


TOKENS = 16
"""Of a subject's longest caption."""


def in_a_process(what: str, folder: Path, case: Case, device: str) -> Any:
    """The JSON that a child of this program prints."""
    command = [sys.executable, "-m", "tests.benchmarks.memory", "--device", device, "--child"]
    command += [what, str(folder), case.name]
    elsewhere = os.environ | {"XDG_DATA_HOME": str(folder)}  # subjects are not to be kept among the user's
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=elsewhere)
    if done.returncode:
        raise SystemExit(f"{case.name}, {what}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        what, folder, name = given.child
        case = next(case for case in CASES if case.name == name)
        doing: dict[str, Any] = {
            "prepare": lambda: prepare(Path(folder), case, given.device),
            "estimate": lambda: estimated(case, given.device),
            "tensors": lambda: measured(Path(folder), case, given.device, tensors=True),
            "process": lambda: measured(Path(folder), case, given.device, tensors=False),
        }
        print(json.dumps(doing[what]()))
        return
    process = "held" if given.device.startswith("cuda") else "process"
    print(f"{'training':50} {'estimate':>9} {'tensors':>9} {'ratio':>6} {process:>9} {'ratio':>6}   MiB", flush=True)
    for case in CASES:
        if all(word in case.name for word in given.words):
            sizes = {"estimate": in_a_process("estimate", Path(), case, given.device)}
            for what in ("tensors", "process"):
                with tempfile.TemporaryDirectory() as folder:
                    in_a_process("prepare", Path(folder), case, given.device)
                    sizes[what] = in_a_process(what, Path(folder), case, given.device)
            estimate, tensors, process = (sizes[what] / MIB for what in ("estimate", "tensors", "process"))
            print(
                f"{case.name:50} {estimate:9.0f} {tensors:9.0f} {estimate / tensors:6.2f} "
                f"{process:9.0f} {estimate / process:6.2f}", flush=True
            )  # fmt: skip


if __name__ == "__main__":
    main()
