"""Where clips come from, which bucket they go to, what is skipped, and the cache of latents."""

from __future__ import annotations

import io
import json
import logging
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from kairos import UserError
from kairos.data.media import write_video
from kairos.training import cache, clips
from kairos.training.batches import draw_batch
from kairos.training.cache import Encoders, build_cache, description, load_clips, shard
from kairos.training.clips import (
    Bucket,
    ManifestSource,
    SimulatorSource,
    Skipped,
    WebdatasetSource,
    build_source,
    choose_bucket,
    decode,
    fit,
    probe,
)
from kairos.training.stage import Stage
from kairos.training.vae import build_vae
from kairos.worlds import simulate

SMALL = Bucket(9, 32, 32)


def video(frames=20, height=32, width=48, seed=0):
    rng = np.random.default_rng(seed)
    return np.broadcast_to(
        rng.integers(0, 255, (frames, 1, 1, 3), np.uint8), (frames, height, width, 3)
    ).copy()


@pytest.fixture
def manifest(tmp_path):
    """Two good clips, a broken one, one that is too short, one that is missing, and a picture."""
    folder = tmp_path / "data"
    (folder / "clips").mkdir(parents=True)
    for number, shape in enumerate(((32, 48), (48, 32))):
        write_video(folder / "clips" / f"{number}.mp4", video(20, *shape, seed=number), 16, scale=1)
    write_video(folder / "clips" / "short.mp4", video(3), 16, scale=1)
    (folder / "clips" / "broken.mp4").write_bytes((folder / "clips" / "0.mp4").read_bytes()[:700])
    Image.fromarray(video(1)[0]).save(folder / "clips" / "still.png")
    names = ["0.mp4", "broken.mp4", "1.mp4", "short.mp4", "missing.mp4", "still.png"]
    lines = [json.dumps({"video": f"clips/{name}", "caption": f"this is {name}"}) for name in names]
    file = folder / "clips.jsonl"
    file.write_text("\n".join(lines) + "\n\n")
    return file


@pytest.fixture(scope="module")
def encoders():
    """A small VAE, and a text encoder that counts letters."""

    class Letters(Encoders):
        def hashes(self):
            return super().hashes()[0], self.template

        def embed(self, captions, device="cpu", images=None):
            embedded.extend(captions)
            words = [torch.full((max(len(c), 1), 4), float(len(c)), dtype=torch.bfloat16) for c in captions]
            if images is None:
                return words
            looks = [torch.tensor(np.asarray(image)).float().mean((0, 1)) for image in images]
            return [
                torch.cat([F.pad(look, (0, 1))[None].to(one), one])
                for look, one in zip(looks, words, strict=True)
            ]

    embedded: list[str] = []
    torch.manual_seed(0)
    made = Letters(build_vae(base_dim=8).eval(), torch.nn.Linear(1, 1), None, "tiny")
    made.text_encoder.embedded = embedded
    return made


def references(source, *buckets):
    skipped = Skipped()
    found = list(source.references(buckets, skipped))
    return found, {entry["clip"]: entry["reason"] for entry in skipped.clips}


def test_a_manifest_gives_its_clips_and_names_what_it_skips(manifest):
    found, skipped = references(ManifestSource(manifest), SMALL, Bucket(1, 32, 32))
    assert [(r.name, r.caption, r.bucket.frames) for r in found] == [
        ("clips/0.mp4", "this is 0.mp4", 9),
        ("clips/1.mp4", "this is 1.mp4", 9),
        ("clips/short.mp4", "this is short.mp4", 1),
        ("clips/still.png", "this is still.png", 1),
    ]
    assert all(r.read().shape == (r.bucket.frames, 32, 32, 3) for r in found)
    assert set(skipped) == {"clips/broken.mp4", "clips/missing.mp4"}
    assert "no such file" in skipped["clips/missing.mp4"] and "cannot be read" in skipped["clips/broken.mp4"]


def test_a_clip_shorter_than_every_bucket_is_skipped_with_its_length(manifest):
    _, skipped = references(ManifestSource(manifest), SMALL)
    assert skipped["clips/short.mp4"] == "3 frames at 16 fps, the shortest bucket takes 9"
    assert "1 frames" in skipped["clips/still.png"]


