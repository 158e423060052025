"""What many tests need: the command as it is typed, and small models with random weights."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

# Two of these processes share the machine, and the models are small: threads would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def kairos(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the command in an empty folder: (exit status, stdout, stderr), with what its processes say."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        from kairos.cli import main

        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        printed = capfd.readouterr()
        assert isinstance(left.value.code, int)
        return left.value.code, printed.out, printed.err

    return run


def random_pipeline(seed: int = 0, **transformer_config):
    """A whole pipeline of a few thousand weights, 32 x 32 pixels and 9 frames by default."""
    import torch
    from diffusers import AutoencoderKLWan
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    from kairos import FlowMatchScheduler, KairosPipeline, KairosTransformer3DModel

    torch.manual_seed(seed)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
    ]
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(specials)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    text_config = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision_config = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [0],
    }
    encoder_config = Qwen2_5_VLConfig(text_config=text_config, vision_config=vision_config)
    config = {
        "hidden_size": 48,
        "num_attention_heads": 2,
        "ffn_dim": 96,
        "num_layers": 4,
        "gated_delta_head_dim": 16,
        "text_dim": 32,
        "freq_dim": 32,
    }
    transformer = KairosTransformer3DModel(**config | transformer_config).eval()
    with torch.no_grad():  # a new model is silent: its last products are zero
        for parameter in transformer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return KairosPipeline(
        transformer=transformer,
        vae=AutoencoderKLWan(base_dim=8, num_res_blocks=1).eval(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(encoder_config).eval(),
        tokenizer=tokenizer,
        scheduler=FlowMatchScheduler(),
        prompt_template="tiny",
        defaults={
            "height": 32,
            "width": 32,
            "num_frames": 9,
            "num_inference_steps": 2,
            "guidance_scale": 2.0,
        },
    )


@pytest.fixture
def pipeline():
    """A random pipeline whose progress bar is silent."""
    pipe = random_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def chunk_causal_pipeline():
    """The same, chunk-causal as kairos-tiny is."""
    pipe = random_pipeline(causal="chunk", pad_dilated=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Hub:
    """Hugging Face, as far as it is used: repositories of small files, a cache in a folder."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []
        self.failure: Exception | None = None

    def model_info(self, repo: str) -> SimpleNamespace:
        self.asked.append(repo)
        if self.failure:
            raise self.failure
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in self.repositories[repo]])

    def snapshot_download(
        self,
        repo: str,
        *,
        allow_patterns: list[str],
        local_dir: Path | None = None,
        local_files_only: bool = False,
    ) -> str:
        from fnmatch import fnmatch

        from huggingface_hub import errors

        folder = local_dir or self.cache / repo.replace("/", "--")
        if local_files_only:
            if not folder.exists():
                raise errors.LocalEntryNotFoundError("not there")
            return str(folder)
        self.asked.append(repo)
        if self.failure:
            raise self.failure
        for name, content in self.repositories[repo].items():
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)
        return str(folder)


@pytest.fixture
def huggingface(monkeypatch, tmp_path) -> Hub:
    import huggingface_hub

    fake = Hub(tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    return fake


def publish(fake: Hub, pipeline: Any, folder: Path) -> None:
    """The parts of `pipeline`, and a small VAE, under the names of the released models' repositories."""
    import torch
    from safetensors.torch import load_file, save_file

    from kairos.presets import PRESETS

    for part in filter(None, (pipeline.text_encoder, pipeline.tokenizer, pipeline.processor)):
        part.save_pretrained(folder / "encoder")
    (folder / "encoder" / "merges.txt").write_text("#version: 0.2\n")
    save_file(pipeline.transformer.state_dict(), folder / "dit.safetensors")
    torch.save(load_file(Path(__file__).parent / "golden" / "vae_weights.safetensors"), folder / "vae.pth")
    encoder = {file.name: file.read_bytes() for file in (folder / "encoder").iterdir()}
    for preset in PRESETS.values():
        if preset.kind == "released":
            fake.repositories[preset.transformer.repo] = {
                "README.md": b"",
                "kairos.safetensors": (folder / "dit.safetensors").read_bytes(),
                "assets/other.safetensors": b"not wanted",
            }
    fake.repositories["Wan-AI/Wan2.1-T2V-14B"] = {
        "Wan2.1_VAE.pth": (folder / "vae.pth").read_bytes(),
        "diffusion_pytorch_model.safetensors": b"not wanted",
    }
    fake.repositories["Qwen/Qwen2.5-VL-7B-Instruct"] = encoder
    fake.repositories["Qwen/Qwen-Image"] = {
        f"{part}/{name}": content
        for part in ("text_encoder", "tokenizer")
        for name, content in encoder.items()
    }
