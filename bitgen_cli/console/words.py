"""Times, speeds and measurements in words."""

from __future__ import annotations

from collections.abc import Mapping

SLOW = 0.1
"""Units per second below which it is told how long each takes."""
ACCURACY, HELD_OUT = "bit_accuracy/", "val_bit_accuracy/"
"""Before the number of a scale, the names of its measurements."""
_APART = ("images_per_second", "seconds_left", "epoch")


def duration(seconds: float) -> str:
    """Seconds in words of at most two units, such as "3 min 5 s"; "?" where it is not known."""
    if not 0 <= seconds < float("inf"):
        return "?"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for size, name, smaller, small_name in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= size:
            rest = whole % size // smaller
            return f"{whole // size} {name}" + (f" {rest} {small_name}" if rest else "")
    return f"{whole} s"


def pace(speed: float) -> str:
    """Units per second, or how long each takes where that is long."""
    return f"{speed:.1f}/s" if speed >= SLOW else f"{duration(1 / speed) if speed > 0 else '?'} each"


def per_scale(values: Mapping[str, float], prefix: str) -> list[float]:
    """The values of `prefix0`, `prefix1` ... in that order."""
    found = {int(key[len(prefix) :]): value for key, value in values.items() if key.startswith(prefix)}
    return [found[number] for number in sorted(found)]


def shown_by_name(key: str) -> bool:
    """Whether a measurement is shown by its name: not one of a single scale, nor one with its own place."""
    return "/" not in key and key not in _APART


def name_of(key: str) -> str:
    """The name of a measurement for people."""
    held_out = key.startswith("val_")
    first, *rest = key.removeprefix("val_").split("_")
    name = " ".join(({"psnr": "PSNR", "ssim": "SSIM", "l1": "L1", "l2": "L2"}.get(first, first), *rest))
    return f"held-out {name}" if held_out else name


def number_of(key: str, value: float) -> str:
    """The value of a measurement with as many digits as say something."""
    return f"{value:.2e}" if key == "learning_rate" else f"{value:.4f}"
