"""The one hierarchy of errors that people see.

Every error is one line that says what was being done, to which resource, what went wrong and
what to do; and it knows the sysexits(3) code that a command ends with when it meets it.
"""

from __future__ import annotations

import errno
import os

# What a system may be out of now, and have again in a moment.
SHORTAGES = frozenset(
    {errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOSPC, errno.EDQUOT, errno.EINTR}
)

# Exit codes of a worker that cannot do what it could do a moment ago: its disk, files or system may be well again.
MAY_PASS = frozenset({os.EX_OSERR, os.EX_IOERR, os.EX_NOINPUT, os.EX_NOPERM})


class HastError(Exception):
    """Base of all errors that are reported to a person. `str(error)` is the whole message, one line."""

    exit_code: int = os.EX_SOFTWARE


class UsageError(HastError):
    """A command line that cannot be understood."""

    exit_code = os.EX_USAGE


class ConfigError(HastError):
    """hast.conf cannot be read or understood; the message names file, line and column."""

    exit_code = os.EX_CONFIG


class DataError(HastError):
    """Bytes from a disk, a peer or a client that do not follow their format."""

    exit_code = os.EX_DATAERR


class NoInputError(HastError):
    """A component or file that is not there or cannot be opened."""

    exit_code = os.EX_NOINPUT


class NoResourceError(HastError):
    """A resource that the configuration does not have."""

    exit_code = os.EX_DATAERR


class UnavailableError(HastError):
    """A service (hastd, the kernel's FUSE, a tool) that is needed and is not there."""

    exit_code = os.EX_UNAVAILABLE


class SystemCallError(HastError):
    """The operating system refused something that should work."""

    exit_code = os.EX_OSERR


class DiskError(HastError):
    """A component failed a read or a write."""

    exit_code = os.EX_IOERR


class TemporaryError(HastError):
    """Something is in use now and may be free later (a component locked by another hastd, a pidfile)."""

    exit_code = os.EX_TEMPFAIL


class InUseError(TemporaryError):
    """A component that another process has."""


class ProtocolError(HastError):
    """hastd, hastctl or a peer answered something that the protocol does not allow."""

    exit_code = os.EX_PROTOCOL


class PermissionDeniedError(HastError):
    """The caller may not do this."""

    exit_code = os.EX_NOPERM


def refusal(text: str, number: int | None) -> HastError:
    """The error for a system call that should work and has failed with errno `number`: TemporaryError where the system
    is out of something, SystemCallError otherwise."""
    return (TemporaryError if number in SHORTAGES else SystemCallError)(text)
