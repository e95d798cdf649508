"""How long each target has run, and what came of it: a small JSON file that is added to.

Invariant: two runners that add at the same time lose nothing.
"""

from __future__ import annotations

import datetime
import fcntl
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

KEYS = ("cpu_seconds", "wall_seconds", "executions", "crashes")


@dataclass(frozen=True)
class Run:
    """One run of one target. Seconds; cpu: of the process and its children."""

    target: str
    wall: float
    cpu: float
    executions: int
    crashes: int


def count(totals: dict[str, dict[str, float]], run: Run) -> None:
    """Add a run to totals."""
    total = totals.setdefault(run.target, dict.fromkeys(KEYS, 0))
    for key, value in zip(KEYS, (run.cpu, run.wall, run.executions, run.crashes), strict=True):
        total[key] = round(total[key] + value, 1)


def add(path: Path, runs: Iterable[Run]) -> dict[str, dict[str, float]]:
    """Add to the file, which is made when it is not there. The totals by target."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        text = file.read()
        targets: dict[str, dict[str, float]] = json.loads(text)["targets"] if text.strip() else {}
        for run in runs:
            count(targets, run)
        until = datetime.datetime.now(datetime.UTC).date().isoformat()
        file.seek(0)
        file.truncate()
        file.write(json.dumps({"until": until, "targets": dict(sorted(targets.items()))}, indent=1) + "\n")
    return targets


def table(totals: dict[str, dict[str, float]]) -> str:
    """Totals for people."""
    lines = [f"{'target':<22}{'CPU s':>9}{'wall s':>9}{'executions':>14}{'crashes':>9}"]
    for name, total in sorted(totals.items()):
        cpu, wall = total["cpu_seconds"], total["wall_seconds"]
        lines.append(f"{name:<22}{cpu:>9.0f}{wall:>9.0f}{total['executions']:>14.0f}{total['crashes']:>9.0f}")
    return "\n".join(lines)
