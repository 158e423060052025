"""A video that grows on the disk: a fragmented mp4, which plays wherever its writing was cut off.

Each call of `write` becomes one fragment, encoded by itself and beginning with a key frame, so nothing waits
in an encoder or a muxer, and it goes to the file in one piece. What is on the disk is therefore always a
whole video: of all chunks so far.
"""

from __future__ import annotations

import io
import json
import os
import struct
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from kairos.data.files import explained, prepare_file, write_atomically
from kairos.data.media import Frames, automatic_scale, encode_mp4, shown_size

# ISO/IEC 14496-12: the heading says that fragments will come, each counts its bytes from its own start.
_MUXER = {"movflags": "empty_moov+default_base_moof+frag_keyframe"}
_ENCODER = {"bf": "0", "g": "100000", "sc_threshold": "0"}  # one key frame, and frames in their order


class GrowingFile:
    """A file that grows by whole pieces: one that cannot be written whole leaves the file as it was.

    It takes the place of a file of that name when the first piece is written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.size = 0
        prepare_file(path)

    def append(self, piece: bytes, instead_of: int = 0) -> None:
        """Put `piece` at the end, over the last `instead_of` bytes.

        Raises UserError where the file cannot be written to, MachineError where the disk is full.
        """
        if not self.size:
            write_atomically(self.path, piece)
            self.size = len(piece)
            return
        at = self.size - instead_of
        with explained(self.path), open(self.path, "r+b", buffering=0) as file:
            file.seek(at)
            kept = b""
            if instead_of:
                kept = file.read(instead_of)
                file.seek(at)
            try:
                rest = memoryview(piece)
                while rest:
                    rest = rest[file.write(rest) :]
            except BaseException:
                file.seek(at)
                file.write(kept)
                file.truncate()
                raise
        self.size = at + len(piece)


class GrowingVideo:
    """An H.264 mp4 that plays after each `write`: colours, scale and metadata are those of `write_video`."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        fps: float,
        metadata: Mapping[str, Any] | None = None,
        scale: int | None = None,
    ) -> None:
        self.file = GrowingFile(path)
        self.fps, self.scale = fps, scale
        self.comment = None if metadata is None else json.dumps(metadata, ensure_ascii=False)
        self.frames = 0
        """How many are on the disk."""
        self._fragments = 0
        self._size: tuple[int, ...] = ()

    def write(self, frames: Frames) -> None:
        """Append frames, (F, H, W, 3) uint8 RGB. When it returns they are in the file.

        Raises UserError where the file cannot be written to, MachineError where the disk is full; the frames
        before are kept, and play.
        """
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or len(frames) == 0:
            raise ValueError(
                f"frames must be (F, H, W, 3) uint8 with F >= 1, got {frames.shape} {frames.dtype}"
            )
        _, height, width, _ = frames.shape
        if self._fragments and (height, width) != self._size:
            raise ValueError(f"all frames must be {self._size} high and wide, got {(height, width)}")
        scale = self.scale or automatic_scale(height, width)
        shown_size(height, width, scale)
        buffer = io.BytesIO()
        numbered = _MUXER | {"fragment_index": str(self._fragments + 1)}
        unit_s = encode_mp4(buffer, frames, self.fps, scale, self.comment, numbered, _ENCODER)
        wanted = {b"moof", b"mdat"} if self._fragments else {b"ftyp", b"moov", b"moof", b"mdat"}
        parts = [box for kind, box in boxes(buffer.getvalue()) if kind in wanted]
        start = self.frames / Fraction(self.fps).limit_denominator(1001) / unit_s
        self.file.append(starting_at(b"".join(parts), round(start)))
        self.frames += len(frames)
        self._fragments, self._size = self._fragments + 1, (height, width)


def frame_count(path: str | os.PathLike[str]) -> tuple[int, float]:
    """How many frames a video has, and how many a second: its packets are counted, and none is decoded."""
    with av.open(str(path), metadata_errors="replace") as container:
        stream = container.streams.video[0]
        rate = stream.average_rate or stream.guessed_rate or 25
        return sum(packet.size > 0 for packet in container.demux(stream)), float(rate)


def boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The outermost boxes of an mp4: each one's kind, and all of its bytes."""
    at = 0
    while at < len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        yield kind, data[at : at + size]
        at += size


def starting_at(fragment: bytes, time: int) -> bytes:
    """The fragment with its decode time (the box `tfdt`), which the muxer counts from 0, set to `time`."""
    at = fragment.index(b"tfdt", fragment.index(b"moof")) + 4
    assert fragment[at] == 1, "version 1 has 64 bits"
    return fragment[: at + 4] + struct.pack(">Q", time) + fragment[at + 12 :]
