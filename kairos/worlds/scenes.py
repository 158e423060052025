"""All scenes by name."""

from __future__ import annotations

from collections.abc import Mapping

from kairos.worlds.contact import Bounce, Occlusion, Pendulum, Push, Ramp
from kairos.worlds.free_motion import Collision, Parabola, Uniform
from kairos.worlds.world import Scene

SCENES: Mapping[str, Scene] = {
    scene.name: scene
    for scene in (Uniform(), Collision(), Parabola(), Bounce(), Pendulum(), Occlusion(), Ramp(), Push())
}
