"""mount(2), umount2(2) and /proc/self/mountinfo, which Python has no functions for.

Nothing here waits for a file system: a lazy or forced unmount of one whose server hangs returns at once.
"""

from __future__ import annotations

import ctypes
import os
import re
from dataclasses import dataclass
from pathlib import Path

MS_NOSUID, MS_NODEV, MS_NOATIME = 2, 4, 1024
MNT_FORCE, MNT_DETACH = 1, 2

_ESCAPE = re.compile(rb"\\([0-7]{3})")
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Mount:
    """One line of /proc/self/mountinfo. device is "major:minor"."""

    point: Path
    fstype: str
    source: str
    device: str


def mount(source: str, target: Path, fstype: str, flags: int, options: str) -> None:
    """mount(2). Raises OSError."""
    done = _libc.mount(source.encode(), os.fsencode(target), fstype.encode(), ctypes.c_ulong(flags), options.encode())
    _check(done, target)


def umount(target: Path, flags: int) -> None:
    """umount2(2) of what is mounted last at `target`. Raises OSError."""
    _check(_libc.umount2(os.fsencode(target), flags), target)


def _check(result: int, target: Path) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(target))


def listed() -> list[Mount]:
    """All mounts that this process sees, in order; a later one may cover an earlier one."""
    return [parse(line) for line in Path("/proc/self/mountinfo").read_bytes().splitlines()]


def parse(line: bytes) -> Mount:
    """One line: proc(5) has the fields; " - " ends the optional ones."""
    before, _, after = line.partition(b" - ")
    fields, (fstype, source) = before.split(b" "), after.split(b" ")[:2]
    return Mount(Path(_text(fields[4])), _text(fstype), _text(source), _text(fields[2]))


def _text(field: bytes) -> str:
    """A field without the kernel's octal escapes of space, tab, newline and backslash."""
    return os.fsdecode(_ESCAPE.sub(lambda match: bytes([int(match[1], 8)]), field))
