"""A service that is asked over HTTP, in JSON, and its key: from the environment, in no file, log or error."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from http.client import HTTPException, IncompleteRead
from typing import Any

from kairos.errors import KairosError, MachineError, UserError

MAX_BYTES = 1 << 20
MAX_REASON_BYTES = 1 << 13


class Unanswered(MachineError):
    """The service is busy, fails, or does not answer: it may another time."""

    retry_after_s: float | None = None
    """What the service asked for."""


def ask(url: str, body: dict[str, Any] | None, variable: str, deadline: float) -> Any:
    """The JSON that a service answers with, to a GET or, with a body, a POST.

    Args:
        variable: the environment variable with the service's key, where it wants one.
        deadline: when there must be an answer, by `time.monotonic()`.

    Raises:
        Unanswered: where it may answer another time.
        UserError: where it refuses, redirects, or answers something else.
    """
    headers = {"Content-Type": "application/json"} | bearer(variable)
    opener = urllib.request.build_opener(_NoRedirects)
    try:
        request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
        with opener.open(request, timeout=max(deadline - time.monotonic(), 0.1)) as response:
            content = _read(response, MAX_BYTES + 1, deadline)
    except urllib.error.HTTPError as error:
        with error:
            raise _refusal(error, url, variable, deadline) from error
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        late = isinstance(reason, TimeoutError)
        said = "took too long" if late else f"does not answer: {str(reason) or type(reason).__name__}"
        raise Unanswered(f"{url} {said}") from error
    except ValueError as error:
        raise UserError(f"{url} is not a URL that can be asked: {error}") from error
    if len(content) > MAX_BYTES:
        raise UserError(f"{url} answers with more than {MAX_BYTES >> 20} MiB; it is no chat endpoint")
    try:
        return json.loads(content)
    except ValueError as error:
        raise UserError(f"{url} does not answer with JSON; it is no OpenAI-compatible endpoint") from error


def at(answer: Any, *path: str | int) -> Any:
    """What is at `path` in an answer, None where there is nothing."""
    for step in path:
        try:
            answer = answer[step]
        except (LookupError, TypeError):
            return None
    return answer


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


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """The key goes to the endpoint that was named, nowhere else."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _read(response: Any, limit: int, deadline: float) -> bytes:
    """The answer's first bytes, `limit` at most."""
    content = b""
    while len(content) < limit and (part := response.read1(limit - len(content))):
        content += part
        if time.monotonic() > deadline:
            raise TimeoutError
    if len(content) < limit and response.length:
        raise IncompleteRead(content, response.length)
    return content


def _refusal(error: urllib.error.HTTPError, url: str, variable: str, deadline: float) -> KairosError:
    """What a status comes to that is not of success."""
    hint = f"; set {variable}" if error.code in (401, 403) else ""
    said = f"{url} answered {error.code} {error.reason}{_reason(error, variable, deadline)}{hint}"
    if error.code < 500 and error.code not in (408, 429):
        return UserError(said)
    busy, pause = Unanswered(said), error.headers.get("Retry-After", "")
    if pause.isascii() and pause.replace(".", "", 1).isdigit():  # else a date
        busy.retry_after_s = float(pause)
    return busy


def _reason(error: urllib.error.HTTPError, variable: str, deadline: float) -> str:
    """What the service itself says of its refusal, behind a colon; less the key, which it may repeat."""
    try:
        said = at(json.loads(_read(error, MAX_REASON_BYTES, deadline)), "error", "message")
    except (OSError, HTTPException, ValueError):
        said = None
    said = " ".join(said.split()) if isinstance(said, str) else ""
    for header in bearer(variable).values():
        said = said.replace(header.removeprefix("Bearer "), "...")
    return said and f": {said[:200]}"
