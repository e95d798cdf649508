"""A workforce with odd workers (odd_workers.py), for the tests of the spawner and of main's side of workers."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from hast.config import Resource, parse
from hast.control import Role
from hast.keeping import Keeping
from hast.rundir import RunDirectory
from hast.supervisor import Supervisor
from hast.workers import Workforce

DEADLINE = 30.0


def resource(name: str) -> Resource:
    text = f"resource {name} {{ local /nowhere\n on here {{ remote tcp4://192.0.2.1:99\n source 192.0.2.2 }} }}"
    return parse(text, "hast.conf", ["here"]).resources[name]


class Scene:
    """A workforce with odd workers, supervisors for them, and what they have told."""

    def __init__(self, tmp_path: Path) -> None:
        self.rundir = RunDirectory(str(tmp_path / "run"))
        self.told: list[tuple[str, ...]] = []
        self.devices: list[str] = []  # that there have been
        self.keeping = Keeping(self.rundir.path)
        self.workforce = Workforce(
            self.rundir, True, 0, lambda _, args: None, "tests.unit.odd_workers", on_device=self._device
        )

    def supervisor(self, name: str) -> Supervisor:
        return Supervisor(resource(name), self.workforce, self._role, lambda *args, **details: None, self.keeping)

    def _device(self, resource: Resource, device: dict[str, Any], fd: int) -> None:
        if fd >= 0:
            self.devices.append(resource.name)
            self.keeping.device(resource.name, device, fd)
        else:
            self.keeping.release(resource.name)

    def _role(self, resource: Resource, old: Role, new: Role) -> None:
        self.told.append((resource.name, old.text, new.text))

    def run(self, body: Callable[[], Awaitable[None]]) -> None:
        async def main() -> None:
            await self.workforce.start()
            try:
                async with asyncio.timeout(60):
                    await body()
            finally:
                await self.workforce.close()

        self.rundir.open()
        try:
            asyncio.run(main())
        finally:
            self.rundir.close()


async def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        await asyncio.sleep(0.01)


def gone(pid: int) -> bool:
    """Whether a process does not exist, or is only waiting to be collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def spawner_pid() -> int:
    """The one spawner that this process has started."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    titles = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children}
    (pid,) = [pid for pid, title in titles.items() if title.startswith(b"hastd: spawner")]
    return pid
