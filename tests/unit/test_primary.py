"""hast/primary.py: what happens beside its start, and when the system is out of something. The stages are real, the
secondary plays a script."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hast import alone as alone_module
from hast import boot
from hast import component as component_module
from hast import link as link_module
from hast import pipeline as pipeline_module
from hast.component import AbsentComponent, Component, create, open_component
from hast.config import parse
from hast.control import Role
from hast.errors import DiskError, HastError, TemporaryError
from hast.ffi import _hast
from hast.frontend import Frontend
from hast.link import TakenOverError
from hast.pipeline import END_SECONDS, Pipeline
from hast.primary import Primary
from hast.stages.context import DISK, GGATE
from tests import vectors
from tests.unit.scripted_secondary import Secondary, playing

DEADLINE = 60.0
WINDOW = 2.0  # seconds, in which what must not happen would have happened
FAILED_SECONDS = 20.0  # for a failure to be noticed

Body = Callable[[Primary], Coroutine[Any, Any, None]]


class Scene:
    """A primary of a resource without a block device, and whether it would have served one."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory = directory
        self.monkeypatch = monkeypatch
        self.component = directory / "component"
        self.component.touch()
        create("data", str(self.component), mediasize=64 << 20)
        self.served: list[bool] = []
        monkeypatch.setattr(Frontend, "serve_device", lambda _, resend: self.served.append(resend))

    def run(self, body: Body, remote: str = "none") -> None:
        """Make it, do what is to be done with it, and end it."""

        async def main() -> None:
            text = f"device nbd\nresource data {{ local {self.component}\n on a {{ remote {remote}\n }} }}"
            resource = parse(text, "hast.conf", ["a"]).resources["data"]
            primary = Primary(resource, self.directory, lambda message, fds=(): None, asyncio.Event())
            try:
                async with asyncio.timeout(DEADLINE):
                    await body(primary)
            finally:
                async with asyncio.timeout(DEADLINE):
                    await primary.shutdown(False, False)

        asyncio.run(main())


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(tmp_path, monkeypatch)


async def kill(primary: Primary, stage: int) -> asyncio.Task[None]:
    """kill -9 of a stage; the restart that has begun for it."""
    assert primary.pipeline is not None
    os.kill(primary.pipeline.stages[stage].child.pid, signal.SIGKILL)
    while primary.restarting is None:
        await asyncio.sleep(0.01)
    return primary.restarting


@pytest.mark.parametrize("stage", [DISK, GGATE])
def test_nothing_is_served_before_the_other_node_has_answered(scene: Scene, stage: int) -> None:
    """hastd was gone, and a stage of the primary that goes on dies while that asks whether the other node has taken
    over. It has: users of the device must not get another answer, not even from stages that were started anew."""
    scene.monkeypatch.setattr(link_module, "FIRST_SECONDS", DEADLINE)

    with contextlib.closing(Secondary()) as secondary:

        async def body(primary: Primary) -> None:
            start = asyncio.create_task(primary.start({"resume": True}, []))
            sock = await secondary.accept()
            await secondary.hear(sock)
            restart = await kill(primary, stage)
            await asyncio.wait({restart, start}, timeout=WINDOW, return_when=asyncio.FIRST_COMPLETED)
            assert scene.served == []
            await secondary.say(sock, vectors.load("hs1_error_wrong_role_wait").raw)
            with pytest.raises(TakenOverError):
                await start
            await restart

        scene.run(body, secondary.address)
    assert scene.served == []


@pytest.mark.parametrize("stage", [DISK, GGATE])
def test_stage_that_dies_while_the_other_node_is_asked_is_there_when_clients_are_served(
    scene: Scene, stage: int
) -> None:
    scene.monkeypatch.setattr(link_module, "FIRST_SECONDS", DEADLINE)

    with contextlib.closing(Secondary()) as secondary:

        async def body(primary: Primary) -> None:
            start = asyncio.create_task(primary.start({}, []))
            sock = await secondary.accept()
            await secondary.hear(sock)
            await kill(primary, stage)
            await secondary.say(sock, vectors.load("hs1_error_role_init").raw)
            await start
            assert primary.pipeline is not None and primary.frontend.listener is not None
            assert primary.pipeline.runs(DISK) and primary.pipeline.runs(GGATE)
            assert not primary.failed.done() and len(primary.restarts) == 1

        scene.run(body, secondary.address)
    assert scene.served == [True]


