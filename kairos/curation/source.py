"""From a source to its clips: probed, cut into shots, normalised and written, in one pass over its frames.

Shots are known only some frames after they began, so frames wait, already small, until the detectors have
spoken. A shot is encoded in pieces as it comes, in P-frames only: pieces of a short shot are joined, and a
clip is shortened, without encoding again.
"""

from __future__ import annotations

import hashlib
import io
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from numpy.typing import NDArray

from kairos.curation.intake import FORMATS
from kairos.curation.settings import Limits, Shots, Split
from kairos.curation.shots import LOOK_SIZE, ShotDetector
from kairos.curation.workers import still_working
from kairos.data.files import explained, prepare_folder, write_atomically
from kairos.data.media import as_shown, on_screen, pixel_aspect

Picture = NDArray[np.uint8]  # (H, W, 3)

_MIN_RATE = 0.74
"""Sources below this share of the clips' rate are refused: repeated frames would look like stops. It lets
12000/1001 frames a second pass for clips of 16."""
_LONGEST = 3.0
"""A frame that stays for more than so many frames' time is the edge of a gap: it would look like a stop."""
_LEAST_SIDE = 32
_HDR = {16: "PQ", 18: "HLG"}
"""H.273's codes of transfer curves that are no BT.709: read as that, pictures are pale and dark."""
_SIGN_S = 60.0
"""So much of a source is done between two signs of life: limits.task_s is for it, not for a film."""
_DECODED_SHARE = 0.9
"""Of the length that a file claims, so much must be decoded."""


class Refused(Exception):
    """A source that cannot be used; the message is its reason, which begins with one word and a colon."""

    def __init__(self, reason: str, **facts: float) -> None:
        super().__init__(reason)
        self.facts = facts


@dataclass(frozen=True)
class SplitTask:
    """What a worker is asked for: the clips of one file."""

    file: Path
    clips: Path  # the folder that they are written to
    limits: Limits
    shots: Shots
    split: Split


def clip_file(folder: Path, clip_id: str) -> Path:
    """Where a clip lies: in one of 256 folders, for file systems dislike a million names in one."""
    return folder / clip_id[:2] / f"{clip_id}.mp4"


def split_source(task: SplitTask) -> dict[str, Any]:
    """Cut a file into clips and write them. Returns what the ledger keeps: its facts and its clips.

    Raises Refused for a file that is no video, is broken, or asks for too much.
    """
    started = time.process_time()
    costs = {"decode": 0.0, "shots": 0.0, "split": 0.0}
    found = []
    prepare_folder(task.clips)
    # Clips wait on the disk until all of the source is known to be good: a film's would not fit in memory.
    with TemporaryDirectory(prefix=".kairos-", suffix=".part", dir=task.clips) as waiting:
        try:
            with opened(task.file, task.limits) as container:
                facts = _probe(container, task)
                for clip in _clips(container, task, facts, costs):
                    write_atomically(Path(waiting, clip["clip_id"]), clip.pop("data"))
                    found.append(clip)
        except MemoryError:  # also one of FFmpeg's own errors: of the machine, not of the file
            raise
        except av.error.FFmpegError as error:
            raise Refused(f"corrupt: {_said(error)}") from None
        if facts["decoded_s"] < _DECODED_SHARE * facts["duration_s"] - 0.5:
            claim = f"{facts['decoded_s']:.1f} s of {facts['duration_s']:.1f} s could be decoded"
            raise Refused(f"truncated: {claim}", duration_s=facts["decoded_s"])
        least, least_s = task.split.min_frames, task.split.min_frames / task.split.fps
        if facts["decoded_s"] < least_s - 0.02:
            claim = f"{facts['decoded_s']:.2f} s, and a clip has at least {least} frames, {least_s:.2f} s"
            raise Refused(f"short: {claim} (split.min_s)", duration_s=facts["decoded_s"])
        with explained(task.clips):
            for written in Path(waiting).iterdir():
                path = clip_file(task.clips, written.name)
                if not path.exists():
                    path.parent.mkdir(exist_ok=True)
                    written.replace(path)
    costs["split"] = time.process_time() - started - costs["decode"] - costs["shots"]
    return facts | {"clips": found, "costs": costs}


