"""hastd as administrators meet it: starting, stopping, roles, hooks, errors, and what a kill leaves."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import stat
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hast.address import parse_address
from hast.control_client import ControlClient
from hast.nv import Nv
from tests.e2e.node import ROOT, Node, eventually

MakeNode = Callable[..., Node]
HASTD = ROOT / "bin" / "hastd"
SMALL = {"disk": 8 << 20}


@pytest.fixture
def idle(make_node: MakeNode) -> Node:
    """A node whose hastd runs; nobody is primary."""
    node = make_node(SMALL)
    node.create()
    node.start()
    return node


def worker_pid(node: Node, resource: str = "disk", other_than: int = 0) -> int:
    """The process id of the resource's worker, which runs and answers."""

    def found() -> int:
        entry = node.status(resource)
        pid = int(entry["workerpid"] or 0)
        return pid if pid != other_than and entry["status"] is not None else 0

    return int(eventually(found, f"a worker of {resource} other than {other_than}"))


# Starting.


def test_goes_to_the_background_and_back(make_node: MakeNode) -> None:
    node = make_node(SMALL)
    node.create()
    started = node.run(HASTD, "-c", node.conf)
    assert (started.stdout, started.stderr) == ("", "")
    pid = int((node.directory / "pid").read_text())
    assert node.status()["role"] == "init"  # it answers as soon as the starter has ended
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    assert fields[1] == "1" or Path(f"/proc/{fields[1]}/comm").read_text().strip() not in ("sh", "python")
    assert int(fields[3]) != os.getsid(0) and int(fields[3]) != pid
    assert Path(f"/proc/{pid}/cwd").readlink() == Path("/")
    assert {Path(f"/proc/{pid}/fd/{fd}").readlink() for fd in range(3)} == {Path("/dev/null")}
    assert node.titles()[pid] == f"hastd -c {node.conf}"
    assert stat.S_IMODE((node.directory / "control").stat().st_mode) == 0o600
    assert stat.S_IMODE(node.rundir.stat().st_mode) == 0o700
    assert node.ctl("stop").stdout == ""
    eventually(lambda: not node.leftovers(), "nothing is left")


@pytest.mark.parametrize("how", [(), ("-F",)])
def test_second_hastd_is_refused(idle: Node, how: tuple[str, ...]) -> None:
    assert idle.hastd is not None
    (pid,) = [pid for pid, title in idle.titles().items() if title.startswith("hastd -F")]
    second = idle.run(HASTD, *how, "-c", idle.conf, check=False)
    assert second.returncode == os.EX_TEMPFAIL
    assert second.stderr == (
        f"hastd: another hastd is running: process {pid} holds the pidfile {idle.directory}/pid;"
        " stop it, or give this one another pidfile (-P)\n"
    )
    for option, complaint in (
        ([], f"run directory {idle.rundir}: another hastd is running: process {pid}"),
        ([f"rundir {idle.directory}/other"], f"it answers on the control socket {idle.directory}/control"),
    ):
        conf = idle.directory / "other.conf"
        lines = [line for line in idle.conf.read_text().splitlines() if not (option and line.startswith("rundir"))]
        conf.write_text("\n".join([*lines, *option]) + "\n")
        other = idle.run(HASTD, *how, "-c", conf, "-P", idle.directory / "pid2", check=False)
        assert other.returncode == os.EX_TEMPFAIL, other.stderr
        assert complaint in other.stderr and other.stderr.count("\n") == 1
    assert not (idle.directory / "pid2").exists()
    assert idle.status()["role"] == "init"  # the first one was not disturbed


