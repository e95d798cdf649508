"""hastd's main process: what the other parts are put together by.

Invariants:
- Nothing here waits for a disk, a device, a worker, a hook or a client: each has a task and a time limit.
- All resources start in the role init: who is primary is decided by the cluster manager, never here.
- What was made at start is removed at the end: sockets, pidfile, processes. What a kill leaves, the next start
  removes, and it does so only after every process of the killed one is gone.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hast import control, control_server, reload
from hast.config import Config, Resource
from hast.control import ControlRequest, Role, RoleEntry, RoleReply, StatusEntry, StatusReply
from hast.control_server import ControlServer
from hast.errors import HastError
from hast.hooks import Hooks
from hast.nv import Nv
from hast.peerlistener import PeerListener
from hast.reloader import Reloader
from hast.rundir import RunDirectory
from hast.supervisor import Supervisor
from hast.workers import Workforce

if TYPE_CHECKING:
    from hast.events import Events

log = logging.getLogger(__name__)


class Daemon:
    """One hastd. `prepare()` first, outside of any event loop; then `run()`."""

    def __init__(self, config: Config, foreground: bool, debug: int) -> None:
        self.config = config
        self._rundir = RunDirectory(config.rundir)
        self._control: socket.socket | None = None
        self._stop = asyncio.Event()
        self._reload = asyncio.Event()  # asked for
        self._hooks = Hooks()
        self._events: Events | None = None
        self._workforce = Workforce(self._rundir, foreground, debug, self._worker_hook)
        self._supervisors = {name: self._supervisor(resource) for name, resource in config.resources.items()}
        self._peers = PeerListener(self._supervisors)

    def prepare(self) -> None:
        """All that can fail because of the machine or the configuration. Raises HastError."""
        signal.signal(signal.SIGHUP, lambda *_: self._reload.set())  # it may come before there is an event loop
        reload.check(self.config)
        self._rundir.open()
        try:
            clean_stale_devices(self._rundir, [r.provname for r in self.config.resources.values()])
            self._control = control_server.bind(self.config.control.path)
            self._peers.bind(self.config.listen)
        except BaseException:
            if self._control is not None:
                control_server.unbind(self._control)
            self._rundir.close()
            raise

    async def run(self, started: Callable[[], None]) -> None:
        """Serve until told to end. `started` is called when everything works. Raises HastError before that."""
        from hast.events import Events  # ZeroMQ: only now, and only in this process

        assert self._control is not None
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(_log_exception)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end, signal.Signals(number).name)
        loop.add_signal_handler(signal.SIGHUP, self._reload.set)
        server = ControlServer(self._control, self._request)
        reloader = Reloader(self.config, self._supervisors, self._supervisor, server, self._peers, self._event)
        reloading: asyncio.Task[None] | None = None
        try:
            await self._workforce.start()
            self._events = Events(self._rundir.path)
            await server.start()
            self._peers.start()
            started()
            log.info("hastd started: node %s, %d resources", self.config.node, len(self._supervisors))
            reloading = loop.create_task(reloader.run(self._reload))
            await self._stop.wait()
        finally:
            if reloading is not None:
                reloading.cancel()
                await asyncio.wait({reloading})
            await self._shutdown(server)
        log.info("hastd ended")

    async def _shutdown(self, server: ControlServer) -> None:
        await server.close()
        await self._peers.close()
        await asyncio.gather(*(supervisor.close() for supervisor in self._supervisors.values()))
        await self._workforce.close()
        await self._hooks.close()
        if self._events is not None:
            self._events.close()
        self._rundir.close()

    def _end(self, why: str) -> None:
        if not self._stop.is_set():
            log.info("%s received, ending", why)
            self._stop.set()

    # What happens to resources.

    def _supervisor(self, resource: Resource) -> Supervisor:
        return Supervisor(resource, self._workforce, self._role_changed, self._event)

    def _role_changed(self, resource: Resource, old: Role, new: Role) -> None:
        self._peers.forget(resource.name)
        self._hooks.run(resource.exec, ("role", resource.name, old.text, new.text))

    def _worker_hook(self, resource: Resource, args: list[str]) -> None:
        if len(args) < 2 or args[1] != resource.name:
            raise ValueError(f"hook arguments {args}")
        self._hooks.run(resource.exec, args)
        self._event(resource.name, args[0])

    def _event(self, resource: str, event: str, **details: Any) -> None:
        if self._events is not None:
            self._events.publish(resource, event, **details)

    # Requests of hastctl.

    async def _request(self, request: ControlRequest) -> Nv:
        """Carry out one request; the reply."""
        log.debug("hastctl: command %d for %s", request.cmd, " ".join(request.resources) or "hastd")
        if request.cmd == control.CMD_STATUS:
            statuses = await asyncio.gather(*map(self._status, self._names(request)))
            return StatusReply(tuple(statuses)).to_nv()
        if request.cmd == control.CMD_SET_ROLE and request.role is not None:
            role = request.role
            roles = await asyncio.gather(*(self._set_role(name, role) for name in self._names(request)))
            return RoleReply(tuple(roles)).to_nv()
        if request.cmd == control.CMD_STOP:
            self._end("hastctl stop")
            return control.error_reply(control.ERROR_NONE)
        return control.error_reply(control.ERROR_UNIMPLEMENTED)

    def _names(self, request: ControlRequest) -> tuple[str, ...]:
        return tuple(self._supervisors) if request.resources == (control.ALL,) else request.resources

    async def _status(self, name: str) -> StatusEntry:
        supervisor = self._supervisors.get(name)
        if supervisor is None:
            return StatusEntry(name, control.ERROR_NO_ENTRY)
        return await supervisor.status()

    async def _set_role(self, name: str, role: Role) -> RoleEntry:
        supervisor = self._supervisors.get(name)
        if supervisor is None:
            return RoleEntry(name, control.ERROR_NO_ENTRY, errmsg=f"{name}: {self.config.path} has no such resource")
        return await supervisor.set_role(role)


def clean_stale_devices(rundir: RunDirectory, provnames: list[str]) -> None:
    """Remove mounts, loop devices and links in /dev/hast that a killed hastd left."""
    from hast.device.fuse import cleanup_stale

    try:
        for name in cleanup_stale(rundir.path, provnames):
            log.error("%s: its device is still served by a process of the last hastd: end that process", name)
    except HastError as error:
        log.error("%s", error)


def _log_exception(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What no task has caught: a defect, or a system that is out of something."""
    log.error("unexpected error: %s", context.get("message", ""), exc_info=context.get("exception"))


def main(config: Config, foreground: bool, debug: int, started: Callable[[], None]) -> int:
    """Be hastd's main process until told to end; its exit code. Raises HastError for what stops it at start."""
    daemon = Daemon(config, foreground, debug)
    daemon.prepare()
    asyncio.run(daemon.run(started))
    return os.EX_OK
