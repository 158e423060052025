"""What one stage of a training does: the clips, the mix of tasks, what is trained and how fast."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from kairos.data.config import above_0, at_least
from kairos.errors import UserError
from kairos.request import did_you_mean
from kairos.schedulers import FewStepScheduler
from kairos.training.clips import Bucket

TASKS = ("t2v", "ti2v", "i2v", "continuation", "rollout", "unconditional")
OBJECTIVES = ("flow", "distillation", "preference")

CLEAR_SIGMA = 0.4
"""Noise up to which a clip can be told from what it is under."""


@dataclass(frozen=True)
class LoRA:
    """Low-rank updates in place of all weights (arXiv 2106.09685)."""

    rank: int = 32
    alpha: float = 32
    targets: tuple[str, ...] = ("q", "k", "v", "o", "q_proj", "k_proj", "v_proj", "o_proj", "ffn.0", "ffn.2")

    def __post_init__(self) -> None:
        at_least(1, self, "rank", where="lora.")
        above_0(self, "alpha", where="lora.")


@dataclass(frozen=True)
class Distillation:
    """Four steps without guidance: consistency, and matching of distributions (arXiv 2405.14867).

    The third network, the fake score, learns by flow matching what the student makes.
    """

    teacher: str = ""
    """A stage, a model by name, a file or a folder; empty: what the student starts from."""
    guidance_scale: float = 5.0
    guide_continuation: bool = True
    """Whether the teacher is guided behind given frames too; where it samples without, the student should."""
    sampling_times: tuple[float, ...] = (1000, 800, 500, 100)
    shift: float = 5.0
    consistency: float = 1.0
    matching: float = 1.0
    """How much each of the two losses counts."""
    adversarial: float = 0.0
    """Above 0, a critic on the fake score tells the data from what the student makes, and the student is told
    by this much how to pass."""
    score: float = 0.0
    """Above 0, two samples under one caption are pulled to the true clip and apart by this much (the energy
    score): the student's samples spread as the data do, and a caption's words move all of them."""
    truth: float = 0.0
    """Above 0, clips that go on from two latent frames or more, which tell places and speeds, leave the
    teacher out: the student's own sample is pulled to the true clip by this much. So does a step with little
    noise to take away, which takes it off true clips. For exact worlds."""
    frames: float = 0.0
    """Above 0, where clips go on so, errors of their decoded frames count too, by this much (`frames.py`)."""
    frame_clips: int = 6
    """Clips of a batch that are decoded for it: most of such a step's time."""
    unrolled: int = 1
    """Chunks of a rollout that are made one after the other, each behind what the student made itself."""
    fake_score_updates: int = 5
    fake_score_lr: float = 4e-7
    sigma_range: tuple[float, ...] = (0.02, 0.98)
    """Sigmas at which the two scores are compared."""
    teacher_steps: int = 20
    """Of the teacher's clips that the student's motion is compared with."""
    motion_clips: int = 8
    motion_every: int = 50
    """Steps between comparisons of motion; 0: at the last step alone."""

    def __post_init__(self) -> None:
        where = "distillation."
        at_least(0, self, "consistency", "matching", "adversarial", "score", "truth", "frames", where=where)
        at_least(0, self, "fake_score_updates", "motion_every", where=where)
        at_least(1, self, "frame_clips", "unrolled", "teacher_steps", "motion_clips", where=where)
        above_0(self, "shift", "fake_score_lr", where=where)
        if self.frames and not self.truth:
            raise UserError(f"distillation.frames goes with truth, got {self.frames} and no truth")
        if self.unrolled > 1 and not self.truth:
            raise UserError(f"distillation.unrolled goes with truth, got {self.unrolled} and no truth")
        times = list(self.sampling_times)
        if not times or times[0] != 1000 or any(a <= b for a, b in pairwise([*times, 0])):
            raise UserError(
                "distillation.sampling_times must fall from 1000, where sampling starts from noise alone, "
                f"to above 0, got {times}"
            )
        last = FewStepScheduler(sampling_times=self.sampling_times, shift=self.shift).sigmas[-2]
        if not self.asks and not (self.truth and last <= CLEAR_SIGMA):
            raise UserError(
                "distillation has nothing to teach: consistency, matching, adversarial or score must exceed "
                f"0, or truth with sampling_times whose last sigma is at most {CLEAR_SIGMA}"
            )
        if len(self.sigma_range) != 2 or not 0 <= self.sigma_range[0] < self.sigma_range[1] <= 1:
            raise UserError(
                "distillation.sigma_range must be two rising numbers from 0 to 1, got "
                f"{list(self.sigma_range)}"
            )

    @property
    def asks(self) -> bool:
        """Whether anything but the truth teaches."""
        return bool(self.consistency or self.matching or self.adversarial or self.score)


