"""From a source to its clips: square pixels, gaps, margins, names, and what a refused source leaves."""

from __future__ import annotations

from dataclasses import replace

import av
import cv2
import numpy as np
import pytest
from av.video.reformatter import VideoReformatter
from curation_plants import FPS, SETTINGS, encoded, shot, write

from kairos.curation import Settings, source
from kairos.curation.scoring import ScoreTask, score_clip
from kairos.curation.source import Refused, SplitTask, clip_file, split_source
from kairos.curation.stages.physics import Physics
from kairos.worlds import simulate


def clips_of(file, folder, **split) -> list[dict]:
    """The clips that a file is cut into, written to a folder."""
    settings = Settings.from_dict(SETTINGS)
    task = SplitTask(file, folder, settings.limits, settings.shots, replace(settings.split, **split))
    clips: list[dict] = split_source(task)["clips"]
    return clips


def test_pixels_that_are_not_square_are_made_square(tmp_path) -> None:
    from kairos.data.media import read_video

    frames = np.zeros((33, 192, 128, 3), np.uint8)
    for number, picture in enumerate(frames):
        cv2.circle(picture, (64, 60 + number), 40, (255, 255, 255), -1)
    encoded(tmp_path / "narrow.mp4", frames[:, :, ::2], pixel_aspect=2)
    (clip,) = clips_of(tmp_path / "narrow.mp4", tmp_path)
    bright = read_video(clip_file(tmp_path, clip["clip_id"]))[0].mean(axis=-1) > 128
    assert bright.shape == (192, 128)
    assert (bright.any(axis=0).sum(), bright.any(axis=1).sum()) == pytest.approx((81, 81), abs=3)


def test_a_source_that_lacks_a_frame_is_told_how_many_a_clip_has(tmp_path) -> None:
    lengths = {"min_s": 5, "piece_s": 5, "max_s": 6, "frame_step": 16}
    frames = shot("pendulum", 1, num_frames=81)
    write(tmp_path / "80.mp4", frames[:80])
    write(tmp_path / "81.mp4", frames)
    with pytest.raises(Refused) as refused:
        clips_of(tmp_path / "80.mp4", tmp_path, **lengths)
    assert str(refused.value) == "short: 5.00 s, and a clip has at least 81 frames, 5.06 s (split.min_s)"
    assert places(clips_of(tmp_path / "81.mp4", tmp_path, **lengths)) == [(0, 81)]
    assert places(clips_of(tmp_path / "80.mp4", tmp_path, **lengths | {"min_s": 4})) == [(0, 65)]


def test_other_ways_to_encode_give_other_clips(tmp_path) -> None:
    write(tmp_path / "ball.mp4", shot("collision", 1))
    ways = ({}, {"crf": 40}, {"preset": "ultrafast"})
    clips = [clips_of(tmp_path / "ball.mp4", tmp_path, **way)[0]["clip_id"] for way in ways]
    first, small, quick = (clip_file(tmp_path, clip).read_bytes() for clip in clips)
    assert len(small) < len(first)
    assert len({first, small, quick}) == 3


def test_a_long_source_says_that_it_is_worked_on(tmp_path, monkeypatch) -> None:
    signs: list[int] = []
    monkeypatch.setattr(source, "_SIGN_S", 1.0)
    monkeypatch.setattr(source, "still_working", lambda: signs.append(1))
    write(tmp_path / "ball.mp4", shot("collision", 1))
    clips_of(tmp_path / "ball.mp4", tmp_path / "clips")
    assert len(signs) == 3  # of 3.06 s


