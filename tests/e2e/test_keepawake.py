"""keepawake: who has asked the kernel that processors wake quickly, and that it is asked while there is work."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from hast.stages import awake
from tests.e2e.node import MIB, Node, eventually
from tests.e2e.pair import Pair
from tests.e2e.test_reload import Writer, reload
from tests.e2e.test_reload_pair import connections

SIZE = 16 * MIB

pytestmark = pytest.mark.skipif(
    not os.access(awake.DEVICE, os.W_OK), reason=f"{awake.DEVICE} is not there or only for root: nothing can be asked"
)


def asking(node: Node) -> list[str]:
    """Which of the node's stages have the kernel's device open."""
    return sorted(title.rpartition(" ")[2] for pid, title in node.titles().items() if has_it(pid))


def has_it(pid: int) -> bool:
    try:
        return str(awake.DEVICE) in {str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir()}
    except OSError:
        return False  # a descriptor, or all of it, has just gone


def allowed() -> int:
    """How long a wake-up may take on this machine now, us; others may have asked as well."""
    fd = os.open(awake.DEVICE, os.O_RDONLY)
    try:
        (us,) = struct.unpack("i", os.read(fd, 4))
        return int(us)
    finally:
        os.close(fd)


def test_asked_by_those_that_decide_and_while_there_is_work(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair({"disk": SIZE})
    pair.up()
    eventually(lambda: asking(pair.a) == ["ggate"], "the primary's ggate can ask, and nobody else")
    eventually(lambda: asking(pair.b) == ["recv"], "the secondary's recv can ask, and nobody else")
    with Writer(pair.a, "disk"):
        eventually(lambda: allowed() == awake.limit(), "the kernel is asked for quick wake-ups")


def test_off_and_changed_while_it_runs(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair({"disk": SIZE}, conf="timeout 5", resource_conf="keepawake off")
    pair.up()
    assert asking(pair.a) == asking(pair.b) == []
    with Writer(pair.a, "disk") as writer:
        before = connections(pair.a)
        for now, then in ("off", "on"), ("on", "off"):
            for node, stage in zip(pair.nodes, ("ggate", "recv"), strict=True):
                text = node.conf.read_text().replace(f"keepawake {now}", f"keepawake {then}")
                assert reload(node, text) == f"changed {node.name()} (keepawake)"
                wanted = [stage] if then == "on" else []
                eventually(lambda n=node, w=wanted: asking(n) == w, f"keepawake {then}")
            writer.goes_on()
        assert connections(pair.a) == before
