"""Images and videos in and out of files."""

import errno
import math
import os
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, ImageOps

from kairos.data import files, media
from kairos.errors import MachineError, UserError

COLOURS = [(220, 30, 40), (40, 160, 60), (30, 60, 220), (250, 250, 250), (0, 0, 0), (240, 200, 40)]


def moving_square(frames: int = 9, height: int = 64, width: int = 64) -> np.ndarray:
    video = np.full((frames, height, width, 3), 230, np.uint8)
    for index, frame in enumerate(video):
        frame[20:36, 4 * index : 4 * index + 16] = (220, 30, 40)
    return video


def test_a_written_video_reads_back_enlarged_and_nearly_unchanged(tmp_path: Path) -> None:
    frames = moving_square()
    media.write_video(tmp_path / "out.mp4", frames, fps=16)
    shown = media.read_video(tmp_path / "out.mp4")
    assert shown.shape == (9, 256, 256, 3)
    as_made = shown.reshape(9, 64, 4, 64, 4, 3).mean((2, 4))
    assert np.abs(as_made - frames).mean() < 1.5


@pytest.mark.parametrize("colour", COLOURS)
def test_colours_survive_the_file(tmp_path: Path, colour: tuple[int, int, int]) -> None:
    media.write_video(tmp_path / "out.mp4", np.full((2, 64, 64, 3), colour, np.uint8), fps=16)
    shown = media.read_video(tmp_path / "out.mp4")
    assert np.abs(shown.astype(int) - colour).max() <= 4


@pytest.mark.parametrize(
    ("size", "scale", "written"),
    [
        ((64, 64), None, (256, 256)),
        ((64, 96), None, (256, 384)),
        ((63, 61), 1, (64, 62)),
        ((63, 61), None, (316, 306)),
        ((480, 640), None, (480, 640)),
        ((64, 64), 1, (64, 64)),
        ((64, 64), 3, (192, 192)),
    ],
)
def test_small_videos_are_enlarged_by_a_whole_factor(
    tmp_path: Path, size: tuple[int, int], scale: int | None, written: tuple[int, int]
) -> None:
    media.write_video(tmp_path / "out.mp4", np.zeros((1, *size, 3), np.uint8), fps=16, scale=scale)
    assert media.read_video(tmp_path / "out.mp4").shape == (1, *written, 3)


def test_the_same_frames_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        media.write_video(tmp_path / name, moving_square(), fps=16, metadata={"seed": 1})
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_metadata_comes_back_as_it_was(tmp_path: Path) -> None:
    metadata = {"request": {"prompt": 'a "red" ball; 球, ümlaut\n# second line = \\', "seed": 3}}
    media.write_video(tmp_path / "out.mp4", moving_square(), fps=16, metadata=metadata)
    assert media.read_metadata(tmp_path / "out.mp4") == metadata


def test_a_video_without_a_request_says_so(tmp_path: Path) -> None:
    media.write_video(tmp_path / "out.mp4", moving_square(), fps=16)
    with pytest.raises(UserError, match="carries no request"):
        media.read_metadata(tmp_path / "out.mp4")


def test_a_title_in_another_encoding_is_no_hindrance(tmp_path: Path) -> None:
    media.write_video(tmp_path / "out.mp4", moving_square(), fps=16, metadata={"title": "cafe"})
    data = (tmp_path / "out.mp4").read_bytes()
    assert b"cafe" in data
    (tmp_path / "old.mp4").write_bytes(data.replace(b"cafe", b"caf\xe9"))
    assert len(media.read_video(tmp_path / "old.mp4")) == len(moving_square())
    assert "caf" in media.read_metadata(tmp_path / "old.mp4")["title"]


