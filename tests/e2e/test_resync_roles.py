"""Roles change at bad moments: in the middle of a synchronisation, on both nodes, by several at once, on nodes that
have never met. Nobody serves what he should not, and no difference stays unknown."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from hast.control import CMD_SET_ROLE, ControlRequest, Role, RoleReply
from hast.errors import HastError
from tests.e2e.node import DEADLINE, MIB, eventually
from tests.e2e.pair import Pair, PairNode
from tests.e2e.relay import Relay, Way
from tests.e2e.test_block_device import stage_pid
from tests.nbdclient import FLUSH, RawClient

SIZE = 32 * MIB
EXTENT = 2 * MIB
SLOW = "timeout 3\ncompression none\nsyncrate 65536"  # minutes for all of it
COMMANDS = 12  # of each shell
WINDOW = 8.0  # seconds: longer than the longest pause between two attempts to connect

MakePair = Callable[..., Pair]


def write(node: PairNode, fill: bytes, *offsets: int) -> None:
    with RawClient(node.socket()) as raw:
        for offset in offsets:
            assert raw.write(offset, fill * 4096) == 0
        assert raw.do(FLUSH).error == 0


def read(node: PairNode, offset: int) -> bytes:
    with RawClient(node.socket()) as raw:
        data = raw.read(offset, 4096)
    assert data == data[:1] * 4096
    return data[:1]


def refused(node: PairNode) -> None:
    done = node.role("primary", check=False)
    assert done.returncode == 69 and "not complete" in done.stderr


def fast(pair: Pair) -> None:
    """The synchronisation goes on at full speed."""
    for node in pair.nodes:
        node.conf.write_text(node.conf.read_text().replace("syncrate 65536", "syncrate 0"))
        assert node.hastd is not None
        node.hastd.send_signal(1)


# ---- in the middle of a synchronisation ----


@pytest.mark.slow
def test_role_taken_back_during_a_resync_at_full_speed(make_relayed: Callable[..., tuple[Pair, Relay]]) -> None:
    """Chunks follow each other without a pause: the last is one of those that were under way."""
    pair, relay = make_relayed({"disk": 64 * MIB}, conf="timeout 20\ncompression none", hooks=True)
    pair.create()
    pair.start()
    pair.a.set_role("primary")
    write(pair.a, b"a", *range(0, 64 * MIB, EXTENT))
    relay.trouble(there=Way(rate=2.0 * MIB))
    pair.b.set_role("secondary")
    eventually(lambda: f"syncstart {pair.a.name()}" in pair.events(pair.a), "the synchronisation begins")
    dirty = pair.a.status()["dirty"]
    eventually(lambda: pair.a.status()["dirty"] < dirty, "it gets on")
    pair.a.set_role("init")
    assert "does not end" not in pair.a.log.read_text()
    relay.heal()
    pair.a.set_role("primary")
    pair.wait_in_sync(pair.a)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["a", "b"])
def test_resync_source_becomes_target(make_pair: MakePair, source: str) -> None:
    """The source steps back and the target is asked: it refuses, whichever role it had. The source takes its role again
    and it goes on. With force the target is primary: then the source's changes can be given up."""
    pair = make_pair({"disk": SIZE}, conf=SLOW, hooks=True)
    pair.create("-k", "1")
    pair.start()
    pair.roles(pair.a)
    write(pair.a, b"-", *range(0, SIZE, EXTENT))
    pair.wait_in_sync(pair.a)
    has = pair.a if source == "a" else pair.b
    lacks = pair.other(has)
    lacks.set_role("init")
    if has is pair.b:
        pair.b.set_role("primary")
    write(has, b"n", *range(0, SIZE, EXTENT))
    # The primary is `a` in either case: it gives to the secondary, or gets from it.
    if has is pair.b:
        pair.b.set_role("secondary")
        pair.a.set_role("primary")
    else:
        pair.b.set_role("secondary")
    pair.wait_connected(pair.a)
    eventually(lambda: lacks.dump()["syncing"], "the target knows that it is one")
    pair.a.set_role("secondary")
    refused(lacks)
    has.set_role("primary")
    lacks.set_role("secondary")
    pair.wait_connected(has)
    assert read(has, SIZE - EXTENT) == b"n"
    has.set_role("secondary")
    refused(lacks)
    has.set_role("primary")
    pair.wait_connected(has)
    assert lacks.dump()["syncing"]
    # Forced, in spite of all.
    has.set_role("init")
    lacks.ctl("role", "-f", "primary", lacks.name())
    write(lacks, b"f", 0)
    has.set_role("secondary")
    eventually(lambda: f"split-brain {has.name()}" in pair.events(has), "they find a split-brain")
    assert read(lacks, 0) == b"f"
    fast(pair)
    has.ctl("discard", has.name())
    pair.wait_in_sync(lacks)
    assert pair.differing() is None
    assert read(lacks, 0) == b"f"


