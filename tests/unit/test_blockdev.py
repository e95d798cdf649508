"""hast/blockdev.py: the children that attach and detach a block device."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from hast.blockdev import BlockDevice
from hast.errors import SystemCallError, TemporaryError
from tests.unit.workforce import resource


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def mistaken() -> None:
    raise ZeroDivisionError


def refused() -> None:
    raise SystemCallError("data: it cannot be")


@pytest.mark.parametrize(
    ("body", "error", "text"),
    [
        (killed, TemporaryError, "data: attach of its block device was killed by signal 9"),
        (mistaken, TemporaryError, "data: attach of its block device exited with code 70"),
        (refused, SystemCallError, "data: it cannot be"),
    ],
)
def test_child_that_has_not_done_it(
    body: Callable[[], None], error: type[Exception], text: str, tmp_path: Path
) -> None:
    """Then the device is not there, or is one that nobody can find."""
    device = BlockDevice(resource("data"), tmp_path)
    with pytest.raises(error, match=text):
        asyncio.run(device._in_child("attach", body, 10.0))
    asyncio.run(device._in_child("attach", lambda: None, 10.0))
