"""Loading weights: released names, inferred sizes, strictness, torn files."""

from __future__ import annotations

import json
import os
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from kairos import KairosTransformer3DModel, MachineError, UserError
from kairos.data.files import whole_files
from kairos.weights import (
    infer_transformer_config,
    load_transformer_file,
    load_vae_file,
    open_weights,
    save_folder,
    save_original,
)
from kairos.weights.fingerprint import fingerprint
from kairos.weights.lora import apply_loras, parse_lora
from kairos.weights.merge import merge_files
from kairos.weights.transformer import DIFFUSERS_FILE

GOLDEN = Path(__file__).parent / "golden"

SIZES = {
    "hidden_size": 24,
    "num_attention_heads": 2,
    "ffn_dim": 40,
    "num_layers": 4,
    "gated_delta_head_dim": 8,
    "gated_delta_expand_v": 3,
    "text_dim": 20,
    "freq_dim": 16,
}


@pytest.fixture(scope="module")
def model() -> KairosTransformer3DModel:
    torch.manual_seed(0)
    model = KairosTransformer3DModel(**SIZES)
    for parameter in model.parameters():  # nothing is left at zero
        parameter.data.normal_(std=0.1)
    return model.eval()


@pytest.fixture
def released(model, tmp_path) -> Path:
    """The model as one safetensors file, which says nothing of its configuration, as the published ones."""
    save_file(model.state_dict(), tmp_path / "dit.safetensors")
    return tmp_path / "dit.safetensors"


def output(model: KairosTransformer3DModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 16, 3, 4, 4, generator=generator)
    text = torch.randn(1, 5, 20, generator=generator)
    with torch.no_grad():
        return model(latents, torch.tensor([500.0]), text, return_dict=False)[0]


def assert_same(one: KairosTransformer3DModel, other: KairosTransformer3DModel) -> None:
    torch.testing.assert_close(output(one), output(other), atol=1e-6, rtol=0)


def refusal(load, *args, **kwargs) -> str:
    """The one line that `load` refuses with."""
    with pytest.raises(UserError) as caught:
        load(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_under_released_names_gives_the_same_model_with_sizes_read_off_its_shapes(model, released):
    loaded = load_transformer_file(released)
    assert {name: loaded.config[name] for name in SIZES} == SIZES
    assert not loaded.training and next(loaded.parameters()).requires_grad
    assert_same(loaded, model)


def test_what_shapes_do_not_tell_comes_from_the_caller(released):
    loaded = load_transformer_file(released, dilation=6, pad_dilated=False, causal="chunk")
    assert (loaded.config.dilation, loaded.config.pad_dilated, loaded.config.causal) == (6, False, "chunk")
    assert load_transformer_file(released).config.dilation == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_leaves_the_gates_exact(released, dtype):
    loaded = load_transformer_file(released, dtype=dtype)
    layer = loaded.blocks[3].gated_delta
    assert loaded.dtype == layer.q_proj.weight.dtype == dtype
    for gate in (layer.A_log, layer.dt_bias, layer.a_proj.weight, layer.b_proj.weight):
        assert gate.dtype == torch.float32


def in_both_kinds(tensors, folder: Path) -> list[Path]:
    save_file(tensors, folder / "weights.safetensors", metadata={"header": "of another length"})
    torch.save(tensors, folder / "weights.pt")
    return [folder / "weights.safetensors", folder / "weights.pt"]


def test_a_file_that_is_written_over_leaves_the_model_loaded_from_it_as_it_was(model, tmp_path):
    for file in in_both_kinds(model.state_dict(), tmp_path):
        loaded = load_transformer_file(file)
        with file.open("r+b") as opened:  # in place: what is mapped would change
            opened.write(bytes(file.stat().st_size))
        assert_same(loaded, model)


def test_loaded_tensors_begin_where_new_ones_do_so_that_the_same_weights_round_alike(model, tmp_path):
    vae = load_file(GOLDEN / "vae_weights.safetensors")
    (tmp_path / "vae").mkdir()
    loaded = [load_transformer_file(file) for file in in_both_kinds(model.state_dict(), tmp_path)]
    loaded += [load_vae_file(file) for file in in_both_kinds(vae, tmp_path / "vae")]
    for each in loaded:
        assert all(parameter.data_ptr() % 64 == 0 for parameter in each.parameters())


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "model.", "module.", "dit.", "pipe.dit.", "module.model."])
def test_torch_files_with_wrappers_and_prefixes_load_as_the_plain_file(model, tmp_path, wrapper, prefix):
    content = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    beside = {"step": torch.tensor(3), "optimizer": {"lr": 1.0}, "module": {"name": "notes"}}
    torch.save({wrapper: content} | beside if wrapper else content, tmp_path / "dit.pt")
    assert_same(load_transformer_file(tmp_path / "dit.pt"), model)


