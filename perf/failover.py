"""Failover: from kill -9 of every process of the primary node to the first write that the other node acknowledges.

In between: `hastctl role primary`, the program and its start included, and an NBD client that connects and writes. That
somebody has to notice the death of a node is not in it: that is up to whoever runs hastctl.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import Any

from perf.fio import Figures
from perf.nodes import compare, pair, request
from perf.options import Options
from perf.scene import MIB
from tests.nbdclient import WRITE

BLOCK = 4096
LEAST = 7


def failover(options: Options) -> dict[str, Any]:
    samples: list[Figures] = []
    with pair({"disk": 64 * MIB}) as two:
        active, standby = two.a, two.b
        count = max(LEAST, options.repeats)
        for n in range(count):
            request(active, "disk", WRITE, n * BLOCK, os.urandom(BLOCK))
            pids = active.pids()
            began = time.monotonic()
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            killed = time.monotonic()
            standby.role("primary")
            taken = time.monotonic()
            request(standby, "disk", WRITE, (count + n) * BLOCK, os.urandom(BLOCK))
            ended = time.monotonic()
            samples.append({"seconds": ended - began, "kill": killed - began, "role": taken - killed})
            active.kill()  # whoever is left: nobody
            active.start()
            active.set_role("secondary")
            active, standby = standby, active
            two.wait_in_sync(active)
        compare(two, "disk", active)
    return {"samples": {"failover": samples}}
