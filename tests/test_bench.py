"""The benchmark measures what it says, and refuses what it cannot."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from kairos import bench, presets
from kairos.bench import (
    DIFFUSERS,
    QWEN_7B,
    Run,
    built,
    calibrate_step_cache,
    check_kind,
    counted_flops,
    measure,
    measure_here,
    random_transformer,
)
from kairos.cli import main
from kairos.cli.bench import curve_svg, hardware
from kairos.errors import MachineError, UserError
from kairos.models.gated_delta_net import PRECISE
from kairos.process import peak_gb
from kairos.training.vae import build_vae

SMALL = {"model": "kairos-tiny", "height": 32, "width": 32, "runs": 1}


def test_the_stages_of_a_video_are_timed_apart():
    found = measure_here(Run("stages", latent_frames=2, **SMALL))
    assert list(found["stages"]) == [
        "encode prompt",
        "encode a frame",
        "one step, one branch",
        "decode frames",
    ]
    assert all(times["seconds"] > 0 and times["share_of_peak"] > 0 for times in found["stages"].values())
    assert found["peak_gb"] > 0 and found["weights"] == "the model's"
    # Five frames: about 0.9 GFLOP, nearly all in convolutions.
    assert 0.5e-3 < found["stages"]["decode frames"]["tflop"] < 2e-3


def test_a_system_that_tells_no_peak_of_memory_can_time_models():
    program = (
        "import sys; sys.modules['resource'] = None\n"  # as on Windows
        "import kairos.bench, kairos.process\n"
        "assert kairos.process.peak_gb() is None"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert 0.01 < (peak_gb() or 0) < 1000


@pytest.mark.parametrize("kind", ["stages", "hybrid", "full"])
def test_blocks_are_compiled_before_they_are_timed_where_that_is_asked_for(kind, monkeypatch):
    compiled: list[int] = []
    monkeypatch.setattr(
        "kairos.models.compiled.compile_blocks", lambda model: compiled.append(len(model.blocks))
    )
    measure_here(Run(kind, latent_frames=1, **SMALL))
    assert not compiled
    measure_here(Run(kind, latent_frames=1, **SMALL, compiled=True))
    assert compiled == [8]


def test_a_model_that_is_not_here_is_timed_with_random_weights(monkeypatch):
    text = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 50}
    text |= {"num_attention_heads": 1, "num_key_value_heads": 1}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 1, "out_hidden_size": 128}
    small = {
        kind: QWEN_7B[kind] | sizes for kind, sizes in (("text_config", text), ("vision_config", vision))
    }
    monkeypatch.setattr(bench, "QWEN_7B", QWEN_7B | small)
    monkeypatch.setattr(
        bench, "random_transformer", lambda *_, **__: random_transformer("kairos-tiny", full=False)
    )
    monkeypatch.setattr("diffusers.AutoencoderKLWan", lambda: build_vae(base_dim=8))
    monkeypatch.setattr(presets, "is_downloaded", lambda preset: False)
    found = measure_here(Run("stages", latent_frames=1, **SMALL | {"model": "kairos-4b-480p"}))
    assert found["weights"] == "random"
    assert all(times["seconds"] > 0 for times in found["stages"].values())


def test_a_model_is_made_in_its_dtype_at_once_and_its_gates_in_theirs():
    seen: list[torch.dtype] = []

    def make() -> torch.nn.Module:
        model = random_transformer("kairos-tiny", full=False)
        seen.append(model.blocks[0].ffn[0].weight.dtype)
        return model

    model = built(make, "cpu", torch.bfloat16)
    kinds = {name: parameter.dtype for name, parameter in model.named_parameters()}
    gates = {kind for name, kind in kinds.items() if set(name.split(".")) & set(PRECISE)}
    assert seen == [torch.bfloat16] == [kinds["blocks.0.ffn.0.weight"]]
    assert gates == {torch.float32} and torch.get_default_dtype() == torch.float32
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_step_cache_is_compared_with_the_same_videos_in_turn():
    rows = calibrate_step_cache(
        "kairos-tiny", [1e-9, 10.0], device="cpu", dtype="float32", threads=1, runs=1, videos=1
    )
    kept, skipped = rows
    assert kept["error"] == 0 and skipped["error"] > 0.01
    assert kept["psnr"] > 100 > skipped["psnr"]
    assert (kept["model"], kept["steps"], kept["threads"]) == ("kairos-tiny", 4, 1)


def test_results_name_the_processor():
    assert bench.processor() and bench.processor() in hardware("cpu", 3) and "3 threads" in hardware("cpu", 3)


def test_a_hybrid_grows_with_the_length_and_full_attention_faster():
    larger = {"height": 64, "width": 64}  # few tokens are cheapest under one dense mask
    flops = {
        (kind, frames): measure_here(Run(kind, latent_frames=frames, **SMALL | larger))["tflop"]
        for kind in ("hybrid", "full")
        for frames in (30, 60)
    }
    assert flops["hybrid", 60] / flops["hybrid", 30] < 2.1
    assert flops["full", 60] / flops["full", 30] > flops["hybrid", 60] / flops["hybrid", 30] + 0.1


@pytest.mark.parametrize("kind", ["hybrid", "full"])
def test_operations_by_configuration_are_those_that_a_processor_counts(kind):
    run = Run(kind, latent_frames=25, **SMALL | {"height": 128, "width": 128})
    model = random_transformer("kairos-tiny", full=kind == "full").eval()
    inputs = torch.randn(1, 16, 25, 16, 16), torch.tensor([500.0]), torch.randn(1, 512, model.config.text_dim)
    with torch.no_grad():
        counted = counted_flops(lambda: model(*inputs)) / 1e12
    assert measure_here(run)["tflop"] == pytest.approx(counted, rel=0.02)


def test_a_gpu_is_measured_after_its_first_call_and_against_a_large_product(monkeypatch):
    sizes: list[int] = []
    for name in ("synchronize", "reset_peak_memory_stats", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setattr(bench, "matmul_flops", lambda *_, size, clock: sizes.append(size) or 1.0)
    ones, products = torch.ones(100, 100), iter([9, *[1] * 9])  # the first call tries routes
    found = bench._measured(
        lambda: [ones @ ones for _ in range(next(products))],
        Run("hybrid", latent_frames=1, **SMALL, device="cuda"),
        torch.float32,
    )
    assert found["tflop"] == 2e-6 and sizes == [8192]


def test_a_gpu_that_is_named_is_the_current_one_before_anything_is_made(monkeypatch):
    class Chosen(Exception):
        pass

    def choose(device):
        raise Chosen(device)

    monkeypatch.setattr(torch, "empty", lambda *_, device: torch.zeros(1))  # it can be used
    monkeypatch.setattr(torch.cuda, "set_device", choose)
    for kind in ("hybrid", "stages"):
        with pytest.raises(Chosen, match="cuda:1"):
            measure_here(Run(kind, latent_frames=1, **SMALL, device="cuda:1"))
    with pytest.raises(Chosen, match="cuda:1"):
        calibrate_step_cache("kairos-tiny", [0.1], device="cuda:1", dtype="float32")


def test_the_peak_of_float32_is_that_of_tf32_and_the_setting_is_left_as_it_was(monkeypatch):
    products, seen = torch.backends.cuda.matmul, []
    clock = {"played": lambda: seen.append(products.allow_tf32) or len(seen)}
    monkeypatch.setattr(bench, "clocks", lambda: clock)
    own = products.allow_tf32
    assert bench.matmul_flops.__wrapped__("cpu", torch.float32, 2, "played") == 2 * 2**3
    assert seen == [True] * 20 and products.allow_tf32 == own


def test_a_shorter_text_takes_fewer_operations():
    texts: list[dict[str, int]] = [{"text_tokens": 8}, {"text_tokens": 512}, {}]
    runs = [measure_here(Run("hybrid", latent_frames=3, **SMALL, **text)) for text in texts]
    short, released, usual = (run["tflop"] for run in runs)
    assert short < released == usual


@torch.no_grad()
def test_full_attention_sees_the_whole_clip():
    model = random_transformer("kairos-tiny", full=True).eval()
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    latents, prompt = torch.randn(1, 16, 12, 4, 4), torch.randn(1, 3, model.config.text_dim)
    changed = latents.clone()
    changed[:, :, -1] += 1
    before, after = (model(x, torch.tensor([500.0]), prompt).sample for x in (latents, changed))
    assert not torch.equal(before[:, :, 0], after[:, :, 0])


def test_every_other_model_can_be_built_from_its_configuration():
    import diffusers

    for entry in DIFFUSERS.values():
        with torch.device("meta"):
            model = getattr(diffusers, entry["class"])(**entry["config"])
        assert sum(p.numel() for p in model.parameters()) > 1e9


def test_what_nothing_is_timed_against_is_refused_with_the_nearest_name():
    with pytest.raises(UserError, match=r"did you mean 'diffusers:Wan2.1-1.3B'"):
        check_kind("diffusers:Wan2.1-1.3")


def test_a_run_that_fails_says_why_in_one_line():
    with pytest.raises(UserError, match=r"failed: no model or folder 'nothing'"):
        measure(Run("stages", latent_frames=2, **SMALL | {"model": "nothing"}))


@pytest.mark.parametrize(
    ("status", "said", "error", "message"),
    [
        (1, "Traceback\nkairos.errors.MachineError: no compiler\n", MachineError, "failed: no compiler"),
        (1, "Traceback\ntorch.OutOfMemoryError: out\n", MachineError, "failed: torch.OutOfMemoryError: out"),
        (-9, "", MachineError, "failed: it ended with status -9"),
    ],
)
def test_a_machine_that_fails_a_run_is_told_from_bad_input(status, said, error, message, monkeypatch):
    ended = subprocess.CompletedProcess((), status, "", said)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: ended)
    with pytest.raises(error, match=message):
        measure(Run("stages", latent_frames=2, **SMALL))


def test_results_and_their_plot_are_written(tmp_path: Path, capsys: Any, monkeypatch):
    """The first of two lengths is timed in a process of its own, as both would be."""

    def measured(run: Run) -> dict[str, Any]:
        return measure(run) if run.latent_frames == 1 else asdict(run) | measure_here(run)

    monkeypatch.setattr(bench, "measure", measured)
    with pytest.raises(SystemExit) as ended:
        main(
            [
                *["bench", "--lengths", "1,2", "--height", "32", "--width", "32", "--runs", "1", "-o"],
                str(tmp_path / "out.json"),
            ]
        )
    assert ended.value.code == 0
    results = json.loads((tmp_path / "out.json").read_text())
    assert [row["latent_frames"] for row in results["runs"]] == [1, 2]
    assert ElementTree.fromstring((tmp_path / "out.svg").read_text()).tag.endswith("svg")
    assert "random weights" in capsys.readouterr().out


def lengths(monkeypatch, fails, *arguments: Any) -> int:
    """The exit status of a curve over 1, 2 and 3 latent frames whose runs fail where `fails(run)`."""

    def measured(run: Run) -> dict[str, Any]:
        if fails(run):
            raise MachineError(f"{run.kind} at {run.latent_frames} latent frames failed: out of memory")
        found = {"seconds": 1.0, "parameters": 1e6, "tflop": 1.0, "share_of_peak": 0.5, "peak_gb": 1.0}
        return asdict(run) | found

    monkeypatch.setattr(bench, "measure", measured)
    with pytest.raises(SystemExit) as ended:
        main(["bench", "--lengths", "1,2,3", "--against", "full", *map(str, arguments)])
    return int(ended.value.code or 0)


@pytest.mark.parametrize("failing", ["hybrid", "full"])
def test_a_length_that_fails_leaves_the_others_and_is_told(failing, monkeypatch, tmp_path, capsys):
    output = tmp_path / "out.json"
    status = lengths(monkeypatch, lambda run: run.kind == failing and run.latent_frames > 1, "-o", output)
    said = capsys.readouterr()
    assert status == 1
    assert said.err.count("out of memory") == 1 and f"{failing} at 2 latent frames failed" in said.err
    assert "2 of 6 runs failed or were left out" in said.err and "random weights" in said.out
    rows = [(row["kind"], row["latent_frames"]) for row in json.loads(output.read_text())["runs"]]
    other = "full" if failing == "hybrid" else "hybrid"
    assert sorted(rows) == sorted([("hybrid", 1), ("full", 1), (other, 2), (other, 3)])
    assert output.with_suffix(".svg").exists()


def test_where_every_length_fails_nothing_is_written(monkeypatch, tmp_path, capsys):
    assert lengths(monkeypatch, lambda run: True, "-o", tmp_path / "out.json") == 1
    assert "6 of 6 runs failed or were left out" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "3,x"], "--lengths takes latent frames such as 21,41,81, got 'x'"),
        (["--lengths", "3,²"], "--lengths takes latent frames such as 21,41,81, got '²'"),
        (["--lengths", "3", "--frames", "5"], "leave out --frames"),
        (["--frames", "6"], "frames must be 4n + 1, got 6"),
        (["--height", "20"], "height must be a multiple of 16, got 20"),
        (["--against", "ful"], "did you mean 'full'?"),
        (["-o", "curve.svg"], "--output must end in .json, got curve.svg"),
        (
            ["--step-cache", "0.1", "--frames", "5"],
            "--step-cache makes whole videos as the model does; leave out --f",
        ),
        (["--step-cache", "0.1", "--compile"], "leave out --compile"),
        (["--step-cache", "0.1", "--text-tokens", "8"], "leave out --t"),
        (["--text-tokens", "8"], "--text-tokens goes with --lengths or --against"),
        (["--model", "kairos-tin"], "did you mean 'kairos-tiny'?"),
    ],
)
def test_bad_input_is_refused_in_one_line(arguments: list[str], message: str, capsys: Any):
    with pytest.raises(SystemExit) as ended:
        main(["bench", *arguments])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and message in said and said.count("\n") == 1


def test_a_plot_has_a_line_for_each_model():
    rows = [
        {"kind": kind, "latent_frames": frames, "seconds": frames * slope}
        for kind, slope in (("hybrid", 1), ("full", 2))
        for frames in (1, 2)
    ]
    assert curve_svg(rows).count("<polyline") == 2
