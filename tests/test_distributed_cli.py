"""`kairos generate`, `certify` and `batch` on several ranks, as a user types them; gloo on the CPU."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_pipeline
from PIL import Image

from kairos.data.media import read_metadata, read_video

ROOT = Path(__file__).parent.parent
SMALL = ("--frames", 5, "--height", 32, "--width", 32, "--steps", 2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a saved pipeline with three heads."""
    folder = tmp_path_factory.mktemp("model")
    random_pipeline(hidden_size=36, num_attention_heads=3).save_pretrained(folder)
    return folder


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "kairos", *(str(argument) for argument in arguments)]


def environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def twelve_requests(folder: Path) -> Path:
    """Ten that are good, one with a number that cannot be, one whose image is not there."""
    requests: list[dict[str, Any]] = [{"prompt": f"a ball, number {n}", "seed": n} for n in range(12)]
    requests[3]["num_frames"] = 80
    requests[7]["input_image"] = "missing.png"
    path = folder / "list.json"
    path.write_text(json.dumps(requests))
    return path


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return "Z (zombie)" not in Path(f"/proc/{process}/status").read_text()


def ranks_of(process: int) -> list[int]:
    """The processes that descend from this one."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            parent = re.search(r"PPid:\t(\d+)", status.read_text())
        except OSError:
            continue
        if parent and int(parent[1]) == process:
            child = int(status.parent.name)
            found += [child, *ranks_of(child)]
    return found


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks processes up in /proc")
def test_a_list_that_is_killed_halfway_goes_on_where_it_was_and_names_what_failed(
    kairos: Any, model: Path, tmp_path: Path
) -> None:
    arguments = (
        "generate",
        "--request",
        twelve_requests(tmp_path),
        "--model",
        model,
        "-o",
        "out",
        *SMALL[2:],
    )
    arguments = (*arguments, "--gpus", 2, "--device", "cpu", "--steps", 40)
    first = subprocess.Popen(
        command(*arguments), cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    folder = tmp_path / "out"
    while first.poll() is None and len(list(folder.glob("*.mp4"))) < 3:
        time.sleep(0.02)
    ranks = ranks_of(first.pid)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    deadline = time.monotonic() + 30
    while any(is_alive(rank) for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_alive(rank) for rank in ranks)
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.mp4")}
    assert 3 <= len(before) < 10

    status, said, errors = kairos(*arguments)
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.mp4")}
    assert len(after) == 10
    assert {name: after[name] for name in before} == before
    assert said.count("made before") == len(before)
    report = json.loads((folder / "list.report.json").read_text())
    assert [entry["request"] for entry in report] == list(range(1, 13))
    failed = {entry["request"]: entry["error"] for entry in report if entry["status"] == "failed"}
    assert "num_frames must be 4n + 1, got 80" in failed.pop(4)
    assert "missing.png" in failed.pop(8)
    assert failed == {}
    assert status == 2
    assert errors.count("error:") == 3
    assert "2 of 12 requests failed: 4, 8; see out/list.report.json" in errors
    assert sum(entry["status"] == "skipped" for entry in report) == len(before)
    assert not list(folder.glob(".*"))

    again = kairos(*arguments)
    assert again[1].count("made before") == 10


def test_another_model_or_request_is_not_taken_for_one_that_is_made(tmp_path: Path) -> None:
    import numpy as np

    from kairos.cli.jobs import Job
    from kairos.cli.made_before import is_finished, with_remark
    from kairos.cli.run import Loaded, RunOptions
    from kairos.data.media import write_video
    from kairos.request import Request

    job = Job(Request("a ball", height=30), tmp_path / "a.mp4")
    about: dict[str, Any] = {
        "model": {"name": "one", "hash": "5c"},
        "dtype": "float32",
        "vae_dtype": "float32",
    }
    pipeline: Any = None
    loaded = Loaded(pipeline, about, RunOptions(model="one"))
    assert not is_finished(job, loaded)
    write_video(job.path, np.zeros((1, 32, 32, 3), np.uint8), 16, about | with_remark(job).remarks)
    assert is_finished(job, loaded)
    assert not is_finished(Job(Request("a ball", height=30, seed=1), job.path), loaded)
    for other in (
        {"model": {"name": "other", "hash": "5c"}},
        {"model": {"name": "one", "hash": "9d"}},  # its weights have changed since
        {"dtype": "bfloat16"},
        {"vae_dtype": "bfloat16"},
    ):
        assert not is_finished(job, replace(loaded, about=about | other)), other
    for other in (
        {"loras": ("one.safetensors:0.5",)},
        {"scale": 2},
        {"quantize": "int8"},
        {"step_cache": 0.1},
        {"rewrite": "someone"},
    ):
        assert not is_finished(job, replace(loaded, options=RunOptions(model="one", **other))), other
    job.path.write_bytes(b"half a video")
    assert not is_finished(job, loaded)


def test_a_rewritten_video_is_finished_for_the_words_that_it_came_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np

    from kairos.cli.jobs import Job
    from kairos.cli.made_before import is_finished, with_remark
    from kairos.cli.run import Loaded, RunOptions, rewritten
    from kairos.conditioning import rewrite
    from kairos.data.media import write_video
    from kairos.request import Request

    monkeypatch.setattr(rewrite.Rewriter, "__call__", lambda _, prompt, **__: f"{prompt}, written out")
    asked = with_remark(Job(Request("a ball"), tmp_path / "a.mp4"))
    made = rewritten(asked, rewrite.Rewriter("someone"))
    about = {"model": {"name": "one", "hash": "5c"}, "dtype": "float32", "vae_dtype": "float32"}
    write_video(made.path, np.zeros((1, 32, 32, 3), np.uint8), 16, about | made.remarks)
    pipeline: Any = None
    loaded = Loaded(pipeline, about, RunOptions(model="one", rewrite="someone"))
    assert is_finished(asked, loaded) and is_finished(made, loaded)
    assert not is_finished(asked, replace(loaded, options=RunOptions(model="one")))
    assert not is_finished(asked, replace(loaded, options=RunOptions(model="one", rewrite="another")))


@pytest.mark.parametrize(
    ("listed", "by", "seed", "prompt"),
    [
        (False, "someone", 0, "a ball, written out anew"),
        (True, "someone", 0, "a ball, written out"),
        (True, "another", 0, "a ball, written out anew"),
        (True, "someone", 1, "a ball, written out anew"),
    ],
)
def test_the_prompt_of_a_lists_video_is_written_out_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: bool, by: str, seed: int, prompt: str
) -> None:
    """Whether the ranks leave the video as it is or, with other weights, make it anew. What is made anew is
    always made of a rewritten prompt."""
    import numpy as np

    from kairos.cli import gpus
    from kairos.cli.jobs import Job
    from kairos.cli.made_before import with_remark
    from kairos.cli.run import RunOptions, rewritten
    from kairos.conditioning import rewrite
    from kairos.data.media import write_video
    from kairos.distributed import launch
    from kairos.request import Request

    launched: list[Job] = []
    monkeypatch.setattr(rewrite.Rewriter, "__call__", lambda _, prompt, **__: f"{prompt}, written out")
    made = rewritten(with_remark(Job(Request("a ball"), tmp_path / "a.mp4")), rewrite.Rewriter(by))
    said = {"request": made.request.to_dict()} | made.remarks
    write_video(made.path, np.zeros((1, 32, 32, 3), np.uint8), 16, said)
    monkeypatch.setattr(rewrite.Rewriter, "__call__", lambda _, prompt, **__: f"{prompt}, written out anew")
    monkeypatch.setattr(launch, "launch", lambda _, given, size: launched.extend(given[0]))
    gpus.run_on_gpus(
        [Job(Request("a ball", seed=seed), made.path)],
        [],
        RunOptions(device="cpu", rewrite="someone"),
        gpus="2",
        split=None,
        report=tmp_path / "report.json" if listed else None,
    )
    (job,) = launched
    assert job.request.prompt == prompt
    assert job.remarks["rewritten"] == {"from": "a ball", "by": "someone"}


def test_a_list_without_a_good_request_starts_no_ranks(
    kairos: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kairos.distributed import launch

    monkeypatch.setattr(launch, "launch", lambda *_, **__: pytest.fail("ranks are started"))
    (tmp_path / "bad.json").write_text(json.dumps([{"num_frames": 4}, {"prompt": "a", "seed": -1}]))
    arguments = ("generate", "--request", tmp_path / "bad.json", "-o", tmp_path / "out")
    status, _, errors = kairos(*arguments, "--gpus", 2, "--device", "cpu")
    assert (status, errors.count("error: ")) == (2, 3)
    assert "2 of 2 requests failed: 1, 2; see" in errors
    report = json.loads((tmp_path / "out" / "bad.report.json").read_text())
    assert [entry["status"] for entry in report] == ["failed", "failed"]


@pytest.mark.parametrize("split", [("--gpus", 2), ("--gpus", 3, "--split", "context")])
def test_a_video_of_several_ranks_is_the_video_of_one(kairos: Any, model: Path, split: tuple) -> None:
    Image.new("RGB", (32, 32), "red").save("red.png")
    arguments = ("generate", "a ball", "--image", "red.png", "--model", model, *SMALL, "--dtype", "float32")
    arguments += ("--scale", 1)  # enlarged, coding makes more of a pixel rounded the other way
    assert kairos(*arguments, "-o", "one.mp4")[0] == 0
    status, said, errors = kairos(*arguments, "-o", "split.mp4", "--device", "cpu", *split)
    assert (status, errors) == (0, "")
    assert said.count("split.mp4: 5 frames") == 1
    one, several = (read_video(name).astype(int) for name in ("one.mp4", "split.mp4"))
    assert (abs(one - several).max() <= 4, abs(one - several).mean() < 0.01) == (True, True)  # as coded
    one_says, several_say = (read_metadata(name) for name in ("one.mp4", "split.mp4"))
    assert several_say.pop("asked")
    assert several_say == one_says


def test_a_video_too_short_for_its_request_does_not_end_the_list_over_all_ranks(
    kairos: Any, model: Path, tmp_path: Path
) -> None:
    import numpy as np

    from kairos.data.media import write_video

    write_video(tmp_path / "short.mp4", np.zeros((3, 32, 32, 3), np.uint8), fps=16)
    requests = [{"prompt": "a", "video": "short.mp4", "input_frames": 5, "frames": 9}, {"prompt": "b"}]
    (tmp_path / "two.json").write_text(json.dumps(requests))
    arguments = ("generate", "--request", "two.json", "--model", model, "-o", "out", *SMALL[2:])
    status, _, errors = kairos(*arguments, "--gpus", 2, "--split", "context", "--device", "cpu")
    assert status == 2 and "1 of 2 requests failed: 1; see out/two.report.json" in errors
    report = json.loads((tmp_path / "out" / "two.report.json").read_text())
    assert [entry["status"] for entry in report] == ["failed", "made"]


def test_the_one_good_request_of_a_list_over_all_ranks_is_made_once(
    kairos: Any, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "two.json").write_text(json.dumps([{"prompt": "a ball"}, {"prompt": "b", "num_frames": 4}]))
    arguments = ("generate", "--request", "two.json", "--model", model, "-o", "out", *SMALL[2:])
    for said_of_it in ("made", "skipped"):
        status, _, errors = kairos(*arguments, "--gpus", 2, "--split", "context", "--device", "cpu")
        assert status == 2
        assert "1 of 2 requests failed: 2; see out/two.report.json" in errors
        report = json.loads((tmp_path / "out" / "two.report.json").read_text())
        assert [entry["status"] for entry in report] == [said_of_it, "failed"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--gpus", "0"), "--gpus must be a whole number from 1 to 1024, or all, got '0'"),
        (("--gpus", "two"), "got 'two'"),
        (("--gpus", "all", "--device", "cpu"), "say how many processes: --gpus N"),
        (("--split", "cfg"), "add --gpus N"),
        (("--gpus", "2", "--split", "cgf"), "no split 'cgf'; did you mean 'cfg'?"),
        (("--gpus", "2", "--device", "cuda:1"), "--device is auto, cuda or cpu, got 'cuda:1'"),
        (("--gpus", "2", "--compile", "--step-cache", "0.1"), "--compile and --step-cache: for one device"),
    ],
)
def test_options_that_cannot_be_are_one_line_before_anything_starts(
    kairos: Any, options: tuple[str, ...], message: str
) -> None:
    status, said, errors = kairos("generate", "a ball", *options)
    assert (status, said, errors.count("\n")) == (2, "", 1)
    assert message in errors


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs here")
@pytest.mark.parametrize("gpus", ["2", "all"])
def test_gpus_that_are_not_there_are_one_line(kairos: Any, gpus: str) -> None:
    status, _, errors = kairos("generate", "a ball", "--gpus", gpus)
    assert (status, errors.count("\n")) == (2, 1)
    assert "this machine has no GPU; --device cpu runs on it, with --gpus N in N processes" in errors


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs here")
def test_a_certificate_on_gpus_that_are_not_there_is_one_line(kairos: Any) -> None:
    status, said, errors = kairos("certify", "--gpus", "--ranks", 2)
    assert (status, said) == (2, "")
    assert errors == "error: 2 ranks want a GPU each and this machine has none; leave out --gpus\n"


def test_more_ranks_than_heads_are_one_line(kairos: Any, model: Path) -> None:
    arguments = ("generate", "a ball", "--model", model, *SMALL, "--device", "cpu")
    status, _, errors = kairos(*arguments, "--gpus", 4, "--split", "context")
    assert (status, errors.count("\n")) == (2, 1)
    assert "at most as many ranks as the model has heads, 3, got 4" in errors


def test_the_references_script_makes_the_list_of_examples(model: Path, tmp_path: Path) -> None:
    requests = "examples/kairos/example_list.json"
    names = {entry["output"] for entry in json.loads((ROOT / requests).read_text())}
    arguments = [
        *("tools/inference_multi_gpu.sh", "configs/kairos_tiny/kairos_tiny_config.py", model, requests),
        *(tmp_path / "multi_gpu", *SMALL, "--device", "cpu", "--gpus", 2),
    ]
    done = subprocess.run(
        [str(argument) for argument in arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert {path.name for path in (tmp_path / "multi_gpu").glob("*.mp4")} == names


def test_ranks_of_torchrun_make_the_list_and_one_of_them_says_what_failed(
    kairos: Any, model: Path, tmp_path: Path
) -> None:
    """And leave what others have made before."""
    requests = [{"prompt": "a"}, {"prompt": "b"}]
    (tmp_path / "few.json").write_text(json.dumps(requests))
    arguments = ("generate", "--request", "few.json", "--model", model, "--device", "cpu", *SMALL)
    assert kairos(*arguments, "--gpus", 2)[0] == 0
    (tmp_path / "output" / "few-2.mp4").unlink()
    requests.append({"prompt": "c", "input_image": "missing.png"})
    (tmp_path / "few.json").write_text(json.dumps(requests))
    ranks = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = subprocess.run(
        [*ranks, *command(*arguments)[1:]],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    for said in ("few-1.mp4: made before", "few-2.mp4: 5 frames"):
        assert done.stdout.count(said) == 1
    assert done.stderr.count("error: 1 of 3 requests failed: 3; see output/few.report.json") == 1
    assert "Connection" not in done.stderr


def test_the_certificate_covers_every_split_and_says_what_it_refused(kairos: Any, model: Path) -> None:
    status, said, errors = kairos("certify", "--model", model, "--frames", 5, "--steps", 2, "--width", 64)
    assert (status, errors) == (0, "")
    lines = said.splitlines()
    assert sum(line.rstrip().endswith("same") for line in lines) == 12
    assert sum("more ranks than heads (3)" in line for line in lines) == 2
    assert re.search(r"^12 splits, largest difference \S+, below 0\.0001$", lines[-1])


def test_a_certificate_in_float32_leaves_a_gpu_no_convolution_of_fewer_bits(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import torch.distributed as dist

    from kairos import presets
    from kairos.cli.certify import compare_on_rank
    from kairos.distributed import ranks

    def load(*_: Any, **__: Any) -> None:
        assert not torch.backends.cudnn.allow_tf32
        raise InterruptedError("enough is known")

    caplog.set_level("ERROR", logger="kairos")  # as the rank will, but for this test alone
    alone = ranks.World(0, 1, dist.HashStore(), torch.device("cpu"))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(ranks, "join", lambda *_: alone)
    monkeypatch.setattr(presets, "load_pipeline", load)
    with pytest.raises(InterruptedError):
        compare_on_rank(None, {}, 1, "cuda")


def test_a_difference_fails_the_certificate() -> None:
    from kairos.cli.certify import Finding, worst

    near, far = Finding(2, "cfg", True, 1e-6, 1e-7), Finding(2, "cfg", True, 1e-6, 2e-4)
    assert [one.passed for one in (near, far, Finding(2, "cfg", True, float("nan")))] == [True, False, False]
    assert worst([[near], [far]]) == [far]
    blank = Finding(2, "cfg", True, 0.0, float("nan"))  # latents that no strips spoil, frames that they do
    assert not blank.passed
    for order in ([[blank], [far]], [[far], [blank]]):
        assert worst(order) == [blank]
