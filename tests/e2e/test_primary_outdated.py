"""The primary's component is out of date, the secondary's data is what counts, and something else fails."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from typing import Any

import pytest

from hast.activemap import METADATA_SIZE
from hast.handshake import accept_first, answer_second
from hast.messages import Handshake1Request, Handshake2Request
from hast.metadata import unpack
from tests.e2e.node import MIB, eventually
from tests.e2e.pair import Pair
from tests.e2e.relay import Relay
from tests.e2e.test_primary_disk import EXTENT, NEW, NEWER, OLD, MakePair, back, check, prepare, write
from tests.faultdisk import FaultDisk
from tests.nbdclient import EIO, READ, RawClient


@pytest.mark.parametrize("policy", ["detach", "pass"])
def test_dies_while_it_gets_its_data_from_the_secondary(make_pair: MakePair, policy: str) -> None:
    """Which is the truth, and stays it: it goes on without this node's component."""
    pair = make_pair({"disk": 64 * MIB}, conf=f"timeout 5\non-io-error {policy}\nsyncrate 8388608", hooks=True)
    pair.create()
    disk = FaultDisk.under(pair.a)
    pair.start()
    pair.roles(pair.a)
    pair.wait_in_sync(pair.a)
    pair.a.set_role("init")
    pair.b.set_role("primary")
    with RawClient(pair.b.socket()) as raw:
        write(raw, NEW, 16)
    pair.b.set_role("secondary")
    pair.a.set_role("primary")
    pair.wait_connected(pair.a)
    disk.fail("all", errno.EIO)
    with RawClient(pair.a.socket()) as raw:
        write(raw, NEWER, 8)
    assert "cannot be written: everything is done by the secondary" in pair.a.said()
    assert pair.a.status()["syncing"] == 2 and "cannot be hidden" not in pair.a.said()
    check(pair, NEWER, 8)
    back(pair, disk)
    check(pair, NEWER, 8)
    pair.wait_in_sync(pair.a)
    assert pair.differing() is None


def test_out_of_date_and_with_a_secondary_that_answers_and_is_gone(
    make_relayed: Callable[..., tuple[Pair, Relay]],
) -> None:
    """Each connection ends, in good order, as soon as its handshake is done, as when the secondary cannot start its
    stages: clients wait no longer for it than for one that is not there."""
    relays: list[Relay] = []

    def make(*arguments: Any, **keywords: Any) -> Pair:
        keywords["conf"] += "\ncompression none"
        pair, relay = make_relayed(*arguments, **keywords)
        relays.append(relay)
        return pair

    pair, disk, _ = prepare(make, "detach", timeout=8)
    disk.fail("write", errno.EIO)
    with RawClient(pair.a.socket()) as raw:
        write(raw, NEW, 1)
        eventually(lambda: pair.a.status()["syncing"] == 2, "everything is done by the secondary")
        cutting = threading.Event()
        cutter = threading.Thread(target=cut_after_each_handshake, args=(pair, relays[0], cutting))
        cutter.start()
        try:
            eventually(lambda: " lost: " in pair.a.said(), "the first connection is lost")
            assert raw.write(EXTENT, NEW) == EIO
        finally:
            cutting.set()
            cutter.join()
        assert pair.a.said().count(" lost: ") > 1
        relays[0].heal()
        eventually(lambda: raw.write(EXTENT, NEW) == 0, "it is well again")


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "not stored"])
def test_out_of_date_and_alone_until_it_is_forced(make_pair: MakePair, stored: bool) -> None:
    """The secondary may be lost for good: an administrator gives up what only that one has. Should it come back all the
    same, nothing of it is overwritten."""
    pair, disk, start = prepare(make_pair, "pass" if stored else "detach")
    disk.fail("write", errno.EIO, within=(start, 1 << 40) if stored else None)
    with RawClient(pair.a.socket()) as raw:
        write(raw, NEW, 4)
        pair.b.kill()
        assert raw.do(READ, 0, 4096).error == EIO
    disk.heal()
    pair.a.set_role("primary")  # which it is: nothing happens
    with RawClient(pair.a.socket()) as raw:
        assert raw.do(READ, 0, 4096).error == EIO
    assert pair.a.ctl("role", "-f", "primary", pair.a.name()).returncode == 0
    assert "becomes primary by force with data that is a mix of old and new" in pair.a.said()
    with RawClient(pair.a.socket()) as raw:
        assert raw.read(0, 4096) == OLD
        assert raw.write(0, NEWER) == 0
    pair.b.start()
    pair.b.set_role("secondary")
    eventually(lambda: "plit-brain" in pair.a.said() or "nique ID mismatch" in pair.a.said(), "that is found")
    assert pair.data(pair.b)[:4096] == NEW


def cut_after_each_handshake(pair: Pair, relay: Relay, end: threading.Event) -> None:
    a, b = (unpack(node.component().read_bytes()[:METADATA_SIZE], node.name()) for node in pair.nodes)
    request = Handshake2Request(a.resource, bytes(16), a.resuid, a.pair.localcnt, a.pair.remotecnt, hast=True)
    answer = answer_second(request, 2, b, lambda: bytes(b.mapsize), "none", "none").message
    size = len(accept_first(Handshake1Request(a.resource, 2), bytes(16))[1]) + len(answer)
    relay.back.cut_after = size
    relay.cut()
    while not end.wait(0.02):
        if relay.back.cut_after is None:
            relay.back.cut_after = size
