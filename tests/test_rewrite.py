"""Rewriting of prompts: a stub endpoint on the loopback address, a small local model, failures."""

from __future__ import annotations

import json
import threading
import time
import weakref
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from kairos import MachineError, UserError
from kairos.conditioning.rewrite import Rewriter


class Stub(ThreadingHTTPServer):
    """Answers as told, and keeps what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict, str | None]] = []
        self.status, self.delay_s, self.answer, self.finished = 200, 0.0, "A red ball rolls.", "stop"
        self.raw: bytes | None = None
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Stub

    def do_GET(self) -> None:
        self.reply({"data": [{"id": "first-model"}, {"id": "second-model"}]}, {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        choice = {"message": {"content": self.server.answer}, "finish_reason": self.server.finished}
        self.reply({"choices": [choice]}, body)

    def reply(self, answer: dict, body: dict) -> None:
        self.server.asked.append((self.path, body, self.headers["Authorization"]))
        time.sleep(self.server.delay_s)
        content = json.dumps(answer).encode() if self.server.raw is None else self.server.raw
        try:
            self.send_response(self.server.status)
            if 300 <= self.server.status < 400:
                self.send_header("Location", self.server.url + "/elsewhere")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        except OSError:
            pass  # it did not wait

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def stub(monkeypatch) -> Iterator[Stub]:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("KAIROS_REWRITE_API_KEY", raising=False)
    with Stub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def refusal(error: type[Exception], source: str, **options) -> str:
    with pytest.raises(error) as caught:
        Rewriter(source, **options)("a ball")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_endpoint_writes_the_prompt_out_with_its_first_model(stub):
    stub.answer = '<think>rolling,\nsurely</think>\n"A red ball\nrolls  along."'
    assert Rewriter(stub.url)("a ball") == "A red ball rolls along."
    (path, _, _), (chat, body, key) = stub.asked
    assert (path, chat, key) == ("/v1/models", "/v1/chat/completions", None)
    assert body["model"] == "first-model" and body["temperature"] == 0
    assert body["messages"][1] == {"role": "user", "content": "a ball"}
    assert "image" not in body["messages"][0]["content"]


def test_the_model_the_key_and_an_image_are_told_to_the_endpoint(stub, monkeypatch):
    monkeypatch.setenv("KAIROS_REWRITE_API_KEY", "secret")
    Rewriter(stub.url + "/#second-model")("a ball", with_image=True)
    ((_, body, key),) = stub.asked
    assert (body["model"], key) == ("second-model", "Bearer secret")
    assert "begins with an image" in body["messages"][0]["content"]


def test_a_key_loses_the_line_break_that_a_file_ends_in(stub, monkeypatch):
    monkeypatch.setenv("KAIROS_REWRITE_API_KEY", "secret\n")
    Rewriter(stub.url + "#m")("a ball")
    assert stub.asked[0][2] == "Bearer secret"


@pytest.mark.parametrize("key", ["secret\nsecret", "secr\u00e9t", "secret\x01"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(stub, monkeypatch, key):
    monkeypatch.setenv("KAIROS_REWRITE_API_KEY", key)
    message = refusal(UserError, stub.url + "#m")
    assert "KAIROS_REWRITE_API_KEY must be one line of printable ASCII" in message
    assert "secr" not in message and not stub.asked


def test_thoughts_whose_opening_tag_the_template_wrote_are_no_part_of_the_prompt(stub):
    stub.answer = "The user wants a ball.\n</think>\n\nA red ball rolls."
    assert Rewriter(stub.url + "#m")("a ball") == "A red ball rolls."


@pytest.mark.parametrize("answer", ["The user wants a ball, so", None])  # None: only thoughts, kept apart
def test_an_answer_that_was_cut_is_no_prompt(stub, answer):
    stub.answer, stub.finished = answer, "length"
    assert "m at " in (message := refusal(MachineError, stub.url + "#m"))
    assert "had not finished after 400 tokens" in message


def test_an_answer_that_a_filter_cut_is_no_prompt(stub):
    stub.answer, stub.finished = "A red ba", "content_filter"
    assert "the content filter of m at" in refusal(UserError, stub.url + "#m")


def test_an_empty_prompt_stays_empty_and_nobody_is_asked(stub):
    assert Rewriter(stub.url)("") == ""
    assert not stub.asked


def test_an_endpoint_that_hangs_is_given_up_after_the_time(stub):
    stub.delay_s = 1.0
    start = time.monotonic()
    assert "took too long" in refusal(MachineError, stub.url + "#m", timeout_s=0.2)
    assert time.monotonic() - start < 0.9


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        (401, UserError, "401 Unauthorized; set KAIROS_REWRITE_API_KEY"),
        (404, UserError, "404 Not Found"),
        (307, UserError, "307 Temporary Redirect"),
        (429, MachineError, "429 Too Many Requests"),
        (503, MachineError, "503 Service Unavailable"),
    ],
)
def test_a_refusing_endpoint_gets_one_clear_line(stub, status, error, message):
    stub.status = status
    assert message in refusal(error, stub.url + "#m")
    assert len(stub.asked) == 1  # redirects are not followed, so the key stays here


def test_why_an_endpoint_refuses_is_said_in_its_own_words_without_the_key(stub, monkeypatch):
    monkeypatch.setenv("KAIROS_REWRITE_API_KEY", "secret")
    stub.status = 400
    stub.raw = json.dumps({"error": {"message": "no parameter\n'max_tokens', secret " + "x" * 300}}).encode()
    message = refusal(UserError, stub.url + "#m")
    assert "answered 400 Bad Request: no parameter 'max_tokens', ... xxx" in message
    assert len(message) < 300 and "secret" not in message
    for raw in (b"<html>", b'{"error": "no"}', b'{"error": {"message": 3}}', b" " * (1 << 21)):
        stub.raw = raw
        assert refusal(UserError, stub.url + "#m").endswith("answered 400 Bad Request")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"<html>", "does not answer with JSON"),
        (b"[]", "without choices.0.message.content"),
        (b'{"choices": []}', "without choices.0.message.content"),
        (b" " * (1 << 21), "more than 1 MiB"),
    ],
)
def test_an_answer_in_another_form_is_refused(stub, raw, message):
    stub.raw = raw
    assert message in refusal(UserError, stub.url + "#m")


def test_an_empty_answer_is_a_failure(stub):
    stub.answer = "<think>hm"
    assert "gave no rewritten prompt" in refusal(MachineError, stub.url)


def test_endpoints_that_are_not_there_or_no_urls_are_refused(stub):
    url = stub.url
    stub.server_close()
    assert "does not answer" in refusal(MachineError, url)
    assert "must be an http or https URL" in refusal(UserError, "file:///etc/passwd")
    assert "must be an http or https URL" in refusal(UserError, "http://")
    assert "must be an http or https URL, got 'http://[::1/v1'" in refusal(UserError, "http://[::1/v1")


@pytest.fixture
def local_model(tmp_path, monkeypatch):
    """A Qwen3-VL with random weights and a chat template; its answers end with their twelfth token."""
    monkeypatch.setattr("kairos.conditioning.rewrite.MAX_TOKENS", 12)
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}answer:"
    tokenizer.save_pretrained(tmp_path)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 1, "out_hidden_size": 32}
    torch.manual_seed(0)
    config = Qwen3VLConfig(text_config=text, vision_config=vision | {"deepstack_visual_indexes": [0]})
    model = Qwen3VLForConditionalGeneration(config)
    model.generation_config.forced_eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(tmp_path)
    return tmp_path


def set_generation(local_model, **options):
    """Write `options` into what the model says of how it generates."""
    settings = local_model / "generation_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | options))


def test_a_local_model_that_samples_writes_the_same_text_each_time_and_is_loaded_once(local_model):
    set_generation(local_model, do_sample=True, temperature=5.0)
    rewriter = Rewriter(str(local_model))
    text = rewriter("a ball")
    assert text and "You write prompts" not in text
    assert text == Rewriter(str(local_model))("a ball")
    (local_model / "model.safetensors").unlink()
    assert rewriter("a ball") == text


def test_a_local_model_and_its_memory_on_a_gpu_are_let_go(local_model, monkeypatch):
    left = []
    with Rewriter(str(local_model)) as rewriter:
        rewriter("a ball")
        model = weakref.ref(rewriter._loaded[0])
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: left.append(model()))
    assert left == [None]


def test_a_local_answer_that_was_cut_is_no_prompt(local_model):
    set_generation(local_model, forced_eos_token_id=None)
    assert "had not finished after 12 tokens" in refusal(MachineError, str(local_model))


def test_a_local_model_that_is_not_done_in_time_is_given_up(local_model):
    assert "took too long" in refusal(MachineError, str(local_model), timeout_s=0.001)


def test_local_models_that_are_missing_or_cannot_chat_are_refused(local_model):
    assert "run: hf download nobody/nothing" in refusal(UserError, "nobody/nothing")
    assert "no rewriter 'a/b/c'" in refusal(UserError, "a/b/c")
    (local_model / "chat_template.jinja").unlink()
    assert "has no chat template" in refusal(UserError, str(local_model))
    (local_model / "model.safetensors").unlink()
    (local_model / "chat_template.jinja").write_text("{{ messages }}")
    assert "cannot load the prompt rewriter" in refusal(UserError, str(local_model))
