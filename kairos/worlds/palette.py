"""The colours of the worlds, far enough apart that a mask tells them from each other and from greys."""

BACKGROUND = (240, 240, 236)
GROUND = (205, 205, 201)
GROUND_LINE = (120, 120, 118)
FIXTURE = (150, 150, 147)
"""Walls, ramps, rods and grippers: what stands or drives, and is not measured."""

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 39, 40),
    "orange": (250, 120, 10),
    "yellow": (240, 210, 0),
    "green": (30, 150, 50),
    "cyan": (0, 185, 215),
    "blue": (35, 70, 220),
    "purple": (130, 40, 180),
    "pink": (245, 110, 190),
}
"""Object colours by the word that captions use, RGB in 0..255."""
