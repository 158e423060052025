"""Keys of services, from environment variables: they stand in no file, no log and no error."""

from __future__ import annotations

import os

from kairos.errors import UserError


def bearer(variable: str) -> dict[str, str]:
    """The HTTP header with the key that an environment variable holds; none where it is not set.

    Raises UserError for a key that no header can hold, without showing it: an HTTP library would.
    """
    key = os.environ.get(variable, "").strip()
    if not key:
        return {}
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"{variable} must be one line of printable ASCII, and is not; set it anew")
    return {"Authorization": f"Bearer {key}"}
