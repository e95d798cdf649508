"""kill -9 of each kind of process, and upgrades: who uses the block device sees a pause, and nothing else.

The longer version, with the pauses measured, is tests/chaos/kill_each.py.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hast.device import fuse
from tests import tools
from tests.chaos import kill_each
from tests.chaos.steady import SteadyProcess
from tests.e2e.node import DEADLINE, MIB, Node, eventually
from tests.e2e.pair import Pair, PairNode
from tests.e2e.test_block_device import assert_gone, assert_there, block, fio, make_block, stage_pid
from tests.faultdisk import FaultDisk

__all__ = ["block", "make_block"]
MakeNode = Callable[..., Node]
pytestmark = pytest.mark.root


@pytest.fixture
def pair(make_pair: Callable[..., Pair]) -> Pair:
    """Two nodes with block devices, nothing running; skips where that is not possible."""
    tools.need_root()
    tools.need("fio", "mkfs.ext4")
    reason = fuse.usable()
    if reason is not None:
        pytest.skip(reason)
    return make_pair({"disk": 64 * MIB}, device="fuse")


@pytest.fixture
def steady(make_block: MakeNode) -> Iterator[tuple[Node, SteadyProcess]]:
    """One node, primary, and a client that writes to its device."""
    node = make_block()
    node.primary()
    process = SteadyProcess(node.device(), node.env)
    eventually(lambda: process.ask()["writes"], "it writes")
    yield node, process
    process.process.kill()
    process.process.wait()


def pid_of(node: Node, title: str) -> int:
    """The process with this title; 0 while there is none."""
    return next((pid for pid, found in node.titles().items() if found == title), 0)


def kill_main(node: Node) -> None:
    """kill -9 of hastd's main process, and nothing else."""
    assert node.hastd is not None
    node.hastd.kill()
    node.hastd.wait(DEADLINE)


def served_by_another(node: Node, worker: int) -> None:
    def served() -> bool:
        try:
            status = node.status()
        except ValueError:  # nobody answers at the moment
            return False
        return status.get("workerpid") not in (0, None, worker) and bool(status["status"])

    eventually(served, "a new worker")


@pytest.mark.slow
def test_every_process_is_killed_under_load(pair: Pair) -> None:
    """Two connected nodes, a mounted ext4 on the device, fio verifies what it wrote: no error, the same on both."""
    tallies: dict[str, kill_each.Tally] = {}
    with kill_each.rig(pair, 180) as rig:
        with rig.load() as (client, load):
            rig.round(kill_each.KINDS, client, load, tallies)
        assert load.runs > 0
        pair.wait_in_sync(pair.a)
    assert set(tallies) == set(kill_each.KINDS)
    assert pair.differing() is None


def test_block_device_outlives_its_worker(steady: tuple[Node, SteadyProcess]) -> None:
    node, client = steady
    loops, worker = node.loops(), int(node.status()["workerpid"])
    os.kill(worker, signal.SIGKILL)
    served_by_another(node, worker)
    client.progress()
    client.end()
    assert node.loops() == loops and len(node.mounts()) == 1
    assert_there(node)


def test_role_is_resumed_after_hastd_was_killed(steady: tuple[Node, SteadyProcess]) -> None:
    node, client = steady
    loops = node.loops()
    kill_main(node)
    node.start()
    assert node.status()["role"] == "primary"
    client.progress()
    client.end()
    assert node.loops() == loops
    node.role("init")
    assert_gone(node)


def test_role_init_is_not_resumed(make_block: MakeNode) -> None:
    node = make_block()
    node.primary()
    node.role("init")
    kill_main(node)
    node.start()
    assert node.status()["role"] == "init"
    assert_gone(node)


def test_stopped_hastd_leaves_no_keeper_and_no_role(make_block: MakeNode) -> None:
    node = make_block()
    node.primary()
    assert node.stop() == 0
    assert node.leftovers() == []
    node.start()
    assert node.status()["role"] == "init"


