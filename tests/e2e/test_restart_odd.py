"""Two things at once while hastd, its spawner or a worker is being started anew: who uses the device sees a pause."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable

import pytest

from tests import tools
from tests.chaos.steady import SteadyProcess
from tests.e2e.node import DEADLINE, MIB, ROOT, Node, end_with_parent, eventually
from tests.e2e.pair import Pair
from tests.e2e.test_block_device import assert_gone, assert_there, block, make_block, stage_pid
from tests.e2e.test_reload import hang_up, put
from tests.e2e.test_reload_pair import with_settings
from tests.e2e.test_restart import kill_main, pid_of, served_by_another, steady
from tests.faultdisk import FaultDisk
from tests.nbdclient import RawClient

__all__ = ["block", "make_block", "steady"]
MakeNode = Callable[..., Node]
pytestmark = pytest.mark.root


def spawner_of(hastd: int) -> int:
    """Its spawner, also before it has a title; 0 while there is none."""
    try:
        with open(f"/proc/{hastd}/task/{hastd}/children") as children:  # noqa: PTH123
            pids = [int(pid) for pid in children.read().split()]
        for pid in pids:
            with open(f"/proc/{pid}/cmdline", "rb") as command:  # noqa: PTH123
                if b"spawner" in command.read():
                    return pid
    except OSError:
        pass
    return 0


def start_and_kill_spawner(node: Node) -> int:
    """A hastd that cannot start, because its spawner is killed before it is ready; its exit code."""
    with node.log.open("ab") as log:
        hastd = subprocess.Popen(
            [ROOT / "bin" / "hastd", "-F", "-c", node.conf],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=node.env,
            preexec_fn=end_with_parent,
        )
    deadline = time.monotonic() + DEADLINE
    while not (spawner := spawner_of(hastd.pid)):
        assert hastd.poll() is None and time.monotonic() < deadline, node.said()
    os.kill(spawner, signal.SIGKILL)
    return hastd.wait(DEADLINE)


def start_in_vain(node: Node) -> int:
    """A hastd whose configuration was broken meanwhile; its exit code."""
    good = node.conf.read_text()
    node.conf.write_text(good + "resource broken {\n")
    done = node.run(ROOT / "bin" / "hastd", "-F", "-c", node.conf, check=False)
    node.conf.write_text(good)
    return done.returncode


@pytest.mark.parametrize(
    ("start", "code"),
    [(start_and_kill_spawner, os.EX_TEMPFAIL), (start_in_vain, os.EX_CONFIG)],
    ids=["spawner", "configuration"],
)
def test_hastd_that_cannot_start_leaves_everything_to_the_next(
    steady: tuple[Node, SteadyProcess], start: Callable[[Node], int], code: int
) -> None:
    node, client = steady
    kill_main(node)
    assert start(node) == code
    node.start()
    assert node.status()["role"] == "primary"
    client.progress()
    client.end()


def test_spawner_is_killed_twice(steady: tuple[Node, SteadyProcess]) -> None:
    """The second time before it has said that it is ready: there has to be a third one."""
    node, client = steady
    assert node.hastd is not None
    first, worker = spawner_of(node.hastd.pid), int(node.status()["workerpid"])
    os.kill(first, signal.SIGKILL)
    deadline = time.monotonic() + DEADLINE
    while (second := spawner_of(node.hastd.pid)) in (0, first):
        assert time.monotonic() < deadline, node.said()
    os.kill(second, signal.SIGKILL)
    served_by_another(node, worker)
    client.progress()
    client.end()


@pytest.mark.slow
def test_spawner_that_hangs_while_its_worker_dies(steady: tuple[Node, SteadyProcess]) -> None:
    """It is the only one that can say so, and the only one that can fork another one."""
    node, client = steady
    worker = int(node.status()["workerpid"])
    os.kill(pid_of(node, "hastd: spawner"), signal.SIGSTOP)
    os.kill(worker, signal.SIGKILL)
    served_by_another(node, worker)
    client.progress()
    client.end()


@pytest.mark.parametrize("then", [signal.SIGTERM, signal.SIGINT])
def test_told_to_end_in_the_middle_of_a_restart(make_block: MakeNode, then: signal.Signals) -> None:
    node = make_block()
    node.primary()
    assert node.hastd is not None
    node.hastd.send_signal(signal.SIGUSR2)
    eventually(lambda: "starting anew" in node.said(), "it is about to start anew")
    assert node.stop(then) == os.EX_OK
    assert node.leftovers() == []
    assert not pid_of(node, "hastd: keeper")
    assert_gone(node)


def test_signals_in_the_middle_of_a_restart_do_not_end_it(steady: tuple[Node, SteadyProcess]) -> None:
    """Between the last moment of the old code and the first of the new one."""
    node, client = steady
    assert node.hastd is not None
    worker = int(node.status()["workerpid"])
    node.hastd.send_signal(signal.SIGUSR2)
    eventually(lambda: "starting anew" in node.said(), "it is about to start anew")
    deadline = time.monotonic() + DEADLINE
    while node.said().count("hastd started") < 2 and node.hastd.poll() is None:
        assert time.monotonic() < deadline, node.said()
        node.hastd.send_signal(signal.SIGHUP)
        time.sleep(0.0005)
    assert node.hastd.poll() is None
    served_by_another(node, worker)
    client.progress()
    client.end()


def test_ggate_dies_while_new_settings_take_leave_of_the_secondary(make_pair: Callable[..., Pair]) -> None:
    """Nobody is there to note the connection's end; that is not waited for."""
    pair = make_pair({"disk": 16 * MIB})
    pair.up()
    worker, ggate = int(pair.a.status()["workerpid"]), stage_pid(pair.a, "ggate")
    os.kill(ggate, signal.SIGSTOP)
    put(pair.a, with_settings(pair.a, "compression lzf"))
    hang_up(pair.a)
    eventually(lambda: "changed" in pair.a.said(), "the new settings are there")
    os.kill(ggate, signal.SIGKILL)
    eventually(lambda: "its stages run again" in pair.a.said(), "its stages run again")
    with RawClient(pair.a.socket()) as raw:
        assert raw.write(0, bytes(4096)) == 0
    assert int(pair.a.status()["workerpid"]) == worker
    assert "does not answer" not in pair.a.said()
    pair.wait_in_sync(pair.a)


