"""What a stage is given: everything was opened by its worker before the fork, nothing is looked up by name.

Invariants:
- A stage closes every descriptor that is not in its context; so end of file on a channel means what it says.
- The arena's mapping is inherited; the stage writes only what its part in the pipeline lets it write.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from hast.channel import Channel
from hast.shm.arena import Arena

# As enum hast_stage_id in hast/ffi/arena.h.
GGATE, DISK, SEND, RECV, SYNC = range(5)
STAGE_NAMES = ("ggate", "disk", "send", "recv", "sync")


@dataclass(frozen=True)
class DiskSettings:
    """How the disk stage does its I/O. engine: "inline", "uring" or "threads"; align in bytes; fd: the component;
    direct: it bypasses the page cache; deletes: clients may ask for DELETE; witness: see hast/pipeline.py, or 0;
    sync_error: the errno of a flush of the component that has failed before, or 0; note: the file that is to say
    so when one fails (hast/boot.py)."""

    fd: int
    engine: str
    align: int
    depth: int = 256
    sync_error: int = 0
    note: Path | None = None
    direct: bool = False
    deletes: bool = True
    witness: int = 0


@dataclass(frozen=True)
class ConnSettings:
    """A connection to the peer, which is two stream sockets: fd_in, where it sends, and fd_out, where it receives.
    version as negotiated; compression and checksum as in hast.conf, for what is sent; timeout in seconds: how long the
    peer may leave us waiting; silence in seconds: how long a primary may be silent; sector in bytes, of a secondary's
    component; max_io in bytes: the largest read or write that a secondary takes; keepalive in seconds: the silence
    after which a primary sends one; foreign: the secondary is FreeBSD's hastd, which has another idea of deletes and
    flushes."""

    fd_in: int
    fd_out: int
    version: int
    compression: str
    checksum: str
    timeout: float
    silence: float = 20.0
    sector: int = 512
    max_io: int = 1 << 20
    keepalive: float = 10.0
    foreign: bool = False


@dataclass(frozen=True)
class StageContext:
    """One stage of one resource.

    resource and role name it in messages and titles; stage is its number (GGATE...); bells are the eventfds of all
    running stages by number; disk is set for the disk stage, and for the one that decides what it is to do (ggate, a
    secondary's recv), which does itself what takes no waiting; conn for recv. lock: the component's
    descriptor, which every stage keeps: its lock says that stages of the last worker still live. serves_device: a block
    device of this machine stands on this stage, so it must not wait for the machine's own memory to be written back.
    keepawake: processors are not to fall asleep while it has work (awake.py).
    """

    resource: str
    role: str
    stage: int
    arena: Arena
    control: Channel
    bells: dict[int, int] = field(default_factory=dict)
    disk: DiskSettings | None = None
    conn: ConnSettings | None = None
    serves_device: bool = False
    keepawake: bool = False
    lock: int = -1

    @property
    def title(self) -> str:
        return f"hastd: {self.resource} ({self.role}): {STAGE_NAMES[self.stage]}"

    def keep_fds(self) -> set[int]:
        """Descriptors that the stage needs, besides 0, 1 and 2."""
        fds = {self.control.fileno(), *self.bells.values()}
        if self.disk is not None:
            fds.add(self.disk.fd)
            if self.disk.witness > 0:
                fds.add(self.disk.witness)
        if self.conn is not None:
            fds |= {self.conn.fd_in, self.conn.fd_out}
        if self.lock >= 0:
            fds.add(self.lock)
        return fds