@pytest.mark.parametrize("stage", [DISK, GGATE])
def test_stages_are_not_ended_while_they_are_started_anew(scene: Scene, stage: int) -> None:
    """One dies while the end of the role waits for what is copied to the secondary."""
    ended: list[bool] = []

    async def end(of: alone_module.Alone) -> None:
        assert isinstance(of.owner, Primary)
        await kill(of.owner, stage)

    async def start(of: Pipeline, *stages: int) -> None:
        await asyncio.sleep(0.5)  # a busy machine
        await start_stages(of, *stages)

    async def stop(of: Pipeline, *stages: int, seconds: float = END_SECONDS) -> bool:
        if GGATE in stages:
            ended.append(of.runs(DISK) and of.runs(GGATE))
        return await stop_stages(of, *stages, seconds=seconds)

    start_stages, stop_stages = Pipeline.start, Pipeline.stop
    scene.monkeypatch.setattr(alone_module.Alone, "end", end)
    scene.monkeypatch.setattr(Pipeline, "start", start)
    scene.monkeypatch.setattr(Pipeline, "stop", stop)

    async def body(primary: Primary) -> None:
        await primary.start({}, [])

    scene.run(body)
    assert ended == [True]


def test_no_stages_are_started_anew_once_they_are_ended(scene: Scene) -> None:
    died: list[bool] = []

    async def stop(of: Pipeline, *stages: int, seconds: float = END_SECONDS) -> bool:
        if GGATE in stages:
            os.kill(of.stages[DISK].child.pid, signal.SIGKILL)
            await asyncio.wait([of.stages[DISK].end])
            died.append(True)
        return await stop_stages(of, *stages, seconds=seconds)

    stop_stages = Pipeline.stop
    scene.monkeypatch.setattr(Pipeline, "stop", stop)
    primaries: list[Primary] = []

    async def body(primary: Primary) -> None:
        await primary.start({}, [])
        primaries.append(primary)

    scene.run(body)
    assert died == [True] and primaries[0].restarting is None


def test_stages_that_cannot_be_started_anew_end_the_start(scene: Scene) -> None:
    """Nobody waits for them any longer than it takes to find that out."""
    scene.monkeypatch.setattr(link_module, "FIRST_SECONDS", DEADLINE)

    with contextlib.closing(Secondary()) as secondary:

        async def body(primary: Primary) -> None:
            start = asyncio.create_task(primary.start({}, []))
            sock = await secondary.accept()
            await secondary.hear(sock)
            await kill(primary, DISK)
            assert primary.component is not None
            os.ftruncate(primary.component.fd, 0)
            await secondary.say(sock, vectors.load("hs1_error_role_init").raw)
            with pytest.raises(HastError, match="cannot be read"):
                await start
            assert primary.frontend.listener is None

        scene.run(body, secondary.address)


# ---- the system is out of something ----


def none_left(*_: object, **__: object) -> Any:
    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


def disk_error(*_: object) -> Any:
    raise DiskError("data: its component cannot be written: Input/output error")


