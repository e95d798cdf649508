"""Whether a resource may have lost what was only in its disk's cache since it was last known to have all that it had
acknowledged: the machine has started anew, or a flush has failed. And, in a file of its own, whether its component is
out of date, where the disk does not even take that; and in a third what its metadata are, once it is given up.

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

from hast.errors import DataError
from hast.metadata import Metadata, unpack

log = logging.getLogger(__name__)

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # another one after each start of the kernel
OUTDATED, TARGET = "outdated", "target"
LOST = "lost\n"  # in its place: a flush has failed


def note(rundir: Path, name: str) -> Path:
    """The file that says in which life of the machine the resource was last whole."""
    return rundir / f"{name}.boot"


def outdated_note(rundir: Path, name: str) -> Path:
    """The file that is there while this component is not fit to be used, and its disk does not say so. It holds the
    resource's unique ID, because a component that is made anew is another one, and why."""
    return rundir / f"{name}.outdated"


def detached_note(rundir: Path, name: str) -> Path:
    """The file that holds the metadata block of a component that its primary has given up: all is done by the other
    node, and the next worker can go on with that, whatever the disk does by then."""
    return rundir / f"{name}.detached"


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
    try:
        _replace(path, BOOT_ID.read_bytes())
    except OSError as error:
        log.debug("%s: cannot write %s: %s", name, path, error.strerror)
        forget(path)  # what it says is of before
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


def outdate(rundir: Path, name: str, resuid: int, word: str = OUTDATED) -> None:
    """The component with this ID is not fit to be used, whatever is on the disk, until remember(). word: OUTDATED, the
    other node has everything; TARGET, this one lacks something, and nobody knows whether the other one has it."""
    path = outdated_note(rundir, name)
    try:
        _replace(path, f"{resuid} {word}".encode())
    except OSError as error:
        log.error("cannot write %s: %s: it is not known here that something is lacking", path, error.strerror)


def outdated(rundir: Path, name: str, resuid: int) -> str:
    """The word that outdate() was given for this component since remember(), or ""."""
    try:
        known, _, word = outdated_note(rundir, name).read_text().partition(" ")
    except OSError:
        return ""
    return (word or OUTDATED) if known == str(resuid) else ""


def give_up(rundir: Path, metadata: Metadata) -> None:
    """The component is not used any more; these are its metadata, on its disk or not."""
    path = detached_note(rundir, metadata.resource)
    try:
        _replace(path, metadata.pack())
    except OSError as error:
        forget(path)
        log.error("cannot write %s: %s: the next worker needs the component", path, error.strerror)


def given_up(rundir: Path, name: str) -> Metadata | None:
    """What give_up() was told last of this resource, if it was."""
    try:
        return unpack(detached_note(rundir, name).read_bytes(), name)
    except (OSError, DataError):
        return None


def _replace(path: Path, content: bytes) -> None:
    """Write a file so that it is the old one or the new one, whoever dies. Raises OSError."""
    fresh = path.with_suffix(f"{path.suffix}.{os.getpid()}")
    fresh.write_bytes(content)
    fresh.replace(path)
