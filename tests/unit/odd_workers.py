"""Workers that do what the name of their resource says, for workforce.py."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

from hast.channel import Channel
from hast.config import Resource
from hast.errors import DiskError, NoInputError, UnavailableError
from hast.promotion import target_text

ORPHAN_SECONDS = 0.7
SLOW_SECONDS = 1.5
NOTE_SECONDS = 0.3


def run(channel: Channel, resource: Resource, role: str, rundir: Path) -> int:
    """Say that it is ready, answer, end when told; or misbehave as the name wants it to."""
    what = resource.name.partition("-")[0]
    if what == "fail":
        raise NoInputError(f"{resource.name}: component {resource.localpath} does not exist")
    if what == "ill" and (rundir / "ill").exists():
        raise DiskError(f"{resource.name}: component {resource.localpath} cannot be read")
    if what == "talker":
        while (received := channel.recv(timeout=60)) is not None and received[0]["cmd"] != "stop":
            pass
        for _ in range(50):
            channel.send({"event": "nothing of interest"})
        raise NoInputError(f"{resource.name}: component {resource.localpath} does not exist")
    if what == "crash":
        raise RuntimeError("a defect")
    if what == "holder" and role == "primary":  # there is a block device, and it dies before it serves that
        channel.send({"event": "device", "device": {"mount": "/nowhere"}}, (os.open("/dev/null", os.O_RDWR),))
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if what == "held":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGUSR1, lambda *_: (time.sleep(NOTE_SECONDS), os._exit(os.EX_OK)))
    if what == "orphan" and os.fork() == 0:
        time.sleep(ORPHAN_SECONDS)  # a stage that takes its time to die
        os._exit(0)
    if what == "target" and role == "primary":
        raise UnavailableError(target_text(resource.name))
    if what == "late":
        while (received := channel.recv(timeout=60)) is not None and received[0]["cmd"] != "stop":
            pass
        return os.EX_OK
    channel.send({"event": "ready", "device": None, "nbd": json.dumps(surroundings(resource, role, rundir))})
    if what == "orphan":
        os.kill(os.getpid(), signal.SIGKILL)
    if what in ("silent", "stubborn", "held"):
        time.sleep(1000)
    dirty = 42
    while True:
        received = channel.recv()
        if what == "slow" and received is not None and received[0]["cmd"] == "stop":
            time.sleep(SLOW_SECONDS)
        if received is None or received[0]["cmd"] == "stop":
            return os.EX_TEMPFAIL if what == "temporary" else os.EX_OK
        if received[0]["cmd"] == "start" or what == "target":
            continue
        if received[0]["cmd"] == "reload":
            dirty = received[0]["resource"]["syncrate"]
            continue
        if what == "garbage":
            channel.send({"event": "status", "id": "x", "status": 7})
            channel.send({"event": "hook", "args": 3})
            channel.send({"event": "failed", "exit_code": "many"})
            channel.send({"nothing": True})
        channel.send({"event": "status", "id": received[0]["id"], "status": {"dirty": dirty, "status": "complete"}})


def surroundings(resource: Resource, role: str, rundir: Path) -> dict[str, object]:
    """What a worker finds itself with."""
    links = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            links[entry.name] = str(entry.readlink())
        except FileNotFoundError:
            continue  # that of iterdir itself
    return {
        "pid": os.getpid(),
        "title": Path("/proc/self/cmdline").read_bytes().rstrip(b"\0").decode(),
        "fds": links,
        "remote": str(resource.remote),
        "role": role,
        "rundir": str(rundir),
        "sigterm": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
    }