def test_the_file_plays_at_the_rate_asked_for_in_a_format_that_players_know(tmp_path: Path) -> None:
    media.write_video(tmp_path / "out.mp4", moving_square(), fps=12.5)
    with av.open(str(tmp_path / "out.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert float(stream.average_rate) == 12.5


@pytest.mark.parametrize(("fps", "expected"), [(16, range(8)), (8, range(0, 8, 2)), (4, range(0, 8, 4))])
def test_reading_at_a_lower_rate_takes_the_frames_on_screen(
    tmp_path: Path, fps: int, expected: range
) -> None:
    media.write_video(tmp_path / "out.mp4", moving_square(8), fps=16)
    every = media.read_video(tmp_path / "out.mp4")
    assert np.array_equal(media.read_video(tmp_path / "out.mp4", fps=fps), every[list(expected)])


@pytest.mark.parametrize("kind", ["mp4", "mkv", "ts"])
def test_a_long_video_is_entered_near_the_frame_that_is_asked_for_and_gives_the_same(
    tmp_path: Path, kind: str
) -> None:
    path, rng = tmp_path / f"long.{kind}", np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width = stream.height = 32
        stream.options = {"g": "25", "bf": "3", "x264-params": "open-gop=1"}
        stream.codec_context.time_base = Fraction(1, 1000)
        for time_ms in 2000 + np.cumsum(rng.integers(10, 70, 500)):  # 20 s, unevenly
            picture = av.VideoFrame.from_ndarray(rng.integers(0, 255, (32, 32, 3), np.uint8), format="rgb24")
            picture.pts, picture.time_base = int(time_ms), Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    whole = media.read_video(path, fps=16)
    for skip in (10, 170, 250, len(whole) - 1):
        part = media.read_video(path, fps=16, skip=skip, max_frames=9)
        np.testing.assert_array_equal(part, whole[skip : skip + 9])
    with av.open(str(path)) as container:
        decoded = len(list(media.on_screen(container, 16, skip=250)))
    assert decoded == 500 if kind == "ts" else decoded < 250  # a stream has no index


def test_reading_at_a_higher_rate_repeats_frames_and_keeps_the_duration(tmp_path: Path) -> None:
    media.write_video(tmp_path / "out.mp4", moving_square(8), fps=16)
    every = media.read_video(tmp_path / "out.mp4")
    assert np.array_equal(media.read_video(tmp_path / "out.mp4", fps=32), every.repeat(2, axis=0))
    assert len(media.read_video(tmp_path / "out.mp4", fps=24)) == 12


def test_reading_stops_at_max_frames(tmp_path: Path) -> None:
    media.write_video(tmp_path / "out.mp4", moving_square(8), fps=16)
    assert len(media.read_video(tmp_path / "out.mp4", fps=32, max_frames=5)) == 5


def test_rates_and_counts_that_cannot_be_are_refused_in_one_line_and_nothing_is_written(
    tmp_path: Path,
) -> None:
    path, frames = tmp_path / "out.mp4", moving_square(4)
    for fps in (0, 0.0001, -1, math.nan, math.inf):
        with pytest.raises(UserError, match=rf"fps must be at least 0\.001, got {fps}"):
            media.write_video(path, frames, fps=fps)
    for scale in (0, -1, 1.5):
        with pytest.raises(UserError, match=f"scale must be a whole number of 1 or more, got {scale}"):
            media.write_video(path, frames, fps=16, scale=scale)
    assert not path.exists()
    media.write_video(path, frames, fps=0.001)
    for arguments, message in (
        ({"fps": math.inf}, "fps must be above 0, got inf"),
        ({"max_frames": 0}, "max_frames must be at least 1, got 0"),
        ({"skip": -1}, "skip must be at least 0, got -1"),
    ):
        with pytest.raises(UserError, match=message):
            media.read_video(path, **arguments)


def test_an_image_is_turned_upright_and_made_rgb(tmp_path: Path) -> None:
    picture = Image.new("L", (4, 2))
    exif = picture.getexif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    picture.save(tmp_path / "turned.jpg", exif=exif)
    upright = media.read_image(tmp_path / "turned.jpg")
    assert (upright.size, upright.mode) == ((2, 4), "RGB")


@pytest.mark.parametrize("orientation", range(1, 10))
def test_every_orientation_is_turned_as_pillow_turns_it(tmp_path: Path, orientation: int) -> None:
    picture = Image.fromarray(np.arange(18, dtype=np.uint8).reshape(2, 3, 3))
    exif = picture.getexif()
    exif[0x0112] = orientation
    for name in ("turned.png", "turned.tiff"):
        picture.save(tmp_path / name, exif=exif)
        with Image.open(tmp_path / name) as file:
            expected = np.asarray(ImageOps.exif_transpose(file))
        assert np.array_equal(media.read_image(tmp_path / name), expected)


def test_a_photo_whose_exif_cannot_be_written_anew_is_read(tmp_path: Path) -> None:
    picture = Image.new("RGB", (4, 2))
    exif = picture.getexif()
    exif[0x0112], exif[0x010E] = 6, "a holiday"
    picture.save(tmp_path / "photo.jpg", exif=exif)
    as_text, as_fraction = (struct.pack(">HHI", 0x010E, *kind) for kind in ((2, 10), (5, 1)))
    content = (tmp_path / "photo.jpg").read_bytes()
    assert as_text in content
    (tmp_path / "photo.jpg").write_bytes(content.replace(as_text, as_fraction))
    with Image.open(tmp_path / "photo.jpg") as file, pytest.raises(AttributeError):
        ImageOps.exif_transpose(file)
    assert media.read_image(tmp_path / "photo.jpg").size == (2, 4)


def test_sixteen_bit_greys_are_not_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 128 * 256, np.uint16)).save(tmp_path / "grey.png")
    assert media.read_image(tmp_path / "grey.png").getpixel((0, 0)) == (128, 128, 128)
    for white in (65535, 4095):  # a PGM says what its white is
        half = np.full((4, 4), (white + 1) // 2, ">u2")
        (tmp_path / "grey.pgm").write_bytes(b"P5 4 4 %d\n" % white + half.tobytes())
        assert media.read_image(tmp_path / "grey.pgm").getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_greys_without_a_known_white_are_refused(tmp_path: Path, kind: type) -> None:
    Image.fromarray(np.ones((4, 4), kind)).save(tmp_path / "grey.tiff")
    with pytest.raises(UserError, match=r"cannot read image .*grey\.tiff: 32-bit greys have no one white"):
        media.read_image(tmp_path / "grey.tiff")


def test_a_transparent_image_lies_on_white(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    picture.putpixel((1, 0), (200, 30, 30, 255))
    picture.save(tmp_path / "clear.png")
    read = media.read_image(tmp_path / "clear.png")
    assert [read.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (200, 30, 30)]


@pytest.mark.parametrize("target", [(64, 64), (48, 80), (80, 48)])
def test_a_picture_of_any_size_is_scaled_and_cut(target: tuple[int, int]) -> None:
    for side in range(16, 1000):  # for some, a side over the quotient is more than itself
        assert media.fill_frame(Image.new("L", (side, side)), *target).size == target[::-1]


def test_a_picture_is_cut_on_both_sides_alike_and_not_stretched() -> None:
    picture = np.zeros((100, 300, 3), np.uint8)
    picture[25:75, 125:175] = 255  # a square of half the height
    bright = np.asarray(media.fill_frame(Image.fromarray(picture), 64, 64))[..., 0] > 127
    assert bright[16:48, 16:48].all() and bright.sum() == 32 * 32


@pytest.mark.parametrize(("aspect", "width"), [("4:3", 64), ("1:1", 48), ("0:1", 48), ("100:1", 48)])
@pytest.mark.parametrize("turn", [0, 90])
def test_the_pixels_of_a_video_become_square(tmp_path: Path, aspect: str, width: int, turn: int) -> None:
    path = tmp_path / "wide.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = 48, 48, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(*map(int, aspect.split(":")))
        for pixels in moving_square(2, 48, 48):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    if turn:
        turned_a_quarter(path)
    video = media.read_video(path)
    assert video.shape == ((2, width, 48, 3) if turn else (2, 48, width, 3))


def turned_a_quarter(path: Path) -> None:
    """Write a quarter turn into the matrix of an mp4's only track."""
    write_matrix(path, 0, 1, -1, 0)


def write_matrix(path: Path, a: int, b: int, c: int, d: int) -> None:
    """Have an mp4's only track shown at (a x + c y, b x + d y)."""
    data = path.read_bytes()
    start = data.index(b"tkhd") + 4 + 40
    matrix = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(data[:start] + matrix + data[start + 36 :])


@pytest.mark.parametrize("matrix", [(a, 0, 0, d) for a in (1, -1) for d in (1, -1)])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_video_is_mirrored_and_turned_as_its_matrix_says(
    tmp_path: Path, matrix: tuple[int, int, int, int], transposed: bool
) -> None:
    picture = np.zeros((1, 32, 48, 3), np.uint8)
    picture[:, :8, :16] = 255  # one corner of four
    media.write_video(tmp_path / "clip.mp4", picture, fps=16, scale=1)
    shown = media.read_video(tmp_path / "clip.mp4")[0][:: matrix[3], :: matrix[0]]
    if transposed:
        shown, matrix = shown.swapaxes(0, 1), (0, matrix[0], matrix[3], 0)
    write_matrix(tmp_path / "clip.mp4", *matrix)
    assert np.array_equal(media.read_video(tmp_path / "clip.mp4")[0], shown)


def test_a_video_that_changes_its_size_gets_one_line(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "two.mkv"), "w") as container:
        stream = container.add_stream("mjpeg", rate=16)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuvj420p"
        for time, (width, height) in enumerate([(64, 32), (32, 64)]):
            encoder = av.CodecContext.create("mjpeg", "w")
            encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuvj420p"
            encoder.time_base = Fraction(1, 16)
            frame = av.VideoFrame.from_ndarray(np.zeros((height, width, 3), np.uint8), format="rgb24")
            frame.pts = time
            for packet in encoder.encode(frame.reformat(format="yuvj420p")):
                packet.stream = stream
                container.mux(packet)
    with pytest.raises(UserError, match=r"two\.mkv: its size changes from 32 x 64 to 64 x 32; convert it"):
        media.read_video(tmp_path / "two.mkv")


@pytest.mark.parametrize("read", [media.read_image, media.read_video, media.read_metadata])
def test_a_file_that_cannot_be_read_gets_one_line(tmp_path: Path, read) -> None:
    (tmp_path / "text.mp4").write_text("not a picture")
    (tmp_path / "empty.mp4").touch()
    for name in ("text.mp4", "empty.mp4", "missing.mp4", "."):
        with pytest.raises(UserError) as caught:
            read(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert str(tmp_path) in str(caught.value)


def test_a_cut_off_image_gets_one_line(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:900])
    with pytest.raises(UserError, match=r"cannot read image .*cut\.png"):
        media.read_image(tmp_path / "cut.png")


def test_a_large_image_is_read_without_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert media.read_image(tmp_path / "large.png").size == (40, 30)  # a warning would be an error here


def test_whatever_a_decoder_raises_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path) -> Image.Image:
        raise RuntimeError("Failed to decode image: Missing or empty image item")

    (tmp_path / "broken.avif").write_bytes(b"x")
    monkeypatch.setattr(Image, "open", broken)
    with pytest.raises(UserError, match=r"cannot read image .*broken\.avif: Failed to decode"):
        media.read_image(tmp_path / "broken.avif")


