"""A doorbell of shared memory (hast/ffi/doorbell.h) as tests and tools see it.

Invariants:
- The consumer announces, looks at all its rings once more, and only then waits or cancels.
- The producer pushes first and rings then; the successor of one that died forces before anything else.
"""

from __future__ import annotations

import errno
import mmap
import os
import select
from typing import Any

from hast.errors import SystemCallError
from hast.ffi import _hast

ffi, lib = _hast.ffi, _hast.lib


class Doorbell:
    """One doorbell: of an arena (Doorbell(arena.bell(n), efd)) or in memory of its own (Doorbell.create()).

    efd: the non-blocking eventfd that is waited for, the caller's; -1 for a futex.
    """

    def __init__(self, c: Any, efd: int = -1, owner: object = None) -> None:
        self.c = c  # struct hast_doorbell *
        self.efd = efd
        self._owner = owner  # what keeps the memory

    @classmethod
    def create(cls, efd: int = -1) -> Doorbell:
        """A doorbell in new memory that children made by fork share."""
        memory = ffi.from_buffer(mmap.mmap(-1, ffi.sizeof("struct hast_doorbell")))
        bell = cls(ffi.cast("struct hast_doorbell *", memory), efd, memory)
        lib.hast_doorbell_init(bell.c)
        return bell

    @property
    def wakes(self) -> int:
        """System calls that were made to wake the consumer."""
        return int(self.c.wakes)

    def announce(self) -> None:
        """Says that the consumer is about to wait."""
        lib.hast_doorbell_announce(self.c)

    def cancel(self) -> None:
        """Says that it will not."""
        lib.hast_doorbell_cancel(self.c)

    def wait(self, timeout: float) -> bool:
        """Waits, after announce(), until rung or for so many seconds; whether it was rung (or may have been).

        A signal ends the wait too. Raises SystemCallError.
        """
        timeout_ms = int(timeout * 1000)
        if self.efd >= 0:
            return self._poll(timeout_ms)
        result = lib.hast_doorbell_wait(self.c, timeout_ms)
        if result == -errno.EINTR:
            return True  # the announcement ended with the wait: the rings have to be looked at again
        self._check(min(result, 0), "wait at")
        return bool(result == 0)

    def ring(self) -> None:
        """Wakes the consumer when it waits or is about to. Raises SystemCallError."""
        self._check(lib.hast_doorbell_ring_out(self.c, self.efd), "ring")

    def force(self) -> None:
        """Wakes the consumer whatever it does. Raises SystemCallError."""
        self._check(lib.hast_doorbell_force(self.c, self.efd), "ring")

    def _poll(self, timeout_ms: int) -> bool:
        """The eventfd's wait. A ring that came before the announcement's end is drained with it."""
        poller = select.poll()
        poller.register(self.efd, select.POLLIN)
        ready = poller.poll(timeout_ms)
        self.cancel()
        self._check(lib.hast_doorbell_drain(self.efd), "drain")
        return bool(ready)

    def _check(self, result: int, what: str) -> None:
        if result < 0:
            raise SystemCallError(f"cannot {what} a doorbell of shared memory: {os.strerror(-result)}")
