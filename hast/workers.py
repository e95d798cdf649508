"""Workers as main sees them, and the spawner that forks them. What to do with them is decided in supervisor.py.

    main -> worker   {"cmd": "start", "resume": bool, "again": bool, "device": {} or null, "served": {} or null}, the
                     first one, + the FUSE channel of the block device that is there already, if there is one; resume:
                     hastd was gone meanwhile; again: another worker had this role before; served: what that one served
                     {"cmd": "status", "id"}; {"cmd": "stop", "leave": bool}: leave the block device as it is, another
                     worker takes it; of the peer: see peerlistener.py
                     {"cmd": "discard", "id"}: see promotion.discarding(); answered as "status", {} or {"error", "code"}
                     {"cmd": "reload", "resource"}: other settings, those that need no new worker
    worker -> main   {"event": "ready", "device": path or null, "nbd": path, "served": {}, of a primary}
                     {"event": "failed", "message", "exit_code"}: why it is about to end
                     {"event": "status", "id", "status": {fields of control.StatusEntry}}
                     {"event": "hook", "args": [event, resource, ...]}
                     {"event": "device", "device": {...}} + its FUSE channel: there is a block device, which is not to
                     go when the worker does; {"event": "released"}: it is gone

Invariants:
- `Worker.ended` becomes done exactly once, after the process is gone and its last message was read.
- A worker that does not do as it is told costs time, bounded by the seconds below, and never anything else.
- When the spawner dies its workers die with it; both are seen, and a new spawner is started. One that hangs is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hast import spawner
from hast.channel import Channel, ChannelClosedError, DescriptorsLostError, Message, close_all
from hast.config import Resource
from hast.errors import HastError, ProtocolError, TemporaryError
from hast.rundir import RunDirectory
from hast.stages.launch import ended as ending_in_words
from hast.stages.launch import in_kernels_hands

log = logging.getLogger(__name__)

UP_SECONDS = 30.0  # for a spawner to be ready
STATUS_SECONDS = 2.0  # for a worker to answer
STOP_SECONDS = 22.0  # for a worker to end when asked, before it gets SIGTERM
TERM_SECONDS = 3.0  # and then SIGKILL
LAST_MESSAGES = 1000  # of a process that is gone; its stages may have its channel, and could go on talking
SPAWN_SECONDS = 10.0  # for the spawner to start one
REPORT_SECONDS = 8.0  # for it to say that one is gone; it may wait for orphans meanwhile (hast/spawner.py)
EXPECT_STEPS = 10  # such a time is waited for in so many parts: to be stopped with the whole machine is one of them
RETRY_SECONDS = 1.0  # between attempts to start a spawner, and when one has lived no longer than that


@dataclass(frozen=True)
class Ending:
    """How a worker ended: in words, its exit code (None: killed by a signal, or not known), what it said before."""

    words: str
    code: int | None
    message: str = ""

    @property
    def temporary(self) -> bool:
        """Whether starting it again may help."""
        return self.code is None or self.code == os.EX_TEMPFAIL


class Worker:
    """One worker process. `pid` is 0 until it was forked; `ready` gets its message when it serves."""

    def __init__(self, identity: int, resource: Resource, role: str, channel: Channel) -> None:
        loop = asyncio.get_running_loop()
        self.id = identity
        self.resource = resource
        self.role = role
        self.channel = channel
        self.pid = 0
        self.pidfd = -1
        self.ready: asyncio.Future[Message] = loop.create_future()
        self.ended: asyncio.Future[Ending] = loop.create_future()
        self.failure: tuple[str, int] | None = None  # message and exit code
        self.started = loop.time()
        self._ready: Message | None = None
        self._asked: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._questions = 0

    @property
    def name(self) -> str:
        return f"worker (pid {self.pid}, {self.role})"

    @property
    def uptime(self) -> float:
        """Seconds since its start."""
        return asyncio.get_running_loop().time() - self.started

    async def status(self) -> dict[str, Any] | None:
        """What the worker says about itself, None when it does not answer in time."""
        return await self.ask("status")

    async def ask(self, command: str) -> dict[str, Any] | None:
        """Its answer to a command, None when it does not answer in time."""
        self._questions += 1
        question = self._questions
        answer = self._asked[question] = asyncio.get_running_loop().create_future()
        try:
            self.channel.send({"cmd": command, "id": question})
            await asyncio.wait({answer, self.ended}, timeout=STATUS_SECONDS, return_when="FIRST_COMPLETED")
            return answer.result() if answer.done() else None
        except HastError as error:
            log.warning("%s: %s: %s", self.resource.name, self.name, error)
            return None
        finally:
            del self._asked[question]

    def change(self, resource: Resource) -> None:
        """Tell it other settings of its resource; hooks are run by them from now on."""
        self.resource = resource
        try:
            self.channel.send({"cmd": "reload", "resource": spawner.resource_to_dict(resource)})
        except HastError as error:
            log.error("%s: %s cannot be told its new settings: %s", resource.name, self.name, error)

    def forked(self, pid: int, pidfd: int) -> None:
        """The spawner has said which process it is; owns the descriptor."""
        self.pid, self.pidfd = pid, pidfd
        self._check_ready()

    def kill(self, number: int) -> None:
        """Signal it. One that was not forked yet is told to end on its channel."""
        with contextlib.suppress(ProcessLookupError):
            if self.pidfd >= 0:
                signal.pidfd_send_signal(self.pidfd, number)
            elif self.pid:
                os.kill(self.pid, number)

    def _check_ready(self) -> None:
        """Two processes tell of its start, in any order; it is ready when both have."""
        if self.pid and self._ready is not None and not self.ready.done():
            self.ready.set_result(self._ready)

    def take(self, message: Message) -> None:
        """A message of the worker about itself."""
        event = message.get("event")
        if event == "ready":
            self._ready = message
            self._check_ready()
        elif event == "failed":
            self.failure = (str(message.get("message", "")), int(message.get("exit_code", os.EX_SOFTWARE)))
        elif event == "status":
            answer = self._asked.get(message.get("id", 0))
            if answer is not None and not answer.done() and isinstance(message.get("status"), dict):
                answer.set_result(message["status"])
        else:
            log.warning("%s: %s sent what is not known here: %s", self.resource.name, self.name, event)

    def end(self, words: str, code: int | None) -> None:
        """It is gone."""
        if not self.ended.done():
            self.ended.set_result(Ending(words, code, self.failure[0] if self.failure else ""))


OnDevice = Callable[[Resource, dict[str, Any], int], None]


def _no_device(resource: Resource, device: dict[str, Any], fd: int) -> None:
    if fd >= 0:
        os.close(fd)


class Workforce:
    """The spawner and all workers. `rundir` is open when start() is called; `on_hook` is called with a resource and
    the arguments for its hook; `on_device` with a resource, what its worker said of its block device, and the channel,
    which it owns then (-1: it is gone); `worker` is the module whose run() a worker is."""

    def __init__(
        self,
        rundir: RunDirectory,
        foreground: bool,
        debug: int,
        on_hook: Callable[[Resource, list[str]], None],
        worker: str = "hast.worker",
        on_device: OnDevice = _no_device,
    ) -> None:
        self._rundir = rundir
        self._foreground = foreground
        self._debug = debug
        self._on_hook = on_hook
        self._on_device = on_device
        self._module = worker
        self._workers: dict[int, Worker] = {}
        self._listeners: dict[int, asyncio.Task[None]] = {}
        self._expected: set[asyncio.Task[None]] = set()
        self._spawned = 0
        self._begun = 0.0  # the spawner
        self._channel: Channel | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._up = asyncio.Event()
        self._started = self._closing = False
        self._keeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the spawner and wait until it is ready. Raises HastError."""
        self._begin()
        self._keeper = asyncio.get_running_loop().create_task(self._keep())
        waiting = asyncio.ensure_future(self._up.wait())
        await asyncio.wait({waiting, self._keeper}, timeout=UP_SECONDS, return_when="FIRST_COMPLETED")
        if not self._up.is_set():
            waiting.cancel()
            await self.close()
            raise TemporaryError("the spawner ended, or was not ready in time, while hastd started")
        self._started = True

    async def wait_ready(self) -> None:
        """Wait until workers can be spawned. Raises TemporaryError when that takes too long."""
        try:
            async with asyncio.timeout(UP_SECONDS):
                await self._up.wait()
        except TimeoutError:
            raise TemporaryError("no worker can be started: hastd's spawner does not run") from None

    def spawn(
        self, resource: Resource, role: str, orders: Message | None = None, fds: Sequence[int] = ()
    ) -> Worker:
        """Have a worker started; whether that worked is told by its `ready` and `ended`. orders and copies of `fds` are
        what it is told first. Raises HastError."""
        if self._channel is None:
            raise TemporaryError(f"{resource.name}: no worker can be started: hastd's spawner does not run")
        ours, theirs = Channel.pair(f"worker of {resource.name}")
        self._spawned += 1
        worker = Worker(self._spawned, resource, role, ours)
        request = {"cmd": "spawn", "id": worker.id, "resource": spawner.resource_to_dict(resource), "role": role}
        try:
            ours.send({"cmd": "start", **(orders or {})}, fds)
            self._channel.send(request, [theirs.fileno()])
        except ChannelClosedError:  # its end has not been noticed yet
            ours.close()
            raise TemporaryError(f"{resource.name}: no worker can be started: hastd's spawner has ended") from None
        except HastError:
            ours.close()
            raise
        finally:
            theirs.close()
        self._workers[worker.id] = worker
        self._expect(lambda: worker.pid != 0 or worker.id not in self._workers, SPAWN_SECONDS, "starts no worker")
        self._listeners[worker.id] = asyncio.get_running_loop().create_task(self._listen(worker))
        return worker

    async def stop(self, worker: Worker, leave: bool = False) -> Ending:
        """End a worker: ask it, then SIGTERM, then SIGKILL, but not while it waits for its disk: that would be no
        faster, and a flush that fails it unheard. Returns when it is gone. leave: its device stays."""
        try:
            worker.channel.send({"cmd": "stop", "leave": leave})
        except HastError as error:  # it hangs, or is ending already
            log.debug("%s: %s cannot be asked to end: %s", worker.resource.name, worker.name, error)
        # It stores what it has received first, as long as its disk does not count as failed (hast/secondary.py).
        more = worker.resource.timeout if worker.role == "secondary" and not leave else 0
        await asyncio.wait({worker.ended}, timeout=STOP_SECONDS + more)
        if not worker.ended.done():
            log.warning("%s: %s does not end, sending SIGTERM", worker.resource.name, worker.name)
            worker.kill(signal.SIGTERM)
            await asyncio.wait({worker.ended}, timeout=TERM_SECONDS)
        held = before = bool(worker.pid) and in_kernels_hands(worker.pid)
        while (held or before) and not worker.ended.done():  # once let go, it has to note what has come of it
            await asyncio.wait({worker.ended}, timeout=TERM_SECONDS)
            held, before = in_kernels_hands(worker.pid), held
        if not worker.ended.done():
            log.error("%s: %s does not end, killing it", worker.resource.name, worker.name)
            worker.kill(signal.SIGKILL)
        return await asyncio.shield(worker.ended)

    async def close(self) -> None:
        """End the spawner and with it all workers that there still are."""
        self._closing = True
        for task in self._expected:
            task.cancel()
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait({self._keeper})
        if self._channel is not None:
            self._channel.close()  # this is what tells the spawner to end
            self._channel = None
        if self._process is not None:
            await _collect(self._process, spawner.LAST_SECONDS + TERM_SECONDS)
            self._process = None
        for worker in list(self._workers.values()):
            self._gone(worker, "ended with hastd", None)

    # The spawner.

    def _begin(self) -> None:
        """Start one. Raises HastError."""
        self._begun = asyncio.get_running_loop().time()
        self._channel, self._process = spawner.start(
            self._rundir.path, self._rundir.lock, self._foreground, self._debug, self._module
        )
        self._expect(self._up.is_set, UP_SECONDS, "is not ready")

    def _expect(self, met: Callable[[], bool], seconds: float, what: str) -> None:
        """The spawner that there is now is killed if this is not so by then; its workers die with it, and all begin
        anew."""
        if self._closing:
            return
        task = asyncio.get_running_loop().create_task(self._see_to(met, seconds, what, self._process))
        self._expected.add(task)
        task.add_done_callback(self._expected.discard)

    async def _see_to(
        self, met: Callable[[], bool], seconds: float, what: str, process: subprocess.Popen[bytes] | None
    ) -> None:
        for _ in range(EXPECT_STEPS):
            await asyncio.sleep(seconds / EXPECT_STEPS)
            if met() or process is not self._process:
                return
        if process is not None:
            log.error("hastd's spawner %s within %g s, killing it", what, seconds)
            process.kill()

    async def _keep(self) -> None:
        """Hear the spawner; when it dies, start another one. At hastd's start, its death ends this instead."""
        while True:
            await self._hear()
            if not self._started and not self._up.is_set():
                return
            self._up.clear()
            await self._lost()
            pause = 0.0 if asyncio.get_running_loop().time() - self._begun > RETRY_SECONDS else RETRY_SECONDS
            while self._channel is None:
                await asyncio.sleep(pause)
                pause = RETRY_SECONDS
                try:
                    self._begin()
                except HastError as error:
                    log.error("%s; trying again", error)

    async def _hear(self) -> None:
        """The spawner's messages, until it is gone."""
        assert self._channel is not None
        while True:
            try:
                received = await self._channel.arecv()
            except DescriptorsLostError as lost:
                self._spawner_event(lost.message, [])
                continue
            except ProtocolError as error:
                log.error("%s", error)
                continue
            except HastError as error:
                log.error("%s", error)
                return
            if received is None:
                return
            message, fds = received
            self._spawner_event(message, fds)
            close_all(fds)

    def _spawner_event(self, message: Message, fds: list[int]) -> None:
        event = message.get("event")
        if event == "up":
            self._up.set()
            return
        worker = self._workers.get(message.get("id", 0))
        if worker is None:
            return
        if event == "spawned":
            worker.forked(message["pid"], fds.pop() if fds else -1)  # there may be no descriptor left
            if worker.pidfd >= 0:
                asyncio.get_running_loop().add_reader(worker.pidfd, self._dead, worker)
            log.debug("%s: %s started", worker.resource.name, worker.name)
        elif event == "failed":
            worker.failure = (message["message"], os.EX_TEMPFAIL)
            self._gone(worker, "could not be started", os.EX_TEMPFAIL)
        elif event == "exited":
            status = message["status"]
            code = None if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)
            asyncio.get_running_loop().create_task(self._exited(worker, ending_in_words(status), code))

    def _dead(self, worker: Worker) -> None:
        """Its process has ended; how is for the spawner to say."""
        asyncio.get_running_loop().remove_reader(worker.pidfd)
        self._expect(lambda: worker.id not in self._workers, REPORT_SECONDS, "does not say how a worker ended")

    async def _exited(self, worker: Worker, words: str, code: int | None) -> None:
        """Its last messages are read before its end is told. They are all there by now: no time is to be waited for."""
        listener = self._listeners.get(worker.id)
        if listener is not None:
            listener.cancel()
            await asyncio.wait({listener})
            self._last_words(worker)
        self._gone(worker, words, code)

    def _last_words(self, worker: Worker) -> None:
        """Take what a worker that is gone has sent before."""
        for _ in range(LAST_MESSAGES):
            try:
                received = worker.channel.recv(timeout=0)
                if received is None:
                    return
                self._take(worker, *received)
            except TimeoutError:
                return
            except (ProtocolError, ValueError, TypeError, KeyError) as error:
                log.error("%s: %s sent a bad message: %s", worker.resource.name, worker.name, error)
            except HastError as error:
                log.error("%s: %s: %s", worker.resource.name, worker.name, error)
                return

    async def _lost(self) -> None:
        """The spawner is gone: its workers were killed with it, or see that main hangs up."""
        assert self._channel is not None and self._process is not None
        self._channel.close()
        self._channel = None
        status = await _collect(self._process, TERM_SECONDS)
        log.error("the spawner ended (status %s), and the workers with it; starting another one", status)
        listeners = list(self._listeners.values())
        if listeners:
            await asyncio.wait(listeners, timeout=TERM_SECONDS)
        for worker in list(self._workers.values()):
            self._gone(worker, "was killed with the spawner", None)

    # Workers.

    async def _listen(self, worker: Worker) -> None:
        """A worker's messages, until it is gone."""
        while True:
            try:
                received = await worker.channel.arecv()
                if received is None:
                    return
                self._take(worker, *received)
            except (ProtocolError, ValueError, TypeError, KeyError) as error:
                log.error("%s: %s sent a bad message: %s", worker.resource.name, worker.name, error)
            except HastError as error:
                log.error("%s: %s: %s", worker.resource.name, worker.name, error)
                return
            await asyncio.sleep(0)  # a worker that never stops talking must not stop everything else

    def _take(self, worker: Worker, message: Message, fds: list[int]) -> None:
        if message.get("event") == "device" and len(fds) == 1:
            self._on_device(worker.resource, dict(message["device"]), fds[0])
            return
        close_all(fds)
        if message.get("event") == "released":
            self._on_device(worker.resource, {}, -1)
        elif message.get("event") == "hook":
            self._on_hook(worker.resource, [str(arg) for arg in message["args"]])
        else:
            worker.take(message)

    def _gone(self, worker: Worker, words: str, code: int | None) -> None:
        self._workers.pop(worker.id, None)
        listener = self._listeners.pop(worker.id, None)
        if listener is not None:
            listener.cancel()
            # Not before: the event loop still watches the descriptor, whose number is free once it is closed.
            listener.add_done_callback(lambda _: worker.channel.close())
        if worker.pidfd >= 0:
            asyncio.get_running_loop().remove_reader(worker.pidfd)
            os.close(worker.pidfd)
            worker.pidfd = -1
        worker.end(words, code)


async def _collect(process: subprocess.Popen[bytes], seconds: float) -> int:
    """Wait for a process of ours to end, kill it when the time is over; its return code."""
    loop = asyncio.get_running_loop()
    waiting = loop.run_in_executor(None, process.wait)
    await asyncio.wait({waiting}, timeout=seconds)
    if not waiting.done():
        log.error("the spawner does not end, killing it")
        process.kill()
    return await waiting
