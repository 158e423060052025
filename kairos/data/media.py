"""Images and videos: in from files, out to mp4 with their request inside."""

import io
import itertools
import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageDraw, ImageFont, UnidentifiedImageError

from kairos.data.files import write_atomically
from kairos.errors import UserError

Frames = NDArray[np.uint8]  # (F, H, W, 3), RGB

MIN_SHOWN_SIZE = 256  # pixels; smaller videos are enlarged when written, players show them badly
MAX_SHOWN_SIZE = 16384  # pixels; x264's own limit
LEAST_FPS = 0.001  # less is no fraction that an mp4 keeps
_CRF = "14"  # visually lossless; these clips are short
_ENCODER_THREADS = 4  # fixed: x264's bytes depend on it, and the same frames shall give the same bytes
_CLOCK_S = 1.1e-3  # Matroska counts whole milliseconds: so far apart may two equal times be
_NEAR_S = 4.0  # so far ahead a file is read, not entered later
_INDEXED = ("mov", "matroska")  # FFmpeg's names of the formats that say where each key frame is
_BT709 = 1  # H.273's code for the primaries, the transfer curve and the matrix

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image upright, by its EXIF orientation. Pillow's own also writes the EXIF anew, and fails on
photos with other entries that it cannot write."""


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """An image file as RGB, upright as its EXIF orientation says, on white where it is transparent.

    Raises UserError if it cannot be read.
    """
    path = _existing_file(path, "image")
    try:
        with warnings.catch_warnings():
            # Large ones are read as well; what is too large is an error of its own.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.load()  # Pillow turns a TIFF itself, and says so in its EXIF
                turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
                upright = image if turn is None else image.transpose(turn)
                return as_rgb(upright)
    except UnidentifiedImageError as error:
        raise UserError(f"cannot read image {path}: not a PNG, JPEG, WebP or other known image") from error
    except (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read image {path}: {_one_line(error)}") from error


def as_rgb(image: Image.Image) -> Image.Image:
    """The image as RGB, on white where it is transparent: what lies under that is nothing to be seen.

    Raises UserError for greys of 32 bits, which have no one white.
    """
    # Pillow would clip 16-bit greys to white; those of a PGM it holds in 32 bits.
    if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise UserError("32-bit greys have no one white; save the image with 8 or 16 bits")
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def to_uint8(frames: NDArray[np.floating]) -> Frames:
    """Frames in [0, 1] as uint8. In place as far as it can be: a long video is large."""
    scaled = frames * 255
    np.clip(np.rint(scaled, out=scaled), 0, 255, out=scaled)
    return scaled.astype(np.uint8)


def fill_frame(image: Image.Image, height: int, width: int) -> Image.Image:
    """Scale the image until it covers height x width, and cut what sticks out on both sides."""
    if image.size == (width, height):
        return image
    scale = max(height / image.height, width / image.width)
    # By rounding the quotient may be a little more than the side that it is.
    box_width, box_height = min(width / scale, image.width), min(height / scale, image.height)
    left, top = (image.width - box_width) / 2, (image.height - box_height) / 2
    return image.resize(
        (width, height), Image.Resampling.LANCZOS, box=(left, top, left + box_width, top + box_height)
    )


def read_video(
    path: str | os.PathLike[str], fps: float | None = None, max_frames: int | None = None, skip: int = 0
) -> Frames:
    """The frames of a video file, (F, H, W, 3) uint8 RGB, upright, their pixels square.

    With `fps` they are taken at that rate: frame k is the one on screen at k / fps seconds. At most
    `max_frames` are read, those after the first `skip`. Raises UserError where there is no such file or no
    video in it.
    """
    if max_frames is not None and max_frames < 1:
        raise UserError(f"max_frames must be at least 1, got {max_frames}")
    return np.stack(list(itertools.islice(video_frames(path, fps, skip), max_frames)))


def video_frames(
    path: str | os.PathLike[str], fps: float | None = None, skip: int = 0
) -> Iterator[NDArray[np.uint8]]:
    """The frames of `read_video` one by one, (H, W, 3): a long video need not be in memory as a whole."""
    path = _existing_file(path, "video")
    if fps is not None and not 0 < fps < math.inf:
        raise UserError(f"fps must be above 0, got {fps}")
    if skip < 0:
        raise UserError(f"skip must be at least 0, got {skip}")
    shape = None
    with _reading(path) as container:
        aspect = pixel_aspect(container.streams.video[0])
        for frame, repeats in on_screen(container, fps, skip):
            if repeats < 1:
                continue
            pixels = frame.to_ndarray(format="rgb24", width=max(1, round(frame.width * aspect)))
            pixels = as_shown(frame, pixels)
            if shape not in (None, pixels.shape):
                sizes = " to ".join(f"{height} x {width}" for height, width, _ in (shape, pixels.shape))
                raise UserError(f"cannot read video {path}: its size changes from {sizes}; convert it to one")
            shape = pixels.shape
            yield from itertools.repeat(pixels, repeats)
    if shape is None:
        raise UserError(f"cannot read video {path}: it has no frames where it is to be read")


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata that `write_video` put into a file. Raises UserError where there is none."""
    path = _existing_file(path, "video")
    with _reading(path) as container:
        comment = container.metadata.get("comment", "")
    try:
        metadata = json.loads(comment)
    except json.JSONDecodeError:
        metadata = None
    if not isinstance(metadata, dict):
        raise UserError(f"{path} carries no request: it was not written by kairos, or was converted since")
    return metadata


