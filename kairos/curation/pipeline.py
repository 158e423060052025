"""The whole of a curation: `curate` from raw video to shards, `select` to choose anew, `why` to explain.

OUTPUT/manifest.parquet, sources.parquet, clips.jsonl, report.html
OUTPUT/shards/FRAMESxHEIGHTxWIDTH/000000.tar
OUTPUT/clips/ab/ab12....mp4      every clip, named by its pictures and their encoding
OUTPUT/work/ledger.sqlite        what has been done; OUTPUT/curation.yaml, with which settings
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

from kairos.curation.intake import FORMATS, Source, take_in
from kairos.curation.ledger import Ledger
from kairos.curation.plugins.captions import Captions
from kairos.curation.scoring import ScoreTask, score_clip
from kairos.curation.selection import choose
from kairos.curation.settings import Limits, Settings, hash_of, read_settings
from kairos.curation.shards import write_shards
from kairos.curation.source import SplitTask, clip_file, split_source
from kairos.curation.stages import Stage, hashes_of, stages_of
from kairos.curation.tables import HIDDEN, read_rows, write_lines, write_manifest, write_sources
from kairos.curation.workers import run_locally, run_on_ray
from kairos.data.files import LOCK, prepare_folder, write_atomically
from kairos.distributed.fleet import check_address, cluster
from kairos.errors import MachineError, UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")
Execute = Callable[..., Generator[tuple[Any, dict[str, Any]], None, None]]

VIEWS = ("thresholds", "duplicates", "rich", "balance", "shards")
"""The settings of a choice; the others are of what was computed."""
_TOLD_S = 15.0
"""So often it is said how far the work is."""


@dataclass(frozen=True)
class Summary:
    """What a curation came to."""

    sources: dict[str, int]  # by status
    clips: int
    kept: int
    hours_in: float
    hours_kept: float


def curate(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    settings: Settings | None = None,
    *,
    ray: str | None = None,
    workers: int | None = None,
) -> Summary:
    """Curate a folder of videos, or the `path`s of a manifest (JSON lines, CSV or Parquet), into `output`.

    What is in the ledger of `output` is not done again, so that a second call goes on where the first was
    stopped. `ray` is the address of a Ray cluster, or "local"; without it `workers` child processes work
    here, one a core by default.
    Raises UserError for input that cannot be used and for an address where nobody is, MachineError where the
    disk or the cluster fails.
    """
    settings = settings or Settings()
    source, output = Path(source), Path(output)
    root, found = take_in(source, settings.limits)
    if source.is_dir() and output.resolve().is_relative_to(root):
        raise UserError(f"the output {output} lies in the input {source}; choose a folder beside it")
    own = [output.resolve() / folder for folder in ("clips", "shards", "work")]
    if mixed := [entry for entry in found if any(entry.file.is_relative_to(folder) for folder in own)]:
        raise UserError(f"{mixed[0].path} of the input {source} lies in the output {output}; choose another")
    prepare_folder(output)
    _refuse_foreign(output)
    limits = settings.limits
    with Ledger(output / "work") as ledger:
        _clean(output)
        _keep_settings(output, settings)
        with ExitStack() as held:
            execute = _executor(ray, workers, limits, held)
            _split(ledger, found, output, settings, execute)
            _score(ledger, output, settings, execute)
        _caption(ledger, settings)
        return _select(ledger, output, settings)


def select(output: str | os.PathLike[str], settings: Settings | None = None) -> Summary:
    """Choose anew among clips that were scored, and bring manifest and shards up to date.

    Of `settings` thresholds, duplicates, rich, balance and shards are taken, the rest stays as it was run.
    Raises UserError where the rest is neither that nor the default.
    """
    output = Path(output)
    stored = saved_settings(output)
    if settings is not None:
        default = Settings()
        for name in (f.name for f in fields(Settings) if f.name not in (*VIEWS, "limits")):
            if getattr(settings, name) not in (getattr(stored, name), getattr(default, name)):
                raise UserError(
                    f"{name} differs from what {output} was made with, and a choice computes nothing; "
                    "use `kairos curate run` with this configuration"
                )
        stored = replace(stored, **{name: getattr(settings, name) for name in VIEWS})
    with Ledger(output / "work") as ledger:
        config = _split_hash(stored)
        waiting = [entry["key"] for _, entry in ledger.sources() if entry["status"] == "waiting"]
        uncut = sum(ledger.result(key, "split", config) is None for key in waiting)
        if uncut or not (output / "manifest.parquet").exists():
            raise UserError(
                f"{output} is not run to its end with its settings, {uncut} sources are to be cut; use "
                "`kairos curate run`"
            )
        _clean(output)
        return _select(ledger, output, stored)


def why(output: str | os.PathLike[str], clip: str) -> dict[str, Any]:
    """The row of the manifest whose clip_id is, or begins with, `clip`. Raises UserError unless it is one."""
    rows = [row for row in read_rows(Path(output) / "manifest.parquet") if row["clip_id"].startswith(clip)]
    if not rows:
        raise UserError(
            f"no clip {clip!r} in {output}; a source's path, as in sources.parquet, gives its clips"
        )
    if len(rows) > 1 and rows[0]["clip_id"] != clip:
        raise UserError(f"{len(rows)} clips begin with {clip!r}; give more of the name")
    return rows[0]


def why_source(
    output: str | os.PathLike[str], path: str
) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """The row of sources.parquet of a file and the rows of its clips; None where no such file came in."""
    source = next((row for row in read_rows(Path(output) / "sources.parquet") if row["path"] == path), None)
    if source is None:
        return None
    return source, [row for row in read_rows(Path(output) / "manifest.parquet") if row["source"] == path]


def saved_settings(output: Path) -> Settings:
    """The settings that an output folder was made with. Raises UserError where there is none."""
    if not (output / "curation.yaml").is_file():
        raise UserError(f"{output} holds no curation; run `kairos curate run --output {output}` first")
    return read_settings(output / "curation.yaml")


def clip_rows(ledger: Ledger, settings: Settings) -> Iterator[dict[str, Any]]:
    """Every clip once, by source and time: where it is from and what every stage found."""
    stages = stages_of(settings)
    hashes = hashes_of(stages)
    captions = _captions(settings)
    for clip_id, labels, row in _clips(ledger, settings):
        own = _own_hashes(stages, hashes, labels)
        scores: dict[str, Any] = {}
        for stage in stages:
            result = ledger.result(clip_id, stage.name, own[stage.name])
            if result is not None and "scores" in result:
                scores |= result["scores"]
            elif result is not None:
                scores.setdefault("failed", result["failed"])
            elif "failed" not in scores:  # the stages were never reached
                failure = ledger.result(clip_id, "score", hash_of(sorted(own.items()))) or {}
                scores["failed"] = failure.get("failed", "failed: it was not scored")
        if captions is not None:
            result = ledger.result(clip_id, captions.name, hash_of(captions.identity)) or {}
            scores |= result.get("scores", {})
        yield row | scores


def _executor(ray: str | None, workers: int | None, limits: Limits, held: ExitStack) -> Execute:
    """Who does the work; a cluster is held from the first task on, if there is one."""
    options: dict[str, Any] = {"limit_s": limits.task_s, "memory_gb": limits.memory_gb}
    if ray is None:
        return partial(run_locally, workers=workers or len(os.sched_getaffinity(0)), **options)
    check_address(ray)

    @cache
    def room() -> int:
        here = len(os.sched_getaffinity(0)) if ray == "local" else None
        return held.enter_context(cluster(ray, workers=workers or here, on_gpus=False))[1]

    def execute(task: Callable[[Any], Any], items: Iterable[Any]) -> Generator[tuple[Any, Any], None, None]:
        if pending := list(items):
            yield from run_on_ray(task, pending, workers=room(), **options)

    return execute


def _split(ledger: Ledger, found: list[Source], output: Path, settings: Settings, execute: Execute) -> None:
    """Every file into clips; the list of the files goes to the ledger."""
    config = _split_hash(settings)
    entries: dict[str, dict[str, Any]] = {}
    first_by_key: dict[str, str] = {}
    tasks: dict[Path, tuple[str, SplitTask]] = {}
    left = {path for path, _ in ledger.sources()} - {source.path for source in found}
    if left:
        logger.warning("%d sources of the last run are not in this input: their clips go", len(left))
    for source in _told("hashed", found, len(found)):
        entry: dict[str, Any] = {"status": source.status, "reason": source.reason, "labels": source.labels}
        entries[source.path] = entry
        if source.status != "waiting":
            continue
        try:
            sha256 = _sha256(ledger, source)
        except OSError as error:
            entry |= {"status": "rejected", "reason": f"unreadable: {(error.strerror or str(error)).lower()}"}
            continue
        key = f"{sha256}:{FORMATS[source.file.suffix.lower()]}"
        entry |= {"key": key, "sha256": sha256}
        if key in first_by_key:
            first = first_by_key[key]
            entry |= {"status": "duplicate", "reason": f"duplicate: the same bytes as {first}"}
            # What is said of a copy is said of them both; what is said of the first goes before it.
            entries[first]["labels"] = source.labels | entries[first]["labels"]
            continue
        first_by_key[key] = source.path
        if not _is_split(ledger, key, config, output / "clips"):
            task = SplitTask(source.file, output / "clips", settings.limits, settings.shots, settings.split)
            tasks[source.file] = key, task
    logger.info("%d files came in, %d of them to be cut into clips", len(found), len(tasks))
    # Closed before the workplace is, also where an error leaves the loop.
    with closing(execute(split_source, (task for _, task in tasks.values()))) as results:
        for task, result in _told("cut", _fit(results), len(tasks)):
            key = tasks[task.file][0]
            costs = result.pop("costs", {})
            video_s = result.get("decoded_s", 0.0)
            timed = {f"source {part}": {"seconds": s, "video_s": video_s} for part, s in costs.items()}
            ledger.keep(key, config, {"split": result} | timed)
            _remark(task.file.name, result)
    ledger.replace_sources(entries.items())


def _score(ledger: Ledger, output: Path, settings: Settings, execute: Execute) -> None:
    """Every clip through the stages that it has not been through."""
    stages = stages_of(settings)
    hashes = hashes_of(stages)
    waiting: dict[str, dict[str, str]] = {}

    def unfinished() -> Iterator[tuple[str, dict[str, Any], dict[str, str], list[Stage]]]:
        for clip_id, labels, _ in _clips(ledger, settings):
            own = _own_hashes(stages, hashes, labels)
            missing = [stage for stage in stages if not ledger.is_done(clip_id, stage.name, own[stage.name])]
            if missing:
                yield clip_id, labels, own, missing

    def tasks() -> Iterator[ScoreTask]:
        for clip_id, labels, own, missing in unfinished():
            done: dict[str, Any] = {}
            for stage in stages:
                if stage not in missing:
                    done |= (ledger.result(clip_id, stage.name, own[stage.name]) or {})["scores"]
            waiting[clip_id] = own
            yield ScoreTask(clip_id, clip_file(output / "clips", clip_id), tuple(missing), labels, done)

    count = sum(1 for _ in unfinished())
    with closing(execute(score_clip, tasks())) as results:
        for task, result in _told("scored", _fit(results), count):
            own = waiting.pop(task.clip_id)
            if "results" in result:
                ledger.keep(task.clip_id, "-", result["results"], hashes=own)
            else:
                ledger.keep(task.clip_id, hash_of(sorted(own.items())), {"score": result})
            _remark(f"clip {task.clip_id}", result)


def _told(verb: str, items: Iterable[T], count: int) -> Iterator[T]:
    """The items as they come, with a line now and then of how far they are, also while one takes hours."""
    done, over = 0, threading.Event()

    def tell() -> None:
        while not over.wait(_TOLD_S):
            logger.info("%s %d of %d", verb, done, count)

    threading.Thread(target=tell, daemon=True).start()
    try:
        for item in items:
            yield item
            done += 1
    finally:
        over.set()


def _fit(results: Iterable[tuple[T, dict[str, Any]]]) -> Iterator[tuple[T, dict[str, Any]]]:
    """The results of workers. Raises MachineError where one met what all would meet, such as a full disk."""
    for task, result in results:
        if "machine" in result:
            raise MachineError(result["machine"])
        yield task, result


def _caption(ledger: Ledger, settings: Settings) -> None:
    """Ask the model for captions, where there is one, about the clips that stay without balance."""
    captions = _captions(settings)
    if captions is None:
        return
    chosen = choose(clip_rows(ledger, settings), replace(settings, balance={}))
    config = hash_of(captions.identity)
    waiting = (
        (row["clip_id"], row)
        for row in clip_rows(ledger, settings)
        if not chosen[row["clip_id"]][0] and not ledger.is_done(row["clip_id"], captions.name, config)
    )
    for clip_id, answer in captions.ask(waiting, ledger.spent(captions.name, "tokens")):
        # What a failure cost is not forgotten when another answer takes its place.
        before = ledger.result(clip_id, captions.name, config) or {}
        answer["tokens"] += before.get("tokens", 0)
        ledger.keep(clip_id, config, {captions.name: answer})
        _remark(f"clip {clip_id}", answer)


def _captions(settings: Settings) -> Captions | None:
    return Captions(**settings.plugins[Captions.name]) if Captions.name in settings.plugins else None


def _select(ledger: Ledger, output: Path, settings: Settings) -> Summary:
    """The choice, and everything that goes out; settings are kept when a choice could be made with them."""
    chosen = choose(clip_rows(ledger, settings), settings)
    _keep_settings(output, settings)
    names = [name for stage in stages_of(settings) for name in stage.outputs if name not in HIDDEN]
    if Captions.name in settings.plugins:
        names.append("physics_caption")

    def rows() -> Iterator[dict[str, Any]]:
        for row in clip_rows(ledger, settings):
            reason, twin = chosen[row["clip_id"]]
            yield row | {"reason": reason, "duplicate_of": twin, "kept": not reason}

    def kept() -> Iterator[dict[str, Any]]:
        for row in rows():
            if row["kept"]:
                # Not start_s: to a training that would be a place in the clip.
                place = {"source_start_s": row["start_s"], "source_end_s": row["end_s"]}
                shown = ("frames", "height", "width", "fps", *names)
                first = {"clip_id": row["clip_id"], "source": row["source"]}
                yield first | place | {name: row.get(name) for name in shown}

    homes = write_shards(output / "shards", output / "clips", kept(), settings.shards.clips)
    clips = output / "clips"
    lines = (
        {
            "video": clip_file(clips, row["clip_id"]).relative_to(output).as_posix(),
            "shard": homes[row["clip_id"]],
        }
        | row
        for row in kept()
    )
    write_lines(output / "clips.jsonl", lines)
    write_manifest(output / "manifest.parquet", rows(), names)
    return _write_sources(ledger, output, settings, rows())


def _write_sources(
    ledger: Ledger, output: Path, settings: Settings, rows: Iterable[Mapping[str, Any]]
) -> Summary:
    """sources.parquet, and the sum of it all."""
    counts: Counter[str] = Counter()
    kept_counts: Counter[str] = Counter()
    hours_kept = 0.0
    for row in rows:
        counts[row["source"]] += 1
        kept_counts[row["source"]] += bool(row["kept"])
        hours_kept += row["kept"] * (row["end_s"] - row["start_s"]) / 3600
    config = _split_hash(settings)
    owners = {row["clip_id"]: row["source"] for _, _, row in _clips(ledger, settings)}
    entries: list[dict[str, Any]] = []
    for path, entry in ledger.sources():
        result = ledger.result(entry.get("key", ""), "split", config) or {}
        status, reason = _fate(path, entry, result, owners, counts[path])
        duration = result.get("decoded_s") if status in ("ok", "duplicate") else result.get("duration_s")
        entries.append(
            {
                "path": path,
                "status": status,
                "reason": reason,
                "duration_s": duration,
                "clips": counts[path],
                "clips_kept": kept_counts[path],
                "sha256": entry.get("sha256"),
            }
        )
    write_sources(output / "sources.parquet", entries)
    statuses = Counter(entry["status"] for entry in entries)
    hours_in = sum(entry["duration_s"] or 0.0 for entry in entries) / 3600
    return Summary(dict(statuses), sum(counts.values()), sum(kept_counts.values()), hours_in, hours_kept)


def _fate(
    path: str, entry: Mapping[str, Any], result: Mapping[str, Any], owners: Mapping[str, str], clips: int
) -> tuple[str, str]:
    """Status and reason of one file."""
    if entry["status"] != "waiting":
        return entry["status"], entry["reason"]
    if "refused" in result:
        return "rejected", result["refused"]
    if "failed" in result:
        return "failed", result["failed"]
    damaged = f"damaged: {result['damaged_s']:g} s are left out" if result.get("damaged_s") else ""
    if not result.get("clips"):
        short = f"short: none of its {result.get('shots', 0)} shots is long enough for a clip"
        return "rejected", f"{damaged}; {short}" if damaged else short
    if not clips:
        other = owners[result["clips"][0]["clip_id"]]
        return "duplicate", f"duplicate: the same pictures as {other}"
    return "ok", damaged


def _clips(ledger: Ledger, settings: Settings) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(clip_id, labels, row) of every clip, once: the first source by its path has it.

    What any of its sources says is said of the clip; what the first says goes before it.
    """
    config = _split_hash(settings)

    def sources() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
        for path, entry in ledger.sources():
            if entry["status"] == "waiting":
                yield path, entry["labels"], ledger.result(entry["key"], "split", config) or {}

    said: dict[str, dict[str, Any]] = {}
    for _, labels, result in sources():
        for clip in result.get("clips", ()) if labels else ():
            said[clip["clip_id"]] = labels | said.get(clip["clip_id"], {})
    seen: set[str] = set()
    for path, _, result in sources():
        facts = {name: result.get(name) for name in ("source_height", "source_width", "source_fps")}
        for clip in result.get("clips", ()):
            if clip["clip_id"] not in seen:
                seen.add(clip["clip_id"])
                row = clip | facts | {"source": path, "fps": float(settings.split.fps)}
                yield clip["clip_id"], said.get(clip["clip_id"], {}) | {"source": path}, row


