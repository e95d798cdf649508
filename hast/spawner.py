"""The spawner: the process that forks workers, so that starting one costs no start of Python.

    main -> spawner  {"cmd": "spawn", "id", "resource", "role"}  + the worker's end of its channel to main
    spawner -> main  {"event": "up"}  once, when everything a worker needs is imported
                     {"event": "spawned", "id", "pid"} + its pidfd, or {"event": "failed", "id", "message"}
                     {"event": "exited", "id", "pid", "status"}: the raw wait status; the last word about that id

Invariants:
- It is single-threaded and has no event loop, so what it forks is clean. It is a program of its own, started
  by main, and not a fork of main: main can start another one when it has died.
- A worker has its own channel, the lock of the run directory, 0, 1 and 2, and no other descriptor.
- Workers do not outlive it; it does not outlive main: end of file on its channel ends all workers.
- The end of a worker is reported when its stages are gone too (if that does not take too long), so that they
  no longer lock the component when the worker is started again. It adopts those of a worker that was killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hast.address import Address
from hast.channel import Channel, ChannelClosedError, Message, close_all
from hast.config import Resource
from hast.errors import HastError, refusal

log = logging.getLogger(__name__)

TITLE = "hastd: spawner"
LAST_SECONDS = 25.0  # for workers to end when main is gone, before they are killed
DISK_SECONDS = 1.0  # between looks at a worker that waits for its disk
ORPHAN_SECONDS = 2.0  # for the stages of a worker that was killed to be gone as well
ORPHAN_POLL_SECONDS = 0.02
PR_SET_CHILD_SUBREAPER = 36
PR_SET_IO_FLUSHER = 57

WorkerMain = Callable[[Channel, Resource, str, Path], int]


def resource_to_dict(resource: Resource) -> dict[str, Any]:
    """A resource as JSON can carry it."""
    return asdict(resource)


def resource_from_dict(data: dict[str, Any]) -> Resource:
    """The resource that resource_to_dict() was given."""
    addresses = {key: Address(**data[key]) if data[key] else None for key in ("remote", "source")}
    return Resource(**{**data, **addresses})


# Main's side.


def start(
    rundir: Path, lock: int, foreground: bool, debug: int, worker: str
) -> tuple[Channel, subprocess.Popen[bytes]]:
    """Start a spawner; its first message is "up".

    `lock` is the descriptor that keeps the run directory locked, `worker` the module whose run() workers
    are. Raises TemporaryError, SystemCallError.
    """
    ours, theirs = Channel.pair("spawner")
    settings = {
        "path": sys.path,
        "channel": theirs.fileno(),
        "lock": lock,
        "rundir": str(rundir),
        "foreground": foreground,
        "debug": debug,
        "worker": worker,
    }
    program = (
        "import json, sys; settings = json.loads(sys.argv.pop()); sys.path[:] = settings['path']\n"
        "from hast.spawner import main; main(settings)"
    )
    try:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", program, json.dumps(settings)],
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(), lock),
            start_new_session=True,  # a terminal's SIGINT is for main alone
        )
    except OSError as error:
        ours.close()
        raise refusal(f"cannot start the spawner: {error.strerror}", error.errno) from error
    finally:
        theirs.close()
    return ours, process


# The spawner's side.


def main(settings: dict[str, Any]) -> None:
    """The spawner process; returns when main and all workers are gone."""
    from setproctitle import setproctitle

    from hast import log as log_setup

    worker = importlib.import_module(settings["worker"])
    setproctitle(TITLE)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # main says when: it ends its workers first
    log_setup.setup(settings["foreground"], settings["debug"])
    if not settings["foreground"]:
        log_setup.to_null()
    _adopt_orphans()
    _never_wait_for_ourselves()
    channel = Channel.from_fd(settings["channel"], "spawner")
    os.set_inheritable(channel.fileno(), False)
    os.set_inheritable(settings["lock"], False)
    Spawner(channel, Path(settings["rundir"]), settings["lock"], worker.run).serve()


class Spawner:
    """The spawner's state: its channel to main, and the workers that have not ended."""

    def __init__(self, channel: Channel, rundir: Path, lock: int, run: WorkerMain) -> None:
        from hast.stages.launch import Child

        self.channel = channel
        self.rundir = rundir
        self.lock = lock
        self.run = run
        self.workers: dict[int, Child] = {}  # by id
        self.ended: list[tuple[float, Message]] = []  # reports that wait for orphans, with their deadlines
        self.wakeup, wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # only there to write to the pipe

    def serve(self) -> None:
        """Fork workers on request, until main is gone and all workers have ended."""
        self._tell({"event": "up"})
        while not self.channel.closed:
            self._wait(ORPHAN_POLL_SECONDS if self.ended else None)
            self._receive()
            self._reap()
        self._end_all()

    def _wait(self, timeout: float | None) -> None:
        """Wait until main has said something or a child has ended, or the time (in seconds) is over."""
        poll = select.poll()
        poll.register(self.wakeup, select.POLLIN)
        if not self.channel.closed:
            poll.register(self.channel, select.POLLIN)
        if poll.poll(None if timeout is None else timeout * 1000):
            with contextlib.suppress(BlockingIOError):
                os.read(self.wakeup, 4096)

    def _receive(self) -> None:
        """Carry out one message of main, if there is one. Closes the channel when main is gone."""
        try:
            received = self.channel.recv(timeout=0)
        except TimeoutError:
            return
        except HastError as error:
            log.error("%s", error)
            return
        if received is None:
            self.channel.close()
            return
        message, fds = received
        if message.get("cmd") == "spawn" and len(fds) == 1:
            self._spawn(message, Channel.from_fd(fds[0], f"worker of {message['resource']['name']}"))
        else:
            close_all(fds)
            log.error("spawner: message that it does not know: %s", message)

    def _tell(self, message: Message, fds: Sequence[int] = ()) -> None:
        try:
            self.channel.send(message, fds)
        except ChannelClosedError:
            self.channel.close()
        except HastError as error:
            log.error("%s", error)

    def _spawn(self, message: Message, channel: Channel) -> None:
        from hast.stages.launch import fork

        identity = message["id"]
        resource = resource_from_dict(message["resource"])
        role = message["role"]

        def body() -> int:
            return run_worker(self.run, channel, resource, role, self.rundir)

        try:
            child = fork(f"hastd: {resource.name} ({role})", {channel.fileno(), self.lock}, body)
        except HastError as error:
            self._tell({"event": "failed", "id": identity, "message": f"{resource.name}: {error}"})
            return
        finally:
            channel.close()
        self.workers[identity] = child
        self._tell({"event": "spawned", "id": identity, "pid": child.pid}, [child.pidfd])

    def _kill(self, identity: int, number: int) -> None:
        child = self.workers.get(identity)
        if child is not None:  # not collected yet, so its process id is still its own
            os.kill(child.pid, number)

    def _reap(self) -> None:
        """Collect children that have ended, and report the workers among them."""
        pids = {child.pid: identity for identity, child in self.workers.items()}
        while (pid := _next_dead()) is not None:
            if pid in pids:
                identity = pids[pid]
                child = self.workers.pop(identity)
                child.reap()
                report = {"event": "exited", "id": identity, "pid": pid, "status": child.status}
                self.ended.append((time.monotonic() + ORPHAN_SECONDS, report))
            else:
                os.waitpid(pid, 0)
        if self.ended and not _living_children() - {child.pid for child in self.workers.values()}:
            self._report(len(self.ended))
        self._report(sum(deadline <= time.monotonic() for deadline, _ in self.ended))

    def _report(self, number: int) -> None:
        """Tell main about the first so many workers that have ended."""
        for _, report in self.ended[:number]:
            self._tell(report)
        del self.ended[:number]

    def _end_all(self) -> None:
        """Main is gone: the workers see that as well; those that do not end in time are killed, but not while they wait
        for their disk."""
        from hast.stages.launch import in_kernels_hands

        for identity in self.workers:
            self._kill(identity, signal.SIGTERM)
        deadline = time.monotonic() + LAST_SECONDS
        while self.workers and time.monotonic() < deadline:
            self._wait(deadline - time.monotonic())
            self._reap()
        held: set[int] = set()
        while self.workers:
            before, held = held, {identity for identity, child in self.workers.items() if in_kernels_hands(child.pid)}
            busy = held | before  # once let go, it has to note what has come of it
            for identity in self.workers.keys() - busy:
                log.error("spawner: killing a worker that does not end")
                self._kill(identity, signal.SIGKILL)
            self._wait(DISK_SECONDS if busy else None)
            self._reap()


