"""Main's side of workers: real processes, which mostly do not behave."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import select
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from hast import supervisor as supervisor_module
from hast import workers as workers_module
from hast.config import Resource
from hast.control import Role, RoleEntry
from hast.spawner import resource_from_dict, resource_to_dict
from hast.supervisor import FIRST_PAUSE, LONGEST_PAUSE, SETTLED_SECONDS, Supervisor, known_elements, next_pause
from hast.workers import Ending
from tests.unit.workforce import DEADLINE, Scene, gone, resource, spawner_pid, until


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def test_resource_survives_json() -> None:
    original = resource("data")
    assert original.source is not None and original.source.port == 0
    copy = resource_from_dict(json.loads(json.dumps(resource_to_dict(original))))
    assert copy == original and str(copy.remote) == str(original.remote) and str(copy.source) == str(original.source)


def test_pauses_grow_and_are_forgotten() -> None:
    pauses = [0.0]
    for _ in range(10):
        pauses.append(next_pause(pauses[-1], 1))
    assert pauses[1] == FIRST_PAUSE and pauses[2] == 2 * FIRST_PAUSE and pauses[-1] == LONGEST_PAUSE
    assert next_pause(LONGEST_PAUSE, SETTLED_SECONDS) == FIRST_PAUSE


def test_elements_of_an_answer_are_checked() -> None:
    answer = {
        "status": "complete", "dirty": 1 << 63, "extentsize": 1 << 32, "keepdirty": "64", "role": "primary",
        "workerpid": 1, "stat_read": -1, "stat_write": 5, "new": 1, "stat_flush": None, "stat_delete": [],
    }  # fmt: skip
    assert known_elements(answer) == {"status": "complete", "dirty": 1 << 63, "stat_write": 5}
    assert known_elements({"status": 7}) == {}


def test_worker_is_alone_with_what_it_needs(scene: Scene) -> None:
    async def body() -> None:
        worker = scene.workforce.spawn(resource("good"), "primary")
        said = json.loads((await worker.ready)["nbd"])
        assert said["pid"] == worker.pid
        assert said["title"] == "hastd: good (primary)"
        assert (said["role"], said["rundir"]) == ("primary", str(scene.rundir.path))
        assert said["remote"] == "tcp4://192.0.2.1:99" and said["sigterm"]
        extra = {fd: link for fd, link in said["fds"].items() if int(fd) > 2}
        assert sorted(link.partition(":")[0] for link in extra.values()) == [str(scene.rundir.path), "socket"]
        assert await worker.status() == {"dirty": 42, "status": "complete"}
        ending = await scene.workforce.stop(worker)
        assert (ending.words, ending.code, ending.temporary) == ("exited with code 0", 0, False)
        assert gone(worker.pid)

    scene.run(body)


@pytest.mark.parametrize(
    ("name", "message", "code"),
    [
        ("fail", "fail: component /nowhere does not exist", os.EX_NOINPUT),
        ("crash", "crash: unexpected error in the worker: RuntimeError('a defect')", os.EX_SOFTWARE),
        ("die", "die: its primary worker was killed by signal 9 (SIGKILL) while it was starting", os.EX_TEMPFAIL),
    ],
)
def test_worker_that_cannot_start(scene: Scene, name: str, message: str, code: int) -> None:
    async def body() -> None:
        supervisor = scene.supervisor(name)
        assert await supervisor.set_role(Role.PRIMARY) == RoleEntry(name, code, errmsg=message)
        status = await supervisor.status()
        assert (supervisor.role, status.workerpid, status.errmsg) == (Role.INIT, 0, message)
        await supervisor.set_role(Role.INIT)
        assert (await supervisor.status()).errmsg is None

    scene.run(body)
    assert scene.told == []


def test_block_device_of_a_promotion_that_has_failed_is_let_go(scene: Scene) -> None:
    """Whoever opens it would wait for a worker that is none."""

    async def body() -> None:
        supervisor = scene.supervisor("holder")
        await supervisor.set_role(Role.SECONDARY)
        assert (await supervisor.set_role(Role.PRIMARY)).error == os.EX_TEMPFAIL
        assert scene.devices == ["holder"] and scene.keeping.devices() == set()
        assert supervisor.role is Role.SECONDARY
        await supervisor.close()

    scene.run(body)


def test_last_words_are_heard_however_late(scene: Scene) -> None:
    """Main hears at once that the worker has ended, and all that it had to say before."""

    async def body() -> None:
        worker = scene.workforce.spawn(resource("talker"), "primary")
        await until(lambda: worker.pid)
        worker.channel.send({"cmd": "stop"})
        # Main does nothing else meanwhile, as on a machine that is busy.
        assert scene.workforce._channel is not None
        assert select.select([scene.workforce._channel], [], [], DEADLINE)[0] and gone(worker.pid)
        ending = await worker.ended
        assert ending == Ending("exited with code 66", os.EX_NOINPUT, "talker: component /nowhere does not exist")

    scene.run(body)


def test_roles(scene: Scene) -> None:
    async def body() -> None:
        supervisor = scene.supervisor("good")
        assert await supervisor.set_role(Role.INIT) == RoleEntry("good", role="init")
        assert await supervisor.set_role(Role.PRIMARY) == RoleEntry("good", role="init")
        pid = (await supervisor.status()).workerpid
        assert await supervisor.set_role(Role.PRIMARY) == RoleEntry("good", role="primary")
        status = await supervisor.status()
        assert (status.workerpid, status.role, status.status, status.dirty) == (pid, "primary", "complete", 42)
        assert (status.remoteaddr, status.sourceaddr) == ("tcp4://192.0.2.1:99", "192.0.2.2")
        assert await supervisor.set_role(Role.SECONDARY) == RoleEntry("good", role="primary")
        assert pid is not None and gone(pid)
        pid = (await supervisor.status()).workerpid
        assert await supervisor.set_role(Role.INIT) == RoleEntry("good", role="secondary")
        assert pid and gone(pid)
        status = await supervisor.status()
        assert (status.role, status.workerpid, status.status, status.dirty) == ("init", 0, None, None)

    scene.run(body)
    roles = ["init", "primary", "secondary", "init"]
    assert scene.told == [("good", old, new) for old, new in itertools.pairwise(roles)]


def test_role_changes_at_once_are_done_one_after_the_other(scene: Scene) -> None:
    async def body() -> None:
        supervisor = scene.supervisor("good")
        wanted = [Role.PRIMARY, Role.INIT] * 3
        entries = await asyncio.gather(*(supervisor.set_role(role) for role in wanted))
        assert [entry.role for entry in entries] == ["init", "primary"] * 3
        await supervisor.close()

    scene.run(body)


def test_killed_worker_is_started_again(scene: Scene) -> None:
    async def body() -> None:
        supervisor = scene.supervisor("good")
        await supervisor.set_role(Role.PRIMARY)
        seen = set()
        for _ in range(3):
            pid = (await supervisor.status()).workerpid
            assert pid and pid not in seen
            seen.add(pid)
            os.kill(pid, signal.SIGKILL)
            await until(lambda pid=pid: supervisor._worker is not None and supervisor._worker.pid not in (0, pid))
            await until(lambda: supervisor._worker is not None and supervisor._worker.ready.done())
            assert supervisor.role is Role.PRIMARY
        await supervisor.close()

    scene.run(body)
    assert scene.told == [("good", "init", "primary")]


def test_worker_that_ends_by_itself_leaves_role_init(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        supervisor = scene.supervisor("good")
        await supervisor.set_role(Role.PRIMARY)
        assert supervisor._worker is not None
        supervisor._worker.channel.send({"cmd": "stop"})  # not through the supervisor
        await until(lambda: supervisor.role is Role.INIT)
        assert (await supervisor.status()).errmsg == "its worker exited with code 0"

    scene.run(body)
    assert scene.told == [("good", "init", "primary"), ("good", "primary", "init")]
    assert "good: primary cannot go on, the role is init now" in caplog.messages


def test_temporary_failure_is_tried_again(scene: Scene) -> None:
    async def body() -> None:
        supervisor = scene.supervisor("temporary")
        await supervisor.set_role(Role.PRIMARY)
        first = supervisor._worker
        assert first is not None
        first.channel.send({"cmd": "stop"})
        await until(lambda: supervisor._worker not in (None, first))
        assert supervisor.role is Role.PRIMARY
        await supervisor.close()

    scene.run(body)


def test_primary_whose_disk_is_gone_has_timeout_to_find_it_again(scene: Scene) -> None:
    """Clients wait meanwhile, so it does not take for ever; a secondary has nobody who waits."""

    async def body() -> None:
        supervisor = scene.supervisor("ill")
        supervisor.resource = replace(supervisor.resource, timeout=1)
        await supervisor.set_role(Role.PRIMARY)
        ill = scene.rundir.path / "ill"
        for heals in (True, False):
            worker = supervisor._worker
            assert worker is not None
            ill.touch()
            os.kill(worker.pid, signal.SIGKILL)
            if heals:
                await until(lambda: supervisor._trouble.endswith("cannot be read"))
                assert supervisor.role is Role.PRIMARY
                ill.unlink()
                await until(lambda first=worker: supervisor._worker not in (None, first))
                await until(lambda: supervisor._worker is not None and supervisor._worker.ready.done())
            else:
                await until(lambda: supervisor.role is Role.INIT)
                assert (await supervisor.status()).errmsg == "ill: component /nowhere cannot be read"
        ill.unlink()
        await supervisor.set_role(Role.SECONDARY)
        worker = supervisor._worker
        assert worker is not None
        ill.touch()
        os.kill(worker.pid, signal.SIGKILL)
        began = time.monotonic()
        await until(lambda: time.monotonic() > began + 2.5 and supervisor._trouble.endswith("cannot be read"))
        assert supervisor.role is Role.SECONDARY
        ill.unlink()
        await until(lambda first=worker: supervisor._worker not in (None, first))
        await supervisor.close()

    scene.run(body)


def test_worker_that_says_nothing(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_module, "STATUS_SECONDS", 0.2)
    monkeypatch.setattr(workers_module, "STOP_SECONDS", 0.2)

    async def body() -> None:
        supervisor = scene.supervisor("silent")
        await supervisor.set_role(Role.PRIMARY)
        status = await supervisor.status()
        assert (status.role, status.status) == ("primary", None)
        assert status.errmsg == f"its worker (pid {status.workerpid}, primary) does not answer"
        assert (await supervisor.set_role(Role.INIT)).error == 0
        assert status.workerpid and gone(status.workerpid)

    scene.run(body)


def test_target_that_has_not_said_so_in_time_goes_on_as_secondary(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers_module, "STATUS_SECONDS", 0.2)

    async def body() -> None:
        supervisor = scene.supervisor("target")
        await supervisor.set_role(Role.SECONDARY)
        first = supervisor._worker
        entry = await supervisor.set_role(Role.PRIMARY)
        assert entry.error == os.EX_UNAVAILABLE and "mix of old and new" in (entry.errmsg or "")
        assert supervisor.role is Role.SECONDARY
        await until(lambda: supervisor._worker not in (None, first) and supervisor._worker.ready.done())
        await supervisor.close()

    scene.run(body)
    assert scene.told == [("target", "init", "secondary")]


def test_worker_that_does_not_want_to_end(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_module, "STOP_SECONDS", 0.2)
    monkeypatch.setattr(workers_module, "TERM_SECONDS", 0.2)

    async def body() -> None:
        worker = scene.workforce.spawn(resource("stubborn"), "primary")
        await worker.ready
        ending = await scene.workforce.stop(worker)
        assert ending.words == "was killed by signal 9 (SIGKILL)"

    scene.run(body)


def test_worker_whose_disk_has_just_let_it_go_is_not_killed(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has to note that a flush has failed."""
    monkeypatch.setattr(workers_module, "STOP_SECONDS", 0.2)
    monkeypatch.setattr(workers_module, "TERM_SECONDS", 2.0)
    looks: list[int] = []

    def in_kernels_hands(pid: int) -> bool:
        looks.append(pid)
        if len(looks) == 2:
            os.kill(pid, signal.SIGUSR1)  # the disk lets it go, just before hastd looks
        return len(looks) == 1

    monkeypatch.setattr(workers_module, "in_kernels_hands", in_kernels_hands)

    async def body() -> None:
        worker = scene.workforce.spawn(resource("held"), "primary")
        await worker.ready
        assert (await scene.workforce.stop(worker)).code == os.EX_OK

    scene.run(body)