def _own_hashes(
    stages: Iterable[Stage], hashes: Mapping[str, str], labels: Mapping[str, Any]
) -> dict[str, str]:
    """The configuration hashes for one clip: those of stages that read the labels hold these too."""
    told = {"labels"}
    own = {}
    for stage in stages:
        own[stage.name] = hashes[stage.name]
        if told & set(stage.inputs):
            own[stage.name] += "-" + hash_of(labels)
            told |= set(stage.outputs)
    return own


def _is_split(ledger: Ledger, key: str, config: str, clips: Path) -> bool:
    if not ledger.is_done(key, "split", config):
        return False
    result = ledger.result(key, "split", config) or {}
    return all(clip_file(clips, clip["clip_id"]).is_file() for clip in result.get("clips", ()))


def _split_hash(settings: Settings) -> str:
    limits = settings.limits
    return hash_of("split", 3, settings.shots, settings.split, limits.streams, limits.side, limits.duration_s)


def _sha256(ledger: Ledger, source: Source) -> str:
    """Of the file's bytes; read once, unless size or time of change differ."""
    state = source.file.stat()
    stamp = f"{state.st_size}:{state.st_mtime_ns}"
    known = ledger.known_hash(str(source.file), stamp)
    if known is not None:
        return known
    with source.file.open("rb") as file:
        sha256 = _digest(file)
    ledger.keep_hash(str(source.file), stamp, sha256)
    return sha256


def _digest(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _refuse_foreign(output: Path) -> None:
    """Refuse a folder with clips or shards that no curation put there: what is not chosen is removed."""
    if (output / "work" / LOCK).exists():
        return
    for folder in (output / "clips", output / "shards"):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} was not made by a curation; choose another output than {output}")


def _clean(output: Path) -> None:
    """Remove what a killed run left half-written. Only called while nobody else holds the ledger."""
    for place in ("", "clips/", "shards/", "shards/*/"):
        for part in list(output.glob(f"{place}.kairos-*.part")):
            if part.is_dir():  # clips of a source that was not through
                shutil.rmtree(part)
            else:
                part.unlink(missing_ok=True)


def _keep_settings(output: Path, settings: Settings) -> None:
    import yaml

    write_atomically(output / "curation.yaml", yaml.safe_dump(settings.as_dict(), sort_keys=False).encode())


def _remark(name: str, result: Mapping[str, Any]) -> None:
    said = result.get("refused") or result.get("failed")
    if said:
        logger.info("%s: %s", name, said)