def test_a_file_in_torchs_old_format_loads_too(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_same(load_transformer_file(tmp_path / "old.pth"), model)


def in_shards(model, folder: Path, count: int = 3) -> list[Path]:
    tensors = list(model.state_dict().items())
    files = [folder / f"dit-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for i, file in enumerate(files):
        save_file(dict(tensors[i::count]), file)
    return files


def test_shards_load_from_a_list_a_folder_and_an_index(model, tmp_path):
    files = in_shards(model, tmp_path)
    for path in (files, tmp_path):
        assert_same(load_transformer_file(path), model)
    weight_map = {name: file.name for file in files for name in load_file(file)}
    (tmp_path / "dit.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "unrelated.safetensors").write_bytes(b"not read")
    for path in (tmp_path, tmp_path / "dit.safetensors.index.json"):
        assert_same(load_transformer_file(path), model)


def test_a_diffusers_folder_is_loaded_with_its_configuration(model, tmp_path):
    other = KairosTransformer3DModel.from_config(model.config, dilation=2, layer_pattern="DSSG")
    other.load_state_dict(model.state_dict())
    other.save_pretrained(tmp_path / "transformer")
    for path in (tmp_path, tmp_path / "transformer"):
        loaded = load_transformer_file(path)
        assert (loaded.config.dilation, loaded.config.layer_pattern) == (2, "DSSG")


@pytest.mark.parametrize("foreign", [{"_class_name": "WanModel", "dim": 5120}, {"model_type": "qwen2_5_vl"}])
def test_the_configuration_of_another_model_beside_the_weights_is_left_aside_and_said(
    model, released, caplog, foreign
):
    (released.parent / "config.json").write_text(json.dumps(foreign | {"dilation": 9}))
    loaded = load_transformer_file(released.parent)
    assert_same(loaded, model)
    assert loaded.config.dilation == 4
    assert "not of the LinearDiT: left aside" in caplog.text


def test_diffusers_own_way_of_loading_is_strict_too(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded, info = KairosTransformer3DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(loaded.head.head.bias, model.head.head.bias)
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    bias = tensors.pop("head.head.bias")
    save_file(tensors, file, metadata={"format": "pt"})
    assert "lacks head.head.bias" in refusal(KairosTransformer3DModel.from_pretrained, tmp_path)
    save_file(tensors | {"head.head.bias": bias, "stray": bias.clone()}, file, metadata={"format": "pt"})
    assert "has no place for stray" in refusal(KairosTransformer3DModel.from_pretrained, tmp_path)


def test_missing_shards_are_named(model, tmp_path):
    files = in_shards(model, tmp_path)
    files[1].unlink()
    assert "dit-00002-of-00003.safetensors" in refusal(load_transformer_file, tmp_path)
    (tmp_path / "dit.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": files[1].name}}))
    assert "dit-00002-of-00003.safetensors" in refusal(load_transformer_file, tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [({}, "names no shards"), ({"a": 5}, "is not an index of shards"), ([], "is not an index of shards")],
)
def test_an_index_that_is_none_is_refused(tmp_path, weight_map, message):
    index = tmp_path / "dit.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    for path in (tmp_path, index):
        assert message in refusal(load_transformer_file, path)


def test_missing_extra_and_misshapen_tensors_are_named_and_counted(model, tmp_path):
    tensors = model.state_dict()
    for i in range(3):
        del tensors[f"blocks.{i}.cross_attn.q.bias"], tensors[f"blocks.{i}.cross_attn.k.bias"]
    tensors |= {"stray": torch.zeros(3), "blocks.0.ffn.2.weight": torch.zeros(7, 40)}
    save_file(tensors, tmp_path / "dit.safetensors")
    message = refusal(load_transformer_file, tmp_path / "dit.safetensors")
    assert "dit.safetensors does not fit KairosTransformer3DModel" in message
    assert "lacks blocks.0.cross_attn.q.bias" in message and "2 more (6 in all)" in message
    assert "has stray that the model has not" in message
    assert "blocks.0.ffn.2.weight 7x40 instead of 24x40" in message


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("patch_embedding.weight", (24,)),
        ("patch_embedding.weight", (24, 16, 1, 0, 2)),
        ("head.head.weight", ()),
        ("text_embedding.0.weight", (24,)),
        ("blocks.3.gated_delta.A_log", (0,)),
        ("blocks.3.gated_delta.A_log", (2, 2)),
    ],
)
def test_a_shape_that_tells_no_size_is_refused_in_one_line(model, tmp_path, name, shape):
    save_file(model.state_dict() | {name: torch.zeros(shape)}, tmp_path / "dit.safetensors")
    assert "does not fit the model" in refusal(load_transformer_file, tmp_path / "dit.safetensors")


