"""What can be chosen for a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    repeats: int = 5
    seconds: float = 2.0  # for each run of a job
    size: int = 512  # MiB of each component of the comparisons
    resync_size: int = 4096  # MiB of the component that is synchronised
    resources: int = 32  # of the node whose idle cost is measured
    idle: float = 10.0  # seconds for that
    systems: tuple[str, ...] = ()  # patterns; none: all
    jobs: tuple[str, ...] = ()