@dataclass(frozen=True)
class Preference:
    """Direct preference optimisation on pairs of clips (arXiv 2311.12908, for velocities)."""

    beta: float = 500.0
    manifest: Path | None = None
    """Pairs of files, a line each: {"better": ..., "worse": ..., "caption": ..., "given_frames": 1}."""
    pairs: int = 64
    """Without a manifest: rollouts of the model are made in pairs for so many clips of the simulator."""
    given_frames: int = 5
    sampling_steps: int = 20
    guidance_scale: float = 3.0
    margin: float = 0.0
    """Pairs whose measured errors differ by less are left out (world units per unit of time)."""

    def __post_init__(self) -> None:
        above_0(self, "beta", where="preference.")
        at_least(1, self, "pairs", "sampling_steps", where="preference.")
        at_least(0, self, "margin", where="preference.")
        if self.given_frames < 1 or self.given_frames % 4 != 1:
            raise UserError(f"preference.given_frames must be 4n + 1, got {self.given_frames}; try 5")


@dataclass(frozen=True)
class StateMaps:
    """Beside the flow, where the simulator's balls are is read off the tokens behind a block."""

    weight: float = 5.0
    block: int = 4
    """Counted from 0: those up to it work motion out, those after it draw."""
    lr: float = 1e-3
    """Of the head that reads."""

    def __post_init__(self) -> None:
        above_0(self, "weight", "lr", where="state.")


