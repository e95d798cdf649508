"""Where components are, and how big: what all systems of a comparison have in common."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from perf.errors import PerfError

MIB = 1 << 20
DEADLINE = 15.0


@dataclass(frozen=True)
class Scene:
    """`sockets`: a directory for sockets; `files`: one for components. `targets`: how many each system serves."""

    sockets: Path
    files: Path
    size: int
    memory: bool
    direct: bool
    targets: int = 1

    def file(self, name: str) -> Path:
        """A component of the scene's size, with no block allocated yet."""
        path = self.files / name
        with path.open("wb") as f:
            f.truncate(self.size)
        return path


@contextmanager
def scene(size: int, memory: bool = True, direct: bool = False, targets: int = 1) -> Iterator[Scene]:
    """In memory (/dev/shm) or where temporary files are ($TMPDIR, or /tmp), which has to be a disk then."""
    with (
        tempfile.TemporaryDirectory(prefix="hastperf.") as sockets,
        tempfile.TemporaryDirectory(prefix="hastperf.", dir="/dev/shm" if memory else None) as files,
    ):
        if not memory and file_system(Path(files)) == "tmpfs":
            raise PerfError(f"{tempfile.gettempdir()} is in memory: TMPDIR has to name a directory on a disk")
        yield Scene(Path(sockets), Path(files), size, memory, direct, targets)


def file_system(path: Path) -> str:
    done = subprocess.run(["stat", "-f", "-c", "%T", path], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@contextmanager
def server(command: list[str], ready: Callable[[], bool]) -> Iterator[int]:
    """The process ID of a server that runs until the end of the block."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + DEADLINE
        while not ready():
            if time.monotonic() > deadline or process.poll() is not None:
                raise PerfError(f"does not start: {' '.join(command)}")
            time.sleep(0.01)
        yield process.pid
    finally:
        process.terminate()
        try:
            process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
