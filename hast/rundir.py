"""The run directory: sockets and mount points of one hastd, and the locks that say whose it is.

Invariants:
- It is a directory of the user that hastd runs as, mode 0700, and no symbolic link.
- Its `hastd.pid` is locked by the one main process that uses it; the directory itself is locked by main, the
  spawner and the workers together. So what a killed hastd left there is touched only after its last process
  is gone, and what a living one has there never.
"""

from __future__ import annotations

import fcntl
import logging
import os
import stat
import time
from pathlib import Path

from hast.errors import PermissionDeniedError, SystemCallError, TemporaryError
from hast.keeper import SOCKET as KEEPER
from hast.pidfile import PidFile

log = logging.getLogger(__name__)

WAIT_SECONDS = 40.0  # for the processes of a hastd that was killed: its spawner has less
POLL_SECONDS = 0.05


class RunDirectory:
    """The run directory of this process, from open() to close()."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.lock = -1  # the descriptor that the whole tree of processes holds
        self._pidfile = PidFile(str(self.path / "hastd.pid"))

    def open(self) -> None:
        """Make it, lock it, wait for the end of a killed predecessor, and remove the sockets that it left.

        Raises PermissionDeniedError, TemporaryError when another hastd uses it, SystemCallError.
        """
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            text = f"cannot use run directory {self.path}: {error.strerror}"
            if self.path.is_symlink():
                text = f"cannot use run directory {self.path}: it is a symbolic link"
            raise SystemCallError(text) from error
        try:
            self._check()
            try:
                self._pidfile.acquire()
            except TemporaryError as error:
                raise TemporaryError(f"run directory {self.path}: {error}; or give it its own 'rundir'") from None
            self._pidfile.write()
            self._lock()
            self._remove_sockets()
        except BaseException:
            self.close()
            raise

    def _check(self) -> None:
        status = os.fstat(self.lock)
        if status.st_uid != os.geteuid():
            raise PermissionDeniedError(
                f"cannot use run directory {self.path}: it belongs to user {status.st_uid}, not {os.geteuid()}"
            )
        if stat.S_IMODE(status.st_mode) != 0o700:
            os.fchmod(self.lock, 0o700)

    def _lock(self) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        said = False
        while True:
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise TemporaryError(
                        f"processes of a hastd that is gone still use run directory {self.path}:"
                        " end them ('hastd: spawner' and its children)"
                    ) from None
            if not said:
                log.warning("waiting for the processes of the last hastd in %s to end", self.path)
                said = True
            time.sleep(POLL_SECONDS)

    def _remove_sockets(self) -> None:
        """Sockets that nobody serves any more, because nobody but us and the keeper (hast/keeper.py) is here."""
        for entry in self.path.iterdir():
            if entry.suffix == ".dev":
                continue  # a FUSE mount: when its server is gone, asking what it is takes as long as there is none
            try:
                is_socket = stat.S_ISSOCK(entry.lstat().st_mode)
            except OSError:
                continue
            if is_socket and entry.name != KEEPER:
                log.debug("removing %s, which the last hastd left", entry)
                entry.unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of it. The directory stays; its sockets are removed by those who made them."""
        self._pidfile.remove()
        if self.lock >= 0:
            os.close(self.lock)
            self.lock = -1
