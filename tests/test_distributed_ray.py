"""`kairos batch`: what is tried again and what is given up, with a Ray that is played, and once with Ray."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import random_pipeline

from kairos.cli import batch, main
from kairos.cli.batch import VideoWorker, _received
from kairos.cli.jobs import Job
from kairos.cli.outcomes import Outcome
from kairos.cli.run import Loaded, RunOptions
from kairos.distributed.fleet import cluster, run_tasks
from kairos.errors import MachineError, UserError
from kairos.request import Request


class RayError(Exception):
    pass


class RayActorError(RayError):
    pass


class PlayedRay:
    """Actors in this process. `act(task)` answers or raises; what raises RayActorError has died.

    Those of the numbers `loading`, counted from 1, are never ready.
    """

    exceptions = SimpleNamespace(RayError=RayError, RayActorError=RayActorError)

    def __init__(
        self, act: Callable[[Any], Any], starts: bool = True, loading: set[int] | None = None
    ) -> None:
        self.act, self.starts, self.started = act, starts, 0
        self.loading, self.unready = loading or set(), set[Any]()

    def start(self) -> Any:
        self.started += 1
        starts = self.starts
        ready = self._later(lambda: True if starts else self._fail())
        self.unready |= {ready} if self.started in self.loading else set()
        return SimpleNamespace(
            ready=SimpleNamespace(remote=lambda: ready),
            run=SimpleNamespace(remote=lambda task: self._later(lambda: self.act(task))),
        )

    def get(self, reference: Any) -> Any:
        return reference()

    def wait(self, references: list[Any], num_returns: int) -> tuple[list[Any], list[Any]]:
        done = next(reference for reference in reversed(references) if reference not in self.unready)
        return [done], [reference for reference in references if reference is not done]

    @staticmethod
    def _fail() -> None:
        raise RayActorError("loading\nno such model")

    @staticmethod
    def _later(what: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: what()


def test_every_task_is_answered_by_no_more_workers_than_there_is_room_for() -> None:
    ray = PlayedRay(lambda task: task * 10)
    answers = dict(run_tasks(ray, ray.start, dict(enumerate(range(7))), workers=3, retries=0))
    assert answers == {number: number * 10 for number in range(7)}
    assert ray.started == 3


def test_a_task_whose_worker_died_goes_to_a_new_one_and_is_given_up_after_its_retries(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tries: dict[str, int] = {}

    def act(task: str) -> str:
        tries[task] = tries.get(task, 0) + 1
        if task == "always" or (task == "once" and tries[task] == 1):
            raise RayActorError("the worker died")
        return "made"

    ray = PlayedRay(act)
    with caplog.at_level("WARNING", "kairos"):
        answers = dict(run_tasks(ray, ray.start, {2: "good", 5: "once", 7: "always"}, workers=2, retries=2))
    assert sorted(caplog.messages) == [f"request {n} is tried again: the worker died" for n in (5, 7, 7)]
    assert answers[2] == answers[5] == "made"
    assert isinstance(answers[7], RayActorError)
    assert tries == {"good": 1, "once": 2, "always": 3}
    assert ray.started == 2 + 1 + 2  # nothing waits for another after the last


def test_a_task_goes_to_the_first_worker_that_is_ready_and_none_waits_for_the_slow() -> None:
    ray = PlayedRay(lambda task: task * 10, loading={1, 3})
    answers = dict(run_tasks(ray, ray.start, dict(enumerate(range(5))), workers=3, retries=0))
    assert answers == {number: number * 10 for number in range(5)}
    assert ray.started == 3


def test_the_others_go_on_while_a_replacement_loads() -> None:
    died: list[str] = []

    def act(task: str) -> str:
        if task == "once" and not died:
            died.append(task)
            raise RayActorError("the worker died")
        return "made"

    ray = PlayedRay(act, loading={3})
    answers = dict(run_tasks(ray, ray.start, dict(enumerate(["a", "b", "once"])), workers=2, retries=1))
    assert (answers, died, ray.started) == (dict.fromkeys(range(3), "made"), ["once"], 3)


def test_a_worker_that_dies_is_replaced_only_where_a_task_waits() -> None:
    def act(task: str) -> None:
        raise RayActorError("the worker died")

    ray = PlayedRay(act)
    ((number, answer),) = run_tasks(ray, ray.start, {4: "one"}, workers=3, retries=0)
    assert (number, str(answer), ray.started) == (4, "the worker died", 1)


def test_a_cluster_that_others_use_is_waited_for_with_a_word(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    there = SimpleNamespace(is_initialized=lambda: False, init=lambda **_: None, shutdown=lambda: None)
    there.cluster_resources = lambda: {"GPU": 4.0}
    monkeypatch.setitem(sys.modules, "ray", there)
    for free, said in (({"GPU": 4.0}, 0), ({"GPU": 1.0}, 1), ({}, 2)):
        there.available_resources = lambda free=free: free
        with caplog.at_level("WARNING", "kairos"), cluster("auto", workers=3, on_gpus=True) as (_, room):
            assert (room, len(caplog.messages)) == (3, said)
    assert caplog.messages[0] == "of 3 GPUs 1 are free; the others are used once they are"


def test_a_local_cluster_is_a_new_one_with_the_cores_that_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun: list[dict[str, Any]] = []
    there = SimpleNamespace(is_initialized=lambda: False, init=lambda **options: begun.append(options))
    there.shutdown, there.cluster_resources = lambda: None, lambda: {"CPU": 2.0}
    monkeypatch.setitem(sys.modules, "ray", there)
    with cluster("local", workers=2, on_gpus=False) as (_, room):
        assert room == 2
    assert (begun[0]["address"], begun[0]["num_cpus"]) == ("local", 2)  # without one Ray joins what runs here
    with (
        pytest.raises(UserError, match="3 CPUs are asked for and Ray has 2; ask for 2 at most"),
        cluster("local", workers=3, on_gpus=False),
    ):
        pass


def test_a_process_that_is_connected_to_ray_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `init`, and without `shutdown`."""
    there = SimpleNamespace(is_initialized=lambda: True, cluster_resources=lambda: {"CPU": 2.0})
    there.available_resources = there.cluster_resources
    monkeypatch.setitem(sys.modules, "ray", there)
    with cluster("auto", workers=None, on_gpus=False) as (ray, room):
        assert (ray, room) == (there, 2)


