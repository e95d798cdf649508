"""Nodes for end-to-end tests; each is taken away at the end, and has to have cleaned up after itself."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.e2e.node import Node, complain, loopback
from tests.e2e.pair import Pair, said
from tests.e2e.relay import Relay


@pytest.fixture
def make_node() -> Iterator[Callable[..., Node]]:
    """Makes nodes: the arguments are those of Node. Nothing runs yet."""
    nodes: list[Node] = []

    def make(*arguments: Any, **keywords: Any) -> Node:
        node = Node(*arguments, **keywords)
        nodes.append(node)
        return node

    yield make
    logs = {node.id: node.said() for node in nodes}
    complaints = complain(nodes)
    for name, log in logs.items():
        print(f"---- hastd of {name}\n{log}")  # pytest shows it when something failed
    assert not complaints, "\n".join(complaints)


@pytest.fixture
def node(make_node: Callable[..., Node]) -> Node:
    """One node with one resource "disk" of 64 MiB, primary, an NBD socket and no block device."""
    node = make_node()
    node.primary()
    return node


@pytest.fixture
def make_pair() -> Iterator[Callable[..., Pair]]:
    """Makes pairs of nodes: the arguments are those of Pair. Nothing runs yet."""
    pairs: list[Pair] = []

    def make(*arguments: Any, **keywords: Any) -> Pair:
        pairs.append(Pair(*arguments, **keywords))
        return pairs[-1]

    yield make
    log = said(pairs)
    complaints = [complaint for pair in pairs for complaint in pair.close()]
    print(log)  # pytest shows it when something failed
    assert not complaints, "\n".join(complaints)


@pytest.fixture
def pair(make_pair: Callable[..., Pair]) -> Pair:
    """Two nodes with one resource "disk" of 64 MiB, `a` primary, in sync, NBD sockets and no block devices."""
    pair = make_pair()
    pair.up()
    return pair


@pytest.fixture
def make_relayed(make_pair: Callable[..., Pair]) -> Iterator[Callable[..., tuple[Pair, Relay]]]:
    """Makes a pair whose node `a` reaches `b` through a relay: the arguments are those of Pair."""
    relays: list[Relay] = []

    def make(*arguments: Any, **keywords: Any) -> tuple[Pair, Relay]:
        relay = Relay(loopback(random.randrange(1 << 20)))
        relays.append(relay)
        pair = make_pair(*arguments, remotes={"hasta": relay.url}, **keywords)
        relay.target(pair.b.address, pair.a.address)
        return pair, relay

    yield make
    for relay in relays:
        relay.close()