@contextmanager
def opened(file: Path, limits: Limits) -> Iterator[Any]:
    """A container of a format that the name promises; playlists, which name other files, are none of them."""
    wanted = FORMATS[file.suffix.lower()]
    options = {"format_whitelist": _WHITELIST, "max_streams": str(limits.streams + 1)}
    # An open file, not its name: nothing in a path can be taken for a protocol or a pattern.
    with ExitStack() as stack:
        handle = stack.enter_context(file.open("rb"))
        container = stack.enter_context(av.open(handle, mode="r", options=options, metadata_errors="replace"))
        if wanted not in container.format.name.split(","):
            name = container.format.name
            raise Refused(f"extension: {file.suffix} is the name of another format, inside is {name}")
        yield container


_WHITELIST = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,mpegts,mpeg,asf,ogg"


def _probe(container: Any, task: SplitTask) -> dict[str, Any]:
    """What the header claims, refused where it is too little or too much."""
    limits = task.limits
    if len(container.streams) > limits.streams:
        raise Refused(f"streams: more than {limits.streams} (limits.streams)")
    videos = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
    if not videos:
        raise Refused("no-video: there is no video stream in it")
    stream = container.streams.video[0]
    if stream.index != videos[0].index:
        raise Refused("no-video: its first video stream is a cover picture")
    if (curve := stream.codec_context.color_trc) in _HDR:
        raise Refused(f"hdr: its transfer curve is {_HDR[curve]}; convert it to BT.709")
    width, height = stream.codec_context.width, stream.codec_context.height
    if not min(width, height):
        raise Refused("corrupt: no picture size")
    if max(width, height) > limits.side:
        raise Refused(f"large: {height} x {width}, and the limit of a side is {limits.side} (limits.side)")
    if min(width, height) < _LEAST_SIDE:
        raise Refused(f"small: {height} x {width}, and a side needs {_LEAST_SIDE} pixels")
    duration_s = 0.0
    if stream.duration and stream.time_base:
        duration_s = float(stream.duration * stream.time_base)
    elif container.duration:
        duration_s = container.duration / 1e6
    if duration_s > limits.duration_s:
        raise Refused(
            f"long: {duration_s:.0f} s, and the limit is {limits.duration_s:g} s (limits.duration_s)"
        )
    rate = float(stream.average_rate or stream.guessed_rate or 25)
    if rate < _MIN_RATE * task.split.fps:
        raise Refused(
            f"slow: {rate:.3g} frames a second, and clips have {task.split.fps}, of which a quarter may lack"
        )
    return {
        "source_width": width,
        "source_height": height,
        "source_fps": round(rate, 3),
        "duration_s": round(duration_s, 3),
        "codec": stream.codec_context.name,
    }


def _clips(
    container: Any, task: SplitTask, facts: dict[str, Any], costs: dict[str, float]
) -> Iterator[dict[str, Any]]:
    """Every clip of the file, with its bytes, while its frames go by."""
    split = task.split
    detector = ShotDetector(task.shots, facts["source_fps"])
    stream = container.streams.video[0]
    normalise, look = _Normaliser(split, pixel_aspect(stream)), VideoReformatter()
    stream.codec_context.thread_count = 1
    waiting: deque[tuple[int, int, Picture | None]] = deque()  # (source frame, repeats, normalised)
    shot, gap, damaged = _Shot(split, 0, 0), False, False
    longest = _LONGEST * split.fps / facts["source_fps"] + 1  # in ticks, wherever they fall
    ticks, index, number, lost = 0, -1, 0, 0
    frames_a_sign = max(1, round(_SIGN_S * facts["source_fps"]))
    frames = on_screen(container, split.fps)
    ahead = _timed(frames, costs)
    following = next(ahead, None)
    cuts: deque[int] = deque()
    while following is not None:
        (frame, repeats), following = following, next(ahead, None)
        index += 1
        if (index + 1) % frames_a_sign == 0:
            still_working()
        if index / facts["source_fps"] > task.limits.duration_s:
            raise Refused(f"long: more than {task.limits.duration_s:g} s (limits.duration_s)")
        if max(frame.width, frame.height) > task.limits.side:
            raise Refused(f"large: {frame.height} x {frame.width} (limits.side)")
        damaged = frame.is_corrupt or (damaged and not frame.key_frame)
        picture = normalise(frame) if repeats and not damaged else None
        before = time.process_time()
        cuts.extend(detector.see(index, _look(frame, look), last=following is None))
        costs["shots"] += time.process_time() - before
        waiting.append((index, repeats, picture))
        while waiting and waiting[0][0] < detector.settled:
            source_frame, repeats, picture = waiting.popleft()
            while cuts and cuts[0] <= source_frame:  # one in a long black may be told when it has gone by
                cuts.popleft()
                gap = True
            if picture is None:  # never on screen, or damaged: until the next whole picture there is a gap
                gap = gap or repeats > 0
                lost += repeats
                ticks += repeats
                continue
            if gap or shot.size not in (None, picture.shape):
                yield from shot.end(split.margin_frames)
                number += 1
                shot = _Shot(split, ticks, number)
            gap = repeats > longest
            for _ in range(1 if gap else repeats):
                yield from shot.add(picture)
            ticks += repeats
    yield from shot.end(0)
    facts["decoded_s"] = round(ticks / split.fps, 3)
    facts["damaged_s"] = round(lost / split.fps, 3)
    facts["shots"] = number + 1
    if ticks == 0:
        raise Refused("corrupt: no frame could be decoded")


