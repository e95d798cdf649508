"""Invariant 6 across restarts: a primary that was getting its data from the secondary never serves its own old data."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

from hast.activemap import METADATA_SIZE
from hast.component import open_component
from hast.control import Role
from hast.metadata import Pair
from tests.e2e.node import Node, eventually
from tests.nbdclient import EIO, READ, RawClient

EXTENT = 2 << 20


def make_target(node: Node) -> None:
    """The component as a primary leaves it that died in the middle of a synchronisation from its secondary: extent 3
    is old here."""
    component = open_component(node.name(), str(node.component()), "off")
    try:
        metadata = component.read_metadata()
        component.pwrite(METADATA_SIZE, bytes([1 << 3]) + bytes(metadata.mapsize - 1))
        component.write_metadata(
            replace(metadata, resuid=7, pair=Pair(0, 0), prevrole=Role.PRIMARY, syncing=True, alone=False)
        )
    finally:
        component.close()


def check(node: Node) -> None:
    with RawClient(node.socket()) as client:
        assert client.do(READ, 3 * EXTENT, 4096).error == EIO
        assert client.do(READ, 2 * EXTENT, 4096).error == 0


def test_old_data_is_not_served_after_a_restart(make_node: Callable[..., Node]) -> None:
    """Without its secondary it answers EIO for what only that one has, also after its stages were replaced."""
    node = make_node()
    node.create()
    make_target(node)
    node.start()
    node.role("primary")
    check(node)
    (ggate,) = (pid for pid, title in node.titles().items() if title.endswith(": ggate"))
    node.run("kill", "-9", str(ggate))
    eventually(lambda: "its stages run again" in node.said(), "new stages run")
    check(node)


def test_a_primary_that_was_a_target_takes_its_role_again_but_not_after_it_was_secondary(
    make_node: Callable[..., Node],
) -> None:
    """It knows what it must not serve; a former secondary does not even know which of its flushes are whole."""
    node = make_node()
    node.create()
    make_target(node)
    node.start()
    for _ in range(2):
        node.role("primary")
        assert node.status()["syncing"]
        check(node)
        node.role("init")
    node.role("secondary")
    assert node.role("primary", check=False).returncode == os.EX_UNAVAILABLE
    assert node.status()["role"] == "secondary"
    node.role("init")
    assert node.role("primary", check=False).returncode == os.EX_UNAVAILABLE
