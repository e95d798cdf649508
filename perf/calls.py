"""System calls per request, counted by strace in runs of their own, whose speed means nothing."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Any

from perf import fio
from perf.compare import build, chosen
from perf.errors import need
from perf.measure import fill
from perf.nodes import DEGRADED, HAST
from perf.options import Options
from perf.procstat import counted
from perf.scene import MIB, scene

SYSTEMS = (*(name for name in HAST if name != f"hast fuse {DEGRADED}"), "nbdkit", "qemu-nbd", "quorum", "mirror")
JOBS = tuple(job for job in fio.JOBS if job.name.startswith("rand") and job.bs == "4k" and job.depth in (1, 32))
REQUESTS = {1: 2000, 32: 20000}
TOP = 8


def calls(options: Options) -> dict[str, Any]:
    need("strace")
    size = min(options.size, 128) * MIB
    found: dict[str, dict[str, dict[str, float]]] = {}
    with scene(size) as place, ExitStack() as stack:
        systems = build(chosen(SYSTEMS, options.systems), place, stack)
        fill(systems)
        for job in JOBS:
            if job.fsync or job.name not in chosen([job.name], options.jobs):
                continue
            for system in systems:
                with counted(system.pids()) as made:
                    requests = fio.run(list(system.targets), job, size, requests=REQUESTS[job.depth])["requests"]
                most = sorted(made, key=lambda name: -made[name])[:TOP]
                by_call = {name: made[name] / requests for name in most}
                found.setdefault(job.name, {})[system.name] = {"all": sum(made.values()) / requests} | by_call
                print(f"calls: {job.name}, {system.name}", file=sys.stderr, flush=True)
    return {"calls": found}
