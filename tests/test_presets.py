"""Models by name: what is known of them, downloads (without a network), loading, warnings."""

from __future__ import annotations

import dataclasses
import errno
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from conftest import Hub, publish
from huggingface_hub import errors

from kairos import (
    FewStepScheduler,
    KairosPipeline,
    KairosTransformer3DModel,
    MachineError,
    UserError,
    hub,
    memory,
    presets,
    sizes,
)
from kairos.conditioning import TEMPLATES
from kairos.hub import Source
from kairos.model_info import for_planning, gpu_memory_gb, info
from kairos.pipeline import far_from
from kairos.presets import PRESETS, download, get, load_pipeline, local_files
from kairos.weights import save_original

RELEASED = [preset for preset in PRESETS.values() if preset.kind == "released"]


def refusal(function, *args, error: type[Exception] = UserError, **kwargs) -> str:
    with pytest.raises(error) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def published(huggingface, pipeline, tmp_path) -> Hub:
    """The parts of `pipeline` under the names of the released models' repositories."""
    publish(huggingface, pipeline, tmp_path / "original")
    return huggingface


def test_importing_presets_imports_nothing_heavy():
    program = (
        "import sys, kairos.presets, kairos.hub\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'huggingface_hub', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'{heavy} imported' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_an_unknown_name_is_refused_with_the_nearest_one():
    assert "did you mean 'kairos-4b-480p'?" in refusal(get, "kairos-4b-480")
    assert "no model or folder 'kairos-tinny'" in refusal(load_pipeline, "kairos-tinny")


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda preset: preset.name)
def test_presets_can_be_run(preset):
    made = presets.defaults_of(preset.name)
    assert made["num_frames"] % 4 == 1 and made["height"] % 16 == made["width"] % 16 == 0
    if preset.kind == "embedded":
        assert not preset.defaults  # they stand in its folder alone
        return
    assert preset.template in TEMPLATES
    assert (preset.scheduler == "few_step") == (made["num_inference_steps"] == 4)
    with torch.device("meta"):
        KairosTransformer3DModel(num_layers=1, **preset.transformer_config)


def test_sizes_are_those_of_the_models():
    with torch.device("meta"):
        model = KairosTransformer3DModel()
        small = KairosTransformer3DModel(
            hidden_size=24,
            num_attention_heads=2,
            ffn_dim=40,
            num_layers=7,
            layer_pattern="SDG",
            gated_delta_head_dim=6,
        )
    for each in (model, small):
        assert sizes.transformer_parameters(each.config) == sum(p.numel() for p in each.parameters())
    assert {name: model.config[name] for name in sizes.RELEASED_TRANSFORMER} == sizes.RELEASED_TRANSFORMER
    assert 4.0e9 < sizes.transformer_parameters(sizes.RELEASED_TRANSFORMER) < 4.1e9


def test_the_size_of_a_state_is_that_of_a_real_one():
    model = KairosTransformer3DModel(
        hidden_size=24,
        num_attention_heads=2,
        ffn_dim=40,
        num_layers=4,
        dilation=2,
        gated_delta_head_dim=6,
        text_dim=8,
        causal="chunk",
        pad_dilated=False,
    )
    with torch.no_grad():
        state = model(
            torch.zeros(1, 16, 12, 4, 6), torch.zeros(1), torch.zeros(1, 1, 8), return_state=True
        ).state

    def tensors(value):
        if isinstance(value, torch.Tensor):
            yield value
        elif dataclasses.is_dataclass(value):
            for part in dataclasses.fields(value):
                yield from tensors(getattr(value, part.name))
        elif isinstance(value, tuple | list):
            for part in value:
                yield from tensors(part)

    carried = sum(tensor.numel() * tensor.element_size() for tensor in tensors(state))
    assert sizes.state_bytes(model.config, 6, "float32") == carried


def test_what_is_said_of_the_4b_model_follows_from_its_configuration(huggingface):
    about = info("kairos-4b-480p")
    assert about.path is None and about.tokens == 21 * 30 * 40
    assert about.repositories["vae"] == "Wan-AI/Wan2.1-T2V-14B"
    whole_gb, freed_gb = gpu_memory_gb(about, "bfloat16")
    plan = memory.plan(for_planning(about, "cuda"), memory.clip_of(about.defaults, about.scheduler), 80)
    assert whole_gb == plan.peak_gb
    assert freed_gb == plan.stages[0].peak_gb < whole_gb  # of encoding the prompt, beside all the rest
    assert gpu_memory_gb(about, "float32")[0] > whole_gb
    assert 1000 < about.state_mb("bfloat16")[0] < 3000
    assert info("kairos-4b-720p").tokens == 21 * 45 * 80
    assert not huggingface.asked


