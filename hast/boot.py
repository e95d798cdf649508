"""Whether a resource may have lost what was only in its disk's cache since it was last known to have all that it had
acknowledged: the machine has started anew, or a flush has failed. And, in a file of its own, whether its component is
out of date, where the disk does not even take that.

What a secondary has acknowledged and not flushed is lost with its power. Its primary still has it, and its map says
where; until that is copied the secondary must not count as complete, though the counters of both say "in sync".

Invariants:
- In doubt it is lost: that costs a refused promotion, the opposite costs data.
- The disk stage writes LOST into the note when a flush fails, before anybody is told that it has (hast/ffi/disk.h). It
  may do so at any time: what must not be lost by that is not in the same file.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # another one after each start of the kernel
LOST = "lost\n"  # in its place: a flush has failed


def note(rundir: Path, name: str) -> Path:
    """The file that says in which life of the machine the resource was last whole."""
    return rundir / f"{name}.boot"


def outdated_note(rundir: Path, name: str) -> Path:
    """The file that is there while the other node does everything, and this one's disk does not say so. It holds the
    resource's unique ID: a component that is made anew is another one."""
    return rundir / f"{name}.outdated"


def anew(rundir: Path, name: str) -> bool:
    """Whether the cache may have been lost since remember(), or the whole component is out of date."""
    if outdated_note(rundir, name).exists():
        return True
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
    forget(outdated_note(rundir, name))


def spoil(path: Path) -> None:
    """note() says that a flush has failed: the resource may lack something that its metadata do not tell of."""
    try:
        path.write_text(LOST)
    except OSError:
        forget(path)


def forget(path: Path) -> None:
    """A note says nothing any more; of note(), that is to be in doubt."""
    with contextlib.suppress(OSError):
        path.unlink()


def lost(rundir: Path, name: str) -> bool:
    """Whether a flush is known to have failed since remember()."""
    try:
        return note(rundir, name).read_text() == LOST
    except OSError:
        return False


def outdate(rundir: Path, name: str, resuid: int) -> None:
    """The component with this ID is out of date everywhere, whatever is on the disk, until remember()."""
    path = outdated_note(rundir, name)
    try:
        path.write_text(str(resuid))
    except OSError as error:
        log.error("cannot write %s: %s: only the other node knows that this one is out of date", path, error.strerror)


def outdated(rundir: Path, name: str, resuid: int) -> bool:
    """Whether outdate() was called for this component since remember()."""
    try:
        return outdated_note(rundir, name).read_text() == str(resuid)
    except OSError:
        return False
