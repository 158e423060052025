"""The quickest route is found by measuring, once for each shape, and only among those that are right."""

from __future__ import annotations

import time

import pytest
import torch

from kairos.ops import routes
from kairos.ops.routes import quickest

calls: list[str] = []


def route(name: str, *, slow: float = 0.0, off: float = 0.0, fails: bool = False):
    def run(x: torch.Tensor) -> torch.Tensor:
        calls.append(name)
        if fails:
            raise RuntimeError(f"{name} is not for this machine\nand more lines")
        time.sleep(slow)
        return x + 1 + off

    return run


@pytest.fixture(autouse=True)
def forget(monkeypatch, caplog):
    monkeypatch.setattr(routes, "_CHOSEN", {})
    caplog.set_level("INFO", logger="kairos.ops.routes")
    calls.clear()


def test_the_quickest_route_is_taken_and_said_with_its_times(caplog):
    found = {"safe": route("safe", slow=0.2), "quick": route("quick"), "slow": route("slow", slow=0.3)}
    x = torch.randn(3)
    assert torch.equal(quickest("product", found, (x,)), x + 1)
    assert calls[-1] == "quick"
    assert "product on cpu: quick (safe 2" in caplog.text


def test_a_shape_is_measured_once_and_another_shape_again():
    found = {"safe": route("safe"), "other": route("other", slow=0.01)}
    quickest("product", found, (torch.randn(3),))
    measured = len(calls)
    quickest("product", found, (torch.randn(3),))
    assert len(calls) == measured + 1
    quickest("product", found, (torch.randn(4),))
    assert len(calls) > measured + 4


def test_a_quick_route_with_other_results_is_left_out_and_said(caplog):
    found = {"safe": route("safe", slow=0.01), "wrong": route("wrong", off=1e-3)}
    x = torch.randn(3)
    assert torch.equal(quickest("product", found, (x,)), x + 1)
    assert "wrong is off by 1.0e-03, and left out" in caplog.text


def test_small_results_are_held_to_their_own_size():
    """A mean over thousands of keys is a hundredth: a wrong one must not pass for rounding."""
    small = torch.full((3,), 0.01, dtype=torch.bfloat16)
    found = {"safe": route("safe", slow=0.01), "wrong": lambda x: x + 1.01}
    about_nothing = small - 1
    assert torch.equal(quickest("product", found, (about_nothing,)), about_nothing + 1)


def test_results_that_are_not_numbers_are_wrong():
    found = {"safe": route("safe", slow=0.01), "wrong": route("wrong", off=float("nan"))}
    assert quickest("product", found, (torch.zeros(3),)).isfinite().all()


def test_results_that_are_no_numbers_go_through_and_choose_nothing():
    found = {"safe": route("safe", slow=0.01), "other": route("other")}
    lost = torch.full((3,), float("nan"))
    assert quickest("product", found, (lost,)).isnan().all() and calls[-1] == "safe"
    quickest("product", found, (torch.zeros(3),))
    assert calls[-1] == "other"


def test_a_route_that_does_not_run_is_left_out_with_its_reason_in_one_line(caplog):
    found = {"safe": route("safe"), "broken": route("broken", fails=True)}
    quickest("product", found, (torch.randn(3),))
    assert calls[-1] == "safe"
    assert "broken does not run here: broken is not for this machine" in caplog.text
    assert "more lines" not in caplog.text


def test_the_trusted_route_may_not_fail():
    with pytest.raises(RuntimeError, match="not for this machine"):
        quickest("product", {"safe": route("safe", fails=True), "other": route("other")}, (torch.randn(3),))


def test_a_gpu_that_is_not_the_current_one_is_waited_for(monkeypatch):
    class OnTheSecondGpu(torch.Tensor):
        device = torch.device("cuda:1")
        is_cuda = True

    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: waited.append(device))
    quickest("product", {"safe": route("safe")}, (torch.zeros(3).as_subclass(OnTheSecondGpu),))
    assert set(waited) == {torch.device("cuda:1")}


def test_training_is_measured_apart_from_inference():
    found = {"safe": route("safe"), "other": route("other", slow=0.01)}
    quickest("product", found, (torch.randn(3),))
    measured = len(calls)
    assert quickest("product", found, (torch.randn(3, requires_grad=True),)).requires_grad
    assert len(calls) > measured + 4


class Doubled(torch.autograd.Function):
    """Twice x, and a way back that a test can spoil."""

    @staticmethod
    def forward(ctx, x, back):
        ctx.back = back
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return ctx.back(gradient), None


def slow_back(gradient: torch.Tensor) -> torch.Tensor:
    time.sleep(0.1)
    return 2 * gradient


def no_way_back(gradient: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("out of shared memory")


@pytest.mark.parametrize(
    ("back", "said"),
    [
        (slow_back, "other 1"),  # 100 ms and more
        (no_way_back, "other does not run here: out of shared memory"),
        (lambda gradient: 2.1 * gradient, "other is off by 1.0e-01 in a gradient, and left out"),
    ],
)
def test_in_training_a_route_is_taken_only_if_its_way_back_is_quick_too_and_right(caplog, back, said):
    def safe(x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.01)
        return 2 * x

    x = torch.randn(3, requires_grad=True)
    found = {"safe": safe, "other": lambda x: Doubled.apply(x, back)}
    quickest("product", found, (x,)).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 2.0))
    assert said in caplog.text
    with torch.no_grad():
        quickest("product", found, (x,))
    assert "product on cpu: other" in caplog.text  # without a way back it is the quicker one


def test_measuring_keeps_nothing_for_the_checkpoint_that_may_be_around_it():
    """A checkpointed block is run again on the way back, measures nothing then, and has to keep as much."""
    found = {"safe": lambda x: x.exp().exp(), "other": lambda x: (time.sleep(0.01), x.exp().exp())[1]}
    x, kept = torch.randn(3, requires_grad=True), []
    for times in (1, 2):
        with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
            quickest("product", found, (x,))
        assert len(kept) == 2 * times
