"""The spawner, and main, die or hang: workers of theirs are replaced, or end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from hast import spawner as spawner_module
from hast import workers as workers_module
from hast.control import Role
from hast.errors import HastError
from hast.rundir import RunDirectory
from hast.spawner import Spawner
from hast.stages import launch
from hast.workers import Workforce
from tests.tools import ROOT
from tests.unit.workforce import Scene, gone, spawner_pid, until


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def test_spawner_that_is_killed_is_replaced(scene: Scene) -> None:
    async def body() -> None:
        supervisors = [scene.supervisor(name) for name in ("good", "good-2")]
        for supervisor in supervisors:
            await supervisor.set_role(Role.PRIMARY)
        old = [(await supervisor.status()).workerpid for supervisor in supervisors]
        os.kill(spawner_pid(), signal.SIGKILL)
        for supervisor, pid in zip(supervisors, old, strict=True):
            assert pid
            await until(lambda pid=pid: gone(pid))
            await until(lambda s=supervisor, pid=pid: s._worker is not None and s._worker.pid not in (0, pid))
            assert supervisor.role is Role.PRIMARY
            assert (await supervisor.set_role(Role.INIT)).error == 0
            assert (await supervisor.set_role(Role.PRIMARY)).error == 0
            await supervisor.close()

    scene.run(body)
    assert ("good", "primary", "init") in scene.told  # only those that were asked for
    assert len(scene.told) == 6


def test_spawner_that_is_killed_before_it_is_ready_is_replaced(scene: Scene) -> None:
    async def body() -> None:
        supervisor = scene.supervisor("good")
        await supervisor.set_role(Role.PRIMARY)
        old = supervisor._worker
        process = scene.workforce._process
        assert process is not None
        process.kill()
        await until(lambda: scene.workforce._process not in (None, process))
        assert scene.workforce._process is not None and not scene.workforce._up.is_set()
        scene.workforce._process.kill()
        await until(lambda: supervisor._worker not in (None, old))
        await until(lambda: supervisor._worker is not None and supervisor._worker.ready.done())
        await supervisor.close()

    scene.run(body)
    assert scene.told == [("good", "init", "primary")]


def test_spawner_that_hangs_is_killed(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not say that a worker has ended; it starts none; and a role is given up under it."""
    monkeypatch.setattr(workers_module, "SPAWN_SECONDS", 1.0)
    monkeypatch.setattr(workers_module, "REPORT_SECONDS", 1.0)

    async def body() -> None:
        supervisor = scene.supervisor("good")
        await supervisor.set_role(Role.PRIMARY)
        old = supervisor._worker
        assert old is not None
        os.kill(spawner_pid(), signal.SIGSTOP)
        os.kill(old.pid, signal.SIGKILL)
        await until(lambda: supervisor._worker not in (None, old))
        await until(lambda: supervisor._worker is not None and supervisor._worker.ready.done())
        os.kill(spawner_pid(), signal.SIGSTOP)
        assert (await supervisor.set_role(Role.INIT)).error == 0
        await scene.workforce.wait_ready()
        os.kill(spawner_pid(), signal.SIGSTOP)
        assert (await supervisor.set_role(Role.PRIMARY)).error == os.EX_TEMPFAIL
        assert (await supervisor.set_role(Role.PRIMARY)).error == 0
        await supervisor.close()

    scene.run(body)


def test_spawner_whose_end_nobody_has_noticed_yet(scene: Scene) -> None:
    """A worker is to be started in that moment: the next spawner does it."""

    async def body() -> None:
        supervisor = scene.supervisor("good")
        pid = spawner_pid()
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        worker = await supervisor._restart(Role.PRIMARY, 0.0, "it is wanted")
        assert worker is not None
        await scene.workforce.stop(worker)

    scene.run(body)


def test_main_is_killed(tmp_path: Path) -> None:
    """Its workers and the spawner end by themselves; the next main waits for that."""
    program = """if True:
        import asyncio, sys
        from pathlib import Path
        from tests.unit.workforce import Scene, resource
        async def body():
            worker = scene.workforce.spawn(resource("good"), "primary")
            await worker.ready
            print(worker.pid, flush=True)
            await asyncio.sleep(1000)
        scene = Scene(Path(sys.argv[1]))
        scene.run(body)
    """
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        with pytest.raises(HastError, match="another hastd is running"):
            RunDirectory(str(tmp_path / "run")).open()
        process.kill()
        process.wait()
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(tmp_path / "run" / "data.sock"))
        (tmp_path / "run" / "other").write_text("no socket")
        rundir = RunDirectory(str(tmp_path / "run"))
        rundir.open()
        assert gone(worker)
        assert {entry.name for entry in rundir.path.iterdir()} == {"hastd.pid", "other"}
        rundir.close()


def test_spawner_that_cannot_start(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.workforce = Workforce(scene.rundir, True, 0, lambda _, args: None, "tests.no_such_module")

    async def body() -> None:
        raise AssertionError("it started")

    with pytest.raises(HastError, match="the spawner ended"):
        scene.run(body)


def test_worker_whose_disk_has_just_let_it_go_is_not_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Main is gone. It has to note that a flush has failed: so it is looked at once more."""
    looks = [True, False, False]
    monkeypatch.setattr(spawner_module, "LAST_SECONDS", 0.0)
    monkeypatch.setattr(launch, "in_kernels_hands", lambda _: looks.pop(0))
    spawner = Spawner.__new__(Spawner)
    spawner.workers = {1: SimpleNamespace(pid=1)}  # type: ignore[dict-item]

    def kill(_: int, number: int) -> None:
        if number == signal.SIGKILL:
            assert looks == []
            spawner.workers.clear()

    for name, method in (("_kill", kill), ("_wait", lambda _: None), ("_reap", lambda: None)):
        monkeypatch.setattr(spawner, name, method)
    spawner._end_all()
    assert looks == [] and not spawner.workers
