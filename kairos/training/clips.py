"""Clips to learn from, whatever they are kept in: local files, webdataset shards, or the simulator.

A source lists its clips, each with its caption, the key of its content and a way to read its frames. Reading
is put off, for what is in the cache is never read again. A clip that cannot be read is skipped and named.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kairos.data.config import above_0, at_least, build
from kairos.data.media import fill_frame, pixel_aspect, read_image, read_video
from kairos.errors import KairosError, UserError, one_line
from kairos.worlds import SCENES, simulate
from kairos.worlds.world import SPLITS, drawn

logger = logging.getLogger(__name__)

Frames = NDArray[np.uint8]
IMAGES = (".png", ".jpg", ".jpeg", ".webp")
STARTS = ("start", "start_sec", "start_seconds", "begin", "begin_s")
"""What others call `start_s`."""
_WORDS = re.compile(r"(?<![a-z])(caption|text|prompt|description|title|instruction)s?(?![a-z])", re.I)
_SHAPE = re.compile(r"[1-9]\d*x[1-9]\d*x[1-9]\d*")


@dataclass(frozen=True)
class Bucket:
    """Clips of one shape that make batches together: `frames` = 4n + 1, sides multiples of 16 pixels."""

    frames: int
    height: int
    width: int
    batch_size: int = 0
    """0: the stage's own."""
    mix: dict[str, float] = field(default_factory=dict, hash=False)
    """Shares of the tasks among its batches; empty: the stage's own."""

    def __post_init__(self) -> None:
        if self.frames < 1 or self.frames % 4 != 1:
            raise UserError(f"frames of a bucket must be 4n + 1, got {self.frames}")
        if min(self.height, self.width) < 16 or self.height % 16 or self.width % 16:
            raise UserError(
                f"sides of a bucket must be multiples of 16 pixels, got {self.height} x {self.width}"
            )
        if self.batch_size < 0:
            raise UserError(f"batch_size of a bucket must be at least 1, got {self.batch_size}")

    @property
    def name(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


@dataclass(frozen=True)
class ClipReference:
    """A clip that has not been read: `key` names its content, `read` gives (F, H, W, 3) in its bucket."""

    name: str
    key: str
    caption: str
    bucket: Bucket
    read: Callable[[], Frames]


@dataclass
class Skipped:
    """What could not be used, by name, with the reason."""

    clips: list[dict[str, str]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    """Of each video of a manifest that is used; clips are cut from it."""
    used_s: float = 0.0
    """Of those, how much is."""

    def add(self, name: str, reason: object) -> None:
        self.clips.append({"clip": name, "reason": " ".join(str(reason).split())})
        logger.warning("skipped %s: %s", name, self.clips[-1]["reason"])


class ClipSource(Protocol):
    """Where clips come from."""

    def references(self, buckets: Sequence[Bucket], skipped: Skipped) -> Iterator[ClipReference]:
        """Every clip that fits a bucket, in an order that stays; the others are added to `skipped`."""
        ...


@dataclass(frozen=True)
class SimulatorSource:
    """Clips of the physics worlds, the scenes taking turns, made from (scene, seed, index)."""

    scenes: tuple[str, ...]
    clips: int = 5040
    pictures: int = 0
    """How many there are in buckets of one frame; 0: as many as clips."""
    split: str = "train"
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.scenes:
            raise UserError(f"scenes must name at least one of {', '.join(SCENES)}")
        for scene in self.scenes:
            if scene not in SCENES:
                raise UserError(f"unknown scene {scene!r}; one of {', '.join(SCENES)}")
        if self.split not in SPLITS:
            raise UserError(f"unknown split {self.split!r}; one of {', '.join(SPLITS)}")
        at_least(1, self, "clips", where="data.")
        at_least(0, self, "pictures", "seed", where="data.")

    def references(self, buckets: Sequence[Bucket], skipped: Skipped) -> Iterator[ClipReference]:
        for bucket in buckets:
            check_square(bucket)
            for index in range(self.pictures or self.clips if bucket.frames == 1 else self.clips):
                yield self._reference(bucket, index)

    def state(self, key: str) -> tuple[NDArray[np.float64], tuple[str, ...]]:
        """Positions (F, n, 2) in world units, and colours, of the clip that a reference's key names."""
        scene, split, seed, index, bucket = key.split("/")
        frames = int(bucket.split("x")[0])
        _, motion, colors, _ = drawn(scene, split, int(seed), int(index), frames, 64)
        return motion.positions, colors

    def _reference(self, bucket: Bucket, index: int) -> ClipReference:
        scene = self.scenes[index % len(self.scenes)]
        what: dict[str, Any] = {"split": self.split, "seed": self.seed, "index": index}
        name = f"{scene}/{self.split}/{self.seed}/{index}"

        def read() -> Frames:
            clip = simulate(scene, **what, num_frames=bucket.frames, size=bucket.height)
            return clip.frames

        # Words need no pictures: the smallest ones that may be drawn.
        caption = simulate(scene, **what, num_frames=1, size=16).caption
        return ClipReference(name, f"{name}/{bucket.name}", caption, bucket, read)


def check_square(bucket: Bucket) -> None:
    """Refuse a shape that the simulator cannot draw."""
    if bucket.height != bucket.width:
        raise UserError(f"the simulator's pictures are square, bucket {bucket.name} is not")


@dataclass(frozen=True)
class ManifestSource:
    """Local files named by lines of JSON: {"video": "clips/a.mp4", "caption": "...", "start_s": 0}.

    Paths are relative to `root` (the manifest's folder, where it is not given) and must stay inside it.
    """

    file: Path
    root: Path | None = None
    fps: float = 16.0

    def __post_init__(self) -> None:
        above_0(self, "fps", where="data.")

    def references(self, buckets: Sequence[Bucket], skipped: Skipped) -> Iterator[ClipReference]:
        root = (self.root or self.file.parent).resolve()
        for line, entry in read_lines(self.file):
            where = f"{self.file}, line {line}"
            video, caption, start_s = read_entry(entry, where)
            path = inside(root, video, where)
            if not path.is_file():
                skipped.add(video, "no such file")
                continue
            key = f"{file_hash(path)}/{self.fps:g}/{start_s:g}"
            reference = fitted(video, key, caption, buckets, path, self.fps, start_s, skipped)
            if reference is not None:
                yield reference


@dataclass(frozen=True)
class WebdatasetSource:
    """Folders FRAMESxHEIGHTxWIDTH of tars that hold KEY.mp4 (or an image) and KEY.json with a "caption".

    The name of its folder says what a clip is, so that no clip is opened to find its bucket. One folder
    serves many stages: none takes videos for pictures, or enlarges what was written for another.
    """

    folder: Path
    fps: float = 16.0

    def __post_init__(self) -> None:
        above_0(self, "fps", where="data.")

    def references(self, buckets: Sequence[Bucket], skipped: Skipped) -> Iterator[ClipReference]:
        if not self.folder.is_dir():
            raise UserError(f"no folder of shards at {self.folder}")
        folders = sorted(path for path in self.folder.iterdir() if _SHAPE.fullmatch(path.name))
        if not folders:
            raise UserError(f"{self.folder} has no folders named FRAMESxHEIGHTxWIDTH, such as 81x480x640")
        for folder in folders:
            frames, height, width = map(int, folder.name.split("x"))
            kind = [b for b in buckets if (b.frames == 1) == (frames == 1)]
            within = [b for b in kind if b.height <= height and b.width <= width]
            bucket = choose_bucket(within, frames, height, width, still=frames == 1)
            if bucket is None:
                short = kind and min(b.frames for b in kind) > frames
                other = "no bucket is of its kind and no larger"
                skipped.add(folder.name, _too_short(frames, self.fps, kind) if short else other)
                continue
            for tar in sorted(folder.glob("*.tar")):
                yield from self._shard(tar, bucket, skipped)

    def _shard(self, tar: Path, bucket: Bucket, skipped: Skipped) -> Iterator[ClipReference]:
        label = f"{tar.parent.name}/{tar.name}"
        try:
            with tarfile.open(tar) as archive:
                members: dict[str, dict[str, tuple[int, int]]] = {}
                for member in archive:
                    if member.isfile():
                        stem, dot, suffix = member.name.rpartition(".")
                        members.setdefault(stem, {})[dot + suffix.lower()] = (member.offset_data, member.size)
        except (tarfile.TarError, OSError, EOFError) as error:
            skipped.add(label, f"not a tar, or only a part of one: {one_line(error)}")
            return
        for stem, parts in members.items():
            name = f"{label}/{stem}"
            kinds = IMAGES if bucket.frames == 1 else ()
            suffix = next((s for s in (".mp4", *kinds) if s in parts), "")
            if not suffix or ".json" not in parts:
                skipped.add(name, f"needs both .mp4{' (or an image)' if kinds else ''} and .json")
                continue
            try:
                caption = json.loads(part_of(tar, parts[".json"]))["caption"]
                if not isinstance(caption, str):
                    raise TypeError("caption is no text")
            except (ValueError, KeyError, TypeError) as error:
                skipped.add(name, f"its .json holds no caption: {error!r}")
                continue
            data = part_of(tar, parts[suffix])
            if len(data) < parts[suffix][1]:
                skipped.add(name, "the tar ends before the clip does")
                continue
            key = f"{content_hash(data)}/{self.fps:g}/0"
            read = partial(self._read, tar, parts[suffix], suffix, name, bucket)
            yield ClipReference(name, f"{key}/{bucket.name}", caption, bucket, read)

    def _read(self, tar: Path, span: tuple[int, int], suffix: str, name: str, bucket: Bucket) -> Frames:
        with tempfile.NamedTemporaryFile(suffix=suffix) as file:
            file.write(part_of(tar, span))
            file.flush()
            try:
                return fit(decode(Path(file.name), suffix, self.fps, bucket.frames), bucket)
            except UserError as error:
                raise UserError(str(error).replace(file.name, name)) from error


SOURCES = {"simulator": SimulatorSource, "manifest": ManifestSource, "webdataset": WebdatasetSource}


def build_source(mapping: Any, where: str) -> ClipSource:
    """The source that the mapping {"source": ..., ...} of a recipe describes."""
    if not isinstance(mapping, dict) or mapping.get("source") not in SOURCES:
        given = mapping.get("source") if isinstance(mapping, dict) else mapping
        raise UserError(f"{where}.source must be one of {', '.join(SOURCES)}, got {given!r}")
    options = {key: value for key, value in mapping.items() if key != "source"}
    return build(SOURCES[mapping["source"]], options, where)


def read_lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The dictionaries of a file of JSON lines, with their numbers."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise UserError(f"no manifest at {file}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the manifest {file}: {one_line(error)}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{file}, line {number}: not JSON: {error}") from None
        if not isinstance(entry, dict):
            raise UserError(f'{file}, line {number}: must be like {{"video": "a.mp4", "caption": "..."}}')
        yield number, entry


def read_entry(entry: dict[str, Any], where: str) -> tuple[str, str, float]:
    """Path, caption and start of a manifest's line.

    It may hold more; but where one of the two is left out, it is not passed over under another name.
    """
    words = [key for key, value in entry.items() if _WORDS.search(key) and isinstance(value, str) and value]
    if "caption" not in entry and words:
        raise UserError(
            f'{where}: there is no "caption" beside {words}; call the words of the clip so, or give it "" '
            "for none"
        )
    if "start_s" not in entry and (start := next((key for key in entry if key in STARTS), "")):
        raise UserError(f'{where}: unknown key {start!r}; did you mean "start_s"?')
    video, caption, start_s = entry.get("video"), entry.get("caption", ""), entry.get("start_s", 0)
    if not isinstance(video, str) or not video:
        raise UserError(f'{where}: "video" must be the path of a clip, got {video!r}')
    if not isinstance(caption, str):
        raise UserError(f'{where}: "caption" must be a text, got {caption!r}')
    if not isinstance(start_s, int | float) or not 0 <= start_s < math.inf:
        raise UserError(f'{where}: "start_s" must be at least 0 and finite, got {start_s!r}')
    return video, caption, float(start_s)


def inside(root: Path, name: str, where: str) -> Path:
    """`name` below `root`, links followed. Raises UserError where it leaves the root or is unreadable."""
    try:
        path = (root / name).resolve()
        with suppress(FileNotFoundError, NotADirectoryError):
            path.stat()
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{where}: no file can be read at {name!r}: {one_line(error)}") from None
    if not path.is_relative_to(root):
        raise UserError(f"{where}: {name!r} leaves the data root {root}; only paths inside it are read")
    return path


def fitted(
    name: str,
    key: str,
    caption: str,
    buckets: Sequence[Bucket],
    path: Path,
    fps: float,
    start_s: float,
    skipped: Skipped,
) -> ClipReference | None:
    """The clip in the bucket that suits its shape and length, or None where it fits none."""
    suffix = path.suffix.lower()
    try:
        height, width, available = (*shape_of_image(path), 1) if suffix in IMAGES else probe_once(path, fps)
    except KairosError as error:
        skipped.add(name, error)
        return None
    length_s, available = available / fps, max(available - round(start_s * fps), 0)
    bucket = choose_bucket(buckets, available, height, width, still=suffix in IMAGES)
    if bucket is None:
        skipped.add(name, _too_short(available, fps, buckets))
        return None
    if bucket.frames > 1:
        skipped.seconds[name] = length_s
        skipped.used_s += bucket.frames / fps

    def read() -> Frames:
        return fit(decode(path, suffix, fps, bucket.frames, start_s), bucket)

    return ClipReference(name, f"{key}/{bucket.name}", caption, bucket, read)


def _too_short(frames: int, fps: float, buckets: Sequence[Bucket]) -> str:
    shortest = min((bucket.frames for bucket in buckets), default=0)
    return f"{frames} frames at {fps:g} fps, the shortest bucket takes {shortest}"


def choose_bucket(
    buckets: Sequence[Bucket], frames: int, height: int, width: int, *, still: bool
) -> Bucket | None:
    """The longest bucket that the clip fills, and of those the one of the nearest shape, then of its size.

    A picture goes to a bucket of one frame, a video to one of more if it can.
    """
    fitting = [b for b in buckets if b.frames <= frames and (b.frames == 1 or not still)]
    if not fitting:
        return None
    longest = max(b.frames for b in fitting)

    def distance(bucket: Bucket) -> tuple[float, float]:
        shape = abs(np.log((bucket.width / bucket.height) / (width / height)))
        return round(float(shape), 3), abs(bucket.height * bucket.width - height * width)

    return min((b for b in fitting if b.frames == longest), key=distance)


def decode(path: Path, suffix: str, fps: float, frames: int, start_s: float = 0.0) -> Frames:
    """`frames` frames at `fps`, from `start_s` on. Raises UserError where there are fewer."""
    if suffix in IMAGES:
        return np.asarray(read_image(path))[None]
    video = read_video(path, fps=fps, max_frames=frames, skip=round(start_s * fps))
    if len(video) < frames:
        raise UserError(f"it has {len(video)} frames at {fps:g} fps, {frames} are needed")
    return video


def fit(frames: Frames, bucket: Bucket) -> Frames:
    """Scaled until it covers the bucket, aspect kept, and cut at the centre: (F, height, width, 3)."""
    if frames.shape[1:3] == (bucket.height, bucket.width):
        return frames
    images = (fill_frame(Image.fromarray(frame), bucket.height, bucket.width) for frame in frames)
    return np.stack([np.asarray(image) for image in images])


def probe(path: Path, fps: float) -> tuple[int, int, int]:
    """Height, width and how many frames at `fps` a video says it has. Raises UserError."""
    import av

    try:
        with av.open(str(path), metadata_errors="replace") as container:
            if not container.streams.video:
                raise UserError("there is no video in it")
            stream = container.streams.video[0]
            rate = float(stream.average_rate or stream.guessed_rate or 25)
            if stream.duration is not None and stream.time_base is not None:
                duration_s = float(stream.duration * stream.time_base)
            elif container.duration is not None:
                duration_s = container.duration / av.time_base
            else:
                duration_s = stream.frames / rate
            height, width = stream.height, stream.width
            first = next(container.decode(stream), None)
            if first is None:
                raise UserError("it has no frames")
            height, width = first.height, max(1, round(first.width * pixel_aspect(stream)))
            if round(first.rotation / 90) % 2:
                height, width = width, height
            # A written duration lacks up to a few ticks of the container's clock.
            return height, width, int(duration_s * fps + 0.05)
    except (av.error.FFmpegError, ZeroDivisionError) as error:
        raise UserError(f"cannot be read: {one_line(error)}") from error


def probe_once(path: Path, fps: float) -> tuple[int, int, int]:
    """`probe`, which many lines of a manifest may ask of one long file."""
    return _probe(path, fps, stamp_of(path))


@lru_cache(maxsize=256)
def _probe(path: Path, fps: float, stamp: tuple[int, int]) -> tuple[int, int, int]:
    return probe(path, fps)


def shape_of_image(path: Path) -> tuple[int, int]:
    picture = read_image(path)
    return picture.height, picture.width


def content_hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def file_hash(path: Path) -> str:
    """`content_hash` of a file, which is read in pieces, and once as long as it stays as it is."""
    return _file_hash(path, stamp_of(path))


@lru_cache(maxsize=1 << 16)
def _file_hash(path: Path, stamp: tuple[int, int]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def stamp_of(path: Path) -> tuple[int, int]:
    """Size and time of a file: what changes with its content."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def part_of(tar: Path, span: tuple[int, int]) -> bytes:
    offset, size = span
    with tar.open("rb") as file:
        file.seek(offset)
        return file.read(size)
