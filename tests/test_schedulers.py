"""The schedules give the published numbers, and their steps the equations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kairos import FewStepScheduler, FlowMatchScheduler, UserError
from kairos.schedulers import draw_noise, shift_for

GOLDEN = json.loads((Path(__file__).parent / "golden" / "scheduler_cases.json").read_text())


@pytest.mark.parametrize(
    "case", GOLDEN["flow_match"], ids=lambda c: f"{c['height']}x{c['width']}x{c['num_frames']}"
)
def test_sigmas_are_the_published_ones(case):
    frames, tokens = (case["num_frames"] - 1) // 4 + 1, case["height"] * case["width"] // 256
    assert shift_for(frames, tokens) == pytest.approx(case["shift"])
    scheduler = FlowMatchScheduler()
    scheduler.set_timesteps(case["num_inference_steps"], latent_frames=frames, tokens_per_frame=tokens)
    torch.testing.assert_close(scheduler.sigmas[:-1], torch.tensor(case["sigmas"]), atol=1e-6, rtol=0)
    torch.testing.assert_close(scheduler.timesteps, 1000 * scheduler.sigmas[:-1])
    assert scheduler.sigmas[-1] == 0


def test_the_distilled_schedule_is_the_published_one():
    scheduler = FewStepScheduler()
    scheduler.set_timesteps(50, latent_frames=9, tokens_per_frame=16)
    expected = torch.tensor(GOLDEN["distilled"]["sigmas"])
    torch.testing.assert_close(scheduler.sigmas[:-1], expected, atol=1e-6, rtol=0)
    assert scheduler.sigmas[-1] == 0 and len(scheduler.timesteps) == 4


def test_euler_steps_with_the_true_velocity_reach_the_sample():
    sample, noise = torch.randn(2, 1, 16, 3, 4, 4)
    scheduler = FlowMatchScheduler()
    scheduler.set_timesteps(7, latent_frames=3, tokens_per_frame=4)
    x = noise
    for time in scheduler.timesteps:
        (x,) = scheduler.step(noise - sample, time, x, return_dict=False)
    torch.testing.assert_close(x, sample, atol=1e-5, rtol=0)


def test_a_few_step_predicts_the_sample_and_noises_it_up_to_the_next_time():
    sample, noise = torch.randn(2, 1, 16, 3, 4, 4)
    scheduler = FewStepScheduler()
    second = scheduler.timesteps[1]
    sigma, following = scheduler.sigmas[1:3]
    x = (1 - sigma) * sample + sigma * noise
    x = scheduler.step(noise - sample, second, x, generator=torch.Generator().manual_seed(3)).prev_sample
    fresh = torch.randn(sample.shape, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(x, (1 - following) * sample + following * fresh, atol=1e-5, rtol=0)


def test_the_last_few_step_returns_the_sample_itself():
    sample, noise = torch.randn(2, 1, 16, 3, 4, 4)
    scheduler = FewStepScheduler()
    sigma = scheduler.sigmas[-2]
    x = scheduler.step(
        noise - sample, scheduler.timesteps[-1], (1 - sigma) * sample + sigma * noise
    ).prev_sample
    torch.testing.assert_close(x, sample, atol=1e-5, rtol=0)


def test_clips_of_a_batch_draw_their_noise_as_they_would_alone():
    scheduler = FewStepScheduler()
    x, velocity = torch.randn(2, 2, 16, 3, 4, 4)
    first = scheduler.timesteps[0]
    generators = [torch.Generator().manual_seed(s) for s in (1, 2)]
    together = scheduler.step(velocity, first, x, generator=generators).prev_sample
    alone = scheduler.step(velocity[1:], first, x[1:], generator=torch.Generator().manual_seed(2)).prev_sample
    assert torch.equal(together[1:], alone)
    with pytest.raises(UserError, match="one for each of the 2 videos"):
        scheduler.step(velocity, first, x, generator=generators[:1])


def test_one_seed_is_one_noise_whatever_torchs_own_precision_and_device_are():
    def drawn() -> list[torch.Tensor]:
        one, two = (torch.Generator("cpu").manual_seed(seed) for seed in (1, 2))
        return [draw_noise((2, 3), one), draw_noise((2, 3), [one, two])]

    expected = drawn()
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            again = drawn()
    finally:
        torch.set_default_dtype(usual)
    assert all(torch.equal(*pair) for pair in zip(expected, again, strict=True))


@pytest.mark.parametrize("kind", [FlowMatchScheduler, FewStepScheduler])
def test_a_scheduler_survives_saving(kind, tmp_path):
    kind().save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path)
    assert again.config.num_train_timesteps == 1000
    torch.testing.assert_close(again.sigmas, kind().sigmas)


def test_steps_that_make_no_schedule_are_refused():
    with pytest.raises(UserError, match="num_inference_steps must be at least 1, got 0"):
        FlowMatchScheduler().set_timesteps(0, latent_frames=3, tokens_per_frame=4)
    for times in [(), (100, 500), (500, 500), (1200, 500), (500, 0)]:  # equal times would be one step
        with pytest.raises(UserError, match="must fall"):
            FewStepScheduler(sampling_times=times)