def test_secondary_that_stores_what_it_has_received_has_timeout_for_that(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not where devices of other resources wait for its end."""
    monkeypatch.setattr(workers_module, "STOP_SECONDS", 0.2)
    patient = replace(resource("slow"), timeout=60)

    async def body() -> None:
        for role, leave, code in (("secondary", False, os.EX_OK), ("secondary", True, None), ("primary", False, None)):
            worker = scene.workforce.spawn(patient, role)
            await worker.ready
            assert (await scene.workforce.stop(worker, leave)).code == code, (role, leave)

    scene.run(body)


def test_worker_that_is_not_ready_in_time(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "READY_SECONDS", 0.0)

    async def body() -> None:
        supervisor = scene.supervisor("late")
        supervisor.resource = replace(supervisor.resource, timeout=0)
        entry = await supervisor.set_role(Role.PRIMARY)
        assert entry.error == os.EX_TEMPFAIL and "was not ready within 0 s" in entry.errmsg

    scene.run(body)


def test_worker_may_wait_for_the_other_node_as_long_as_timeout_says(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the time that it has to start."""
    monkeypatch.setattr(supervisor_module, "READY_SECONDS", 0.0)

    async def body() -> None:
        supervisor = scene.supervisor("good")
        assert await supervisor.set_role(Role.PRIMARY) == RoleEntry("good", role="init")
        await supervisor.close()

    scene.run(body)


def test_garbage_from_a_worker(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        worker = scene.workforce.spawn(resource("garbage"), "primary")
        await worker.ready
        assert await worker.status() == {"dirty": 42, "status": "complete"}
        assert await worker.status() == {"dirty": 42, "status": "complete"}
        await scene.workforce.stop(worker)

    scene.run(body)
    assert any("garbage: worker" in message and "bad message" in message for message in caplog.messages)


def test_end_is_told_when_the_stages_are_gone_as_well(scene: Scene) -> None:
    async def body() -> None:
        worker = scene.workforce.spawn(resource("orphan"), "primary")
        await worker.ready
        await worker.ended
        # The worker was killed at once; its stage, which the spawner has adopted, took a while.
        assert Path(f"/proc/{spawner_pid()}/task/{spawner_pid()}/children").read_text() == ""

    scene.run(body)


async def replaced(supervisor: Supervisor, other: Resource) -> None:
    await supervisor.hold()
    await supervisor.make_way(other)
    supervisor.go_on(other)


def test_settings_that_a_worker_takes_over(scene: Scene) -> None:
    async def body() -> None:
        supervisor = scene.supervisor("good")
        supervisor.change(replace(supervisor.resource, syncrate=1))  # nobody to tell
        await supervisor.set_role(Role.PRIMARY)
        pid = (await supervisor.status()).workerpid
        supervisor.change(replace(supervisor.resource, syncrate=7))
        status = await supervisor.status()
        assert (status.workerpid, status.dirty) == (pid, 7)
        # hold() is for changes that may need a new worker; this one does not.
        await replaced(supervisor, replace(supervisor.resource, syncrate=8))
        status = await supervisor.status()
        assert (status.workerpid, status.dirty) == (pid, 8)
        # Hooks are run by what is in force.
        assert supervisor._worker is not None and supervisor._worker.resource.syncrate == 8
        await supervisor.close()

    scene.run(body)


@pytest.mark.parametrize("name", ["good", "temporary"])
def test_settings_that_need_a_new_worker(scene: Scene, name: str) -> None:
    async def body() -> None:
        supervisor = scene.supervisor(name)
        await supervisor.set_role(Role.PRIMARY)
        pid = (await supervisor.status()).workerpid
        await replaced(supervisor, replace(supervisor.resource, localpath="/elsewhere"))
        assert pid and gone(pid) and supervisor.role is Role.PRIMARY
        await until(lambda: supervisor._worker is not None and supervisor._worker.ready.done())
        assert supervisor._worker is not None and supervisor._worker.resource.localpath == "/elsewhere"
        # The new one is watched like the old one.
        pid = supervisor._worker.pid
        os.kill(pid, signal.SIGKILL)
        await until(lambda: supervisor._worker is not None and supervisor._worker.pid not in (0, pid))
        await supervisor.close()

    scene.run(body)
    assert scene.told == [(name, "init", "primary")]


@pytest.mark.slow
def test_new_worker_that_cannot_start(scene: Scene) -> None:
    async def body() -> None:
        supervisor = scene.supervisor("good")
        await supervisor.set_role(Role.PRIMARY)
        await replaced(supervisor, replace(resource("fail"), localpath="/elsewhere"))
        await until(lambda: supervisor.role is Role.INIT)

    scene.run(body)
    assert scene.told[1:] == [("fail", "primary", "init")]


def test_new_settings_between_two_attempts(scene: Scene) -> None:
    """A worker that dies while it starts is tried again, from then on with what is in force then."""

    async def body() -> None:
        supervisor = scene.supervisor("good")
        await supervisor.set_role(Role.PRIMARY)
        await replaced(supervisor, replace(resource("die"), localpath="/elsewhere"))
        await until(lambda: supervisor._worker is None and supervisor._trouble.startswith("die: its primary worker"))
        keeper = supervisor._keeper
        supervisor.change(replace(resource("good"), localpath="/elsewhere"))
        await until(lambda: supervisor._worker is not None and supervisor._worker.ready.done())
        assert supervisor._keeper is keeper and supervisor.role is Role.PRIMARY
        await supervisor.close()

    scene.run(body)


def test_role_is_decided_before_settings_are(scene: Scene) -> None:
    """A worker that is just starting has the settings of before: it must not be left with them."""

    async def body() -> None:
        supervisor = scene.supervisor("good")
        change = asyncio.create_task(supervisor.set_role(Role.PRIMARY))
        while supervisor._worker is None:
            await asyncio.sleep(0)  # and not a moment longer
        assert supervisor.role is Role.INIT
        await replaced(supervisor, replace(supervisor.resource, localpath="/elsewhere"))
        assert (await change).error == 0
        await until(lambda: supervisor._worker is not None and supervisor._worker.ready.done())
        assert supervisor._worker is not None and supervisor._worker.resource.localpath == "/elsewhere"
        await supervisor.close()

    scene.run(body)


def test_resource_that_is_retired_stays_so(scene: Scene) -> None:
    """Also when somebody has asked for another role before, and had to wait."""

    async def body() -> None:
        supervisor = scene.supervisor("good")
        wanted = [asyncio.create_task(supervisor.set_role(Role.PRIMARY)) for _ in range(3)]
        await until(lambda: supervisor._worker is not None)
        wanted.append(asyncio.create_task(supervisor.set_role(Role.INIT)))
        wanted.append(asyncio.create_task(supervisor.set_role(Role.PRIMARY)))
        await supervisor.retire()
        entries = await asyncio.gather(*wanted)
        assert supervisor.role is Role.INIT and supervisor._worker is None
        assert entries[0].error == 0
        assert entries[-1] == RoleEntry("good", 1, errmsg="good: it was removed from the configuration")
        assert (await supervisor.set_role(Role.PRIMARY)).error == 1

    scene.run(body)
    assert scene.told == [("good", "init", "primary"), ("good", "primary", "init")]


def test_close_in_the_middle_of_a_start(scene: Scene) -> None:
    async def body() -> None:
        supervisor = scene.supervisor("good")
        change = asyncio.create_task(supervisor.set_role(Role.PRIMARY))
        await until(lambda: supervisor._worker is not None)
        await supervisor.close()
        await asyncio.wait({change})
        assert supervisor._worker is None and supervisor.role is Role.INIT

    scene.run(body)
