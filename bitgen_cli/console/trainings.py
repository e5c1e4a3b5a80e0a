"""Trainings that have ended: of a model, of a subject, and of all combinations of a sweep."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from bitgen_cli.console.tables import show_facts, show_tables
from bitgen_cli.console.terminal import print_error_line
from bitgen_cli.console.words import HELD_OUT, duration, name_of, number_of, per_scale, shown_by_name
from bitgen_cli.report import Table

if TYPE_CHECKING:
    from bitgen_cli.runs.finetune_subject import SubjectResult
    from bitgen_cli.runs.sweep import SweepResult, SweepRun
    from bitgen_cli.runs.train import TrainResult


def show_training(result: TrainResult) -> None:
    """Prints what a training reached to stdout."""
    facts = {
        "model": str(result.model),
        "run": str(result.run),
        "stage": result.stage,
        "steps": str(result.steps),
        "loss": f"{result.loss:.4f}",
    }
    for key, value in result.validation.items():
        if shown_by_name(key):
            facts[name_of(key)] = number_of(key, value)
    scales = per_scale(result.validation, HELD_OUT)
    if scales:
        facts["held-out bit accuracy"] = " ".join(f"{100 * value:.1f}" for value in scales) + " % per scale"
    facts["took"] = duration(result.seconds)
    show_facts(facts)


def show_sweep(result: SweepResult) -> None:
    """Prints what became of every run of a sweep to stdout, the best one marked."""
    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.4f}"

    best = result.best
    measures: dict[str, Callable[[SweepRun], str]] = {
        "loss": lambda run: number(run.loss),
        "held-out loss": lambda run: number(run.val_loss),
        "lowest": lambda run: number(run.best_val_loss),
        "held-out PSNR": lambda run: "" if run.val_psnr is None else f"{run.val_psnr:.2f}",
    }
    shown = {head: cell for head, cell in measures.items() if any(cell(run) for run in result.runs)}
    rows = []
    for run in result.runs:
        state = f"{run.state}, exit {run.exit_code}" if run.exit_code and run.state == "failed" else run.state
        cells = [*run.values.values(), str(run.steps), *(cell(run) for cell in shown.values()), state]
        rows.append([*cells, "best" if run is best else ""])
    show_tables([Table(str(result.out), [*result.heads, "steps", *shown, "state", ""], rows)])


def show_subject(result: SubjectResult) -> None:
    """Prints a learned subject and its drift report to stdout, and on a terminal what to type next."""
    facts = {
        "subject": f"{result.name}, a {result.class_word} called {result.token}",
        "file": str(result.file),
        "run": str(result.run),
        "steps": str(result.steps),
    }
    seen = result.validation
    for label, key in (("photos, loss", "val_subject_loss"), ("class, loss", "val_prior_loss")):
        if key in seen:
            facts[label] = f"{seen[key]:.4f}"
    if result.merged is not None:
        facts["merged model"] = str(result.merged)
    facts["took"] = duration(result.seconds)
    show_facts(facts)
    rows = []
    for label, name in ((result.phrase, "subject"), (f"{result.class_word}, no token", "class"), ("unrelated",) * 2):
        if f"drift_{name}_adherence" in seen:
            kept = seen.get(f"drift_{name}_agreement")
            same = "" if kept is None else f"{100 * kept:.1f} %"
            leak = seen.get("drift_class_leak") if name == "class" else None
            become = "" if leak is None else f"{100 * max(0.0, leak):.0f} %"
            rows.append([label, same, f"{100 * seen[f'drift_{name}_adherence']:.0f} %", become])
    if rows:
        print()
        heads = ["pictures", "bits unchanged", "prompt adherence", "like the subject"]
        show_tables([Table("drift from the base model", heads, rows)])
    print_error_line(f'draw it with: bitgen sample "a {result.phrase} on the moon"')