def test_failed_restart_of_a_secondary_with_a_sick_disk_is_tried_again(make_pair: Callable[..., Pair]) -> None:
    tools.need_root()
    from tests.faultdisk import FaultDisk

    pair = make_pair({"disk": 16 * MIB}, conf="timeout 2")
    pair.create()
    disk = FaultDisk.under(pair.b)
    pair.start()
    pair.roles(pair.a)
    pair.wait_in_sync(pair.a)
    disk.fail("all", 5)
    worker = int(pair.b.status()["workerpid"])
    os.kill(worker, signal.SIGKILL)
    eventually(lambda: pair.b.said().count("starting its worker again") > 4, "it is tried several times")
    assert pair.b.status()["role"] == "secondary"
    disk.heal()
    pair.wait_in_sync(pair.a)
    assert pair.differing() is None


def test_restart_after_the_run_directory_was_cleared(steady: tuple[Node, SteadyProcess]) -> None:
    """The keeper is there, and the next hastd would not find it."""
    node, process = steady
    for entry in node.rundir.iterdir():
        if entry.suffix != ".dev":
            entry.unlink()
    node.ctl("restart")
    assert_there(node)
    before = process.ask()["writes"]
    eventually(lambda: process.ask()["writes"] > before, "it goes on")
    assert process.ask()["error"] == ""
    assert len([title for title in node.titles().values() if title == "hastd: keeper"]) == 1


def test_killed_while_a_primary_becomes_secondary(make_node: Callable[..., Node]) -> None:
    """It was told to leave its role, and what it served is gone: the next hastd does not take that again."""
    node = make_node({"disk": 8 * MIB}, memory=False)
    node.create()
    disk = FaultDisk.under(node)
    node.start()
    node.set_role("primary")
    disk.hang("flush")
    leaving = threading.Thread(target=node.role, args=("secondary",), kwargs={"check": False})
    leaving.start()
    eventually(lambda: "primary) exited with code 0" in node.said(), "the primary has ended")
    kill_main(node)
    disk.heal()
    leaving.join()
    node.start()
    assert node.status()["role"] == "secondary"