def test_clips_are_sampled_at_the_target_rate(tmp_path):
    frames = np.zeros((24, 32, 32, 3), np.uint8) + np.arange(24, dtype=np.uint8)[:, None, None, None] * 10
    write_video(tmp_path / "a.mp4", frames, 24, scale=1)
    (tmp_path / "m.jsonl").write_text('{"video": "a.mp4", "caption": "c", "start_s": 0.25}')
    (found,), _ = references(ManifestSource(tmp_path / "m.jsonl", fps=8), Bucket(5, 32, 32))
    shown = found.read()[:, 16, 16, 0].astype(int)
    assert (
        np.abs(shown - np.array([60, 90, 120, 150, 180])).max() <= 4
    )  # every third frame, from the sixth on


@pytest.mark.parametrize(
    "name", ["../secret.mp4", "/etc/passwd", "clips/../../secret.mp4", "link/secret.mp4"]
)
def test_a_path_that_leaves_the_root_is_refused(tmp_path, name):
    (tmp_path / "root").mkdir()
    (tmp_path / "secret.mp4").write_bytes(b"")
    (tmp_path / "root" / "link").symlink_to(tmp_path)
    file = tmp_path / "root" / "m.jsonl"
    file.write_text(json.dumps({"video": name, "caption": ""}))
    with pytest.raises(UserError, match="leaves the data root"):
        references(ManifestSource(file), SMALL)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: not JSON"),
        ("[1]", "line 1: must be like"),
        ('{"caption": "x"}', '"video" must be the path'),
        ('{"video": "a.mp4", "caption": 3}', '"caption" must be a text'),
        ('{"video": "a.mp4", "text": "x"}', r'there is no "caption" beside \[\'text\'\]'),
        ('{"video": "a.mp4", "Caption": "x"}', r'there is no "caption" beside \[\'Caption\'\]'),
        ('{"video": "a.mp4", "fps": 3, "video_prompts": "x"}', r"beside \[\'video_prompts\'\]"),
        ('{"video": "a.mp4", "caption": "x", "start_seconds": 2}', "unknown key 'start_seconds'"),
        ('{"video": "a.mp4", "caption": "x", "start": 2}', "unknown key 'start'; did you mean \"start_s\""),
        ('{"video": "a.mp4", "start_s": -1}', '"start_s" must be at least 0'),
        ('{"video": "a.mp4", "start_s": Infinity}', '"start_s" must be at least 0 and finite, got inf'),
        (r'{"video": "a\u0000.mp4"}', "line 1: no file can be read at 'a"),
        (json.dumps({"video": "a" * 300}), "line 1: no file can be read at 'aaa.*too long"),
    ],
)
def test_a_line_that_is_no_clip_is_refused_with_its_number(tmp_path, line, message):
    file = tmp_path / "m.jsonl"
    file.write_text(line)
    with pytest.raises(UserError, match=message):
        references(ManifestSource(file), SMALL)


def test_a_line_may_hold_more_than_is_read_and_any_character(manifest):
    """As those that kairos curate writes, with scores and names."""
    more = {"caption": "one\u2028two", "end_s": 9, "text": 0.1, "physics_caption": None, "shard": "0.tar"}
    line = json.dumps({"video": "clips/0.mp4", "start_s": 0} | more, ensure_ascii=False)
    manifest.write_text(line + "\r\n" + json.dumps({"video": "clips/1.mp4", "caption": ""}), encoding="utf-8")
    found, _ = references(ManifestSource(manifest), SMALL)
    assert [reference.caption for reference in found] == ["one\u2028two", ""]
    more = {"fps": 30, "id": "seven", "start_ms": 0, "starts": [1], "text": "", "subtitle_file": "a.srt"}
    manifest.write_text(json.dumps({"video": "clips/0.mp4"} | more))
    (found,), _ = references(ManifestSource(manifest), SMALL)
    assert found.caption == ""


