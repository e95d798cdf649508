"""Two nodes for tests, with the same resources, each the other's `remote`; and what can be said of both together.

Invariants:
- Each node has addresses, files and devices of its own; only names of resources are the same on both.
- What is waited for is a condition that both nodes show; nothing here sleeps for a time that may do.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hast import component
from hast.activemap import DEFAULT_EXTENTSIZE, DEFAULT_KEEPDIRTY
from hast.cli.hastctl import read_dump
from hast.cli.report import status_data
from hast.control import CMD_STATUS, ControlRequest, StatusReply
from tests.e2e.node import MIB, Node, complain, eventually

_counter = itertools.count(1)
CHUNK = 4 * MIB


class PairNode(Node):
    """A Node that asks for everything without the program hastctl, which takes a fifth of a second each time."""

    def create(self, *options: str, resource: str | None = None) -> None:
        if options:
            super().create(*options, resource=resource)
            return
        for name in self.resources if resource is None else [resource]:
            component.create(self.name(name), str(self.component(name)), DEFAULT_EXTENTSIZE, DEFAULT_KEEPDIRTY)

    def status(self, resource: str = "disk") -> dict[str, Any]:
        reply = StatusReply.from_nv(self.ask(ControlRequest(CMD_STATUS, (self.name(resource),))))
        return status_data(reply.entries[0])

    def dump(self, resource: str = "disk") -> dict[str, Any]:
        return read_dump(self.name(resource), str(self.component(resource))).data()


class Pair:
    """Nodes `a` ("hasta") and `b` ("hastb"), with nothing running. `conf`, `resource_conf` and `device` are Node's.

    `addresses` of `a` and `b`, where they are not to be loopback ones. `remotes`: for the nodes that it names, another
    address than the other node's own, to put a relay between. With `hooks`, their events are noted: events().
    """

    def __init__(
        self,
        resources: dict[str, int] | None = None,
        *,
        device: str = "nbd",
        memory: bool = True,
        conf: str = "timeout 5",
        resource_conf: str | dict[str, str] = "",
        addresses: tuple[str, str] | None = None,
        remotes: dict[str, str] | None = None,
        hooks: bool = False,
    ) -> None:
        suffix = f"p{os.getpid()}n{next(_counter)}"
        self.a = PairNode(resources, node="hasta", device=device, memory=memory, suffix=suffix)
        self.b = PairNode(resources, node="hastb", device=device, memory=memory, suffix=suffix)
        self.nodes = (self.a, self.b)
        if addresses is not None:
            self.a.address, self.b.address = addresses
        for node, peer in ((self.a, self.b), (self.b, self.a)):
            remote = (remotes or {}).get(node.node, f"tcp4://{peer.address}")
            exec_ = f"exec {self._hook(node)}\n" if hooks else ""
            node.write_conf(device, exec_ + conf, resource_conf, f"remote {remote}\nsource {node.address}")

    @staticmethod
    def _hook(node: PairNode) -> Path:
        hook = node.directory / "hook"
        hook.write_text(f'#!/bin/sh\necho "$@" >>{node.directory}/events\n')
        hook.chmod(0o755)
        return hook

    def events(self, node: PairNode) -> list[str]:
        """What the hook of a node was told, in order, one string for each event."""
        path = node.directory / "events"
        return path.read_text().splitlines() if path.exists() else []

    def other(self, node: PairNode) -> PairNode:
        return self.b if node is self.a else self.a

    # ---- life ----

    def create(self, *options: str) -> None:
        for node in self.nodes:
            node.create(*options)

    def start(self) -> None:
        for node in self.nodes:
            node.start()

    def roles(self, primary: PairNode, resource: str = "disk") -> None:
        """The one is primary, the other secondary; returns when they are connected."""
        self.other(primary).set_role("secondary", resource)
        primary.set_role("primary", resource)
        self.wait_connected(primary, resource)

    def up(self, primary: PairNode | None = None) -> None:
        """All of it: components made, both started, roles taken for each resource, in sync, and both have stored it: a
        primary that is stopped before counts as one that has something of its own."""
        self.create()
        self.start()
        first = primary or self.a
        for name in self.a.resources:
            self.roles(first, name)
            self.wait_in_sync(first, name)

    def _in_step(self, primary: PairNode, resource: str) -> bool:
        own, other = primary.dump(resource), self.other(primary).dump(resource)
        return bool((own["localcnt"], own["remotecnt"]) == (other["remotecnt"], other["localcnt"]))

    def swap(self, primary: PairNode, resource: str = "disk") -> PairNode:
        """Both nodes are well: change their roles in good order. The new primary."""
        primary.set_role("secondary", resource)
        new = self.other(primary)
        new.set_role("primary", resource)
        self.wait_connected(new, resource)
        return new

    def freeze(self, node: PairNode) -> None:
        """SIGSTOP for every process of a node: it neither answers nor closes anything."""
        self._signal(node, signal.SIGSTOP)

    def thaw(self, node: PairNode) -> None:
        self._signal(node, signal.SIGCONT)

    @staticmethod
    def _signal(node: PairNode, number: int) -> None:
        for pid in node.pids():
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def close(self) -> list[str]:
        """As Node.close()."""
        for node in self.nodes:
            self.thaw(node)
        return complain(self.nodes)

    # ---- conditions ----

    def wait_connected(self, primary: PairNode, resource: str = "disk") -> None:
        """Both nodes say that they have each other."""

        def connected() -> bool:
            return self._connected(self.other(primary), resource, "from") and self._connected(primary, resource, "to")

        eventually(connected, f"{resource}: both are connected")

    @staticmethod
    def _connected(node: PairNode, resource: str, how: str) -> bool:
        """Whether a connection is the last that the log says of the resource's worker, after its start."""
        name = re.escape(node.name(resource))
        news = re.findall(
            rf"hastd started|{name}: worker \(.*\) (?!serves)|{name}: connect(?:ed {how}|ion {how} .* (?:lost|ended))",
            node.said(),
        )
        return bool(news) and news[-1].endswith(f"connected {how}")

    def wait_in_sync(self, primary: PairNode, resource: str = "disk") -> dict[str, Any]:
        """Connected, nothing left to synchronise, and both nodes have stored that, which nothing is written after: a
        disk that is to fail its next flush from here on does not fail that one. The primary's status."""
        status: dict[str, Any] = {}

        def in_sync() -> bool:
            status.update(primary.status(resource))
            return bool(status["status"] == "complete" and status["dirty"] == 0)

        self.wait_connected(primary, resource)
        eventually(in_sync, f"{resource}: both are in sync")
        eventually(lambda: not self.other(primary).status(resource)["syncing"], f"{resource}: both know it")
        eventually(lambda: self._in_step(primary, resource), f"{resource}: the counters are in step")
        status.update(primary.status(resource))  # the worker answers when its flush of them is done
        return status

    def wait_settled(self, primary: PairNode) -> None:
        """Connected, and what an outage has left is copied, while clients may be writing. Needs `hooks`, and one
        resource."""

        def settled() -> bool:
            names = [event.split()[0] for event in self.events(primary) if not event.startswith("role ")]
            if "connect" not in names:
                return False
            last = names[len(names) - names[::-1].index("connect") :]
            return "disconnect" not in last and ("syncstart" not in last or "syncdone" in last)

        eventually(settled, f"{primary.node} has brought the other one up to date")

    def differing(self, resource: str = "disk") -> int | None:
        """The first offset at which the data of the two components differ; None when all of it is the same."""
        size = self.a.resources[resource]
        with self.a.component(resource).open("rb") as one, self.b.component(resource).open("rb") as other:
            one.seek(self.a.dump(resource)["localoff"])
            other.seek(self.b.dump(resource)["localoff"])
            for at in range(0, size, CHUNK):
                left, right = one.read(min(CHUNK, size - at)), other.read(min(CHUNK, size - at))
                if left != right:
                    return at + next(i for i, (x, y) in enumerate(zip(left, right, strict=True)) if x != y)
        return None

    def data(self, node: PairNode, resource: str = "disk") -> bytes:
        """All data of a node's component."""
        with node.component(resource).open("rb") as file:
            file.seek(node.dump(resource)["localoff"])
            return file.read(node.resources[resource])


def said(pairs: Sequence[Pair]) -> str:
    """The logs of all nodes."""
    return "\n".join(f"---- hastd of {node.node} ({node.id})\n{node.said()}" for p in pairs for node in p.nodes)
