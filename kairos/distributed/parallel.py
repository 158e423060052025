"""Splits one video over ranks: which rank does what, and the parts put on the models.

cfg x context, a DeviceMesh: halves for the two branches of guidance, and in each half the video's tokens.
The VAE's strips go over all ranks, and so does the last of an odd number in cfg.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
import torch.distributed as dist
from diffusers import AutoencoderKLWan
from torch.distributed.device_mesh import DeviceMesh

from kairos.distributed.branches import BranchParallel
from kairos.distributed.context import ContextParallel, check_heads
from kairos.distributed.exchange import Exchange
from kairos.distributed.strips import StripParallel
from kairos.errors import UserError
from kairos.models.transformer import KairosTransformer3DModel


class Parallel:
    """What was put on the models. `branches` is for the pipeline; `remove` leaves the models as they were."""

    def __init__(
        self,
        branches: BranchParallel | None = None,
        context: ContextParallel | None = None,
        strips: StripParallel | None = None,
    ) -> None:
        self.branches, self.context, self.strips = branches, context, strips

    def remove(self) -> None:
        for part in (self.context, self.strips):
            if part is not None:
                part.remove()

    @property
    def sent(self) -> Counter[str]:
        """Bytes that this rank sent so far, by part and kind."""
        parts = {"context": self.context, "cfg": self.branches, "vae": self.strips}
        return Counter(
            {
                f"{name} {kind}": count
                for name, part in parts.items()
                if part is not None
                for kind, count in part.exchange.sent.items()
            }
        )


def parallelize(
    transformer: KairosTransformer3DModel,
    vae: AutoencoderKLWan,
    *,
    split: str = "context",
    strips: bool = True,
    ranks: Sequence[int] | None = None,
    delta_route: str = "auto",
) -> Parallel:
    """Split videos over the ranks of the process group; every rank of it must call this.

    Args:
        split: "context", the tokens over all ranks, or "cfg", each branch of guidance over half of them.
        strips: also split the VAE.
        ranks: some of the ranks only; the others get their models back as they were.
        delta_route: see `ContextParallel`.

    Raises:
        UserError: for one rank where "cfg" needs two, and for more ranks than heads.
    """
    chosen = list(range(dist.get_world_size())) if ranks is None else list(ranks)
    branches = 2 if split == "cfg" else 1
    if len(chosen) < branches:
        raise UserError("--split cfg needs two ranks, one for each branch of guidance; take --split context")
    each = len(chosen) // branches
    check_heads(transformer.config.num_attention_heads, each)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    mesh = DeviceMesh(
        device,
        torch.tensor(chosen[: branches * each]).view(branches, each),
        mesh_dim_names=("cfg", "context"),
    )
    everyone = dist.new_group(chosen)
    mine = dist.get_rank()
    parallel = Parallel()
    if mine not in chosen or len(chosen) == 1:
        return parallel
    place = mesh.get_coordinate()
    if branches == 2:
        leaders = [branch * each for branch in range(branches)]
        parallel.branches = BranchParallel(Exchange(everyone), leaders, None if place is None else place[0])
    if each > 1 and place is not None:
        parallel.context = ContextParallel(transformer, mesh.get_group("context"), delta_route)
    if strips:
        parallel.strips = StripParallel(vae, everyone)
    return parallel


def choose_split(requests: int, ranks: int, guided: bool, heads: int) -> str:
    """The split that keeps most ranks busy: whole requests where there are enough, else one video over all.

    Between one video's splits, two branches that hardly talk come before one sequence that does.
    """
    if requests > 1 and requests >= ranks:
        return "list"
    return "cfg" if guided and ranks > 1 and (ranks % 2 == 0 or ranks > heads) else "context"
