"""What a curation is asked to do: one frozen dataclass, read from YAML, checked when it is made.

split:      {min_s: 5, max_s: 40, piece_s: 20, fps: 16, short_side: 480}
text:       {samples: 3}                # any stage by its name
plugins:    {nsfw: {model: ./nsfw}}     # off unless named here
thresholds: {sharpness: {min: 30}}      # a view: changing one computes nothing again
balance:    {event: {sliding: 0.3}}
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from kairos.curation.vocabulary import DOMAINS, EVENTS
from kairos.data.config import arguments, check_keys
from kairos.errors import UserError

T = TypeVar("T")

DETECTORS = ("adaptive", "content", "hash", "histogram", "threshold", "transnet")
PRESETS = (
    "ultrafast",
    "superfast",
    "veryfast",
    "faster",
    "fast",
    "medium",
    "slow",
    "slower",
    "veryslow",
    "placebo",
)
"""x264's names for how long it may search."""
TAGS = {"domain": DOMAINS, "event": (*EVENTS, "none")}
"""What a balance can be of; "none" is a clip without an event."""


@dataclass(frozen=True)
class Limits:
    """What a file may ask of the machine before it is refused."""

    file_gb: float = 64.0
    streams: int = 32
    side: int = 8192  # pixels
    duration_s: float = 6 * 3600.0
    task_s: float = 900.0  # a clip, or a minute of a source, that takes longer is given up
    memory_gb: float = 8.0  # for the process that decodes

    def __post_init__(self) -> None:
        check_positive(self)


@dataclass(frozen=True)
class Shots:
    """How cuts are found. A cut that one of the detectors sees is a cut.

    `transnet` is the learned TransNetV2: it also sees dissolves, at many times the others' cost.
    """

    detectors: tuple[str, ...] = ("adaptive", "transnet")
    adaptive_threshold: float = 3.0
    adaptive_least: float = 15.0
    content_threshold: float = 27.0
    transnet_threshold: float = 0.5
    min_frames: int = 4  # two cuts closer than this are one

    def __post_init__(self) -> None:
        check_positive(self)
        for name in self.detectors:
            if name not in DETECTORS:
                raise UserError(f"shots.detectors: unknown detector {name!r}; one of {', '.join(DETECTORS)}")


@dataclass(frozen=True)
class Split:
    """What a clip is: its length, its rate, its size."""

    min_s: float = 5.0
    max_s: float = 40.0
    piece_s: float = 20.0  # what a longer shot is cut into
    fps: int = 16
    frame_step: int = 16  # a clip has a multiple of this, plus one, frames: few buckets, little waste
    short_side: int = 480  # larger pictures are made smaller, none is enlarged
    multiple: int = 16  # of both sides, by cropping
    margin_frames: int = 0  # left out at either side of a cut; a source's ends are none
    crf: int = 18
    preset: str = "faster"

    def __post_init__(self) -> None:
        check_positive(self, but=("margin_frames", "crf"))
        if not self.min_s <= self.piece_s <= self.max_s:
            raise UserError(
                f"split: min_s <= piece_s <= max_s, got {self.min_s:g}, {self.piece_s:g}, {self.max_s:g}"
            )
        if self.multiple % 2:
            raise UserError(f"split.multiple must be even, got {self.multiple}; try 16")
        if self.crf > 51:
            raise UserError(f"crf must be from 0 to 51, got {self.crf}; 18 looks like the source")
        if self.preset not in PRESETS:
            raise UserError(f"preset must be one of {', '.join(PRESETS)}, got {self.preset!r}")

    def frames(self, available: int) -> int:
        """The longest allowed clip within `available` frames; 0 where there is none."""
        count = (available - 1) // self.frame_step * self.frame_step + 1
        return count if available >= 1 and count >= self.min_frames else 0

    @property
    def min_frames(self) -> int:
        """The least number of frames, as the multiple that is nearest to min_s."""
        return max(1, round(self.min_s * self.fps / self.frame_step)) * self.frame_step + 1

    @property
    def piece_frames(self) -> int:
        return math.ceil(self.piece_s * self.fps / self.frame_step) * self.frame_step + 1

    @property
    def max_frames(self) -> int:
        return math.ceil(self.max_s * self.fps / self.frame_step) * self.frame_step + 1


