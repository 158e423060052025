"""Flow matching that also asks where everything is: the simulator's state, read off the model's inside.

A velocity of latents says little about places: a ball a tenth of a pixel off hardly shows in it. So a linear
head reads, from the tokens behind one block, a map for each colour and frame, with a bump where the ball of
that colour is, behind a wall too. Its error teaches the blocks before it to work motion out, and leaves it to
the blocks after it to draw. The head is thrown away with the training. That a model learns sooner when its
inside is shown what matters is the finding of REPA (arXiv 2410.06940), where another network shows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from kairos.models.vae import TEMPORAL
from kairos.training.batches import moved_to
from kairos.training.cache import ClipSet
from kairos.training.checkpoint import copy_into, load_optimizer
from kairos.training.clips import SimulatorSource
from kairos.training.flow import FlowMatching, flow_loss
from kairos.training.parallel import ALONE, Processes, average_gradients
from kairos.training.stage import Stage, StateMaps
from kairos.worlds import COLORS, WORLD

SPREAD = 1.5
"""Standard deviation of a bump in world units: some of it reaches every token around the ball."""


class StateObjective(FlowMatching):
    """The flow's loss, and `StateMaps.weight` times the error of the maps."""

    def __init__(
        self,
        model: Any,
        sets: Sequence[ClipSet],
        stage: Stage,
        options: StateMaps,
        source: SimulatorSource,
        here: Processes = ALONE,
        root: Tensor | None = None,
    ) -> None:
        super().__init__(sets, stage, here, root)
        self.options, self.source = options, source
        self.patch: Sequence[int] = model.config.patch_size[1:]
        self.head = nn.Linear(model.config.hidden_size, len(COLORS) * TEMPORAL, device=here.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.optimizer = torch.optim.AdamW(self.head.parameters(), lr=options.lr, weight_decay=0.0)
        self.error = torch.tensor(float("nan"))
        model.blocks[options.block].register_forward_hook(self._keep)

    def _keep(self, block: nn.Module, inputs: Any, outputs: Any) -> None:
        self.hidden: Tensor = outputs[0]

    def loss(self, model: nn.Module, step: int, part: int) -> tuple[Tensor, int]:
        batch = self.batch(model, step, part)
        with self.processes.autocast(self.stage.precision):
            flow = flow_loss(model, batch, self.root)
        frames, height, width = batch.sample.shape[2:]
        rows, columns = height // self.patch[0], width // self.patch[1]
        target = moved_to(flow.device, state_maps(self.source, batch.keys, frames, rows, columns))
        hidden = F.layer_norm(self.hidden.float(), self.hidden.shape[-1:])
        self.update_head(hidden.detach(), target)
        error = map_error(F.linear(hidden, self.head.weight.detach(), self.head.bias.detach()), target)
        self.error = error.detach()
        return flow + self.options.weight * error, len(batch)

    def update_head(self, hidden: Tensor, target: Tensor) -> None:
        """The head learns first, by itself, so that the model is told by a head that can read."""
        map_error(self.head(hidden), target).backward()
        average_gradients(self.head.parameters(), self.processes)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Any]:
        return {"head": dict(self.head.named_parameters()), "optimizer": self.optimizer.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        copy_into(dict(self.head.named_parameters()), state["head"])
        load_optimizer(self.optimizer, state["optimizer"])

    def report(self, model: nn.Module, step: int) -> dict[str, float]:
        """The error of the maps; 0.28 for one ball in the middle that the head knows nothing of."""
        return {"state_error": float(self.error)}


def map_error(maps: Tensor, target: Tensor) -> Tensor:
    """Squared error summed over colours, averaged over frames and tokens."""
    return (maps - target).square().sum(-1).mean() / TEMPORAL


def state_maps(
    source: SimulatorSource, keys: Sequence[str], latent_frames: int, rows: int, columns: int
) -> Tensor:
    """What the head should say of simulated clips: (B, tokens, colours * 4), bumps of height 1.

    The four frames of pixels that a latent frame stands for have maps of their own; the first latent frame,
    which stands for one, has the same map four times.
    """
    right = (np.arange(columns) + 0.5) * WORLD / columns
    up = WORLD - (np.arange(rows) + 0.5) * WORLD / rows
    maps = np.zeros((len(keys), len(COLORS), 1 + TEMPORAL * (latent_frames - 1), rows, columns), np.float32)
    for clip, key in zip(maps, keys, strict=True):
        positions, colors = places(source, key)
        x, y = positions[: clip.shape[1], :, 0], positions[: clip.shape[1], :, 1]
        squares = (x[..., None, None] - right) ** 2 + (y[..., None, None] - up[:, None]) ** 2
        for ball, color in enumerate(colors):
            clip[list(COLORS).index(color)] = np.exp(-squares[:, ball] / (2 * SPREAD**2))
    frames = np.concatenate([np.repeat(maps[:, :, :1], TEMPORAL - 1, 2), maps], 2)
    by_latent = torch.from_numpy(frames).unflatten(2, (latent_frames, TEMPORAL))
    return by_latent.permute(0, 2, 4, 5, 1, 3).flatten(1, 3).flatten(2)


@lru_cache(maxsize=1 << 16)
def places(source: SimulatorSource, key: str) -> tuple[NDArray[np.float32], tuple[str, ...]]:
    """Positions (F, n, 2) in world units, and colours, of a simulated clip by its key."""
    positions, colors = source.state(key)
    return positions.astype(np.float32), colors
