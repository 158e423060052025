"""The errors that Kairos raises on purpose: one clear line, with the value, the rule and the fix."""

from collections.abc import Sequence


class KairosError(Exception):
    """Base of every error that Kairos raises on purpose."""


class UserError(KairosError, ValueError):
    """The input cannot be used. The message gives the value, the rule and the fix. Exit status 2."""


class MachineError(KairosError, RuntimeError):
    """The input is fine, the machine failed: a full disk, too little memory. Exit status 1."""


def one_line(error: BaseException) -> str:
    """The first line of what a library says, for a message of our own."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def listed(names: Sequence[str]) -> str:
    """The first four names, and how many there are where that is more."""
    shown, more = ", ".join(names[:4]), len(names) - 4
    return shown if more <= 0 else f"{shown} and {more} more ({len(names)} in all)"
