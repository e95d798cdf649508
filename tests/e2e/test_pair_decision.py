"""Every line of the decision table of docs/protocol.md section 6, between two nodes whose components say what it needs;
split-brain, seen from both sides, and the way out of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from hast.control import Role
from hast.metadata import METADATA_SIZE, unpack
from hast.metadata import Pair as Counters
from tests.e2e.node import MIB, eventually
from tests.e2e.pair import Pair, PairNode
from tests.nbdclient import FLUSH, RawClient

SIZE = 4 * MIB
EXTENT = 64 << 10
EXTENTS = SIZE // EXTENT
ID = 0x1234567890ABCDEF
A_DIRTY, B_DIRTY = {1, 2}, {2, 5, 63}  # extents that are dirty in the nodes' maps
MERGED, ALL = A_DIRTY | B_DIRTY, set(range(EXTENTS))

MakePair = Callable[..., Pair]


@dataclass(frozen=True)
class Case:
    """What the components say (a resuid and a pair for each node), and what comes of it: the node whose data is copied,
    which extents, or the words of a refusal."""

    primary: tuple[int, int, int]
    secondary: tuple[int, int, int]
    source: str = ""
    extents: frozenset[int] = frozenset()
    refusal: str = ""
    impossible: bool = False


def case(primary: tuple[int, int, int], secondary: tuple[int, int, int], *source: object, **words: object) -> Case:
    return Case(primary, secondary, *source, **words)  # type: ignore[arg-type]


CASES = {
    "both-new": case((0, 0, 0), (0, 0, 0), "", frozenset()),
    "fresh-secondary": case((ID, 1, 0), (0, 0, 0), "a", frozenset(ALL)),
    "fresh-secondary-of-an-unwritten-primary": case((ID, 0, 0), (0, 0, 0), "a", frozenset(ALL)),
    "other-id": case((ID, 1, 1), (ID + 1, 1, 1), refusal="Resource unique ID mismatch"),
    "primary-out-of-date": case((ID, 3, 4), (ID, 5, 3), "b", frozenset(MERGED)),
    "in-sync": case((ID, 3, 4), (ID, 4, 3), "a", frozenset(MERGED)),
    "secondary-out-of-date": case((ID, 5, 4), (ID, 4, 3), "a", frozenset(MERGED)),
    "split-brain": case((ID, 5, 4), (ID, 6, 3), refusal="split-brain"),
    "impossible-primary-newer": case((ID, 3, 4), (ID, 2, 3), "a", frozenset(ALL), impossible=True),
    "impossible-secondary-newer": case((ID, 3, 4), (ID, 5, 7), "b", frozenset(ALL), impossible=True),
}


def prepare(node: PairNode, name: str, counters: tuple[int, int, int], dirty: set[int]) -> None:
    """Write metadata, map and data straight to the component; the data is the node's letter."""
    resuid, local, remote = counters
    role, fill = (Role.PRIMARY, b"a") if node.node == "hasta" else (Role.SECONDARY, b"b")
    with node.component(name).open("r+b") as file:
        metadata = unpack(file.read(METADATA_SIZE), node.name(name))
        new = replace(metadata, resuid=resuid, pair=Counters(local, remote), prevrole=role if resuid else Role.INIT)
        bits = sum(1 << extent for extent in dirty) if resuid else 0
        file.seek(0)
        file.write(new.pack() + bits.to_bytes(metadata.mapsize, "little") + fill * SIZE)


def expect_data(pair: Pair, name: str, expected: Case) -> None:
    """Exactly the extents that are to be copied have been, from the right side."""
    for node, own in ((pair.a, b"a"), (pair.b, b"b")):
        data = pair.data(node, name)
        for extent in range(EXTENTS):
            wanted = expected.source.encode() if extent in expected.extents else own
            found = data[extent * EXTENT : (extent + 1) * EXTENT]
            assert found == wanted * EXTENT, f"{name}: extent {extent} of node {own!r} has {found[:1]!r}"


@pytest.mark.slow
def test_every_line_of_the_table(make_pair: MakePair) -> None:
    pair = make_pair(dict.fromkeys(CASES, SIZE), hooks=True, conf="timeout 5\ncompression none")
    pair.create("-e", str(EXTENT))
    for name, expected in CASES.items():
        prepare(pair.a, name, expected.primary, A_DIRTY)
        prepare(pair.b, name, expected.secondary, B_DIRTY)
    pair.start()
    for name in CASES:
        pair.b.set_role("secondary", name)
    for name, expected in CASES.items():
        pair.a.set_role("primary", name)
        if expected.refusal:
            check_refused(pair, name, expected)
        else:
            check_synchronised(pair, name, expected)