@pytest.mark.parametrize("pattern", ["", None, 5])
def test_a_configuration_with_no_pattern_is_refused_in_one_line(model, tmp_path, pattern):
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(written | {"layer_pattern": pattern}))
    assert "the configuration does not fit the model" in refusal(load_transformer_file, tmp_path)


def test_a_given_size_that_the_file_contradicts_is_refused(released):
    assert "has blocks.3." in refusal(load_transformer_file, released, num_layers=3)
    assert "misfit" in refusal(load_transformer_file, released, misfit=3)


def test_gated_delta_layers_elsewhere_than_the_pattern_says_are_refused_and_can_be_told(tmp_path, released):
    other = KairosTransformer3DModel(**SIZES | {"layer_pattern": "SGSG"})
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    message = refusal(load_transformer_file, tmp_path / "other.safetensors")
    assert "blocks [1, 3]" in message and "'SSDG'" in message and "'SGSG'" in message
    assert load_transformer_file(tmp_path / "other.safetensors", layer_pattern="DGSG").config.num_layers == 4


def test_a_file_of_ours_says_what_shapes_do_not_tell(tmp_path, released):
    other = {"layer_pattern": "SGSG", "causal": "chunk", "pad_dilated": False, "dilation": 2}
    model = KairosTransformer3DModel(**SIZES | other)
    save_original(model, tmp_path / "ours.safetensors")

    def read(path, **options):
        config = load_transformer_file(path, **options).config
        return {name: config[name] for name in other}

    assert read(tmp_path / "ours.safetensors") == other
    assert read(tmp_path / "ours.safetensors", otherwise={"dilation": 4}) == other
    assert read(tmp_path / "ours.safetensors", dilation=4) == other | {"dilation": 4}
    model.save_pretrained(tmp_path / "folder")
    (file,) = (tmp_path / "folder").glob("*.safetensors")  # its config.json lies beside it
    assert read(file) == other and read(released)["causal"] == "none"
    (tmp_path / "bare").mkdir()
    (tmp_path / "ours.safetensors").rename(tmp_path / "bare" / "ours.safetensors")
    assert read(tmp_path / "bare") == read([tmp_path / "bare" / "ours.safetensors"]) == other


@pytest.mark.parametrize(
    "saved", [{"max_shard_size": "20KB"}, {"safe_serialization": False}, {"variant": "ema"}]
)
def test_the_configuration_beside_files_in_diffusers_layout_is_theirs_however_they_are_named(tmp_path, saved):
    other = {"causal": "chunk", "pad_dilated": False, "dilation": 2}
    KairosTransformer3DModel(**SIZES | other).save_pretrained(tmp_path, **saved)
    files = sorted(file for file in tmp_path.iterdir() if file.suffix in (".safetensors", ".bin"))
    paths = [files, *tmp_path.glob("*.index.json")]
    if len(files) == 1:
        paths += files
        assert files[0].name != "diffusion_pytorch_model.safetensors"
    else:
        merge_files([(str(paths[-1]), 1.0)] * 2, tmp_path / "merged" / "dit.safetensors")
        paths.append(tmp_path / "merged" / "dit.safetensors")
    for path in paths:
        config = load_transformer_file(path).config
        assert {name: config[name] for name in other} == other, path


@pytest.mark.parametrize(
    "beside", ['{"_class_name": "KairosTransformer3DModel", "causal": "chunk"}', "no JSON"]
)
def test_what_merely_lies_beside_a_file_or_in_a_foreign_header_says_nothing_of_it(model, released, beside):
    released.with_name("config.json").write_text(beside)
    assert load_transformer_file(released).config.causal == "none"
    save_file(model.state_dict(), released, metadata={"config": beside.replace("Kairos", "Other")})
    assert load_transformer_file(released).config.causal == "none"


