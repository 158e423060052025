"""Distillation to a few steps without guidance: L_CM + lambda L_DMD (Kairos report, arXiv 2606.16533).

Three networks: the frozen teacher, the student, and the fake score, which learns by flow matching what the
student makes. Where the guided teacher and the fake score disagree about a noised sample of the student's,
the student is told which way to go (distribution matching, arXiv 2311.18828 and 2405.14867). What the teacher
cannot show, the data can: a critic tells their clips from the student's (section 4.3 of the latter).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kairos.schedulers import FewStepScheduler
from kairos.training.batches import Batch, moved_to, seed_of
from kairos.training.cache import ClipSet
from kairos.training.checkpoint import copy_into, load_optimizer
from kairos.training.flow import FlowMatching, predict
from kairos.training.frames import FrameErrors
from kairos.training.parallel import ALONE, Processes, average_gradients, prepare
from kairos.training.samples import motion, sample_latents
from kairos.training.stage import CLEAR_SIGMA, Distillation, Stage
from kairos.training.visible import seen

CRITIC_SIGMA = 0.5
"""The critic sees clips under noise up to this sigma; above it there is little left to tell them by."""

UNROLLED = 100
"""From here on are the draws of steps for unrolled chunks; before it those of single ones."""

CRITIC_WEIGHT, CRITIC_LR = 0.5, 2e-3
"""The weight of the critic's loss beside the fake score's, and the rate of its own layers."""


class Critic:
    """Tells token by token the data's clips from the student's, by what is behind the fake score's middle."""

    def __init__(self, fake_score: Any, seed: int) -> None:
        width = fake_score.config.hidden_size
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # the CPU's alone: a GPU's is nobody's to change here
            layers = nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)
        self.head = nn.Sequential(nn.LayerNorm(width, elementwise_affine=False), *layers)
        fake_score.blocks[len(fake_score.blocks) // 2].register_forward_hook(self._keep)

    def _keep(self, block: nn.Module, inputs: Any, outputs: Any) -> None:
        self.hidden: Tensor = outputs[0]

    def verdict(self) -> Tensor:
        """(B, tokens) of the last forward pass: above 0 for the data's."""
        return self.head(self.hidden.float())[..., 0]


class DistillationObjective(FlowMatching):
    """The student is the model that the loop trains; the fake score begins as a copy of the teacher."""

    def __init__(
        self,
        student: nn.Module,
        sets: Sequence[ClipSet],
        stage: Stage,
        options: Distillation,
        here: Processes = ALONE,
        teacher: nn.Module | None = None,
        root: Tensor | None = None,
        frames: FrameErrors | None = None,
    ) -> None:
        """teacher: where it is not what the student starts from. root: of `visible_root`. frames: what
        decodes clips, where the options ask for it."""
        super().__init__(sets, stage, here, root)
        self.options, self.frames = options, frames
        self.scheduler = FewStepScheduler(sampling_times=options.sampling_times, shift=options.shift)
        self.sigmas: list[float] = self.scheduler.sigmas.tolist()
        self.teacher = (teacher or copy.deepcopy(student)).to(here.device).requires_grad_(False).eval()
        self.fake_score = copy.deepcopy(self.teacher).requires_grad_(True)
        self.critic = Critic(self.fake_score, stage.seed) if options.adversarial else None
        for network, learns in ((self.teacher, False), (self.fake_score, True)):
            prepare(network, here, checkpointing=learns and stage.checkpointing, compiled=stage.compile)
        groups: list[dict[str, Any]] = [{"params": list(self.fake_score.parameters())}]
        if self.critic is not None:
            head = self.critic.head.to(here.device)
            groups.append({"params": list(head.parameters()), "lr": CRITIC_LR})
        self.fake_optimizer = torch.optim.AdamW(
            groups, lr=options.fake_score_lr, betas=(0.0, 0.999), weight_decay=0.0
        )
        self._teacher_motion: float | None = None

    def loss(self, model: nn.Module, step: int, part: int) -> tuple[Tensor, int]:
        """The student's loss; before the first part the fake score is brought up to date."""
        if part == 0:
            for update in range(self.options.fake_score_updates):
                self.update_fake_score(model, step, update)
        batch = self.batch(model, step, part)
        generator = self.generator(step, part, 0)
        if self.is_unrolled(batch):
            return self.options.truth * self.unrolled_loss(model, batch, generator, step, part), len(batch)
        last = self.draw_step(step, part, 0)
        if batch.cut.past < 2 and not self.options.asks:
            last = len(self.sigmas) - 2  # the truth alone can teach no other
        if self.is_determined(batch, last):
            start = batch.sample if batch.cut.past < 2 else None  # its own samples are of other clips
            made = self.make(model, batch, generator, last, start=start, with_gradient=True)
            error = seen(made - batch.sample, self.root)[:, :, batch.cut.past :].square().mean()
            loss = self.options.truth * error
            if self.frames is not None and batch.cut.past >= 2:
                with self.processes.autocast(self.stage.precision):
                    shown = self.frames(made, batch.keys, batch.cut.past, generator)
                loss = loss + self.options.frames * shown
            return loss, len(batch)
        made = self.make(model, batch, generator, last, with_gradient=True)
        loss = made.new_zeros(())
        if self.options.matching or self.critic:
            loss = loss + self.matching_loss(batch, made, generator)
        if self.options.score:
            other = self.make(model, batch, generator, last, with_gradient=False)
            one, two, true = (seen(latents, self.root) for latents in (made, other, batch.sample))
            loss = loss + self.options.score * energy_score(one, two, true, batch.cut.past)
        if self.options.consistency:
            number = self.draw_step(step, part, 1)
            loss = loss + self.options.consistency * self.consistency_loss(model, batch, number)
        return loss, len(batch)

    def is_determined(self, batch: Batch, last: int) -> bool:
        """Whether the clip itself is what the student should make: its start tells how it goes on, or the
        step has little noise to take away."""
        return self.options.truth > 0 and (batch.cut.past >= 2 or self.sigmas[last] <= CLEAR_SIGMA)

    def is_unrolled(self, batch: Batch) -> bool:
        """Whether the student goes through the clips of the batch as a rollout does."""
        return self.options.unrolled > 1 and batch.cut.task == "rollout" and batch.cut.past >= 2

    def unrolled_loss(
        self, student: nn.Module, batch: Batch, generator: torch.Generator, step: int, part: int
    ) -> Tensor:
        """Chunk after chunk from the state, as a rollout goes: behind the true past the student's own chunks.
        Each is pulled to the true clip, so that it learns to go on from what it makes (after Self Forcing,
        arXiv 2506.08009). The gradient goes through one step of each chunk, and not through the state.
        """
        cut, prompt, losses = batch.cut, (batch.prompt_embeds, batch.prompt_mask), []

        def run(
            latents: Tensor, sigma: float, state: Any, chunks: Sequence[int] | None = None
        ) -> tuple[Tensor, Any]:
            with self.processes.autocast(self.stage.precision):
                velocity, after = student(
                    latents,
                    latents.new_full((len(latents),), 1000 * sigma),
                    prompt[0],
                    encoder_attention_mask=prompt[1],
                    chunk_frames=chunks,
                    state=state,
                    return_state=True,
                    return_dict=False,
                )
            return velocity.float(), after

        begun = cut.past % cut.chunk
        lengths = [begun] * (begun > 0) + [cut.chunk] * (cut.past // cut.chunk)
        with torch.no_grad():
            _, state = run(batch.sample[:, :, : cut.past], 0.0, None, lengths)
        for number in range(cut.chunks):
            begin = cut.past + number * cut.chunk
            true = batch.sample[:, :, begin : begin + cut.chunk]
            learned, is_last = self.draw_step(step, part, UNROLLED + number), number == cut.chunks - 1
            made = true  # the first sigma is 1: nothing of it is seen
            for taken, sigma in enumerate(self.sigmas[: learned + 1] if is_last else self.sigmas[:-1]):
                noise = self.draw(true, generator)
                sample = (1 - sigma) * made.detach() + sigma * noise
                with torch.set_grad_enabled(taken == learned):
                    made = sample - sigma * run(sample, sigma, state)[0]
                if taken == learned:
                    losses.append(seen(made - true, self.root).square().mean())
            if not is_last:
                with torch.no_grad():
                    _, state = run(made, 0.0, state)
        return torch.stack(losses).mean()

    def consistency_loss(self, student: nn.Module, batch: Batch, number: int) -> Tensor:
        """From z at sampling time `number`, one Euler step of the teacher to the next; the student's end of
        the path from the first is pulled to the teacher's from the second."""
        sigma, following = self.sigmas[number], self.sigmas[number + 1]
        noisy = self.noised(batch, batch.sample, sigma, batch.noise)
        with torch.no_grad():
            stepped = noisy + (following - sigma) * self.guided(batch, noisy, sigma)
            stepped = self.with_past(batch, stepped)
            target = stepped
            if following > 0:
                target = stepped - following * self.guided(batch, stepped, following)
        made = noisy - sigma * self.velocity(student, batch, noisy, sigma)
        return (made - target)[:, :, batch.cut.past :].square().mean()

    def matching_loss(self, batch: Batch, made: Tensor, generator: torch.Generator) -> Tensor:
        """A loss whose gradient for the student's sample x is that of the two ways to tell it where to go.

        Matching: (x0 of the fake score - x0 of the guided teacher) / the mean of |x - x0 of the teacher|; and
        the gradient of the critic's verdict.
        """
        low, high = self.options.sigma_range
        sigma = low + (high - low) * float(torch.rand((), generator=generator))
        future = slice(batch.cut.past, None)
        with torch.no_grad():
            noisy = self.noised(batch, made, sigma, self.draw(batch.sample, generator))
            real = noisy - sigma * self.guided(batch, noisy, sigma)
            fake = noisy - sigma * self.velocity(self.fake_score, batch, noisy, sigma)
            scale = (made - real)[:, :, future].abs().mean((1, 2, 3, 4), keepdim=True).clamp(min=1e-5)
            target = made - (fake - real) / scale
        loss = self.options.matching * 0.5 * (made - target)[:, :, future].square().mean()
        if self.critic is not None:
            leaf = made.detach().requires_grad_()
            verdict = F.softplus(-self.judge(batch, leaf, generator)).mean()
            (gradient,) = torch.autograd.grad(verdict, leaf)
            loss = loss + self.options.adversarial * (gradient * made).sum()
        return loss

    def judge(
        self, batch: Batch, latents: Tensor, generator: torch.Generator, *, mismatched: bool = False
    ) -> Tensor:
        """The critic's verdict (B,) on what is to be made, noised; `mismatched`: under another's caption."""
        assert self.critic is not None
        sigma = batch.sigma.clone()
        spread = moved_to(sigma.device, torch.rand(len(batch), 1, generator=generator))
        sigma[:, batch.cut.past :] = spread * CRITIC_SIGMA
        sigma[:, : batch.cut.past] = 0
        noise, rates = self.draw(batch.sample, generator), sigma[:, None, :, None, None]
        noisy = self.with_past(batch, (1 - rates) * latents + rates * noise)
        prompt = batch.prompt_embeds, batch.prompt_mask
        if mismatched:
            prompt = prompt[0].roll(1, 0), prompt[1].roll(1, 0)
        self.velocity(self.fake_score, batch, noisy, sigma, prompt=prompt)
        verdict = self.critic.verdict().unflatten(1, (noisy.shape[2], -1))
        return verdict[:, batch.cut.past :].mean((1, 2))

    def update_fake_score(self, student: nn.Module, step: int, update: int) -> None:
        """One step of flow matching on what the student makes, of other batches than its own."""
        batch = self.batch(student, self.others(step, update), 0)
        if self.is_determined(batch, 0) or not (self.options.matching or self.critic):
            return  # nobody asks it about those
        generator = self.generator(step, 0, update + 1)
        last = self.draw_step(step, 0, update + 2)
        with torch.no_grad():
            made = self.make(student, batch, generator, last, with_gradient=False)
        noise = self.draw(batch.sample, generator)
        sigma = batch.sigma.clone()
        order = moved_to(sigma.device, torch.randperm(len(batch), generator=generator))
        sigma[:, batch.cut.past :] = sigma[order, batch.cut.past :]
        sigma[:, : batch.cut.past] = 0
        spread = sigma[:, None, :, None, None]
        noisy = (1 - spread) * made + spread * noise
        velocity = self.velocity(self.fake_score, batch, noisy, sigma)
        loss = (velocity - (noise - made))[:, :, batch.cut.past :].square().mean()
        loss.backward()
        if self.critic is not None:
            (CRITIC_WEIGHT * self.critic_loss(batch, made, generator)).backward()
            average_gradients(self.critic.head.parameters(), self.processes)
        nn.utils.clip_grad_norm_(self.fake_score.parameters(), self.stage.clip_norm)
        self.fake_optimizer.step()
        self.fake_optimizer.zero_grad(set_to_none=True)

    def others(self, step: int, update: int) -> int:
        """The step whose batch the fake score has at `step`: none of the student's own."""
        return self.stage.steps + step * self.options.fake_score_updates + update

    def asked(self, step: int) -> list[tuple[int, int]]:
        """The fake score's batches, then the student's."""
        updates = range(self.options.fake_score_updates)
        return [(self.others(step, update), 0) for update in updates] + super().asked(step)

    def step_of(self, drawn: int) -> int:
        beyond = drawn - self.stage.steps
        return drawn if beyond < 0 else beyond // self.options.fake_score_updates

    def critic_loss(self, batch: Batch, made: Tensor, generator: torch.Generator) -> Tensor:
        """Clips under their captions pass; the student's, and clips under another's caption, do not."""
        real = F.softplus(-self.judge(batch, batch.sample, generator)).mean()
        false = F.softplus(self.judge(batch, made, generator)).mean()
        mismatched = F.softplus(self.judge(batch, batch.sample, generator, mismatched=True))
        embeds, mask = batch.prompt_embeds, batch.prompt_mask
        others = (embeds != embeds.roll(1, 0)).any(2).any(1) | (mask != mask.roll(1, 0)).any(1)
        mismatched = (mismatched * others).sum() / others.sum().clamp(min=1)
        return real + 0.5 * (false + mismatched)

    def make(
        self,
        student: nn.Module,
        batch: Batch,
        generator: torch.Generator,
        last: int,
        *,
        start: Tensor | None = None,
        with_gradient: bool,
    ) -> Tensor:
        """What the student makes after its steps up to `last`, as its sampler does; the gradient goes through
        that one alone. With `start`, that step alone is made, of `start` under noise."""
        first = 0 if start is None else last
        made = batch.sample if start is None else start
        for number in range(first, last + 1):
            sigma = self.sigmas[number]
            sample = self.noised(batch, made, sigma, self.draw(batch.sample, generator))
            with torch.set_grad_enabled(with_gradient and number == last):
                made = sample - sigma * self.velocity(student, batch, sample, sigma)
        return self.with_past(batch, made)

    def guided(self, batch: Batch, noisy: Tensor, sigma: float) -> Tensor:
        """The teacher's velocity under guidance."""
        wanted = self.velocity(self.teacher, batch, noisy, sigma)
        scale = self.options.guidance_scale
        if scale == 1 or (batch.cut.past and not self.options.guide_continuation):
            return wanted
        embeds, mask = self.no_words
        empty = embeds.expand(len(batch), -1, -1), mask.expand(len(batch), -1)
        without = self.velocity(self.teacher, batch, noisy, sigma, prompt=empty)
        return without + scale * (wanted - without)

    @cached_property
    def no_words(self) -> tuple[Tensor, Tensor]:
        """The empty prompt's embeddings and mask, on the device."""
        embeds, mask = self.sets[0].embeddings([""])
        return embeds.to(self.processes.device), mask.to(self.processes.device)

    def velocity(
        self,
        network: nn.Module,
        batch: Batch,
        noisy: Tensor,
        sigma: float | Tensor,
        prompt: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """With the past at time 0. Autocast is entered anew: what it keeps without a gradient has none."""
        if not isinstance(sigma, Tensor):
            sigma = torch.full(noisy.shape[0:3:2], sigma, device=noisy.device)
            sigma[:, : batch.cut.past] = 0
        with self.processes.autocast(self.stage.precision):
            prompt = prompt or (batch.prompt_embeds, batch.prompt_mask)
            return predict(network, batch, noisy, 1000 * sigma, prompt)

    def noised(self, batch: Batch, sample: Tensor, sigma: float, noise: Tensor) -> Tensor:
        return self.with_past(batch, (1 - sigma) * sample + sigma * noise)

    def with_past(self, batch: Batch, latents: Tensor) -> Tensor:
        """The clean past in front of what is made."""
        past = batch.cut.past
        return torch.cat([batch.sample[:, :, :past], latents[:, :, past:]], 2) if past else latents

    def draw(self, like: Tensor, generator: torch.Generator) -> Tensor:
        """Noise for latents; on a GPU it is drawn there, from a number of the generator's."""
        device = like.device
        if device.type == "cpu":
            return torch.randn(like.shape, generator=generator)
        there = torch.Generator(device).manual_seed(int(torch.randint(1 << 62, (), generator=generator)))
        return torch.randn(like.shape, generator=there, device=device)

    def generator(self, step: int, part: int, use: int) -> torch.Generator:
        return torch.Generator().manual_seed(
            seed_of(self.stage.seed, step, part, use, self.processes.rank, 7)
        )

    def draw_step(self, step: int, part: int, use: int) -> int:
        """One of the sampler's steps, another draw for each `use`, the same in every process: it decides how
        often networks are asked, and those that lie over all processes must be asked by all as often."""
        drawn = torch.Generator().manual_seed(seed_of(self.stage.seed, step, part, use, 11))
        return int(torch.randint(len(self.sigmas) - 1, (), generator=drawn))

    def state(self) -> dict[str, Any]:
        kept: dict[str, Any] = {
            "fake_score": dict(self.fake_score.named_parameters()),
            "optimizer": self.fake_optimizer.state_dict(),
        }
        if self.critic is not None:
            kept["critic"] = dict(self.critic.head.named_parameters())
        return kept

    def load_state(self, state: dict[str, Any]) -> None:
        copy_into(dict(self.fake_score.named_parameters()), state["fake_score"])
        if self.critic is not None:
            copy_into(dict(self.critic.head.named_parameters()), state["critic"])
        load_optimizer(self.fake_optimizer, state["optimizer"])

    def report(self, model: nn.Module, step: int) -> dict[str, float]:
        """Every so many steps the ratio of motion, student to teacher: below 1 it moves too little."""
        every = self.options.motion_every
        whole = [clips for clips in self.sets if not self.stage.only_unrolls(clips.bucket)]
        clips = max(whole or self.sets, key=lambda clips: clips.bucket.frames)
        if clips.latent_frames == 1 or (step != self.stage.steps and not (every and step % every == 0)):
            return {}  # pictures do not move
        rows = list(range(min(self.options.motion_clips, len(clips))))

        def moved(network: Any, few_step: FewStepScheduler | None) -> float:
            with self.processes.autocast(self.stage.precision):
                latents = sample_latents(
                    network,
                    clips,
                    rows,
                    steps=self.options.teacher_steps,
                    guidance_scale=self.options.guidance_scale,
                    guide_continuation=self.options.guide_continuation,
                    few_step=few_step,
                    known_frames=1,
                    device=self.processes.device,
                )
            return motion(latents)

        if self._teacher_motion is None:
            self._teacher_motion = moved(self.teacher, None)
        return {"motion_ratio": moved(model, self.scheduler) / max(self._teacher_motion, 1e-9)}


def energy_score(made: Tensor, other: Tensor, true: Tensor, past: int) -> Tensor:
    """|made - true| - |made - other| / 2, of frames (B, C, F, h, w) from `past` on.

    `made` and `other` are two samples under one caption. The first distance pulls samples to the truth, the
    second apart, and in the mean only samples that are spread as the data are do best (a proper scoring rule;
    Gneiting and Raftery 2007, and for few steps arXiv 2502.02483). Distances are taken of whole clips, and of
    each patch of 2 x 2 in each frame: what stands where is learned sooner from the small ones.

    The gradient is that for both samples, though `other` has none: they are alike in the mean.
    """

    def distance(a: Tensor, b: Tensor) -> Tensor:
        square = (a - b)[:, :, past:].square().sum(1)
        patches = F.avg_pool2d(square, 2) * 4
        near = (patches + 1e-6).sqrt().mean((1, 2, 3))
        whole = (square.mean((1, 2, 3)) * 4 + 1e-6).sqrt()
        return near + whole

    apart = distance(made, other.detach())
    return (distance(made, true) - apart + apart.detach() / 2).mean()
