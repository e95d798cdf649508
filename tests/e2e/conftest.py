"""Nodes for end-to-end tests; each is taken away at the end, and has to have cleaned up after itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.e2e.node import Node, complain


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
