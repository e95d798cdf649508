"""hast/pipeline.py: what becomes of a stage that ends before it runs."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hast import pipeline
from hast.errors import HastError, SystemCallError, TemporaryError
from hast.ffi import _hast
from hast.pipeline import Pipeline, PipelineSettings
from hast.shm.arena import Geometry
from hast.stages.context import DISK, GGATE, DiskSettings, StageContext
from tests import faultdisk
from tests.tools import loop_device

lib = _hast.lib
SECONDS = 20.0


def killed(context: StageContext) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def gives_up(context: StageContext) -> int:
    return os.EX_SOFTWARE


@pytest.mark.parametrize(("entry", "error"), [(killed, TemporaryError), (gives_up, SystemCallError)])
def test_a_stage_that_ends_while_starting(
    entry: Callable[[StageContext], int], error: type[HastError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was killed may live the next time, so the worker is started again; the role is not lost for it."""
    monkeypatch.setitem(pipeline.ENTRIES, DISK, entry)
    geometry = Geometry(1 << 20, 8192, 1 << 16, 4096, 2, 8, 2, 1 << 17)

    async def start() -> None:
        with (tmp_path / "component").open("w+b") as component:
            settings = PipelineSettings("data", "primary", geometry, DiskSettings(component.fileno(), "inline", 1))
            stages = Pipeline(settings, lambda stage, message: None, lambda stage, what: None)
            stages.create()
            try:
                await stages.start(DISK)
            finally:
                await stages.close()

    with pytest.raises(HastError) as caught:
        asyncio.run(start())
    assert type(caught.value) is error
    assert "its disk stage" in str(caught.value) and "while starting" in str(caught.value)


def timer() -> int:
    """A descriptor of a timer, which Python has no name for before 3.13."""
    fd = int(ctypes.CDLL(None, use_errno=True).timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK))
    assert fd >= 0
    return fd


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="loop devices are root's")
def test_a_killed_disk_stage_is_over_when_its_last_write_is(tmp_path: Path) -> None:
    """The kernel does not wait for what is in the device already: it would come after writes of the next stage."""
    faultdisk.need()
    if not lib.hast_disk_uring_works():
        pytest.skip("io_uring cannot be set up here")
    (tmp_path / "backing").write_bytes(bytes(8 << 20))
    with faultdisk.FaultDisk(tmp_path / "disk", tmp_path / "backing") as disk:
        device = loop_device(disk.point, "--direct-io=on")
        try:
            asyncio.run(hung_write(device, disk))
        finally:
            disk.heal()
            subprocess.run(["losetup", "-d", device], check=True)


async def hung_write(device: str, disk: faultdisk.FaultDisk) -> None:
    geometry = Geometry(1 << 20, 8192, 1 << 16, 4096, 2, 8, 2, 1 << 17)
    fd = os.open(device, os.O_RDWR | os.O_DIRECT)
    stages = Pipeline(
        PipelineSettings("data", "primary", geometry, DiskSettings(fd, "uring", 512)),
        lambda stage, message: None,
        lambda stage, what: None,
    )
    arena = stages.create()
    try:
        await stages.start(DISK)
        disk.hang("write")
        bio = arena.bio(0)
        bio.cmd, bio.flags, bio.offset, bio.length = lib.HAST_CMD_WRITE, 0, 0, 4096
        assert lib.hast_ring_push_some(lib.hast_arena_ring(arena.c, lib.HAST_RING_DISK), [0], 1) == 1
        lib.hast_doorbell_force(arena.c.bell + DISK, stages._bells[DISK])
        async with asyncio.timeout(SECONDS):
            while disk.stats().waiting == 0:
                await asyncio.sleep(0.01)
        killing = asyncio.create_task(stages.kill(DISK))
        done, _ = await asyncio.wait([killing], timeout=1.0)
        assert not done, "the stage counts as ended, and its write is still to come"
        disk.release()
        async with asyncio.timeout(SECONDS):
            await killing
    finally:
        disk.release()
        await stages.close()
        os.close(fd)


def test_a_kernel_that_cannot_send_again_ends_the_block_device(tmp_path: Path) -> None:
    """Linux before 6.9 refuses to. A timer's descriptor takes nothing either, with the same error."""
    geometry = Geometry(1 << 20, 8192, 1 << 16, 4096, 2, 8, 2, 1 << 17)
    told: list[dict[str, object]] = []

    async def serve() -> str:
        with (tmp_path / "component").open("w+b") as component:
            component.truncate(2 << 20)
            settings = PipelineSettings("data", "primary", geometry, DiskSettings(component.fileno(), "inline", 1))
            stages = Pipeline(settings, lambda stage, message: told.append(message), lambda stage, what: None)
            stages.create()
            try:
                await stages.start(DISK, GGATE)
                device = timer()
                stages.send(GGATE, {"cmd": "fuse", "resend": True}, (device,))
                os.close(device)
                async with asyncio.timeout(SECONDS):
                    return await stages.stages[GGATE].end
            finally:
                await stages.close()

    assert asyncio.run(serve()) == f"exited with code {os.EX_UNAVAILABLE}"
    assert {"event": "device", "errno": errno.EOPNOTSUPP} in told