def write_video(
    path: str | os.PathLike[str],
    frames: Frames,
    fps: float,
    metadata: Mapping[str, Any] | None = None,
    scale: int | None = None,
) -> None:
    """Write frames, (F, H, W, 3) uint8 RGB, to an H.264 mp4, whole or not at all.

    scale enlarges by a whole factor without smoothing; None takes the smallest that gives both sides
    MIN_SHOWN_SIZE pixels, 1 keeps them as made. An odd side gets its last line repeated, for
    colour is stored for pairs of lines. metadata goes, as JSON, into the comment tag. The same input gives
    the same bytes.
    Raises UserError where the file cannot be written, MachineError where the disk is full.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or len(frames) == 0:
        raise ValueError(f"frames must be (F, H, W, 3) uint8 with F >= 1, got {frames.shape} {frames.dtype}")
    _, height, width, _ = frames.shape
    shown_size(height, width, scale)
    scale = scale or automatic_scale(height, width)
    comment = None if metadata is None else json.dumps(metadata, ensure_ascii=False)
    # Encoded in memory, for clips are short: all that can fail at the disk is then plain file writing.
    write_atomically(path, _encode(frames, fps, scale, comment))


def automatic_scale(height: int, width: int) -> int:
    """The smallest whole factor that brings both sides to MIN_SHOWN_SIZE."""
    return max(1, math.ceil(MIN_SHOWN_SIZE / min(height, width)))


def shown_size(height: int, width: int, scale: int | None) -> tuple[int, int]:
    """Height and width of a video as `write_video` writes it. Raises UserError for what H.264 cannot hold."""
    scale = automatic_scale(height, width) if scale is None else scale
    if not (scale >= 1 and scale % 1 == 0):
        raise UserError(f"scale must be a whole number of 1 or more, got {scale}")
    shown = height * scale + height * scale % 2, width * scale + width * scale % 2
    if max(shown) > MAX_SHOWN_SIZE:
        enlarged = f"{height} x {width} enlarged {scale} times is {shown[0]} x {shown[1]}"
        raise UserError(f"{enlarged}, and a video's side is at most {MAX_SHOWN_SIZE}; try a smaller scale")
    return shown


def write_contact_sheet(
    path: str | os.PathLike[str],
    videos: Sequence[Frames],
    columns: int = 8,
    captions: Sequence[str] | None = None,
    scale: int = 2,
) -> None:
    """Write a PNG with one row for each video: `columns` frames evenly spread over it, its caption above,
    in smaller letters where it is long.

    All videos, (F, H, W, 3) uint8 RGB, have one height and width; scale enlarges them by a whole factor.
    """
    if captions is not None and len(captions) != len(videos):
        raise ValueError(f"{len(videos)} videos need as many captions, got {len(captions)}")
    gap, text_height = 4, 20 if captions is not None else 0
    height, width = (side * scale for side in videos[0].shape[1:3])
    row_height = text_height + height + gap
    sheet = Image.new("RGB", (columns * (width + gap) + gap, len(videos) * row_height + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for row, video in enumerate(videos):
        top = gap + row * row_height
        if captions is not None:
            caption = captions[row]
            fonts = (ImageFont.load_default(size) for size in range(14, 5, -1))
            font = next((font for font in fonts if draw.textlength(caption, font) < sheet.width - gap), None)
            draw.text((gap, top), caption, fill="black", font=font or ImageFont.load_default(6))
        for column, index in enumerate(np.linspace(0, len(video) - 1, columns).round().astype(int)):
            picture = Image.fromarray(video[index]).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(picture, (gap + column * (width + gap), top + text_height))
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", optimize=True)
    write_atomically(path, buffer.getvalue())


def _encode(frames: Frames, fps: float, scale: int, comment: str | None) -> bytes:
    buffer = io.BytesIO()
    encode_mp4(buffer, frames, fps, scale, comment)
    return buffer.getvalue()


def encode_mp4(
    buffer: io.BytesIO,
    frames: Frames,
    fps: float,
    scale: int,
    comment: str | None,
    muxer_options: dict[str, str] | None = None,
    encoder_options: dict[str, str] | None = None,
) -> Fraction:
    """Write an H.264 mp4 into `buffer`, and return the unit of its time stamps in seconds."""
    if not LEAST_FPS <= fps < math.inf:
        raise UserError(f"fps must be at least {LEAST_FPS}, got {fps}")
    _, height, width, _ = frames.shape
    with av.open(buffer, mode="w", format="mp4", options=muxer_options or {}) as container:
        if comment is not None:
            container.metadata["comment"] = comment
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = shown_size(height, width, scale)
        stream.pix_fmt = "yuv420p"
        # The macroblock tree gives other bytes for equal pictures once in some hundred times.
        options = {"crf": _CRF, "preset": "medium", "x264-params": "mbtree=0"}
        stream.options = options | (encoder_options or {})
        context = stream.codec_context
        context.thread_count = _ENCODER_THREADS
        context.color_primaries = context.color_trc = context.colorspace = _BT709
        context.color_range = ColorRange.MPEG
        for pixels in frames:
            picture = av.VideoFrame.from_ndarray(_enlarged(pixels, scale), format="rgb24")
            picture = picture.reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
            )
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
        assert stream.time_base is not None
        return stream.time_base


def _enlarged(pixels: NDArray[np.uint8], scale: int) -> NDArray[np.uint8]:
    """Each pixel `scale` times, (H, W, 3) -> (H * scale, W * scale, 3), odd sides made even."""
    pixels = pixels.repeat(scale, axis=0).repeat(scale, axis=1)
    height, width, _ = pixels.shape
    return np.ascontiguousarray(np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge"))


def as_shown(frame: Any, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The pixels of a frame, (H, W, 3), mirrored and turned as its display matrix says.

    FFmpeg's own `rotation` takes a mirror for a half turn.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return pixels
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()  # x' = a x + c y, y' = b x + d y
    if a * d < b * c:
        pixels, a, b = pixels[:, ::-1], -a, -b
    return np.rot90(pixels, round(-math.degrees(math.atan2(b, a)) / 90) % 4)


def pixel_aspect(stream: Any) -> float:
    """Width to height of a pixel; 1 where it is not said, or is what no camera writes: a broken header."""
    aspect = float(stream.sample_aspect_ratio or 1)
    return aspect if 0.2 < aspect < 5 else 1.0


def on_screen(container: Any, fps: float | None, skip: int = 0) -> Iterator[tuple[Any, int]]:
    """Every frame of the first video stream, with how often it is to be taken to play at `fps`.

    The first `skip` that were to be taken are not: frames that were before them come 0 times, or not at all
    where the file can be entered later.
    """
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    if fps is None:
        yield from ((frame, 1) for frame in itertools.islice(container.decode(stream), skip, None))
        return
    rate = stream.average_rate or stream.guessed_rate or Fraction(25)
    frame_s = float(1 / rate)  # how long the last one stays
    taken, last, last_s = skip, None, 0.0
    for time_s, frame in _timed(container, stream, frame_s, skip / fps):
        if last is not None:
            due = max(taken, _ticks_before(time_s, fps))  # never back, whatever a broken file says
            yield last, due - taken
            taken = due
        last, last_s = frame, time_s
    if last is not None:
        yield last, _ticks_before(last_s + frame_s, fps) - taken


def _timed(container: Any, stream: Any, frame_s: float, from_s: float) -> Iterator[tuple[float, Any]]:
    """Frames with their seconds since the first. Those before the one on screen at `from_s` may be missing,
    where a file has an index by which to enter it."""

    def decoded() -> Iterator[tuple[float, Any]]:
        for number, frame in enumerate(container.decode(stream)):
            yield number * frame_s if frame.pts is None else float(frame.pts * frame.time_base), frame

    frames = decoded()
    first = next(frames, None)
    if first is None:
        return
    start_s, opening = first
    if from_s > _NEAR_S and opening.pts is not None and container.format.name.startswith(_INDEXED):
        container.seek(int((start_s + from_s - _NEAR_S / 2) / stream.time_base), stream=stream)
        frames = decoded()
        first = next(frames, None)
        if first is None or first[1].pts is None or first[0] - start_s > from_s:  # its index is wrong
            container.seek(opening.pts, stream=stream)
            frames = decoded()
            first = next(frames)
    yield from ((time_s - start_s, frame) for time_s, frame in itertools.chain((first,), frames))


def _ticks_before(time_s: float, fps: float) -> int:
    """How many of the moments 0, 1 / fps, 2 / fps, ... come before `time_s`, but for a clock's rounding."""
    return math.ceil((time_s - _CLOCK_S) * fps)


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    try:
        with av.open(str(path), mode="r", metadata_errors="replace") as container:
            if not container.streams.video:
                raise UserError(f"cannot read video {path}: there is no video in it")
            yield container
    except av.error.FFmpegError as error:
        raise UserError(f"cannot read video {path}: {_one_line(error.strerror or error)}") from error


def _existing_file(path: str | os.PathLike[str], kind: str) -> Path:
    path = Path(path)
    try:
        if path.is_dir():
            raise UserError(f"cannot read {kind} {path}: it is a folder, not a file")
        if not path.exists():
            raise UserError(f"{kind} not found: {path}")
        path.open("rb").close()
    except OSError as error:
        raise UserError(f"cannot read {kind} {path}: {_one_line(error.strerror or error)}") from error
    return path


def _one_line(error: object) -> str:
    return " ".join(str(error).split()) or type(error).__name__