def test_secondary_is_resumed_after_its_hastd_was_killed(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair()
    pair.up()
    kill_main(pair.b)
    pair.b.start()
    assert pair.b.status()["role"] == "secondary"
    pair.wait_connected(pair.a)


def test_nbd_primary_is_resumed_after_its_hastd_was_killed(node: Node) -> None:
    kill_main(node)
    node.start()
    eventually(lambda: node.status()["status"], "its worker answers")
    node.role("primary")
    node.run("nbdinfo", "--size", node.uri())


@pytest.mark.parametrize("alone", [False, True])
def test_not_resumed_when_the_other_node_has_taken_over(pair: Pair, alone: bool) -> None:
    """What used the device gets errors and does not hang; the other node is left alone. alone: it knew before that it
    wrote alone, so that it need not wait for the other one, but it has to ask."""
    pair.up()
    if alone:
        pair.b.kill()
    client = SteadyProcess(pair.a.device(), pair.a.env)
    eventually(lambda: client.ask()["writes"], "it writes")
    if alone:
        pair.b.start()
    kill_main(pair.a)
    pair.b.set_role("primary")
    pair.a.start()
    eventually(lambda: pair.a.status()["role"] == "init", "it does not go on")
    assert "while hastd was gone the other node took over" in pair.a.said()
    eventually(lambda: refused(client), "the client gets an error")
    client.process.kill()
    client.process.wait()
    assert_gone(pair.a)
    assert pair.b.status()["role"] == "primary"


def refused(client: SteadyProcess) -> bool:
    try:
        client.ask()
    except AssertionError as error:
        return "Input/output error" in str(error)
    return False


def test_not_resumed_when_the_other_node_was_primary_meanwhile(pair: Pair) -> None:
    """It is secondary again, but has newer data than what users of the device have seen."""
    pair.up()
    with pair.a.device().open("rb", buffering=0) as user:
        user.read(4096)
        kill_main(pair.a)
        eventually(lambda: not pid_of(pair.a, f"hastd: {pair.a.name()} (primary)"), "its worker ends")
        pair.b.set_role("primary")
        with pair.b.device().open("r+b", buffering=0) as device:
            device.write(b"newer" * 1024)
            os.fsync(device.fileno())
        pair.b.set_role("secondary")
        pair.a.start()
        eventually(lambda: pair.a.status()["role"] == "init", "it does not go on")
        assert "was primary, and has newer data" in pair.a.said()
    pair.a.set_role("primary")
    pair.wait_in_sync(pair.a)
    with pair.a.device().open("rb", buffering=0) as device:
        assert device.read(5) == b"newer"


def test_not_resumed_with_another_component(make_block: MakeNode) -> None:
    """The configuration was changed while hastd was gone: other data must not appear under those who use the device."""
    node = make_block()
    node.primary()
    kill_main(node)
    other = node.components / "other"
    other.write_bytes(node.component().read_bytes())
    node.conf.write_text(node.conf.read_text().replace(f"local {node.component()}", f"local {other}"))
    node.start()
    eventually(lambda: node.status()["role"] == "init", "it does not go on")
    assert "the settings or the component have changed" in node.said()
    assert_gone(node)


def test_device_goes_when_no_worker_can_take_it(make_block: MakeNode) -> None:
    """The component is not there any more, for longer than `timeout`."""
    node = make_block(conf="timeout 2")
    node.primary()
    node.component().rename(node.components / "elsewhere")
    os.kill(int(node.status()["workerpid"]), signal.SIGKILL)
    eventually(lambda: node.status()["role"] == "init", "nobody can serve it")
    assert_gone(node)


def test_device_goes_with_the_role_also_when_there_is_no_worker(block: Node) -> None:
    """The worker is started again and again, because somebody else has the component; its device waits, until the
    role is given up."""
    spawner = pid_of(block, "hastd: spawner")
    worker = int(block.status()["workerpid"])
    os.kill(spawner, signal.SIGSTOP)
    os.kill(worker, signal.SIGKILL)
    with block.component().open("rb") as component:
        eventually(lambda: locked(component.fileno()), "the lock of the component")
        os.kill(spawner, signal.SIGCONT)
        eventually(lambda: "is locked by another hastd or hastctl" in block.said(), "a new worker does not get it")
        assert len(block.loops()) == len(block.mounts()) == 1
        block.role("init")
        assert_gone(block)


def locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def test_removed_resource_is_not_resumed(make_block: MakeNode) -> None:
    node = make_block(resources={"kept": 8 * MIB, "gone": 8 * MIB})
    node.primary()
    kill_main(node)
    text = node.conf.read_text()
    node.conf.write_text(text[: text.index(f"resource {node.name('gone')}")])
    node.start()
    eventually(lambda: node.status("kept")["status"], "the other one goes on")
    assert node.status("kept")["role"] == "primary"
    assert f"{node.name('gone')}: not going on as primary: it is not configured any more" in node.said()
    assert len(node.mounts()) == len(node.loops()) == 1


def test_keeper_is_replaced_and_knows_everything(steady: tuple[Node, SteadyProcess]) -> None:
    node, client = steady
    keeper = int(eventually(lambda: pid_of(node, "hastd: keeper"), "a keeper"))
    os.kill(keeper, signal.SIGKILL)
    eventually(lambda: pid_of(node, "hastd: keeper") not in (0, keeper), "a new keeper")
    kill_main(node)
    node.start()
    client.progress()
    client.end()


def test_keeper_and_main_are_killed_together(make_block: MakeNode) -> None:
    """Nothing is left to go on with: users get errors, the next hastd begins anew."""
    node = make_block()
    node.primary()
    node.kill()
    node.start()
    assert node.status()["role"] == "init"
    assert_gone(node)


@pytest.mark.parametrize("how", ["hastctl", "SIGUSR2"])
def test_restart_in_the_same_process(steady: tuple[Node, SteadyProcess], how: str) -> None:
    node, client = steady
    assert node.hastd is not None
    worker = int(node.status()["workerpid"])
    if how == "hastctl":
        node.ctl("restart")
    else:
        node.hastd.send_signal(signal.SIGUSR2)
    served_by_another(node, worker)
    client.progress()
    client.end()
    assert node.hastd.poll() is None
    assert node.run("cat", node.directory / "pid").stdout == f"{node.hastd.pid}\n"
    assert len(node.loops()) == len(node.mounts()) == 1


@pytest.mark.parametrize("kills", [1, 2])
def test_restart_while_there_is_no_keeper(steady: tuple[Node, SteadyProcess], kills: int) -> None:
    """Killed a moment before; the second time it is not replaced at once. The next hastd knows roles only from it."""
    node, client = steady
    assert node.hastd is not None
    worker = int(node.status()["workerpid"])
    for _ in range(kills):
        keeper = int(eventually(lambda: pid_of(node, "hastd: keeper"), "a keeper"))
        os.kill(keeper, signal.SIGKILL)
    node.hastd.send_signal(signal.SIGUSR2)
    served_by_another(node, worker)
    client.progress()
    client.end()


@pytest.mark.parametrize("how", ["restart", "stop"])
@pytest.mark.parametrize("command", [("discard",), ("role", "-f", "primary")])
def test_disk_that_hangs_without_a_worker_holds_up_nobody(
    make_block: MakeNode, command: tuple[str, ...], how: str
) -> None:
    """Its metadata were to be changed. hastd ends, or is started anew, and users of another resource do not notice."""
    node = make_block(resources={"disk": 64 * MIB, "hung": 8 * MIB})
    node.create()
    disk = FaultDisk.under(node, "hung")
    node.start()
    node.set_role("primary")
    worker = int(node.status()["workerpid"])
    client = SteadyProcess(node.device(), node.env)
    eventually(lambda: client.ask()["writes"], "it writes")
    disk.hang()
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(node.ctl, *command, node.name("hung"), check=False)
        eventually(lambda: disk.stats().waiting, "the disk is asked")
        if how == "restart":
            node.ctl("restart")
            served_by_another(node, worker)
            client.progress()
            client.end()
        else:
            client.end()
            assert node.stop() == 0
        assert asked.result(DEADLINE).returncode != 0
    disk.heal()
    eventually(lambda: not pid_of(node, f"hastd: {node.name('hung')}: metadata"), "who waited for the disk ends")


def test_restart_in_the_background(make_block: MakeNode) -> None:
    node = make_block()
    node.create()
    node.run(Path(tools.ROOT) / "bin" / "hastd", "-c", node.conf)
    pid = (node.directory / "pid").read_text()
    node.role("primary")
    node.ctl("restart")
    assert (node.directory / "pid").read_text() == pid
    assert node.status()["role"] == "primary"
    assert_there(node)
    node.ctl("stop")
    eventually(lambda: not node.leftovers(), "nothing is left")


def test_no_restart_with_a_configuration_that_cannot_be_used(node: Node) -> None:
    """Nothing is touched, and hastctl says why."""
    worker = node.status()["workerpid"]
    good = node.conf.read_text()
    node.conf.write_text(good + "resource broken {\n")
    assert node.hastd is not None
    node.hastd.send_signal(signal.SIGUSR2)
    eventually(lambda: "not starting anew: a new hastd does not start: " in node.said(), "it says why not")
    node.conf.write_text(good)
    assert node.status()["workerpid"] == worker
    node.conf.write_text(good + "rundir\n")
    other = node.directory / "good.conf"
    other.write_text(good)
    done = node.run(tools.ROOT / "bin" / "hastctl", "restart", "-c", other, check=False)
    assert done.returncode == os.EX_SOFTWARE
    assert "a new hastd does not start: " in done.stderr and done.stderr.count("\n") == 1
    node.conf.write_text(good)
    assert node.status()["workerpid"] == worker


@pytest.mark.slow
def test_restart_waits_until_resources_are_served(make_node: MakeNode) -> None:
    """A worker that is there may find that it cannot serve: who has asked is to hear of that."""
    node = make_node({"disk": 8 * MIB}, memory=False)
    node.create()
    disk = FaultDisk.under(node)
    node.start()
    node.set_role("primary")
    worker = node.status()["workerpid"]
    disk.hang("read")
    restart = [tools.ROOT / "bin" / "hastctl", "restart", "-c", node.conf]
    with subprocess.Popen(restart, env=node.env, stderr=subprocess.PIPE, text=True) as hastctl:

        def another() -> bool:
            done = node.ctl("status", "--json", node.name(), check=False)
            return done.returncode == 0 and json.loads(done.stdout)[0]["workerpid"] not in (0, worker)

        eventually(another, "another worker")
        for _ in range(10):
            node.status()
        assert hastctl.poll() is None, "it is not served yet"
        disk.heal()
        assert hastctl.communicate()[1] == "" and hastctl.returncode == 0
    assert node.socket().exists()


def test_no_restart_with_another_run_directory(node: Node) -> None:
    """The new hastd would not find the keeper, and what notes say of a disk that does not say it itself."""
    worker = node.status()["workerpid"]
    good = node.conf.read_text()
    node.conf.write_text(good.replace(f"rundir {node.rundir}\n", f"rundir {node.rundir}2\n"))
    done = node.ctl("restart", check=False)
    assert done.returncode == os.EX_SOFTWARE
    assert f"rundir {node.rundir} became {node.rundir}2" in done.stderr and done.stderr.count("\n") == 1
    assert (node.status()["role"], node.status()["workerpid"]) == ("primary", worker)
    node.conf.write_text(good)
    node.ctl("restart")


def test_configuration_is_tested(node: Node) -> None:
    hastd = tools.ROOT / "bin" / "hastd"
    assert node.run(hastd, "-t", "-c", node.conf).stderr == ""
    node.conf.write_text(node.conf.read_text() + "nonsense\n")
    done = node.run(hastd, "-t", "-c", node.conf, check=False)
    assert done.returncode == os.EX_CONFIG and done.stderr.count("\n") == 1


@pytest.mark.parametrize("stage", ["ggate", "disk"])
def test_sigterm_to_a_stage_is_nothing(steady: tuple[Node, SteadyProcess], stage: str) -> None:
    """As `systemctl kill` and the end of the machine send it, to everybody at once."""
    node, client = steady
    pid = stage_pid(node, stage)
    os.kill(pid, signal.SIGTERM)
    client.progress()
    assert stage_pid(node, stage) == pid
    client.end()


def test_sigterm_to_everybody_is_an_end_in_good_order(make_block: MakeNode) -> None:
    node = make_block()
    node.primary()
    for pid in node.pids():
        with contextlib.suppress(ProcessLookupError):  # main has ended it already
            os.kill(pid, signal.SIGTERM)
    assert node.hastd is not None and node.hastd.wait(DEADLINE) == 0
    node.hastd = None
    eventually(lambda: not node.leftovers(), "nothing is left")
    assert_gone(node)


def test_worker_killed_with_a_peer_that_does_not_answer(pair: Pair) -> None:
    """The new worker goes on alone."""
    pair.up()
    client = SteadyProcess(pair.a.device(), pair.a.env)
    worker = int(pair.a.status()["workerpid"])
    pair.freeze(pair.b)
    os.kill(worker, signal.SIGKILL)
    served_by_another(pair.a, worker)
    client.progress()
    client.end()
    pair.thaw(pair.b)


@pytest.mark.parametrize("stage", ["ggate", "disk"])
def test_stage_of_a_connected_primary_was_killed(pair: Pair, stage: str) -> None:
    """The connection is there again before clients are served: nothing is counted as written alone. (Not always, on a
    busy machine: they do not wait for it for long.)"""
    pair.up()
    client = SteadyProcess(pair.a.device(), pair.a.env)
    for _ in range(6):
        before = pair.a.dump()["localcnt"]
        pid = stage_pid(pair.a, stage)
        os.kill(pid, signal.SIGKILL)
        eventually(lambda pid=pid: stage_pid(pair.a, stage) not in (0, pid), f"another {stage} stage")
        client.progress()
        pair.wait_in_sync(pair.a)
        if pair.a.dump()["localcnt"] == before:
            break
    else:
        pytest.fail("it wrote alone each time")
    client.end()
    assert pair.differing() is None


@pytest.mark.parametrize("stage", ["ggate", "disk"])
def test_stage_was_killed_again_before_it_served(pair: Pair, stage: str) -> None:
    """While its worker waited for the other node, which does not answer."""
    pair.up()
    client = SteadyProcess(pair.a.device(), pair.a.env)
    pair.freeze(pair.b)
    for _ in range(2):
        pid = stage_pid(pair.a, stage)
        os.kill(pid, signal.SIGKILL)
        eventually(lambda pid=pid: stage_pid(pair.a, stage) not in (0, pid), f"another {stage} stage")
    client.progress()
    client.end()
    pair.thaw(pair.b)


@pytest.mark.slow
def test_secondary_whose_disk_stage_was_killed_hangs_up_at_once(make_pair: Callable[..., Pair]) -> None:
    """It does not wait for what nobody does any more, while the primary's clients wait for it."""
    tools.need("qemu-img")
    pair = make_pair(conf="timeout 60")
    pair.up()
    with subprocess.Popen(
        ["qemu-img", "bench", "-w", "-f", "raw", "-c", "1000000000", "-d", "16", pair.a.uri()],
        stdout=subprocess.DEVNULL,
        env=pair.a.env,
    ) as client:
        try:
            for _ in range(3):
                written = pair.a.status()["stat_write"]
                eventually(lambda written=written: pair.a.status()["stat_write"] > written + 100, "it writes")
                pid = int(eventually(lambda: stage_pid(pair.b, "disk"), "a disk stage"))
                os.kill(pid, signal.SIGKILL)
                eventually(lambda pid=pid: stage_pid(pair.b, "disk") not in (0, pid), "a new disk stage")
        finally:
            client.kill()
    assert "does not end" not in pair.b.said()


def test_restart_with_verified_writes_at_depth_16(make_block: MakeNode) -> None:
    """Much is under way each time: what has no answer is asked again, and what has one is there."""
    node = make_block()
    node.primary()
    command = fio(node, "--rw=randwrite", "--bsrange=4k-128k", "--iodepth=16", "--size=64m", "--rate=16m")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as writer:
        for how in ("main", "restart", "worker"):
            worker = int(eventually(lambda: node.status()["workerpid"], "a worker"))
            if how == "main":
                kill_main(node)
                node.start()
            elif how == "restart":
                node.ctl("restart")
            else:
                os.kill(worker, signal.SIGKILL)
            served_by_another(node, worker)
            assert writer.poll() is None or writer.returncode == 0, writer.communicate()[0]
        output, _ = writer.communicate(timeout=DEADLINE)
    assert writer.returncode == 0, output


def test_pair_is_upgraded_node_by_node(make_pair: Callable[..., Pair]) -> None:
    """Both are restarted in turn, and go on in their roles."""
    pair = make_pair()
    pair.up()

    def restart(node: PairNode) -> None:
        node.ctl("restart")
        pair.wait_connected(pair.a)

    restart(pair.b)
    restart(pair.a)
    assert pair.a.status()["role"] == "primary" and pair.b.status()["role"] == "secondary"
