"""Reads the state of a world off its pixels: where each coloured ball is, how large, and how many there are.

A pixel that a ball covers by `a` is B + a (colour - B), where B is the scenery: background, floor, walls.
Projecting on that line gives `a` even where a video is soft, and the hue tells the colours apart. The
centroid of `a` is linear in the picture: blur does not move it. Grey that is not where it should be, a
gripper or a rod a little off, is solved for beside `a`, so that it does not pass for a ball.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kairos.worlds import BACKGROUND, COLORS, WORLD

Floats = NDArray[np.float64]
Frames = NDArray[np.uint8]
Mask = NDArray[np.bool_]

NAMES = tuple(COLORS)
SOLID = 0.5
"""Cover from which a pixel counts as part of a ball."""
MIN_PIXELS = 6
"""A smaller blob, in a picture of 64 x 64, is not a ball."""
MOST = 0.25
"""Share of the picture from which a blob is too large for one; the largest block has 0.16."""
TOLERANCE = 60.0
"""A pixel this far from every mixture of a colour, in steps of 0 to 255, has none of the colours."""
GREY_NOISE = 30.0
"""Grey of a pixel, in steps, up to which it is taken for noise."""
FAINT = 20.0
"""Steps across grey up to which a pixel has no colour: none covers half of a pixel with so little."""
EDGE = 2
"""Pixels around the solid part of a ball, in a picture of 64 x 64, that belong to its soft edge."""
BRIDGE = 0.75
"""Share of a thin part of a colour that lies beside another one's, from which it is no ball."""
SIZE = 64
"""Larger pictures are averaged down to this before they are read."""


@dataclass(frozen=True)
class Reading:
    """What is seen of each colour, in the order of `NAMES`, in each frame.

    `centers` (8, F, 2) in world units, y up; `areas` (8, F) in square units; `blobs` (8, F): how many
    separate parts of the size of a ball; `floods` (F,): how many parts are too large for one.
    """

    centers: Floats
    areas: Floats
    blobs: NDArray[np.int64]
    floods: NDArray[np.int64]

    def __len__(self) -> int:
        return self.areas.shape[1]

    def ball(self, color: str) -> Track:
        """One colour through the video."""
        i = NAMES.index(color)
        return Track(self.centers[i], self.areas[i], self.blobs[i] > 0)

    def shown(self, frame: int) -> list[str]:
        """The colour of every ball in a frame, one entry a ball, in the palette's order."""
        return [name for name, count in zip(NAMES, self.blobs[:, frame], strict=True) for _ in range(count)]


@dataclass(frozen=True)
class Track:
    """One colour through a video: `centers` (F, 2) in world units, y up; `areas` (F,) in square units.

    `there` (F,) is true where enough of the colour is seen to be a ball.
    """

    centers: Floats
    areas: Floats
    there: Mask


def read(frames: Frames, scenery: Frames | None = None) -> Reading:
    """Read a video (F, H, W, 3), H = W.

    `scenery`: the same world without its balls, for exact places beside floors and walls
    (`kairos.worlds.scenery`), of at least as many frames; None for a plain background.
    """
    frames = shrunk(frames)
    size = frames.shape[1]
    plain = np.broadcast_to(np.array(BACKGROUND, np.uint8), frames.shape)
    behind = plain if scenery is None else shrunk(scenery)
    unit = WORLD / size
    axis = (np.arange(size) + 0.5) * unit
    least, most, edge = MIN_PIXELS * (size / 64) ** 2, MOST * size**2, max(1, round(EDGE * size / 64))
    centers = np.zeros((len(NAMES), len(frames), 2))
    areas = np.zeros((len(NAMES), len(frames)))
    blobs = np.zeros((len(NAMES), len(frames)), np.int64)
    floods = np.zeros(len(frames), np.int64)
    for number, frame in enumerate(frames):
        nearest = hues(frame)
        cover = {int(c): covers(frame, behind[number], NAMES[c]) for c in np.unique(nearest[nearest >= 0])}
        solid = {color: (cover[color] > SOLID) & (nearest == color) for color in cover}
        near = {color: grown(solid[color], edge) for color in cover}
        for color in cover:
            beside = np.any([near[other] for other in near if other != color], axis=0)
            parts = [part for part in blobs_of(solid[color]) if part.sum() >= least]
            floods[number] += sum(part.sum() >= most for part in parts)
            blobs[color, number] = sum(part.sum() < most and not bridges(part, beside) for part in parts)
        found = [color for color in cover if blobs[color, number]]
        for color in found:
            # The soft edge of a ball is its own, whatever hue it seems to have, but for that of another ball.
            own = near[color].copy()
            for other in found:
                if other != color:
                    own &= ~(near[other] & (nearest == other))
            share = np.where(own, cover[color], 0.0)
            mass = share.sum()
            areas[color, number] = mass * unit**2
            centers[color, number] = share.sum(0) @ axis / mass, WORLD - share.sum(1) @ axis / mass
    return Reading(centers, areas, blobs, floods)


