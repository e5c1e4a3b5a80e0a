"""`python -m bitgen_cli` and the `bitgen` script."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence

from bitgen_cli.errors import ExitCode

GARBAGE_COLLECTION = (200_000, 20, 100)
"""Objects made before the youngest are looked through, and how many such looks before older ones are."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of one command.

    Args:
        arguments: without the program's name; None takes those of the process.
    """
    # importing torch and transformers makes millions of objects that stay: looking through them again and again for
    # garbage is a quarter of the time from the command to the picture
    gc.set_threshold(*GARBAGE_COLLECTION)
    _open_streams()
    try:
        from bitgen_cli.app import run
    except KeyboardInterrupt:  # also in the tenth of a second before the command line is read
        return ExitCode.INTERRUPTED
    return run(sys.argv[1:] if arguments is None else list(arguments))


def _open_streams() -> None:
    """Gives the process streams that it was started without: then there is nothing to read, and nobody who reads."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  until the process ends


if __name__ == "__main__":
    sys.exit(main())
