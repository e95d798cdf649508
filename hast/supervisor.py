"""One resource as main sees it: its role, and the worker that makes it so.

Invariants:
- Role changes of a resource happen one at a time; a resource has at most one worker.
- The role is what is true, not what is wished for: it changes when a worker says that it serves, and falls
  back to init when a worker cannot go on. Every change of it runs the hook and is a live event. Who fails to change
  between primary and secondary for a reason that may pass is secondary, and is told so by an error; so is who was in no
  role, and could not become secondary because the component is in use.
- A worker that was serving and was killed, or ended for a reason that may pass, is started again, at
  intervals that grow; the role stays. A primary whose disk, or system, refuses what it did before has `timeout` for
  that, because clients wait; a secondary has all the time. Every end of a worker is logged in words.
- Other settings leave the role alone. A worker has those of `resource`, or is about to.
- A block device that a worker left is given to the next one; it is let go with the role (hast/keeping.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from hast import boot
from hast.amend import amend
from hast.channel import Message
from hast.config import Resource
from hast.control import ERROR_NO_ENTRY, STATUS_ELEMENTS, Role, RoleEntry, StatusEntry
from hast.errors import MAY_PASS, HastError, TemporaryError, UnavailableError
from hast.keeping import Keeping
from hast.promotion import target_text
from hast.reload import Action, action, changed_settings
from hast.workers import Ending, Worker, Workforce

log = logging.getLogger(__name__)

READY_SECONDS = 30.0  # for a worker to serve; a primary may wait `timeout` for the other node, beside that
FIRST_PAUSE = 0.1  # seconds before a worker that died is started again; doubled each time
LONGEST_PAUSE = 10.0
SETTLED_SECONDS = 5.0  # a worker that has run so long has nothing to do with the last death

# What a worker may say about itself; the rest main knows better.
WORKER_ELEMENTS = STATUS_ELEMENTS[STATUS_ELEMENTS.index("status") :]

OnEvent = Callable[..., None]


class WorkerEndedError(HastError):
    """A worker ended before it served. `exit_code` is its own, or that of a TemporaryError if a signal has ended it."""

    def __init__(self, resource: str, role: Role, ending: Ending) -> None:
        reason = ending.message or f"{resource}: its {role.text} worker {ending.words} while it was starting"
        super().__init__(reason)
        self.exit_code = os.EX_TEMPFAIL if ending.code is None else ending.code or os.EX_SOFTWARE


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
        keeping: Keeping,
    ) -> None:
        self.resource = resource
        self.role = Role.INIT
        self._workforce = workforce
        self._on_role = on_role
        self._on_event = on_event
        self._keeping = keeping
        # hastd was gone while this resource had its role; done when a worker serves it again, or none can.
        self._resumed: asyncio.Future[None] | None = None
        self._worker: Worker | None = None
        self._keeper: asyncio.Task[None] | None = None  # watches a worker that has served
        self._change: asyncio.Task[RoleEntry] | None = None
        self._turn = asyncio.Lock()
        self._retired = False
        self._trouble = ""  # why there is no worker: there should be one, or there cannot

    @property
    def name(self) -> str:
        return self.resource.name

    @property
    def _ready_seconds(self) -> float:
        return READY_SECONDS + self.resource.timeout

    # Roles.

    async def set_role(self, role: Role, force: bool = False) -> RoleEntry:
        """Take a role; returns when it is in force or has failed, after _ready_seconds and a stop at most.

        force: become primary also as the target of a synchronisation that is not complete (hast/promotion.py).
        """
        async with self._turn:
            # A task of its own: it goes on when the one who asked does not wait for it.
            self._change = asyncio.get_running_loop().create_task(self._set_role(role, force))
            try:
                return await asyncio.shield(self._change)
            finally:
                if self._change.done():
                    self._change = None

    async def _set_role(self, role: Role, force: bool) -> RoleEntry:
        if role is self.role and self._resumed is not None:
            await asyncio.wait({self._resumed}, timeout=self._ready_seconds)
        previous = self.role
        force = force and role is Role.PRIMARY
        if self._retired and role is not Role.INIT:
            text = f"{self.name}: it was removed from the configuration"
            return RoleEntry(self.name, ERROR_NO_ENTRY, errmsg=text)
        asks = role is Role.PRIMARY and (force or previous is Role.SECONDARY)
        syncing = asks and await self._is_target()
        if role is previous and not (force and syncing):
            if role is Role.INIT:
                self._trouble = ""
            return RoleEntry(self.name, role=previous.text)
        if syncing and previous is Role.SECONDARY and not force:  # it goes on being one, and synchronising
            text = target_text(self.name)
            log.error("%s", text)
            return RoleEntry(self.name, UnavailableError.exit_code, errmsg=text)
        await self._end_worker()
        if role is Role.SECONDARY and previous is Role.PRIMARY:
            # It has served for the last time. Should hastd not live to see it secondary, the next one is to know that.
            self._keeping.role(self.name, role.text)
        try:
            if force:
                await self._force()
            if role is not Role.INIT:
                worker = await self._start_worker(role)
                self._keeper = asyncio.get_running_loop().create_task(self._keep(worker, role))
        except HastError as error:
            self._log_unless_said(error)
            await self._fall_back(role, previous, error)
            return RoleEntry(self.name, error.exit_code, errmsg=str(error))
        self._enter(role)
        return RoleEntry(self.name, role=previous.text)

    async def _fall_back(self, wished: Role, previous: Role, error: HastError) -> None:
        """A role could not be taken. Who was secondary goes on being it, and who was primary and is not to be it any
        more is secondary, as soon as its disk lets it: the other node is without a second copy until then, and who has
        asked may not ask again. So is who was nothing and is to be it, if its component is only in use: by the disk
        stage of a hastd that is gone, for one. Else, or where no attempt can help, the role is init."""
        # A target's worker may not have said so in its time to answer, or there was none.
        may_pass = str(error) == target_text(self.name) or self._may_pass(error, Role.SECONDARY, 0)
        if previous is Role.INIT:
            may_pass = wished is Role.SECONDARY and _is_temporary(error)
        if not may_pass or wished in (Role.INIT, previous):
            await self._give_up(str(error))
            return
        await self._keeping.remove(self.name)
        self._enter(Role.SECONDARY)
        self._keeper = asyncio.get_running_loop().create_task(self._start_anew(Role.SECONDARY, str(error)))

    async def _is_target(self) -> bool:
        """Whether the worker that there is says so."""
        answer = await self._worker.status() if self._worker is not None else None
        return answer is not None and bool(answer.get("syncing"))

    async def _force(self) -> None:
        """Give up what the other node has and this one lacks, before there is a worker. Raises HastError."""
        rundir = self._keeping.rundir
        lost = boot.lost(rundir, self.name)
        try:
            changed = await amend(self.resource, rundir, "force, lost" if lost else "force")
        except HastError:
            log.warning("%s: that it is forced to be primary may have been stored all the same", self.name)
            raise
        boot.forget(boot.outdated_note(rundir, self.name))
        if lost:
            boot.forget(boot.note(rundir, self.name))
        if changed:
            log.warning(
                "%s: becomes primary by force with data that is a mix of old and new: the newer data of the other node"
                " is given up, and at the next contact both find a split-brain, or that they have nothing in common",
                self.name,
            )

    async def discard(self) -> RoleEntry:
        """Have this node's own changes thrown away when a split-brain is found next."""
        async with self._turn:
            try:
                await self._discard()
            except HastError as error:
                return RoleEntry(self.name, error.exit_code, errmsg=str(error))
        return RoleEntry(self.name, role=self.role.text)

    async def _discard(self) -> None:
        if self.role is Role.PRIMARY:
            raise UnavailableError(
                f"{self.name}: its role is primary, so its changes are in use: run 'hastctl role secondary"
                f" {self.name}' before, or discard those of the other node"
            )
        if self.role is Role.INIT:
            await amend(self.resource, self._keeping.rundir, "discard")
            return
        answer = await self._worker.ask("discard") if self._worker is not None else None
        if answer is None:
            raise TemporaryError(f"{self.name}: its secondary worker does not answer: try again")
        if "error" in answer:
            error = HastError(str(answer["error"]))
            error.exit_code = int(answer.get("code", os.EX_SOFTWARE))
            raise error

    def _enter(self, role: Role) -> None:
        """The role is now this one."""
        old, self.role, self._trouble = self.role, role, ""
        self._keeping.role(self.name, role.text)
        self._end_resuming()
        if role is not old:
            log.info("%s: role changed from %s to %s", self.name, old.text, role.text)
            self._on_role(self.resource, old, role)
            self._on_event(self.name, "role", old=old.text, new=role.text)

    def resume(self, role: Role) -> None:
        """The resource has had this role all the time while hastd was gone: go on with it. No hook is run for that."""
        self.role = role
        self._resumed = asyncio.get_running_loop().create_future()
        log.info("%s: going on as %s", self.name, role.text)
        self._keeper = asyncio.get_running_loop().create_task(self._start_anew(role, "hastd was started anew"))

    @property
    def _resuming(self) -> bool:
        return self._resumed is not None and not self._resumed.done()

    def _end_resuming(self) -> None:
        if self._resumed is not None and not self._resumed.done():
            self._resumed.set_result(None)

    async def close(self, leave: bool = False) -> None:
        """End the worker and whatever is under way; the role is init afterwards, without a hook. leave: its block
        device stays for the next hastd."""
        if self._change is not None:
            self._change.cancel()
            await asyncio.wait({self._change})
        await self._end_worker(leave)
        self.role = Role.INIT

    # The worker.

    async def _start_worker(self, role: Role, again: bool = False) -> Worker:
        """A new worker that serves; again: the role is not new. Raises HastError; no worker is left then."""
        await self._workforce.wait_ready()
        kept = self._keeping.kept.get(self.name)
        channel = [kept.fd] if kept is not None and kept.fd >= 0 and role is Role.PRIMARY else []
        device = kept.device if kept is not None and channel else None
        served = kept.served if kept is not None and again else None
        orders = {"resume": self._resuming, "again": again, "device": device, "served": served}
        worker = self._worker = self._workforce.spawn(self.resource, role.text, orders, channel)
        either: list[asyncio.Future[Any]] = [worker.ready, worker.ended]
        seconds = self._ready_seconds
        await asyncio.wait(either, timeout=seconds, return_when="FIRST_COMPLETED")
        if worker.ready.done():
            self._end_resuming()
            if role is Role.PRIMARY:
                self._keeping.serves(self.name, worker.ready.result().get("served"))
            details = {key: worker.ready.result().get(key) for key in ("device", "nbd")}
            paths = " and ".join(str(path) for path in details.values() if path)
            log.info("%s: %s serves %s", self.name, worker.name, paths or "the resource")
            self._on_event(self.name, "worker", state="ready", pid=worker.pid, **details)
            return worker
        in_time = worker.ended.done()
        ending = await self._workforce.stop(worker, leave=bool(channel))
        self._ended(worker, ending)
        if not in_time:
            raise TemporaryError(
                f"{self.name}: its {role.text} worker was not ready within {seconds:g} s and was stopped"
            )
        raise WorkerEndedError(self.name, role, ending)

    async def _end_worker(self, leave: bool = False) -> None:
        """No worker runs afterwards, and none will be started by itself. leave: the block device stays as it is."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait({self._keeper})
            self._keeper = None
        if self._worker is not None:
            worker = self._worker
            self._ended(worker, await self._workforce.stop(worker, leave))
        if not leave:
            await self._keeping.remove(self.name)
            self._end_resuming()

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
            reason = ending.message or f"its worker {ending.words}"
            if not ending.temporary and ending.code not in MAY_PASS:
                log.error("%s: %s cannot go on, the role is init now", self.name, role.text)
                await self._give_up(reason)
                return
            pause = next_pause(pause, worker.uptime)
            started = await self._restart(role, pause, reason)
            if started is None:
                return
            worker = started

    async def _restart(self, role: Role, pause: float, reason: str) -> Worker | None:
        """A worker that serves, after as many attempts as it takes; None when no attempt can help: the role is init
        then."""
        began = asyncio.get_running_loop().time()
        while True:
            self._trouble = reason
            if pause > 0:
                log.warning("%s: starting its worker again in %g s", self.name, pause)
            await asyncio.sleep(pause)
            try:
                worker = await self._start_worker(role, again=True)
            except HastError as error:
                self._log_unless_said(error)
                if not self._may_pass(error, role, asyncio.get_running_loop().time() - began):
                    log.error("%s: %s cannot be started again, the role is init now", self.name, role.text)
                    await self._give_up(str(error))
                    return None
                pause, reason = next_pause(pause, 0), str(error)
                continue
            self._trouble = ""
            return worker

    def _may_pass(self, error: HastError, role: Role, seconds: float) -> bool:
        """Whether another attempt may help, after attempts for so many seconds."""
        if _is_temporary(error):
            return True
        return error.exit_code in MAY_PASS and (role is Role.SECONDARY or seconds < self.resource.timeout)

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
            reason = "its worker is started with other settings"
            self._keeper = asyncio.get_running_loop().create_task(self._start_anew(self.role, reason))
        self._turn.release()

    async def _start_anew(self, role: Role, reason: str) -> None:
        worker = await self._restart(role, 0.0, reason)
        if worker is not None:
            await self._keep(worker, role)

    async def _give_up(self, reason: str) -> None:
        """No worker can serve the resource."""
        await self._keeping.remove(self.name)
        self._enter(Role.INIT)
        self._trouble = reason

    async def retire(self) -> None:
        """The resource is not configured any more: role init, and no other one from now on."""
        self._retired = True
        await self.set_role(Role.INIT)

    # Connections of the primary, while this node is secondary: see hast/peerlistener.py.

    def hand_over(self, message: Message, fds: Sequence[int]) -> None:
        """Give the worker a message with copies of the descriptors `fds`. Raises HastError when there is none."""
        worker = self._worker
        # The role may be about to change: then the worker is that of the next one.
        wanted = self.role is Role.SECONDARY and worker is not None and worker.role == Role.SECONDARY.text
        if worker is None or not wanted or not worker.ready.done():
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


def _is_temporary(error: HastError) -> bool:
    """A TemporaryError, or what a process has said of one, or a worker's end that a signal has brought about."""
    return error.exit_code == os.EX_TEMPFAIL


def known_elements(answer: dict[str, Any]) -> dict[str, Any]:
    """The elements of a worker's answer that may go into a reply: known names, values of the right kind."""
    elements: dict[str, Any] = {}
    for name in WORKER_ELEMENTS:
        value = answer.get(name)
        bits = {"extentsize": 32, "keepdirty": 32, "syncing": 8}.get(name, 64)
        fits = isinstance(value, str) if name == "status" else isinstance(value, int) and 0 <= value < 1 << bits
        if fits:
            elements[name] = value
    return elements