@pytest.mark.parametrize("how", [(), ("-F",)])
def test_mistakes_at_the_start(make_node: MakeNode, how: tuple[str, ...]) -> None:
    node = make_node(SMALL)
    good = node.conf.read_text()

    def start(*arguments: str) -> tuple[int, str]:
        done = node.run(HASTD, *how, *arguments, check=False)
        assert done.stdout == ""
        return done.returncode, done.stderr

    assert start("-c", str(node.directory / "absent"))[0] == os.EX_CONFIG
    node.conf.write_text(good + "resource broken {\n")
    code, text = start("-c", str(node.conf))
    assert code == os.EX_CONFIG
    assert text.startswith(f"hastd: {node.conf}:") and text.count("\n") == 1
    node.conf.write_text(good.replace(f"rundir {node.rundir}", f"rundir {node.conf}"))
    code, text = start("-c", str(node.conf))
    assert (code, text) == (
        os.EX_OSERR, f"hastd: cannot use run directory {node.conf}: File exists\n"
    )  # fmt: skip
    target = node.directory / "target"
    target.mkdir()
    (node.directory / "link").symlink_to(target)
    node.conf.write_text(good.replace(f"rundir {node.rundir}", f"rundir {node.directory}/link"))
    assert "it is a symbolic link" in start("-c", str(node.conf))[1]
    node.conf.write_text(good.replace(f"control {node.directory}/control", "control tcp4://127.0.0.1:1"))
    code, text = start("-c", str(node.conf))
    assert code == os.EX_CONFIG and "Unix sockets only" in text
    node.conf.write_text(good)
    assert start("-c", str(node.conf), "-P", str(node.directory / "no" / "pid"))[0] == os.EX_OSERR
    for arguments in (("-x",), ("-c",), ("extra",), ("-h",)):
        code, text = start(*arguments)
        assert code == os.EX_USAGE and "usage: hastd [-dFht] [-c config] [-P pidfile]" in text
    assert node.leftovers() == []


@pytest.mark.root
def test_run_directory_of_somebody_else(make_node: MakeNode) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to give a directory away")
    node = make_node(SMALL)
    node.rundir.mkdir()
    os.chown(node.rundir, 65534, 65534)
    done = node.run(HASTD, "-c", node.conf, check=False)
    assert done.returncode == os.EX_NOPERM and "belongs to user 65534" in done.stderr


def test_debug_shows_more(make_node: MakeNode) -> None:
    node = make_node(SMALL)
    node.create()
    node.start("-d", "-d")
    node.status()
    eventually(lambda: "debug: hastctl: command 2 for" in node.said(), "debug messages")


def test_descriptors_are_limited_by_the_hard_limit_only(make_node: MakeNode) -> None:
    """In all processes, however low the soft limit is that hastd is started with."""
    node = make_node(SMALL)
    node.prefix = ["sh", "-c", 'ulimit -S -n 100 && exec "$@"', "sh"]
    node.primary()
    titles = node.titles()
    worker = f"hastd: {node.name()} (primary)"
    assert {"hastd: spawner", worker, f"{worker}: ggate"} <= set(titles.values())
    assert node.hastd is not None and node.hastd.pid in titles
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limits = {pid: resource.prlimit(pid, resource.RLIMIT_NOFILE) for pid in titles}
    assert limits == dict.fromkeys(titles, (hard, hard))


# Ending.


def test_told_to_end_again_and_again(node: Node) -> None:
    """Also in the moment in which the event loops are closed, of hastd and of its worker."""
    worker = int(node.status()["workerpid"])
    hastd = node.hastd
    assert hastd is not None
    while hastd.returncode is None:
        hastd.send_signal(signal.SIGTERM)
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            hastd.wait(0.005)
    assert hastd.returncode == 0
    assert "Traceback" not in node.said() and "wakeup" not in node.said()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_everything(make_node: MakeNode, number: int) -> None:
    node = make_node({"one": 8 << 20, "two": 8 << 20})
    node.primary()
    assert node.stop(number) == 0
    assert node.leftovers() == []
    assert "received, ending" in node.said() and node.said().endswith("hastd: hastd ended\n")


