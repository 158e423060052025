"""The WAN2.1 VAE in tiles: the memory of one tile where pictures are large, and the pixels of the whole.

Only the wide, high-resolution layers are tiled: those after the decoder's first level, those before the
encoder's third. Each tile sees as many pixels more on each side as these layers reach (a halo), and what its
cut edges spoil is thrown away, so nothing is blended. The attention in the middle sees all of a picture, and
is always done whole; there pictures are an eighth as high and wide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanResample, WanResidualBlock
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

TILE = 32
"""The most latents that a tile is high and wide, without its halo: 256 pixels."""

Memory = list[Any]
"""What the causal convolutions keep of earlier frames, one entry each."""


@apply_forward_hook
def decode_in_tiles(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """As `vae.decode(latents).sample`: (B, C, f, h, w) -> (B, 3, 4 (f - 1) + 1, 8 h, 8 w)."""
    decoder = vae.decoder
    memory, steps = no_memory(decoder), 0
    levels = list(decoder.up_blocks)
    maps = []
    for frame in vae.post_quant_conv(latents).split(1, dim=2):
        counter = [0]
        x = _convolve(decoder.conv_in, frame, memory, counter)
        x = decoder.mid_block(x, feat_cache=memory, feat_idx=counter)
        maps.append(levels[0](x, feat_cache=memory, feat_idx=counter))
        steps = counter[0]
    scale = maps[0].shape[-1] // latents.shape[-1]
    reach = _reach([conv for level in levels[1:] for conv in _layers(level)], up=True) + 1  # conv_out's
    halo = -(-reach // (2 ** (len(levels) - 2)))  # pixels -> these maps

    def tail(tile: slice, columns: slice) -> Iterator[Tensor]:
        memory = no_memory(decoder)
        for source in maps:
            counter = [steps]
            x = source[..., tile, columns]
            for level in levels[1:]:
                x = level(x, feat_cache=memory, feat_idx=counter)
            x = decoder.nonlinearity(decoder.norm_out(x))
            yield _convolve(decoder.conv_out, x, memory, counter)

    return _assembled(maps[0].shape[-2:], TILE * scale, halo, tail).clamp(-1, 1)


@apply_forward_hook
def encode_in_tiles(vae: AutoencoderKLWan, video: Tensor) -> Tensor:
    """As `vae.encode(video).latent_dist.mode()`: (B, 3, 4 k + 1, H, W) -> (B, C, k + 1, H / 8, W / 8)."""
    encoder = vae.encoder
    layers = list(encoder.down_blocks)
    second = [i for i, layer in enumerate(layers) if isinstance(layer, WanResample)][1]
    first, rest = layers[: second + 1], layers[second + 1 :]
    reach = 1 + _reach([conv for layer in first for conv in _layers(layer)], up=False)
    grain = 8  # tiles begin on whole latents
    halo = -(-reach // grain) * grain
    chunks = video.split([1] + [4] * (video.shape[2] // 4), dim=2)
    steps = 0

    def front(rows: slice, columns: slice) -> Iterator[Tensor]:
        nonlocal steps
        memory = no_memory(encoder)
        for chunk in chunks:
            counter = [0]
            x = _convolve(encoder.conv_in, chunk[..., rows, columns], memory, counter)
            for layer in first:
                x = layer(x, memory, counter)
            steps = counter[0]
            yield x

    maps = _assembled(video.shape[-2:], TILE * grain, halo, front)
    memory, out = no_memory(encoder), []
    lengths = [1] + [(maps.shape[2] - 1) // max(len(chunks) - 1, 1)] * (len(chunks) - 1)
    for x in maps.split(lengths, dim=2):
        counter = [steps]
        for layer in rest:
            x = layer(x, memory, counter)
        x = encoder.nonlinearity(encoder.norm_out(encoder.mid_block(x, memory, counter)))
        out.append(_convolve(encoder.conv_out, x, memory, counter))
    mean, _ = vae.quant_conv(torch.cat(out, dim=2)).chunk(2, dim=1)
    return mean


def _assembled(
    size: Sequence[int], tile: int, halo: int, work: Callable[[slice, slice], Iterator[Tensor]]
) -> Tensor:
    """What `work` makes of each tile with its halo, chunk of frames by chunk, put together without halos."""
    out = None
    height, width = size
    for rows in _shares(height, tile):
        for columns in _shares(width, tile):
            wide = [
                slice(max(s.start - halo, 0), min(s.stop + halo, side))
                for s, side in ((rows, height), (columns, width))
            ]
            parts = []
            for part in work(*wide):
                up, down = part.shape[-1], wide[1].stop - wide[1].start
                inner = [
                    slice((s.start - w.start) * up // down, (s.stop - w.start) * up // down)
                    for s, w in zip((rows, columns), wide, strict=True)
                ]
                parts.append(part[..., inner[0], inner[1]].clone())
            made = torch.cat(parts, dim=2)
            if out is None:
                out = made.new_empty(*made.shape[:3], height * up // down, width * up // down)
            place = [slice(s.start * up // down, s.stop * up // down) for s in (rows, columns)]
            out[..., place[0], place[1]] = made
    assert out is not None
    return out


def _shares(side: int, tile: int) -> list[slice]:
    """`side` in equal shares of at most `tile`, each beginning at a multiple of 8."""
    count = -(-side // tile)
    share = -(-side // count)
    share = -(-share // 8) * 8
    return [slice(start, min(start + share, side)) for start in range(0, side, share)]


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """The residual blocks and resamplings inside, in their order."""
    if isinstance(module, WanResidualBlock | WanResample):
        yield module
        return
    for child in module.children():
        yield from _layers(child)


def _reach(layers: Sequence[nn.Module], *, up: bool) -> int:
    """How far, in pixels, the layers see to each side. `up`: they end at pixels; else they begin there."""
    reach, pixel = 0, 1
    for layer in reversed(layers) if up else layers:
        if isinstance(layer, WanResidualBlock):
            reach += 2 * pixel
        else:
            reach += pixel
            pixel *= 2
    return reach


def no_memory(module: nn.Module) -> Memory:
    """The memory of an encoder or a decoder before its first frame."""
    return [None] * sum(isinstance(layer, WanCausalConv3d) for layer in module.modules())


def _convolve(conv: nn.Module, x: Tensor, memory: Memory, counter: list[int]) -> Tensor:
    """A causal convolution that goes on from earlier frames, and remembers its last two."""
    index, past = counter[0], memory[counter[0]]
    counter[0] += 1
    kept = x[:, :, -2:]
    if kept.shape[2] < 2 and past is not None:
        kept = torch.cat((past[:, :, -1:], kept), dim=2)
    memory[index] = kept.clone()
    return cast(Any, conv)(x, past)
