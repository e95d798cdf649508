"""SIGHUP: the configuration is read again, and nobody whom the change does not concern notices."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hast.device import fuse
from tests.e2e.load import PAUSE
from tests.e2e.node import MIB, Node, eventually
from tests.nbdclient import RawClient
from tests.tools import need_root

MakeNode = Callable[..., Node]
SMALL = {"one": 8 * MIB, "two": 8 * MIB}
DONE = "configuration read again: "
REFUSED = "configuration not read again, nothing has changed: "


@pytest.fixture
def node(make_node: MakeNode) -> Node:
    """Two resources, both primary."""
    node = make_node(SMALL)
    node.primary()
    return node


def conf(node: Node, *others: str, **settings: str) -> str:
    """The node's configuration with `settings` of its resources, by their short names, and `others` in front of it."""
    lines = [*others]
    for line in node.conf.read_text().splitlines():
        lines.append(line)
        for name, text in settings.items():
            if line == f"resource {node.name(name)} {{":
                lines.append(text)
    return "\n".join(lines) + "\n"


def without(node: Node, resource: str) -> str:
    """The node's configuration without one of its resources."""
    before, _, rest = node.conf.read_text().partition(f"resource {node.name(resource)} {{")
    return before + rest.partition("\n}\n}\n")[2]


def put(node: Node, text: str) -> None:
    """Write the configuration, all of it at once."""
    new = node.directory / "hast.conf.new"
    new.write_text(text)
    new.replace(node.conf)


def hang_up(node: Node) -> None:
    assert node.hastd is not None
    node.hastd.send_signal(signal.SIGHUP)


def lines(node: Node, text: str) -> list[str]:
    """What follows `text` in each line of the log that has it."""
    return [line.partition(text)[2] for line in node.said().splitlines() if text in line]


def reload(node: Node, text: str) -> str:
    """Have hastd read this configuration; what it says that it has done."""
    put(node, text)
    count = len(lines(node, DONE))
    hang_up(node)
    eventually(lambda: len(lines(node, DONE)) > count, "the configuration is read again")
    return lines(node, DONE)[-1]


def refused(node: Node) -> str:
    """Have hastd read a configuration that it cannot use; what it says against it."""
    count = len(lines(node, REFUSED))
    hang_up(node)
    eventually(lambda: len(lines(node, REFUSED)) > count, "a complaint")
    return lines(node, REFUSED)[-1]


def worker(node: Node, resource: str, other_than: int = 0) -> int:
    """The process id of the resource's worker, once it answers."""

    def found() -> int:
        entry = node.status(resource)
        pid = int(entry["workerpid"] or 0)
        return pid if pid != other_than and entry["status"] is not None else 0

    return int(eventually(found, f"another worker of {resource} than {other_than}"))


class Writer(threading.Thread):
    """A client that writes and reads on one connection until the end of a `with`, which fails if anything else did."""

    def __init__(self, node: Node, resource: str) -> None:
        super().__init__(name="writer")
        self._client = RawClient(node.socket(resource))
        self._over = threading.Event()
        self.rounds = 0
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            while not self._over.is_set():
                data = self.rounds.to_bytes(8, "big") * 512
                offset = self.rounds % 1024 * 4096
                assert self._client.write(offset, data) == 0
                assert self._client.read(offset, 4096) == data
                self.rounds += 1
                self._over.wait(PAUSE)
        except BaseException as error:
            self.error = error

    def goes_on(self) -> None:
        """Wait for some more rounds."""
        target = self.rounds + 5
        eventually(lambda: self.error is not None or self.rounds >= target, "the writer goes on")
        assert self.error is None, self.error

    def __enter__(self) -> Writer:
        self.start()
        self.goes_on()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()
        self._client.close()
        assert self.error is None, self.error


@contextlib.contextmanager
def untouched(node: Node, resource: str = "two") -> Iterator[Writer]:
    """Somebody works with this resource meanwhile, on one connection to one worker."""
    pid = worker(node, resource)
    with Writer(node, resource) as writer:
        yield writer
        writer.goes_on()
    assert worker(node, resource) == pid


# Resources.