def no_doorbells(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(os, "eventfd", none_left)


def no_buffers(patch: pytest.MonkeyPatch) -> None:
    """For reading and writing the component; an arena can be had."""
    patch.setattr(component_module, "mmap", SimpleNamespace(mmap=none_left))


def no_arena(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(os, "memfd_create", none_left)


def no_processes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(os, "fork", none_left)


def no_sockets(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(socket, "socketpair", none_left)


def no_pipes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(os, "pipe2", none_left)


def no_time(patch: pytest.MonkeyPatch) -> None:
    """The machine stands still while they start."""
    patch.setattr(pipeline_module, "UP_SECONDS", 0.0)


def a_mistake(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Component, "read_map", lambda *_: 1 // 0)


@pytest.mark.parametrize(
    "shortage",
    [no_doorbells, no_buffers, no_arena, no_processes, no_sockets, no_pipes, no_time, a_mistake],
)
def test_stages_that_cannot_be_started_anew_end_the_worker(
    scene: Scene, shortage: Callable[[pytest.MonkeyPatch], None]
) -> None:
    """Whatever the error is: a new worker is started then, and clients do not wait for stages that never come."""

    async def body(primary: Primary) -> None:
        await primary.start({}, [])
        with pytest.MonkeyPatch.context() as patch:
            shortage(patch)
            await kill(primary, DISK)
            error = await asyncio.wait_for(asyncio.shield(primary.failed), FAILED_SECONDS)
        assert type(error) is TemporaryError and "\n" not in str(error) and "data" in str(error)

    scene.run(body)


def test_shortage_when_localcnt_is_to_be_raised_is_waited_for(scene: Scene) -> None:
    """As for a disk that does not take it: whoever waits for that has it as soon as it is possible."""
    sent: list[tuple[int, Any]] = []

    def send(_: Pipeline, stage: int, message: Any, fds: tuple[int, ...] = ()) -> None:
        sent.append((stage, message))

    async def body(primary: Primary) -> None:
        await primary.start({}, [])
        question = {"bits": _hast.lib.HAST_SEQ_NEED_DEGRADED, "dirty": 0, "detach": False, "number": 7}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Pipeline, "send", send)
            with pytest.MonkeyPatch.context() as short:
                no_buffers(short)
                primary._stage_message(GGATE, {"event": "seq", **question})
                assert primary.alone.retry is not None and not primary.failed.done() and sent == []
            while not sent:
                await asyncio.sleep(0.01)
        assert sent == [(GGATE, {"cmd": "grant", "number": 7})]
        assert primary.component is not None and primary.component.read_metadata().alone

    scene.run(body)


def test_nothing_is_counted_as_written_alone_once_it_is_known_that_it_is_out_of_date(scene: Scene) -> None:
    """It was asked for when the secondary was lost, and comes when it is stored that the secondary has the truth."""

    async def body(primary: Primary) -> None:
        await primary.start({}, [])
        assert primary.metadata is not None
        primary._store(replace(primary.metadata, syncing=True))
        before = primary.metadata
        question = {"bits": _hast.lib.HAST_SEQ_NEED_DEGRADED, "dirty": 0, "detach": False, "number": 7}
        primary._stage_message(GGATE, {"event": "seq", **question})
        assert primary.metadata == before and primary.alone.retry is None and primary.alone.owed is None

    scene.run(body)


def test_nothing_is_counted_as_written_alone_while_stages_end(scene: Scene) -> None:
    """Who has asked for it is gone. The disk stage waits for a flush, which may fail, and then it would be said of a
    node that has lost something that nobody has more."""
    close = Pipeline.close

    async def slowly(pipeline: Pipeline) -> None:
        await asyncio.sleep(3 * alone_module.GRANT_SECONDS)
        await close(pipeline)

    async def body(primary: Primary) -> None:
        await primary.start({}, [])
        question = {"bits": _hast.lib.HAST_SEQ_NEED_DEGRADED, "dirty": 0, "detach": False, "number": 7}
        with pytest.MonkeyPatch.context() as short:
            no_buffers(short)
            primary._stage_message(GGATE, {"event": "seq", **question})
            assert primary.alone.retry is not None
        scene.monkeypatch.setattr(Pipeline, "close", slowly)
        await (await kill(primary, GGATE))
        assert not primary.failed.done()
        assert primary.component is not None and not primary.component.read_metadata().alone

    scene.run(body)


def test_all_is_read_there_where_it_was_not_known_yet_what_is_newer_on_the_secondary(scene: Scene) -> None:
    """The worker before this one has died before the secondary's map was merged into its own."""

    async def body(primary: Primary) -> None:
        with contextlib.closing(open_component("data", str(scene.component), "off")) as component:
            was = component.read_metadata()
            known = replace(was, resuid=7, prevrole=Role.PRIMARY, syncing=True, unmapped=True)
            component.write_metadata(known)
            assert not any(component.read_map(known))
        await primary.start({}, [])
        assert primary.component is not None and primary.metadata is not None and primary.pipeline is not None
        assert primary.component.read_metadata() == primary.metadata == replace(known, unmapped=False)
        assert primary.component.read_map(known) == b"\xff" * 4 + bytes(known.mapsize - 4)
        assert primary.pipeline.arena is not None and primary.pipeline.arena.seq.ndirty == 32

    scene.run(body)


def test_given_up_where_the_map_cannot_say_that_all_is_newer_on_the_secondary(scene: Scene) -> None:
    """It is known to be out of date, and served by the secondary when that is there; nobody gets an error before."""

    async def body(primary: Primary) -> None:
        with contextlib.closing(open_component("data", str(scene.component), "off")) as component:
            was = component.read_metadata()
            component.write_metadata(replace(was, resuid=7, prevrole=Role.PRIMARY, syncing=True, unmapped=True))
        scene.monkeypatch.setattr(Component, "fill_map", disk_error)
        await primary.start({}, [])
        assert primary.outage is not None and primary.outage.detached and primary.outage.unrecorded
        assert primary.pipeline is not None and primary.pipeline.arena is not None
        assert primary.pipeline.arena.seq.detached and primary.pipeline.arena.seq.sync_remote

    scene.run(body)


def test_given_up_where_a_map_that_a_flush_may_have_lost_cannot_be_marked(scene: Scene) -> None:
    """Without `metaflush`; it is out of date, a stage dies before the sequencer has given it up, and nobody gets an
    error before it is known whether the secondary is there."""

    async def body(primary: Primary) -> None:
        primary.resource = replace(primary.resource, metaflush=False)
        await primary.start({}, [])
        assert primary.metadata is not None and primary.pipeline is not None and primary.outage is not None
        primary._store(replace(primary.metadata, syncing=True, unsaid=True))
        primary.pipeline.flush_failed()
        scene.monkeypatch.setattr(Component, "fill_map", disk_error)
        await (await kill(primary, GGATE))
        assert not primary.failed.done()
        assert primary.outage.detached and primary.outage.unrecorded

    scene.run(body)


def test_component_that_was_given_up_is_another_one_now(scene: Scene) -> None:
    """Somebody has put a new disk in its place. It is not served as if it were the old one."""

    async def body(primary: Primary) -> None:
        with contextlib.closing(open_component("data", str(scene.component), "off")) as component:
            known = replace(component.read_metadata(), resuid=7, prevrole=Role.PRIMARY, syncing=True)
        boot.give_up(scene.directory, known)
        await primary.start({"again": True}, [])
        assert isinstance(primary.component, AbsentComponent) and primary.metadata == known
        assert primary.outage is not None and primary.outage.detached

    scene.run(body)


def test_no_memory_for_the_map_of_a_secondary(scene: Scene) -> None:
    """That connection is not made; another one is tried."""
    create = os.memfd_create
    scene.monkeypatch.setattr(
        os, "memfd_create", lambda name, *flags: none_left() if name == "hast map" else create(name, *flags)
    )

    with contextlib.closing(Secondary()) as secondary:

        async def body(primary: Primary) -> None:
            script = asyncio.create_task(playing()(secondary))  # type: ignore[arg-type]
            await primary.start({}, [])
            await script
            assert primary.link is not None and primary.link._keeper is not None and not primary.failed.done()
            assert any("no memory for the secondary's activemap" in said for said in primary.link._said)
            await secondary.accept()

        scene.run(body, secondary.address)


def test_waiting_begins_anew_after_a_connection_that_was_of_use_and_no_other(scene: Scene) -> None:
    """Clients of a primary that is out of date wait for the other node, but not for one connection after the other."""

    async def body(primary: Primary) -> None:
        await primary.start({}, [])
        assert primary.metadata is not None and primary.pipeline is not None and primary.pipeline.arena is not None
        primary.metadata = replace(primary.metadata, syncing=True)
        primary._lonely()
        seq = primary.pipeline.arena.seq
        assert primary.alone.patience is not None
        for served, awaited, failing, anew in ((0, 1, False, 0), (0, 0, False, 1), (3, 1, False, 1), (3, 1, True, 0)):
            before, seq.served, seq.awaited = primary.alone.patience, served, awaited
            primary._lonely(failing)
            assert (primary.alone.patience is not before) is bool(anew), (served, awaited, failing)

    scene.run(body)
