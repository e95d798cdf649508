"""Addresses of hast.conf and the command line: TCP endpoints, Unix sockets (docs/protocol.md section 8).

Invariants:
- An `Address` that came out of `parse_address` names one endpoint: a TCP host and port, or an absolute path.
- Nothing here asks a name server: a host name stays a name until somebody connects or listens.
- `str()` gives what was written in the file, because that is what FreeBSD's hastctl shows.
"""

from __future__ import annotations

import re
import socket
import sys
from dataclasses import dataclass, field
from typing import Literal

DEFAULT_PORT = 8457
MAX_HOST = 255  # bytes of a host name (RFC 1035)
# sun_path without its NUL.
MAX_UNIX_PATH = 107 if sys.platform.startswith("linux") else 103

TCP_FORM = "[tcp://|tcp4://|tcp6://]host[:port]"
UNIX_FORM = "uds://path, unix://path or an absolute path"

Protocol = Literal["tcp", "tcp4", "tcp6", "unix"]

_SCHEMES: dict[str, Protocol] = {
    "tcp": "tcp",
    "tcp4": "tcp4",
    "tcp6": "tcp6",
    "uds": "unix",
    "unix": "unix",
}
_FAMILIES: dict[Protocol, socket.AddressFamily] = {
    "tcp": socket.AF_UNSPEC,
    "tcp4": socket.AF_INET,
    "tcp6": socket.AF_INET6,
    "unix": socket.AF_UNIX,
}
_SCHEME = re.compile(r"([A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
_NUMERIC_NAME = re.compile(r"[0-9.]+")


class AddressError(ValueError):
    """A text that is not an address. `reason` says why without repeating the text."""

    def __init__(self, text: str, reason: str) -> None:
        super().__init__(f"address {text!r}: {reason}")
        self.reason = reason


@dataclass(frozen=True)
class Address:
    """One endpoint. Two addresses are equal when they name the same endpoint, however they are written.

    `protocol` is "tcp" only where `host` is a name: an IP address makes it "tcp4" or "tcp6". `host` (TCP
    only) is a name or an IP address in its shortest form, without brackets; `port` (TCP only) is 1 to
    65535, or 0 where the port does not matter; `path` (Unix only) is absolute; `text` is what was written.
    """

    protocol: Protocol
    host: str = ""
    port: int = 0
    path: str = ""
    text: str = field(default="", compare=False)

    def __str__(self) -> str:
        return self.text or self.canonical()

    def canonical(self) -> str:
        """The one full form: `tcp4://192.0.2.1:8457`, `tcp6://[2001:db8::1]:8457`, `uds:///path`."""
        if self.protocol == "unix":
            return f"uds://{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.protocol}://{host}:{self.port}" if self.port else f"{self.protocol}://{host}"

    @property
    def is_unix(self) -> bool:
        return self.protocol == "unix"

    @property
    def family(self) -> socket.AddressFamily:
        """The address family to give to getaddrinfo or socket; AF_UNSPEC for a host name under tcp://."""
        return _FAMILIES[self.protocol]


def literal_family(host: str) -> socket.AddressFamily | None:
    """AF_INET or AF_INET6 when `host` is an IP address, None when it is a name."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, host)
        except (OSError, ValueError):
            continue
        return family
    return None


def parse_address(text: str, default_port: int = DEFAULT_PORT, allow_unix: bool = True) -> Address:
    """The address that `text` writes.

    `default_port` stands where no port is written. `allow_unix` says whether Unix sockets are meant
    as well as TCP. Raises `AddressError`.
    """
    scheme = _SCHEME.fullmatch(text)
    if scheme is None:
        if text.startswith("/"):
            return _unix(text, text, allow_unix)
        return _tcp(text, "tcp", text, default_port)
    name, rest = scheme.groups()
    protocol = _SCHEMES.get(name.lower())
    if protocol is None:
        known = "://, ".join(_SCHEMES if allow_unix else ("tcp", "tcp4", "tcp6"))
        raise AddressError(text, f"{name}:// is not one of {known}://")
    if protocol == "unix":
        return _unix(text, rest, allow_unix)
    return _tcp(text, protocol, rest, default_port)


def _unix(text: str, path: str, allowed: bool) -> Address:
    if not allowed:
        raise AddressError(text, "a Unix socket cannot be used here")
    if not path.startswith("/"):
        raise AddressError(text, "the path of a Unix socket must be absolute")
    if path.endswith("/"):
        raise AddressError(text, "the path of a Unix socket must name a file")
    if "\0" in path:
        raise AddressError(text, "the path of a Unix socket holds a NUL byte")
    size = len(path.encode("utf-8", "surrogateescape"))
    if size > MAX_UNIX_PATH:
        raise AddressError(text, f"the path of a Unix socket has {size} bytes, the limit is {MAX_UNIX_PATH}")
    return Address("unix", path=path, text=text)


def _tcp(text: str, protocol: Protocol, rest: str, default_port: int) -> Address:
    host, port = _split_port(text, rest)
    number = default_port if port is None else _port(text, port)
    if not host:
        raise AddressError(text, "the host is missing")
    if "/" in host:
        raise AddressError(text, "a '/' follows the host: an address has no prefix length and no path")
    family = literal_family(host)
    if family is None:
        _check_host_name(text, host)
        return Address(protocol, host, number, text=text)
    own: Protocol = "tcp4" if family == socket.AF_INET else "tcp6"
    if protocol not in ("tcp", own):
        takes = {"tcp4": "IPv4", "tcp6": "IPv6"}
        raise AddressError(text, f"{protocol}:// takes an {takes[protocol]} address, this is {takes[own]}")
    return Address(own, socket.inet_ntop(family, socket.inet_pton(family, host)), number, text=text)


def _split_port(text: str, rest: str) -> tuple[str, str | None]:
    """Host without brackets, and the port as written or None. Two colons without brackets are IPv6."""
    if rest.startswith("["):
        host, bracket, after = rest[1:].partition("]")
        if not bracket:
            raise AddressError(text, "']' is missing")
        if after and not after.startswith(":"):
            raise AddressError(text, f"{after!r} follows ']', only :port may")
        if literal_family(host) != socket.AF_INET6:
            raise AddressError(text, f"{host!r} in brackets is not an IPv6 address")
        return host, after[1:] if after else None
    if rest.count(":") == 1:
        host, _, port = rest.partition(":")
        return host, port
    return rest, None


def _port(text: str, port: str) -> int:
    # isascii: other scripts have digits too. The length bounds what int() has to convert.
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and 1 <= int(port) <= 65535):
        raise AddressError(text, f"port {port!r} is not a number from 1 to 65535")
    return int(port)


def _check_host_name(text: str, host: str) -> None:
    if ":" in host or "[" in host or "]" in host:
        raise AddressError(text, f"{host!r} is not an IPv6 address, which before a port stands in brackets")
    # A resolver might take 10.1 for 10.0.0.1: nobody means that.
    if _NUMERIC_NAME.fullmatch(host):
        raise AddressError(text, f"{host!r} is not an IPv4 address: that is four numbers from 0 to 255")
    if len(host) > MAX_HOST:
        raise AddressError(text, f"the host name has {len(host)} characters, the limit is {MAX_HOST}")
    if not all(_LABEL.fullmatch(label) for label in host.removesuffix(".").split(".")):
        raise AddressError(text, f"{host!r} is not a host name")
