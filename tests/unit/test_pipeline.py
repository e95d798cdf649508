"""hast/pipeline.py: what becomes of a stage that ends before it runs."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from hast import pipeline
from hast.errors import HastError, SystemCallError, TemporaryError
from hast.pipeline import Pipeline, PipelineSettings
from hast.shm.arena import Geometry
from hast.stages.context import DISK, DiskSettings, StageContext


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
