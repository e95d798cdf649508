"""hast/primary.py: what happens beside its start. The stages are real, the secondary plays a script."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from hast import link as link_module
from hast.component import create
from hast.config import parse
from hast.errors import HastError
from hast.link import TakenOverError
from hast.primary import Primary
from hast.stages.context import DISK, GGATE
from tests import vectors
from tests.unit.scripted_secondary import Secondary

DEADLINE = 60.0
WINDOW = 2.0  # seconds, in which what must not happen would have happened

Body = Callable[[Primary], Coroutine[Any, Any, None]]


class Scene:
    """A primary of a resource without a block device, and whether it would have served one."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory = directory
        self.monkeypatch = monkeypatch
        self.component = directory / "component"
        self.component.touch()
        create("data", str(self.component), mediasize=4 << 20)
        self.served: list[bool] = []
        monkeypatch.setattr(Primary, "_serve_device", lambda _, resend: self.served.append(resend))

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
            assert primary.pipeline is not None and primary.listener is not None
            assert primary.pipeline.runs(DISK) and primary.pipeline.runs(GGATE)
            assert not primary.failed.done() and len(primary.restarts) == 1

        scene.run(body, secondary.address)
    assert scene.served == [True]


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
            assert primary.listener is None

        scene.run(body, secondary.address)