def test_many_lines_of_one_long_file_read_it_once(tmp_path, monkeypatch):
    write_video(tmp_path / "long.mp4", video(160), 16, scale=1)
    file = tmp_path / "m.jsonl"
    lines = [json.dumps({"video": "long.mp4", "caption": "c", "start_s": s}) for s in range(9)]
    file.write_text("\n".join(lines))
    probed, opened = [], []
    open_file, look = type(file).open, clips.probe
    monkeypatch.setattr(clips, "probe", lambda path, fps: (probed.append(path), look(path, fps))[1])
    monkeypatch.setattr(
        type(file), "open", lambda path, *o, **k: (opened.append(path.name), open_file(path, *o, **k))[1]
    )
    found, _ = references(ManifestSource(file), SMALL)
    assert len(found) == 9 and len({reference.key for reference in found}) == 9
    assert len(probed) == 1 and opened.count("long.mp4") == 1
    assert found[0].key.startswith(clips.content_hash((tmp_path / "long.mp4").read_bytes()))
    write_video(tmp_path / "long.mp4", video(64, seed=3), 16, scale=1)
    changed, _ = references(ManifestSource(file), SMALL)
    assert len(changed) == 4 and changed[0].key != found[0].key


def test_how_much_of_the_videos_is_used_is_said(tmp_path, encoders, caplog):
    write_video(tmp_path / "long.mp4", video(160), 16, scale=1)

    def report(*starts):
        caplog.clear()
        lines = [json.dumps({"video": "long.mp4", "caption": "c", "start_s": s}) for s in starts]
        (tmp_path / "m.jsonl").write_text("\n".join(lines))
        with caplog.at_level(logging.INFO, "kairos"):
            return build(tmp_path / "c", ManifestSource(tmp_path / "m.jsonl"), encoders, SMALL)[0]

    few = report(0, 2)
    assert (few["used_s"], few["of_s"]) == (1.1, 10.0)
    assert "used 1 s of 10 s of video; cut with kairos curate or start_s" in caplog.text
    assert report(*np.arange(0, 9.4, 0.5625).tolist())["used_s"] == 9.6 and "of video" not in caplog.text


def test_shards_are_closed_by_their_size(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "SHARD_BYTES", 40)
    writer = cache.ShardWriter(tmp_path, "embeds", {"text": "t"})
    for number in range(7):
        writer.add(str(number), torch.zeros(2, 4, dtype=torch.bfloat16))  # 16 bytes
    writer.close()
    rows = cache.stored_rows(tmp_path, "text", "t")
    assert [rows[str(number)].file.stem for number in range(7)] == [f"{n // 3:05d}" for n in range(7)]


def test_a_missing_manifest_or_folder_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no manifest at"):
        references(ManifestSource(tmp_path / "m.jsonl"), SMALL)
    with pytest.raises(UserError, match="no folder of shards at"):
        references(WebdatasetSource(tmp_path / "no"), SMALL)
    with pytest.raises(UserError, match="FRAMESxHEIGHTxWIDTH"):
        references(WebdatasetSource(tmp_path), SMALL)


def test_buckets_keep_the_aspect():
    wide, square, tall, long = Bucket(9, 32, 64), Bucket(9, 48, 48), Bucket(9, 64, 32), Bucket(17, 48, 48)
    buckets = (wide, square, tall, long, Bucket(1, 48, 48))
    assert choose_bucket(buckets, 10, 480, 900, still=False) is wide
    assert choose_bucket(buckets, 10, 900, 480, still=False) is tall
    assert choose_bucket(buckets, 20, 500, 480, still=False) is long
    assert choose_bucket(buckets, 50, 480, 500, still=True).frames == 1
    assert choose_bucket((wide,), 5, 480, 900, still=False) is None


def test_fitting_covers_the_bucket_and_stretches_nothing():
    frames = np.zeros((1, 100, 300, 3), np.uint8)
    frames[:, 25:75, 125:175] = 255  # a square of half the height
    fitted = fit(frames, Bucket(1, 64, 64))
    bright = fitted[0, :, :, 0] > 127
    assert fitted.shape == (1, 64, 64, 3)
    assert bright.any(1).sum() == bright.any(0).sum() == 32