def test_a_still_image_reads_as_a_video_of_one_frame(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    assert media.read_video(tmp_path / "image.png").shape == (1, 8, 8, 3)


@pytest.mark.parametrize(
    ("failing", "failure", "raised"),
    [
        ("fsync", OSError(errno.ENOSPC, "No space left on device"), MachineError),
        ("fsync", OSError(errno.EIO, "Input/output error"), MachineError),
        ("replace", PermissionError(errno.EACCES, "Permission denied"), UserError),
        ("fsync", KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_failure_while_writing_leaves_the_old_file_and_nothing_else(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failing: str,
    failure: BaseException,
    raised: type[BaseException],
) -> None:
    (tmp_path / "out.mp4").write_text("the old one")

    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(files.os, failing, fail)
    with pytest.raises(raised):
        media.write_video(tmp_path / "out.mp4", moving_square(), fps=16)
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]
    assert (tmp_path / "out.mp4").read_text() == "the old one"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting needs root")
def test_a_disk_that_is_really_full_is_the_machines_failure(tmp_path: Path) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "none", tmp_path], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting is not permitted here")
    try:
        noise = np.random.default_rng(0).integers(0, 255, (9, 64, 64, 3), np.uint8)
        with pytest.raises(MachineError, match="no space left"):
            media.write_video(tmp_path / "out.mp4", noise, fps=16)
        assert list(tmp_path.iterdir()) == []
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX paths")
def test_folders_that_cannot_be_written_to_are_the_users_to_change(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "deeper", Path("/proc/kairos")):
        with pytest.raises(UserError, match="cannot write"):
            files.prepare_folder(folder)
    with pytest.raises(UserError, match="it is a folder"):
        files.write_atomically(tmp_path, b"")


def test_a_prepared_folder_exists_and_is_empty(tmp_path: Path) -> None:
    files.prepare_folder(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_contact_sheet_has_a_row_for_each_video(tmp_path: Path) -> None:
    videos = [moving_square(), moving_square(5)]
    media.write_contact_sheet(tmp_path / "sheet.png", videos, columns=4, captions=["one", "two"], scale=2)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (4 * (128 + 4) + 4, 2 * (20 + 128 + 4) + 4)


def test_a_long_caption_of_a_contact_sheet_is_whole(tmp_path: Path) -> None:
    def right_margin(caption: str) -> np.ndarray:
        media.write_contact_sheet(tmp_path / "sheet.png", [moving_square()], 4, [caption], scale=2)
        with Image.open(tmp_path / "sheet.png") as sheet:
            return np.asarray(sheet)[:20, -4:]

    assert (
        right_margin("a ball is thrown to the left at high speed, falls down, and lies there" * 2) == 255
    ).all()
