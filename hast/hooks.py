"""Hooks: the program that `exec` names, run for each event (docs/protocol.md section 8).

    <exec> role <resource> <oldrole> <newrole>
    <exec> connect|disconnect|syncstart|syncdone|syncintr|split-brain <resource>

Invariants:
- Nothing ever waits for a hook: run() only queues it.
- Hooks of one resource start in the order of their events, each after the one before has ended or has run
  for REPORT_SECONDS. Hooks of different resources do not wait for each other.
- A connection that comes and goes again and again does not run a storm of hooks (hast/damper.py); what is true at the
  end is told, also when hooks take long.
- A hook is a process group of its own, with /dev/null as its input and output, and no descriptor of hastd.
- One that fails, cannot be started, or runs long is reported; after KILL_SECONDS its process group is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from hast.damper import EVENTS, Damper

log = logging.getLogger(__name__)

REPORT_SECONDS = 60.0
KILL_SECONDS = 600.0
QUEUE_LIMIT = 100  # hooks of one resource that wait for their turn
BUSY = 20  # of them that are enough for events of the connection to wait
END_SECONDS = 2.0  # between SIGTERM and SIGKILL when hastd ends


@dataclass(frozen=True)
class Hook:
    """One run of a hook: the program and its arguments, args[1] being the resource."""

    program: str
    args: tuple[str, ...]

    def __str__(self) -> str:
        return f"hook '{' '.join((self.program, *self.args))}'"


class Hooks:
    """Runs hooks. The seconds are those above; tests have less time."""

    def __init__(self, report_seconds: float = REPORT_SECONDS, kill_seconds: float = KILL_SECONDS) -> None:
        self.report_seconds = report_seconds
        self.kill_seconds = kill_seconds
        self._queues: dict[str, asyncio.Queue[Hook]] = {}
        self._dampers: dict[str, Damper] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}  # of those that hold events back
        self._workers: list[asyncio.Task[None]] = []  # one for each queue
        self._watches: set[asyncio.Task[None]] = set()  # one for each running hook
        self._running: dict[int, Hook] = {}  # by process group

    @property
    def running(self) -> int:
        """The number of hooks that run now."""
        return len(self._running)

    def run(self, program: str | None, args: Sequence[str]) -> None:
        """Queue `program` with `args`: the event, the resource, and more. Nothing happens without a program."""
        if program is None:
            return
        event, resource, now = args[0], args[1], asyncio.get_running_loop().time()
        damper = self._dampers.setdefault(resource, Damper(now))
        if event not in EVENTS:
            self._run_all(program, resource, damper.all(now))
            self._queue(Hook(program, tuple(args)))
            return
        was_holding = damper.holding
        self._run_all(program, resource, damper.event(event, now, self._busy(resource)))
        if damper.holding and not was_holding:
            log.warning("%s: its connection comes and goes: not each event has a hook for a while", resource)
        if damper.holding and resource not in self._timers:
            self._later(program, resource)

    def _busy(self, resource: str) -> bool:
        return resource in self._queues and self._queues[resource].qsize() >= BUSY

    def _later(self, program: str, resource: str) -> None:
        """Look again whether what is held back can be told."""
        loop, damper = asyncio.get_running_loop(), self._dampers[resource]

        def late() -> None:
            del self._timers[resource]
            self._run_all(program, resource, damper.late(loop.time(), self._busy(resource)))
            if damper.holding:
                self._later(program, resource)

        self._timers[resource] = loop.call_later(damper.wait(loop.time()), late)

    def _run_all(self, program: str, resource: str, events: Sequence[str]) -> None:
        for event in events:
            self._queue(Hook(program, (event, resource)))

    def _queue(self, hook: Hook) -> None:
        resource = hook.args[1]
        if resource not in self._queues:
            self._queues[resource] = asyncio.Queue(QUEUE_LIMIT)
            work = self._work(self._queues[resource])
            self._workers.append(asyncio.get_running_loop().create_task(work))
        try:
            self._queues[resource].put_nowait(hook)
        except asyncio.QueueFull:
            log.error("%s: %s is not run: %d hooks wait for their turn", resource, hook, QUEUE_LIMIT)

    async def _work(self, queue: asyncio.Queue[Hook]) -> None:
        """Start the hooks of one resource, one after the other."""
        while True:
            hook = await queue.get()
            process = await self._execute(hook)
            if process is None:
                continue
            watch = asyncio.get_running_loop().create_task(self._watch(hook, process))
            self._watches.add(watch)
            watch.add_done_callback(self._watches.discard)
            await asyncio.wait([watch], timeout=self.report_seconds)

    async def _execute(self, hook: Hook) -> asyncio.subprocess.Process | None:
        null = asyncio.subprocess.DEVNULL
        try:
            process = await asyncio.create_subprocess_exec(
                hook.program, *hook.args, stdin=null, stdout=null, stderr=null, start_new_session=True, cwd="/"
            )
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            log.error("%s: %s cannot be started: %s", hook.args[1], hook, reason)
            return None
        log.debug("%s: %s started (pid %d)", hook.args[1], hook, process.pid)
        self._running[process.pid] = hook
        return process

    async def _watch(self, hook: Hook, process: asyncio.subprocess.Process) -> None:
        """Report how a hook ends, and at intervals that it has not."""
        resource = hook.args[1]
        end = asyncio.ensure_future(process.wait())
        seconds = 0.0
        while not end.done():
            done, _ = await asyncio.wait([end], timeout=self.report_seconds)
            if done:
                break
            seconds += self.report_seconds
            if seconds >= self.kill_seconds:
                log.error("%s: %s has run for %g s, killing it", resource, hook, seconds)
                _signal(process.pid, signal.SIGKILL)
                await end
            else:
                log.warning("%s: %s (pid %d) has been running for %g s", resource, hook, process.pid, seconds)
        del self._running[process.pid]
        status = end.result()
        if status < 0:
            log.error("%s: %s was killed by signal %d", resource, hook, -status)
        elif status > 0:
            log.error("%s: %s failed with exit status %d", resource, hook, status)
        else:
            log.debug("%s: %s ended", resource, hook)

    async def close(self) -> None:
        """End all hooks: those that wait are dropped, those that run get SIGTERM, and soon SIGKILL."""
        for timer in self._timers.values():
            timer.cancel()
        waiting = sum(queue.qsize() for queue in self._queues.values())
        if waiting or self._running:
            log.warning("%d hooks are ended, %d not run: hastd ends", len(self._running), waiting)
        for worker in self._workers:
            worker.cancel()
        for number in (signal.SIGTERM, signal.SIGKILL):
            for group in self._running:
                _signal(group, number)
            if self._watches:
                await asyncio.wait(self._watches, timeout=END_SECONDS)


def _signal(group: int, number: int) -> None:
    """Signal a hook's process group. That it is gone already is no error."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)
