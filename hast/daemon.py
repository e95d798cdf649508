"""hastd's main process: what the other parts are put together by.

Invariants:
- Nothing here waits for a disk, a device, a worker, a hook or a client: each has a task and a time limit.
- All resources start in the role init: who is primary is decided by the cluster manager, never here. But what the
  keeper has kept of a hastd that was killed, or is being restarted, goes on as it was (hast/keeper.py).
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
from resource import RLIMIT_NOFILE, getrlimit, setrlimit
from typing import TYPE_CHECKING, Any

from hast import again, control, control_server, reload
from hast.config import Config, Resource
from hast.control import ControlRequest, Role, RoleEntry, RoleReply, StatusEntry, StatusReply
from hast.control_server import ControlServer
from hast.errors import ConfigError, HastError
from hast.hooks import Hooks
from hast.keeping import Keeping
from hast.nv import Nv
from hast.peerlistener import PeerListener
from hast.reloader import Reloader, load
from hast.rundir import RunDirectory
from hast.supervisor import Supervisor
from hast.workers import Workforce

if TYPE_CHECKING:
    from hast.events import Events

log = logging.getLogger(__name__)

SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2}
LAST_TURNS = 5  # of the event loop, until it has called what a signal that has come is to call


class Daemon:
    """One hastd. `prepare()` first, outside of any event loop; then `run()`."""

    def __init__(self, config: Config, foreground: bool, debug: int) -> None:
        self.config = config
        self._rundir = RunDirectory(config.rundir)
        self._control: socket.socket | None = None
        self._stop = asyncio.Event()
        self.restarting = False  # the end is one for another hastd to go on
        self._ended = False  # it is not, or not any more
        self._reload = asyncio.Event()  # asked for
        self._hooks = Hooks()
        self._events: Events | None = None
        self._keeping = Keeping(self._rundir.path)
        self._workforce = Workforce(
            self._rundir, foreground, debug, self._worker_hook, on_device=self._worker_device
        )
        self._supervisors = {name: self._supervisor(resource) for name, resource in config.resources.items()}
        self._peers = PeerListener(self._supervisors)

    def prepare(self) -> None:
        """All that can fail because of the machine or the configuration. Raises HastError."""
        signal.signal(signal.SIGHUP, lambda *_: self._reload.set())  # it may come before there is an event loop
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        reload.check(self.config)
        allow_descriptors()
        self._rundir.open()
        try:
            self._find_kept()
            clean_stale_devices(
                self._rundir, [r.provname for r in self.config.resources.values()], self._keeping.devices()
            )
            self._control = control_server.bind(self.config.control.path)
            self._peers.bind(self.config.listen)
        except BaseException:
            if self._control is not None:
                control_server.unbind(self._control)
            self._rundir.close()
            raise

    def _find_kept(self) -> None:
        """Take over what a hastd that was killed has left with its keeper; let go what cannot be gone on with."""
        try:
            away = self._keeping.find()
        except HastError as error:
            log.error("%s", error)
            return
        if self._keeping.kept:
            log.warning("taking over from a hastd that was gone for %.1f s", away)
        for name, kept in list(self._keeping.kept.items()):
            if name not in self._supervisors or kept.role not in (Role.PRIMARY.text, Role.SECONDARY.text):
                log.error("%s: not going on as %s: it is not configured any more", name, kept.role or "anything")
                self._keeping.forget(name)
            elif kept.role != Role.PRIMARY.text and kept.fd >= 0:
                # It was about to become primary: nobody serves what its worker had made for that.
                self._keeping.release(name)

    async def run(self, started: Callable[[], None]) -> None:
        """Serve until told to end. `started` is called when everything works. Raises HastError before that."""
        assert self._control is not None
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(_log_exception)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end, signal.Signals(number).name)
        loop.add_signal_handler(signal.SIGHUP, self._reload.set)
        restarts: set[asyncio.Task[str]] = set()
        loop.add_signal_handler(signal.SIGUSR2, lambda: restarts.add(loop.create_task(self._restart("SIGUSR2"))))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # see main()
        server = ControlServer(self._control, self._request)
        reloader = Reloader(self.config, self._supervisors, self._supervisor, server, self._peers, self._event)
        reloading: asyncio.Task[None] | None = None
        try:
            starting = loop.create_task(self._workforce.start())
            await asyncio.sleep(0)  # the spawner starts while this process reads what comes next
            from hast.events import Events  # ZeroMQ: only now, and only in this process

            await starting
            self._events = Events(self._rundir.path)
            for name, kept in self._keeping.kept.items():
                self._supervisors[name].resume(Role.from_text(kept.role))
            await server.start()
            self._peers.start()
            started()
            self._keeping.start()
            log.info("hastd started: node %s, %d resources", self.config.node, len(self._supervisors))
            reloading = loop.create_task(reloader.run(self._reload))
            await self._stop.wait()
        finally:
            if reloading is not None:
                reloading.cancel()
                await asyncio.wait({reloading})
            await self._shutdown(server)
        log.info("hastd ended%s", ", a new one begins" if self.restarting else "")

    async def _shutdown(self, server: ControlServer) -> None:
        await server.close()
        await self._peers.close()
        # Who was not told to end has failed to start: the next hastd is to find all that this one has found.
        leave = self.restarting or not self._stop.is_set()
        await asyncio.gather(*(supervisor.close(leave) for supervisor in self._supervisors.values()))
        await self._workforce.close()
        await self._hooks.close()
        if self._events is not None:
            self._events.close()
        # What comes from here on is for the next hastd, if there is to be one: see main(). What has come is heeded.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        for _ in range(LAST_TURNS):
            await asyncio.sleep(0)
        if leave and self._ended:  # told to end after all
            leave = False
            await asyncio.gather(*map(self._keeping.remove, list(self._keeping.kept)))
        await self._keeping.close(leave)
        self._rundir.close()

    def _end(self, why: str) -> None:
        if not self._ended:
            log.info("%s received, ending", why)
        self._ended, self.restarting = True, False
        self._stop.set()

    async def _restart(self, why: str) -> str:
        """Have this process become a new hastd, if that one would start; else the reason why not."""
        try:
            await again.check()
            self._check_rundir(await load(self.config.path))
        except HastError as error:
            log.error("%s: not starting anew: %s", why, error)
            return str(error)
        if self._stop.is_set():
            return "hastd is ending"
        log.info("%s received, starting anew", why)
        self.restarting = True
        self._stop.set()
        return ""

    def _check_rundir(self, config: Config) -> None:
        """Raises ConfigError where a new hastd would not find what this one leaves: the keeper with devices and roles,
        and notes of what disks do not say (hast/boot.py)."""
        if config.rundir != self.config.rundir:
            raise ConfigError(
                f"rundir {self.config.rundir} became {config.rundir}, where nothing is found of what is there:"
                " 'hastctl stop' ends hastd, then a new one can have it"
            )

    # What happens to resources.

    def _supervisor(self, resource: Resource) -> Supervisor:
        return Supervisor(resource, self._workforce, self._role_changed, self._event, self._keeping)

    def _role_changed(self, resource: Resource, old: Role, new: Role) -> None:
        self._peers.forget(resource.name)
        self._hooks.run(resource.exec, ("role", resource.name, old.text, new.text))

    def _worker_hook(self, resource: Resource, args: list[str]) -> None:
        if len(args) < 2 or args[1] != resource.name:
            raise ValueError(f"hook arguments {args}")
        self._hooks.run(resource.exec, args)
        self._event(resource.name, args[0])

    def _worker_device(self, resource: Resource, device: dict[str, Any], fd: int) -> None:
        if fd >= 0:
            self._keeping.device(resource.name, device, fd)
        else:
            self._keeping.release(resource.name)

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
            role, force = request.role, request.force
            roles = await asyncio.gather(*(self._set_role(name, role, force) for name in self._names(request)))
            return RoleReply(tuple(roles)).to_nv()
        if request.cmd == control.CMD_DISCARD:
            entries = await asyncio.gather(*map(self._discard, request.resources))
            return RoleReply(tuple(entries)).to_nv()
        if request.cmd == control.CMD_STOP:
            self._end("hastctl stop")
            return control.error_reply(control.ERROR_NONE)
        if request.cmd == control.CMD_RESTART:
            why = await self._restart("hastctl restart")
            return control.error_reply(os.EX_TEMPFAIL if why else control.ERROR_NONE, why)
        return control.error_reply(control.ERROR_UNIMPLEMENTED)

    def _names(self, request: ControlRequest) -> tuple[str, ...]:
        return tuple(self._supervisors) if request.resources == (control.ALL,) else request.resources

    async def _status(self, name: str) -> StatusEntry:
        supervisor = self._supervisors.get(name)
        if supervisor is None:
            return StatusEntry(name, control.ERROR_NO_ENTRY)
        return await supervisor.status()

    async def _set_role(self, name: str, role: Role, force: bool) -> RoleEntry:
        supervisor = self._supervisors.get(name)
        return await supervisor.set_role(role, force) if supervisor is not None else self._unknown(name)

    async def _discard(self, name: str) -> RoleEntry:
        supervisor = self._supervisors.get(name)
        return await supervisor.discard() if supervisor is not None else self._unknown(name)

    def _unknown(self, name: str) -> RoleEntry:
        return RoleEntry(name, control.ERROR_NO_ENTRY, errmsg=f"{name}: {self.config.path} has no such resource")


def allow_descriptors() -> None:
    """As many as the system allows: for this process, and so for all that it starts. The soft limit is often one that
    suits select(), and each client of a resource takes a descriptor."""
    soft, hard = getrlimit(RLIMIT_NOFILE)
    try:
        setrlimit(RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as error:
        log.warning("only %d descriptors, not %d: the limit cannot be raised: %s", soft, hard, error)


def clean_stale_devices(rundir: RunDirectory, provnames: list[str], kept: set[str]) -> None:
    """Remove mounts, loop devices and links in /dev/hast that a killed hastd left, but for the devices of the resources
    `kept`."""
    from hast.device.fuse import cleanup_stale

    try:
        for name in cleanup_stale(rundir.path, provnames, kept=kept):
            log.error("%s: its device is still served by a process of the last hastd: end that process", name)
    except HastError as error:
        log.error("%s", error)


def _log_exception(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What no task has caught: a defect, or a system that is out of something."""
    log.error("unexpected error: %s", context.get("message", ""), exc_info=context.get("exception"))


def main(config: Config, foreground: bool, debug: int, started: Callable[[], None]) -> bool:
    """Be hastd's main process until told to end; whether it is to be started anew (hast/again.py). Raises HastError for
    what stops it at start. Signals that come from its end on wait for that one."""
    daemon = Daemon(config, foreground, debug)
    daemon.prepare()
    asyncio.run(daemon.run(started))
    return daemon.restarting
