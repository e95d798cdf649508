"""A client of QEMU's machine protocol, as much as starting a mirror takes."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

from perf.errors import PerfError

DEADLINE = 60.0


class Qmp:
    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(DEADLINE)
        self.sock.connect(str(path))
        self.lines = self.sock.makefile("r")
        self.lines.readline()  # the greeting
        self.do("qmp_capabilities")

    def __enter__(self) -> Qmp:
        return self

    def __exit__(self, *_: object) -> None:
        self.lines.close()
        self.sock.close()

    def do(self, command: str, **arguments: Any) -> Any:
        """What a command returns; events that come before it are passed over."""
        self.sock.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while line := self.lines.readline():
            answer = json.loads(line)
            if "error" in answer:
                raise PerfError(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]
        raise PerfError(f"{command}: the storage daemon has closed its monitor")


def start_mirror(monitor: Path, device: str, target: str) -> None:
    """Copy all, and from then on write to both before a write is answered (copy-mode write-blocking)."""
    with Qmp(monitor) as qmp:
        names = {"job-id": "mirror", "copy-mode": "write-blocking", "sync": "full"}
        qmp.do("blockdev-mirror", device=device, target=target, **names)
        deadline = time.monotonic() + DEADLINE
        while not any(job["device"] == "mirror" and job["ready"] for job in qmp.do("query-block-jobs")):
            if time.monotonic() > deadline:
                raise PerfError("the mirror is not in sync in time")
            time.sleep(0.05)