def _timed(frames: Iterator[Any], costs: dict[str, float]) -> Iterator[Any]:
    while True:
        before = time.process_time()
        item = next(frames, None)
        costs["decode"] += time.process_time() - before
        if item is None:
            return
        yield item


class _Shot:
    """The clips of one shot, as its frames come."""

    def __init__(self, split: Split, first: int, number: int) -> None:
        self._split, self._next, self._number = split, first, number
        self._skip = split.margin_frames if number else 0
        self._pieces: list[_Piece] = []
        self._count = 0
        self.size: tuple[int, ...] | None = None
        """The shape of its pictures, all alike."""

    def add(self, picture: Picture) -> Iterator[dict[str, Any]]:
        """The next frame; yields a clip when the shot is too long for one and a piece of it is full."""
        if self._skip:
            self._skip -= 1
            self._next += 1
            return
        self.size = picture.shape
        if not self._pieces or self._pieces[-1].count == self._split.piece_frames:
            self._pieces.append(_Piece(self._split, picture.shape, self._next))
        self._pieces[-1].add(picture)
        self._count += 1
        self._next += 1
        after = sum(piece.count for piece in self._pieces[1:])
        if self._count > self._split.max_frames and after and after >= self._split.margin_frames:
            yield from self._clip([self._pieces.pop(0)], self._split.piece_frames)

    def end(self, margin: int) -> Iterator[dict[str, Any]]:
        """The clips that are left, without the last `margin` frames; one where the shot was short enough."""
        together = self._count <= self._split.max_frames
        groups = [self._pieces] if together else [[piece] for piece in self._pieces]
        usable = sum(piece.count for piece in self._pieces) - margin
        for group in groups:
            if group:
                yield from self._clip(group, usable)
                usable -= sum(piece.count for piece in group)

    def _clip(self, pieces: list[_Piece], usable: int) -> Iterator[dict[str, Any]]:
        """The pieces as one clip, of no more than `usable` frames."""
        available = sum(piece.count for piece in pieces)
        first = pieces[0].first
        count = self._split.frames(min(available, usable))
        if not count:
            for piece in pieces:
                piece.close()
            return
        digests = [digest for piece in pieces for digest in piece.digests][:count]
        height, width = pieces[0].height, pieces[0].width
        split = self._split  # all that the file's bytes depend on
        made = f"{split.fps} {height}x{width} crf {split.crf} {split.preset} "
        name = hashlib.sha256(made.encode() + b"".join(digests))
        yield {
            "clip_id": name.hexdigest()[:20],
            "shot": self._number,
            "start_s": round(first / self._split.fps, 4),
            "end_s": round((first + count) / self._split.fps, 4),
            "frames": count,
            "height": height,
            "width": width,
            "data": _joined([piece.close() for piece in pieces], count, self._split.fps),
        }


@contextmanager
def _encoding() -> Iterator[None]:
    """What goes wrong in here is not the source's fault, which is tried again by the next run."""
    try:
        yield
    except MemoryError:
        raise
    except av.error.FFmpegError as error:
        raise RuntimeError(f"a clip cannot be encoded: {_said(error)}") from error