def test_resources_come_and_go(node: Node) -> None:
    full = node.conf.read_text()
    with untouched(node) as writer:
        assert reload(node, without(node, "one")) == f"removed {node.name('one')}"
        assert not node.socket("one").exists()
        assert not [title for title in node.titles().values() if node.name("one") in title]
        assert "no such resource" in node.role("primary", "one", check=False).stderr
        assert json.loads(node.ctl("status", "--json").stdout)[0]["resource"] == node.name("two")
        writer.goes_on()
        assert reload(node, full) == f"added {node.name('one')}"
        assert node.status("one")["role"] == "init"
        node.role("primary", "one")
        with RawClient(node.socket("one")) as client:
            assert client.write(0, b"x" * 512) == 0
        assert [entry["resource"] for entry in json.loads(node.ctl("status", "--json").stdout)] == [
            node.name("one"),
            node.name("two"),
        ]
        assert reload(node, full) == "nothing has changed"


def test_new_local_in_the_same_role(node: Node) -> None:
    with RawClient(node.socket("one")) as client:
        assert client.write(0, b"old" + bytes(509), 0) == 0
    new = node.components / "new"
    new.write_bytes(node.component("one").read_bytes())
    with untouched(node):
        pid = worker(node, "one")
        with RawClient(node.socket("one")) as client:
            text = conf(node).replace(f"local {node.component('one')}\n", f"local {new}\n")
            assert reload(node, text) == f"changed {node.name('one')} (local)"
            client.closed_by_server()
        assert worker(node, "one", pid) and node.status("one")["role"] == "primary"
    with RawClient(node.socket("one")) as client:
        assert client.read(0, 3 + 509)[:3] == b"old"
        assert client.write(0, b"new" + bytes(509)) == 0
    assert node.status("one")["localpath"] == str(new)
    node.role("init", "one")
    assert b"new" in new.read_bytes() and b"new" not in node.component("one").read_bytes()


@pytest.mark.root
def test_two_resources_swap_their_devices(make_node: MakeNode) -> None:
    """Neither name is free before both workers have ended."""
    need_root()
    reason = fuse.usable()
    if reason is not None:
        pytest.skip(reason)
    node = make_node(SMALL, device="fuse")
    node.primary()

    def first_word(name: str) -> str:
        return node.run("head", "-c", "3", node.device(name), seconds=30).stdout

    for name in SMALL:
        with RawClient(node.socket(name)) as client:
            assert client.write(0, name.encode() + bytes(509)) == 0
    assert [first_word(name) for name in SMALL] == ["one", "two"]
    before = {name: worker(node, name) for name in SMALL}
    one, two = (node.name(name) for name in SMALL)
    text = conf(node, one=f"name {two}", two=f"name {one}")
    for name in (one, two):
        text = text.replace(f"on {node.node} {{\nname {name}\n", f"on {node.node} {{\n")
    assert reload(node, text) == f"changed {one} (name), {two} (name)"
    for name in SMALL:
        worker(node, name, before[name])
        eventually(lambda name=name: node.device(name).exists(), f"the device of {name}")
    assert [first_word(name) for name in SMALL] == ["two", "one"]


@pytest.mark.slow
def test_local_that_is_not_there(node: Node) -> None:
    good = node.conf.read_text()
    with untouched(node):
        assert reload(node, good.replace("/one\n", "/absent\n")) == f"changed {node.name('one')} (local)"
        eventually(lambda: node.status("one")["role"] == "init", "the role is given up")
        eventually(lambda: f"{node.name('one')}: role changed from primary to init" in node.said(), "it is said")
        reload(node, good)
        node.role("primary", "one")


def test_exec_is_used_at_the_next_event(node: Node) -> None:
    called = node.directory / "called"
    hook = node.directory / "hook"
    hook.write_text(f'#!/bin/sh\necho "$@" >>{called}\n')
    hook.chmod(0o755)
    pid = worker(node, "one")
    with untouched(node):
        assert reload(node, conf(node, one=f"exec {hook}")) == f"changed {node.name('one')} (exec)"
        assert worker(node, "one") == pid
        node.role("init", "one")
        expected = f"role {node.name('one')} primary init\n"
        eventually(lambda: called.exists() and called.read_text() == expected, "the hook")
        node.role("primary", "one")
        # The hook of a resource that is removed is the last one that it had.
        reload(node, without(node, "one"))
        expected += f"role {node.name('one')} init primary\nrole {node.name('one')} primary init\n"
        eventually(lambda: called.read_text() == expected, "two more hooks")