def _next_dead() -> int | None:
    """A child that has ended and was not collected yet."""
    try:
        found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return None
    return found.si_pid if found is not None else None


def _living_children() -> set[int]:
    """All children, orphans that were adopted among them. Empty where the kernel does not tell."""
    try:
        return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}
    except OSError:
        return set()


def _adopt_orphans() -> None:
    """Become the parent of processes whose parents, workers, were killed: they must not be lost sight of."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        log.warning("spawner: stages of a worker that is killed cannot be watched")


def _never_wait_for_ourselves() -> None:
    """As hast/stages/protect.py for the stages, and inherited by workers: when one has died, the device that the
    machine writes its dirty memory to needs a new one, and memory for that must not wait for the device. What is not
    permitted is done without: then there is no block device either."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0)


def run_worker(run: WorkerMain, channel: Channel, resource: Resource, role: str, rundir: Path) -> int:
    """The worker's life, in its own process: its exit code. What it could not say itself is told to main."""
    try:
        return run(channel, resource, role, rundir)
    except HastError as error:
        message, code = str(error), error.exit_code
    except Exception as error:
        log.exception("%s: the %s worker met an unexpected error", resource.name, role)
        message, code = f"{resource.name}: unexpected error in the worker: {error!r}", os.EX_SOFTWARE
    try:
        channel.send({"event": "failed", "message": message, "exit_code": code})
    except HastError as error:
        log.error("%s; %s", message, error)
    return code