class _Piece:
    """Up to piece_frames frames, encoded in memory."""

    @_encoding()
    def __init__(self, split: Split, shape: tuple[int, ...], first: int) -> None:
        self.height, self.width = shape[0], shape[1]
        self.first = first
        self.count = 0
        self.digests: list[bytes] = []
        self._buffer = io.BytesIO()
        self._container = av.open(self._buffer, mode="w", format="mp4")
        stream: Any = self._container.add_stream("libx264", rate=Fraction(split.fps))
        stream.height, stream.width, stream.pix_fmt = self.height, self.width, "yuv420p"
        # No B-frames and one reference: a packet is a frame, any tail may be dropped, and every motion
        # vector points to the frame before. One thread: the bytes depend on their number.
        # No macroblock tree: with it x264 now and then gives other bytes for the same pictures.
        options = {"crf": str(split.crf), "preset": split.preset, "bf": "0", "refs": "1"}
        stream.options = options | {"x264-params": "mbtree=0"}
        context = stream.codec_context
        context.thread_count = 1
        context.color_primaries = context.color_trc = context.colorspace = 1  # BT.709
        context.color_range = ColorRange.MPEG
        self._stream = stream
        self._reformatter = VideoReformatter()

    @_encoding()
    def add(self, picture: Picture) -> None:
        self.digests.append(hashlib.blake2b(picture.tobytes(), digest_size=16).digest())
        frame = self._reformatter.reformat(
            av.VideoFrame.from_ndarray(picture, format="rgb24"),
            format="yuv420p",
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG,
            threads=1,
        )
        self._container.mux(self._stream.encode(frame))
        self.count += 1

    @_encoding()
    def close(self) -> bytes:
        self._container.mux(self._stream.encode())
        self._container.close()
        return self._buffer.getvalue()


@_encoding()
def _joined(pieces: list[bytes], count: int, fps: int) -> bytes:
    """The first `count` frames of the pieces, one after the other, as one mp4, without encoding again."""
    buffer = io.BytesIO()
    unit = Fraction(1, fps)
    with av.open(buffer, mode="w", format="mp4") as output:
        target: Any = None
        written = 0
        for data in pieces:
            with av.open(io.BytesIO(data)) as piece:
                source = piece.streams.video[0]
                if target is None:
                    target = output.add_stream_from_template(source)
                for packet in piece.demux(source):
                    if packet.dts is None or written == count:
                        continue
                    packet.stream = target
                    packet.time_base = unit
                    packet.pts = packet.dts = written
                    packet.duration = 1
                    output.mux(packet)
                    written += 1
    assert written == count
    return buffer.getvalue()


class _Normaliser:
    """Pictures upright, their pixels square, the short side as asked, both sides cropped to a multiple."""

    def __init__(self, split: Split, aspect: float) -> None:
        self._split, self._aspect = split, aspect
        self._reformatter = VideoReformatter()

    def __call__(self, frame: Any) -> Picture:
        split, multiple = self._split, self._split.multiple
        width, height = frame.width * self._aspect, float(frame.height)
        scale = min(1.0, split.short_side / min(width, height))
        wide, high = (max(multiple, round(side * scale)) for side in (width, height))
        same = (wide, high) == (frame.width, frame.height)
        # One thread, as everywhere: starting others costs more than the conversion.
        picture: Any = self._reformatter.reformat(
            frame,
            width=wide,
            height=high,
            format="rgb24",
            interpolation="BILINEAR" if same else "AREA",
            threads=1,
        ).to_ndarray()
        picture = as_shown(frame, picture)
        height, width = picture.shape[0] // multiple * multiple, picture.shape[1] // multiple * multiple
        top, left = (picture.shape[0] - height) // 2, (picture.shape[1] - width) // 2
        return np.ascontiguousarray(picture[top : top + height, left : left + width])


def _look(frame: Any, reformatter: VideoReformatter) -> Picture:
    """What the detectors see: small, BGR."""
    scale = min(1.0, LOOK_SIZE / max(frame.width, frame.height))
    width, height = (max(16, round(side * scale)) for side in (frame.width, frame.height))
    look: Any = reformatter.reformat(
        frame, width=width, height=height, format="bgr24", interpolation="FAST_BILINEAR", threads=1
    ).to_ndarray()
    return np.asarray(look, np.uint8)


def _said(error: Any) -> str:
    text = " ".join(str(error.strerror or error).split()).lower()
    return text[:160] or type(error).__name__
