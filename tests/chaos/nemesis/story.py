"""What a hunt tells: who did what when, as a short story; and what is kept of one that ended badly.

Invariants:
- A line is told when the thing is about to be done, so that the last line is about what did not come to its end.
- What is kept is enough to do the same again (--replay), to read the logs beside it, and never overwrites another one.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.e2e.node import Node


class ViolationError(Exception):
    """Something happened that must not happen."""


class Story:
    """The lines of one session, with seconds since its start, and the faults by kind over all sessions."""

    def __init__(self, title: str, counts: Counter[str], loud: bool = False) -> None:
        self.title = title
        self.counts = counts
        self.loud = loud
        self.began = time.monotonic()
        self.lines: list[str] = []
        self.tell(title + time.strftime(", began %H:%M:%S"))

    def tell(self, text: str) -> None:
        line = f"{time.monotonic() - self.began:8.2f}  {text}"
        self.lines.append(line)
        if self.loud:
            print(line, file=sys.stderr, flush=True)

    def take_back(self) -> None:
        """The last line was about something that was not done."""
        self.lines.pop()

    def short(self, last: int = 60) -> str:
        """The end of it, which is what matters."""
        skipped = [f"          ... {len(self.lines) - last} lines before"] if len(self.lines) > last else []
        return "\n".join([*self.lines[:2], *skipped, *self.lines[max(2, len(self.lines) - last) :]])


def keep(story: Story, place: Path, nodes: Sequence[Node], facts: dict[str, Any], complaint: str) -> Path:
    """Write the story, logs, events and metadata blocks to a new directory below `place`."""
    stem = facts["replay"].replace("/", "-")
    number = next(n for n in range(1 << 20) if not (place / f"{stem}.{n}").exists())
    directory = place / f"{stem}.{number}"
    directory.mkdir(parents=True)
    (directory / "story").write_text("\n".join([*story.lines, "", complaint, ""]))
    (directory / "history.json").write_text(json.dumps(facts | {"complaint": complaint}, indent=1) + "\n")
    for node in nodes:
        for name in ("hastd.log", "events", "hast.conf"):
            if (node.directory / name).exists():
                shutil.copy(node.directory / name, directory / f"{node.node}.{name}")
        with (node.disks[0].backing if node.disks else node.component()).open("rb") as component:
            (directory / f"{node.node}.metadata").write_bytes(component.read(64 << 10))
    return directory


def table(counts: Counter[str]) -> str:
    """How many faults of each kind."""
    width = max(map(len, counts), default=0)
    return "\n".join(f"  {kind:{width}} {count:5}" for kind, count in sorted(counts.items()))
