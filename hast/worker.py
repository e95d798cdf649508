"""The worker: the process that owns one resource in one role.

It is forked by the spawner with a channel to hastd's main process, and ends when main says so or is gone. What is
done in a role is in hast/primary.py and hast/secondary.py; here is what all roles share: the event loop, main's
commands, the exit code.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hast.channel import Channel, ChannelClosedError, close_all
from hast.config import Resource
from hast.errors import MAY_PASS, HastError, TemporaryError
from hast.link import EndedError
from hast.primary import Primary
from hast.secondary import Secondary
from hast.spawner import resource_from_dict

log = logging.getLogger(__name__)


class Worker:
    """Runs the resource until it is told to stop. Messages: see hast/daemon.py."""

    def __init__(self, channel: Channel, resource: Resource, role: str, rundir: Path) -> None:
        self.channel = channel
        self.resource = resource
        self.role = role
        self.stop = asyncio.Event()
        self.leave = False  # at the end: another worker goes on with the block device
        self.abandoned = False  # main is gone
        self.orders: asyncio.Future[tuple[dict[str, Any], list[int]]] = asyncio.get_running_loop().create_future()
        self.started = asyncio.Event()
        self.reloads: set[asyncio.Task[None]] = set()
        self.part: Primary | Secondary = (
            Secondary(resource, rundir, self.tell)
            if role == "secondary"
            else Primary(resource, rundir, self.tell, self.stop)
        )

    def tell(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        """Send to main; when main is gone, the worker stops as well."""
        try:
            self.channel.send(message, fds)
        except ChannelClosedError:
            self.abandon()
        except HastError as error:
            log.error("%s: hastd does not take this worker's messages: %s", self.resource.name, error)

    def abandon(self) -> None:
        """Main is gone: end at once. What clients have asked for and have no answer to, they ask the next worker."""
        self.leave = self.abandoned = True
        self.stop.set()

    async def run(self) -> int:
        """The worker's life; its exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop.set)
        listening = asyncio.create_task(self.listen())
        try:
            stop = asyncio.ensure_future(self.stop.wait())
            either: set[asyncio.Future[Any]] = {self.orders, stop}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            stop.cancel()
            if not self.orders.done():
                return os.EX_OK
            try:
                await self.part.start(*self.orders.result())
            except EndedError:
                return os.EX_OK
            except HastError as error:
                return self.fail(error)
            except Exception as error:  # a mistake of ours, or a shortage: another worker may not meet it
                log.exception("%s: unexpected error", self.resource.name)
                return self.fail(TemporaryError(f"{self.resource.name}: unexpected error: {error!r}"))
            self.started.set()
            self.tell(self.part.ready_message())
            return await self.until_stopped()
        finally:
            listening.cancel()
            await self.stop_reloads()
            await self.part.shutdown(self.leave, self.abandoned)
            # A signal that comes while the event loop is being closed is complained about.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})

    def fail(self, error: HastError) -> int:
        """The resource cannot be served; the exit code. When that may pass, the block device waits for it."""
        self.tell({"event": "failed", "message": str(error), "exit_code": error.exit_code})
        had = self.started.is_set() or bool(self.orders.result()[0].get("again"))
        self.leave = self.leave or error.exit_code == os.EX_TEMPFAIL or (had and error.exit_code in MAY_PASS)
        return error.exit_code

    async def until_stopped(self) -> int:
        """Wait for the end: wanted (0), or because the resource cannot be served any more."""
        stop = asyncio.create_task(self.stop.wait())
        failed = self.part.failed
        waited: set[asyncio.Future[Any]] = {stop, failed}
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if not failed.done():
            return os.EX_OK
        error = failed.result()
        log.error("%s", error)
        return self.fail(error)

    async def listen(self) -> None:
        """Main's commands. End of file: main is gone, and so is whoever could ask for this resource."""
        while not self.stop.is_set():
            try:
                received = await self.channel.arecv()
            except ChannelClosedError:
                self.abandon()
                return
            except HastError as error:
                log.error("%s", error)
                continue
            if received is None:
                self.abandon()
                return
            self.command(*received)

    def command(self, message: dict[str, Any], fds: list[int]) -> None:
        """One command of main."""
        if message.get("cmd") == "start" and not self.orders.done():
            self.orders.set_result((message, fds))
            return
        if message.get("cmd") == "connection" and isinstance(self.part, Secondary):
            self.part.connection(message, fds)
            return
        if message.get("cmd") == "notice" and isinstance(self.part, Secondary):
            self.part.notice(message, fds)
            return
        close_all(fds)
        if message.get("cmd") == "disconnect" and isinstance(self.part, Secondary):
            self.part.lose("its primary connects anew")
            return
        if message.get("cmd") == "status":
            self.tell({"event": "status", "id": message.get("id"), "status": self.part.status()})
        elif message.get("cmd") == "discard" and isinstance(self.part, Secondary):
            self.tell({"event": "status", "id": message.get("id"), "status": self.part.discard()})
        elif message.get("cmd") == "stop":
            self.leave = bool(message.get("leave"))
            self.stop.set()
        elif message.get("cmd") == "reload":
            task = asyncio.create_task(self.reload(resource_from_dict(message["resource"])))
            self.reloads.add(task)
            task.add_done_callback(self.reloads.discard)
        else:
            log.error("%s: hastd sent a command that its worker does not know: %s", self.resource.name, message)

    async def reload(self, resource: Resource) -> None:
        """Other settings, once the start is over. What cannot take them over is started anew, with them."""
        await self.started.wait()
        self.resource = resource
        try:
            await self.part.reload(resource)
        except Exception as error:
            if not self.part.failed.done():
                text = f"{resource.name}: its new settings cannot be taken over, starting its worker anew: {error!r}"
                self.part.failed.set_result(TemporaryError(text))

    async def stop_reloads(self) -> None:
        """Nothing changes any more: the end has begun."""
        reloads = set(self.reloads)
        for task in reloads:
            task.cancel()
        if reloads:
            await asyncio.wait(reloads)


async def _run(channel: Channel, resource: Resource, role: str, rundir: Path) -> int:
    return await Worker(channel, resource, role, rundir).run()


def run(channel: Channel, resource: Resource, role: str, rundir: Path) -> int:
    """Serve `resource` as `role` until told to stop; the exit code (sysexits). Called in the worker's own process."""
    return asyncio.run(_run(channel, resource, role, rundir))
