"""`hastctl discard`, and histories of two whole nodes: their metadata, maps and data, moved by the very functions that
decide in production. After each synchronisation that is complete both have the same data; nobody's changes are lost,
but those that were given up."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hast import peering
from hast.activemap import clear_bit, is_set, set_bit
from hast.control import Role
from hast.decision import Outcome, decide
from hast.errors import UnavailableError
from hast.handshake import PrimaryHandshake, RefusedError, accept_first, answer_second, first_request
from hast.messages import HANDSHAKE_LIMIT, Handshake1Request, Handshake2Request, SyncSource, unpack_message
from hast.metadata import Metadata, Pair
from hast.notice import SYNCED, Notice, heed
from hast.peering import Peering
from hast.promotion import as_primary, discarding, forced

EXTENTS, BLOCKS = 5, 2  # blocks of an extent: a write changes one of them
TOKEN = bytes(range(16))
NEW = Metadata("data", EXTENTS << 21, 2 << 20, 64, 4608)
SPLIT = replace(NEW, resuid=7, prevrole=Role.SECONDARY)


def request_of(primary: Metadata, hast: bool = True) -> Handshake2Request:
    return Handshake2Request("data", TOKEN, primary.resuid, primary.pair.localcnt, primary.pair.remotecnt, hast=hast)


def test_every_split_brain_can_be_left_by_either_node() -> None:
    """Whatever the counters are: the node that discards is found out of date, now and at each later contact, and after
    the synchronisation both are in step."""
    found = 0
    for a, b, c, d in itertools.product(range(5), repeat=4):
        own, theirs = replace(SPLIT, pair=Pair(a, b)), replace(SPLIT, pair=Pair(c, d))
        if decide(7, own.pair, 7, theirs.pair, False).outcome is not Outcome.SPLIT_BRAIN:
            continue
        found += 1
        for hast in (True, False):
            answer = answer_second(request_of(theirs, hast), 2, discarding(own), lambda: b"\3" * 512, "none", "none")
            assert answer.accepted and answer.decision.outcome is Outcome.PRIMARY_NEWER
            assert answer.decision.syncsrc is SyncSource.PRIMARY and answer.map is None  # its own map, as it is
            after = answer.metadata
            assert (after.syncing, after.discard) == (hast, False)
            told = unpack_message(answer.message, HANDSHAKE_LIMIT)[1]
            assert Pair(told.get_uint64("localcnt"), told.get_uint64("remotecnt")) == after.pair
            assert decide(7, after.pair, 7, theirs.pair, False).outcome is Outcome.PRIMARY_NEWER
            stored = Pair(after.pair.remotecnt, after.pair.localcnt)
            assert decide(7, after.pair, 7, stored, False).outcome is Outcome.IN_SYNC
            assert decide(7, stored, 7, after.pair, False).outcome is Outcome.IN_SYNC
    assert found > 50


def test_what_was_not_asked_for_is_refused_as_before() -> None:
    own = replace(SPLIT, pair=Pair(1, 0))
    answer = answer_second(request_of(own), 2, own, lambda: bytes(512), "none", "none")
    assert answer.split_brain and not answer.accepted and answer.metadata == own


def test_any_other_handshake_that_succeeds_ends_it() -> None:
    for pair in (Pair(0, 0), Pair(1, 0), Pair(0, 1)):
        answer = answer_second(request_of(SPLIT), 2, discarding(replace(SPLIT, pair=pair)), bytes, "none", "none")
        assert answer.accepted and not answer.metadata.discard
    other = answer_second(request_of(replace(SPLIT, resuid=8)), 2, discarding(SPLIT), bytes, "none", "none")
    assert not other.accepted and other.metadata.discard


# Histories.


@dataclass
class Node:
    """What is durable on a node, and what its worker knows."""

    metadata: Metadata = NEW
    map: bytearray = field(default_factory=lambda: bytearray(512))
    data: dict[tuple[int, int], int] = field(default_factory=dict)
    role: Role = Role.INIT
    peering: Peering = field(default_factory=Peering)
    own: set[int] = field(default_factory=set)  # writes that only this node was asked to keep
    given_up: set[int] = field(default_factory=set)
    mixed: bool = False  # the target of a synchronisation that is not complete


class World:
    """Two nodes, of which the primary `p` and the secondary `s` are connected or not."""

    def __init__(self) -> None:
        self.nodes = (Node(), Node())
        self.to_sync: set[int] = set()
        self.source = SyncSource.PRIMARY
        self.session = False
        self.writes = itertools.count(1)

    def pair(self) -> tuple[Node, Node] | None:
        for p, s in (self.nodes, self.nodes[::-1]):
            if p.role is Role.PRIMARY and s.role is Role.SECONDARY:
                return p, s
        return None

    def cut(self) -> None:
        self.session = False
        for node in self.nodes:
            node.peering = peering.lost(node.peering)[0]

    def take_role(self, n: int, role: Role, force: bool = False) -> None:
        node = self.nodes[n]
        if node.role is role:
            return
        self.cut()
        node.role = Role.INIT
        if role is Role.PRIMARY:
            if force:
                node.metadata, node.mixed = forced(node.metadata, 100 + next(self.writes)), False
            again = node.metadata.prevrole is Role.PRIMARY
            try:
                node.metadata, virgin = as_primary(node.metadata, 6)
            except UnavailableError:
                assert node.metadata.syncing
                return
            assert again or not node.mixed, "a mix of old and new is served"
            node.peering = Peering(virgin=virgin)
        elif role is Role.SECONDARY:
            node.metadata = replace(node.metadata, prevrole=Role.SECONDARY)
        node.role = role

    def discard(self, n: int) -> None:
        node = self.nodes[n]
        if node.role is not Role.PRIMARY and not self.session:
            node.metadata = discarding(node.metadata)
            node.given_up = set(node.own)

    def lead(self, n: int, other: Role, force: bool = False) -> None:
        self.take_role(1 - n, other)
        self.take_role(n, Role.PRIMARY, force)

    def write(self, n: int, extent: int, block: int) -> None:
        node, number = self.nodes[n], next(self.writes)
        if node.role is not Role.PRIMARY:
            return
        if not self.session and node.metadata.syncing:
            return  # it must not acknowledge anything alone
        set_bit(node.map, extent)
        node.data[extent, block] = number
        if self.session:
            pair = self.pair()
            assert pair is not None
            pair[1].data[extent, block] = number
        else:
            if not node.metadata.alone:
                node.metadata = peering.wrote_alone(node.peering, node.metadata)
            node.own.add(number)

    def connect(self, heard: bool) -> None:
        """A handshake; `heard`: the primary gets the answer."""
        pair = self.pair()
        if pair is None or self.session:
            return
        p, s = pair
        handshake = PrimaryHandshake(p.metadata, "peer", virgin=p.peering.virgin)
        reply = unpack_message(accept_first(Handshake1Request("data"), TOKEN)[1], HANDSHAKE_LIMIT)[1]
        request = Handshake2Request.from_nv(unpack_message(handshake.first_reply(reply), HANDSHAKE_LIMIT)[1])
        gives_up = s.metadata.discard
        bond = min({1, 2, 3} - {p.metadata.bond, s.metadata.bond})  # there are no other components
        answer = answer_second(request, 2, s.metadata, lambda: bytes(s.map), "none", "none", bond=bond)
        assert answer.decision.outcome is not Outcome.STRANGERS, "they belong together"
        if answer.map is not None:
            s.map[:] = answer.map
        s.metadata = answer.metadata
        _, nv, data = unpack_message(answer.message, HANDSHAKE_LIMIT)
        try:
            handshake.second_reply(nv)
        except RefusedError:
            assert answer.split_brain or answer.decision.outcome is Outcome.RESUID_MISMATCH
            return
        if gives_up and s.metadata.syncing:
            s.own -= s.given_up
        s.mixed = s.mixed or answer.decision.target
        self.check_direction(p, s, answer.decision.syncsrc)
        if heard:
            self.join(p, s, handshake.finish(data))

    def join(self, p: Node, s: Node, agreement: object) -> None:
        p.peering, p.metadata = peering.agreed(p.peering, agreement)  # type: ignore[arg-type]
        for at, bits in enumerate(agreement.map or b""):  # type: ignore[attr-defined]
            p.map[at] |= bits
        s.metadata = first_request(s.metadata)
        s.map[:] = bytes(len(s.map))
        self.source, self.session = agreement.syncsrc, True  # type: ignore[attr-defined]
        self.to_sync = {extent for extent in range(EXTENTS) if is_set(p.map, extent)}
        p.peering = peering.joined(p.peering, len(self.to_sync))[0]

    def check_direction(self, p: Node, s: Node, source: SyncSource) -> None:
        loser = s if source is SyncSource.PRIMARY else p
        assert not loser.own, "changes of a node that nobody gave up are about to be overwritten"

    def copy(self, many: int) -> None:
        pair = self.pair()
        if not self.session or pair is None:
            return
        source, target = pair if self.source is SyncSource.PRIMARY else pair[::-1]
        for extent in sorted(self.to_sync)[:many]:
            for block in range(BLOCKS):
                target.data[extent, block] = source.data.get((extent, block), 0)
            self.to_sync.discard(extent)

    def complete(self, noticed: bool) -> None:
        """The synchronisation is complete; `noticed`: the secondary hears it."""
        self.copy(EXTENTS)
        pair = self.pair()
        if not self.session or pair is None:
            return
        p, s = pair
        p.peering, p.metadata, _ = peering.in_sync(p.peering, p.metadata)
        for extent in range(EXTENTS):
            clear_bit(p.map, extent)
            for block in range(BLOCKS):
                assert p.data.get((extent, block), 0) == s.data.get((extent, block), 0), "they differ, in sync"
        assert decide(7, s.metadata.pair, 7, p.metadata.pair, False).outcome is Outcome.IN_SYNC
        for node in pair:
            node.mixed = False
            node.own.clear()
        if noticed:
            s.metadata = heed(Notice("data", TOKEN, SYNCED), TOKEN, s.metadata).metadata


NODES, EXTENT = (0, 1), st.integers(0, EXTENTS - 1)


def write(node: int) -> st.SearchStrategy[tuple[object, ...]]:
    return st.tuples(st.just("write"), st.just(node), EXTENT, st.integers(0, BLOCKS - 1))


SECONDARY, INIT = Role.SECONDARY, Role.INIT
STEPS = st.lists(
    st.one_of(
        st.sampled_from([("lead", node, role) for node in NODES for role in (SECONDARY, SECONDARY, INIT)]),
        st.sampled_from([("lead", node, SECONDARY, True) for node in NODES]),
        write(0),
        write(1),
        st.sampled_from([("discard", node) for node in NODES]),
        st.sampled_from([("connect", True), ("connect", True), ("connect", True), ("connect", False)]),
        st.sampled_from([("connect", True), ("copy", 1), ("copy", 2), ("cut",)]),
        st.sampled_from([("complete", True), ("complete", True), ("complete", False)]),
    ),
    min_size=10,
    max_size=60,
)


def play(steps: list[tuple[object, ...]]) -> World:
    world = World()
    for name, *arguments in steps:
        getattr(world, str(name))(*arguments)
    return world


# A target that is forced where no counter tells it takes another unique ID.
ANOTHER_ID: list[tuple[object, ...]] = [
    ("lead", 0, SECONDARY),
    ("connect", True),
    ("lead", 1, SECONDARY, True),
    ("lead", 0, SECONDARY),
    ("connect", True),
    ("complete", False),
    ("lead", 0, SECONDARY),
    ("connect", True),
    ("lead", 1, SECONDARY, True),
    ("connect", True),
]


@pytest.mark.slow
@settings(max_examples=1500)
@example(ANOTHER_ID)
@given(STEPS)
def test_histories_of_two_nodes(steps: list[tuple[object, ...]]) -> None:
    play(steps)


def split(*more: tuple[object, ...]) -> World:
    """Both had the same, then each wrote alone; then what is given."""
    a, b = 0, 1
    return play(
        [
            ("take_role", a, Role.PRIMARY),
            ("take_role", b, Role.SECONDARY),
            ("connect", True),
            ("write", a, 0, 0),
            ("complete", True),
            ("take_role", b, Role.INIT),
            ("write", a, 1, 0),
            ("take_role", a, Role.INIT),
            ("take_role", b, Role.PRIMARY),
            ("write", b, 2, 1),
            *more,
        ]
    )


def test_only_what_either_side_changed_travels() -> None:
    for gives_up in (0, 1):
        world = split(
            ("take_role", gives_up, Role.SECONDARY),
            ("discard", gives_up),
            ("take_role", 1 - gives_up, Role.PRIMARY),
            ("connect", True),
        )
        assert world.session and world.source is SyncSource.PRIMARY
        assert world.to_sync == {1, 2}
        world.complete(True)
        kept = world.nodes[1 - gives_up].data
        assert ((1, 0) in kept and kept[1, 0] > 0) is (gives_up == 1)


def test_without_discard_a_split_brain_stays_one() -> None:
    world = split(("take_role", 1, Role.SECONDARY), ("take_role", 0, Role.PRIMARY), ("connect", True))
    assert not world.session