def test_weights_of_something_else_are_refused_as_such():
    message = refusal(load_transformer_file, GOLDEN / "vae_weights.safetensors")
    assert "is no LinearDiT: it lacks patch_embedding.weight" in message


def test_a_tensor_in_two_files_is_refused(released):
    released.with_name("copy.safetensors").write_bytes(released.read_bytes())
    assert "both in" in refusal(load_transformer_file, released.parent)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>Sign in</html>", "web page"),
        (b"\n <html></html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 8\n", "Git LFS pointer"),
        (b'{"error": "not found"}', "not weights"),
        (b"PK\x03\x04 torn", "not weights"),
        (b"\x80\x02torn", "not weights"),
        (bytes(64), "not weights"),
    ],
)
def test_a_file_that_is_no_weights_gets_one_clear_line(tmp_path, content, message):
    for name in ("dit.safetensors", "dit.pt"):
        (tmp_path / name).write_bytes(content)
        assert message in refusal(load_transformer_file, tmp_path / name)
        assert message in refusal(load_vae_file, tmp_path / name)


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_a_truncated_file_gets_one_clear_line(model, released, tmp_path, share):
    torch.save(model.state_dict(), tmp_path / "dit.pt")
    for file in (released, tmp_path / "dit.pt"):
        whole = file.read_bytes()
        file.write_bytes(whole[: int(len(whole) * share)])
        assert "not weights" in refusal(load_transformer_file, file)


def test_a_torch_file_that_would_run_code_is_not_loaded(tmp_path):
    torch.save({"weights": print}, tmp_path / "dit.pt")
    assert "more than plain tensors" in refusal(load_transformer_file, tmp_path / "dit.pt")
    torch.save([1, 2], tmp_path / "dit.pt")
    assert "holds a list, not named tensors" in refusal(load_transformer_file, tmp_path / "dit.pt")


def test_missing_files_and_folders_without_weights_are_refused(tmp_path):
    assert "no such file of weights" in refusal(load_transformer_file, tmp_path / "none.safetensors")
    assert "holds no .safetensors, .pt or .pth file" in refusal(load_transformer_file, tmp_path)
    assert "empty" in refusal(load_transformer_file, [])


def test_nothing_is_left_behind_where_saving_fails(model, tmp_path, monkeypatch):
    assert "cannot write" in refusal(save_original, model, tmp_path / "none" / "dit.safetensors")

    def full(tensors, path, metadata):
        path.write_bytes(b"a part")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("kairos.weights.transformer.save_file", full)
    for save, to in ((save_original, tmp_path / "dit.safetensors"), (save_folder, tmp_path)):
        with pytest.raises(MachineError, match=r"safetensors: no space left on device; free some space"):
            save(model, to)
        assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting needs root")
def test_weights_that_find_the_disk_really_full_leave_nothing(model, tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "none", tmp_path]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        for save, to in ((save_original, tmp_path / "dit.safetensors"), (save_folder, tmp_path)):
            with pytest.raises(MachineError, match="no space left"):
                save(model, to)
        with pytest.raises(MachineError, match="no space left"), whole_files(tmp_path) as made:
            model.save_pretrained(made)
        assert not list(tmp_path.iterdir())
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_files_take_their_places_in_a_folder_together_or_not_at_all(tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "checkpoint.pt").write_text("kept")
    (tmp_path / "index.json").write_text("old")
    for failure in (KeyboardInterrupt(), Exception("No space left on device (os error 28)"), None):
        now = "old" if failure else "new"
        with suppress(KeyboardInterrupt, MachineError), whole_files(tmp_path) as made:
            (made / "vae").mkdir()
            (made / "vae" / "config.json").write_text("{}")
            (made / "index.json").write_text("new")
            if failure:
                raise failure
        assert (tmp_path / "index.json").read_text() == now
        assert (tmp_path / "vae" / "config.json").exists() is (failure is None)
    assert sorted(file.name for file in tmp_path.rglob("*")) == [
        "checkpoint.pt",
        "config.json",
        "index.json",
        "vae",
    ]


