"""Short prompts written out by a second model, off by default: video models are trained on long captions.

The model is a local one (Qwen3-VL-8B-Instruct, as the published system has it) or any endpoint that speaks
OpenAI's chat protocol. Nothing is sampled, so that one prompt gives one text.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from urllib.parse import urldefrag, urlsplit

from kairos.endpoint import ask, at
from kairos.errors import MachineError, UserError

REWRITER = "Qwen/Qwen3-VL-8B-Instruct"
KEY_VARIABLE = "KAIROS_REWRITE_API_KEY"
MAX_TOKENS = 400

INSTRUCTION = (
    "You write prompts for a video model. Turn what the user wants into one paragraph of at most 150 words, "
    "in English, that describes a single continuous shot of a few seconds: the subjects with their colours, "
    "sizes and number; how they move and act on each other, in order, as physics has it; the surroundings; "
    "the light; the camera. Keep everything the user says and contradict none of it. "
    "Answer with the paragraph alone."
)
WITH_IMAGE = (
    " The video begins with an image that you do not see: "
    "do not invent how things look, say what happens to them."
)


class Rewriter:
    """A second model. A local one is loaded with the first prompt and kept until the end of a `with`."""

    def __init__(self, source: str, timeout_s: float = 120.0) -> None:
        """
        Args:
            source: an endpoint's base URL such as "http://127.0.0.1:8000/v1", with "#NAME" behind it to
                choose among its models (else its first); or a local model: a folder, or a name in Hugging
                Face's cache. The endpoint's key, where it wants one, is the environment variable
                KAIROS_REWRITE_API_KEY.
            timeout_s: for the whole of a prompt, but for the loading of a local model.
        """
        self.source, self.timeout_s = source, timeout_s
        self._loaded: tuple[Any, Any] | None = None

    def __enter__(self) -> Rewriter:
        return self

    def __exit__(self, *_: object) -> None:
        """Let a local model go, and what it held of a GPU: other processes may want it."""
        if self._loaded is not None:
            import torch

            self._loaded = None
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def __call__(self, prompt: str, *, with_image: bool = False) -> str:
        """The prompt, written out.

        Args:
            prompt: what the user typed; an empty one stays empty.
            with_image: the video begins with an image, which the second model does not see.

        Raises:
            UserError: for a source that cannot be used.
            MachineError: where the endpoint cannot be reached or fails, and where the answer takes too long
                or does not end.
        """
        if not prompt.strip():
            return prompt
        messages = [
            {"role": "system", "content": INSTRUCTION + WITH_IMAGE * with_image},
            {"role": "user", "content": prompt},
        ]
        if "://" in self.source:
            answer = _ask_endpoint(self.source, messages, time.monotonic() + self.timeout_s)
        else:
            answer = self._ask_local(messages)
        text = _paragraph(answer)
        if not text:
            raise MachineError(f"{self.source} gave no rewritten prompt; try again, or without rewriting")
        return text

    def _ask_local(self, messages: list[dict[str, str]]) -> str:
        import torch

        if self._loaded is None:
            self._loaded = _load(self.source)
        model, tokenizer = self._loaded
        tokens: Any = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        tokens = tokens.to(model.device)
        began = time.monotonic()
        with torch.inference_mode():
            output = model.generate(
                **tokens, max_new_tokens=MAX_TOKENS, do_sample=False, max_time=self.timeout_s
            )
        said = output[0, tokens["input_ids"].shape[1] :]
        if time.monotonic() - began > self.timeout_s:  # it stopped in the middle of what it had to say
            raise MachineError(f"{self.source} took too long; the prompt is not rewritten")
        ends = torch.as_tensor(model.generation_config.eos_token_id or []).to(said)
        if len(said) == MAX_TOKENS and not torch.isin(said[-1], ends):
            raise _cut(self.source)
        return str(tokenizer.decode(said, skip_special_tokens=True))


def _cut(model: str) -> MachineError:
    return MachineError(f"{model} had not finished after {MAX_TOKENS} tokens; take one that thinks less")


def _paragraph(answer: str) -> str:
    """The answer less thoughts, quotes and line breaks."""
    # The chat template may have written the opening tag: then the answer has the closing one alone.
    answer = answer.rpartition("</think>")[2].partition("<think>")[0]
    return " ".join(answer.split()).strip("\"'“”‘’ ")


def _ask_endpoint(source: str, messages: list[dict[str, str]], deadline: float) -> str:
    try:
        (url, model), (scheme, host, *_) = urldefrag(source), urlsplit(source)
    except ValueError:  # brackets around an address that is none
        scheme = host = ""
    if scheme not in ("http", "https") or not host:
        raise UserError(f"the endpoint must be an http or https URL, got {source!r}")
    url = url.rstrip("/")
    if not model:
        model = _picked(url, ask(f"{url}/models", None, KEY_VARIABLE, deadline), "data", 0, "id")
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": MAX_TOKENS}
    answer = ask(f"{url}/chat/completions", body, KEY_VARIABLE, deadline)
    finished = at(answer, "choices", 0, "finish_reason")  # before the text, which then may be null
    if finished == "length":  # half a prompt, or half of its thoughts
        raise _cut(f"{model} at {url}")
    if finished == "content_filter":
        raise UserError(f"the content filter of {model} at {url} cut its answer; word the prompt otherwise")
    return _picked(url, answer, "choices", 0, "message", "content")


def _picked(url: str, answer: Any, *path: str | int) -> str:
    """The text at `path` in an answer."""
    text = at(answer, *path)
    if not isinstance(text, str):
        names = ".".join(map(str, path))
        raise UserError(f"{url} answers without {names}; it is no OpenAI-compatible endpoint")
    return text


def _load(source: str) -> tuple[Any, Any]:
    """A local model and its tokenizer."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    from kairos.conditioning.loading import explained

    folder = _local_folder(source)
    with explained("prompt rewriter", source):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if not tokenizer.chat_template:
            raise UserError(f"the tokenizer of {source} has no chat template; take a model that chats")
        model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", local_files_only=True)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def _local_folder(source: str) -> str:
    """A folder as it is; a name as the folder in the Hugging Face cache that holds it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    if Path(source).is_dir():
        return source
    try:
        return snapshot_download(source, local_files_only=True)
    except LocalEntryNotFoundError as error:
        raise UserError(f"{source} is not downloaded; run: hf download {source}") from error
    except HFValidationError as error:
        raise UserError(
            f"no rewriter {source!r}: give a URL, a folder, or a name such as {REWRITER}"
        ) from error
