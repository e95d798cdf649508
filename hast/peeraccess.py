"""Who may connect: the peer's address is compared with `remote` of the resources (docs/protocol.md section 3).

Invariants:
- Only the address counts, not the port: a primary connects from any.
- A `remote` that is a name is looked up in a thread, one at a time for each name and again after FRESH_SECONDS at the
  earliest, whoever connects how often; nobody waits for that longer than LOOK_UP_SECONDS.
- A name server that fails takes nothing away: what a name was stays known until there is a better answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from hast.address import Address, literal_family
from hast.config import Resource

log = logging.getLogger(__name__)

FRESH_SECONDS = 10.0
LOOK_UP_SECONDS = 5.0


def canonical(host: str) -> str:
    """An IP address in the one form in which two of them can be compared: without scope, IPv4 as IPv4."""
    address = ipaddress.ip_address(host.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)


@dataclass
class Name:
    """What is known about a host name."""

    addresses: frozenset[str] = frozenset()
    asked: float | None = None  # when the last look-up began, in the loop's time
    answer: asyncio.Future[None] | None = None  # of a look-up that is under way
    failed: bool = field(default=False)


class PeerAccess:
    """Answers for the resources that `resources()` gives at the moment."""

    def __init__(self, resources: Callable[[], Iterable[Resource]]) -> None:
        self._resources = resources
        self._names: dict[Address, Name] = {}

    async def resources_of(self, host: str | None) -> frozenset[str]:
        """The names of the resources whose other node has the IP address `host`.

        None is a peer on a Unix socket: it was let in by the socket's mode, and may be any resource's other node.
        """
        found: set[str] = set()
        unknown: dict[str, Address] = {}
        peer = canonical(host) if host is not None else None
        for resource in self._resources():
            remote = resource.remote
            if remote is None:
                continue
            if peer is None or peer in self._known(remote):
                found.add(resource.name)
            elif literal_family(remote.host) is None:
                unknown[resource.name] = remote
        if unknown:
            answers = {answer for remote in unknown.values() if (answer := self._ask(remote)) is not None}
            if answers:
                await asyncio.wait(answers, timeout=LOOK_UP_SECONDS)
            found.update(name for name, remote in unknown.items() if peer in self._known(remote))
        return frozenset(found)

    def _known(self, remote: Address) -> frozenset[str]:
        if literal_family(remote.host) is not None:
            return frozenset((canonical(remote.host),))
        name = self._names.get(remote)
        return name.addresses if name is not None else frozenset()

    def _ask(self, remote: Address) -> asyncio.Future[None] | None:
        """Look the name up, unless that was done just now; what becomes done then."""
        loop = asyncio.get_running_loop()
        name = self._names.setdefault(remote, Name())
        if name.answer is not None:
            return name.answer
        if name.asked is not None and loop.time() - name.asked < FRESH_SECONDS:
            return None
        name.asked = loop.time()
        answer = name.answer = loop.create_future()

        def take(addresses: frozenset[str] | OSError) -> None:
            name.answer = None
            if isinstance(addresses, OSError):
                if not name.failed:
                    log.warning("cannot look up the address of remote %s: %s", remote, addresses.strerror)
                name.failed = True
            else:
                name.addresses, name.failed = addresses, False
            if not answer.done():
                answer.set_result(None)

        def look_up() -> None:
            addresses = _look_up(remote)
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(take, addresses)

        # Not one of the loop's executor: hastd's end must not wait for a name server.
        threading.Thread(target=look_up, name=f"look-up of {remote.host}", daemon=True).start()
        return answer


def _look_up(remote: Address) -> frozenset[str] | OSError:
    try:
        found = socket.getaddrinfo(remote.host, None, remote.family, socket.SOCK_STREAM)
    except OSError as error:  # socket.gaierror is one
        return error
    return frozenset(canonical(str(entry[4][0])) for entry in found)
