"""What tests need of the system: skip, with the reason, where it is not there.

The table tools/requirements names every system tool; a test that asks for one that it does not name is wrong.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SEARCH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def packages() -> dict[str, str]:
    """The Debian package of each tool in the table."""
    rows = [line.split() for line in (ROOT / "tools" / "requirements").read_text().splitlines()]
    return {row[1]: row[2] for row in rows if row and not row[0].startswith("#")}


def find(tool: str) -> str | None:
    """The path of a system tool, or None when it is not installed."""
    return shutil.which(tool, path=SEARCH)


def need(*tools: str) -> None:
    """Skip the test unless all these system tools are there."""
    for tool in tools:
        package = packages()[tool]
        if find(tool) is None:
            pytest.skip(f"{tool} is not installed (Debian package {package}): run tools/requirements.sh")


def need_root() -> None:
    """Skip the test unless it runs as root."""
    if os.geteuid() != 0:
        pytest.skip("needs root")


LOOP_SECONDS = 30.0


def loop_device(path: Path | str, *options: str) -> str:
    """A loop device over a file; who asks for it takes it away. Skips the test where there are none at all.

    Another test may be quicker with the one that was free a moment ago: that is tried again."""
    if not Path("/dev/loop-control").exists():
        pytest.skip("no loop devices here")
    deadline = time.monotonic() + LOOP_SECONDS
    while True:
        done = subprocess.run(["losetup", "-f", "--show", *options, str(path)], capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout.strip()
        if not any(text in done.stderr for text in ("busy", "unavailable")) or time.monotonic() > deadline:
            pytest.skip(f"no loop device here: {done.stderr.strip()}")
        time.sleep(0.05)
