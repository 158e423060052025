"""The parts of a curation: shots, physics, duplicates, workers, settings, plug-ins, and Ray."""

from __future__ import annotations

import json
import os
import sqlite3
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
from curation_plants import SETTINGS, real_clip, remux, shot, write

from kairos.curation import Settings, curate, pipeline, select
from kairos.curation.duplicates import Fingerprinted, find_duplicates
from kairos.curation.intake import printable
from kairos.curation.ledger import Ledger
from kairos.curation.selection import choose, is_rich
from kairos.curation.settings import Duplicates, Shots, Split, Threshold, read_settings
from kairos.curation.shards import write_shards
from kairos.curation.shots import ShotDetector
from kairos.curation.source import clip_file
from kairos.curation.stages import STAGES, hashes_of, stages_of
from kairos.curation.stages.looks import Bars, Exposure, Sharpness
from kairos.curation.stages.motion import Flow, Motion
from kairos.curation.views import VIEWS, Views
from kairos.curation.workers import Worker, run_locally, still_working
from kairos.errors import MachineError, UserError
from kairos.worlds import simulate

QUICK = SETTINGS | {"text": {"samples": 0}}


def physics_score(frames) -> float:
    from kairos.curation.stages.physics import Physics

    grey = np.stack([cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) for picture in frames])
    noise = np.random.default_rng(0).normal(0, 1.5, grey.shape)
    grey = np.clip(grey + noise, 0, 255).astype(np.uint8)
    views = Views(fps=16, frames=len(grey), height=64, width=64, grey=grey)
    return Physics().measure(views)["physics_score"]


def auc(higher: list[float], lower: list[float]) -> float:
    one, other = np.array(higher)[:, None], np.array(lower)[None]
    return float((one > other).mean() + (one == other).mean() / 2)


def test_the_physics_score_ranks_events_above_plain_motion_above_stills() -> None:
    scores = {
        scene: [physics_score(simulate(scene, split="in", index=n, num_frames=81).frames) for n in range(10)]
        for scene in ("uniform", "collision", "bounce", "occlusion")
    }
    still = [physics_score(np.repeat(simulate("uniform", index=n).frames[:1], 81, axis=0)) for n in range(4)]
    for scene in ("collision", "bounce", "occlusion"):
        assert auc(scores[scene], scores["uniform"]) >= 0.9, scene
    assert auc(scores["uniform"], still) >= 0.9


@pytest.mark.parametrize("detectors", [("adaptive",), ("transnet",), ("content", "hash")])
def test_cuts_are_told_while_frames_go_by(detectors) -> None:
    shots = [
        shot(scene, n, 72, 96, 41) for n, scene in enumerate(("collision", "bounce", "uniform", "parabola"))
    ]
    frames = np.concatenate(shots)[..., ::-1]
    detector = ShotDetector(Shots(detectors=detectors), 16.0)
    cuts = []
    for index, picture in enumerate(frames):
        found = detector.see(index, np.ascontiguousarray(picture), last=index == len(frames) - 1)
        assert all(cut < detector.settled for cut in found)
        cuts += found
    assert cuts == [41, 82, 123]
    assert detector.settled == len(frames)


@pytest.mark.parametrize(
    ("name", "truth"),  # looked up by eye, frame by frame
    [("bikes", [30, 76, 137, 187, 242]), ("bigbuckbunny", []), ("carphone_pristine", [])],
)
def test_cuts_of_real_video_are_found_and_no_others(name, truth) -> None:
    import av

    detector = ShotDetector(Shots(detectors=("adaptive",)), 25.0)
    with av.open(str(real_clip(f"{name}.mp4"))) as container:
        frames = [f.to_ndarray(format="bgr24", width=192, height=108) for f in container.decode(video=0)]
    cuts = []
    for index, picture in enumerate(frames):
        cuts += detector.see(index, picture, last=index == len(frames) - 1)
    assert cuts == truth


def fingerprinted(name: str, moments: list[int], area: int = 1) -> Fingerprinted:
    rng = np.random.default_rng(0)
    book = rng.integers(0, 256, (1000, 32), np.uint8)
    changes = tuple(f"{n + 1:016x}" for n in moments)
    return Fingerprinted(
        name, tuple(book[n].tobytes().hex() for n in moments), changes, "80" * 12, (area, name)
    )


def test_duplicates_are_grouped_by_moments_in_order_and_the_larger_stays() -> None:
    clips = [
        fingerprinted("small", [1, 2, 3, 4, 5], area=1),
        fingerprinted("large", [1, 2, 3, 4, 5, 6], area=9),
        fingerprinted("trimmed", [3, 4, 5, 6], area=2),
        fingerprinted("other", [10, 11, 12, 13]),
        fingerprinted("one moment alike", [1, 21, 22, 23, 24]),
        fingerprinted("backwards", [5, 4, 3, 2, 1]),
    ]
    assert find_duplicates(clips, Duplicates()) == {"small": "large", "trimmed": "large"}


def test_clips_that_overlap_at_their_ends_are_duplicates_and_those_of_other_colours_are_none() -> None:
    whole = fingerprinted("whole", [1, 2, 3, 4, 5, 6], area=9)
    early, late = fingerprinted("early", [9, 1, 2, 3, 4]), fingerprinted("late", [3, 4, 5, 6, 9])
    assert find_duplicates([whole, early, late], Duplicates()) == {"early": "whole", "late": "whole"}
    blue = replace(fingerprinted("blue", [1, 2, 3, 4, 5, 6]), colors="10" * 12)
    assert find_duplicates([whole, blue], Duplicates()) == {}