@dataclass(frozen=True)
class Threshold:
    """The bounds of one score. A clip that is rich in contact, failure or recovery has the second pair."""

    min: float = -math.inf
    max: float = math.inf
    rich_min: float | None = None
    rich_max: float | None = None

    def __post_init__(self) -> None:
        for low, high in (self.bounds(rich) for rich in (False, True)):
            if low > high:
                raise UserError(f"no value is from {low:g} (min) to {high:g} (max); change one of the two")

    def bounds(self, rich: bool) -> tuple[float, float]:
        """The least and the greatest value that stays."""
        low = self.rich_min if rich and self.rich_min is not None else self.min
        high = self.rich_max if rich and self.rich_max is not None else self.max
        return low, high


DEFAULT_THRESHOLDS: dict[str, Threshold] = {
    "motion_patch": Threshold(min=0.015),
    "motion": Threshold(max=1.0),
    "flow": Threshold(max=2.0),
    "sharpness": Threshold(min=60.0, rich_min=30.0),
    "brightness": Threshold(min=0.05, max=0.97, rich_min=0.03),
    "dark_share": Threshold(max=0.25),
    "bars_share": Threshold(max=0.25, rich_max=0.4),
    "text_share": Threshold(max=0.06, rich_max=0.12),
    "richness": Threshold(min=0.5),
    "nsfw": Threshold(max=0.5),
    "aesthetics": Threshold(min=3.5, rich_min=2.5),
}


@dataclass(frozen=True)
class Duplicates:
    """When two clips are one: so many of their moments look alike, in order."""

    bits: int = 26  # of 256, in which the hashes of two like moments may differ
    change_bits: int = 18  # of 64, in which what moves may differ
    color: int = 24  # of 255, the mean difference of their colours
    share: float = 0.7  # of the moments of the shorter clip
    embedding: float = 0.01  # cosine distance, where the embedding plug-in is on

    def __post_init__(self) -> None:
        check_positive(self)


@dataclass(frozen=True)
class Rich:
    """Which clips survive middling looks: many physical events, or a tag of these."""

    events_per_s: float = 0.25
    tags: tuple[str, ...] = ("contact", "collision", "failure", "recovery")

    def __post_init__(self) -> None:
        for tag in self.tags:
            if tag not in EVENTS:
                raise UserError(f"tags: unknown event {tag!r}; one of {', '.join(EVENTS)}")


@dataclass(frozen=True)
class Shards:
    clips: int = 256  # in one tar at most

    def __post_init__(self) -> None:
        check_positive(self)