def test_the_transformers_files_are_found_by_listing():
    listed = [
        "README.md",
        "a-00001-of-00002.safetensors",
        "a-00002-of-00002.safetensors",
        "old.pt",
        "x/b.safetensors",
    ]
    assert hub.transformer_files(listed) == listed[1:3]
    assert hub.transformer_files([*listed, "a.safetensors.index.json"])[-1] == "a.safetensors.index.json"
    assert hub.transformer_files(["model.pth", "x/b.safetensors"]) == ["model.pth"]
    folder = ["transformer/config.json", "transformer/b.safetensors", "vae/c.safetensors"]
    assert hub.transformer_files(folder) == sorted(folder[:2])
    assert hub.transformer_files(["README.md", "x/y/b.safetensors"]) == []


@pytest.mark.parametrize("preset", RELEASED, ids=lambda preset: preset.name)
def test_a_downloaded_model_loads_and_makes_a_video(published, preset):
    assert f"run: kairos models download {preset.name}" in refusal(load_pipeline, preset.name)
    assert not presets.is_downloaded(preset)
    found = download(preset.name)
    assert [file.name for file in found["transformer"].iterdir()] == ["kairos.safetensors"]
    assert [file.name for file in found["vae"].iterdir()] == ["Wan2.1_VAE.pth"]
    published.asked.clear()
    pipeline = load_pipeline(preset.name, dtype=torch.float32)
    assert presets.is_downloaded(preset) and info(preset.name).path == found["transformer"]
    assert not published.asked  # no network after the download
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.config.prompt_template == preset.template
    assert pipeline.config.defaults == preset.defaults
    assert pipeline.transformer.config.dilation == 4 and pipeline.transformer.config.pad_dilated
    assert isinstance(pipeline.scheduler, FewStepScheduler) == (preset.scheduler == "few_step")
    frames = pipeline("a ball", height=32, width=32, num_frames=5, num_inference_steps=1).frames
    assert frames.shape == (1, 5, 32, 32, 3)


def test_models_are_float32_on_a_cpu_unless_said_otherwise(published):
    download("kairos-4b-480p")
    pipeline = load_pipeline("kairos-4b-480p")
    assert pipeline.transformer.dtype == pipeline.text_encoder.dtype == torch.float32
    pipeline = load_pipeline("kairos-4b-480p", dtype=torch.bfloat16)
    assert pipeline.transformer.dtype == pipeline.text_encoder.dtype == torch.bfloat16
    assert pipeline.vae.dtype == torch.float32  # a released model's own


def test_a_model_can_be_downloaded_to_a_folder_and_loaded_from_it(published, tmp_path):
    download("kairos-4b-common", tmp_path / "model")
    assert not published.cache.exists()
    pipeline = load_pipeline(tmp_path / "model", dtype=torch.float32)
    assert pipeline.config.prompt_template == "2025-12"
    assert info(tmp_path / "model").path == tmp_path / "model" / "transformer"
    (tmp_path / "model" / "vae" / "Wan2.1_VAE.pth").unlink()
    message = refusal(load_pipeline, tmp_path / "model")
    assert "vae (Wan-AI/Wan2.1-T2V-14B) missing" in message
    assert message.endswith(f"--dir {tmp_path / 'model'}")


def test_a_folder_that_holds_a_model_is_not_filled_with_another(published, tmp_path):
    download("kairos-4b-480p", tmp_path)
    before = (tmp_path / presets.MARK).read_text()
    with pytest.raises(UserError, match="holds kairos-4b-480p; give another folder for kairos-4b-720p"):
        download("kairos-4b-720p", tmp_path)
    assert (tmp_path / presets.MARK).read_text() == before
    download("kairos-4b-480p", tmp_path)  # the same one goes on


def test_a_folder_that_a_download_began_to_fill_says_what_is_missing(huggingface, tmp_path):
    huggingface.failure = errors.LocalEntryNotFoundError("not there")
    refusal(download, "kairos-4b-480p", tmp_path / "model", error=MachineError)
    message = refusal(load_pipeline, tmp_path / "model")
    assert "kairos-4b-480p is not downloaded, transformer" in message
    assert message.endswith(f"run: kairos models download kairos-4b-480p --dir {tmp_path / 'model'}")


