"""Training shards: webdataset tars of `KEY.mp4` and `KEY.json`, in folders named FRAMESxHEIGHTxWIDTH.

The same clips give the same bytes. A shard is written whole or not at all; one that would not change is
left alone, one that is no longer wanted is removed. The index holds no digest that its shard may not have.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kairos.curation.source import clip_file
from kairos.data.files import prepare_folder, whole_file, write_atomically

INDEX = "index.json"


def write_shards(
    folder: Path, clips: Path, rows: Iterable[Mapping[str, Any]], clips_per_shard: int
) -> dict[str, str]:
    """Bring the shards up to date with the kept clips. Returns {clip_id: its shard, within `folder`}."""
    prepare_folder(folder)
    buckets: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for row in rows:
        text = json.dumps(row, sort_keys=True, ensure_ascii=False)
        buckets[f"{row['frames']}x{row['height']}x{row['width']}"].append((row["clip_id"], text))
    index: dict[str, dict[str, Any]] = {}
    parts: dict[str, list[tuple[str, str]]] = {}
    homes: dict[str, str] = {}
    for bucket, members in sorted(buckets.items()):
        members.sort()
        for number, start in enumerate(range(0, len(members), clips_per_shard)):
            part = members[start : start + clips_per_shard]
            name = f"{bucket}/{number:06d}.tar"
            digest = hashlib.sha256("\n".join(f"{key} {text}" for key, text in part).encode()).hexdigest()
            index[name] = {"clips": len(part), "digest": digest}
            parts[name] = part
            homes |= {key: name for key, _ in part}
    before = _index(folder)
    same = {
        name: entry
        for name, entry in index.items()
        if before.get(name) == entry and (folder / name).is_file()
    }
    # Forgotten before they are written anew: after a kill between the two nobody takes them for the old ones.
    _write_index(folder, same)
    for name, part in parts.items():
        if name not in same:
            _write_tar(folder / name, clips, part)
    for stale in sorted(folder.glob("*/*.tar")):
        own = re.fullmatch(r"\d+x\d+x\d+", stale.parent.name)
        if own and stale.relative_to(folder).as_posix() not in index:
            stale.unlink()
            if not any(stale.parent.iterdir()):
                stale.parent.rmdir()
    _write_index(folder, index)
    return homes


def _index(folder: Path) -> dict[str, dict[str, Any]]:
    try:
        found: dict[str, dict[str, Any]] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        return found
    except (FileNotFoundError, ValueError):
        return {}


def _write_index(folder: Path, index: Mapping[str, Mapping[str, Any]]) -> None:
    write_atomically(folder / INDEX, (json.dumps(index, indent=1) + "\n").encode())


def _write_tar(path: Path, clips: Path, members: list[tuple[str, str]]) -> None:
    import webdataset

    prepare_folder(path.parent)
    with (
        whole_file(path) as temporary,
        webdataset.TarWriter(str(temporary), encoder=False, mtime=0.0, user="kairos", group="kairos") as tar,
    ):
        for key, text in members:
            tar.write({"__key__": key, "mp4": clip_file(clips, key).read_bytes(), "json": text.encode()})
