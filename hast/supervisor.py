"""One resource as main sees it: its role, and the worker that makes it so.

Invariants:
- Role changes of a resource happen one at a time; a resource has at most one worker.
- The role is what is true, not what is wished for: it changes when a worker says that it serves, and falls
  back to init when a worker cannot go on. Every change of it runs the hook and is a live event.
- A worker that was serving and was killed, or ended for a reason that may pass, is started again, at
  intervals that grow; the role stays. Every end of a worker is logged in words.
- Other settings leave the role alone. A worker has those of `resource`, or is about to.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from hast.channel import Message
from hast.config import Resource
from hast.control import ERROR_NO_ENTRY, STATUS_ELEMENTS, Role, RoleEntry, StatusEntry
from hast.errors import HastError, TemporaryError
from hast.reload import Action, action, changed_settings
from hast.workers import Ending, Worker, Workforce

log = logging.getLogger(__name__)

READY_SECONDS = 30.0  # for a worker to serve
FIRST_PAUSE = 0.1  # seconds before a worker that died is started again; doubled each time
LONGEST_PAUSE = 10.0
SETTLED_SECONDS = 60.0  # a worker that has run so long has nothing to do with the last death

# What a worker may say about itself; the rest main knows better.
WORKER_ELEMENTS = STATUS_ELEMENTS[STATUS_ELEMENTS.index("status") :]

OnEvent = Callable[..., None]


class WorkerEndedError(HastError):
    """A worker ended before it served. `exit_code` is its own; `temporary`: starting it again may help."""

    def __init__(self, resource: str, role: Role, ending: Ending) -> None:
        reason = ending.message or f"{resource}: its {role.text} worker {ending.words} while it was starting"
        super().__init__(reason)
        self.exit_code = os.EX_TEMPFAIL if ending.code is None else ending.code or os.EX_SOFTWARE
        self.temporary = ending.temporary


def next_pause(pause: float, uptime: float) -> float:
    """Seconds to wait before the next start, after `pause` before the last one and a life of `uptime` seconds."""
    if uptime >= SETTLED_SECONDS or pause == 0:
        return FIRST_PAUSE
    return min(pause * 2, LONGEST_PAUSE)


class Supervisor:
    """A resource. `on_role` is called with old and new role, `on_event` with an event's name and details."""

    def __init__(
        self,
        resource: Resource,
        workforce: Workforce,
        on_role: Callable[[Resource, Role, Role], None],
        on_event: OnEvent,
    ) -> None:
        self.resource = resource
        self.role = Role.INIT
        self._workforce = workforce
        self._on_role = on_role
        self._on_event = on_event
        self._worker: Worker | None = None
        self._keeper: asyncio.Task[None] | None = None  # watches a worker that has served
        self._change: asyncio.Task[RoleEntry] | None = None
        self._turn = asyncio.Lock()
        self._retired = False
        self._trouble = ""  # why there is no worker although there should be one

    @property
    def name(self) -> str:
        return self.resource.name

    # Roles.

    async def set_role(self, role: Role) -> RoleEntry:
        """Take a role; returns when it is in force or has failed, after READY_SECONDS and a stop at most."""
        async with self._turn:
            # A task of its own: it goes on when the one who asked does not wait for it.
            self._change = asyncio.get_running_loop().create_task(self._set_role(role))
            try:
                return await asyncio.shield(self._change)
            finally:
                if self._change.done():
                    self._change = None

    async def _set_role(self, role: Role) -> RoleEntry:
        previous = self.role
        if self._retired and role is not Role.INIT:
            text = f"{self.name}: it was removed from the configuration"
            return RoleEntry(self.name, ERROR_NO_ENTRY, errmsg=text)
        if role is previous:
            return RoleEntry(self.name, role=previous.text)
        await self._end_worker()
        try:
            if role is not Role.INIT:
                worker = await self._start_worker(role)
                self._keeper = asyncio.get_running_loop().create_task(self._keep(worker, role))
        except HastError as error:
            self._log_unless_said(error)
            self._enter(Role.INIT)
            return RoleEntry(self.name, error.exit_code, errmsg=str(error))
        self._enter(role)
        return RoleEntry(self.name, role=previous.text)

    def _enter(self, role: Role) -> None:
        """The role is now this one."""
        old, self.role, self._trouble = self.role, role, ""
        if role is not old:
            log.info("%s: role changed from %s to %s", self.name, old.text, role.text)
            self._on_role(self.resource, old, role)
            self._on_event(self.name, "role", old=old.text, new=role.text)

    async def close(self) -> None:
        """End the worker and whatever is under way; the role is init afterwards, without a hook."""
        if self._change is not None:
            self._change.cancel()
            await asyncio.wait({self._change})
        await self._end_worker()
        self.role = Role.INIT

    # The worker.

    async def _start_worker(self, role: Role) -> Worker:
        """A new worker that serves. Raises HastError; no worker is left then."""
        await self._workforce.wait_ready()
        worker = self._worker = self._workforce.spawn(self.resource, role.text)
        either: list[asyncio.Future[Any]] = [worker.ready, worker.ended]
        await asyncio.wait(either, timeout=READY_SECONDS, return_when="FIRST_COMPLETED")
        if worker.ready.done():
            details = {key: worker.ready.result().get(key) for key in ("device", "nbd")}
            served = " and ".join(str(path) for path in details.values() if path)
            log.info("%s: %s serves %s", self.name, worker.name, served or "the resource")
            self._on_event(self.name, "worker", state="ready", pid=worker.pid, **details)
            return worker
        in_time = worker.ended.done()
        ending = await self._workforce.stop(worker)
        self._ended(worker, ending)
        if not in_time:
            raise TemporaryError(
                f"{self.name}: its {role.text} worker was not ready within {READY_SECONDS:g} s and was stopped"
            )
        raise WorkerEndedError(self.name, role, ending)

    async def _end_worker(self) -> None:
        """No worker runs afterwards, and none will be started by itself."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait({self._keeper})
            self._keeper = None
        if self._worker is not None:
            worker = self._worker
            self._ended(worker, await self._workforce.stop(worker))

    def _ended(self, worker: Worker, ending: Ending) -> None:
        """Say how it ended. An end with code 0 was asked for."""
        self._worker = None
        why = f": {ending.message.removeprefix(f'{self.name}: ')}" if ending.message else ""
        level = logging.INFO if ending.code == os.EX_OK else logging.ERROR
        log.log(level, "%s: %s %s%s", self.name, worker.name, ending.words, why)
        self._on_event(self.name, "worker", state="ended", pid=worker.pid, how=ending.words)

    @staticmethod
    def _log_unless_said(error: HastError) -> None:
        if not isinstance(error, WorkerEndedError):  # that was said when it ended
            log.error("%s", error)

    async def _keep(self, worker: Worker, role: Role) -> None:
        """Start the worker again when it dies, as long as that makes sense; else the role is init."""
        pause = 0.0
        while True:
            ending = await asyncio.shield(worker.ended)
            self._ended(worker, ending)
            if not ending.temporary:
                log.error("%s: %s cannot go on, the role is init now", self.name, role.text)
                break
            pause = next_pause(pause, worker.uptime)
            started = await self._restart(role, pause, ending.message or f"its worker {ending.words}")
            if started is None:
                break
            worker = started
        self._enter(Role.INIT)

    async def _restart(self, role: Role, pause: float, reason: str) -> Worker | None:
        """A worker that serves, after as many attempts as it takes; None when no attempt can help."""
        while True:
            self._trouble = reason
            if pause > 0:
                log.warning("%s: starting its worker again in %g s", self.name, pause)
            await asyncio.sleep(pause)
            try:
                worker = await self._start_worker(role)
            except HastError as error:
                self._log_unless_said(error)
                if not (isinstance(error, TemporaryError) or getattr(error, "temporary", False)):
                    log.error("%s: %s cannot be started again, the role is init now", self.name, role.text)
                    return None
                pause, reason = next_pause(pause, 0), str(error)
                continue
            self._trouble = ""
            return worker

    # Other settings: see hast/reloader.py.

    def change(self, resource: Resource) -> None:
        """Go on with other settings, none of which needs a new worker."""
        self.resource = resource
        if self._worker is not None:
            self._worker.change(resource)

    async def hold(self) -> None:
        """The role does not change from now on, until go_on(): what other settings mean depends on it."""
        await self._turn.acquire()

    async def make_way(self, resource: Resource) -> None:
        """While held: end the worker if it cannot take these settings over."""
        if action(changed_settings(self.resource, resource), self.role) is Action.RESTART:
            await self._end_worker()

    def go_on(self, resource: Resource) -> None:
        """End of hold(): the same role, these settings. The worker that had to make way gets a successor."""
        self.change(resource)
        if self.role is not Role.INIT and self._worker is None and self._keeper is None:
            self._keeper = asyncio.get_running_loop().create_task(self._start_anew(self.role))
        self._turn.release()

    async def _start_anew(self, role: Role) -> None:
        worker = await self._restart(role, 0.0, "its worker is started with other settings")
        if worker is None:
            self._enter(Role.INIT)
        else:
            await self._keep(worker, role)

    async def retire(self) -> None:
        """The resource is not configured any more: role init, and no other one from now on."""
        self._retired = True
        await self.set_role(Role.INIT)

    # Connections of the primary, while this node is secondary: see hast/peerlistener.py.

    def hand_over(self, message: Message, fds: Sequence[int]) -> None:
        """Give the worker a message with copies of the descriptors `fds`. Raises HastError when there is none."""
        worker = self._worker
        if self.role is not Role.SECONDARY or worker is None or not worker.ready.done():
            raise TemporaryError(f"{self.name}: no secondary worker is running at the moment")
        worker.channel.send(message, fds)

    def disconnect(self) -> None:
        """Have the worker give up its connections; without a worker there are none."""
        with contextlib.suppress(HastError):
            self.hand_over({"cmd": "disconnect"}, ())

    # Status.

    async def status(self) -> StatusEntry:
        """What is known, with what the worker adds within its time to answer."""
        resource, worker = self.resource, self._worker
        entry = StatusEntry(
            resource=resource.name,
            provname=resource.provname,
            localpath=resource.localpath,
            remoteaddr=str(resource.remote) if resource.remote else "none",
            sourceaddr=str(resource.source) if resource.source else None,
            replication=resource.replication,
            checksum=resource.checksum,
            compression=resource.compression,
            role=self.role.text,
            workerpid=worker.pid if worker else 0,
            errmsg=self._trouble or None,
        )
        if worker is None:
            return entry
        answer = await worker.status()
        if answer is None:
            return replace(entry, errmsg=self._trouble or f"its {worker.name} does not answer")
        return replace(entry, **known_elements(answer))


def known_elements(answer: dict[str, Any]) -> dict[str, Any]:
    """The elements of a worker's answer that may go into a reply: known names, values of the right kind."""
    elements: dict[str, Any] = {}
    for name in WORKER_ELEMENTS:
        value = answer.get(name)
        bits = 32 if name in ("extentsize", "keepdirty") else 64
        fits = isinstance(value, str) if name == "status" else isinstance(value, int) and 0 <= value < 1 << bits
        if fits:
            elements[name] = value
    return elements