def test_the_search_for_duplicates_compares_few_of_all_pairs(monkeypatch) -> None:
    from kairos.curation import duplicates

    compared = []
    real = duplicates._alike
    monkeypatch.setattr(duplicates, "_alike", lambda *a: compared.append(1) or real(*a))
    rng = np.random.default_rng(1)
    clips = [
        Fingerprinted(
            str(n),
            tuple(m.tobytes().hex() for m in rng.integers(0, 256, (6, 32), np.uint8)),
            ("1",) * 6,
            "80" * 12,
            (n,),
        )
        for n in range(2000)
    ]
    twin = Fingerprinted("twin", clips[7].moments, clips[7].changes, clips[7].colors, (-1,))
    assert find_duplicates([*clips, twin], Duplicates()) == {"twin": "7"}
    assert len(compared) < 20


def test_near_embeddings_are_duplicates_too() -> None:
    def clip(name: str, embedding: tuple[float, ...]) -> Fingerprinted:
        return Fingerprinted(name, (), (), "80" * 12, (name,), embedding)

    found = find_duplicates(
        [clip("a", (1, 0, 0.01)), clip("b", (1, 0, 0)), clip("c", (0, 1, 0))], Duplicates()
    )
    assert found == {"a": "b"}


def row(name: str, **scores) -> dict:
    return {"clip_id": name, "frames": 81, "domain": "general", "events": []} | scores


def test_balance_drops_the_least_valuable_of_a_tag_that_has_too_much() -> None:
    rows = [row(f"slide{n}", events=["sliding"], physics_score=n) for n in range(8)]
    rows += [row(f"other{n}", events=["fluid"]) for n in range(4)]
    chosen = choose(rows, Settings.from_dict({"balance": {"event": {"sliding": 0.5}}}))
    assert [name for name, (reason, _) in chosen.items() if not reason] == [
        *(f"slide{n}" for n in (4, 5, 6, 7)),
        *(f"other{n}" for n in range(4)),
    ]
    assert chosen["slide0"][0] == "balance: event 'sliding' has more than its share of 0.5"


def test_the_share_of_clips_without_an_event_can_be_bounded() -> None:
    rows = [row(f"plain{n}", physics_score=n) for n in range(8)]
    rows += [row(f"other{n}", events=["fluid"]) for n in range(4)]
    chosen = choose(rows, Settings.from_dict({"balance": {"event": {"none": 0.5}}}))
    assert [name for name, (reason, _) in chosen.items() if reason] == [f"plain{n}" for n in range(4)]


def test_many_events_make_a_clip_rich_without_a_tag() -> None:
    assert is_rich(row("a", events_per_s=0.25), Settings())
    assert not is_rich(row("a", events_per_s=0.24), Settings()) and not is_rich(row("a"), Settings())


def test_a_stage_has_a_new_hash_when_it_or_what_it_reads_changes_and_no_other() -> None:
    before = hashes_of(stages_of(Settings()))
    after = hashes_of(stages_of(Settings.from_dict({"physics": {"window": 5}})))
    assert {name for name in before if before[name] != after[name]} == {"physics", "tags", "caption"}


def test_labels_are_part_of_the_hash_of_what_reads_them_and_of_what_reads_that() -> None:
    looks = SimpleNamespace(name="looks", inputs=("grey",), outputs=("blur",))
    tags = SimpleNamespace(name="tags", inputs=("labels",), outputs=("events",))
    rank = SimpleNamespace(name="rank", inputs=("events",), outputs=("rank",))
    hashes = dict.fromkeys(("looks", "tags", "rank"), "h")
    one, other = (pipeline._own_hashes([looks, tags, rank], hashes, {"caption": said}) for said in ("a", "b"))
    assert one["looks"] == other["looks"] == "h"
    assert one["tags"] != other["tags"] and one["rank"] != other["rank"]


@pytest.mark.parametrize(
    ("said", "events"),
    [
        ("Flowers beside a cute cat.", []),
        ("A NASA mission comes out again, under pressure.", []),
        ("A retriever and a collie in slippers saw a roller.", []),
        ("folder1/clip_02", []),
        ("Water flows, a man cuts wood with a saw and misses.", ["fluid", "tool use", "failure"]),
        ("cutting_paper_and_folding_it.mp4", ["deformation", "tool use"]),
        ("It slips and slid; he retries, tries again and catches it.", ["sliding", "recovery"]),
        ("Two balls collided, one dropped and bouncing.", ["collision", "gravity"]),
    ],
)
def test_words_give_tags_and_words_that_only_begin_like_them_give_none(said, events) -> None:
    from kairos.curation.stages.tags import Tags

    views = Views(fps=16, frames=1, height=8, width=8, labels={"caption": said})
    assert Tags().measure(views)["events"] == events


def test_every_stage_declares_what_it_reads_and_what_it_gives() -> None:
    given: set[str] = set(VIEWS)
    for name, stage in STAGES.items():
        assert stage.name == name
        assert set(stage.inputs) <= given, name
        assert not set(stage.outputs) & given, name
        given |= set(stage.outputs)


def behave(item: str) -> dict:
    """A task for workers, in which items do what decoders do at their worst."""
    import signal
    import time

    if item == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if item == "hang":
        time.sleep(600)
    if item == "long":
        for _ in range(4):
            still_working()
            time.sleep(2)
    if item == "memory":
        return {"bytes": len(bytearray(30_000_000_000))}
    if item == "error":
        raise ValueError("no such codec")
    if item == "full":
        raise MachineError("cannot write clips: no space left on device")
    return {"fine": item}


def test_what_crashes_hangs_or_eats_memory_takes_down_nothing_but_itself() -> None:
    items = ["hang", "long", "a", "crash", "b", "c", "memory", "error", "full", "d"]
    results = dict(run_locally(behave, items, workers=2, limit_s=6, memory_gb=4))
    assert [results[name] for name in "abcd"] == [{"fine": name} for name in "abcd"]
    assert results["crash"]["failed"] == "crashed: the decoder's process ended with signal 11 (SIGSEGV)"
    assert results["hang"]["failed"].startswith("hung:")
    assert results["memory"]["failed"].startswith("memory:")
    assert results["error"]["failed"] == "error: ValueError: no such codec"
    assert results["full"] == {"machine": "cannot write clips: no space left on device"}
    assert results["long"] == {"fine": "long"}  # 8 s, and a sign of life every two