def test_settings_that_a_worker_takes_over(node: Node) -> None:
    pids = {name: worker(node, name) for name in SMALL}
    with untouched(node), untouched(node, "one"):
        every = "syncrate 1048576 metaflush off replication async compression lzf checksum crc32 timeout 7"
        did = reload(node, conf(node, one=every))
        assert did == (
            f"changed {node.name('one')} (replication, checksum, compression, timeout, metaflush, syncrate)"
        )
        status = node.status("one")
        assert (status["replication"], status["compression"], status["checksum"]) == ("async", "lzf", "crc32")
        # A worker that is killed comes back with them; so does one whose stages are.
    os.kill(pids["one"], signal.SIGKILL)
    worker(node, "one", pids["one"])
    assert node.status("one")["role"] == "primary"


def test_remote_comes_and_goes(node: Node) -> None:
    """The worker stays, and tries the other node that it has now."""
    with socket.socket() as peer:
        peer.bind((node.address, 0))
        peer.listen()
        peer.settimeout(60)
        good = node.conf.read_text()
        before, _, rest = good.partition("remote none")
        remote = f"tcp4://{node.address}:{peer.getsockname()[1]}"
        with untouched(node), untouched(node, "one") as writer:
            assert reload(node, f"{before}remote {remote}{rest}") == f"changed {node.name('one')} (remote)"
            peer.accept()[0].close()
            assert node.status("one")["remoteaddr"] == remote
            writer.goes_on()
            assert reload(node, good) == f"changed {node.name('one')} (remote)"
            assert node.status("one")["remoteaddr"] == "none"


# hastd's own settings.


def test_control_socket_moves(node: Node) -> None:
    old = node.directory / "control"
    with untouched(node):
        text = node.conf.read_text().replace(f"control {old}\n", f"control {old}2\n")
        assert reload(node, text) == "changed 'control'"
        assert not old.exists() and Path(f"{old}2").is_socket()
        assert node.status("one")["role"] == "primary"
        reload(node, text.replace(f"control {old}2\n", f"control {old}\n"))
        assert node.status("one")["role"] == "primary"