@pytest.mark.parametrize(("weights", "status"), [("5c", "skipped"), ("9d", "made")])
def test_a_worker_skips_what_its_own_weights_have_made(
    monkeypatch: pytest.MonkeyPatch, weights: str, status: str
) -> None:
    def attempt(job: Job, *_: Any) -> Outcome:
        job.path.write_bytes(b"a video")
        return Outcome(job.number, "", "made")

    monkeypatch.setattr(batch, "attempt", attempt)
    worker = VideoWorker.__new__(VideoWorker)
    about: dict[str, Any] = {"model": {"name": "m", "hash": "5c"}, "dtype": "float32", "vae_dtype": "float32"}
    pipeline: Any = None
    worker.loaded, worker.tiled = Loaded(pipeline, about, RunOptions(model="m")), True
    asked = {"asked": {"prompt": "a ball", "seed": 0}}
    before = about | asked | {"model": {"name": "m", "hash": weights}}
    task = {"request": {"prompt": "a ball"}, "remarks": asked, "number": 3, "made_before": before}
    outcome, video = worker.run(task)
    assert (outcome["request"], outcome["status"], bool(video)) == (3, status, status == "made")


def test_an_answer_that_is_to_be_had_again_is_asked_for_again() -> None:
    said = iter(["no memory", "made"])
    ray = PlayedRay(lambda task: next(said))
    answers = list(
        run_tasks(
            ray,
            ray.start,
            {0: "one"},
            workers=1,
            retries=1,
            again=lambda answer: "" if answer == "made" else answer,
        )
    )
    assert answers == [(0, "made")]


def test_a_worker_that_cannot_start_ends_the_run_with_its_reason() -> None:
    ray = PlayedRay(lambda task: task, starts=False)
    with pytest.raises(MachineError, match="a worker cannot start: no such model"):
        list(run_tasks(ray, ray.start, {0: "one"}, workers=1, retries=5))


def test_a_worker_that_cannot_start_late_leaves_the_list_to_the_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ray = PlayedRay(lambda task: task * 10)
    start = ray.start

    def only_the_first_starts() -> Any:
        ray.starts = ray.started == 0
        return start()

    with caplog.at_level("WARNING", "kairos"):
        answers = dict(run_tasks(ray, only_the_first_starts, {0: 1, 1: 2, 2: 3}, workers=2, retries=0))
    assert answers == {0: 10, 1: 20, 2: 30} and ray.started == 2
    assert caplog.messages == ["a worker cannot start, the others go on: no such model"]


