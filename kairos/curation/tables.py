"""What goes out beside the shards: the manifest, the sources and clips.jsonl, each whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from kairos.data.files import whole_file
from kairos.errors import UserError

Row = Mapping[str, Any]

HIDDEN = ("strip", "moments", "changes", "colors", "embedding", "failed")
"""What stages give for other stages and for the report, not for people."""

_FIRST = {
    "clip_id": "string",
    "source": "string",
    "start_s": "double",
    "end_s": "double",
    "frames": "int64",
    "height": "int64",
    "width": "int64",
    "fps": "double",
    "shot": "int64",
    "source_height": "int64",
    "source_width": "int64",
    "source_fps": "double",
}
FACTS = tuple(name for name, kind in _FIRST.items() if kind != "string")
"""The numbers that a clip has without any stage."""
_LAST = {"duplicate_of": "string", "kept": "bool", "reason": "string"}
_SOURCES = {
    "path": "string",
    "status": "string",
    "reason": "string",
    "duration_s": "double",
    "clips": "int64",
    "clips_kept": "int64",
    "sha256": "string",
}
TEXTS = ("domain", "events", "caption", "text", "physics_caption")
_GROUP = 1024  # rows that are in memory at once


def write_manifest(path: Path, rows: Iterable[Row], scores: Iterable[str]) -> None:
    """A row a clip. `events` is a text, its tags with commas between them."""
    columns = _FIRST | {name: "string" if name in TEXTS else "double" for name in scores} | _LAST
    _write_parquet(path, (row | {"events": ", ".join(row.get("events") or ())} for row in rows), columns)  # type: ignore[operator]


def write_sources(path: Path, rows: Iterable[Row]) -> None:
    """A row for every file that came in."""
    _write_parquet(path, rows, _SOURCES)


def write_lines(path: Path, rows: Iterable[Row]) -> None:
    """A JSON object a line."""
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of the manifest or of the sources, a group at a time. Raises UserError without the file."""
    import pyarrow.parquet as pq

    if not path.is_file():
        raise UserError(f"{path} is missing; run `kairos curate run` with this output, to its end")
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(_GROUP):
            yield from batch.to_pylist()


def _write_parquet(path: Path, rows: Iterable[Row], columns: Mapping[str, str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"string": pa.string(), "double": pa.float64(), "int64": pa.int64(), "bool": pa.bool_()}
    schema = pa.schema([(name, kinds[kind]) for name, kind in columns.items()])
    # Cut down one by one: what is hidden, such as a strip of pictures, is most of a row.
    waiting = ({name: _cell(row.get(name), kind) for name, kind in columns.items()} for row in rows)
    with whole_file(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        while group := list(islice(waiting, _GROUP)):
            writer.write_table(pa.Table.from_pylist(group, schema=schema))


def _cell(value: Any, kind: str) -> Any:
    return float(value) if kind == "double" and value is not None else value
