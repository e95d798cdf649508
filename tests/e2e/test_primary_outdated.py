"""The primary's component is out of date, the secondary's data is what counts, and something else fails."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from typing import Any

from hast.activemap import METADATA_SIZE
from hast.handshake import accept_first, answer_second
from hast.messages import Handshake1Request, Handshake2Request
from hast.metadata import unpack
from tests.e2e.node import eventually
from tests.e2e.pair import Pair
from tests.e2e.relay import Relay
from tests.e2e.test_primary_disk import EXTENT, NEW, prepare, write
from tests.nbdclient import EIO, RawClient


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