def covers(frame: Frames, behind: Frames, color: str) -> Floats:
    """How much of each pixel of a frame (H, W, 3) a ball of one colour covers: (H, W) in [0, 1].

    Least squares for cover and grey, the grey shrunk towards none (the lasso, Tibshirani 1996): where a
    picture is but noisy all three channels tell the cover, and only where grey is amiss the hue alone.
    """
    line = np.array(COLORS[color], np.float64) - behind
    pixels = frame.astype(np.float64) - behind
    square, along = (line**2).sum(-1), line.sum(-1) / np.sqrt(3)
    hue = line - line.mean(-1, keepdims=True)
    tint = (hue**2).sum(-1)
    grey = pixels.sum(-1) / np.sqrt(3) - (pixels * hue).sum(-1) / tint * along
    grey = np.sign(grey) * np.maximum(np.abs(grey) - GREY_NOISE * np.sqrt(square / tint), 0)
    return (((pixels * line).sum(-1) - grey * along) / square).clip(0, 1)


def hues(frame: Frames) -> NDArray[np.int64]:
    """The colour that each pixel (H, W, 3) has some of, by its place in `NAMES`; -1 for none, such as grey.

    Mixing with grey moves a pixel along the grey axis only, so what is across it tells the colours.
    """
    across = frame.astype(np.float64)
    across -= across.mean(-1, keepdims=True)
    nearest = np.full(frame.shape[:2], -1)
    coloured = (across**2).sum(-1) > FAINT**2
    pixels = across[coloured]
    tints = np.array(list(COLORS.values()), np.float64)
    tints -= tints.mean(-1, keepdims=True)
    share = (pixels @ (tints / (tints**2).sum(-1, keepdims=True)).T).clip(0, 1)
    distance = np.linalg.norm(pixels[:, None] - share[..., None] * tints, axis=-1)
    near = distance.min(-1)
    none = (near > TOLERANCE) | (near >= 0.7 * np.linalg.norm(pixels, axis=-1))
    nearest[coloured] = np.where(none, -1, distance.argmin(-1))
    return nearest


def shrunk(frames: Frames) -> Frames:
    """Averaged down to `SIZE` where the picture is larger."""
    return frames if frames.shape[1] <= SIZE else averaged(frames, SIZE, SIZE)


def averaged(frames: Frames, height: int, width: int) -> Frames:
    """Frames made smaller: a pixel is the mean of the area that it covers, of some pixels but a part.

    A mean is linear, so exact places stay exact, also where the new side does not divide the old one.
    """
    rows, columns = area_shares(frames.shape[1], height), area_shares(frames.shape[2], width)
    small = [np.einsum("ay,yxc,bx->abc", rows, frame, columns, optimize=True) for frame in frames]
    return np.rint(small).astype(np.uint8)


def area_shares(old: int, new: int) -> Floats:
    """(new, old): which share each of `old` pixels has of the area of each of `new` ones."""
    edges, places = np.arange(new + 1) * old / new, np.arange(old)
    overlap = np.minimum(places + 1, edges[1:, None]) - np.maximum(places, edges[:-1, None])
    return overlap.clip(0) * new / old


def grown(mask: Mask, steps: int) -> Mask:
    """The mask and what is at most `steps` pixels from it, corners included."""
    for axis in (0, 1):
        wide = mask.copy()
        for step in range(1, steps + 1):
            ahead, behind = [slice(None)] * 2, [slice(None)] * 2
            ahead[axis], behind[axis] = slice(step, None), slice(None, -step)
            wide[tuple(ahead)] |= mask[tuple(behind)]
            wide[tuple(behind)] |= mask[tuple(ahead)]
        mask = wide
    return mask


def bridges(part: Mask, beside: Mask) -> bool:
    """Whether a part of a mask is but the mixed edge of others: thin, and mostly `beside` their colours.

    Where two balls come close, a soft video has a strip of a third colour between them. A ball too small
    for a core of 3 x 3 pixels is beside another one with about half of it.
    """
    across = part[:-2] & part[1:-1] & part[2:]
    thin = not (across[:, :-2] & across[:, 1:-1] & across[:, 2:]).any()
    return bool(thin and (part & beside).sum() >= BRIDGE * part.sum())


def blobs_of(mask: Mask) -> list[Mask]:
    """The connected parts (four neighbours) of a mask (H, W), each a mask."""
    left = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    parts = []
    while left:
        front, part = [left.pop()], np.zeros_like(mask)
        while front:
            y, x = front.pop()
            part[y, x] = True
            near = {(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)} & left
            left -= near
            front += near
        parts.append(part)
    return parts