def test_saved_weights_may_be_read_by_all_whom_the_umask_allows(model, tmp_path):
    before = os.umask(0o022)
    try:
        save_original(model, tmp_path / "dit.safetensors")
        save_folder(model, tmp_path / "folder")
        with whole_files(tmp_path / "saved") as made:
            model.save_pretrained(made)
    finally:
        os.umask(before)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) == 5 and {file.stat().st_mode & 0o777 for file in files} == {0o644}


def test_a_folder_of_weights_takes_the_place_of_the_shards_that_were_there(model, tmp_path):
    KairosTransformer3DModel(**SIZES).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.iterdir())) > 3
    others = ("llm-00001-of-00002.safetensors", "llm.safetensors.index.json")
    for name in others:
        (tmp_path / name).touch()
    save_folder(model, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", DIFFUSERS_FILE, *others}
    for name in others:  # whose they are, stays
        (tmp_path / name).unlink()
    assert_same(load_transformer_file(tmp_path), model)


def test_a_model_with_adapters_is_saved_under_the_released_names_once_they_are_unloaded(released, tmp_path):
    model = load_transformer_file(released)
    model.add_adapter(LoraConfig(r=2, target_modules=["q", "o_proj"], init_lora_weights=False))
    changed = output(model)
    assert "model.unload_lora()" in refusal(save_original, model, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
    model.fuse_lora()
    assert "model.unload_lora()" in refusal(save_original, model, tmp_path / "out.safetensors")
    model.unload_lora()
    save_original(model, tmp_path / "out.safetensors")
    torch.testing.assert_close(output(load_transformer_file(tmp_path / "out.safetensors")), changed)


def test_the_golden_transformer_loads_strictly_with_its_sizes(tmp_path):
    config = infer_transformer_config(open_weights(GOLDEN / "dit_weights.safetensors"))
    assert (config["hidden_size"], config["num_attention_heads"], config["num_layers"]) == (48, 2, 8)
    assert (config["gated_delta_head_dim"], config["gated_delta_expand_v"]) == (256, 2)
    assert (config["ffn_dim"], config["text_dim"], config["freq_dim"]) == (96, 40, 32)
    assert load_transformer_file(GOLDEN / "dit_weights.safetensors").config.layer_pattern == "SSDG"


def test_the_original_vae_file_loads_whatever_its_container(tmp_path):
    tensors = load_file(GOLDEN / "vae_weights.safetensors")
    torch.save(tensors, tmp_path / "Wan2.1_VAE.pth")
    video = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 1, 16, 16)
    expected = load_vae_file(GOLDEN / "vae_weights.safetensors")
    expected.save_pretrained(tmp_path / "diffusers" / "vae")
    for path in (
        tmp_path / "Wan2.1_VAE.pth",
        tmp_path,
        tmp_path / "diffusers",
        tmp_path / "diffusers" / "vae",
    ):
        loaded = load_vae_file(path)
        assert loaded.config.base_dim == 8 and loaded.config.num_res_blocks == 2
        assert torch.equal(loaded(video).sample, expected(video).sample)


def test_our_names_for_the_vae_are_those_of_diffusers_own_conversion():
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    theirs = convert_wan_vae_to_diffusers(load_file(GOLDEN / "vae_weights.safetensors"))
    ours = load_vae_file(GOLDEN / "vae_weights.safetensors").state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_a_vae_with_missing_and_extra_tensors_is_refused(tmp_path):
    tensors = load_file(GOLDEN / "vae_weights.safetensors")
    del tensors["decoder.head.2.bias"]
    save_file(tensors | {"stray": torch.zeros(1)}, tmp_path / "vae.safetensors")
    message = refusal(load_vae_file, tmp_path / "vae.safetensors")
    assert "lacks decoder.conv_out.bias" in message and "has stray" in message
    assert "is no WAN2.1 VAE" in refusal(load_vae_file, GOLDEN / "dit_weights.safetensors")


def test_a_fingerprint_is_that_of_the_model_however_it_is_compiled():
    model = KairosTransformer3DModel(**SIZES)
    name = fingerprint({"transformer": model})
    assert fingerprint({"transformer": torch.compile(model, backend="eager")}) == name
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    assert fingerprint({"transformer": model}) == name


def test_a_fingerprint_is_the_models_and_not_its_files_or_precisions(model, released):
    said = fingerprint({"transformer": model})
    assert len(said) == 16 and int(said, 16)
    assert fingerprint({"transformer": load_transformer_file(released)}) == said
    assert fingerprint({"transformer": load_transformer_file(released, dtype=torch.bfloat16)}) == said


@pytest.mark.parametrize("name", ["head.head.bias", "blocks.3.gated_delta.A_log", "patch_embedding.weight"])
def test_other_weights_and_another_configuration_have_another_fingerprint(model, released, name):
    said = fingerprint({"transformer": model})
    other = load_transformer_file(released)
    other.get_parameter(name).data *= 1.1
    assert fingerprint({"transformer": other}) != said
    assert fingerprint({"transformer": load_transformer_file(released, dilation=6)}) != said
    assert fingerprint({"vae": model}) != said


def test_a_fingerprint_reads_a_tensor_to_its_end():
    layer = torch.nn.Linear(64, 64)
    said = fingerprint({"layer": layer})
    with torch.no_grad():
        layer.weight[-1, -1] += 1
    assert fingerprint({"layer": layer}) != said


@pytest.mark.parametrize(
    ("layer", "down", "up"),
    [
        ("blocks.0.ffn.0", (2, 24), (40, 3)),
        ("blocks.0.ffn.0", (2, 25), (40, 2)),
        ("blocks.0.ffn.0", (24,), (40, 2)),
        ("blocks.0.ffn.0", (), (40, 2)),
        ("blocks.0.ffn.0", (0, 24), (40, 0)),
        ("blocks.0.ffn.0", (1, 24), (40,)),
        ("patch_embedding", (2, 16, 1, 2, 2), (24, 2, 1, 1, 1)),
    ],
)
def test_a_lora_whose_products_have_not_the_layers_shape_is_refused(model, tmp_path, layer, down, up):
    tensors = {f"{layer}.lora_A.weight": torch.ones(down), f"{layer}.lora_B.weight": torch.ones(up)}
    save_file(tensors, tmp_path / "lora.safetensors")
    message = refusal(apply_loras, model, [(tmp_path / "lora.safetensors", 1.0)])
    assert f"does not fit this model: {layer} is" in message


def test_a_lora_with_many_alphas_for_a_layer_or_under_pefts_own_names_is_refused(model, tmp_path):
    file = tmp_path / "lora.safetensors"
    layer = "blocks.0.ffn.0"
    tensors = {f"{layer}.lora_A.weight": torch.ones(2, 24), f"{layer}.lora_B.weight": torch.ones(40, 2)}
    save_file(tensors | {f"{layer}.alpha": torch.ones(1, 3)}, file)
    assert f"{layer}.alpha must be one number, got (1, 3)" in refusal(apply_loras, model, [(file, 1.0)])
    save_file({f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, file)
    assert "save it with model.save_lora_adapter" in refusal(apply_loras, model, [(file, 1.0)])


def test_a_loras_full_size_products_are_made_one_at_a_time_once_all_of_it_fits(model, released, tmp_path):
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            if function in (torch.ops.aten.mm.default, torch.ops.aten.add.Tensor):
                done.append((function.__name__, tuple(made.shape)))
            return made

    changed = load_transformer_file(released)
    layers, tensors, expected = ("blocks.0.ffn.0", "blocks.0.ffn.2", "blocks.1.ffn.0"), {}, {}
    for layer in layers:
        weight = changed.get_submodule(layer).weight
        down, up = torch.randn(2, weight.shape[1]), torch.randn(len(weight), 2)
        tensors |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
        expected[layer] = weight.detach() + 0.5 * up @ down
    done: list[tuple[str, tuple[int, ...]]] = []
    save_file(tensors, tmp_path / "good.safetensors")
    save_file(tensors | {"blocks.2.no.lora_A.weight": torch.ones(2, 24)}, tmp_path / "bad.safetensors")
    with Watch():
        assert "and the model no blocks.2.no" in refusal(
            apply_loras, changed, [(tmp_path / "good.safetensors", 0.5), (tmp_path / "bad.safetensors", 1.0)]
        )
        assert not done
        apply_loras(changed, [(tmp_path / "good.safetensors", 0.5)])
    shapes = [tuple(value.shape) for value in expected.values()]
    assert done == [(name, shape) for shape in shapes for name in ("mm.default", "add.Tensor")]
    for layer, value in expected.items():
        assert torch.equal(changed.get_submodule(layer).weight, value)


@pytest.mark.parametrize("weight", ["nan", "inf", "-inf"])
def test_a_lora_has_a_finite_weight(released, weight):
    assert "FILE:WEIGHT, a number" in refusal(parse_lora, f"{released}:{weight}")
