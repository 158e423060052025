"""Make the pictures of the README and of the model card with kairos-tiny: `python tools/readme_pictures.py`.

Seeds are 0, 1, 2, ... in order: nothing is picked by hand.
"""

from pathlib import Path

import numpy as np
import torch

from kairos.data.media import to_uint8, write_contact_sheet
from kairos.presets import load_pipeline
from kairos.worlds import SCENES, simulate

PICTURES = Path(__file__).parent.parent / "docs" / "images"
PROMPTS = (
    "a red ball rolls to the right and hits a blue ball",
    "a small green ball moves slowly to the left",
    "a large yellow ball is thrown to the right and falls to the ground",
    "an orange ball drops to the floor and bounces",
    "a purple ball on a rod swings to the right",
    "a cyan ball rolls to the right behind a wall and comes out again",
    "a pink ball rolls down a steep ramp",
    "a gripper pushes a green block to the right",
)


def main() -> None:
    pipeline = load_pipeline("kairos-tiny", device="cpu", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)

    def make(prompt: str, seed: int, **given: object) -> np.ndarray:
        generator = torch.Generator().manual_seed(seed)
        return to_uint8(pipeline(prompt, generator=generator, **given).frames[0])

    videos = [make(prompt, seed) for seed, prompt in enumerate(PROMPTS)]
    write_contact_sheet(PICTURES / "kairos-tiny.png", videos, columns=9, captions=PROMPTS, scale=1)

    rows, titles = [], []
    for scene in SCENES:
        clip = simulate(scene, split="in", seed=0, index=0)
        rows += [clip.frames, make(clip.caption, 0, video=clip.frames[:5])]
        titles += [f"simulator: {clip.caption}", "kairos-tiny from its first five frames"]
    write_contact_sheet(PICTURES / "continuation.png", rows, columns=9, captions=titles, scale=1)


if __name__ == "__main__":
    main()