def test_clips_whose_side_is_less_than_its_quotient_fit_too():
    assert fit(np.zeros((2, 98, 98, 3), np.uint8), Bucket(1, 64, 64)).shape == (2, 64, 64, 3)


def webdataset(folder, members):
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "000.tar", "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def test_webdataset_shards_give_their_clips_and_name_what_they_skip(tmp_path):
    write_video(tmp_path / "v.mp4", video(), 16, scale=1)
    clip = (tmp_path / "v.mp4").read_bytes()
    caption = json.dumps({"caption": "a grey square"}).encode()
    members = [("a.mp4", clip), ("a.json", caption), ("b.mp4", clip), ("c.mp4", clip), ("c.json", b"{}")]
    webdataset(tmp_path / "s" / "9x32x32", members)
    (tmp_path / "s" / "9x32x32" / "001.tar").write_bytes(b"torn")
    webdataset(tmp_path / "s" / "5x480x640", members)
    found, skipped = references(WebdatasetSource(tmp_path / "s"), SMALL)
    assert [(r.name, r.caption) for r in found] == [("9x32x32/000.tar/a", "a grey square")]
    assert found[0].read().shape == (9, 32, 32, 3)
    assert set(skipped) == {"5x480x640", "9x32x32/000.tar/b", "9x32x32/000.tar/c", "9x32x32/001.tar"}
    assert skipped["5x480x640"] == "5 frames at 16 fps, the shortest bucket takes 9"


def test_webdataset_shards_of_any_shape_go_to_the_longest_bucket_that_they_fill(tmp_path):
    write_video(tmp_path / "v.mp4", video(20, 32, 48), 16, scale=1)
    members = [("a.mp4", (tmp_path / "v.mp4").read_bytes()), ("a.json", b'{"caption": "grey"}')]
    webdataset(tmp_path / "s" / "20x32x48", members)
    buckets = (SMALL, Bucket(17, 32, 32), Bucket(17, 16, 32), Bucket(21, 32, 32))
    (found,), skipped = references(WebdatasetSource(tmp_path / "s"), *buckets)
    assert (found.bucket.name, skipped) == ("17x16x32", {})
    assert found.key.endswith("/17x16x32") and found.read().shape == (17, 16, 32, 3)


def test_one_folder_of_shards_has_the_clips_of_many_stages(tmp_path):
    write_video(tmp_path / "v.mp4", video(9, 64, 64), 16, scale=1)
    members = [("a.mp4", (tmp_path / "v.mp4").read_bytes()), ("a.json", b'{"caption": "grey"}')]
    for name in ("1x32x32", "9x32x32", "9x32x64", "9x64x64"):
        webdataset(tmp_path / "s" / name, members)

    def given(*buckets):
        found, skipped = references(WebdatasetSource(tmp_path / "s"), *buckets)
        return [(r.name.split("/")[0], r.bucket.name) for r in found], skipped

    pictures, small, large = Bucket(1, 32, 32), Bucket(9, 32, 32), Bucket(9, 64, 64)
    other = "no bucket is of its kind and no larger"
    found, skipped = given(pictures)
    assert found == [("1x32x32", "1x32x32")]
    assert skipped == dict.fromkeys(("9x32x32", "9x32x64", "9x64x64"), other)
    found, skipped = given(large)  # nothing is enlarged
    assert found == [("9x64x64", "9x64x64")]
    assert skipped == dict.fromkeys(("1x32x32", "9x32x32", "9x32x64"), other)
    found, skipped = given(large, pictures, small)
    assert not skipped and found == [
        ("1x32x32", "1x32x32"),
        ("9x32x32", "9x32x32"),
        ("9x32x64", "9x32x32"),
        ("9x64x64", "9x64x64"),
    ]


def test_a_written_clip_has_all_of_its_frames_whatever_its_muxer_rounds(tmp_path):
    for index in range(6):
        clip = simulate("uniform", index=index, num_frames=33, size=64)
        write_video(tmp_path / "a.mp4", clip.frames, 16)
        assert probe(tmp_path / "a.mp4", 16)[2] == 33, index