def test_stop_waits_until_everything_is_gone(node: Node) -> None:
    node.ctl("stop")
    (pid,) = [pid for pid, title in node.titles().items() if title.startswith("hastd -F")] or [0]
    # Its descriptors are closed; the process itself takes a moment more.
    assert [what for what in node.leftovers() if not what.startswith(f"process {pid}:")] == []
    assert node.hastd is not None and node.hastd.wait(10) == 0
    node.hastd = None


def test_killed_hastd_leaves_nothing_that_stops_the_next(node: Node) -> None:
    assert node.hastd is not None
    node.hastd.kill()  # main alone: spawner, worker and stages have to see it
    node.hastd.wait()
    assert (node.directory / "control").is_socket() and (node.directory / "pid").exists()
    node.start()
    assert node.status()["role"] == "primary"  # the keeper knows
    node.role("primary")
    assert node.status()["status"] == "degraded"


# Roles.


def our_titles(node: Node) -> list[str]:
    """Titles of the processes that main has started, without the keeper: it comes with the first role, and stays."""
    return sorted(t for t in node.titles().values() if t.startswith("hastd: ") and t != "hastd: keeper")


def test_roles_and_titles(idle: Node) -> None:
    name = idle.name()
    idle.role("primary")
    titles = our_titles(idle)
    assert f"hastd: {name} (primary)" in titles and "hastd: spawner" in titles
    assert all(title == "hastd: spawner" or title.startswith(f"hastd: {name} (primary)") for title in titles)
    assert idle.socket().is_socket()
    pid = worker_pid(idle)
    idle.role("primary")
    assert worker_pid(idle) == pid
    assert idle.ctl("status").stdout == (
        f"Name\tStatus\t Role\t\tComponents\n{name}\tdegraded primary        {idle.component()}\tnone\n"
    )
    idle.role("secondary")
    assert not idle.socket().exists()
    titles = our_titles(idle)
    assert titles == [f"hastd: {name} (secondary)", "hastd: spawner"]  # no stages before there is a connection
    idle.ctl("role", "init", "all")
    assert our_titles(idle) == ["hastd: spawner"]


def test_resources_that_do_not_exist(idle: Node) -> None:
    for command in (("role", "primary"), ("status",), ("list",)):
        done = idle.ctl(*command, "nosuch", idle.name(), check=False)
        assert done.returncode == 1
        assert "hastctl: nosuch: " in done.stderr and done.stderr.count("\n") == 1
    assert idle.status()["role"] == "primary"  # the other one was served nevertheless


def broken(node: Node) -> None:
    """Not a component any more."""
    with node.component().open("r+b") as file:
        file.write(b"\xaa" * 512)


@pytest.mark.parametrize(
    ("spoil", "code", "complaint"),
    [
        (lambda node: node.component().unlink(), os.EX_NOINPUT, "does not exist"),
        (lambda node: os.truncate(node.component(), 100), os.EX_NOINPUT, "too small"),
        (lambda node: os.truncate(node.component(), 1 << 20), os.EX_DATAERR, "truncated"),
        (broken, os.EX_DATAERR, "no valid metadata"),
        (lambda node: node.component().write_bytes(bytes(8 << 20)), os.EX_DATAERR, "run 'hastctl create"),
    ],
)
def test_components_that_cannot_be_used(
    idle: Node, spoil: Callable[[Node], Any], code: int, complaint: str
) -> None:
    spoil(idle)
    done = idle.role("primary", check=False)
    assert done.returncode == code
    assert complaint in done.stderr and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"hastctl: {idle.name()}: ")
    entry = idle.status()
    assert (entry["role"], entry["workerpid"]) == ("init", 0)
    assert complaint in idle.said()
    if idle.component().exists():
        idle.component().unlink()
    with idle.component().open("wb") as file:
        file.truncate(16 << 20)
    idle.create()
    idle.role("primary")


