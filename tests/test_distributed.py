"""One video over several ranks is the video of one; the bytes are those computed; failures end all at once.

Every process here is a gloo rank on the CPU. One start of four ranks serves all cases of parity.
"""

from __future__ import annotations

import copy
import importlib
import os
import runpy
import signal
import subprocess
import sys
import time
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import random_pipeline

from kairos.distributed import cost, ranks
from kairos.distributed.exchange import slices, spread
from kairos.distributed.launch import PRELOADED, RankError, _context, launch
from kairos.distributed.parallel import choose_split, parallelize
from kairos.distributed.queue import WorkQueue
from kairos.errors import MachineError, UserError
from kairos.sizes import RELEASED_TRANSFORMER, Shape, clip_shape

ROOT = Path(__file__).parent.parent
HEADS = 5  # neither 2, 3 nor 4 divide them
SIZES = {"hidden_size": HEADS * 12, "num_attention_heads": HEADS, "gated_delta_head_dim": 8}
VIDEO = {"height": 64, "width": 80, "num_frames": 9, "num_inference_steps": 2}
RANKS = (1, 2, 3, 4)
CASES = [
    (causal, size, split, strips)
    for causal in ("none", "chunk")
    for size in RANKS
    for split in ("context", "cfg")
    for strips in (False, True)
    if size > 1 or split == "context"
]


def tiny_pipeline(causal: str = "none") -> Any:
    pipe = random_pipeline(causal=causal, pad_dilated=causal == "none", **SIZES)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make(pipe: Any, **options: Any) -> torch.Tensor:
    """A video whose first frames are given, with guidance."""
    frames = torch.Generator().manual_seed(1)
    video = torch.randint(0, 256, (5, 64, 80, 3), generator=frames, dtype=torch.uint8).numpy()
    generator = torch.Generator().manual_seed(0)
    made = pipe("a ball", video=video, generator=generator, output_type="pt", **VIDEO | options)
    return made.frames


# What the four ranks do.


def parity_on_ranks() -> dict[str, Any]:
    """The largest difference from one rank's video for each case, and what was counted on the way."""
    ranks.join("cpu")
    found: dict[str, Any] = {"differences": {}}
    for causal in ("none", "chunk"):
        pipe = tiny_pipeline(causal)
        alone = make(pipe)
        state = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
        attributes = [list(vars(part)) for part in pipe.vae.modules()]
        for case in CASES:
            _, size, split, strips = case
            if case[0] != causal:
                continue
            parallel = parallelize(
                pipe.transformer, pipe.vae, split=split, strips=strips, ranks=list(range(size))
            )
            if dist.get_rank() < size:
                pipe.branches = parallel.branches or copy.copy(pipe).branches
                found["differences"][case] = (make(pipe) - alone).abs().max().item()
            parallel.remove()
            pipe.branches = tiny_branches()
        found[f"{causal} restored"] = (make(pipe) - alone).abs().max().item()
        assert all(torch.equal(value, state[name]) for name, value in pipe.transformer.state_dict().items())
        assert attributes == [list(vars(part)) for part in pipe.vae.modules()]  # one would keep it from tiles
    found |= odds_and_ends(pipe) | bytes_sent()
    ranks.leave()
    return found


def tiny_branches() -> Any:
    from kairos.pipeline import one_after_the_other

    return one_after_the_other


