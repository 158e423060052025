"""The loss of rectified flow (arXiv 2209.03003), over the frames that are to be made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from kairos.training.ahead import Ahead, workers_for
from kairos.training.batches import Batch, draw_batch
from kairos.training.cache import ClipSet
from kairos.training.objective import Objective
from kairos.training.parallel import ALONE, Processes
from kairos.training.stage import Stage
from kairos.training.visible import seen


def predict(
    model: nn.Module, batch: Batch, noisy: Tensor, timestep: Tensor, prompt: tuple[Tensor, Tensor]
) -> Tensor:
    """The model's velocity of (B, 16, F, h, w), in float32; in a chunk-causal model the past is a chunk."""
    past, chunk = batch.cut.past, batch.cut.chunk
    chunk_frames = None
    if is_causal(model):
        chunk_frames = (past, chunk) if past else (chunk,)
    embeds, mask = prompt
    (velocity,) = model(
        noisy,
        timestep,
        embeds,
        encoder_attention_mask=mask,
        chunk_frames=chunk_frames,
        return_dict=False,
    )
    return velocity.float()


def flow_loss(model: nn.Module, batch: Batch, root: Tensor | None = None) -> Tensor:
    """Mean squared error of the velocity over the frames after the past; `root`: of `visible_root`."""
    velocity = predict(model, batch, batch.noisy, batch.timestep, (batch.prompt_embeds, batch.prompt_mask))
    return seen(velocity - batch.target, root)[:, :, batch.cut.past :].square().mean()


def is_causal(model: Any) -> bool:
    return model.config.causal == "chunk"


def latents_a_token(model: Any) -> int:
    """Latents of a frame that make one token."""
    _, height, width = model.config.patch_size
    return int(height * width)


@dataclass
class FlowMatching(Objective):
    """The objective of pretraining, post-training and LoRA."""

    sets: Sequence[ClipSet]
    stage: Stage
    processes: Processes = ALONE
    root: Tensor | None = None
    """Of `visible_root`: what errors of latents are multiplied by."""

    _ahead: Ahead[tuple[int, int], Batch] | None = field(default=None, init=False, repr=False)
    _begun: int = field(default=-1, init=False, repr=False)
    """The last step whose batches are being drawn."""

    def batch(self, model: nn.Module, step: int, part: int) -> Batch:
        """This process's share of part `part` of the batch of `step`."""
        if self._ahead is None:
            world, rank = self.processes.world, self.processes.rank
            kind: dict[str, Any] = {"causal": is_causal(model), "patch": latents_a_token(model)}

            def draw(key: tuple[int, int]) -> Batch:
                part, parts = key[1] * world + rank, self.stage.accumulate * world
                return draw_batch(self.sets, self.stage, key[0], part=part, parts=parts, **kind)

            self._ahead = Ahead(draw, workers_for(self.processes.device))
        now = self.step_of(step)
        until = min(now + 1 + self._ahead.workers, self.stage.steps)
        for later in range(max(self._begun + 1, now), until):
            self._ahead.begin(self.asked(later))
            self._begun = later
        return self._ahead.get((step, part)).to(self.processes.device)

    def asked(self, step: int) -> list[tuple[int, int]]:
        """Step and part of each batch that training asks for at `step`, in their order."""
        return [(step, part) for part in range(self.stage.accumulate)]

    def step_of(self, drawn: int) -> int:
        """The step of training at which batches of the step `drawn` are asked for."""
        return drawn

    def loss(self, model: nn.Module, step: int, part: int) -> tuple[Tensor, int]:
        batch = self.batch(model, step, part)
        with self.processes.autocast(self.stage.precision):
            return flow_loss(model, batch, self.root), len(batch)

    def close(self) -> None:
        """End the processes that draw batches."""
        if self._ahead is not None:
            self._ahead.close()
