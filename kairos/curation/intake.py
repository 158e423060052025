"""What came in: every file of a folder, or every line of a manifest, and whether it may be opened at all.

Nothing is opened here. Links, devices, names that no shard could carry and files that are not named as
videos are told apart by what the file system says.
"""

from __future__ import annotations

import csv
import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kairos.curation.settings import Limits
from kairos.curation.vocabulary import DOMAINS, EVENTS
from kairos.errors import UserError

FORMATS = {
    ".mp4": "mov",
    ".m4v": "mov",
    ".mov": "mov",
    ".3gp": "mov",
    ".mkv": "matroska",
    ".webm": "matroska",
    ".avi": "avi",
    ".flv": "flv",
    ".ts": "mpegts",
    ".m2ts": "mpegts",
    ".mpg": "mpeg",
    ".mpeg": "mpeg",
    ".wmv": "asf",
    ".ogv": "ogg",
}
"""The names of videos, and how FFmpeg calls what has to be inside."""
_SIDECARS = (".txt", ".json", ".srt", ".vtt")
_LONGEST_TEXT = 100_000  # characters of a caption's file
_UTF8 = "utf-8-sig"  # Excel and Notepad begin a file with a byte-order mark


@dataclass(frozen=True)
class Source:
    """One file that came in. `path` is what people are shown: relative to `root`, printable."""

    path: str
    file: Path
    status: str = "waiting"
    reason: str = ""
    labels: dict[str, Any] = field(default_factory=dict)
    """What the manifest or a text beside the video says: caption, domain, events."""


def take_in(source: Path, limits: Limits) -> tuple[Path, list[Source]]:
    """The root and every file, by path. Raises UserError where there is nothing to read."""
    if source.is_dir():
        root = source.resolve()
        found = [_examined(root, file, limits) for file in _walk(root)]
        found = _with_sidecars(found)
    elif source.is_file():
        root = source.parent.resolve()
        found = list(_listed(root, source, limits))
    else:
        raise UserError(f"input not found: {source}; give a folder of videos, or a manifest that lists them")
    if not found:
        raise UserError(f"{source} holds no files; give a folder of videos, or a manifest that lists them")
    return root, sorted(found, key=lambda entry: entry.path)


def printable(path: str | os.PathLike[str]) -> str:
    """A path as text: control characters and bytes that are no text are written as escapes."""

    def escaped(c: str) -> str:
        is_byte = "\udc80" <= c <= "\udcff"  # how Python keeps one that is no text
        return f"\\x{ord(c) - 0xDC00:02x}" if is_byte else ascii(c)[1:-1]

    return "".join(c if c.isprintable() else escaped(c) for c in os.fspath(path))


def _walk(root: Path) -> Iterator[Path]:
    """Every file and link below `root`; linked folders are told, not entered."""
    for folder, folders, files in os.walk(root):
        folders.sort()
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        yield from (Path(folder, name) for name in sorted([*files, *links]))


def _listed(root: Path, manifest: Path, limits: Limits) -> Iterator[Source]:
    seen: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(_rows(manifest), 1):
        where = f"{manifest}, entry {number}"
        name = row.get("path") or row.get("video") if isinstance(row, dict) else None
        if not isinstance(name, str) or not name:
            raise UserError(f"{where}: the key 'path' is missing; give the video's path")
        file = root / name
        entry = _examined(root, Path(os.path.normpath(file)), limits)
        labels = _labels(row, where)
        if entry.path not in seen:
            seen[entry.path] = labels
            yield replace(entry, labels=labels)
        elif seen[entry.path] != labels:
            raise UserError(f"{where}: {entry.path} stands in an entry before, which says other things of it")


def _labels(row: dict[str, Any], where: str) -> dict[str, Any]:
    """What an entry says of its video. Raises UserError for what would be lost."""
    for key in ("start_s", "end_s"):
        if row.get(key):
            raise UserError(f"{where}: {key!r} is not read, for videos are taken whole; cut the video before")
    caption, domain, events = (row.get(key) or "" for key in ("caption", "domain", "events"))
    for key, text in (("caption", caption), ("domain", domain)):
        if not isinstance(text, str):
            raise UserError(f"{where}: {key!r} must be a text, got {text!r}")
    domain = domain.strip()
    if domain and domain.lower() not in DOMAINS:
        raise UserError(f"{where}: unknown domain {domain!r}; one of {', '.join(DOMAINS)}")
    tags = re.split(r"[,;]", events) if isinstance(events, str) else events
    for tag in tags if isinstance(tags, list) else [tags]:
        if not isinstance(tag, str) or tag.strip().lower() not in ("", *EVENTS):
            raise UserError(f"{where}: unknown event {str(tag).strip()!r}; of {', '.join(EVENTS)}")
    tags = [tag.strip() for tag in tags if tag.strip()]
    labels = {"caption": _clean(caption), "domain": domain, "events": tags}
    return {key: value for key, value in labels.items() if value}


