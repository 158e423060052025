"""The errors that Kairos raises on purpose: one clear line, with the value, the rule and the fix."""


class KairosError(Exception):
    """Base of every error that Kairos raises on purpose."""


class UserError(KairosError, ValueError):
    """The input cannot be used. The message gives the value, the rule and the fix. Exit status 2."""


class MachineError(KairosError, RuntimeError):
    """The input is fine, the machine failed: a full disk, too little memory. Exit status 1."""