def test_a_source_that_is_refused_at_its_end_leaves_no_clip(tmp_path) -> None:
    write(tmp_path / "long.mkv", shot("pendulum", 1, num_frames=150))
    whole = (tmp_path / "long.mkv").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(whole[: len(whole) * 3 // 4])
    with pytest.raises(Refused, match="truncated"):
        clips_of(tmp_path / "cut.mkv", tmp_path / "clips")
    assert not list((tmp_path / "clips").iterdir())


def test_a_cut_in_a_long_black_that_is_told_late_hides_no_later_one(tmp_path) -> None:
    black = np.zeros((160, 96, 96, 3), np.uint8)  # ten seconds, whose middle is told at their end
    shots = [shot("collision", 1), black, shot("bounce", 2), shot("uniform", 3)]
    write(tmp_path / "black.mkv", np.concatenate(shots))
    settings = Settings.from_dict(SETTINGS | {"shots": {"detectors": ["threshold", "content"]}})
    task = SplitTask(tmp_path / "black.mkv", tmp_path, settings.limits, settings.shots, settings.split)
    found = split_source(task)
    assert found["shots"] == 5  # the black is two: it ends where the first cut is told
    assert places(found["clips"])[-2:] == [(209, 49), (258, 49)]


def places(clips: list[dict]) -> list[tuple[int, int]]:
    """The first frame and the number of frames of clips."""
    return [(round(clip["start_s"] * FPS), clip["frames"]) for clip in clips]


def test_a_margin_is_left_out_at_cuts_and_nowhere_else(tmp_path) -> None:
    write(
        tmp_path / "two.mkv",
        np.concatenate([shot("collision", 1)[:1].repeat(67, 0), shot("bounce", 2, num_frames=68)]),
    )
    lengths = {"min_s": 2, "piece_s": 2, "max_s": 2}
    whole = clips_of(tmp_path / "two.mkv", tmp_path, **lengths)
    assert places(whole) == [(0, 33), (33, 33), (67, 33), (100, 33)]
    trimmed = clips_of(tmp_path / "two.mkv", tmp_path, **lengths, margin_frames=2)
    assert places(trimmed) == [(0, 33), (69, 33), (102, 33)]


@pytest.mark.parametrize(
    ("missing", "expected"),
    [(1, [(0, 81)]), (32, [(0, 33), (72, 33)]), (16 * 3600, [(0, 33), (16 * 3600 + 40, 33)])],
)
def test_a_gap_in_time_is_the_end_of_a_shot_and_no_stop(tmp_path, missing, expected) -> None:
    frames = shot("pendulum", 1, num_frames=80)
    encoded(tmp_path / "hole.mkv", frames, times=[n if n < 40 else n + missing for n in range(80)])
    assert places(clips_of(tmp_path / "hole.mkv", tmp_path)) == expected


def test_what_is_damaged_is_left_out_up_to_the_next_key_frame(tmp_path) -> None:
    frames = shot("pendulum", 1, num_frames=150)
    encoded(tmp_path / "whole.mp4", frames, key_frames=50)
    with av.open(str(tmp_path / "whole.mp4")) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    data = bytearray((tmp_path / "whole.mp4").read_bytes())
    place, size = packets[70]
    for offset in range(size // 3, size // 3 + 8):
        data[place + offset] ^= 0xFF
    (tmp_path / "flipped.mp4").write_bytes(data)
    settings = Settings.from_dict(SETTINGS)
    task = SplitTask(tmp_path / "flipped.mp4", tmp_path, settings.limits, settings.shots, settings.split)
    found = split_source(task)
    assert places(found["clips"]) == [(0, 65), (100, 49)]
    assert found["damaged_s"] == 30 / FPS


@pytest.mark.parametrize(("curve", "name"), [(16, "PQ"), (18, "HLG"), (1, None)])
def test_high_dynamic_range_is_refused(tmp_path, curve, name) -> None:
    encoded(tmp_path / "a.mp4", shot("collision", 1), curve=curve)
    if name is None:
        assert clips_of(tmp_path / "a.mp4", tmp_path)
        return
    with pytest.raises(Refused, match=f"hdr: its transfer curve is {name}; convert it to BT.709"):
        clips_of(tmp_path / "a.mp4", tmp_path)


def test_a_stream_without_a_key_frame_is_corrupt_and_not_small(tmp_path) -> None:
    write(tmp_path / "a.ts", shot("collision", 1))
    data = (tmp_path / "a.ts").read_bytes()
    packets = [data[place : place + 188] for place in range(0, len(data), 188)]
    # Bit 6 of the adaptation field's flags: here one may enter, at a key frame.
    first = next(n for n, p in enumerate(packets) if p[3] & 0x20 and p[4] and p[5] & 0x40)
    then = next(
        n for n, p in enumerate(packets) if n > first and p[1] & 0x40 and p[1:3] == packets[first][1:3]
    )
    (tmp_path / "b.ts").write_bytes(b"".join(packets[:first] + packets[then:]))
    with pytest.raises(Refused, match="corrupt: no picture size"):
        clips_of(tmp_path / "b.ts", tmp_path)


def test_too_little_memory_or_an_encoder_that_fails_says_nothing_about_the_source(
    tmp_path, monkeypatch
) -> None:
    write(tmp_path / "a.mp4", shot("collision", 1))

    class Failing:
        raised: type[Exception]

        def reformat(self, *args, format, **options):
            if format == "yuv420p":  # on its way to the encoder
                raise self.raised(1, "no more")
            return VideoReformatter().reformat(*args, format=format, **options)

    monkeypatch.setattr(source, "VideoReformatter", Failing)
    for Failing.raised, kind in ((av.error.MemoryError, MemoryError), (av.error.ExternalError, RuntimeError)):
        with pytest.raises(kind):
            clips_of(tmp_path / "a.mp4", tmp_path)


@pytest.mark.parametrize("rate", [12, 15, 24, 25, 30])
def test_steady_motion_has_no_events_whatever_the_rate_of_its_source(tmp_path, rate) -> None:
    rates = {}
    for scene in ("uniform", "bounce"):
        rates[scene] = []
        for index in range(6):
            frames = simulate(scene, split="in", index=index, num_frames=max(97, 6 * rate), size=96).frames
            if rate < FPS:  # as fast as it was
                frames = frames[np.arange(5 * rate + 2) * FPS // rate]
            encoded(tmp_path / "a.mp4", frames, rate=rate)
            for clip in clips_of(tmp_path / "a.mp4", tmp_path, min_s=4, max_s=8, piece_s=5):
                task = ScoreTask("a", clip_file(tmp_path, clip["clip_id"]), (Physics(),), {}, {})
                rates[scene].append(score_clip(task)["results"]["physics"]["scores"]["events_per_s"])
    rich = Settings().rich.events_per_s
    assert max(rates["uniform"]) < rich
    assert np.median(rates["bounce"]) > rich
