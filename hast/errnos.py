"""Error numbers on the wire are FreeBSD's (docs/protocol.md section 4); this host's may differ.

Invariants:
- Everywhere in hast an errno is this host's own; only the two functions here see FreeBSD's numbers.
- An errno that one side does not have becomes EIO, never another error and never "no error".
"""

from __future__ import annotations

import errno

# FreeBSD's number of each error whose number is not the same everywhere. 1 to 34 are common to both, but
# for 11: EDEADLK there, EAGAIN on Linux.
FREEBSD = {
    "EDEADLK": 11, "EAGAIN": 35, "EINPROGRESS": 36, "EALREADY": 37, "ENOTSOCK": 38, "EDESTADDRREQ": 39,
    "EMSGSIZE": 40, "EPROTOTYPE": 41, "ENOPROTOOPT": 42, "EPROTONOSUPPORT": 43, "ESOCKTNOSUPPORT": 44,
    "EOPNOTSUPP": 45, "EPFNOSUPPORT": 46, "EAFNOSUPPORT": 47, "EADDRINUSE": 48, "EADDRNOTAVAIL": 49,
    "ENETDOWN": 50, "ENETUNREACH": 51, "ENETRESET": 52, "ECONNABORTED": 53, "ECONNRESET": 54, "ENOBUFS": 55,
    "EISCONN": 56, "ENOTCONN": 57, "ESHUTDOWN": 58, "ETOOMANYREFS": 59, "ETIMEDOUT": 60,
    "ECONNREFUSED": 61, "ELOOP": 62, "ENAMETOOLONG": 63, "EHOSTDOWN": 64, "EHOSTUNREACH": 65,
    "ENOTEMPTY": 66, "EUSERS": 68, "EDQUOT": 69, "ESTALE": 70, "EREMOTE": 71, "ENOLCK": 77, "ENOSYS": 78,
    "EIDRM": 82, "ENOMSG": 83, "EOVERFLOW": 84, "ECANCELED": 85, "EILSEQ": 86, "EBADMSG": 89,
    "EMULTIHOP": 90, "ENOLINK": 91, "EPROTO": 92, "ENOTRECOVERABLE": 95, "EOWNERDEAD": 96,
}  # fmt: skip

_COMMON = {n: n for n in range(1, 35) if n != 11}
_FROM_WIRE = _COMMON | {number: getattr(errno, name, errno.EIO) for name, number in FREEBSD.items()}
_HERE = {name: number for name, number in FREEBSD.items() if hasattr(errno, name)}
_TO_WIRE = _COMMON | {getattr(errno, name): number for name, number in _HERE.items()}


def to_wire(local: int) -> int:
    """FreeBSD's number for an errno of this host. 0 stays 0; an unknown one gives EIO (5)."""
    return 0 if local == 0 else _TO_WIRE.get(local, 5)


def from_wire(number: int) -> int:
    """This host's errno for FreeBSD's number. 0 stays 0; an unknown one gives EIO."""
    return 0 if number == 0 else _FROM_WIRE.get(number, errno.EIO)