@dataclass(frozen=True)
class Settings:
    """All of a curation's configuration. `stages` and `plugins` hold the fields of stages, by stage."""

    limits: Limits = field(default_factory=Limits)
    shots: Shots = field(default_factory=Shots)
    split: Split = field(default_factory=Split)
    stages: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    plugins: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    thresholds: Mapping[str, Threshold] = field(default_factory=lambda: dict(DEFAULT_THRESHOLDS))
    duplicates: Duplicates | None = field(default_factory=Duplicates)
    """None: nobody looks for them."""
    rich: Rich = field(default_factory=Rich)
    balance: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """For "domain" and "event": the greatest share of the kept clips that a tag may have."""
    shards: Shards = field(default_factory=Shards)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], where: str = "configuration") -> Settings:
        """Settings of a mapping as in YAML. Raises UserError for anything unknown or out of range."""
        from kairos.curation.stages import PLUGINS, STAGES, numbers_of
        from kairos.curation.tables import FACTS

        content = _mapping(content, where)
        parts: dict[str, type] = {
            "limits": Limits,
            "shots": Shots,
            "split": Split,
            "duplicates": Duplicates,
            "rich": Rich,
            "shards": Shards,
        }
        known = [*parts, "plugins", "thresholds", "balance", *STAGES]
        check_keys(content, known, where)
        values: dict[str, Any] = {
            name: made(part, content[name], f"{where}: {name}")
            for name, part in parts.items()
            if name in content
        }
        if content.get("duplicates", ...) is None:
            values["duplicates"] = None
        stages = {
            name: _options(part, content[name], f"{where}: {name}")
            for name, part in STAGES.items()
            if name in content
        }
        named = _mapping(content.get("plugins"), f"{where}: plugins")
        check_keys(named, list(PLUGINS), f"{where}: plugins")
        plugins = {
            name: _options(PLUGINS[name], options, f"{where}: plugins: {name}")
            for name, options in named.items()
        }
        thresholds = dict(DEFAULT_THRESHOLDS)
        bounded = _mapping(content.get("thresholds"), f"{where}: thresholds")
        numbers = [*numbers_of([*STAGES.values(), *PLUGINS.values()]), *FACTS]
        check_keys(bounded, numbers, f"{where}: thresholds")
        for score, bounds in bounded.items():
            if bounds is None:
                thresholds.pop(score, None)
            else:
                given = _mapping(bounds, f"{where}: thresholds: {score}")
                merged = asdict(thresholds.get(score, Threshold())) | dict(given)
                thresholds[score] = made(Threshold, merged, f"{where}: thresholds: {score}")
        capped = _mapping(content.get("balance"), f"{where}: balance")
        check_keys(capped, list(TAGS), f"{where}: balance")
        balance = {
            kind: dict(_mapping(shares, f"{where}: balance: {kind}")) for kind, shares in capped.items()
        }
        for kind, shares in balance.items():
            check_keys(shares, list(TAGS[kind]), f"{where}: balance: {kind}")
            for tag, share in shares.items():
                if not (isinstance(share, int | float) and 0 < share <= 1):
                    raise UserError(
                        f"{where}: balance: {kind}: {tag} must be above 0, at most 1, got {share!r}"
                    )
        return cls(**values, stages=stages, plugins=plugins, thresholds=thresholds, balance=balance)

    def as_dict(self) -> dict[str, Any]:
        """The settings as `from_dict` takes them, with every value."""
        plain = json.loads(json.dumps(asdict(self)))
        stages = plain.pop("stages")
        for name in DEFAULT_THRESHOLDS:
            plain["thresholds"].setdefault(name, None)
        return plain | stages


def read_settings(path: Path | None) -> Settings:
    """The settings of a YAML file; the defaults without one."""
    if path is None:
        return Settings()
    from kairos.data.yaml_text import read_yaml

    return Settings.from_dict(read_yaml(path, "configuration"), path.name)


def hash_of(*parts: Any) -> str:
    """Twelve hexadecimal digits that name a configuration: those of the JSON of `parts`."""
    text = json.dumps(parts, sort_keys=True, default=lambda value: asdict(value))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def made(part: type[T], values: Any, where: str) -> T:
    """A dataclass of YAML's values, which nothing may stand for. Raises UserError."""
    ready = arguments(part, {} if values is None else values, where, finite=False)
    try:
        return part(**ready)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _options(part: type[Any], values: Any, where: str) -> dict[str, Any]:
    """Those fields of a part that are given, checked."""
    whole = made(part, values, where)
    return {name: getattr(whole, name) for name in values or ()}


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    """A section of YAML, which is None there when nothing stands under it. Raises UserError."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UserError(f"{where} must hold a mapping, got {value!r}")
    return value


def check_positive(part: Any, but: tuple[str, ...] = ()) -> None:
    """Refuse numbers that are infinite or not above 0, where those of `but` may be 0."""
    for f in fields(part):
        value = getattr(part, f.name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if not (value > 0 or (f.name in but and value == 0)) or math.isinf(value):
            rule = "finite" if math.isinf(value) else f"{'at least' if f.name in but else 'above'} 0"
            raise UserError(f"{f.name} must be {rule}, got {value:g}")
