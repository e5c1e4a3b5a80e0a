"""`python -m bitgen_cli` and the `bitgen` script."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bitgen_cli.errors import ExitCode


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of one command.

    Args:
        arguments: without the program's name; None takes those of the process.
    """
    try:
        from bitgen_cli.app import run
    except KeyboardInterrupt:  # also in the tenth of a second before the command line is read
        return ExitCode.INTERRUPTED
    return run(sys.argv[1:] if arguments is None else list(arguments))


if __name__ == "__main__":
    sys.exit(main())