@torch.no_grad()
def bytes_sent() -> dict[str, Any]:
    """Velocity by either route of the delta rule, at sizes that do not divide, and the bytes of a forward."""
    found: dict[str, Any] = {"routes": {}, "bytes": {}}
    transformer = random_pipeline(**SIZES).transformer
    for frames, height, width in ((5, 6, 10), (3, 2, 2), (1, 2, 2)):  # 75, 3 and 1 tokens
        noise = torch.Generator().manual_seed(2)
        latents = torch.randn(2, 16, frames, height, width, generator=noise)
        prompt = torch.randn(2, 7, 32, generator=noise)
        timestep = torch.rand(2, frames, generator=noise) * 1000
        alone = transformer(latents, timestep, prompt).sample
        for size in (2, 3, 4):
            for route in ("auto", "heads", "tokens"):
                parallel = parallelize(transformer, None, strips=False, ranks=range(size), delta_route=route)
                if dist.get_rank() < size:
                    split = transformer(latents, timestep, prompt).sample
                    case = (frames * height * width // 4, size, route)
                    found["routes"][case] = (split - alone).abs().max().item()
                    found["bytes"][case] = sum(parallel.sent.values())
                parallel.remove()
    return found


def odds_and_ends(pipe: Any) -> dict[str, Any]:
    """Refusals, and cases that need ranks."""
    from kairos.models.step_cache import StepCache
    from kairos.streaming.decoder import StreamingVAEDecoder

    found: dict[str, Any] = {}
    parallel = parallelize(pipe.transformer, pipe.vae)
    pipe.branches = parallel.branches or pipe.branches
    latents = torch.randn(1, 16, 2, 4, 4)
    for name, call in {
        "gradients": lambda: pipe.transformer(latents, torch.zeros(1), torch.zeros(1, 3, 32)),
        "state": torch.no_grad()(
            lambda: pipe.transformer(latents, torch.zeros(1), torch.zeros(1, 3, 32), return_state=True)
        ),
        "step cache": torch.no_grad()(
            lambda: pipe.transformer(
                latents, torch.zeros(1), torch.zeros(1, 3, 32), step_cache=StepCache(0.1)
            )
        ),
    }.items():
        try:
            call()
        except UserError as error:
            found[name] = str(error)
    generator = torch.Generator().manual_seed(3)
    stream = torch.randn(1, 16, 3, 9, 4, generator=generator)
    strips = StreamingVAEDecoder(pipe.vae).decode(stream)
    flat = make(pipe, height=16, width=80)  # two rows of latents for four ranks
    parallel.remove()
    found["stream"] = (strips - StreamingVAEDecoder(pipe.vae).decode(stream)).abs().max().item()
    found["flat"] = (flat - make(pipe, height=16, width=80)).abs().max().item()
    parallel = parallelize(pipe.transformer, pipe.vae, split="cfg")
    pipe.branches = parallel.branches
    unguided = make(pipe, guidance_scale=1.0)
    parallel.remove()
    pipe.branches = tiny_branches()
    found["unguided"] = (unguided - make(pipe, guidance_scale=1.0)).abs().max().item()
    for name, wanted in {"heads": {"split": "context"}, "one": {"split": "cfg", "ranks": [0]}}.items():
        few = random_pipeline(num_attention_heads=2)
        try:
            parallelize(few.transformer, few.vae, **wanted)
        except UserError as error:
            found[name] = str(error)
    return found


@pytest.fixture(scope="module")
def parity() -> list[dict[str, Any]]:
    return launch(parity_on_ranks, size=max(RANKS))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_every_split_makes_the_video_of_one_rank(parity: list[dict[str, Any]], case: tuple) -> None:
    found = [rank["differences"][case] for rank in parity if case in rank["differences"]]
    assert len(found) == case[1]
    assert max(found) < 1e-4


def test_a_model_is_itself_again_when_the_split_is_removed(parity: list[dict[str, Any]]) -> None:
    assert all(rank[f"{causal} restored"] == 0 for rank in parity for causal in ("none", "chunk"))


@pytest.mark.parametrize("route", ["auto", "heads", "tokens"])
def test_the_velocity_is_that_of_one_rank_with_few_tokens_and_with_many(
    parity: list[dict[str, Any]], route: str
) -> None:
    found = [value for rank in parity for case, value in rank["routes"].items() if case[2] == route]
    assert len(found) == 3 * (2 + 3 + 4)
    assert max(found) < 1e-5


def test_the_bytes_that_are_sent_are_those_that_are_computed(parity: list[dict[str, Any]]) -> None:
    config = random_pipeline(**SIZES).transformer.config
    for rank, found in enumerate(parity):
        for (tokens, size, route), sent in found["bytes"].items():
            assert sent == cost.forward_bytes(config, tokens, size, width=4, batch=2, route=route)[rank]


def test_without_guidance_both_halves_make_the_one_velocity(parity: list[dict[str, Any]]) -> None:
    assert max(rank["unguided"] for rank in parity) < 1e-4


def test_frames_are_decoded_in_strips_as_they_come(parity: list[dict[str, Any]]) -> None:
    assert max(rank["stream"] for rank in parity) < 1e-4


def test_frames_with_fewer_rows_than_ranks_are_made_whole(parity: list[dict[str, Any]]) -> None:
    assert max(rank["flat"] for rank in parity) < 1e-4


def test_what_cannot_be_split_is_refused_in_one_line(parity: list[dict[str, Any]]) -> None:
    said = parity[0]
    assert "at most as many ranks as the model has heads, 2, got 4" in said["heads"]
    assert "--split cfg needs two ranks" in said["one"]
    assert "inference only" in said["gradients"]
    assert "a rollout's state lives on one rank" in said["state"]
    assert "leave it out of a split" in said["step cache"]


# Failures.


def rank_that_is_killed() -> None:
    ranks.join("cpu")
    if dist.get_rank() == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def rank_that_raises(kind: str) -> None:
    ranks.join("cpu")
    if dist.get_rank() == 1:
        raise {"user": UserError("a size that cannot be"), "bug": ZeroDivisionError("by nothing")}[kind]
    dist.barrier()


def ranks_that_differ() -> None:
    ranks.join("cpu", {"seed": 7 if os.environ["RANK"] == "1" else 0})


def numbers_taken(count: int) -> list[int]:
    world = ranks.join("cpu")
    taken = []
    for number in WorkQueue(world.store, count):
        taken.append(number)
        time.sleep(0.3 if number == 0 else 0.01)
    ranks.leave()
    return taken


@pytest.mark.parametrize(
    ("function", "arguments", "error", "message"),
    [
        (rank_that_is_killed, (), MachineError, "rank 2 of 3 was killed by SIGKILL"),
        (rank_that_raises, ("user",), UserError, "^a size that cannot be$"),
        (rank_that_raises, ("bug",), RankError, "rank 1 of 3 failed:(.|\n)*by nothing"),
        (ranks_that_differ, (), UserError, "ranks differ in seed: 0 on rank 0, 7 on rank 1"),
    ],
)
def test_one_rank_that_fails_ends_all_and_its_error_is_the_one_that_is_raised(
    function: Any, arguments: tuple, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as raised:
        launch(function, arguments, size=3)
    assert str(raised.value).count("Connection") == 0


def test_the_queue_gives_each_number_once_and_a_long_job_holds_none_up() -> None:
    taken = launch(numbers_taken, (12,), size=2)
    assert sorted(number for rank in taken for number in rank) == list(range(12))
    slow = next(rank for rank in taken if 0 in rank)
    assert len(slow) < 6


# The start.


def test_where_there_are_gpus_ranks_are_forked_off_a_process_that_has_not_asked_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To import diffusers is to ask. CUDA cannot be used in a process forked off one that has."""
    preloaded: list[list[str]] = []
    monkeypatch.setattr(forkserver, "ensure_running", lambda: None)
    monkeypatch.setattr(forkserver, "set_forkserver_preload", preloaded.append)
    for gpus in (2, 0):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        _context()
    assert preloaded == [[], PRELOADED]


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Any:
    def tell(**changed: object) -> None:
        said = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
        for name, value in (said | changed).items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)

    return tell


def test_a_rendezvous_that_is_missing_is_named(place: Any) -> None:
    place(RANK=1)
    with pytest.raises(UserError, match=r"no rendezvous at 127\.0\.0\.1:1 after 1 s"):
        ranks.join("cpu", wait_s=1)


def test_a_port_in_use_is_named(place: Any) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        place(MASTER_PORT=taken.getsockname()[1])
        with pytest.raises(UserError, match=r"is in use on 127\.0\.0\.1; set MASTER_PORT"):
            ranks.join("cpu", wait_s=1)


def test_a_rank_that_does_not_come_is_named(place: Any) -> None:
    place(MASTER_PORT=0)
    with pytest.raises(MachineError, match=r"rank 1 of 2 did not come within 0\.2 s"):
        ranks.join("cpu", wait_s=0.2)


def test_a_rank_that_is_done_waits_for_the_rest_of_a_list_for_days() -> None:
    waits = []

    class Store(dist.HashStore):
        def wait(self, keys: list[str], timeout: timedelta) -> None:
            waits.append(timeout)

    world = ranks.World(0, 1, Store(), torch.device("cpu"))
    assert world.share("outcomes", ["made"]) == [["made"]]
    assert min(waits) > timedelta(days=7)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"MASTER_ADDR": ""}, "MASTER_ADDR not set: start ranks with torchrun"),
        ({"RANK": 2}, "RANK must be from 0 to WORLD_SIZE - 1 = 1, got 2"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a whole number, got 'two'"),
    ],
)
def test_a_place_that_cannot_be_is_refused(place: Any, changed: dict[str, Any], message: str) -> None:
    place(**changed)
    with pytest.raises(UserError, match=message):
        ranks.join("cpu", wait_s=1)


def test_of_ranks_that_fail_together_the_first_one_speaks() -> None:
    store = dist.HashStore()
    with pytest.raises(UserError, match="a port"), ranks.one_voice(store):
        raise UserError("a port")
    with pytest.raises(SystemExit) as left, ranks.one_voice(store):
        raise RuntimeError("Connection closed by peer")
    assert left.value.code == 1


SLOW_TO_LET_GO = """
import threading, time, weakref
import torch, torch.distributed as dist
from kairos.distributed import ranks

begun = threading.Event()

def let_go(_):
    begun.set()
    time.sleep(0.1)

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
group, kept = dist.group.WORLD, []
for _ in range(2):
    tensor = torch.ones(1)
    kept.append(weakref.ref(tensor, let_go))
    dist.all_reduce(tensor, async_op=True)
    del tensor
begun.wait()
ranks.leave()
print("left")
"""


def test_a_rank_ends_well_though_gloo_still_holds_what_was_exchanged() -> None:
    done = subprocess.run([sys.executable, "-c", SLOW_TO_LET_GO], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "left\n"), done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs here")
def test_gpus_that_are_not_there_are_refused() -> None:
    with pytest.raises(UserError, match="this machine has no GPU; --device cpu runs on it, with --gpus N"):
        ranks.check_gpus(2)


# Arithmetic.


@pytest.mark.parametrize(
    ("script", "option", "message"),
    [
        ("communication", "--ranks", "--ranks must be at least 2"),
        ("rollout", "--rounds", "--rounds must be at least 2"),
    ],
)
def test_a_benchmark_of_nothing_is_refused(
    script: str, option: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", [script, option, "1"])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(ROOT / "benchmarks" / f"{script}.py"), run_name="__main__")
    assert left.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("parts", [1, 3, 6, 7, 8])
def test_shares_differ_by_one_at_most_and_cover_everything(parts: int) -> None:
    shares = spread(20, parts)
    assert (sum(shares), max(shares) - min(shares) <= 1) == (20, True)
    assert [i for share in slices(shares) for i in range(20)[share]] == list(range(20))


def test_the_delta_rule_stays_with_its_tokens_when_sequences_are_long() -> None:
    heads = spread(20, 4)
    assert cost.delta_route(spread(25_200, 4), heads, 256, 512, 2) == "tokens"
    assert cost.delta_route(spread(800, 4), heads, 256, 512, 2) == "heads"
    assert cost.delta_route([2, 2, 2, 2], heads, 1, 1, 2) == "heads"


@pytest.fixture
def communication(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script that computes what the documentation says of many GPUs."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("communication")


@pytest.mark.parametrize("size", [2, 3, 4, 6, 7, 8])
def test_splitting_sends_less_than_broadcasting_the_sequence(communication: Any, size: int) -> None:
    tokens = clip_shape(RELEASED_TRANSFORMER, 480, 640, 81).tokens
    split = max(cost.forward_bytes(RELEASED_TRANSFORMER, tokens, size, width=2))
    assert split < 0.6 * max(communication.broadcast_bytes(RELEASED_TRANSFORMER, tokens, size, width=2))


def test_more_ranks_are_computed_to_be_faster_but_never_by_more_than_their_number(communication: Any) -> None:
    shape = Shape(21, 1200)
    alone = communication.step_seconds(shape, 1, "context")
    for split in ("context", "cfg"):
        gains = [alone / communication.step_seconds(shape, n, split) for n in (2, 4, 8)]
        assert gains == sorted(gains)
        assert all(0.5 * n < gain <= n for n, gain in zip((2, 4, 8), gains, strict=True))


def test_the_split_keeps_the_ranks_busy() -> None:
    assert choose_split(requests=12, ranks=4, guided=True, heads=20) == "list"
    assert choose_split(requests=2, ranks=1, guided=True, heads=20) == "list"
    assert choose_split(requests=1, ranks=4, guided=True, heads=20) == "cfg"
    assert choose_split(requests=1, ranks=3, guided=True, heads=20) == "context"
    assert choose_split(requests=1, ranks=4, guided=False, heads=20) == "context"
    assert choose_split(requests=1, ranks=5, guided=True, heads=3) == "cfg"
