"""Context parallel: a video's tokens over the ranks of a group.

Everything that works token by token runs on a rank's own tokens. What needs whole sequences goes to heads
and back: queries, keys and values of all tokens for a share of the heads, by all-to-all (DeepSpeed Ulysses,
arXiv 2309.14509). The gated delta rule can also stay where its tokens are: long sequences then move less.

Hooks and two subclasses are put on a model; its weights and their names stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kairos.distributed.cost import CONV_CONTEXT, delta_route
from kairos.distributed.exchange import Exchange, slices, spread
from kairos.errors import UserError
from kairos.models.attention import AttentionState, WindowedSelfAttention
from kairos.models.gated_delta_net import DeltaState, GatedDeltaNet, Projections
from kairos.models.transformer import KairosTransformer3DModel
from kairos.ops.gated_delta import gated_delta_rule

ROUTES = ("auto", "heads", "tokens")


class ContextParallel:
    """A transformer whose tokens lie on several ranks, until `remove` is called.

    All ranks call it with the same input, and all get the whole velocity. For inference.
    """

    def __init__(
        self, transformer: KairosTransformer3DModel, group: dist.ProcessGroup, delta_route: str = "auto"
    ) -> None:
        """Split `transformer` over the ranks of `group`.

        Args:
            delta_route: of the gated delta layers: "heads" moves tokens to heads, "tokens" leaves tokens
                where they are and moves states, "auto" is whichever sends fewer bytes.

        Raises:
            UserError: for more ranks than heads.
        """
        assert delta_route in ROUTES
        heads = transformer.config.num_attention_heads
        self.exchange = Exchange(group)
        check_heads(heads, self.exchange.size)
        self.transformer = transformer
        self.delta_route = delta_route
        self.heads = spread(heads, self.exchange.size)
        self.my_heads = slices(self.heads)[self.exchange.rank]
        self.tokens: list[int] = []
        self.active = False
        self._cut: dict[int, tuple[Tensor, Tensor]] = {}
        self._handles = [transformer.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for index, block in enumerate(transformer.blocks):
            self._handles.append(block.register_forward_pre_hook(self._block_hook(first=index == 0)))
        self._handles.append(transformer.head.register_forward_pre_hook(self._before_head))
        self._handles.append(transformer.head.register_forward_hook(self._after_head))
        for module in transformer.modules():
            if type(module) in SPLIT:
                module.__class__ = SPLIT[type(module)]
                cast(Any, module).context = self

    def remove(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()
        for module in self.transformer.modules():
            if type(module) in SPLIT.values():
                module.__class__ = type(module).__bases__[0]
                del cast(Any, module).context

    # What the layers ask for.

    def to_heads(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """(B, my tokens, H, D) each -> (B, all tokens, my heads, D) each; one message for each dtype."""
        whole: dict[int, Tensor] = {}
        for dtype in {tensor.dtype: None for tensor in tensors}:
            chosen = [index for index, tensor in enumerate(tensors) if tensor.dtype == dtype]
            parts = [
                torch.cat([tensors[index][:, :, heads].reshape(-1) for index in chosen])
                for heads in slices(self.heads)
            ]
            batch, mine = len(tensors[0]), self.heads[self.exchange.rank]
            widths = [tensors[index].shape[-1] for index in chosen]
            came = self.exchange.all_to_all(parts, [batch * n * mine * sum(widths) for n in self.tokens])
            for index, *pieces in zip(
                chosen,
                *(
                    [
                        piece.view(batch, n, mine, width)
                        for piece, width in zip(
                            part.split([batch * n * mine * width for width in widths]), widths, strict=True
                        )
                    ]
                    for part, n in zip(came, self.tokens, strict=True)
                ),
                strict=True,
            ):
                whole[index] = torch.cat(pieces, dim=1)
        return [whole[index] for index in range(len(tensors))]

    def to_tokens(self, x: Tensor) -> Tensor:
        """(B, all tokens, my heads, D) -> (B, my tokens, H, D)."""
        batch, _, _, width = x.shape
        mine = self.tokens[self.exchange.rank]
        parts = [x[:, tokens] for tokens in slices(self.tokens)]
        came = self.exchange.all_to_all(parts, [batch * mine * h * width for h in self.heads])
        pieces = [part.view(batch, mine, h, width) for part, h in zip(came, self.heads, strict=True)]
        return torch.cat(pieces, dim=2)

    # The hooks.

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            raise UserError("a split over ranks is for inference only: call the model under torch.no_grad()")
        if kwargs.get("state") is not None or kwargs.get("return_state"):
            raise UserError("a rollout's state lives on one rank: roll out without --gpus")
        if kwargs.get("step_cache") is not None:
            raise UserError("a step cache compares the tokens of one rank: leave it out of a split")
        latents = args[0] if args else kwargs["hidden_states"]
        _, patch_y, patch_x = self.transformer.config.patch_size
        frames, height, width = latents.shape[2:]
        self.tokens = spread(frames * (height // patch_y) * (width // patch_x), self.exchange.size)
        # A rank with no token has nothing to do; so few are not worth sending either.
        self.active = self.exchange.size > 1 and min(self.tokens) > 0
        self._cut.clear()

    def _block_hook(self, first: bool) -> Callable[[nn.Module, tuple], tuple | None]:
        def before_block(module: nn.Module, args: tuple) -> tuple | None:
            if not self.active:
                return None
            x, modulation, text, mask, (cos, sin), *rest = args
            if first:
                x = x[:, self._mine]
            rotary = self._once(cos, lambda: cos[self._mine]), self._once(sin, lambda: sin[self._mine])
            return (x, self._of_my_tokens(modulation), text, mask, rotary, *rest)

        return before_block

    def _before_head(self, module: nn.Module, args: tuple) -> tuple | None:
        x, time = args
        return (x, self._of_my_tokens(time)) if self.active else None

    def _after_head(self, module: nn.Module, args: tuple, out: Tensor) -> Tensor | None:
        return self.exchange.gather(out, self.tokens, dim=1) if self.active else None

    @property
    def _mine(self) -> slice:
        return slices(self.tokens)[self.exchange.rank]

    def _of_my_tokens(self, x: Tensor) -> Tensor:
        """(B, T, ...) with a row for the clip, a frame or a token each -> what my tokens need of it."""
        if x.shape[1] == 1:
            return x
        rows = torch.arange(self._mine.start, self._mine.stop, device=x.device)
        return self._once(x, lambda: x[:, rows // (sum(self.tokens) // x.shape[1])])

    def _once(self, source: Tensor, cut: Callable[[], Tensor]) -> Tensor:
        """What `cut` makes of `source`, made once in a forward: every block gets the same tensors."""
        if id(source) not in self._cut:
            self._cut[id(source)] = source, cut()  # the source too, so that its id stays its own
        return self._cut[id(source)][1]


class SplitAttention(WindowedSelfAttention):
    """Attention over whole sequences for a share of the heads."""

    context: ContextParallel

    def mix(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tokens_per_frame: int,
        chunk_frames: Sequence[int] | None,
        past: AttentionState | None,
    ) -> tuple[Tensor, AttentionState]:
        if not self.context.active:
            return super().mix(q, k, v, tokens_per_frame, chunk_frames, past)
        q, k, v = self.context.to_heads((q, k, v))
        out, kept = super().mix(q, k, v, tokens_per_frame, chunk_frames, None)
        return self.context.to_tokens(out), kept


class SplitDeltaNet(GatedDeltaNet):
    """The gated delta rule over whole sequences for a share of the heads, or over a share of the tokens."""

    context: ContextParallel
    in_segments = False  # the ranks exchange once, not for each segment

    def mix(
        self, projections: Projections, g: Tensor, beta: Tensor, past: DeltaState | None
    ) -> tuple[Tensor, DeltaState]:
        if not self.context.active:
            return super().mix(projections, g, beta, past)
        if self.route(projections) == "heads":
            return self._mix_heads(projections, g, beta)
        return self._mix_tokens(projections, g, beta)

    def route(self, projections: Projections) -> str:
        """How this input is mixed: "heads" or "tokens"."""
        context = self.context
        q, _, v = projections
        by_bytes = delta_route(context.tokens, context.heads, q.shape[-1], v.shape[-1], v.element_size())
        if context.delta_route == "auto" or min(context.tokens) < CONV_CONTEXT:
            return by_bytes
        return context.delta_route

    def _mix_heads(self, projections: Projections, g: Tensor, beta: Tensor) -> tuple[Tensor, DeltaState]:
        q, k, v, g, beta = self.context.to_heads((*projections, g[..., None], beta[..., None]))
        (q, k, v), (conv_q, conv_k, conv_v) = self.convolve((q, k, v), None, self.context.my_heads)
        out, state = gated_delta_rule(q, k, v, g[..., 0], beta[..., 0])
        return self.context.to_tokens(out), DeltaState(state, conv_q, conv_k, conv_v)

    def _mix_tokens(self, projections: Projections, g: Tensor, beta: Tensor) -> tuple[Tensor, DeltaState]:
        """Each rank scans its own tokens from zero, and adds what the ranks before it would have brought.

        The rule is linear in its state: over a rank's tokens S = T S_0 + F, and o_t = f_t + S_0^T p_t. Value
        columns of zero that begin at the identity make T out of the state and p out of the outputs, in the
        same scan that makes F and f.
        """
        exchange = self.context.exchange
        context = self.q_conv1d.kernel_size[0] - 1
        tail = torch.cat([x[:, -context:].flatten(2) for x in projections], dim=-1)
        before = exchange.pass_on(tail).split([x[0, 0].numel() for x in projections], dim=-1)
        (q, k, v), (conv_q, conv_k, conv_v) = self.convolve(
            projections, (before[0].mT, before[1].mT, before[2].mT)
        )
        batch, _, heads, dim_k = q.shape
        dim_v = v.shape[-1]
        dtype = torch.promote_types(v.dtype, torch.float32)
        identity = torch.eye(dim_k, dtype=dtype, device=q.device).expand(batch, heads, -1, -1)
        initial = torch.cat((identity.new_zeros(batch, heads, dim_k, dim_v), identity), dim=-1)
        wide = torch.cat((v, v.new_zeros(*v.shape[:-1], dim_k)), dim=-1)
        out, last = gated_delta_rule(q, k, wide, g, beta, initial_state=initial)
        free, seen = out.split((dim_v, dim_k), dim=-1)

        states = exchange.gather(last[None], [1] * exchange.size, dim=0)
        state = torch.zeros_like(last[..., :dim_v])
        arriving = state
        for rank, each in enumerate(states):
            if rank == exchange.rank:
                arriving = state
            state = each[..., dim_v:] @ state + each[..., :dim_v]
        brought = torch.einsum("bnhk,bhkv->bnhv", seen.to(dtype), arriving)
        out = (free.to(dtype) + brought).to(v.dtype)
        return out, DeltaState(state, conv_q, conv_k, conv_v)


SPLIT: dict[type[nn.Module], type[nn.Module]] = {
    WindowedSelfAttention: SplitAttention,
    GatedDeltaNet: SplitDeltaNet,
}


def check_heads(heads: int, ranks: int) -> None:
    """Refuse more ranks than heads."""
    if ranks > heads:
        raise UserError(
            f"a video's tokens go over at most as many ranks as the model has heads, {heads}, got {ranks}; "
            f"take {heads} or fewer, or --split cfg, which halves the ranks for each branch"
        )
