"""The commands as a user types them, around a whole pipeline with random weights."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import random_pipeline
from safetensors.numpy import load_file, save_file

from kairos import presets
from kairos.data.media import read_metadata, read_video

ROOT = Path(__file__).parent.parent
TINY_IS_HERE = (presets.ASSETS / "kairos-tiny" / "model_index.json").exists()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a saved pipeline."""
    folder = tmp_path_factory.mktemp("model")
    random_pipeline().save_pretrained(folder)
    return folder


def run_script(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """tools/inference.sh, with this Python's `kairos` and no network."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [str(argument) for argument in ("tools/inference.sh", *arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("options", [(), ("--dtype", "bfloat16"), ("--vae-dtype", "bfloat16")])
def test_a_video_is_made_shown_and_made_again(kairos: Any, model: Path, options: tuple[str, ...]) -> None:
    size = ("--frames", 5, "--height", 32, "--width", 48)
    assert kairos("generate", "a red ball", "--model", model, *size, *options, "-o", "out.mp4")[0] == 0
    assert read_video("out.mp4").shape == (5, 256, 384, 3)
    made = Path("out.mp4").read_bytes()
    _, said, _ = kairos("show", "out.mp4")
    Path("out.mp4").unlink()
    status, _, _ = kairos(*shlex.split(said.splitlines()[-1])[1:])
    assert status == 0
    assert Path("out.mp4").read_bytes() == made


def test_the_first_frames_of_a_video_do_not_depend_on_the_seed(kairos: Any, model: Path) -> None:
    kairos("generate", "a", "--model", model, "-o", "given.mp4")
    given = ("--video", "given.mp4", "--video-frames", 5, "--model", model)
    for seed in (0, 1):
        assert kairos("generate", *given, "--seed", seed, "-o", f"{seed}.mp4", "--scale", 1)[0] == 0
    one, other = (read_video(f"{seed}.mp4").astype(float) for seed in (0, 1))
    assert np.abs(one - other)[:5].mean() < 0.5 < np.abs(one - other)[5:].mean()


@pytest.mark.parametrize(("example", "mode"), [("t2v", "t2v"), ("ti2v", "ti2v"), ("i2v", "i2v")])
def test_the_examples_run_with_the_tiny_configuration(
    kairos: Any, model: Path, example: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Path.cwd() / "output"
    monkeypatch.chdir(ROOT)
    status, _, _ = kairos(
        *("generate", "--config", "configs/kairos_tiny/kairos_tiny_config.py"),
        *("--request", f"examples/kairos/example_{example}.json"),
        *("--model", model, "-o", output, "--frames", 5, "--height", 32, "--width", 32),
    )
    assert status == 0
    request = read_metadata(output / f"example_{example}.mp4")["request"]
    has = ("prompt" in request, "input_image" in request)
    assert has == {"t2v": (True, False), "ti2v": (True, True), "i2v": (False, True)}[mode]


def test_the_list_of_examples_becomes_named_videos(kairos: Any, model: Path, monkeypatch: Any) -> None:
    output = Path.cwd() / "output"
    monkeypatch.chdir(ROOT)
    size = ("--frames", 5, "--height", 32, "--width", 32, "--free-encoder")
    request = "examples/kairos/example_list.json"
    status, _, _ = kairos("generate", "--request", request, "--model", model, "-o", output, *size)
    assert status == 0
    expected = {entry["output"] for entry in json.loads((ROOT / request).read_text())}
    assert {path.name for path in output.iterdir()} == expected


def test_the_references_script_makes_a_video(model: Path, tmp_path: Path) -> None:
    done = run_script(
        *("configs/kairos_tiny/kairos_tiny_config.py", model, "examples/kairos/example_t2v.json"),
        *(tmp_path / "output", "--frames", 5, "--height", 32, "--width", 32),
    )
    assert (done.returncode, done.stderr.count("error")) == (0, 0), done.stderr
    assert (tmp_path / "output" / "example_t2v.mp4").exists()


def test_the_references_script_says_which_weights_are_missing_and_how_to_get_them(tmp_path: Path) -> None:
    done = run_script(
        *("configs/kairos_4b/kairos_4b_config.py", "none", "examples/kairos/example_t2v.json"),
        tmp_path / "output",
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "kairos-agi/kairos-sensenova-4B-480P-pretrained" in done.stderr
    assert "run: kairos models download kairos-4b-480p" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_references_script_takes_the_folder_of_a_download_for_a_whole_model(tmp_path: Path) -> None:
    (tmp_path / presets.MARK).write_text('{"preset": "kairos-4b-480p"}')
    done = run_script(
        *("configs/kairos_4b/kairos_4b_config.py", tmp_path, "examples/kairos/example_t2v.json"),
        tmp_path / "output",
    )
    assert done.returncode == 2 and f"kairos-4b-480p --dir {tmp_path}" in done.stderr


def test_the_references_script_says_how_it_is_used() -> None:
    done = run_script("only", "three", "arguments")
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ")


@pytest.mark.parametrize("change", ["missing", "extra", "torn"])
def test_weights_that_do_not_fit_are_named(kairos: Any, model: Path, tmp_path: Path, change: str) -> None:
    (tmp_path / "transformer").mkdir()
    weights = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(model / "transformer" / weights.name)
    if change == "missing":
        del tensors["head.modulation"]
    if change == "extra":
        tensors["head.surprise"] = np.zeros(3, np.float32)
    save_file(tensors, weights)
    if change == "torn":
        weights.write_bytes(weights.read_bytes()[:-100])
    status, _, complaint = kairos("generate", "x", "--model", model, "--weights", weights, "-o", "out.mp4")
    assert status == 2
    assert {"missing": "head.modulation", "extra": "head.surprise", "torn": weights.name}[change] in complaint
    assert complaint.count("\n") == 1
    assert not Path("out.mp4").exists()


def test_the_known_models_are_listed(kairos: Any) -> None:
    status, said, _ = kairos("models", "list")
    assert status == 0
    assert [line.split()[0] for line in said.splitlines()] == list(presets.PRESETS)


def test_a_model_is_described_without_being_loaded(kairos: Any) -> None:
    status, said, _ = kairos("models", "info", "kairos-4b-480p")
    assert status == 0
    for fact in (
        "81 frames of 480 x 640, at 16 fps",
        "transformer parameters  4,0",
        "GPU, in bfloat16",
    ):
        assert fact in said
    carried = "1,854.3 MB of the layers in bfloat16, 2,905.5 MB of the VAE's decoder in float32"
    assert f"state, if chunk-causal  {carried}" in said
    said = kairos("models", "info", "kairos-tiny")[1]
    carried = "1.1 MB of the layers in float32, 4.6 MB of the VAE's decoder in float32"
    assert f"state of a rollout  {carried}" in said


@pytest.mark.parametrize("command", ["info", "download"])
def test_an_unknown_model_is_bad_input(kairos: Any, command: str) -> None:
    status, said, complaint = kairos("models", command, "kairos-tinny")
    assert (status, said, complaint.count("\n")) == (2, "", 1)
    assert "did you mean 'kairos-tiny'?" in complaint


def test_an_embedded_model_needs_no_download(kairos: Any) -> None:
    status, said, _ = kairos("models", "download", "kairos-tiny")
    assert (status, "nothing to download" in said) == (0, True)


@pytest.mark.skipif(not TINY_IS_HERE, reason="kairos-tiny is not in this checkout")
def test_kairos_tiny_makes_the_readmes_video(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "kairos",
        "generate",
        "a red ball rolls to the right and hits a blue ball",
    ]
    done = subprocess.run(
        [*command, "-o", "out.mp4", "--verbose"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    frames = read_video(tmp_path / "out.mp4")
    assert frames.shape == (33, 256, 256, 3)
    reddest = frames[0].astype(int) @ [2, -1, -1]
    bluest = frames[0].astype(int) @ [-1, -1, 2]
    assert reddest.max() > 200
    assert bluest.max() > 200
    for stage in ("import", "load", "encode prompt", "denoise", "decode frames", "write", "total"):
        assert stage in done.stderr
