"""What takes no waiting is done without the disk stage (hast/ffi/direct.h); what fails there is the disk stage's."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.e2e.node import MIB, Node, component_size
from tests.e2e.pair import Pair
from tests.nbdclient import FLUSH, READ, RawClient

BLOCK = 4096


@contextmanager
def stopped(node: Node) -> Iterator[None]:
    """The disk stage does nothing meanwhile."""
    (pid,) = (pid for pid, title in node.titles().items() if title.endswith(": disk"))
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_component_in_memory_is_read_and_written_without_the_disk_stage(node: Node) -> None:
    with RawClient(node.socket()) as client:
        assert client.write(0, bytes(BLOCK)) == 0  # the extent is dirty in the map on disk
        with stopped(node):
            assert client.write(0, b"a" * BLOCK) == 0
            assert client.read(0, BLOCK) == b"a" * BLOCK
        assert client.do(FLUSH).error == 0
    status = node.status()
    assert (status["stat_write"], status["stat_read"], status["stat_flush"]) == (2, 1, 1)


@pytest.mark.parametrize("mode", ["fullsync", "memsync"])
def test_a_secondary_in_memory_writes_without_the_disk_stage(make_pair: Callable[..., Pair], mode: str) -> None:
    pair = make_pair(resource_conf=f"replication {mode}")
    pair.up()
    with RawClient(pair.a.socket()) as client:
        assert client.write(0, bytes(BLOCK)) == 0
        pair.wait_in_sync(pair.a)
        with stopped(pair.b):
            for n in range(1, 21):  # zeros would be a hole, which is the disk stage's
                assert client.write(n % 3 * BLOCK, bytes([n]) * BLOCK) == 0
        assert client.do(FLUSH).error == 0
    assert pair.differing() is None
    assert pair.a.status()["status"] == "complete"


def test_what_fails_is_tried_and_answered_by_the_disk_stage(node: Node) -> None:
    """A file that has been cut behind hastd's back: nothing is there to be read. It is an error, and counts once."""
    os.truncate(node.component(), component_size(64 * MIB) - 32 * MIB)
    with RawClient(node.socket()) as client:
        assert client.do(READ, 64 * MIB - BLOCK, BLOCK).error == errno.EIO
        assert client.read(0, BLOCK) == bytes(BLOCK)
    status = node.status()
    assert (status["stat_read"], status["stat_read_error"]) == (2, 1)


def test_the_page_cache_is_read_and_written(make_node: Callable[..., Node]) -> None:
    """Whether what is asked for is there or not, and whether the file system knows how not to wait or not."""
    node = make_node(memory=False, resource_conf="directio off")
    node.primary()
    with RawClient(node.socket()) as client:
        for n in range(64):
            assert client.write(n * BLOCK, bytes([n]) * BLOCK) == 0
        assert client.do(FLUSH).error == 0
        for cold in (False, True):
            if cold:
                fd = os.open(node.component(), os.O_RDONLY)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(fd)
            for n in range(64):
                assert client.read(n * BLOCK, BLOCK) == bytes([n]) * BLOCK