def test_a_child_that_dies_between_two_items_fails_one_and_is_replaced() -> None:
    worker = Worker(behave, 60, 4)
    worker.begin("a")
    assert worker.hear() == {"fine": "a"}
    worker._process.kill()
    worker._process.join()
    worker._process.is_alive = lambda: True  # it was, when it was asked
    worker.begin("b")
    assert "crashed" in (worker.hear() or {})["failed"]
    worker.begin("b")
    assert worker.hear() == {"fine": "b"}
    worker.stop()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("splits: {}", "unknown key 'splits'; did you mean 'split'"),
        ("split: {min_s: -1}", "min_s must be above 0, got -1"),
        ("split: {min_s: 30}", "min_s <= piece_s <= max_s, got 30, 20, 40"),
        ("split: {fps: fast}", "fps must be a whole number, got 'fast'"),
        ("shots: {detectors: [magic]}", "unknown detector 'magic'"),
        ("thresholds: {sharpness: {least: 3}}", "unknown key 'least'"),
        ("plugins: {nsfw: {}}", "model is missing"),
        ("balance: {event: {contact: 2}}", "must be above 0, at most 1, got 2"),
        ("- a", "must hold a mapping"),
        ("thresholds: {sharpnes: {min: 3}}", "unknown key 'sharpnes'; did you mean 'sharpness'"),
        ("thresholds: {caption: {min: 1}}", "unknown key 'caption'"),
        ("thresholds: {sharpness: {min: 50, max: 10}}", "no value is from 50 (min) to 10 (max)"),
        ("thresholds: {motion: {rich_min: 2}}", "no value is from 2 (min) to 1 (max)"),
        ("thresholds: {sharpness: 30}", "sharpness must hold a mapping, got 30"),
        ("thresholds: 5", "thresholds must hold a mapping, got 5"),
        ("rich: {tags: [contct]}", "unknown event 'contct'"),
        ("balance: {event: {contct: 0.3}}", "unknown key 'contct'; did you mean 'contact'"),
        ("balance: {domain: {none: 0.3}}", "unknown key 'none'"),
        ("balance: {event: 0.3}", "event must hold a mapping, got 0.3"),
        ("balance: 3", "balance must hold a mapping, got 3"),
        ("plugins: [nsfw]", "plugins must hold a mapping, got ['nsfw']"),
        ("text: 3", "text must hold a mapping, got 3"),
        ("text: samples", "text must hold a mapping, got 'samples'"),
        ("text: 0", "text must hold a mapping, got 0"),
        ("motion: [1]", "motion must hold a mapping, got [1]"),
        ("limits: {side: .inf}", "side must be a whole number, got inf"),
        ("limits: {task_s: .inf}", "task_s must be finite, got inf"),
        ("tags: {measured: 'no'}", "measured must be true or false, got 'no'"),
        ("split: {crf: 99}", "crf must be from 0 to 51, got 99"),
        ("split: {preset: warp}", "preset must be one of ultrafast, "),
        ("fingerprint: {rate: 0}", "rate must be above 0"),
        ("plugins: {captions: {model: m, retries: -1}}", "retries must be at least 0"),
        ("a: [", "is not YAML"),
        ("dedupe: {}\ndedupe: {}", "the key 'dedupe' is there twice, at line 2"),
    ],
)
def test_bad_settings_are_refused_in_one_line(tmp_path, text, said) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_settings(path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("duplicates", [None, {"share": 0.5}])
def test_settings_survive_yaml(duplicates) -> None:
    import yaml

    content = {"thresholds": {"sharpness": {"min": 3}, "flow": None}, "plugins": {"nsfw": {"model": "m"}}}
    settings = Settings.from_dict(QUICK | content | {"duplicates": duplicates})
    assert Settings.from_dict(yaml.safe_load(yaml.safe_dump(settings.as_dict()))) == settings


def test_whole_numbers_may_be_written_with_a_point_and_sections_be_empty(tmp_path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "limits:\nsplit: {fps: 16.0, frame_step: 16.0}\nshards: {clips: 256.0}\nphysics: {window: 3.0}"
    )
    read = read_settings(path)
    assert read == Settings.from_dict({"physics": {"window": 3}})
    values = (read.split.fps, read.split.frame_step, read.shards.clips, read.stages["physics"]["window"])
    assert all(type(value) is int for value in values)


def test_every_number_of_a_clip_can_have_a_threshold_and_every_tag_a_share() -> None:
    settings = Settings.from_dict(
        {
            "thresholds": {"height": {"min": 480}, "physics_score": {"min": 1}, "nsfw": {"max": 0.1}},
            "balance": {"event": {"none": 0.3, "tool use": 0.2}, "domain": {"human": 0.5}},
        }
    )
    chosen = choose([row("small", height=240), row("large", height=480)], settings)
    assert chosen["small"][0] == "height: 240 is below 480"
    assert chosen["large"][0] == ""


@pytest.mark.parametrize("bounds", ["min: -.inf", "rich_min: null", "max: 900, rich_max: .inf", "min: 70"])
def test_thresholds_that_are_saved_are_those_that_were_used(tmp_path, bounds) -> None:
    import yaml

    path = tmp_path / "curation.yaml"
    path.write_text(f"thresholds: {{sharpness: {{{bounds}}}}}")
    used = read_settings(path)
    path.write_text(yaml.safe_dump(used.as_dict()))
    assert used != Settings()
    assert read_settings(path).thresholds == used.thresholds


def test_a_threshold_that_was_off_comes_back_with_the_bound_that_is_set_alone() -> None:
    from kairos.cli.curate import _changed

    off = Settings.from_dict({"thresholds": {"flow": None}})
    assert _changed(off, ["flow.min=0.1"]).thresholds["flow"] == Threshold(min=0.1)


def test_near_duplicates_stay_where_nobody_looks_for_them() -> None:
    twins = [row(name, moments=["ab" * 32] * 4, changes=["1"] * 4) for name in ("one", "two")]
    reasons = {
        text: [reason for reason, _ in choose(twins, Settings.from_dict(content)).values()]
        for text, content in (("on", {}), ("off", {"duplicates": None}))
    }
    assert reasons == {"on": ["duplicate: looks like two", ""], "off": ["", ""]}


def test_clips_come_in_lengths_of_a_step_and_one() -> None:
    split = Split()
    assert [split.frames(n) for n in (80, 81, 96, 97, 641)] == [0, 81, 81, 97, 641]
    assert (split.piece_frames, split.max_frames) == (321, 641)


def test_a_kill_between_shards_and_their_index_leaves_no_shard_that_is_taken_for_another(
    tmp_path, monkeypatch
) -> None:
    import tarfile

    from kairos.curation import shards

    kept = [{"clip_id": name, "frames": 33, "height": 96, "width": 96} for name in ("aa", "bb")]
    for row in kept:
        clip_file(tmp_path, row["clip_id"]).parent.mkdir()
        clip_file(tmp_path, row["clip_id"]).write_bytes(b"film")

    def packed(count: int) -> None:
        shards.write_shards(tmp_path / "shards", tmp_path, kept[:count], 256)

    packed(2)
    real, written = shards._write_tar, []
    with monkeypatch.context() as killed:
        killed.setattr(shards, "_write_tar", lambda *a: (real(*a), written.append(1), 1 / 0))
        with pytest.raises(ZeroDivisionError):
            packed(1)
    assert written
    packed(2)  # the former choice again
    with tarfile.open(tmp_path / "shards" / "33x96x96" / "000000.tar") as tar:
        assert tar.getnames() == ["aa.json", "aa.mp4", "bb.json", "bb.mp4"]


def test_shards_that_are_no_longer_wanted_go_and_lost_ones_come_back(tmp_path) -> None:
    rows = [row("aa", height=32, width=32), row("bb", height=32, width=64)]
    for one in rows:
        clip_file(tmp_path, one["clip_id"]).parent.mkdir()
        clip_file(tmp_path, one["clip_id"]).write_bytes(b"film")

    def packed(count: int) -> list[str]:
        write_shards(tmp_path / "shards", tmp_path, rows[:count], 8)
        return sorted(file.parent.name for file in tmp_path.glob("shards/*/000000.tar"))

    packed(2)
    (tmp_path / "shards" / "81x32x32" / "000000.tar").unlink()
    assert packed(2) == ["81x32x32", "81x32x64"]
    assert packed(1) == ["81x32x32"]


def test_a_source_whose_clips_are_gone_is_cut_again(tmp_path) -> None:
    file = clip_file(tmp_path / "clips", "aa")
    with Ledger(tmp_path / "work") as ledger:
        ledger.keep("key", "config", {"split": {"clips": [{"clip_id": "aa"}]}})
        assert not pipeline._is_split(ledger, "key", "config", tmp_path / "clips")
        file.parent.mkdir(parents=True)
        file.touch()
        assert pipeline._is_split(ledger, "key", "config", tmp_path / "clips")
        assert not pipeline._is_split(ledger, "key", "another", tmp_path / "clips")


def test_a_file_that_changed_is_read_anew_though_its_size_is_the_same(tmp_path) -> None:
    file, found = tmp_path / "a.mp4", []
    with Ledger(tmp_path / "work") as ledger:
        for time_s, content in enumerate((b"one", b"two", b"two")):
            file.write_bytes(content)
            os.utime(file, (time_s, time_s))
            found.append(pipeline._sha256(ledger, SimpleNamespace(file=file)))
    assert found[0] != found[1] == found[2]


@pytest.mark.parametrize(
    ("limit", "cuts_anew"), [("side", True), ("streams", True), ("duration_s", True), ("task_s", False)]
)
def test_limits_that_refuse_sources_cut_them_anew_and_others_do_not(limit, cuts_anew) -> None:
    settings = Settings()
    limits = replace(settings.limits, **{limit: 2 * getattr(settings.limits, limit)})
    changed = pipeline._split_hash(replace(settings, limits=limits)) != pipeline._split_hash(settings)
    assert changed == cuts_anew


def test_a_folder_is_curated_by_one_process_at_a_time(tmp_path) -> None:
    with Ledger(tmp_path), pytest.raises(UserError, match="is being curated by another process"):
        Ledger(tmp_path)
    with Ledger(tmp_path):
        pass


def test_only_a_ledger_that_is_none_is_to_be_deleted(tmp_path) -> None:
    (tmp_path / "ledger.sqlite").write_text("no database\n" * 99)
    with pytest.raises(MachineError, match=r"cannot open .*: file is not a database; delete it"):
        Ledger(tmp_path)
    (tmp_path / "ledger.sqlite").unlink()
    (tmp_path / "ledger.sqlite").mkdir()
    with pytest.raises(MachineError, match=r"cannot open .*: unable to open database file$"):
        Ledger(tmp_path)


def test_a_full_disk_is_the_machines_failure_and_not_a_files(folder, tmp_path, monkeypatch) -> None:
    with Ledger(tmp_path / "work") as ledger:
        pages = ledger._db.execute("PRAGMA page_count").fetchone()[0]
        ledger._db.execute(f"PRAGMA max_page_count={pages}")  # of a disk that is full SQLite says the same
        long = {"text": "x" * 100_000}
        for write_more in (
            lambda: ledger.keep("clip", "-", {"stage": long}),
            lambda: ledger.keep_hash("x" * 100_000, "-", "-"),
            lambda: ledger.replace_sources([("a.mp4", long)]),
        ):
            with pytest.raises(MachineError, match=r"cannot write .*ledger.sqlite: .*full; free some space"):
                write_more()
    with monkeypatch.context() as patch:
        said = sqlite3.OperationalError("disk I/O error")
        patch.setattr(sqlite3, "connect", lambda _: SimpleNamespace(executescript=Mock(side_effect=said)))
        with pytest.raises(MachineError, match=r"cannot open .*: disk I/O error; free some space, and run"):
            Ledger(tmp_path / "work")
    failing = {"machine": "cannot write clips: no space left"}
    monkeypatch.setattr(pipeline, "run_locally", lambda task, items, **_: ((i, failing) for i in items))
    with pytest.raises(MachineError, match="no space left"):
        curate(folder, tmp_path / "out", Settings.from_dict(QUICK))


def test_a_run_that_is_stopped_leaves_the_settings_that_it_goes_on_with(
    folder, tmp_path, monkeypatch
) -> None:
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run_locally", stopped)
    with pytest.raises(KeyboardInterrupt):
        curate(folder, tmp_path / "out", Settings.from_dict(QUICK))
    assert pipeline.saved_settings(tmp_path / "out") == Settings.from_dict(QUICK)


def test_a_choice_among_what_is_not_cut_yet_is_refused_and_changes_nothing(
    folder, tmp_path, monkeypatch
) -> None:
    def stopped(*_, **__):
        raise KeyboardInterrupt

    out, run = tmp_path / "out", pipeline.run_locally
    for content in (QUICK, QUICK | {"split": QUICK["split"] | {"crf": 20}}):
        monkeypatch.setattr(pipeline, "run_locally", stopped)
        with pytest.raises(KeyboardInterrupt):
            curate(folder, out, Settings.from_dict(content))
        before = {file: file.read_bytes() for file in (*out.glob("shards/*/*"), *out.glob("manifest.*"))}
        with pytest.raises(UserError, match="is not run to its end with its settings"):
            select(out)
        assert before == {file: file.read_bytes() for file in before}
        monkeypatch.setattr(pipeline, "run_locally", run)
        curate(folder, out, Settings.from_dict(content), workers=1)
    assert before and select(out).clips == 2


def test_how_far_the_work_is_is_said_now_and_then(folder, tmp_path, monkeypatch, caplog) -> None:
    """Also while one item takes long: each here is ready when it has been said that it is waited for."""
    told, verbs = pipeline._told, []

    def items():
        for number in range(2):
            until = time.monotonic() + 60
            while f"cut {number} of 2" not in caplog.messages:
                assert time.monotonic() < until
                time.sleep(0.001)
            yield number

    monkeypatch.setattr(pipeline, "_TOLD_S", 0.001)
    with caplog.at_level("INFO", "kairos"):
        assert list(told("cut", items(), 2)) == [0, 1]
    monkeypatch.setattr(pipeline, "_told", lambda verb, *work: verbs.append(verb) or told(verb, *work))
    curate(folder, tmp_path / "out", Settings.from_dict(QUICK), workers=1)
    assert verbs == ["hashed", "cut", "scored"]


@pytest.mark.parametrize("name", ["shards/train/000.tar", "shards/81x480x640/000.tar", "clips/holiday.mp4"])
def test_an_output_with_clips_or_shards_of_somebody_else_is_refused(folder, tmp_path, name) -> None:
    file = tmp_path / "out" / name
    file.parent.mkdir(parents=True)
    file.touch()
    with pytest.raises(UserError, match="was not made by a curation; choose another output"):
        curate(folder, tmp_path / "out", Settings.from_dict(QUICK), workers=1)
    assert file.exists()


def test_what_others_put_beside_the_shards_stays(folder, tmp_path) -> None:
    output = tmp_path / "out"
    curate(folder, output, Settings.from_dict(QUICK), workers=1)
    others = [output / "shards" / "mine" / "000.tar", output / "raw" / ".kairos-1.part"]
    left = [output / "clips" / ".kairos-2.part", output / "shards" / "33x96x96" / ".kairos-3.part"]
    for file in (*others, *left):
        file.parent.mkdir(exist_ok=True)
        file.touch()
    curate(folder, output, Settings.from_dict(QUICK), workers=1)
    assert [file.exists() for file in (*others, *left)] == [True, True, False, False]


def test_sources_that_are_no_longer_there_take_their_clips_along_with_a_word(
    folder, tmp_path, caplog
) -> None:
    assert curate(folder, tmp_path / "out", Settings.from_dict(QUICK), workers=1).clips == 2
    (folder / "two.mp4").unlink()
    assert curate(folder, tmp_path / "out", Settings.from_dict(QUICK), workers=1).clips == 1
    assert "1 sources of the last run are not in this input: their clips go" in caplog.messages


def test_a_choice_refuses_settings_that_need_a_run(folder, tmp_path) -> None:
    from kairos.curation import select

    curate(folder, tmp_path / "out", Settings.from_dict(QUICK), workers=1)
    for other in ({"split": {"fps": 8}}, {"physics": {"window": 5}}, {"plugins": {"nsfw": {"model": "m"}}}):
        with pytest.raises(UserError, match="use `kairos curate run` with this configuration"):
            select(tmp_path / "out", Settings.from_dict(QUICK | other))
    for fine in ({"shards": {"clips": 1}}, QUICK | {"duplicates": None}):
        assert select(tmp_path / "out", Settings.from_dict(fine)).clips == 2


@pytest.fixture
def folder(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    write(source / "one.mp4", shot("collision", 3, num_frames=33))
    write(source / "two.mp4", shot("bounce", 4, num_frames=33))
    return source


def test_a_manifest_names_the_videos_and_labels_them(folder, tmp_path) -> None:
    import pyarrow.parquet as pq

    lines = [{"path": "one.mp4", "caption": "Two balls meet.", "events": ["failure"]}, {"path": "../out.mp4"}]
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    curate(folder / "list.jsonl", tmp_path / "out", Settings.from_dict(QUICK), workers=1)
    sources = {r["path"]: r for r in pq.read_table(tmp_path / "out" / "sources.parquet").to_pylist()}
    assert [r["reason"].split(":")[0] for r in sources.values()] == ["outside", ""]
    (clip,) = pq.read_table(tmp_path / "out" / "manifest.parquet").to_pylist()
    assert clip["caption"] == "Two balls meet."
    assert "failure" in clip["events"]


def test_a_manifest_may_lie_beside_the_output(folder) -> None:
    (folder / "list.jsonl").write_text('{"path": "one.mp4"}\n')
    summary = curate(folder / "list.jsonl", folder / "out", Settings.from_dict(QUICK), workers=1)
    assert (summary.sources, summary.clips) == ({"ok": 1}, 1)


def test_half_a_character_in_a_manifest_ends_no_run(folder, tmp_path) -> None:
    lines = [{"path": "one.mp4", "caption": "A red ball rolls \ud83d"}, {"path": "t\ud83dwo.mp4"}]
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    curate(folder / "list.jsonl", tmp_path / "out", Settings.from_dict(QUICK), workers=1)
    (clip,) = map(json.loads, (tmp_path / "out" / "clips.jsonl").read_text().splitlines())
    assert clip["caption"] == "A red ball rolls ?"


def test_manifests_and_texts_may_begin_with_a_byte_order_mark(folder) -> None:
    from kairos.curation.intake import take_in
    from kairos.curation.settings import Limits

    (folder / "list.csv").write_text("path,caption\none.mp4,Two balls meet.\n", encoding="utf-8-sig")
    (folder / "list.jsonl").write_text('{"path": "one.mp4"}\n', encoding="utf-8-sig")
    (folder / "one.txt").write_text("Two balls meet.", encoding="utf-8-sig")
    assert take_in(folder / "list.csv", Limits())[1][0].labels == {"caption": "Two balls meet."}
    assert [found.path for found in take_in(folder / "list.jsonl", Limits())[1]] == ["one.mp4"]
    one = {found.path: found for found in take_in(folder, Limits())[1]}["one.mp4"]
    assert one.labels == {"caption": "Two balls meet."}


def test_a_text_belongs_to_its_video_however_its_name_is_written(folder) -> None:
    from kairos.curation.intake import take_in
    from kairos.curation.settings import Limits

    (folder / "one.mp4").rename(folder / "ONE.MP4")
    (folder / "ONE.txt").write_text("Two balls meet.")
    (folder / "three.txt").write_text("Nobody's.")
    found = {entry.path: entry for entry in take_in(folder, Limits())[1]}
    assert found["ONE.MP4"].labels == {"caption": "Two balls meet."}
    assert [found[name].status for name in ("ONE.txt", "three.txt")] == ["sidecar", "rejected"]


def test_a_text_that_is_not_read_ends_no_run_and_says_why(folder, monkeypatch) -> None:
    from pathlib import Path

    from kairos.curation.intake import take_in
    from kairos.curation.settings import Limits

    (folder / "one.json").touch()
    (folder / "one.TXT").write_text("Two balls meet.")
    (folder / "two.txt").write_text("x" * 100_001)
    found = {entry.path: entry for entry in take_in(folder, Limits())[1]}
    assert (found["one.mp4"].labels, found["two.mp4"].labels) == ({"caption": "Two balls meet."}, {})
    assert found["two.txt"].reason == "belongs to the video of this name; too long, not read"
    (folder / "two.txt").write_bytes("Ein B\xe4ll rollt.".encode("latin-1"))
    found = {entry.path: entry for entry in take_in(folder, Limits())[1]}
    assert found["two.mp4"].labels == {}
    assert found["two.txt"].reason == "belongs to the video of this name; not UTF-8, not read"

    def forbidden(path, *_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", forbidden)
    found = {entry.path: entry for entry in take_in(folder, Limits())[1]}
    assert found["one.mp4"].status == "waiting"
    assert (found["one.TXT"].status, found["one.TXT"].reason) == ("rejected", "unreadable: permission denied")


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (
            [{"path": "one.mp4", "caption": "a ball"}, {"path": "./one.mp4", "caption": "a cube"}],
            "entry 2: one.mp4 stands in an entry before, which says other things of it",
        ),
        ([{"path": "one.mp4", "start_s": 2}], "entry 1: 'start_s' is not read, for videos are taken whole"),
        ([{"path": "one.mp4", "end_s": 2}], "entry 1: 'end_s' is not read"),
        ([{"path": "one.mp4", "domain": "robto"}], "entry 1: unknown domain 'robto'; one of human"),
        ([{"path": "one.mp4", "events": ["contct"]}], "entry 1: unknown event 'contct'; of contact"),
        ([{"path": "one.mp4", "events": "contact, contct"}], "entry 1: unknown event 'contct'"),
        ([{"path": "one.mp4", "events": 3}], "entry 1: unknown event '3'"),
        ([{"path": "one.mp4", "caption": ["a", "b"]}], "entry 1: 'caption' must be a text, got ['a', 'b']"),
    ],
)
def test_what_a_manifest_says_is_refused_where_it_would_be_lost(folder, lines, said) -> None:
    from kairos.curation.intake import take_in
    from kairos.curation.settings import Limits

    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(UserError) as caught:
        take_in(folder / "list.jsonl", Limits())
    assert said in str(caught.value)


def test_a_manifest_names_events_in_a_list_or_with_commas(folder) -> None:
    from kairos.curation.intake import take_in
    from kairos.curation.settings import Limits

    one = 'one.mp4,Physics ,"Contact , tool use"\n'
    (folder / "list.csv").write_text(f'path,domain,events\n{one}two.mp4,," "\n{one}')  # one is there twice
    labels = [entry.labels for entry in take_in(folder / "list.csv", Limits())[1]]
    assert labels == [{"domain": "Physics", "events": ["Contact", "tool use"]}, {}]


@pytest.mark.parametrize("container", ["mp4", "mkv"])
def test_what_is_said_of_a_copy_is_said_of_the_first(folder, tmp_path, container) -> None:
    import pyarrow.parquet as pq

    (folder / "two.mp4").unlink()
    if container == "mp4":
        (folder / "three.mp4").write_bytes((folder / "one.mp4").read_bytes())
    else:
        remux(folder / "one.mp4", folder / "three.mkv")
    (folder / "three.txt").write_text("Two balls meet.")
    curate(folder, tmp_path / "out", Settings.from_dict(QUICK), workers=1)
    (clip,) = pq.read_table(tmp_path / "out" / "manifest.parquet").to_pylist()
    assert (clip["source"], clip["caption"]) == ("one.mp4", "Two balls meet.")


def test_input_that_cannot_be_is_refused(folder, tmp_path) -> None:
    with pytest.raises(UserError, match="input not found"):
        curate(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(UserError, match="lies in the input"):
        curate(folder, folder / "out")
    (folder / "list.csv").write_text("name\none.mp4\n")
    with pytest.raises(UserError, match="the key 'path' is missing"):
        curate(folder / "list.csv", tmp_path / "out")
    (folder / "clips").mkdir()
    (folder / "one.mp4").rename(folder / "clips" / "one.mp4")
    (folder / "list.jsonl").write_text('{"path": "clips/one.mp4"}\n')
    with pytest.raises(UserError, match=r"one\.mp4 of the input .* lies in the output"):
        curate(folder / "list.jsonl", folder)


def test_input_may_lie_below_the_output(folder, tmp_path) -> None:
    (tmp_path / "data").mkdir()
    folder.rename(tmp_path / "data" / "raw")
    summary = curate(tmp_path / "data" / "raw", tmp_path / "data", Settings.from_dict(QUICK), workers=1)
    assert summary.sources["ok"] >= 1 and list((tmp_path / "data" / "raw").glob("one.mp4"))


def test_names_are_told_by_their_characters_and_bytes() -> None:
    assert printable(os.fsdecode(b"caf\xe9 \xc3\xa9.mp4")) == "caf\\xe9 \u00e9.mp4"
    assert printable("a\nb\ud83d") == "a\\nb\\ud83d"


def test_the_command_runs_selects_and_explains(folder, tmp_path, capfd) -> None:
    import yaml

    from kairos.cli import main

    def command(*arguments) -> tuple[int, str]:
        with pytest.raises(SystemExit) as left:
            main([str(a) for a in ("curate", *arguments)])
        said = capfd.readouterr()
        return int(left.value.code or 0), said.out + said.err

    output, config = tmp_path / "[red]out[/x]", tmp_path / "c.yaml"
    (folder / "one.txt").write_text("Two [balls] meet [/again].")
    config.write_text(yaml.safe_dump(QUICK))
    status, said = command("run", "-i", folder, "-o", output, "--config", config, "--workers", 1)
    assert (status, "2 of 2 clips kept" in said) == (0, True), said
    assert f"4 s of 4 s: {output}/report.html" in said
    status, said = command(
        "select", output, "--set", "brightness.min=0.9", "--set", "brightness.rich_min=0.9"
    )
    assert (status, "0 of 2 clips kept" in said) == (0, True), said
    status, said = command("run", "-i", folder, "-o", output)  # with the settings of the choice before it
    assert (status, "0 of 2 clips kept" in said) == (0, True), said
    status, said = command("why", output, "one.mp4")
    assert (status, "one.mp4: ok\n" in said) == (0, True), said
    assert said.count(" s: dropped, brightness: ") == 1
    explained = [command("why", output, clip.stem) for clip in (output / "clips").rglob("*.mp4")]
    assert [status for status, _ in explained] == [0, 0]
    assert all("dropped, brightness: " in said for _, said in explained)
    assert any("Two [balls] meet [/again]." in said for _, said in explained)
    assert command("why", output, "nothing")[0] == 2
    assert command("select", output, "--set", "brightness")[0] == 2
    assert command("select", output, "--set", "caption.min=1")[0] == 2
    status, said = command("select", output)  # what was refused was not saved
    assert (status, "0 of 2 clips kept" in said) == (0, True), said
    assert command("report", tmp_path)[0] == 2
    (output / "sources.parquet").unlink()
    status, said = command("report", output)
    assert (status, "sources.parquet is missing" in said) == (2, True), said


class Endpoint(BaseHTTPRequestHandler):
    """An OpenAI-compatible server that is busy at first."""

    asked: list[dict] = []
    busy = 2

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        cls = type(self)
        if cls.busy:
            cls.busy -= 1
            self.send_response(429)
            self.send_header("Retry-After", "0")
            self.end_headers()
            return
        cls.asked.append(body | {"key": self.headers.get("Authorization")})
        said = json.dumps(
            {"caption": "Two balls collide.", "domain": "physics", "events": ["collision", "magic"]}
        )
        answer = {"choices": [{"message": {"content": said}}], "usage": {"total_tokens": 100}}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_: object) -> None:
        pass


def test_captions_of_an_endpoint_are_retried_paid_once_and_end_with_the_budget(
    folder, tmp_path, monkeypatch
) -> None:
    import pyarrow.parquet as pq

    monkeypatch.setenv("KAIROS_CAPTION_API_KEY", "secret")
    Endpoint.asked, Endpoint.busy = [], 2
    with ThreadingHTTPServer(("127.0.0.1", 0), Endpoint) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        plugin = {
            "model": "eyes",
            "endpoint": f"http://127.0.0.1:{server.server_port}/v1",
            "physics": False,
            "requests_per_minute": 6000,
            "parallel": 1,
            "budget_tokens": 100,
        }
        output = tmp_path / "out"

        def captions(**changes) -> list[str]:
            settings = Settings.from_dict(QUICK | {"plugins": {"captions": plugin | changes}})
            curate(folder, output, settings, workers=1)
            return [r["caption"] for r in pq.read_table(output / "manifest.parquet").to_pylist()]

        first = captions()
        assert first.count("Two balls collide.") == 1  # the budget is spent on one of the two
        assert captions() == first
        assert len(Endpoint.asked) == 1
        assert captions(budget_tokens=1000) == ["Two balls collide."] * 2
        assert len(Endpoint.asked) == 2
        server.shutdown()
    assert Endpoint.asked[0]["key"] == "Bearer secret"
    pictures = [part for part in Endpoint.asked[0]["messages"][0]["content"] if part["type"] == "image_url"]
    assert len(pictures) == 6
    events = pq.read_table(output / "manifest.parquet")["events"].to_pylist()
    assert events == ["collision"] * 2


def test_models_score_by_name_or_folder(tmp_path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    from kairos.curation.plugins.models import Aesthetics, Embedding, Nsfw

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=16,
    )
    config.id2label, config.label2id = {0: "normal", 1: "nsfw"}, {"normal": 0, "nsfw": 1}
    ViTForImageClassification(config).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    save_file({"weight": torch.ones(1, 16), "bias": torch.tensor([5.0])}, tmp_path / "head.safetensors")
    views = Views(fps=16, frames=4, height=48, width=64, samples=shot("bounce", 1, 48, 64, 4))
    assert 0 < Nsfw(model=str(tmp_path)).measure(views)["nsfw"] < 1
    embedding = Embedding(model=str(tmp_path)).measure(views)["embedding"]
    assert np.linalg.norm(embedding) == pytest.approx(1, abs=1e-3)
    head = str(tmp_path / "head.safetensors")
    assert 1 < Aesthetics(model=str(tmp_path), head=head).measure(views)["aesthetics"] < 9


def test_a_clip_is_as_sharp_as_its_frames_that_show_anything() -> None:
    def sharpness(samples) -> float:
        views = Views(fps=16, frames=8, height=120, width=160, samples=samples)
        return Sharpness().measure(views)["sharpness"]

    empty = np.full((120, 160, 3), 200, np.uint8)
    ball = cv2.circle(empty.copy(), (60, 60), 12, (200, 30, 30), -1)
    blurred = cv2.GaussianBlur(ball, (0, 0), 6)
    there = sharpness(np.stack([ball] * 8))
    assert there > 60
    assert sharpness(np.stack([ball] * 3 + [empty] * 5)) == there  # it leaves the picture
    assert sharpness(np.stack([blurred] * 3 + [empty] * 5)) < 30
    assert sharpness(np.stack([ball] * 3 + [blurred] * 5)) < 30
    assert sharpness(np.stack([empty] * 8)) == 0


def test_motion_is_in_widths_of_the_whole_picture_a_second() -> None:
    vectors = np.zeros((4, 5, 10, 2), np.float32)
    vectors[..., 0] = 16
    views = Views(fps=10, frames=5, height=80, width=160, vectors=vectors)
    assert Motion().measure(views) == {"motion": 1.0, "motion_patch": 1.0}


def test_flow_is_in_widths_of_the_picture_however_small_it_is_seen() -> None:
    ground = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 255, (64, 200), np.uint8), (0, 0), 2)
    grey = np.stack([ground[:, 4 * i : 4 * i + 128] for i in range(9)])
    small, large = (
        Flow().measure(Views(fps=8, frames=9, height=width // 2, width=width, grey=grey))
        for width in (128, 1280)
    )
    assert small == large and small["camera"] == pytest.approx(8 * 4 / 128, rel=0.15)


def test_a_small_light_in_the_dark_is_no_black_frame() -> None:
    grey = np.full((4, 32, 32), 16, np.uint8)
    grey[:3, :6, :6] = 200
    assert Exposure().measure(Views(fps=8, frames=4, height=32, width=32, grey=grey))["dark_share"] == 0.25


def test_a_border_that_is_lit_once_is_no_bar() -> None:
    grey = np.full((20, 32, 32), 16, np.uint8)
    grey[:, 8:24] = 200
    views = Views(fps=8, frames=20, height=32, width=32, grey=grey)
    assert Bars().measure(views) == {"bars_share": 0.5}
    grey[7] = 120
    assert Bars().measure(views) == {"bars_share": 0.0}


def test_an_address_without_a_ray_cluster_is_refused_at_once(folder, tmp_path, monkeypatch) -> None:
    ray = SimpleNamespace(is_initialized=lambda: False)  # it tries an address for minutes
    monkeypatch.setitem(sys.modules, "ray", ray)
    with pytest.raises(UserError, match=r"no Ray at 127\.0\.0\.1:1"):
        curate(folder, tmp_path / "out", Settings.from_dict(QUICK), ray="127.0.0.1:1")


@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_ray_gives_what_the_local_executor_gives(folder, tmp_path) -> None:
    import pyarrow.parquet as pq

    pytest.importorskip("ray")
    (folder / "broken.mp4").write_text("not a video")
    settings = Settings.from_dict(QUICK)
    curate(folder, tmp_path / "ray", settings, ray="local", workers=1)
    curate(folder, tmp_path / "here", settings, workers=1)
    for name in ("manifest", "sources"):
        one, other = (pq.read_table(tmp_path / where / f"{name}.parquet") for where in ("ray", "here"))
        assert one.equals(other)
    one, other = (
        {
            path.relative_to(tmp_path / where): path.read_bytes()
            for path in (tmp_path / where / "shards").rglob("*.tar")
        }
        for where in ("ray", "here")
    )
    assert one == other != {}
