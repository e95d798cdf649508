"""The pidfile: it names hastd's main process, and its lock says that the process lives.

Invariants:
- The lock (flock) belongs to the open file, which survives daemonising and is closed in every child, so it
  is held exactly as long as the main process lives, however it ends.
- A file that is locked is never unlinked by somebody else; one that was replaced meanwhile is not ours.
"""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path

from hast.errors import SystemCallError, TemporaryError


class PidFile:
    """A pidfile, locked from acquire() to remove() or the end of the process."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.fd = -1

    def acquire(self) -> None:
        """Create and lock the file.

        Raises TemporaryError, which names the process that has it, and SystemCallError.
        """
        while self.fd < 0:
            fd = self._open()
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pid = _read_pid(fd)
                os.close(fd)
                who = f"process {pid}" if pid else "a process that is just starting"
                raise TemporaryError(
                    f"another hastd is running: {who} holds the pidfile {self.path};"
                    " stop it, or give this one another pidfile (-P)"
                ) from None
            except OSError as error:
                os.close(fd)
                raise SystemCallError(f"cannot lock pidfile {self.path}: {error.strerror}") from error
            if self._is_current(fd):
                self.fd = fd
            else:  # its owner ended, and unlinked it, between our open and our lock
                os.close(fd)

    def write(self) -> None:
        """Put this process' id in. Raises SystemCallError."""
        try:
            os.ftruncate(self.fd, 0)
            os.pwrite(self.fd, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            raise SystemCallError(f"cannot write pidfile {self.path}: {error.strerror}") from error

    def remove(self) -> None:
        """Unlink the file, if it is still ours, and let go of the lock. Never raises."""
        if self.fd < 0:
            return
        if self._is_current(self.fd):
            try:
                Path(self.path).unlink()
            except OSError:
                pass  # the directory is gone or read-only: without its lock the file means nothing
        self.close()

    def close(self) -> None:
        """Close the file without unlinking it: in a process that hands its place over."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _open(self) -> int:
        try:
            # O_NONBLOCK: opening a FIFO must not wait.
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            fd = os.open(self.path, flags, 0o644)
        except OSError as error:
            raise SystemCallError(f"cannot open pidfile {self.path}: {error.strerror}") from error
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise SystemCallError(f"cannot use pidfile {self.path}: it is not a regular file")
        return fd

    def _is_current(self, fd: int) -> bool:
        """Whether the path still leads to the file that fd has open."""
        mine = os.fstat(fd)
        try:
            there = Path(self.path).lstat()
        except OSError:
            return False
        return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)


def _read_pid(fd: int) -> int | None:
    """The process id that a pidfile holds, None when there is none (yet)."""
    try:
        text = os.pread(fd, 32, 0).strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