@dataclass(frozen=True)
class Stage:
    """One stage. Rates rise over `warmup_steps`, stay, and fall linearly over the last `decay_steps`.

    Attributes:
        start_from: weights to begin with: an earlier stage, a model by name, a file, a folder, or "random".
            Empty: the stage before, else the recipe's `base`, else random weights.
        data: another data set than the recipe's.
        buckets: the shapes of the clips, each a batch of its own.
        batch_size: clips a step over all processes, where the bucket has no size of its own.
        accumulate: parts that a batch is computed in.
        muon_lr: matrices are trained by Muon at this rate; None: AdamW for everything.
        betas: of AdamW.
        mix: task -> share of the batches.
        images: share of the batches that are pictures (buckets of one frame).
        text_dropout: share of the clips whose caption is left out.
        past_noise: in a quarter of the batches the past carries noise up to this sigma, told to the model.
        time_mean, time_std: the time is the logistic function of a normal variable, shifted by shape.
        visible: share of a latent's error that counts by what it changes in the picture (`visible.py`).
        train: parts of parameter names; only those are trained. Empty: all.
    """

    name: str
    steps: int
    objective: str = "flow"
    start_from: str = ""
    data: dict[str, object] = field(default_factory=dict)
    buckets: tuple[Bucket, ...] = ()
    batch_size: int = 32
    accumulate: int = 1
    decay_steps: int = 0
    warmup_steps: int = 50
    adamw_lr: float = 1e-3
    muon_lr: float | None = None
    weight_decay: float = 0.0
    betas: tuple[float, ...] = (0.9, 0.99)
    clip_norm: float = 1.0
    ema: float = 0.999
    mix: dict[str, float] = field(default_factory=lambda: {"t2v": 1.0})
    images: float = 0.0
    text_dropout: float = 0.1
    past_noise: float = 0.1
    time_mean: float = 0.0
    time_std: float = 1.2
    visible: float = 0.0
    train: tuple[str, ...] = ()
    lora: LoRA | None = None
    distillation: Distillation | None = None
    preference: Preference | None = None
    state: StateMaps | None = None
    precision: str = "bfloat16"
    checkpointing: bool = False
    compile: bool = False
    save_every_s: float = 300.0
    report_every_s: float = 15.0
    samples_every: int = 0
    """Steps between sample videos; 0: none."""
    seed: int = 0

    def __post_init__(self) -> None:
        def refuse(rule: str, value: object) -> None:
            raise UserError(f"stage {self.name}: {rule}, got {value!r}")

        if self.objective not in OBJECTIVES:
            refuse(f"objective must be one of {', '.join(OBJECTIVES)}", self.objective)
        for mix in self.mixes:
            for task in mix:
                if task not in TASKS:
                    refuse(f"unknown task in mix{did_you_mean(task, TASKS)}", task)
            if not mix or min(mix.values()) < 0 or sum(mix.values()) <= 0:
                refuse("mix must give tasks shares above 0", mix)
        where = f"stage {self.name}: "
        at_least(1, self, "steps", "batch_size", "accumulate", "warmup_steps", where=where)
        at_least(0, self, "decay_steps", "weight_decay", "time_std", "samples_every", "seed", where=where)
        at_least(0, self, "save_every_s", "report_every_s", where=where)
        above_0(self, "adamw_lr", "muon_lr", "clip_norm", where=where)
        for name in ("images", "text_dropout", "ema", "past_noise", "visible"):
            if not 0 <= getattr(self, name) <= 1:
                refuse(f"{name} must be from 0 to 1", getattr(self, name))
        if self.precision not in ("bfloat16", "float32"):
            refuse("precision must be bfloat16 or float32", self.precision)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            refuse("betas must be two numbers from 0 to below 1", self.betas)
        if self.lora is not None and self.train:
            refuse("lora and train exclude each other", self.train)
        if self.visible and self.objective == "preference":
            refuse("visible goes with the objectives flow and distillation", self.visible)
        if self.samples_every and self.objective == "preference":
            refuse("samples_every goes with the objectives flow and distillation", self.samples_every)
        decoded = self.distillation is not None and self.distillation.frames > 0
        whole = [bucket.frames for bucket in self.buckets if not self.only_unrolls(bucket)]
        if decoded and max(whole, default=1) <= 5:
            rule = "distillation.frames needs clips of more than 5 frames, of which not all are unrolled"
            refuse(rule, [bucket.name for bucket in self.buckets])
        if self.distillation is not None and self.distillation.unrolled > 1 and not self.has_rollouts:
            refuse("distillation.unrolled needs the task rollout in mix", self.mix)
        if self.state is not None and self.objective != "flow":
            refuse("state goes with the objective flow", self.objective)

    @property
    def mixes(self) -> list[dict[str, float]]:
        """Its own shares of the tasks, and those of buckets that have theirs."""
        return [self.mix, *(bucket.mix for bucket in self.buckets if bucket.mix)]

    @property
    def has_rollouts(self) -> bool:
        """Whether any of its batches may be a rollout."""
        return any(mix.get("rollout") for mix in self.mixes)

    def learning_rate(self, step: int) -> float:
        """The share of the full rate at `step`: warm-up, constant, linear decay to a fiftieth."""
        rising = min(1.0, (step + 1) / self.warmup_steps)
        if not self.decay_steps:
            return rising
        return rising * max(min(1.0, max(self.steps - step, 0) / self.decay_steps), 0.02)

    def only_unrolls(self, bucket: Bucket) -> bool:
        """Whether every clip of a bucket is gone through as a rollout, and none made whole."""
        asked = {task for task, share in (bucket.mix or self.mix).items() if share}
        return self.distillation is not None and self.distillation.unrolled > 1 and asked == {"rollout"}

    def batch_of(self, bucket: Bucket) -> int:
        return bucket.batch_size or self.batch_size
