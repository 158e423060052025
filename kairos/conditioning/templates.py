"""The chats that prompts are put into before the vision-language model reads them.

The released models were trained with these words to the letter. The system message's tokens are dropped from
the embeddings; it only sets what the encoder attends to. The layout is Qwen-Image's (arXiv 2508.02324).
"""

from __future__ import annotations

from dataclasses import dataclass

_DESCRIBE_IMAGE = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships "
    "of the objects and background:"
)
_DESCRIBE_VIDEO = (
    "Describe the video by detailing the following aspects: "
    "1. The main content and theme of the video. "
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects. "
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects. "
    "4. background environment, light, style and atmosphere. "
    "5. camera angles, movements, and transitions used in the video:"
)


@dataclass(frozen=True)
class PromptTemplate:
    """A chat with a place for the prompt, and what of it reaches the LinearDiT.

    Attributes:
        prefix, suffix: the text before and after the prompt.
        drop_tokens: tokens of the prefix in Qwen2.5's vocabulary; they are not passed on.
        max_tokens: at most so many are passed on, picture, prompt and suffix together.
        image_in_prompt: the given image stands before the prompt.
        lead_with_image: a sentence put before the prompt where there is an image too.
    """

    name: str
    prefix: str
    suffix: str
    drop_tokens: int
    max_tokens: int
    image_in_prompt: bool = False
    lead_with_image: str = ""


def _chat(name: str, system: str, drop_tokens: int, max_tokens: int, **more: object) -> PromptTemplate:
    return PromptTemplate(
        name=name,
        prefix=f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n",
        suffix="<|im_end|>\n<|im_start|>assistant\n",
        drop_tokens=drop_tokens,
        max_tokens=max_tokens,
        **more,  # type: ignore[arg-type]
    )


TEMPLATES: dict[str, PromptTemplate] = {
    template.name: template
    for template in (
        _chat("2025-12", _DESCRIBE_IMAGE, drop_tokens=34, max_tokens=384),
        _chat(
            "2026",
            _DESCRIBE_VIDEO,
            drop_tokens=97,
            max_tokens=1024 - 97,  # 1,024 with the prefix
            image_in_prompt=True,
            lead_with_image=(
                "high-quality video, realistic motion, single continuous shot, no jump cuts, smooth motion. "
            ),
        ),
        PromptTemplate("tiny", prefix="<|im_start|>", suffix="<|im_end|>", drop_tokens=1, max_tokens=64),
    )
}
"""The December 2025 release, the checkpoints of 2026, and kairos-tiny."""