def test_component_of_another_hastd(node: Node, make_node: MakeNode) -> None:
    done = node.ctl("create", node.name(), check=False)
    assert done.returncode == os.EX_TEMPFAIL and "locked by another hastd" in done.stderr
    other = make_node(SMALL)
    other.conf.write_text(
        other.conf.read_text()
        .replace(str(other.component()), str(node.component()))
        .replace(other.name(), node.name())
    )
    other.start()
    done = other.ctl("role", "primary", node.name(), check=False)
    assert done.returncode == os.EX_TEMPFAIL and "locked by another hastd" in done.stderr
    assert json.loads(other.ctl("status", "--json").stdout)[0]["role"] == "init"
    assert node.status()["status"] == "degraded"


def test_killed_worker_is_started_again(node: Node) -> None:
    pid = worker_pid(node)
    os.kill(pid, signal.SIGKILL)
    again = worker_pid(node, other_than=pid)
    entry = node.status()
    assert (entry["role"], entry["workerpid"], entry["errmsg"]) == ("primary", again, None)
    assert node.run("nbdinfo", "--size", node.uri()).stdout.strip().isdigit()
    assert f"worker (pid {pid}, primary) was killed by signal 9 (SIGKILL)" in node.said()
    node.role("init")
    assert node.status()["role"] == "init"


def test_hanging_worker_does_not_hang_hastd(node: Node) -> None:
    pid = worker_pid(node)
    os.kill(pid, signal.SIGSTOP)
    try:
        entry = node.status()
        assert (entry["role"], entry["workerpid"], entry["status"]) == ("primary", pid, None)
        assert entry["errmsg"] == f"its worker (pid {pid}, primary) does not answer"
        assert "  errmsg: its worker" in node.ctl("list").stdout
    finally:
        os.kill(pid, signal.SIGCONT)
    eventually(lambda: node.status()["status"] == "degraded", "the worker answers again")


def test_spawner_is_killed(node: Node) -> None:
    pid = worker_pid(node)
    (spawner,) = [pid for pid, title in node.titles().items() if title == "hastd: spawner"]
    os.kill(spawner, signal.SIGKILL)
    worker_pid(node, other_than=pid)
    node.role("init")
    node.role("primary")


# Hooks.


def hook(node: Node, body: str) -> Path:
    """A hook that notes its arguments in the file `events`, then does what body says."""
    path = node.directory / "hook"
    path.write_text(f'#!/bin/sh\necho "$@" >>{node.directory}/events\n{body}\n')
    path.chmod(0o755)
    return path


def events(node: Node) -> list[str]:
    path = node.directory / "events"
    return path.read_text().splitlines() if path.exists() else []


def with_hook(make_node: MakeNode, body: str) -> Node:
    node = make_node(SMALL)
    conf = node.conf.read_text()
    node.conf.write_text(f"exec {hook(node, body)}\n{conf}")
    node.create()
    node.start()
    return node


def test_hook_is_told_of_roles(make_node: MakeNode) -> None:
    node = with_hook(make_node, "exit 0")
    name = node.name()
    node.role("primary")
    node.role("primary")
    node.role("init")
    expected = [f"role {name} init primary", f"role {name} primary init"]
    eventually(lambda: len(events(node)) >= 2, "two hooks")
    assert events(node) == expected


def test_hook_that_fails_or_hangs_is_reported_and_blocks_nothing(make_node: MakeNode) -> None:
    node = with_hook(make_node, 'case "$4" in primary) exec sleep 1000;; *) exit 7;; esac')
    name = node.name()
    node.role("primary")
    eventually(lambda: events(node), "the hook of primary")
    node.role("init")
    node.role("primary")
    sleeping = [pid for pid, title in node.titles().items() if title == "sleep\0001000"]
    assert len(sleeping) == 1
    os.kill(sleeping[0], signal.SIGKILL)
    hook_path = node.directory / "hook"
    eventually(lambda: f"hook '{hook_path} role {name} primary init' failed with exit status 7" in node.said(), "it")
    assert f"hook '{hook_path} role {name} init primary' was killed by signal 9" in node.said()
    assert node.stop() == 0  # ends the second sleep as well
    assert node.leftovers() == []


