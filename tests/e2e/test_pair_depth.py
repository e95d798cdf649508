"""More requests than there are slots, with a secondary that lags behind: every one is answered."""

from __future__ import annotations

from tests.e2e.node import MIB
from tests.e2e.pair import Pair
from tests.nbdclient import WRITE, RawClient

DEPTH = 200
WRITES = 20000


def test_slots_that_come_back_from_the_secondary_wake_clients(pair: Pair) -> None:
    """memsync: a write is answered before its slot is free. Clients that had found none waited for ever, because only
    answers, and not what the secondary gave back, made them look again."""
    a = pair.a
    clients = [RawClient(a.socket()) for _ in range(4)]
    payload = bytes(range(256)) * 16
    under_way = dict.fromkeys(clients, 0)
    for number in range(WRITES):
        client = clients[number % len(clients)]
        if under_way[client] == DEPTH:
            for answer in client.wait(DEPTH // 2).values():
                assert answer.error == 0
            under_way[client] -= DEPTH // 2
        client.start(WRITE, number * 4096 % (64 * MIB - 4096), len(payload), payload=payload)
        under_way[client] += 1
    for client in clients:
        assert all(answer.error == 0 for answer in client.wait(under_way[client]).values())
        client.close()
    assert a.status()["stat_write"] == WRITES
