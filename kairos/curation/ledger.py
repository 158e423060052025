"""What has been done: one SQLite file with a row for each (item, stage, configuration hash).

Only the process that runs the curation writes here, after the files of a result are whole: what the ledger
says is done, is done. A kill between two rows costs the work between them and nothing else.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kairos.data.files import lock
from kairos.errors import MachineError

_TABLES = """
CREATE TABLE IF NOT EXISTS files (path TEXT PRIMARY KEY, stamp TEXT NOT NULL, sha256 TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS done (
    item TEXT NOT NULL, stage TEXT NOT NULL, config TEXT NOT NULL, result TEXT NOT NULL,
    failed INTEGER NOT NULL, seconds REAL NOT NULL, video_s REAL NOT NULL,
    PRIMARY KEY (item, stage, config)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS sources (path TEXT PRIMARY KEY, entry TEXT NOT NULL) WITHOUT ROWID;
"""


class Ledger:
    """The ledger of one output folder; at most one process has it open."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock(folder, f"{folder.parent} is being curated by another process; wait for it")
        self._file = folder / "ledger.sqlite"
        try:
            self._db = sqlite3.connect(self._file)
            self._db.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;" + _TABLES)
        except sqlite3.OperationalError as error:
            self._lock.close()
            raise self._failure("open", error) from None
        except sqlite3.DatabaseError as error:  # what is there is no ledger
            self._lock.close()
            raise MachineError(f"cannot open {self._file}: {error}; delete it to begin anew") from None

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()
        self._lock.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One transaction. Raises MachineError where the disk is full, or fails."""
        try:
            with self._db:
                yield
        except sqlite3.OperationalError as error:
            raise self._failure("write", error) from error

    def _failure(self, doing: str, error: sqlite3.OperationalError) -> MachineError:
        """Of the disk: what the ledger holds is good."""
        full = any(said in str(error) for said in ("full", "disk I/O"))  # of a disk SQLite may say either
        fix = "; free some space, and run the command again" if full else ""
        return MachineError(f"cannot {doing} {self._file}: {error}{fix}")

    def known_hash(self, path: str, stamp: str) -> str | None:
        """The SHA-256 of a file, where it was read before and has not changed since."""
        row = self._db.execute("SELECT sha256 FROM files WHERE path=? AND stamp=?", (path, stamp)).fetchone()
        return row[0] if row else None

    def keep_hash(self, path: str, stamp: str, sha256: str) -> None:
        with self._writing():
            self._db.execute("REPLACE INTO files VALUES (?, ?, ?)", (path, stamp, sha256))

    def result(self, item: str, stage: str, config: str) -> dict[str, Any] | None:
        """What a stage found, also where that is a failure; None where it has not run."""
        row = self._db.execute(
            "SELECT result FROM done WHERE item=? AND stage=? AND config=?", (item, stage, config)
        ).fetchone()
        return json.loads(row[0]) if row else None

    def is_done(self, item: str, stage: str, config: str) -> bool:
        """Whether there is a result that is not a failure. What failed is tried again by the next run."""
        query = "SELECT 1 FROM done WHERE item=? AND stage=? AND config=? AND failed=0"
        return self._db.execute(query, (item, stage, config)).fetchone() is not None

    def keep(
        self,
        item: str,
        config: str,
        results: Mapping[str, Mapping[str, Any]],
        *,
        hashes: Mapping[str, str] = {},
    ) -> None:
        """Write the results of stages on one item, all or none.

        Each result may hold `failed`, `seconds` and `video_s`; the rest is kept as it is. `hashes` gives
        the configuration of each stage where it is not `config`.
        """
        rows = []
        for stage, result in results.items():
            rest = dict(result)
            costs = rest.pop("seconds", 0.0), rest.pop("video_s", 0.0)
            text = json.dumps(rest, sort_keys=True)
            rows.append((item, stage, hashes.get(stage, config), text, int("failed" in rest), *costs))
        with self._writing():
            self._db.executemany("REPLACE INTO done VALUES (?, ?, ?, ?, ?, ?, ?)", rows)

    def replace_sources(self, entries: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
        """Write the list of everything that came in, in the place of the last run's."""
        with self._writing():
            self._db.execute("DELETE FROM sources")
            self._db.executemany(
                "INSERT INTO sources VALUES (?, ?)",
                ((path, json.dumps(entry, sort_keys=True)) for path, entry in entries),
            )

    def sources(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Everything that came in, in the order of its path."""
        for path, entry in self._db.execute("SELECT path, entry FROM sources ORDER BY path"):
            yield path, json.loads(entry)

    def spent(self, stage: str, count: str) -> int:
        """The sum of a number that the results of a stage hold, over all configurations."""
        query = "SELECT SUM(json_extract(result, '$.' || ?)) FROM done WHERE stage=?"
        return int(self._db.execute(query, (count, stage)).fetchone()[0] or 0)

    def throughput(self) -> list[tuple[str, float, float]]:
        """(stage, seconds of a core, seconds of video) over all that is in the ledger."""
        query = (
            "SELECT stage, SUM(seconds), SUM(video_s) FROM done WHERE failed=0 GROUP BY stage ORDER BY stage"
        )
        return [tuple(row) for row in self._db.execute(query)]
