"""A disk that records and fails (tests/native/faultdisk.c), to be the local component of a node.

    with FaultDisk.under(node) as disk:         # the component's file is now this disk; before hastd is started
        node.primary()
        disk.fail("write", errno.EIO, count=3)

Invariants:
- close() leaves neither process nor mount, whatever state the disk and its users are in: it is unmounted by force,
  and what still waits for it gets an error. Closing a node closes its disks; they are healed before hastd has to end.
- Nothing here waits for the disk itself, only for the process that serves it, and with a deadline.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hast.device import mounts
from tests import tools
from tests.shm.native import NATIVE, ROOT, compile_native

if TYPE_CHECKING:
    from tests.e2e.node import Node

READ, WRITE, FLUSH, DELETE = range(4)
DEADLINE = 30.0  # seconds: for the process to answer or to end
ENTRY = struct.Struct("=IIiIQQQQQ")
ENTRY_MAGIC = 0x4B534446
PR_SET_PDEATHSIG = 1
PRCTL = ctypes.CDLL(None).prctl


def missing() -> str | None:
    """Why there can be no such disk here; None when there can."""
    if os.geteuid() != 0:
        return "a fault disk needs root, to mount it"
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"a fault disk needs /dev/fuse: {error.strerror}"
    return None


def need() -> None:
    """Skip the test where there can be no fault disk."""
    if reason := missing():
        pytest.skip(reason)
    tools.need("cc")


def program() -> Path:
    """The compiled program; made once for each version of its sources, also by several test processes at a time."""
    text = b"".join(path.read_bytes() for path in sorted(NATIVE.glob("faultdisk*.[ch]")))
    digest = hashlib.sha256(text).hexdigest()[:16]
    path = ROOT / ".build" / "native" / f"faultdisk-{digest}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}")
        compile_native(fresh, sorted(NATIVE.glob("faultdisk*.c")), "-O1")
        fresh.replace(path)
    return path


@dataclass(frozen=True)
class Stats:
    """How many operations of each kind were begun; how many of them failed; how many wait in a hang."""

    reads: int
    writes: int
    flushes: int
    deletes: int
    failed: int
    waiting: int


@dataclass(frozen=True)
class Entry:
    """One mutation or flush of a recording. Stamps are time.monotonic_ns()'s. `stored`: bytes that reached the disk,
    all of them unless error is set; data: those of a write, empty for a delete, which stores zeros."""

    kind: int
    error: int
    begin: int
    end: int
    offset: int
    length: int
    stored: int
    data: bytes


def entries(log: Path) -> Iterator[Entry]:
    """The entries of a recording, in the order of their completion. One that is not complete ends it."""
    with log.open("rb") as file:
        while len(head := file.read(ENTRY.size)) == ENTRY.size:
            magic, kind, error, _mode, begin, end, offset, length, stored = ENTRY.unpack(head)
            assert magic == ENTRY_MAGIC, f"{log} is not a recording"
            data = file.read(stored) if kind == WRITE else b""
            if kind == WRITE and len(data) < stored:
                return
            yield Entry(kind, error, begin, end, offset, length, stored, data)


class FaultDisk:
    """The content of the file `backing` as the file `point`, which is made where it is missing.

    Kinds of operations are named as in the program: "read", "write", "flush", "delete", several with commas, or "all".
    """

    def __init__(self, point: Path, backing: Path) -> None:
        need()
        self.point = point.absolute()
        self.backing = backing.absolute()
        self._directory = Path(tempfile.mkdtemp(prefix="hast-test-disk-"))
        self._socket = self._directory / "control"
        self._errors = self._directory / "stderr"
        self._process: subprocess.Popen[str] | None = None
        self.start()

    @classmethod
    def under(cls, node: Node, resource: str = "disk") -> FaultDisk:
        """A fault disk in the place of a node's component, with its content. The node must not have it open. It is
        closed with the node."""
        need()
        component = node.component(resource)
        backing = component.with_name(f"{component.name}.backing")
        component.rename(backing)
        disk = cls(component, backing)
        node.disks.append(disk)
        return disk

    def start(self) -> None:
        """Mount it (again, after die() or unplug())."""
        assert self._process is None
        self.point.touch()
        self._socket.unlink(missing_ok=True)
        with self._errors.open("ab") as errors:
            self._process = subprocess.Popen(
                [program(), self.backing, self.point, self._socket],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                preexec_fn=lambda: PRCTL(PR_SET_PDEATHSIG, signal.SIGTERM),
            )
        assert self._process.stdout is not None
        said = self._process.stdout.readline()
        if said != "ready\n":
            self.close()
            raise AssertionError(f"the fault disk {self.point} does not start: {self._errors_text()}")

    def _errors_text(self) -> str:
        return self._errors.read_text(errors="replace") if self._errors.exists() else ""

    def __enter__(self) -> FaultDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- commands ----

    def command(self, line: str) -> str:
        """What the program answers after "ok". AssertionError when it refuses."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(DEADLINE)
            sock.connect(str(self._socket))
            sock.sendall(line.encode() + b"\n")
            answer = sock.makefile().readline()
        assert answer.startswith("ok"), f"fault disk: {line}: {answer}{self._errors_text()}"
        return answer[2:].strip()

    def record(self, log: Path | None) -> None:
        """Record every mutation and flush from now on (None: no more); see entries()."""
        self.command(f"record {'off' if log is None else log.absolute()}")

    def fail(
        self,
        kinds: str,
        error: int,
        count: int | None = None,
        within: tuple[int, int] | None = None,
        half: bool = False,
        lose: bool = False,
    ) -> None:
        """The next `count` (else all) operations of these kinds fail with that errno, those that touch the bytes
        `within` (else all; a flush has none). half: the first half of a write is done, in whole sectors. lose: a flush
        loses some of what was written before it and since cache(), and not flushed."""
        line = f"fail {kinds} {error}"
        line += f" count {count}" if count is not None else ""
        line += f" range {within[0]} {within[1]}" if within is not None else ""
        self.command(line + (" half" if half else "") + (" lose" if lose else ""))

    def cache(self, seed: int) -> None:
        """Remember from now on what is written and not flushed; the seed is that of what is lost, see fail()."""
        self.command(f"cache {seed}")

    def delay(self, kinds: str, milliseconds: int) -> None:
        """Each operation of these kinds takes that much longer; 0: no longer."""
        self.command(f"delay {kinds} {milliseconds}")

    def hang(self, kinds: str = "all") -> None:
        """Operations of these kinds wait, until release() or heal()."""
        self.command(f"hang {kinds}")

    def release(self) -> None:
        """What hangs goes on."""
        self.command("release")

    def full(self) -> None:
        """Writes fail with ENOSPC."""
        self.command("full")

    def readonly(self) -> None:
        """Writes and deletes fail with EROFS, and so does opening for writing."""
        self.command("readonly")

    def heal(self) -> None:
        """No fault any more. Nothing for a disk that has died."""
        if self.alive:
            self.command("heal")

    def stats(self) -> Stats:
        return Stats(*map(int, self.command("stats").split()))

    # ---- its end ----

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def die(self) -> None:
        """The disk is gone in the middle of everything: whoever uses it gets errors. start() brings it back; until
        it is opened anew it is not used again."""
        process = self._process
        assert process is not None
        with contextlib.suppress(AssertionError, OSError):
            self.command("die")
        process.wait(DEADLINE)
        self._unmount()
        self._reap()

    def close(self) -> None:
        """Unmount it and end the process, by force. May be called again."""
        # First the abort: after it nobody waits for the disk in the kernel, and the process can end in peace.
        self._unmount()
        self._reap()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _unmount(self) -> None:
        for flags in (mounts.MNT_FORCE, mounts.MNT_DETACH):
            with contextlib.suppress(OSError):  # busy, or not mounted
                mounts.umount(self.point, flags)

    def _reap(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(DEADLINE)
        if process.stdout is not None:
            process.stdout.close()
