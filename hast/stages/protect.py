"""Protects a stage that serves a block device from the memory pressure that it is there to relieve.

The machine writes its dirty memory to our device; so a stage that has to wait for memory waits for itself. Therefore:
no reclaim through file systems for its own allocations, its memory locked, the arena present from the start (the kernel
copies into it also while the stage is being killed), and the last one for the out-of-memory killer to choose.

Nothing of this is needed to work: what is not permitted is logged once and done without.
"""

from __future__ import annotations

import ctypes
import logging
import os
from pathlib import Path

from hast.ffi import _hast
from hast.shm.arena import Arena

log = logging.getLogger(__name__)

PR_SET_IO_FLUSHER = 57
MCL_CURRENT, MCL_FUTURE, MCL_ONFAULT = 1, 2, 4
OOM_SCORE_ADJ = -1000


def protect(resource: str, arena: Arena | None = None) -> list[str]:
    """Protect this process; all of the arena gets its memory now. Returns what could not be done, and why."""
    libc = ctypes.CDLL(None, use_errno=True)
    failed = [
        *_call("PR_SET_IO_FLUSHER", libc.prctl, PR_SET_IO_FLUSHER, 1, 0, 0, 0),
        # Locked as it comes into use: all of Python's libraries at once would be a waste.
        *_call("mlockall", libc.mlockall, MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT),
    ]
    if arena is not None:
        address = int(_hast.ffi.cast("uintptr_t", arena.c))
        # But for the logs of traces, which have memory only while they are used.
        failed += _call("mlock of the arena", libc.mlock, address, int(arena.c.trace_off))
    failed += _spare_from_oom()
    if failed:
        log.warning("%s: not protected from memory shortage: %s", resource, "; ".join(failed))
    return failed


def _call(what: str, function: ctypes._NamedFuncPointer, *arguments: int) -> list[str]:
    # Without a type of its own a number would be passed as an int, and an address does not fit in one.
    if function(*(ctypes.c_ulong(number) for number in arguments)) == 0:
        return []
    return [f"{what}: {os.strerror(ctypes.get_errno())}"]


def _spare_from_oom() -> list[str]:
    try:
        Path("/proc/self/oom_score_adj").write_text(f"{OOM_SCORE_ADJ}\n")
    except OSError as error:
        return [f"oom_score_adj: {error.strerror}"]
    return []