def _rows(manifest: Path) -> Iterator[Any]:
    try:
        if manifest.suffix == ".parquet":
            import pyarrow.parquet as pq

            yield from pq.read_table(manifest).to_pylist()
        elif manifest.suffix == ".csv":
            with manifest.open(newline="", encoding=_UTF8) as file:
                yield from csv.DictReader(file)
        else:
            with manifest.open(encoding=_UTF8) as file:
                yield from (json.loads(line) for line in file if line.strip())
    except (ValueError, OSError, csv.Error) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot read the manifest {manifest}: {reason}; give JSON lines, CSV or Parquet with a 'path'"
        ) from None


def _clean(text: str) -> str:
    """A text without halves of characters, which JSON can name and no file can hold."""
    return text.encode(errors="replace").decode()


def _examined(root: Path, file: Path, limits: Limits) -> Source:
    name = printable(file.relative_to(root) if file.is_relative_to(root) else file)
    reason = _refusal(root, file, limits)
    return Source(name, file, "rejected" if reason else "waiting", reason)


def _refusal(root: Path, file: Path, limits: Limits) -> str:
    """Why a file is not opened; empty where it may be."""
    if not file.is_relative_to(root):
        return "outside: the path leads out of the input folder"
    relative = os.fspath(file.relative_to(root))
    if printable(relative) != relative:
        return "name: it holds control characters or is not UTF-8; rename the file"
    try:
        resolved = file.resolve(strict=True)
        kind = os.lstat(file).st_mode
        size = os.stat(file).st_size
    except (OSError, RuntimeError) as error:
        return f"unreadable: {getattr(error, 'strerror', None) or 'a link that leads to itself'}".lower()
    if not resolved.is_relative_to(root):
        return "link: it leads out of the input folder"
    if stat.S_ISLNK(kind) or resolved != file:
        return f"link: it leads to {printable(resolved.relative_to(root))}, which is read by its own name"
    if not stat.S_ISREG(kind):
        return "unreadable: not a regular file"
    if file.suffix.lower() not in FORMATS:
        return f"extension: {file.suffix or 'none'} is not a video's"
    if size == 0:
        return "empty: the file has no bytes"
    if size > limits.file_gb * 1e9:
        return f"large: {size / 1e9:.1f} GB, and the limit is {limits.file_gb:g} GB (limits.file_gb)"
    if not os.access(file, os.R_OK):
        return "unreadable: permission denied"
    return ""


def _with_sidecars(found: list[Source]) -> list[Source]:
    """Videos with the captions that lie beside them; what belongs to a video is told as such."""
    videos = {_stem(entry) for entry in found if entry.status == "waiting"}
    captions: dict[str, str] = {}
    entries = []
    for entry in found:
        named = entry.reason.startswith("extension") and entry.file.suffix.lower() in _SIDECARS
        if named and _stem(entry) in videos:
            entry, caption = _sidecar(entry)
            if caption:
                captions.setdefault(_stem(entry), caption)
        entries.append(entry)
    return [
        replace(entry, labels={"caption": captions[_stem(entry)]})
        if entry.status == "waiting" and _stem(entry) in captions
        else entry
        for entry in entries
    ]


def _sidecar(entry: Source) -> tuple[Source, str]:
    """A file beside a video, told as such, and the caption in it."""
    belongs = replace(entry, status="sidecar", reason="belongs to the video of this name")
    if entry.file.suffix.lower() != ".txt":
        return belongs, ""
    try:
        with entry.file.open(encoding=_UTF8) as file:
            text = file.read(_LONGEST_TEXT + 1)
    except UnicodeDecodeError:
        return replace(belongs, reason=f"{belongs.reason}; not UTF-8, not read"), ""
    except OSError as error:
        return replace(entry, reason=f"unreadable: {(error.strerror or str(error)).lower()}"), ""
    if len(text) > _LONGEST_TEXT:
        return replace(belongs, reason=f"{belongs.reason}; too long, not read"), ""
    return belongs, " ".join(text.split())


def _stem(entry: Source) -> str:
    return entry.path.removesuffix(entry.file.suffix)
