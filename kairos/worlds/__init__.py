"""Small physical worlds with exact state: clips to train a video model on and to measure it by.

`simulate("collision", index=7)` is a `Clip`: frames, caption, and where everything truly was. Deterministic
from (scene, split, seed, index). World: 10 x 10 units, y up, 0.1 units of time a frame.
"""

from kairos.worlds.captions import Caption
from kairos.worlds.impossible import VIOLATIONS, Pair, impossible_twin
from kairos.worlds.palette import BACKGROUND, COLORS
from kairos.worlds.scenes import SCENES
from kairos.worlds.world import DT, FLOOR, GRAVITY, SPLITS, WORLD, Clip, Motion, Scene, simulate

__all__ = [
    "BACKGROUND",
    "COLORS",
    "DT",
    "FLOOR",
    "GRAVITY",
    "SCENES",
    "SPLITS",
    "VIOLATIONS",
    "WORLD",
    "Caption",
    "Clip",
    "Motion",
    "Pair",
    "Scene",
    "impossible_twin",
    "simulate",
]