def test_a_picture_among_webdataset_clips_is_skipped_and_among_pictures_it_is_none(tmp_path):
    write_video(tmp_path / "v.mp4", video(), 16, scale=1)
    picture = io.BytesIO()
    Image.fromarray(video(1)[0]).save(picture, format="PNG")
    caption = json.dumps({"caption": "grey"}).encode()
    members = [("a.mp4", (tmp_path / "v.mp4").read_bytes()), ("a.json", caption)]
    members += [("b.png", picture.getvalue()), ("b.json", caption)]
    for name in ("9x32x32", "1x32x32"):
        webdataset(tmp_path / "s" / name, members)
    found, skipped = references(WebdatasetSource(tmp_path / "s"), SMALL, Bucket(1, 32, 32))
    assert [r.name for r in found] == ["1x32x32/000.tar/a", "1x32x32/000.tar/b", "9x32x32/000.tar/a"]
    assert skipped == {"9x32x32/000.tar/b": "needs both .mp4 and .json"}
    assert all(len(r.read()) == r.bucket.frames for r in found)


def test_the_same_unreadable_clip_twice_is_neither_made_nor_kept(tmp_path, encoders):
    write_video(tmp_path / "a.mp4", video(12), 16, scale=1)
    (tmp_path / "m.jsonl").write_text('{"video": "a.mp4"}\n{"video": "a.mp4"}\n')

    class Unreadable(ManifestSource):
        def references(self, buckets, skipped):
            for reference in super().references(buckets, skipped):
                yield replace(reference, read=fails)

    def fails():
        raise UserError("it is broken")

    source = Unreadable(tmp_path / "m.jsonl")
    report = build_cache(tmp_path / "c", source, [SMALL], encoders, described="twice")
    assert (report["made"], report["kept"]) == (0, 0)
    report, _ = build(tmp_path / "c", ManifestSource(tmp_path / "m.jsonl"), encoders, SMALL)
    assert (report["made"], report["kept"]) == (1, 1)


def test_of_a_late_clip_no_frame_before_it_is_kept(tmp_path, monkeypatch):
    write_video(tmp_path / "a.mp4", video(40), 16, scale=1)
    kept = []
    convert = np.stack
    monkeypatch.setattr(
        "kairos.data.media.np.stack", lambda frames: kept.append(len(frames)) or convert(frames)
    )
    assert len(decode(tmp_path / "a.mp4", ".mp4", 16, 5, start_s=2.0)) == 5 and kept == [5]
    with pytest.raises(UserError, match="it has no frames where it is to be read"):
        decode(tmp_path / "a.mp4", ".mp4", 16, 5, start_s=9.0)


def test_the_simulator_makes_a_clip_of_its_number():
    source = SimulatorSource(("uniform", "collision"), clips=4)
    first, again = (references(source, SMALL)[0] for _ in range(2))
    assert [r.key for r in first] == [r.key for r in again] and len({r.key for r in first}) == 4
    assert np.array_equal(first[3].read(), again[3].read()) and first[3].caption == again[3].caption
    assert first[3].read().shape == (9, 32, 32, 3) and "collision" in first[3].name


def test_the_simulator_may_make_more_pictures_than_clips():
    buckets = [Bucket(1, 32, 32), Bucket(9, 32, 32)]
    for pictures, expected in ((0, 2), (5, 5)):
        found, _ = references(SimulatorSource(("uniform",), clips=2, pictures=pictures), *buckets)
        assert [sum(r.bucket.frames == frames for r in found) for frames in (1, 9)] == [expected, 2]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "data.source must be one of simulator, manifest, webdataset, got None"),
        ({"source": "simulator", "scenes": None}, "data.scenes must be a list, got None"),
        ({"source": "simulator", "scenes": ["unifrom"]}, "unknown scene 'unifrom'"),
        ({"source": "simulator"}, "the key 'scenes' is missing"),
        ({"source": "manifest", "fil": "x"}, "unknown key 'fil'; did you mean 'file'"),
        ({"source": "manifest", "file": "x", "fps": "fast"}, "data.fps must be a number, got 'fast'"),
        ({"source": "manifest", "file": "x", "fps": 0}, "data.fps must be above 0, got 0"),
    ],
)
def test_data_that_makes_no_sense_is_refused_in_one_line(data, message):
    with pytest.raises(UserError, match=message) as caught:
        build_source(data, "data")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(80, 32, 32), (9, 30, 32), (9, 0, 32)])