def check_synchronised(pair: Pair, name: str, expected: Case) -> None:
    full = pair.a.name(name)
    pair.wait_in_sync(pair.a, name)
    expect_data(pair, name, expected)
    wanted = ["connect", *(["syncstart", "syncdone"] if expected.extents else [])]
    eventually(lambda: [e.split()[0] for e in events(pair.a, pair, full)] == wanted, f"{name}: events {wanted}")
    assert [e.split()[0] for e in events(pair.b, pair, full)] == ["connect"]
    warned = any("counters that cannot be" in line and full in line for line in pair.b.said().splitlines())
    assert warned == expected.impossible
    primary, secondary = pair.a.dump(name), pair.b.dump(name)
    assert primary["resuid"] == secondary["resuid"] != 0
    if expected.primary[0]:
        assert primary["resuid"] == ID
    # In step: each side's own counter is what the other knows of it.
    assert (primary["localcnt"], primary["remotecnt"]) == (secondary["remotecnt"], secondary["localcnt"])
    # The same once more has nothing to do, but for extents that are hot.
    pair.a.set_role("init", name)
    pair.a.set_role("primary", name)
    pair.wait_in_sync(pair.a, name)
    expect_data(pair, name, expected)


def events(node: PairNode, pair: Pair, full: str) -> list[str]:
    """Events of one resource other than role changes, of its first connection."""
    found = [e for e in pair.events(node) if e.split()[1] == full and not e.startswith("role ")]
    return found[: found.index(f"disconnect {full}")] if f"disconnect {full}" in found else found


def check_refused(pair: Pair, name: str, expected: Case) -> None:
    """Both nodes say why, stay as they are, and serve: the primary alone."""
    full = pair.a.name(name)
    for node in pair.nodes:
        eventually(
            lambda node=node: any(full in line and expected.refusal in line for line in node.said().splitlines()),
            f"{name}: {node.node} says why",
        )
        assert node.status(name)["status"] == "degraded"
    for node, counters in ((pair.a, expected.primary), (pair.b, expected.secondary)):
        dump = node.dump(name)
        assert (dump["resuid"], dump["localcnt"], dump["remotecnt"]) == counters
    expect_data(pair, name, expected)
    split = expected.refusal == "split-brain"
    for node in pair.nodes:
        wanted = [f"split-brain {full}"] if split else []
        eventually(lambda node=node, wanted=wanted: events(node, pair, full)[:1] == wanted, f"{name}: hook")
        assert set(events(node, pair, full)) <= set(wanted)
    with RawClient(pair.a.socket(name)) as raw:
        assert raw.read(0, 512) == b"a" * 512


def test_split_brain_comes_about_and_is_left(make_pair: MakePair) -> None:
    """Both nodes were primary without the other. Whoever is made primary then is refused, whichever it is; after the
    way out, as hastd(8) and the README have it, both have the data of the node that was chosen."""
    pair = make_pair({"disk": 16 * MIB}, hooks=True)
    pair.up()
    name = pair.a.name()
    with RawClient(pair.a.socket()) as raw:
        assert raw.write(0, b"both" * 1024) == 0
        assert raw.do(FLUSH).error == 0
    pair.b.stop()
    with RawClient(pair.a.socket()) as raw:
        assert raw.write(0, b"from" * 1024) == 0
        assert raw.write(8 * MIB, b"of a" * 1024) == 0
    pair.a.stop()
    pair.b.start()
    pair.b.set_role("primary")
    with RawClient(pair.b.socket()) as raw:
        assert raw.read(0, 4096) == b"both" * 1024
        assert raw.write(4 * MIB, b"of b" * 1024) == 0
    pair.a.start()
    for primary in (pair.b, pair.a):
        for node in pair.nodes:
            node.set_role("init")
        seen = [pair.events(node).count(f"split-brain {name}") for node in pair.nodes]
        pair.other(primary).set_role("secondary")
        primary.set_role("primary")
        for node, before in zip(pair.nodes, seen, strict=True):
            eventually(lambda node=node, before=before: pair.events(node).count(f"split-brain {name}") > before, "hook")
            assert node.status()["status"] == "degraded"
    # a is primary now, and b's data is what is thrown away.
    for command in (("role", "init"), ("create",), ("role", "secondary")):
        pair.b.ctl(*command, name)
    pair.wait_in_sync(pair.a)
    assert pair.differing() is None
    with RawClient(pair.a.socket()) as raw:
        assert raw.read(0, 4096) == b"from" * 1024
        assert raw.read(4 * MIB, 4096) == bytes(4096)
        assert raw.read(8 * MIB, 4096) == b"of a" * 1024
    # And roles can be changed again.
    new = pair.swap(pair.a)
    pair.wait_in_sync(new)
    assert pair.differing() is None
