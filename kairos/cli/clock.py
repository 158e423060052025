"""Where the time of a command went, stage by stage."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.table import Table


class Clock:
    """Adds up the seconds of named stages. Time inside a nested stage counts for that one only."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        self._running: list[str] = []
        self._since = self._start = time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def enter(self, name: str) -> None:
        self._credit()
        self._running.append(name)
        self.seconds.setdefault(name, 0.0)
        self.calls[name] = self.calls.get(name, 0) + 1

    def leave(self) -> None:
        self._credit()
        self._running.pop()

    def watch(self, module: Any, name: str, synchronize: Any = None) -> None:
        """Count the time in a torch module's forward as the stage `name`."""

        def before(*_: Any) -> None:
            if synchronize:
                synchronize()
            self.enter(name)

        def after(*_: Any) -> None:
            if synchronize:
                synchronize()
            self.leave()

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    def table(self) -> Table:
        """Stages with their seconds and share, the rest as `other`, the total below."""
        total = time.perf_counter() - self._start
        table = Table(box=None, pad_edge=False)
        for title in ("stage", "calls", "seconds", "share"):
            table.add_column(title, justify="left" if title == "stage" else "right")
        other = max(0.0, total - sum(self.seconds.values()))
        for name, seconds in [*self.seconds.items(), ("other", other)]:
            table.add_row(name, str(self.calls.get(name, "")), f"{seconds:.2f}", f"{seconds / total:.0%}")
        table.add_row("total", "", f"{total:.2f}", "", style="bold")
        return table

    def _credit(self) -> None:
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now
