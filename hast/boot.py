"""Whether a resource may have lost what was only in its disk's cache since it was last known to have all that it had
acknowledged: the machine has started anew, or a flush has failed. And whether its component is out of date, where the
disk does not even take that.

What a secondary has acknowledged and not flushed is lost with its power. Its primary still has it, and its map says
where; until that is copied the secondary must not count as complete, though the counters of both say "in sync".

Invariants:
- In doubt it is lost: that costs a refused promotion, the opposite costs data.
- The disk stage writes LOST into the note when a flush fails, before anybody is told that it has (hast/ffi/disk.h).
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # another one after each start of the kernel
LOST = "lost\n"  # in its place: a flush has failed
# In its place, with the resource's unique ID: the other node does everything alone since, and the disk does not say so.
OUTDATED = "outdated {}\n"


def note(rundir: Path, name: str) -> Path:
    """The file that says in which life of the machine the resource was last whole."""
    return rundir / f"{name}.boot"


def anew(rundir: Path, name: str) -> bool:
    """Whether the cache may have been lost since remember()."""
    try:
        return note(rundir, name).read_text() != BOOT_ID.read_text()
    except OSError:
        return True


def remember(rundir: Path, name: str) -> None:
    """From now on its metadata tell by themselves what it lacks."""
    path = note(rundir, name)
    fresh = path.with_suffix(f".{os.getpid()}")
    try:
        fresh.write_text(BOOT_ID.read_text())
        fresh.replace(path)
    except OSError as error:
        log.debug("%s: cannot write %s: %s", name, path, error.strerror)


def spoil(path: Path) -> None:
    """note() says that a flush has failed: the resource may lack something that its metadata do not tell of."""
    try:
        path.write_text(LOST)
    except OSError:
        forget(path)


def forget(path: Path) -> None:
    """note() says nothing, which is to be in doubt."""
    with contextlib.suppress(OSError):
        path.unlink()


def lost(rundir: Path, name: str) -> bool:
    """Whether a flush is known to have failed since remember()."""
    try:
        return note(rundir, name).read_text() == LOST
    except OSError:
        return False


def outdate(path: Path, resuid: int) -> None:
    """note() says that the component with this ID is out of date everywhere, whatever is on the disk."""
    try:
        path.write_text(OUTDATED.format(resuid))
    except OSError as error:
        log.error("cannot write %s: %s: only the other node knows that this one is out of date", path, error.strerror)
        forget(path)


def outdated(rundir: Path, name: str, resuid: int) -> bool:
    """Whether outdate() was called for this component since remember() and forget()."""
    try:
        return note(rundir, name).read_text() == OUTDATED.format(resuid)
    except OSError:
        return False
