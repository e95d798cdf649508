"""Reading the configuration again while hastd runs (SIGHUP): what hast/reload.py decides is carried out here.

Invariants:
- What can fail comes first: the file is read and understood, new sockets are open, before anything is changed. When it
  fails nothing is changed, and one line says why.
- One reload at a time; being asked during one means another one after it, however often that was.
- Resources that the change does not concern are not touched. All workers that have to be started anew end before the
  first one starts: so two resources may swap their disks or their names.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable

from hast import config, control_server, reload
from hast.config import Config, Resource
from hast.control import Role
from hast.control_server import ControlServer
from hast.errors import ConfigError, HastError
from hast.peerlistener import PeerListener
from hast.reload import Action, Change, Plan
from hast.supervisor import Supervisor

log = logging.getLogger(__name__)

LOAD_SECONDS = 10.0  # for the file to be read: it may be on a file system whose server is gone


class Reloader:
    """`config` is what is in force. `supervisors` are changed in place; `make` makes one. `event` publishes a live
    event: resource, "" for hastd itself, name, details."""

    def __init__(
        self,
        config: Config,
        supervisors: dict[str, Supervisor],
        make: Callable[[Resource], Supervisor],
        server: ControlServer,
        peers: PeerListener,
        event: Callable[..., None],
    ) -> None:
        self.config = config
        self._supervisors = supervisors
        self._make = make
        self._server = server
        self._peers = peers
        self._event = event

    async def run(self, asked: asyncio.Event) -> None:
        """Reload each time that `asked` is set."""
        while True:
            await asked.wait()
            asked.clear()
            try:
                await self.reload()
            except HastError as error:
                log.error("configuration not read again, nothing has changed: %s", error)
                self._event("", "reload", error=str(error))
            except Exception as error:
                log.exception("configuration read again, but an unexpected error came up")
                self._event("", "reload", error=repr(error))

    async def reload(self) -> None:
        """Have in force what the file says now. Raises HastError, and all is as before then."""
        log.info("reading %s again", self.config.path)
        new = await load(self.config.path)
        reload.check_change(self.config, new)
        plan = reload.plan(self.config, new)
        await self._listen(plan)
        await self._resources(plan)
        kept = plan.kept_text(self.config)
        self.config = plan.apply(self.config)
        if kept:
            log.warning("%s", kept)
        log.info("configuration read again: %s", plan)
        self._tell(plan)

    async def _listen(self, plan: Plan) -> None:
        """Move hastd's own sockets. Raises HastError; none has moved then."""
        moved = control_server.bind(plan.new.control.path) if "control" in plan.globals else None
        try:
            if "listen" in plan.globals:
                await self._peers.relisten(plan.new.listen)
        except BaseException:
            if moved is not None:
                control_server.unbind(moved)
            raise
        if moved is not None:
            await self._server.move(moved)

    async def _resources(self, plan: Plan) -> None:
        """Remove, change, add: in this order, so that what one resource gives up another one may have."""
        waiting = [change for change in plan.changed if reload.action(change.settings, Role.PRIMARY) is Action.RESTART]
        for change in plan.changed:
            self._peers.forget(change.new.name)  # it was agreed on with the old settings
            if change not in waiting:
                self._supervisors[change.new.name].change(change.new)
        await asyncio.gather(*(self._supervisors[name].retire() for name in plan.removed))
        await self._restart(waiting)
        for resource in plan.added:
            self._supervisors[resource.name] = self._make(resource)
        ordered = {name: self._supervisors[name] for name in plan.new.resources}
        self._supervisors.clear()
        self._supervisors.update(ordered)

    async def _restart(self, changes: list[Change]) -> None:
        """Changes that need a new worker where there is one."""
        pairs = [(self._supervisors[change.new.name], change.new) for change in changes]
        await asyncio.gather(*(supervisor.hold() for supervisor, _ in pairs))
        try:
            await asyncio.gather(*(supervisor.make_way(resource) for supervisor, resource in pairs))
        finally:
            for supervisor, resource in pairs:
                supervisor.go_on(resource)

    def _tell(self, plan: Plan) -> None:
        """Live events: one for each resource that is concerned, one for all."""
        for name in plan.removed:
            self._event(name, "reload", what="removed")
        for change in plan.changed:
            self._event(change.new.name, "reload", what="changed", settings=reload.words(change.settings))
        for resource in plan.added:
            self._event(resource.name, "reload", what="added")
        self._event("", "reload", done=str(plan))


async def load(path: str) -> Config:
    """config.load() that holds up nobody, not even hastd's end. Raises ConfigError, also when it takes too long."""
    loop = asyncio.get_running_loop()
    loaded: asyncio.Future[Config] = loop.create_future()

    def take(result: Config | Exception) -> None:
        if loaded.done():
            return
        if isinstance(result, Exception):
            loaded.set_exception(result)
        else:
            loaded.set_result(result)

    def read() -> None:
        result: Config | Exception
        try:
            result = config.load(path)
        except Exception as error:
            result = error
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(take, result)

    threading.Thread(target=read, name="reading the configuration", daemon=True).start()
    try:
        async with asyncio.timeout(LOAD_SECONDS):
            return await loaded
    except TimeoutError:
        raise ConfigError(f"cannot read configuration '{path}': it took more than {LOAD_SECONDS:g} s") from None