def test_a_bucket_that_the_vae_cannot_take_is_refused(shape):
    with pytest.raises(UserError, match="must be"):
        Bucket(*shape)


def build(folder, source, encoders, *buckets):
    what = description(source, buckets)
    report = build_cache(folder, source, buckets, encoders, described=what)
    return report, load_clips(folder, buckets, encoders, described=what)


def test_a_cache_is_computed_once_and_read_by_content(manifest, tmp_path, encoders, caplog):
    folder, source = tmp_path / "cache", ManifestSource(manifest)
    report, (clips,) = build(folder, source, encoders, SMALL)
    assert (report["made"], report["kept"], len(report["skipped"])) == (2, 0, 4)
    assert sorted(clips.captions) == ["this is 0.mp4", "this is 1.mp4"]
    assert clips.latents([0, 1]).shape == (2, 16, 3, 4, 4)
    embeds, mask = clips.embeddings(["", clips.captions[0]])
    assert embeds.shape == (2, 13, 4) and mask.sum(1).tolist() == [1, 13]
    said = json.loads(next(folder.glob("report-*.json")).read_text())
    assert {entry["clip"] for entry in said["skipped"]} >= {"clips/broken.mp4", "clips/missing.mp4"}

    # Renamed, given other words and joined by a new clip: only that one is computed.
    data = manifest.parent
    (data / "clips" / "0.mp4").rename(data / "clips" / "renamed.mp4")
    write_video(data / "clips" / "new.mp4", video(seed=7), 16, scale=1)
    names = ["renamed.mp4", "1.mp4", "new.mp4"]
    manifest.write_text("\n".join(json.dumps({"video": f"clips/{n}", "caption": f"now {n}"}) for n in names))
    before = {key: clips.latents([row]) for row, key in enumerate(clips.keys)}
    report, (clips,) = build(folder, source, encoders, SMALL)
    assert (report["made"], report["kept"], report["skipped"]) == (1, 2, [])
    assert len(clips) == 3 and set(clips.captions) == {f"now {n}" for n in names}
    again = {key: clips.latents([row]) for row, key in enumerate(clips.keys)}
    assert all(torch.equal(again[key], value) for key, value in before.items())


def test_clips_that_workers_read_ahead_are_those_that_are_read_at_once(
    manifest, tmp_path, encoders, monkeypatch
):
    source = ManifestSource(manifest)
    report, (clips,) = build(tmp_path / "at_once", source, encoders, SMALL)
    monkeypatch.setattr("kairos.training.cache.workers_for", lambda device: 2)
    report_ahead, (ahead,) = build(tmp_path / "ahead", source, encoders, SMALL)
    assert report_ahead == report and len(report["skipped"]) == 4
    assert ahead.keys == clips.keys and torch.equal(ahead.latents([0, 1]), clips.latents([0, 1]))


def test_another_vae_invalidates_the_latents_and_not_the_prompts(tmp_path, encoders):
    source = SimulatorSource(("uniform",), clips=3)
    build(tmp_path, source, encoders, SMALL)
    torch.manual_seed(5)
    other = type(encoders)(build_vae(base_dim=8).eval(), encoders.text_encoder, None, "tiny")
    what = description(source, [SMALL])
    with pytest.raises(UserError, match="made with another VAE; run: kairos train cache"):
        load_clips(tmp_path, [SMALL], other, described=what)
    embedded = len(encoders.text_encoder.embedded)
    report, (clips,) = build(tmp_path, source, other, SMALL)
    assert report["made"] == 3 and len(clips) == 3
    assert len(encoders.text_encoder.embedded) == embedded