@pytest.mark.parametrize("both_write", [False, True])
def test_promoted_while_the_primary_runs(make_pair: MakePair, both_write: bool) -> None:
    """Both serve. When one steps back, its changes are found, or there are none and it gets the other's."""
    pair = make_pair({"disk": SIZE}, conf="timeout 3", hooks=True)
    pair.up()
    write(pair.a, b"-", *range(0, SIZE, EXTENT))
    pair.wait_in_sync(pair.a)
    pair.b.set_role("primary")
    eventually(lambda: f"disconnect {pair.a.name()}" in pair.events(pair.a), "the old primary notices")
    write(pair.b, b"b", EXTENT)
    if both_write:
        write(pair.a, b"a", 2 * EXTENT)
    assert read(pair.a, EXTENT) == b"-" and read(pair.b, EXTENT) == b"b"
    pair.a.set_role("secondary")
    if not both_write:
        pair.wait_in_sync(pair.b)
    else:
        for node in pair.nodes:
            eventually(lambda node=node: f"split-brain {node.name()}" in pair.events(node), "both find a split-brain")
        assert read(pair.b, 2 * EXTENT) == b"-"
        pair.a.ctl("discard", pair.a.name())
        pair.wait_in_sync(pair.b)
    assert pair.differing() is None
    assert read(pair.b, EXTENT) == b"b" and read(pair.b, 2 * EXTENT) == b"-"


# ---- while a primary waits for the other one ----


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["disk", "ggate"])
def test_stage_dies_while_its_primary_waits_for_the_other_one(make_pair: MakePair, stage: str) -> None:
    """There is one connection when the other one has stepped back, and it stays: nobody else makes another one."""
    pair = make_pair({"disk": SIZE}, conf="timeout 60")
    pair.up(pair.b)
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(pair.a.set_role, "primary")
        eventually(lambda: "is still primary, waiting for it" in pair.a.said(), "it waits for the other node")
        os.kill(stage_pid(pair.a, stage), signal.SIGKILL)
        eventually(lambda: "restarting its stages" in pair.a.said(), "its stage is missed")
        pair.b.set_role("secondary")
        asked.result(DEADLINE)
    pair.wait_in_sync(pair.a)

    def connections() -> tuple[int, int]:
        return pair.a.said().count(": connected to "), pair.b.said().count(": connected from ")

    made, end = connections(), time.monotonic() + WINDOW
    while time.monotonic() < end:
        assert connections() == made
        time.sleep(0.1)
    write(pair.a, b"a", 0)
    pair.wait_in_sync(pair.a)


@pytest.mark.slow
def test_timeout_is_longer_than_a_worker_has_to_start(make_pair: MakePair) -> None:
    """The other node goes on to be primary: this one serves when it has waited for `timeout`, and not for less."""
    pair = make_pair({"disk": SIZE}, conf="timeout 35")
    pair.up(pair.b)
    began = time.monotonic()
    pair.a.set_role("primary")
    assert time.monotonic() - began >= 35
    assert read(pair.a, 0) == bytes(1)
    assert pair.b.status()["role"] == "primary"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stop", "restart"])
def test_told_to_end_while_it_waits_for_the_other_one(make_pair: MakePair, how: str) -> None:
    """It ends at once, in good order, and has served nobody."""
    pair = make_pair({"disk": SIZE}, conf="timeout 200", hooks=True)
    pair.up(pair.b)
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(pair.a.role, "primary", check=False)
        eventually(lambda: "is still primary, waiting for it" in pair.a.said(), "it waits for the other node")
        pair.a.ctl(how)
        assert asked.result(DEADLINE).returncode != 0
    assert "does not end" not in pair.a.log.read_text()
    assert f"role {pair.a.name()} secondary primary" not in pair.events(pair.a)
    if how == "stop":
        assert pair.a.hastd is not None and pair.a.hastd.wait(DEADLINE) == 0
        pair.a.hastd = None


# ---- by several at once ----


class Shell:
    """Gives one role command after the other. What is refused has to say why."""

    def __init__(self, node: PairNode, seed: int, writes: bool) -> None:
        self.node, self.rng, self.writes = node, random.Random(seed), writes
        self.errors: list[BaseException] = []
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self) -> None:
        try:
            for _ in range(COMMANDS):
                role = self.rng.choice(["primary", "primary", "secondary", "init"])
                request = ControlRequest(CMD_SET_ROLE, (self.node.name(),), Role.from_text(role))
                entry = RoleReply.from_nv(self.node.ask(request)).entries[0]
                assert not entry.error or (entry.errmsg or "").startswith(self.node.name()), entry
                if role == "primary" and not entry.error and self.writes:
                    # The other shell may have changed the role already.
                    with suppress(OSError, EOFError, AssertionError):
                        write(self.node, self.rng.choice([b"x", b"y", b"z"]), self.rng.randrange(16) * EXTENT)
        except (AssertionError, HastError) as error:
            self.errors.append(error)


