"""The primary's node is killed under load, the secondary takes over: nothing that was acknowledged is lost."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hast.device import fuse
from tests import tools
from tests.e2e.node import DEADLINE, MIB, ROOT, Node, eventually
from tests.e2e.pair import Pair
from tests.e2e.test_crash import BLOCK, SIZE, Writer, content, sectors
from tests.nbdclient import RawClient

ROUNDS = {"fullsync": 20, "memsync": 10}
FILE_ROUNDS = {"fullsync": 10, "memsync": 5}

MakePair = Callable[..., Pair]


def check(node: Node, writer: Writer) -> None:
    """Through the new primary's NBD socket: each block holds what was acknowledged last, or what was under way. The
    latter gets the former again: the next round has to know what there is."""
    flying = {block: number for block, number in writer.flying.values() if block >= 0}
    acked = {block: content(number) for block, number in writer.acked.items()}
    with RawClient(node.socket()) as client:
        data = client.read(0, SIZE // 2) + client.read(SIZE // 2, SIZE // 2)
        for block in {*acked, *flying}:
            found = set(sectors(data[block * BLOCK : (block + 1) * BLOCK]))
            expected = acked.get(block, bytes(BLOCK))
            allowed = {expected[:512]}
            if block in flying:
                allowed.add(content(flying[block])[:512])
            assert found <= allowed, f"block {block}: acknowledged write {writer.acked.get(block)} is not there"
            if block in flying:
                assert client.write(block * BLOCK, expected) == 0


@pytest.mark.slow
@pytest.mark.parametrize("replication", list(ROUNDS))
def test_kill_the_primary_during_random_writes(make_pair: MakePair, replication: str) -> None:
    """At a different moment each time; the killed node comes back as secondary, is made the same as the other one, and
    is the next to take over."""
    pair = make_pair({"disk": SIZE}, conf=f"timeout 5\nreplication {replication}")
    pair.up()
    primary = pair.a
    acked: dict[int, int] = {}
    rng = random.Random(replication)
    for round_ in range(ROUNDS[replication]):
        writer = Writer(primary, round_, acked)
        thread = threading.Thread(target=writer.run, args=((round_ + 1) << 32,))
        thread.start()
        try:
            assert writer.progress.wait(DEADLINE), "the writer makes no progress"
            thread.join(rng.random() * 0.3)  # the moment: nothing is waited for
        finally:
            primary.kill()
            thread.join(DEADLINE)
        assert not thread.is_alive()
        killed, primary = primary, pair.other(primary)
        primary.set_role("primary")
        check(primary, writer)
        killed.start()
        killed.set_role("secondary")
        pair.wait_in_sync(primary)
        assert pair.differing() is None, f"round {round_}"
    assert len(acked) > 50 * ROUNDS[replication]


@pytest.fixture
def make_block_pair(make_pair: MakePair) -> Iterator[MakePair]:
    """Makes pairs with block devices. A watchdog aborts their channels when a test takes so long that somebody must be
    hanging on one."""
    tools.need_root()
    tools.need("mkfs.ext4")
    reason = fuse.usable()
    if reason is not None:
        pytest.skip(reason)
    pairs: list[Pair] = []

    def make(**keywords: object) -> Pair:
        pairs.append(make_pair(device="fuse", **keywords))
        return pairs[-1]

    def abort() -> None:
        for pair in pairs:
            for node in pair.nodes:
                fuse.abort(node.rundir, node.name())

    watchdog = threading.Timer(3 * DEADLINE, abort)
    watchdog.daemon = True
    watchdog.start()
    yield make
    watchdog.cancel()


class Files:
    """A file system on whichever node is primary, and the files on it that are safe: name -> SHA-256."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.safe: dict[str, str] = {}

    @staticmethod
    def point(node: Node) -> Path:
        point = node.directory / "mnt"
        point.mkdir(exist_ok=True)
        return point

    def mount(self, node: Node) -> None:
        node.run("mount", node.device(), self.point(node))

    def write_until(self, node: Node, prefix: str, count: int, moment: float) -> None:
        """Write files on the node's mount until `count` are safe and `moment` seconds are over; then kill the node."""
        command = [sys.executable, "-m", "tests.e2e.filewriter", str(self.point(node)), prefix]
        log = node.directory / "safe"
        with log.open("wb") as output:
            writer = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.PIPE, text=True)
        try:
            eventually(lambda: log.read_bytes().count(b"\n") >= count or writer.poll() is not None, "files")
            assert writer.poll() is None, writer.communicate()[1]
            threading.Event().wait(moment)  # nothing is waited for
        finally:
            node.kill()
            _, said = writer.communicate(timeout=DEADLINE)
        assert "filewriter: " in said  # it met the end of the device
        self.safe |= dict(line.split() for line in log.read_text().splitlines())
        node.run("umount", "-l", self.point(node))

    def check(self, node: Node) -> None:
        """fsck replays the journal and has nothing else to complain of; all that is safe is there."""
        fsck = str(tools.find("e2fsck"))
        assert node.run(fsck, "-p", node.device(), check=False).returncode in (0, 1)
        node.run(fsck, "-f", "-n", node.device())
        self.mount(node)
        for name, digest in self.safe.items():
            assert hashlib.sha256((self.point(node) / name).read_bytes()).hexdigest() == digest, name


@pytest.mark.slow
@pytest.mark.root
@pytest.mark.parametrize("replication", list(FILE_ROUNDS))
def test_files_that_were_synced_survive(make_block_pair: MakePair, replication: str) -> None:
    pair = make_block_pair(resources={"disk": 128 * MIB}, conf=f"timeout 5\nreplication {replication}")
    pair.up()
    primary, files = pair.a, Files(pair)
    primary.run("mkfs.ext4", "-q", primary.device())
    files.mount(primary)
    rng = random.Random(replication)
    for round_ in range(FILE_ROUNDS[replication]):
        files.write_until(primary, f"r{round_}", 20, rng.random() * 0.3)
        killed, primary = primary, pair.other(primary)
        primary.set_role("primary")
        files.check(primary)
        killed.start()
        killed.set_role("secondary")
        pair.wait_in_sync(primary)
    assert len(files.safe) >= 20 * FILE_ROUNDS[replication]
    primary.run("umount", files.point(primary))
    assert pair.differing() is None