def free_ports(count: int) -> list[int]:
    """Ports that nobody has on any address. Those that the system chooses by itself are no good: another test's
    connection may get them the next moment, and then nobody can listen there on all addresses."""
    chosen = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports: list[int] = []
    for port in random.sample(range(9000, chosen), 1000):
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("0.0.0.0", port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise AssertionError("no port is free")


def test_listening_elsewhere(node: Node) -> None:
    def answers(port: int) -> bool:
        try:
            socket.create_connection((node.address, port), 30).close()
        except ConnectionRefusedError:
            return False
        return True

    text = node.conf.read_text()
    old, ports = f"listen tcp4://{node.address}\n", free_ports(2)
    with untouched(node):
        assert answers(8457)
        new = "".join(f"listen tcp4://{node.address}:{port}\n" for port in ports)
        assert reload(node, text.replace(old, new)) == "changed 'listen'"
        assert [answers(port) for port in (8457, *ports)] == [False, True, True]
        reload(node, text.replace(old, old + f"listen tcp4://{node.address}:{ports[0]}\n"))
        assert [answers(port) for port in (8457, *ports)] == [True, True, False]
        # One socket is in the way of the other: on all addresses, on this one only.
        everywhere = text.replace(old, f"listen tcp4://0.0.0.0:{ports[0]}\n")
        here = f"listen tcp4://{node.address}:{ports[0]}\n"
        assert reload(node, everywhere) == "changed 'listen'" and answers(ports[0])
        with socket.socket() as busy:
            busy.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of before may not have ended
            busy.bind((node.address, ports[1]))
            busy.listen()
            put(node, text.replace(old, f"{here}listen tcp4://{node.address}:{ports[1]}\n"))
            assert "Address already in use" in refused(node) and answers(ports[0])
        assert reload(node, text.replace(old, here)) == "changed 'listen'" and answers(ports[0])
        with socket.socket() as free:
            free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            free.bind(("127.0.0.1", ports[0]))  # it is there no longer
            free.listen()


def test_pidfile_and_run_directory_stay(node: Node) -> None:
    text = node.conf.read_text().replace(f"rundir {node.rundir}", f"rundir {node.directory}/other")
    text = text.replace(f"pidfile {node.directory}/pid", f"pidfile {node.directory}/pid2")
    assert reload(node, text) == "nothing has changed"
    kept = f"pidfile {node.directory}/pid, rundir {node.rundir}: in use until hastd is started anew"
    assert kept in node.said()
    assert not (node.directory / "other").exists() and not (node.directory / "pid2").exists()
    with RawClient(node.socket("one")) as client:
        assert client.write(0, bytes(512)) == 0


# What cannot be read, and what cannot be done.


def test_what_is_broken_changes_nothing(node: Node) -> None:
    good = node.conf.read_text()
    path = node.conf
    busy = socket.socket()
    busy.bind((node.address, 0))
    busy.listen()
    port = busy.getsockname()[1]
    other = node.directory / "other"
    lost = without(node, "one")
    with busy, untouched(node), untouched(node, "one"):
        put(node, lost + "resource broken {\n")
        count = len(lost.splitlines())
        assert refused(node).startswith(f"{path}:{count + 2}:1: found the end of the file, expected")
        put(node, "")
        assert refused(node) == f"{path}: it says nothing at all, which is not taken for the removal of every resource"
        put(node, lost.replace("device nbd", "device floppy"))
        assert refused(node).startswith(f"{path}:5:8: found 'floppy', expected")
        path.unlink()
        assert refused(node) == f"cannot read configuration '{path}': No such file or directory"
        put(node, lost.replace(f"control {node.directory}/control", "control 127.0.0.1"))
        assert "hastd listens to hastctl on Unix sockets only" in refused(node)
        # All or nothing: the new control socket could be made, the address for peers could not.
        moved = lost.replace(f"control {node.directory}/control", f"control {other}")
        put(node, f"listen tcp4://{node.address}:{port}\n{moved}")
        assert f"cannot listen on tcp4://{node.address}:{port}: Address already in use" in refused(node)
        assert not other.exists()
        other.write_text("no socket")
        put(node, moved)
        assert f"cannot listen on control socket {other}: something else is there" in refused(node)
        assert other.read_text() == "no socket"
        put(node, good)
        assert len(json.loads(node.ctl("status", "--json").stdout)) == 2
        assert reload(node, good) == "nothing has changed"


def test_many_signals(node: Node) -> None:
    """Whatever was read in between: in the end what the file says is in force."""
    full = node.conf.read_text()
    texts = [without(node, "one"), "resource {", conf(node, one="timeout 9"), full]
    with untouched(node):
        for number in range(20):
            put(node, texts[number % len(texts)])
            hang_up(node)
        assert node.conf.read_text() == full
        names = [node.name("one"), node.name("two")]

        def in_force() -> bool:
            entries = json.loads(node.ctl("status", "--json").stdout)
            return [entry["resource"] for entry in entries] == names

        eventually(in_force, "both resources are there")
        assert reload(node, full) in ("nothing has changed", f"changed {names[0]} (timeout)")
        assert in_force()
        node.role("primary", "one")


def test_end_in_the_middle(node: Node) -> None:
    put(node, without(node, "one"))
    hang_up(node)
    assert node.stop() == 0
    assert node.leftovers() == []


def test_live_events(node: Node) -> None:
    import zmq

    context = zmq.Context()
    subscriber = context.socket(zmq.SUB)
    subscriber.setsockopt(zmq.LINGER, 0)
    try:
        subscriber.setsockopt(zmq.SUBSCRIBE, b"")
        subscriber.connect(f"ipc://{node.rundir}/events.sock")
        seen: list[dict[str, Any]] = []
        texts = [without(node, "one"), conf(node, one="syncrate 1"), conf(node), "resource {"]

        def came() -> bool:
            # A subscription takes a moment to reach the publisher: go on until it has.
            for text in texts[:3]:
                reload(node, text)
            put(node, texts[3])
            refused(node)
            while subscriber.poll(0):
                event = json.loads(subscriber.recv_multipart()[1])
                seen.append({key: value for key, value in event.items() if key != "time"})
            one = {"resource": node.name("one"), "event": "reload"}
            expected = [
                one | {"what": "removed"},
                one | {"what": "added"},
                one | {"what": "changed", "settings": ["syncrate"]},
                {"resource": "", "event": "reload", "done": f"added {node.name('one')}"},
            ]
            failed = [event for event in seen if event["resource"] == "" and "error" in event]
            return all(event in seen for event in expected) and len(failed) > 0

        eventually(came, "events of all kinds")
    finally:
        subscriber.close()
        context.term()