def workers(node: PairNode) -> list[int]:
    """Processes with the title of a worker, but for those that one of them has just forked."""
    titles = [f"hastd: {node.name()} ({role})" for role in ("primary", "secondary")]
    found = [pid for pid, title in node.titles().items() if title in titles]
    parents = {}
    for pid in found:
        with suppress(OSError):
            parents[pid] = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return [pid for pid, parent in parents.items() if parent not in found]


@contextmanager
def one_worker_each(pair: Pair) -> Iterator[None]:
    """Nobody ever sees two."""
    done, seen = threading.Event(), []

    def look() -> None:
        while not done.wait(0.05):
            for node in pair.nodes:
                # Twice: one may have ended while the processes were looked through.
                if len(first := workers(node)) > 1 and len(again := set(first) & set(workers(node))) > 1:
                    seen.append((node.node, again))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    assert not seen


@pytest.mark.parametrize("writes", [False, True])
def test_concurrent_promote_demote(make_pair: MakePair, writes: bool) -> None:
    pair = make_pair({"disk": SIZE}, conf="timeout 1", hooks=True)
    pair.up()
    name = pair.a.name()
    with one_worker_each(pair):
        shells = [Shell(node, seed, writes) for node in pair.nodes for seed in range(2)]
        for shell in shells:
            shell.thread.join(4 * DEADLINE)
            assert not shell.thread.is_alive() and not shell.errors, shell.errors
    for node in pair.nodes:
        node.set_role("init")
    primary = pair.b if pair.a.dump()["syncing"] else pair.a
    split = f"split-brain {name}"
    before = [pair.events(node).count(split) for node in pair.nodes]
    pair.other(primary).set_role("secondary")
    primary.set_role("primary")

    def settled() -> bool:
        found = [pair.events(node).count(split) > n for node, n in zip(pair.nodes, before, strict=True)]
        return all(found) or primary.status()["status"] == "complete"

    eventually(settled, "they are connected, or say why not")
    if primary.status()["status"] != "complete":
        assert writes, "nobody has written anything"
        pair.other(primary).ctl("discard", name)
    pair.wait_in_sync(primary)
    assert pair.differing() is None


# ---- nodes that have never met ----


def test_both_virgin_nodes_become_primary(make_pair: MakePair) -> None:
    """Each makes its own unique ID. When one steps back, both say that they have nothing in common, and what to do."""
    pair = make_pair({"disk": SIZE}, conf="timeout 1", hooks=True)
    pair.create()
    pair.start()
    threads = [threading.Thread(target=node.set_role, args=("primary",)) for node in pair.nodes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    write(pair.a, b"a", 0, EXTENT)
    write(pair.b, b"b", 0)
    assert 0 != pair.a.dump()["resuid"] != pair.b.dump()["resuid"] != 0
    pair.b.set_role("secondary")
    for node in pair.nodes:
        eventually(lambda node=node: "unique ID mismatch" in node.said(), "both say so")
        for words in (f"'hastctl create {node.name()}'", "whose data is to be overwritten"):
            assert words in node.said()
    assert read(pair.a, 0) == b"a" and pair.a.status()["status"] == "degraded"
    assert pair.data(pair.b)[:4096] == b"b" * 4096
    # It is the other way round as well.
    pair.a.set_role("secondary")
    pair.b.set_role("primary")
    assert read(pair.b, 0) == b"b"
    # The way out.
    pair.a.set_role("init")
    pair.a.create()
    pair.a.set_role("secondary")
    pair.wait_in_sync(pair.b)
    assert pair.differing() is None and read(pair.b, 0) == b"b"


@pytest.mark.parametrize("anew", ["a", "b"])
def test_one_node_is_made_anew(make_pair: MakePair, anew: str) -> None:
    """As secondary it gets everything. As primary it is refused: it is empty, and the other one is not."""
    pair = make_pair({"disk": SIZE}, conf="timeout 1", hooks=True)
    pair.up()
    write(pair.a, b"d", *range(0, SIZE, EXTENT))
    pair.wait_in_sync(pair.a)
    fresh = pair.a if anew == "a" else pair.b
    old = pair.other(fresh)
    for node in pair.nodes:
        node.set_role("init")
    fresh.create()
    old.set_role("secondary")
    fresh.set_role("primary")
    eventually(lambda: "unique ID mismatch" in fresh.said(), "it is refused")
    assert fresh.status()["status"] == "degraded" and pair.data(old)[:4096] == b"d" * 4096
    fresh.set_role("init")
    # It has an ID of its own now.
    fresh.create()
    old.set_role("primary")
    fresh.set_role("secondary")
    pair.wait_in_sync(old)
    assert pair.differing() is None
    new = pair.swap(old)
    assert all(read(new, offset) == b"d" for offset in range(0, SIZE, EXTENT))
