"""Main's side of the keeper (hast/keeper.py): what must outlive main is noted here and told to it.

Invariants:
- Main has a copy of every descriptor that the keeper has. So the death of either of them loses nothing: a restarted
  worker gets its block device from main, a restarted main gets all from the keeper, a new keeper gets all from main.
- There is a keeper as long as there is something to be kept. It is started in the moment that it is needed, and main
  does not wait for it: what it is told waits in its socket.
- Main never waits for the keeper while it serves; at its start for some seconds at most.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hast.channel import close_all
from hast.errors import HastError, ProtocolError, SystemCallError
from hast.keeper import IGNORED, LIMIT_SECONDS, MAX_FDS, MAX_MESSAGE, SOCKET, VERSION

log = logging.getLogger(__name__)

FIND_SECONDS = 5.0  # for a keeper that is there to say what it has
END_SECONDS = 5.0  # for it to end when it is told to
RETRY_SECONDS = 1.0  # between attempts to start one, and when one has lived no longer than that
REMOVE_SECONDS = 5.0  # for a device that nobody serves to be taken away


@dataclass
class Kept:
    """What is kept of one resource: its role, of a primary what it has `served`, and where it has a block device the
    FUSE channel `fd`, and `device`: what its worker wants to know of it again."""

    role: str = ""
    device: dict[str, Any] | None = None
    fd: int = -1
    served: dict[str, Any] | None = None

    def record(self) -> dict[str, Any]:
        """The same as JSON can carry it."""
        mount = self.device.get("mount") if self.device is not None else None
        return {"role": self.role, "device": self.device, "mount": mount, "served": self.served}

    @classmethod
    def from_record(cls, record: dict[str, Any], fds: list[int]) -> Kept:
        """Owns the descriptors from now on."""
        close_all(fds[1:])
        device, served = (found if isinstance(found := record.get(key), dict) else None for key in ("device", "served"))
        return cls(str(record.get("role", "")), device, fds[0] if fds else -1, served)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
        self.fd, self.device = -1, None


@dataclass
class Keeping:
    """What is kept, and the connection with the keeper. `find()` before anything else, outside of any event loop;
    `start()` when hastd works."""

    rundir: Path
    limit: float = LIMIT_SECONDS
    kept: dict[str, Kept] = field(default_factory=dict)
    _socket: socket.socket | None = None
    _pid: int = 0
    _process: subprocess.Popen[bytes] | None = None
    _begun: float = 0.0
    _watching: bool = False
    _retry: asyncio.TimerHandle | None = None

    # ---- what is kept ----

    def role(self, name: str, role: str) -> None:
        """The role of a resource, as long as it is not init."""
        if role == "init":
            self.forget(name)
            return
        kept = self.kept.setdefault(name, Kept())
        if kept.role != role:
            kept.role = role
            self._tell(name)

    def device(self, name: str, device: dict[str, Any], fd: int) -> None:
        """The block device that a worker has made; owns its channel from now on."""
        kept = self.kept.setdefault(name, Kept())
        kept.close()
        kept.device, kept.fd = device, fd
        self._tell(name)

    def serves(self, name: str, served: dict[str, Any] | None) -> None:
        """What the worker of a primary says that it serves: the next one of the same primary is to serve the same."""
        kept = self.kept.setdefault(name, Kept())
        if kept.served != served:
            kept.served = served
            self._tell(name)

    def release(self, name: str) -> None:
        """The block device is gone: whoever still uses it gets errors when the last copy of its channel is closed."""
        kept = self.kept.get(name)
        if kept is not None and kept.fd >= 0:
            kept.close()
            self._tell(name)

    def forget(self, name: str) -> None:
        """Nothing of this resource is to be kept."""
        kept = self.kept.pop(name, None)
        if kept is not None:
            kept.close()
            self._send({"cmd": "drop", "name": name})

    async def remove(self, name: str) -> None:
        """What was served is over. Take away what its workers have not taken away themselves, because they were killed:
        there is none now."""
        (self.rundir / f"{name}.sock").unlink(missing_ok=True)
        kept = self.kept.get(name)
        if kept is not None and kept.served is not None:
            self.serves(name, None)
        if kept is None or kept.fd < 0:
            return
        self.release(name)
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def work() -> None:
            from hast.device.fuse import remove  # rarely needed

            try:
                remove(self.rundir, name)
            except HastError as error:
                log.error("%s", error)
            with contextlib.suppress(RuntimeError):  # hastd has ended meanwhile
                loop.call_soon_threadsafe(done.set)

        # A thread that nobody has to wait for: whatever the kernel does, hastd ends.
        threading.Thread(target=work, name=f"removing the block device of {name}", daemon=True).start()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REMOVE_SECONDS):
                await done.wait()

    def devices(self) -> set[str]:
        """Resources whose block device is kept."""
        return {name for name, kept in self.kept.items() if kept.fd >= 0}

    # ---- finding the keeper of a hastd that is gone ----

    def find(self) -> float:
        """Take over what a keeper has that is there, if there is one; for how many seconds there was no hastd.

        Raises HastError when a keeper is there and does not answer.
        """
        path = self.rundir / SOCKET
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.settimeout(FIND_SECONDS)
        try:
            sock.connect(os.fspath(path))
        except (FileNotFoundError, ConnectionRefusedError):
            sock.close()
            path.unlink(missing_ok=True)
            return 0.0
        except OSError as error:
            sock.close()
            raise SystemCallError(f"cannot reach hastd's keeper at {path}: {error}") from error
        try:
            return self._take_over(sock)
        except (OSError, ValueError, KeyError, TypeError) as error:
            sock.close()
            raise ProtocolError(
                f"hastd's keeper at {path} does not say what it has ({error}): end 'hastd: keeper'"
            ) from error

    def _take_over(self, sock: socket.socket) -> float:
        sock.send(json.dumps({"cmd": "hello", "version": VERSION}).encode())
        hello, _ = _receive(sock)
        while True:
            message, fds = _receive(sock)
            if message["event"] != "kept":
                break
            self.kept[str(message["name"])] = Kept.from_record(message["record"], fds)
        self._pid = int(hello["pid"])
        if hello["version"] == VERSION:
            sock.setblocking(False)
            self._socket = sock
        else:
            log.info("hastd's keeper is of another version, another one takes its place")
            sock.send(json.dumps({"cmd": "end"}).encode())
            sock.close()
        return float(hello["away"])

    # ---- having one ----

    def start(self) -> None:
        """hastd works: watch the keeper, or start one if there is something to be kept. In the event loop."""
        self._watching = True
        if self._socket is not None:
            self._watch()
            self._send({"cmd": "here"})
        elif self.kept:
            self._begin()

    def _watch(self) -> None:
        if self._watching and self._socket is not None:
            asyncio.get_running_loop().add_reader(self._socket, self._lost)

    def _begin(self) -> None:
        """Start a keeper and give it everything."""
        self._retry = None
        try:
            self._socket, self._process = start(self.rundir, self.limit)
        except HastError as error:
            log.error("%s; trying again", error)
            self._retry = asyncio.get_running_loop().call_later(RETRY_SECONDS, self._begin)
            return
        self._pid, self._begun = self._process.pid, asyncio.get_running_loop().time()
        self._watch()
        for name in list(self.kept):
            self._tell(name)

    def _lost(self) -> None:
        """Something can be read from the keeper: it says nothing by itself, so this is its end."""
        self._hang_up()
        log.error("hastd's keeper has ended; starting another one")
        loop = asyncio.get_running_loop()
        lived = loop.time() - self._begun
        self._retry = loop.call_later(0.0 if lived > RETRY_SECONDS else RETRY_SECONDS, self._begin)
        loop.call_later(RETRY_SECONDS, _collect, self._pid)

    def _hang_up(self) -> None:
        if self._socket is not None:
            if self._watching:
                asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._socket = None

    def _tell(self, name: str) -> None:
        kept = self.kept[name]
        message = {"cmd": "keep", "name": name, "record": kept.record()}
        self._send(message, [kept.fd] if kept.fd >= 0 else [])

    def _send(self, message: dict[str, Any], fds: list[int] | None = None) -> None:
        if self._socket is None:
            if self._watching and self.kept and self._retry is None:
                self._begin()  # which tells it everything
            return
        try:
            socket.send_fds(self._socket, [json.dumps(message).encode()], fds or [])
        except OSError as error:
            log.error("hastd's keeper cannot be told anything: %s", error.strerror)
            if isinstance(error, BlockingIOError):
                # It hangs, and must not hold on to devices that are to go.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._pid, signal.SIGKILL)
            self._lost()

    def _there(self) -> bool:
        """Whether there is a keeper now; its end may not have been noticed yet."""
        try:
            return self._socket is not None and bool(self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except BlockingIOError:
            return True
        except OSError:
            return False

    # ---- end ----

    async def close(self, leave: bool = False) -> None:
        """End the keeper and what it keeps; or, to `leave`, let it keep everything for the next hastd."""
        if self._retry is not None:
            self._retry.cancel()
        there = self._there()
        if leave and self.kept and not (there and (self.rundir / SOCKET).is_socket()):
            # The next hastd knows nothing but what the keeper says, and finds it by its socket.
            if there:
                self._send({"cmd": "end"})
            self._hang_up()
            self._begin()
        if not leave:
            self._send({"cmd": "end"})
        self._hang_up()
        for kept in self.kept.values():
            kept.close()
        self.kept.clear()
        if not leave and self._pid:
            await asyncio.get_running_loop().run_in_executor(None, _wait_end, self._pid)
            (self.rundir / SOCKET).unlink(missing_ok=True)  # one that was killed has left it


def start(rundir: Path, limit: float) -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """Start a keeper: the connection with it, on which it can be told something at once. Raises SystemCallError."""
    path = rundir / SOCKET
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    temporary = rundir / f".{SOCKET}.{os.getpid()}"
    program = (
        "import json, sys; settings = json.loads(sys.argv.pop()); sys.path[:] = settings['sys.path']\n"
        "from hast.keeper import main; main(settings)"
    )
    # What is sent to everybody must not find it before it ignores that: it starts with these blocked.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)
    try:
        temporary.unlink(missing_ok=True)
        listener.bind(os.fspath(temporary))
        temporary.chmod(0o600)
        listener.listen(8)
        temporary.rename(path)
        settings = {
            "sys.path": sys.path,
            "listener": listener.fileno(),
            "main": theirs.fileno(),
            "path": str(path),
            "limit": limit,
        }
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", program, json.dumps(settings)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(listener.fileno(), theirs.fileno()),
            start_new_session=True,
        )
    except OSError as error:
        ours.close()
        raise SystemCallError(f"cannot start hastd's keeper: {error.strerror}") from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        listener.close()
        theirs.close()
    ours.setblocking(False)
    return ours, process


def _receive(sock: socket.socket) -> tuple[dict[str, Any], list[int]]:
    data, fds, _, _ = socket.recv_fds(sock, MAX_MESSAGE, MAX_FDS, socket.MSG_CMSG_CLOEXEC)
    if not data:
        raise ValueError("it has hung up")
    message = json.loads(data)
    if not isinstance(message, dict):
        raise ValueError("no JSON object")
    return message, fds


def _wait_end(pid: int) -> None:
    """Wait for the keeper that was told to end, and collect it if it is our child. One that does not is killed."""
    with contextlib.suppress(OSError):
        pidfd = os.pidfd_open(pid)
        try:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            if not poll.poll(END_SECONDS * 1000):
                log.error("hastd's keeper does not end, killing it")
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                poll.poll(END_SECONDS * 1000)
        finally:
            os.close(pidfd)
    _collect(pid)


def _collect(pid: int) -> None:
    """If it was our child; that of a hastd that was killed is not."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