def test_what_is_answered_is_kept_when_no_worker_can_start_any_more() -> None:
    def act(task: str) -> str:
        if task == "bad":
            raise RayActorError("the worker died")
        return "made"

    ray = PlayedRay(act)
    start = ray.start

    def only_the_first_starts() -> Any:
        ray.starts = ray.started == 0
        return start()

    tasks = {0: "good", 1: "bad", 2: "good", 3: "good"}
    answers = dict(run_tasks(ray, only_the_first_starts, tasks, workers=1, retries=1))
    assert answers[0] == "made" and ray.started == 2
    for number in (1, 2, 3):
        assert isinstance(answers[number], MachineError)
        assert str(answers[number]) == "a worker cannot start: no such model"


def test_workers_load_side_by_side() -> None:
    ray = PlayedRay(lambda task: task)
    loaded_after: list[int] = []
    get = ray.get
    ray.get = lambda reference: loaded_after.append(ray.started) or get(reference)
    list(run_tasks(ray, ray.start, {0: "one", 1: "two", 2: "three"}, workers=3, retries=0))
    assert loaded_after[:3] == [3, 3, 3]


def test_a_video_that_cannot_be_written_is_an_outcome_and_ends_no_list(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "folder.mp4").mkdir()
    job = Job(Request("a ball"), tmp_path / "folder.mp4", number=3)
    outcome = _received(job, ({"request": 3, "output": "", "status": "made"}, b"a video"))
    assert (outcome.request, outcome.status, outcome.by_input) == (3, "failed", True)
    assert "it is a folder" in outcome.error
    nobody = _received(job, MachineError("a worker cannot start: no such model"))
    assert (nobody.error, nobody.by_input) == ("a worker cannot start: no such model", False)
    died = _received(job, RayActorError())
    assert (died.error, died.by_input) == ("its worker died: RayActorError", False)
    assert capsys.readouterr().err.count("error: request 3, ") == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ray", "somewhere"), "--ray must be local, auto, HOST:PORT or ray://HOST:PORT, got 'somewhere'"),
        (("--ray", "127.0.0.1:1"), "no Ray at 127.0.0.1:1 (connection refused); start one"),
        (("--retries", "-1"), "--retries must be at least 0, got -1"),
        (("--gpus", "0"), "--gpus must be at least 1, got 0"),
        (("--device", "tpu"), "--device is cuda or cpu here, got 'tpu'"),
        (("--config", "tpu.py"), "--device is cuda or cpu here, got 'tpu'"),
        (("-o", "x.mp4"), "--output is a folder here, for the videos and their report, got x.mp4"),
        (("--memory", "auto"), "workers may differ in what they have free; give --memory in GB"),
        (("--device", "cpu", "--memory", "0.1"), "33 frames of 64 x 64 do not fit in 0.1 GB"),
        (("--device", "cpu", "--quantize", "int3"), "quantize must be one of int8, fp8, int4, got 'int3'"),
    ],
)
def test_what_cannot_be_is_one_line(
    options: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("list.json").write_text('[{"prompt": "a"}]')
    Path("tpu.py").write_text('device = "tpu"\n')
    with pytest.raises(SystemExit) as left:
        main(["batch", "list.json", *options])
    errors = capsys.readouterr().err
    assert (left.value.code, errors.count("\n")) == (2, 1)
    assert message in errors


@pytest.mark.skipif(find_spec("ray") is None, reason='needs pip install "kairos-world[ray]"')
def test_a_list_is_made_by_rays_actors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "240")  # on a busy machine
    random_pipeline().save_pretrained("model")
    size = {"num_frames": 5, "num_inference_steps": 2}
    requests = [{"prompt": "a", **size}, {"prompt": "b", "input_image": "missing.png"}, {"num_frames": 4}]
    Path("list.json").write_text(json.dumps(requests))
    arguments = ["batch", "list.json", "--ray", "local", "--model", "model", "--device", "cpu"]
    arguments += ["--memory", "8"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own
        for said in ("output/list-1.mp4: made\n", "output/list-1.mp4: made before"):
            with pytest.raises(SystemExit) as left:
                main(arguments)
            assert left.value.code == 2
            printed = capfd.readouterr()
            assert said in printed.out
            assert "2 of 3 requests failed: 2, 3; see output/list.report.json" in printed.err
    report = json.loads(Path("output/list.report.json").read_text())
    assert [entry["status"] for entry in report] == ["skipped", "failed", "failed"]
    assert "missing.png" in report[1]["error"]