def test_a_folder_without_a_model_hides_no_known_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    known = presets.locate("kairos-tiny")
    Path("kairos-tiny").mkdir()
    assert presets.locate("kairos-tiny") == known
    Path("kairos-tiny", "model_index.json").write_text("{}")
    assert presets.locate("kairos-tiny") == presets.Model(None, Path("kairos-tiny"))


def test_an_interrupted_download_of_shards_is_not_taken_for_a_model(huggingface, tmp_path):
    source = Source("someone/shards")
    index = json.dumps({"weight_map": {"a": "dit-1.safetensors", "b": "dit-2.safetensors"}}).encode()
    huggingface.repositories[source.repo] = {
        "dit.safetensors.index.json": index,
        "dit-1.safetensors": b"1",
        "dit-2.safetensors": b"2",
    }
    folder = hub.fetch(source)
    assert hub.find(source) == folder
    (folder / "dit-2.safetensors").unlink()
    assert hub.find(source) is None


def test_a_folder_that_cannot_be_completed_is_no_download(huggingface, monkeypatch, tmp_path):
    """The hub returns a folder that is there when it cannot be reached, and only warns."""
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, local_dir, **__: str(local_dir))
    repo = presets.WAN_VAE.repo
    assert f"to download {repo}; check the network" in refusal(
        hub.fetch, presets.WAN_VAE, tmp_path, error=MachineError
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert f"forbids downloading {repo}" in refusal(hub.fetch, presets.WAN_VAE, tmp_path)
    (tmp_path / presets.WAN_VAE.patterns[0]).touch()
    assert hub.fetch(presets.WAN_VAE, tmp_path) == tmp_path


def test_other_weights_can_take_the_place_of_a_models_own(published, pipeline, tmp_path):
    download("kairos-4b-480p")
    with torch.no_grad():
        pipeline.transformer.head.head.bias.fill_(7)
    save_original(pipeline.transformer, tmp_path / "mine.safetensors")
    (file,) = local_files(PRESETS["kairos-4b-480p"])["transformer"].iterdir()
    file.unlink()  # it is not needed
    loaded = load_pipeline("kairos-4b-480p", dtype=torch.float32, weights=tmp_path / "mine.safetensors")
    assert (loaded.transformer.head.head.bias == 7).all()


def test_other_weights_with_a_configuration_keep_it(published, pipeline, tmp_path):
    download("kairos-4b-480p")
    pipeline.save_pretrained(tmp_path / "saved")
    other = {"dilation": 2, "pad_dilated": False, "causal": "chunk"}
    KairosTransformer3DModel.from_config(pipeline.transformer.config, **other).save_pretrained(
        tmp_path / "other"
    )
    save_original(pipeline.transformer, tmp_path / "plain.safetensors")
    for name in ("kairos-4b-480p", tmp_path / "saved"):
        own = load_pipeline(name).transformer.config
        taken = load_pipeline(name, weights=tmp_path / "other").transformer.config
        assert {key: taken[key] for key in other} == other != {key: own[key] for key in other}
        plain = load_pipeline(name, weights=tmp_path / "plain.safetensors").transformer.config
        assert {key: plain[key] for key in other} == {key: own[key] for key in other}


def answered(kind: type[errors.HfHubHTTPError], message: str, status: int) -> errors.HfHubHTTPError:
    """An error of the hub's, without the HTTP library that it comes with."""
    return kind(message, response=SimpleNamespace(headers={}, status_code=status, request=None))


class ConnectError(Exception):
    """As that library raises where there is no network."""

    __module__ = "httpx"


OFFLINE = errors.LocalEntryNotFoundError("Cannot find\nanything")
OFFLINE.__cause__ = errors.OfflineModeIsEnabled("offline")


@pytest.mark.parametrize(
    ("failure", "error", "message"),
    [
        (answered(errors.GatedRepoError, "gated\n", 403), UserError, "is gated: accept its terms at"),
        (answered(errors.RepositoryNotFoundError, "404\n", 404), UserError, "no repository kairos-agi/"),
        (answered(errors.HfHubHTTPError, "500 of\nthe server", 500), MachineError, "failed: 500 of; run the"),
        (errors.LocalEntryNotFoundError("Got\nlost"), MachineError, "cannot reach https://huggingface.co"),
        (ConnectError("refused"), MachineError, "cannot reach https://huggingface.co"),
        (OFFLINE, UserError, "HF_HUB_OFFLINE forbids"),
        (errors.OfflineModeIsEnabled("offline"), UserError, "HF_HUB_OFFLINE forbids"),
        (OSError(errno.ENOSPC, "No space left on device"), MachineError, "the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "/cache"), MachineError, "Permission denied"),
    ],
)
def test_a_download_that_fails_gets_one_clear_line(huggingface, failure, error, message):
    huggingface.failure = failure
    assert message in refusal(download, "kairos-4b-480p", error=error)
    for source in (presets.WAN_VAE, PRESETS["kairos-4b-480p"].transformer):
        refusal(hub.fetch, source, error=error)


def test_a_repository_without_weights_is_refused_with_what_it_has(huggingface):
    huggingface.repositories["kairos-agi/kairos-sensenova-4B-720P"] = {
        "README.md": b"",
        "x/a.safetensors": b"",
    }
    assert "it has README.md, x/a.safetensors" in refusal(download, "kairos-4b-720p")


def test_a_saved_pipeline_loads_strictly(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    loaded = load_pipeline(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.config.defaults == pipeline.config.defaults
    for name in ("transformer", "vae", "text_encoder"):
        ours, theirs = getattr(loaded, name).state_dict(), getattr(pipeline, name).state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert load_pipeline(tmp_path, dtype=torch.bfloat16).vae.dtype == torch.bfloat16
    about = info(tmp_path)
    assert about.parameters["transformer"] == sum(p.numel() for p in pipeline.transformer.parameters())
    assert about.defaults["num_frames"] == 9 and about.template == "tiny" and about.tokens == 3 * 2 * 2

    from safetensors.torch import load_file, save_file

    (file,) = (tmp_path / "transformer").glob("*.safetensors")
    whole = file.read_bytes()
    tensors = load_file(file)
    bias = tensors.pop("head.head.bias")
    save_file(tensors | {"stray": bias}, file, metadata={"format": "pt"})
    message = refusal(load_pipeline, tmp_path)
    assert "lacks head.head.bias" in message and "has stray" in message
    file.write_bytes(whole[:-10])
    assert "only a part" in refusal(load_pipeline, tmp_path)
    file.write_bytes(whole)
    (tmp_path / "scheduler" / "scheduler_config.json").write_text("{")
    assert f"cannot load the pipeline in {tmp_path}" in refusal(load_pipeline, tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    assert "cannot read" in refusal(load_pipeline, tmp_path)


def test_a_saved_variant_is_read_where_there_are_no_plain_weights(pipeline, tmp_path):
    def bias() -> torch.Tensor:
        loaded = load_pipeline(tmp_path)
        parts = loaded.transformer.head.head, loaded.vae.decoder.conv_out, loaded.text_encoder.lm_head
        return torch.cat([part.weight.flatten() for part in parts])

    pipeline.save_pretrained(tmp_path, variant="bf16", max_shard_size="30KB")
    assert len(list(tmp_path.rglob("*.bf16-00001-of-*.safetensors"))) == 3
    own = bias()
    with torch.no_grad():
        for parameter in (p for name in presets.PARTS for p in getattr(pipeline, name).parameters()):
            parameter.mul_(2)
    pipeline.save_pretrained(tmp_path)
    assert torch.equal(bias(), 2 * own)


def test_a_pipeline_that_was_saved_without_its_text_encoder_is_refused_with_what_to_do(pipeline, tmp_path):
    pipeline.register_modules(text_encoder=None)
    pipeline.save_pretrained(tmp_path)
    message = refusal(load_pipeline, tmp_path)
    assert "saved without a text encoder" in message and "KairosPipeline.from_pretrained" in message


def test_in_float16_the_vae_is_loaded_and_planned_for_in_float32(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    loaded = load_pipeline(tmp_path, dtype=torch.float16)
    assert (loaded.transformer.dtype, loaded.vae.dtype) == (torch.float16, torch.float32)
    planned = (for_planning(info(tmp_path), "cuda", dtype).vae_dtype for dtype in ("float16", "bfloat16"))
    assert tuple(planned) == ("float32", None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "bfloat16"}, "such as torch.bfloat16, got 'bfloat16'"),
        ({"dtype": torch.int64}, "got torch.int64"),
        ({"device": "nonsense"}, "device 'nonsense' cannot be used"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used"),
    ],
)
def test_a_device_or_a_precision_that_cannot_be_used_is_refused(arguments, message):
    assert message in refusal(load_pipeline, **arguments)


def test_configurations_edited_by_hand_are_refused_in_one_line(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    index, vae = tmp_path / "model_index.json", tmp_path / "vae" / "config.json"
    whole = {file: json.loads(file.read_text()) for file in (index, vae)}
    index.write_text(json.dumps(whole[index] | {"defaults": whole[index]["defaults"] | {"height": "x"}}))
    assert "the pipeline's default height must be a number, got 'x'" in refusal(load_pipeline, tmp_path)
    for said, message in (
        ({"height": "x"}, "the pipeline's default height must be a number, got 'x'"),
        ({"num_frames": None}, "the pipeline's default num_frames must be a number, got None"),
        ({"fps": float("nan")}, "the pipeline's default fps must be a number, got nan"),
        ([480, 640], "the pipeline's defaults must be a dictionary, got [480, 640]"),
    ):
        index.write_text(json.dumps(whole[index] | {"defaults": said}))
        assert message in refusal(info, tmp_path)
    for said in ({"height": 32}, None):  # what they do not say is the released model's, as in the pipeline
        index.write_text(json.dumps(whole[index] | {"defaults": said}))
        loaded = load_pipeline(tmp_path)
        assert info(tmp_path).defaults == loaded.config.defaults == sizes.RELEASED_DEFAULTS | (said or {})
    index.write_text(json.dumps(whole[index]))
    vae.write_text(json.dumps(whole[vae] | {"base_dim": "eight"}))
    assert "the configuration fits no WAN2.1 VAE" in refusal(load_pipeline, tmp_path)


def test_what_is_no_model_is_refused(tmp_path):
    assert "model_index.json is missing" in refusal(load_pipeline, tmp_path)
    (tmp_path / "dit.safetensors").write_bytes(b"x")
    assert "is a file; give a model's name or folder" in refusal(load_pipeline, tmp_path / "dit.safetensors")


def test_parts_of_different_models_are_refused(pipeline, tmp_path):
    other = KairosTransformer3DModel.from_config(pipeline.transformer.config, text_dim=20)
    pipeline.save_pretrained(tmp_path)
    other.save_pretrained(tmp_path / "transformer")
    assert "the text encoder gives 32 numbers a token, the LinearDiT takes 20" in refusal(
        load_pipeline, tmp_path
    )


def test_an_installation_without_the_embedded_model_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(presets, "ASSETS", tmp_path)
    assert "kairos-tiny: model_index.json is missing" in refusal(load_pipeline, "kairos-tiny")
    assert not presets.is_downloaded(PRESETS["kairos-tiny"])


@pytest.mark.parametrize(
    ("size", "warnings"),
    [
        ((480, 640, 81), []),
        ((464, 832, 81), []),
        ((480, 640, 121), []),
        ((64, 64, 33), ["64 x 64 is 0.013 times the area"]),
        ((1080, 1920, 81), ["1080 x 1920 is 6.8 times the area"]),
        ((960, 320, 81), ["960 x 320 has another shape"]),
        ((480, 640, 241), ["241 frames are many more"]),
        ((480, 640, 5), ["5 frames are far fewer"]),
    ],
)
def test_requests_far_from_what_a_model_was_made_for_are_warned_of(size, warnings):
    height, width, num_frames = size
    said = far_from(PRESETS["kairos-4b-480p"].defaults, height=height, width=width, num_frames=num_frames)
    assert len(said) == len(warnings)
    assert all(warning in line for warning, line in zip(warnings, said, strict=True))


def test_files_of_a_preset_are_named_where_they_are_missing(huggingface):
    message = refusal(local_files, PRESETS["kairos-4b-480p"])
    assert "transformer (kairos-agi/kairos-sensenova-4B-480P-pretrained)" in message
    assert "text encoder (Qwen/Qwen2.5-VL-7B-Instruct) missing" in message


def test_a_saved_pipeline_is_a_plain_diffusers_pipeline(pipeline, tmp_path):
    load_pipeline_from = tmp_path / "saved"
    pipeline.save_pretrained(load_pipeline_from)
    assert isinstance(load_pipeline(load_pipeline_from), KairosPipeline)
