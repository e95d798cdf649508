"""A primary's connection (hast/link.py): what is stored when its steps and the sequencer's events cross."""

from __future__ import annotations

import asyncio
import os
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hast import link as link_module
from hast import peering, telling
from hast.config import Resource
from hast.connect import Established
from hast.control import Role
from hast.decision import Outcome, decide
from hast.errors import DiskError, HastError, TemporaryError
from hast.ffi import _hast
from hast.handshake import Agreement
from hast.link import Link, Owner
from hast.messages import SyncSource
from hast.metadata import Metadata, Pair
from hast.outage import Outage
from hast.stages import ggate
from tests.unit.scripted_secondary import resource

ffi, lib = _hast.ffi, _hast.lib
METADATA = Metadata("data", 67104256, 2 << 20, 64, 4608, resuid=7, pair=Pair(1, 1), prevrole=Role.PRIMARY)


class Primary:
    """What a link and an outage need of their primary. `told`: commands that the ggate stage was given."""

    def __init__(self) -> None:
        self.resource: Resource = resource("127.0.0.1:8457")
        self.rundir = Path("/nonexistent")
        self.component: Any = object()
        self.metadata = METADATA
        self.pipeline: Any = self
        self.told: list[str] = []
        self.failures: list[HastError] = []
        self.superseded: list[Metadata] = []
        self.link = Link(
            Owner(
                self.resource,
                self.pipeline,
                lambda: self.metadata,
                self._store,
                only_raised=lambda: True,
                hook=lambda event: None,
                fail=self.failures.append,
                lonely=self._lonely,
                keepmap=lambda: False,
                superseded=lambda agreement, metadata: bool(self.superseded.append(metadata)),
            ),
            virgin=False,
        )

    def _store(self, metadata: Metadata) -> None:
        self.metadata = metadata

    def _lonely(self, failing: bool) -> None:
        pass

    def _remember(self) -> None:
        pass

    def _end_retry(self) -> None:
        pass

    def send(self, stage: int, message: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        """The pipeline's."""
        self.told.append(message["cmd"])

    def connect(self, secondary: Pair, source: SyncSource, hast: bool = False, virgin: bool = False) -> None:
        """A handshake is done: the other node's counters, and who has the newer data."""
        out, incoming = socket.socketpair()
        agreement = Agreement(2, source, secondary, virgin, None, self.metadata, hast)
        address = "127.0.0.1", 8457
        self.link._establish(Established(out, incoming, "secondary", agreement, ((socket.AF_INET, address), None)))
        assert self.told == ["connect"]


def test_connection_that_was_lost_before_it_turns_out_to_be_unused_makes_no_target() -> None:
    """The map has failed for a write that was under way before the connection, and that write keeps the sequencer from
    using a secondary that is newer. It is going to be acknowledged alone, which is a split-brain and no target."""

    async def body() -> None:
        primary = Primary()
        primary.connect(Pair(2, 1), SyncSource.SECONDARY)
        assert primary.metadata.syncing
        primary.link.sequencer(lib.HAST_SEQ_MAP_FAILED, 0)
        primary.link.lose("writes are under way here", unused=True)
        assert primary.metadata == METADATA
        alone = peering.wrote_alone(primary.link.peering, primary.metadata)
        assert not alone.syncing
        assert decide(7, Pair(2, 1), 7, alone.pair, False).outcome is Outcome.SPLIT_BRAIN
        assert primary.failures == []

    asyncio.run(body())


def test_handshake_counts_for_nothing_when_the_counters_change_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first write without the secondary is acknowledged while it is under way (invariant 7): what the other node was
    told is not true any more, and the next attempt says what is."""
    asked: list[Metadata] = []
    sockets: list[socket.socket] = []

    async def body() -> None:
        primary = Primary()

        async def handshake(_: Resource, metadata: Metadata, **__: object) -> Established:
            asked.append(metadata)
            if len(asked) == 1:
                primary.metadata = peering.wrote_alone(primary.link.peering, primary.metadata)
            sockets[:] = socket.socketpair()
            agreement = Agreement(2, SyncSource.PRIMARY, metadata.pair, False, None, metadata)
            address = (socket.AF_INET, ("127.0.0.1", 8457)), None
            return Established(*sockets, "secondary", agreement, address)

        monkeypatch.setattr(link_module, "connect", handshake)
        with pytest.raises(TemporaryError, match="counters changed during the handshake"):
            await primary.link._connect()
        assert [sock.fileno() for sock in sockets] == [-1, -1]
        assert primary.told == []
        (await primary.link._connect()).close()
        assert [metadata.pair.localcnt for metadata in asked] == [1, 2] and asked[1].alone

    asyncio.run(body())


def test_component_that_fails_while_the_connection_is_given_up_is_not_outdated() -> None:
    """Other settings: the worker has told the sequencer that the secondary is gone, and hears from it what was true
    before. What is acknowledged from now on is here alone, and must not be stored as old."""

    async def body() -> None:
        primary = Primary()
        primary.connect(Pair(1, 1), SyncSource.PRIMARY)
        primary.link.sequencer(lib.HAST_SEQ_CONNECTED, 0)
        assert primary.link.connected
        ending = asyncio.get_running_loop().create_task(primary.link.stop())
        async with asyncio.timeout(20):
            while primary.told[-1] != "disconnect":
                await asyncio.sleep(0)
        Outage(primary).failed(detach=False)
        assert primary.told[-1] == "refused" and primary.metadata == METADATA
        primary.link.parted()
        await ending
        assert primary.failures == []

    asyncio.run(body())


class Takes:
    """A component that takes nothing any more."""

    path = "/nonexistent"

    def fill_map(self, metadata: Metadata) -> None:
        raise DiskError("data: component /nonexistent cannot be written")


@pytest.mark.parametrize("again", [False, True], ids=["no connection", "another connection"])
def test_answer_that_comes_when_its_connection_is_gone_changes_nothing(
    again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The secondary is asked to store that it is ahead. The connection is lost meanwhile, and this node goes on alone.
    What it has acknowledged since must not get out of reach; and what the answer would have decided is decided anew,
    for whatever fails on the next connection."""

    async def body() -> None:
        primary, answer = Primary(), asyncio.get_running_loop().create_future()

        async def tell(*_: object) -> Pair:
            return await asyncio.shield(answer)

        monkeypatch.setattr(telling, "tell", tell)
        primary.component = Takes()
        primary.connect(Pair(1, 1), SyncSource.PRIMARY, hast=True)
        primary.link.sequencer(lib.HAST_SEQ_CONNECTED, 0)
        outage = Outage(primary)
        outage.failed(detach=True)
        asking = outage._asking
        assert asking is not None
        await asyncio.sleep(0)
        primary.link._down()
        alone = primary.metadata = peering.wrote_alone(primary.link.peering, primary.metadata)
        if again:
            primary.told.clear()
            primary.connect(Pair(1, 1), SyncSource.PRIMARY, hast=True)
        answer.set_result(Pair(2, 1))
        await asking
        assert not outage.detached and not outage.unrecorded and not primary.metadata.syncing
        assert primary.metadata.pair == alone.pair and primary.told == ["connect"]
        assert primary.link.session is None or primary.link.peering.peer == Pair(1, 1)

    asyncio.run(body())


def test_in_sync_is_of_the_connection_that_it_was_said_of() -> None:
    """ggate says it when the connection is gone, and the disk takes nothing just then: it is not to be stored later,
    when there is another one and the secondary lacks something."""

    async def body() -> None:
        primary = Primary()
        primary.connect(Pair(1, 1), SyncSource.PRIMARY, hast=True)
        primary.link.sequencer(lib.HAST_SEQ_CONNECTED, 3)
        primary.link._down()
        takes, tried = primary.link.owner.store, []

        def store(metadata: Metadata) -> None:
            tried.append(metadata)
            raise DiskError("data: component /nonexistent cannot be written")

        primary.link.owner.store = store
        primary.link.sequencer(lib.HAST_SEQ_SYNC_DONE, 0)
        primary.link.owner.store = takes
        assert tried == [] and primary.link._unstored is None

    asyncio.run(body())


def test_secondary_that_was_never_used_is_remembered_while_this_node_is_out_of_date() -> None:
    async def body() -> None:
        primary = Primary()
        primary.metadata = replace(METADATA, pair=Pair(), syncing=True)
        for virgin in (True, False):
            with pytest.raises(peering.OutdatedError):
                primary.connect(Pair(), SyncSource.PRIMARY, virgin=virgin)
            assert primary.metadata.blank and primary.metadata.syncing and primary.told == []

    asyncio.run(body())


def test_where_the_secondary_is_newer_is_known_when_its_map_is_merged() -> None:
    """A node that dies before that must not take its own map for the whole."""

    async def body() -> None:
        primary = Primary()
        primary.connect(Pair(2, 1), SyncSource.SECONDARY)
        assert primary.metadata.syncing and primary.metadata.unmapped
        primary.link.sequencer(lib.HAST_SEQ_CONNECTED, 3)
        assert primary.metadata.syncing and not primary.metadata.unmapped

    asyncio.run(body())


def test_a_map_that_is_written_in_part_is_no_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing would count as the same on both nodes."""
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:100]))
    with pytest.raises(TemporaryError, match="no memory for more"), link_module._memory("data", bytes(512)):
        pass


@pytest.mark.parametrize(("size", "joined"), [(0, True), (512, True), (511, False), (513, False), (100, False)])
def test_ggate_takes_a_whole_map_or_none(size: int, joined: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    taken: list[Any] = []
    fake = SimpleNamespace(
        hast_ggate_connect=lambda *_: 0, hast_seq_connect=lambda _, bits: taken.append(bits), HAST_NONE=lib.HAST_NONE
    )
    monkeypatch.setattr(ggate, "lib", fake)
    monkeypatch.setattr(ggate, "options", lambda *_: None)
    stage = ggate.Ggate.__new__(ggate.Ggate)
    arena = SimpleNamespace(geometry=SimpleNamespace(mapsize=512), c=None)
    stage.context = SimpleNamespace(arena=arena, control=SimpleNamespace(send=told.append))  # type: ignore[assignment]
    stage.seq = SimpleNamespace(sync_remote=0, mapwait_head=lib.HAST_NONE, flushq_head=lib.HAST_NONE)
    stage.pump = None
    ends = socket.socketpair()
    fds = [end.detach() for end in ends]
    with link_module._memory("data", b"\xff" * size) as map_fd:
        conn = {"version": 2, "compression": "none", "checksum": "none", "timeout": 5.0}
        message = {"from_remote": False, "mode": 0, "conn": conn}
        stage._connect(message, os.dup(map_fd), *fds)
    if joined:
        assert told == [] and taken == [b"\xff" * size if size else ffi.NULL]
        for fd in fds:
            os.close(fd)
    else:
        assert [message["event"] for message in told] == ["unjoined"] and taken == []


def test_map_that_cannot_be_written_is_no_reason_to_leave_a_secondary_that_is_used() -> None:
    """Only one whose own map was to be written."""

    async def body() -> None:
        for bits, used in ((lib.HAST_SEQ_CONNECTED | lib.HAST_SEQ_MAP_FAILED, True), (lib.HAST_SEQ_MAP_FAILED, False)):
            primary = Primary()
            primary.connect(Pair(1, 1), SyncSource.PRIMARY)
            primary.link.sequencer(bits, 0)
            assert primary.link.connected is used and primary.link._lost.is_set() is not used

    asyncio.run(body())


@pytest.mark.parametrize(
    ("secondary", "source", "unjoined", "given_up"),
    [
        (Pair(2, 1), SyncSource.SECONDARY, True, True),
        (Pair(2, 1), SyncSource.SECONDARY, False, False),
        (Pair(1, 1), SyncSource.PRIMARY, True, False),
    ],
    ids=["newer", "newer, and a write has failed", "in sync"],
)
def test_secondary_whose_map_cannot_be_written_does_everything_if_it_is_newer(
    secondary: Pair, source: SyncSource, unjoined: bool, given_up: bool
) -> None:
    """Not because of a write that was under way before; nor where what is marked may have been read here."""

    async def body() -> None:
        primary = Primary()
        primary.connect(secondary, source, hast=True)
        primary.link.sequencer(lib.HAST_SEQ_MAP_FAILED, 0, unjoined)
        assert primary.link._lost.is_set()
        assert primary.superseded == ([primary.metadata] if given_up else [])

    asyncio.run(body())
