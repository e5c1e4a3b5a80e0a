"""The errors a user can meet, each with the exit code the command ends with."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What the shell gets back.

    Attributes:
        meaning: in a few words, as --help and the reference tell it.
    """

    meaning: str

    def __new__(cls, code: int, meaning: str) -> ExitCode:
        member = int.__new__(cls, code)
        member._value_ = code
        member.meaning = meaning
        return member

    OK = 0, "done"
    INTERNAL = 1, "internal error"
    USAGE = 2, "wrong usage or configuration"
    RESOURCES = 3, "not enough memory or disk, or no such device"
    INPUT = 4, "missing or unreadable input, or lines of it"
    DIVERGED = 5, "training diverged, or --overfit-check failed"
    INTERRUPTED = 130, "interrupted, what was done is saved"
    TERMINATED = 143, "terminated, what was done is saved"


class BitgenError(Exception):
    """One clear line for the user: what happened, where, and what to do about it.

    Args:
        message: what and where.
        hint: what to do; shown behind the message.
    """

    exit_code = ExitCode.INTERNAL

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message} ({self.hint})"


class UsageError(BitgenError):
    """The command line or a configuration is wrong."""

    exit_code = ExitCode.USAGE


class ConfigError(UsageError):
    """A configuration is wrong; carries every problem found, one line each where there are several."""

    def __init__(self, where: str, problems: list[str]) -> None:
        self.problems = problems
        lines = [f"{len(problems)} problems", *(f"  {line}" for line in problems)]
        super().__init__(f"{where}: " + (problems[0] if len(problems) == 1 else "\n".join(lines)))


class ResourceError(BitgenError):
    """Not enough memory or disk, or a device that does not exist."""

    exit_code = ExitCode.RESOURCES


class InputError(BitgenError):
    """A file or folder is missing, unreadable, or not what it should be."""

    exit_code = ExitCode.INPUT


class DivergedError(BitgenError):
    """Training produced NaN or infinity."""

    exit_code = ExitCode.DIVERGED


class Interrupted(BitgenError):
    """The user stopped the run; what was done is saved."""

    exit_code = ExitCode.INTERRUPTED


class Terminated(Interrupted):
    """Somebody ended the run with SIGTERM; what was done is saved."""

    exit_code = ExitCode.TERMINATED
