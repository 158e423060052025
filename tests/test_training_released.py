"""The shipped recipes of the 4B models run to their end, on small files under the released names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import publish
from transformers import Qwen2VLImageProcessorPil

from kairos import presets
from kairos.presets import load_pipeline
from kairos.training import steps
from kairos.training.recipe import build_recipe
from kairos.training.steps import run_recipe

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("kairos-4b*.yaml"))
SHORT = {
    "steps": 1,
    "decay_steps": 0,
    "warmup_steps": 1,
    "batch_size": 4,
    "samples_every": 0,
    "compile": False,
}
FEW = {
    "distillation": {"teacher_steps": 1, "motion_clips": 1, "fake_score_updates": 1},
    "preference": {"pairs": 2, "sampling_steps": 1},
}


@pytest.fixture
def released(huggingface, pipeline, tmp_path):
    """A small model that can be shown images, in the place of the released ones."""
    pipeline.register_modules(processor=Qwen2VLImageProcessorPil())
    for mark, token in (("image_token_id", "image_pad"), ("vision_start_token_id", "vision_start")):
        setattr(pipeline.text_encoder.config, mark, pipeline.tokenizer.convert_tokens_to_ids(f"<|{token}|>"))
    publish(huggingface, pipeline, tmp_path / "original")


def shortened(content: dict[str, Any], pipeline: Any, output: Path) -> dict[str, Any]:
    """The recipe with its stages, tasks and options, for a small model, small clips and few steps."""
    content |= {"output": str(output), "data": {"source": "simulator", "scenes": ["push"], "clips": 4}}
    if "model" in content:
        content["model"] = {
            name: value for name, value in pipeline.transformer.config.items() if name[0] != "_"
        }
    for stage in content["stages"]:
        lengths = sorted({min(bucket["frames"], 9) for bucket in stage["buckets"]})
        stage |= SHORT | {"buckets": [{"frames": frames, "height": 32, "width": 32} for frames in lengths]}
        stage.pop("data", None)
        stage.pop("accumulate", None)
        for part, few in FEW.items():
            if part in stage:
                kept = {key: value for key, value in stage[part].items() if key != "manifest"}
                stage[part] = kept | few
    return content


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_of_the_4b_models_runs_to_its_end(file, released, pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "check_memory", lambda *_: None)  # which counts the released sizes
    content = shortened(yaml.safe_load(file.read_text()), pipeline, tmp_path / "runs")
    presets.download(content["base"])
    recipe = build_recipe(content, file.stem)
    run_recipe(recipe)
    last = recipe.stages[-1]
    if last.lora is not None:
        assert (tmp_path / "runs" / last.name / "ema" / "lora.safetensors").exists()
        return
    made = load_pipeline(tmp_path / "runs" / recipe.name)
    assert made.config.prompt_template == "2026" and made.processor is not None