def test_hook_that_is_not_there(make_node: MakeNode) -> None:
    node = with_hook(make_node, "exit 0")
    (node.directory / "hook").unlink()
    node.role("primary")
    eventually(lambda: "cannot be started: No such file or directory" in node.said(), "a complaint")


# The control socket.


def test_garbage_does_not_disturb(node: Node) -> None:
    path = str(node.directory / "control")
    connections = []
    half = b"\x02\x08\0\0\0half"
    for data in (b"", b"\x02", b"\x02\xff\xff\xff\xff", b"HELO there\r\n" * 1000, os.urandom(64), half):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(path)
        try:
            connection.sendall(data)
        except BrokenPipeError:
            pass  # hung up on already
        connections.append(connection)
    assert node.status()["status"] == "degraded"
    for connection in connections:
        connection.settimeout(30)
        try:
            assert connection.recv(100) == b""
        except ConnectionResetError:
            pass
        connection.close()
    assert node.status()["status"] == "degraded"


def test_unknown_command_and_client_that_hangs_up(idle: Node) -> None:
    path = parse_address(str(idle.directory / "control"))
    nv = Nv()
    nv.add_uint8("cmd", 200)
    with ControlClient(path, 20) as client:
        client.connect()
        with pytest.raises(Exception, match=r"command not implemented \(error 4\)"):
            client.request(nv)
    nv = Nv()
    nv.add_uint8("cmd", 1)
    nv.add_uint8("role", 2)
    nv.add_string("resource0", "all")
    with ControlClient(path, 20) as client:
        client.connect()
        data = nv.encode()
        client._socket.sendall(struct.pack("<BI", 2, len(data)) + data)
    # Nobody waits for the reply; the role is taken nevertheless.
    eventually(lambda: idle.status()["role"] == "primary", "the role is taken")


# Live events.


def test_live_events(idle: Node) -> None:
    import zmq

    context = zmq.Context()
    subscriber = context.socket(zmq.SUB)
    subscriber.setsockopt(zmq.LINGER, 0)
    try:
        subscriber.connect(f"ipc://{idle.rundir}/events.sock")
        subscriber.setsockopt(zmq.SUBSCRIBE, idle.name().encode())
        poller = zmq.Poller()
        poller.register(subscriber, zmq.POLLIN)
        seen: list[tuple[str, Any]] = []

        def came() -> bool:
            # A subscription takes a moment to reach the publisher: change roles until it has.
            idle.role("primary")
            idle.role("init")
            while poller.poll(0):
                topic, body = subscriber.recv_multipart()
                event = json.loads(body)
                assert topic.decode() == event["resource"] == idle.name()
                assert abs(event["time"] - time.time()) < 3600
                seen.append((event["event"], event.get("new", event.get("state"))))
            return {("role", "primary"), ("role", "init"), ("worker", "ready"), ("worker", "ended")} <= set(seen)

        eventually(came, "events of a role change")
    finally:
        subscriber.close()
        context.term()


# Starting from elsewhere, manual pages.


def test_commands_through_symbolic_links(make_node: MakeNode) -> None:
    node = make_node(SMALL)
    for command in ("hastd", "hastctl"):
        link = node.directory / command
        link.symlink_to(ROOT / "bin" / command)
        done = subprocess.run([link, "-h"], capture_output=True, text=True, cwd="/", env=node.env, check=False)
        assert done.returncode == os.EX_USAGE and f"usage: {command}" in done.stderr


@pytest.mark.parametrize("page", ["hastd.8", "hastctl.8"])
def test_manual_pages_are_shown_without_a_warning(page: str) -> None:
    from tests.tools import need

    need("man")
    path = ROOT / "docs" / page
    environment = os.environ | {"MANWIDTH": "80"}
    command = ["man", "--warnings", "-l", path]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert page.removesuffix(".8").upper() + "(8)" in done.stdout
