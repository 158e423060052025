"""Captions by an endpoint: what counts as an answer, what is tried again, what is paid."""

from __future__ import annotations

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from kairos.curation import Settings, pipeline
from kairos.curation.ledger import Ledger
from kairos.curation.plugins.captions import KEY, Captions
from kairos.curation.settings import hash_of
from kairos.curation.stages.looks import Strip
from kairos.curation.views import Views
from kairos.errors import UserError


class Scripted(BaseHTTPRequestHandler):
    """A server that sends prepared bodies: an empty one drops the connection, an open one comes by half, a
    number is a status without a body."""

    bodies: list[str | int] = []
    asked: list[dict] = []

    def do_POST(self) -> None:
        type(self).asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        body = type(self).bodies.pop(0)
        if not body:
            return
        if isinstance(body, int):
            self.send_response(body)
            self.send_header("Location", "/elsewhere")
            self.send_header("Retry-After", "0")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body) + (not body.endswith(("}", "]")))))
        self.end_headers()
        self.wfile.write(body.encode())

    def do_GET(self) -> None:
        type(self).asked.append({"path": self.path, "key": self.headers["Authorization"]})

    def log_message(self, *_: object) -> None:
        pass


def answer(content, usage: object = {"total_tokens": 7}) -> str:
    return json.dumps({"choices": [{"message": {"content": content}}], "usage": usage})


@pytest.fixture
def ask():
    """Captions of one clip whose strip has four pictures, from the bodies that an endpoint sends."""
    samples = np.stack([np.full((48, 80, 3), level, np.uint8) for level in range(0, 256, 36)])
    views = Views(fps=16, frames=8, height=48, width=80, samples=samples)
    clip = {"height": 48, "width": 80, "strip": Strip(pictures=4).measure(views)["strip"]}

    def asked(*bodies: str | int, **changes) -> dict:
        Scripted.bodies, Scripted.asked = list(bodies), []
        url = f"http://127.0.0.1:{server.server_port}/v1"
        options = {"physics": False, "requests_per_minute": 6e6, "retries": 1} | changes
        ((_, found),) = Captions(model="eyes", endpoint=url, **options).ask([("aa", clip)], 0)
        return found

    with ThreadingHTTPServer(("127.0.0.1", 0), Scripted) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield asked
        server.shutdown()


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        (answer(None), 7),
        (answer(" "), 7),
        (answer('{"caption": ["a", "b"]}'), 7),
        (answer('{"domain": "human"}'), 7),
        ('{"choices": []}', 0),
        ('{"error": {"message": "none"}}', 0),
        ("[]", 0),
        ("[1]", 0),
        ('{"no": json}', 0),
    ],
)
def test_an_answer_that_is_no_caption_fails_its_clip_and_is_paid(ask, body, tokens) -> None:
    found = ask(body)
    assert found["failed"].startswith("captions: ValueError: ") or "JSON" in found["failed"]
    assert (found["tokens"], "scores" in found) == (tokens, False)


def test_an_answer_counts_what_it_says_and_is_taken_as_it_is_where_it_is_plain(ask) -> None:
    assert ask(answer("A cat\nsleeps.", None)) == {"scores": {"caption": "A cat sleeps."}, "tokens": 0}


@pytest.mark.parametrize("said", ["A ball \ud83d", '{"caption": "A ball \\ud83d"}'])
def test_an_answer_loses_half_a_character_which_no_file_can_hold(ask, said) -> None:
    assert ask(answer(said))["scores"] == {"caption": "A ball ?"}


@pytest.mark.parametrize("broken", ["", '{"choices": [{"mess'])
def test_a_connection_that_ends_early_is_tried_again(ask, broken) -> None:
    assert ask(broken, answer("A cat.")) == {"scores": {"caption": "A cat."}, "tokens": 7}
    assert "does not answer" in ask(broken, broken)["failed"]


@pytest.mark.parametrize("status", [408, 429, 503])
def test_an_endpoint_that_is_busy_or_fails_is_asked_again(ask, status) -> None:
    assert ask(status, answer("A cat.")) == {"scores": {"caption": "A cat."}, "tokens": 7}
    assert f"answered {status}" in ask(status, status)["failed"]


@pytest.mark.parametrize(
    ("body", "said"),
    [(302, "answered 302"), (401, f"set {KEY}"), (answer("x" * (1 << 20)), "more than 1 MiB")],
)
def test_an_endpoint_that_refuses_redirects_or_never_ends_is_asked_once_and_nobody_else(
    ask, monkeypatch, body, said
) -> None:
    monkeypatch.setenv(KEY, "secret")
    assert said in ask(body)["failed"]
    assert len(Scripted.asked) == 1


def test_answers_to_one_question_are_none_to_two() -> None:
    said = [
        Captions(model="m", **more).identity
        for more in ({}, {"parallel": 9}, {"physics": False}, {"max_tokens": 9})
    ]
    assert said[0] == said[1] and said[0] not in said[2:]


def test_what_a_failed_answer_cost_is_not_forgotten_and_balance_spares_no_clip_its_question(
    tmp_path, monkeypatch
) -> None:
    settings = Settings.from_dict(
        {"plugins": {"captions": {"model": "m"}}, "balance": {"domain": {"general": 0.5}}}
    )
    chosen = []
    monkeypatch.setattr(pipeline, "clip_rows", lambda *_: iter([{"clip_id": "a"}]))
    monkeypatch.setattr(pipeline, "choose", lambda rows, said: chosen.append(said.balance) or {"a": ("", "")})

    def asked(self, clips, spent):
        return [(name, {"scores": {"caption": "x"}, "tokens": 5}) for name, _ in clips]

    monkeypatch.setattr(Captions, "ask", asked)
    with Ledger(tmp_path) as ledger:
        config = hash_of(Captions(model="m").identity)
        ledger.keep("a", config, {"captions": {"failed": "captions: no", "tokens": 7}})
        pipeline._caption(ledger, settings)
        assert ledger.spent("captions", "tokens") == 12
    assert chosen == [{}]


def test_a_second_question_that_fails_or_is_not_afforded_leaves_the_first_one_paid(ask) -> None:
    failed = ask(answer("A cat."), answer(None), physics=True)
    assert (failed["tokens"], "no text" in failed["failed"]) == (14, True)
    poor = ask(answer("A cat."), physics=True, budget_tokens=5)
    assert (poor["tokens"], "the budget ended" in poor["failed"]) == (7, True)


def test_a_model_is_shown_the_pictures_that_a_strip_has_each_by_itself(ask) -> None:
    from PIL import Image

    ask(answer("A cat."))
    urls = [part["image_url"]["url"] for part in Scripted.asked[0]["messages"][0]["content"][:-1]]
    pictures = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("L")) for url in urls
    ]
    assert len(pictures) == 4
    assert max(picture.std() for picture in pictures) < 8
    assert len({round(picture.mean() / 30) for picture in pictures}) == 4


def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(ask, monkeypatch):
    monkeypatch.setenv(KEY, "secret\nsecond line")
    with pytest.raises(UserError, match=f"{KEY} must be one line") as error:
        ask(answer('{"caption": "A ball."}'))
    assert "secret" not in str(error.value)
    monkeypatch.setenv(KEY, "secret\n")  # as `echo` leaves it in a file
    assert "failed" not in ask(answer('{"caption": "A ball."}'))
