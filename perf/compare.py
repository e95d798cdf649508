"""The sections that compare systems job by job: components in memory, on a disk, there with O_DIRECT; two at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from fnmatch import fnmatch
from typing import Any

from perf import nodes
from perf.errors import MissingError, PerfError
from perf.fio import JOBS, TWO_JOBS, Job
from perf.measure import System, rounds
from perf.options import Options
from perf.others import OTHERS
from perf.scene import MIB, Scene, scene

DISK_SYSTEMS = ("hast fullsync", "hast memsync", "hast async", "nbdkit", "qemu-nbd", "quorum", "mirror", "file")
TWO_SYSTEMS = ("hast fullsync", "hast memsync", "hast async", "nbdkit", "qemu-nbd", "quorum", "mirror")
DISK_JOBS = tuple(
    job
    for job in JOBS
    if job.fsync or job.name in ("write 128k depth 8", "read 128k depth 8") or " 4k depth 1" in job.name
    or " 4k depth 32" in job.name
)  # fmt: skip


def chosen(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Those that one of the patterns fits; all where there is no pattern."""
    return [name for name in names if not patterns or any(fnmatch(name, pattern) for pattern in patterns)]


def build(names: Sequence[str], place: Scene, stack: ExitStack) -> list[System]:
    """The systems that can run on this machine; of the others it is said why not."""
    systems: list[System] = []
    for group in ([n for n in names if n in nodes.HAST and "fuse" not in n], [n for n in names if "fuse" in n]):
        with said_if_missing(group):
            systems += nodes.build(group, place, stack)
    for name in names:
        if name in OTHERS:
            with said_if_missing([name]):
                systems.append(stack.enter_context(OTHERS[name](place)))
    return systems


class said_if_missing:
    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> bool:
        if isinstance(error, MissingError):
            print(f"left out: {', '.join(self.names)}: {error}", file=sys.stderr, flush=True)
            return True
        return False


def compared(
    options: Options, what: str, all_names: Sequence[str], all_jobs: Sequence[Job], **place: Any
) -> dict[str, Any]:
    names = chosen(all_names, options.systems)
    jobs = [job for job in all_jobs if job.name in chosen([job.name for job in all_jobs], options.jobs)]
    if not names or not jobs:
        raise PerfError(f"{what}: no system or no job is left of what was chosen")
    size = options.size * MIB
    with scene(size, **place) as at, ExitStack() as stack:
        systems = build(names, at, stack)
        samples = rounds(systems, jobs, options.repeats, options.seconds, what)
    return {"size": size, "samples": samples, "units": {job.name: job.unit for job in jobs}}


def memory(options: Options) -> dict[str, Any]:
    return compared(options, "memory", (*nodes.HAST, *OTHERS), JOBS, direct=True)


def disk(options: Options) -> dict[str, Any]:
    return compared(options, "disk", DISK_SYSTEMS, DISK_JOBS, memory=False)


def direct(options: Options) -> dict[str, Any]:
    """nbdkit is left out: its file plugin cannot bypass the page cache."""
    names = [name for name in DISK_SYSTEMS if name != "nbdkit"]
    return compared(options, "direct", names, DISK_JOBS, memory=False, direct=True)


def two(options: Options) -> dict[str, Any]:
    return compared(options, "two", TWO_SYSTEMS, TWO_JOBS, targets=2)
