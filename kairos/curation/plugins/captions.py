"""Captions, tags and the physics of a clip by a vision-language model: a local one, or an endpoint.

The pictures of each clip's strip are sent with two questions. Asked is only about clips that are kept, in the
process that runs the curation; answers go to the ledger, so that none is paid for twice.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, ClassVar

from kairos.curation.settings import check_positive
from kairos.curation.vocabulary import DOMAINS, EVENTS
from kairos.endpoint import Unanswered, ask, bearer
from kairos.errors import UserError

logger = logging.getLogger(__name__)

KEY = "KAIROS_CAPTION_API_KEY"
"""The environment variable with the endpoint's key; without it none is sent."""

CAPTION = (
    "These pictures are moments of one video, in order. Answer with one JSON object: "
    '"caption": two to four sentences on subject, motion, setting, camera and light; '
    f'"domain": one of {", ".join(DOMAINS)}; "events": a list of those that happen of {", ".join(EVENTS)}.'
)
PHYSICS = (
    "These pictures are moments of one video, in order, tagged {tags}. Name in one or two sentences the "
    "physical principles that govern what moves, and what they make happen. Answer with the sentences only."
)


class Spent(Exception):
    """The budget is used up."""


@dataclass(frozen=True)
class Captions:
    """`endpoint` is an OpenAI-compatible server, up to and with /v1; without it `model` is local."""

    name: ClassVar[str] = "captions"
    version: ClassVar[int] = 1
    inputs: ClassVar[tuple[str, ...]] = ("strip",)
    outputs: ClassVar[tuple[str, ...]] = ("caption", "domain", "events", "physics_caption")
    scores_clips: ClassVar[bool] = False
    model: str = ""
    endpoint: str = ""
    physics: bool = True  # whether the second question is asked
    requests_per_minute: float = 60.0
    parallel: int = 4
    retries: int = 5
    timeout_s: float = 120.0
    max_tokens: int = 400  # of an answer
    budget_tokens: int = 1_000_000  # of questions and answers, over all runs into one output

    def __post_init__(self) -> None:
        if not self.model:
            raise UserError("model is missing; give a folder, or the name that the endpoint knows")
        if self.endpoint and not self.endpoint.startswith(("http://", "https://")):
            raise UserError(f"endpoint must begin with http:// or https://, got {self.endpoint!r}")
        check_positive(self, but=("retries",))

    @property
    def identity(self) -> dict[str, Any]:
        """What an answer depends on: another rate or budget asks nothing again."""
        return {
            "model": self.model,
            "physics": self.physics,
            "max_tokens": self.max_tokens,
            "version": self.version,
        }

    def ask(
        self, clips: Iterable[tuple[str, Mapping[str, Any]]], spent: int
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """(clip_id, {"scores" or "failed", "tokens"}) for each clip, while the budget lasts."""
        if self.endpoint:
            bearer(KEY)  # one that cannot be sent ends the run, not each clip
        budget = _Budget(self.budget_tokens - spent, self.requests_per_minute if self.endpoint else 0)
        waiting = iter(clips)
        with ThreadPoolExecutor(self.parallel if self.endpoint else 1) as pool:
            while batch := list(islice(waiting, 4 * self.parallel)):
                for (clip_id, _), answer in zip(
                    batch, pool.map(lambda c: self._about(c[1], budget), batch), strict=True
                ):
                    if answer is not None:
                        yield clip_id, answer
                if budget.spent_up:
                    logger.warning(
                        "captions: the budget of %d tokens is used up; other clips keep their plain captions",
                        self.budget_tokens,
                    )
                    return

    def _about(self, row: Mapping[str, Any], budget: _Budget) -> dict[str, Any] | None:
        tokens = 0  # also of an answer that is of no use: it was paid for
        try:
            pictures = _pictures(row["strip"], row["width"] / row["height"])
            said, tokens = self._answer(pictures, CAPTION, budget)
            found = _read(said)
            if self.physics:
                tags = ", ".join(found.get("events") or row.get("events") or ()) or "with no event"
                said, more = self._answer(pictures, PHYSICS.format(tags=tags), budget)
                tokens += more
                found["physics_caption"] = _text(said)
            return {"scores": found, "tokens": tokens}
        except Spent:
            if not tokens:
                return None
            return {"failed": "captions: the budget ended between its two questions", "tokens": tokens}
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            said = " ".join(str(error).split())[:160]
            return {"failed": f"captions: {type(error).__name__}: {said}", "tokens": tokens}

    def _answer(self, pictures: list[bytes], prompt: str, budget: _Budget) -> tuple[Any, int]:
        """What was said, which need not be a text, and its tokens."""
        budget.wait()
        said, tokens = (
            self._from_endpoint(pictures, prompt) if self.endpoint else self._from_here(pictures, prompt)
        )
        budget.spend(tokens)
        return said, tokens

    def _from_endpoint(self, pictures: list[bytes], prompt: str) -> tuple[Any, int]:
        content: list[dict[str, Any]] = [
            {
                "type": "image_url",
                "image_url": {"url": f"data:image/jpeg;base64,{base64.b64encode(p).decode()}"},
            }
            for p in pictures
        ]
        body = {
            "model": self.model,
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "messages": [{"role": "user", "content": [*content, {"type": "text", "text": prompt}]}],
        }
        url = self.endpoint.rstrip("/") + "/chat/completions"
        for attempt in range(self.retries + 1):
            try:
                answer = ask(url, body, KEY, time.monotonic() + self.timeout_s)
                break
            except Unanswered as error:
                if attempt == self.retries:
                    raise
                told = error.retry_after_s
                time.sleep(min(30.0, 0.5 * 2**attempt) if told is None else told)
        try:
            said = answer["choices"][0]["message"]["content"]
            tokens = (answer.get("usage") or {}).get("total_tokens") or 0
            return said, int(tokens)
        except (KeyError, IndexError, TypeError, AttributeError, OverflowError):
            raise ValueError(f"{url} answered no chat completion: {json.dumps(answer)}") from None

    def _from_here(self, pictures: list[bytes], prompt: str) -> tuple[str, int]:
        from PIL import Image

        model, processor = _local(self.model)
        images = [
            {"type": "image", "image": Image.open(io.BytesIO(picture)).convert("RGB")} for picture in pictures
        ]
        messages = [{"role": "user", "content": [*images, {"type": "text", "text": prompt}]}]
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(model.device)
        tokens = model.generate(**inputs, max_new_tokens=self.max_tokens, do_sample=False)
        asked = inputs["input_ids"].shape[1]
        return processor.decode(tokens[0, asked:], skip_special_tokens=True), int(tokens.shape[1])


class _Budget:
    """Tokens that are left and the pace of requests, for all threads."""

    def __init__(self, tokens: int, requests_per_minute: float) -> None:
        self._left = tokens
        self._apart_s = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._next = time.monotonic()
        self._lock = threading.Lock()

    @property
    def spent_up(self) -> bool:
        return self._left <= 0

    def wait(self) -> None:
        """Until the next request may go out. Raises Spent where none may any more."""
        with self._lock:
            if self._left <= 0:
                raise Spent
            now = time.monotonic()
            pause = max(0.0, self._next - now)
            self._next = max(self._next, now) + self._apart_s
        time.sleep(pause)

    def spend(self, tokens: int) -> None:
        with self._lock:
            self._left -= tokens


def _pictures(strip: str, aspect: float) -> list[bytes]:
    """The strip's pictures, each a JPEG; `aspect` is the width of one, its height 1."""
    from PIL import Image

    whole = Image.open(io.BytesIO(base64.b64decode(strip)))
    count = max(1, round(whole.width / (whole.height * aspect)))
    width = whole.width // count
    parts = []
    for column in range(count):
        buffer = io.BytesIO()
        whole.crop((column * width, 0, (column + 1) * width, whole.height)).save(buffer, "JPEG", quality=90)
        parts.append(buffer.getvalue())
    return parts


def _text(said: Any) -> str:
    """A text without line breaks and halves of characters. Raises ValueError for what is none."""
    if not isinstance(said, str) or not said.strip():
        raise ValueError(f"the answer is no text: {said!r}")
    return " ".join(said.split()).encode(errors="replace").decode()


def _read(said: Any) -> dict[str, Any]:
    """The JSON object in an answer, its tags checked; of an answer that is none, its text as the caption.

    Raises ValueError where there is no caption.
    """
    text = _text(said)
    begin, end = text.find("{"), text.rfind("}")
    try:
        content = json.loads(text[begin : end + 1]) if 0 <= begin < end else {"caption": text}
    except json.JSONDecodeError:
        content = {"caption": text}
    found: dict[str, Any] = {"caption": _text(content.get("caption"))}
    if content.get("domain") in DOMAINS:
        found["domain"] = content["domain"]
    if isinstance(content.get("events"), list):
        found["events"] = [tag for tag in EVENTS if tag in content["events"]]
    return found


@lru_cache(maxsize=1)
def _local(name: str) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    return AutoModelForImageTextToText.from_pretrained(name).eval(), AutoProcessor.from_pretrained(name)