def test_prompts_of_clips_that_go_on_hold_their_first_frame_where_the_template_wants_it(
    tmp_path, encoders, monkeypatch
):
    source, pictures = SimulatorSource(("uniform", "collision"), clips=3), Bucket(1, 32, 32)
    seeing = replace(encoders, template="2026")
    report, sets = build(tmp_path, source, seeing, SMALL, pictures)
    assert report["made"] == 6
    stage = Stage(
        name="one",
        steps=9,
        batch_size=3,
        mix={"t2v": 0.5, "ti2v": 0.5},
        buckets=(SMALL, pictures),
        images=0.2,
        text_dropout=0.0,
    )
    looks = {
        reference.key: torch.from_numpy(reference.read()[0].copy()).float().mean((0, 1)).bfloat16().float()
        for reference in references(source, SMALL)[0]
    }
    seen = set()
    for step in range(9):
        batch = draw_batch(sets, stage, step, causal=False)
        seen.add(batch.cut.past)
        for key, embeds, mask in zip(batch.keys, batch.prompt_embeds, batch.prompt_mask, strict=True):
            words = int(mask.sum()) - (batch.cut.past > 0)
            assert (embeds[mask][-1] == words).all()
            if batch.cut.past:
                assert torch.equal(embeds[0, :3], looks[key])
    assert seen == {0, 1}
    empty, mask = sets[0].embeddings([""], sets[0].keys[:1])
    assert mask.sum() == 2 and torch.equal(empty[0, 0, :3], looks[sets[0].keys[0]])

    # What is there is not made again; what has gone is missed.
    embedded = len(encoders.text_encoder.embedded)
    assert build(tmp_path, source, seeing, SMALL, pictures)[0]["made"] == 0
    assert len(encoders.text_encoder.embedded) == embedded
    for file in (tmp_path / "prompts").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(UserError, match="shards are missing"):
        load_clips(tmp_path, [SMALL], seeing, described=description(source, [SMALL, pictures]))

    # A clip that can be read no more is skipped and named.
    def gone(clip):
        return UserError("no such file") if "/0/0/" in clip.key else read(clip)

    read = cache._first_frame
    monkeypatch.setattr(cache, "_first_frame", gone)
    report, (clips,) = build(tmp_path, source, seeing, SMALL)
    assert len(clips) == 2 and [entry["reason"] for entry in report["skipped"]] == ["no such file"]


def test_buckets_of_one_shape_share_their_clips(tmp_path, encoders):
    alike = Bucket(SMALL.frames, SMALL.height, SMALL.width, mix={"t2v": 1.0})
    source = SimulatorSource(("uniform",), clips=3)
    for made in (3, 0):
        report, sets = build(tmp_path, source, encoders, SMALL, alike)
        assert (report["made"], report["kept"]) == (made, 3 - made)
        assert [len(clips) for clips in sets] == [3, 3]


def test_a_cache_that_was_stopped_or_torn_is_completed(tmp_path, encoders, monkeypatch, caplog):
    monkeypatch.setattr("kairos.training.cache.SHARD_CLIPS", 2)
    source = SimulatorSource(("uniform",), clips=5)
    build(tmp_path, source, encoders, SMALL)
    shards = sorted((tmp_path / SMALL.name).glob("*.safetensors"))
    assert len(shards) == 3
    shards[1].unlink()
    shards[2].write_bytes(shards[2].read_bytes()[:100])
    shard.cache_clear()
    with pytest.raises(UserError, match="shards are missing"):
        load_clips(tmp_path, [SMALL], encoders, described=description(source, [SMALL]))
    with caplog.at_level(logging.WARNING, "kairos"):
        report, (clips,) = build(tmp_path, source, encoders, SMALL)
    assert (report["made"], report["kept"], len(clips)) == (3, 2, 5)
    assert "torn" in caplog.text


def test_training_without_a_cache_says_how_to_make_one(tmp_path, encoders):
    source = SimulatorSource(("uniform",), clips=3)
    with pytest.raises(UserError, match="run: kairos train cache RECIPE"):
        load_clips(tmp_path, [SMALL], encoders, described=description(source, [SMALL]))
