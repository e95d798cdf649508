"""The keeper: a process that does nothing but hold descriptors and remember roles, so that both outlive hastd.

What hast/keeping.py, main's side, tells it, one JSON object in each packet:

    {"cmd": "hello", "version": 1}       asked by a hastd that has found it; answered by {"event": "hello", "version",
                                         "pid", "away": seconds since there was a hastd that worked}, then for each
                                         name {"event": "kept", "name", "record"} + its descriptors, then
                                         {"event": "all"}
    {"cmd": "here"}                      that hastd works now
    {"cmd": "keep", "name", "record"}    + descriptors: they take the place of what was kept under that name
    {"cmd": "drop", "name"}              close what is kept under that name
    {"cmd": "end"}                       close everything, and end

`hello`, its answer and `end` stay as they are in every version: a hastd of another version takes everything over with
them, and gives it to a keeper of its own. In a record the keeper looks at "mount" only: a FUSE mount point.

Invariants:
- It holds one descriptor for each block device, and needs nothing but memory: no disk, no device, no other process.
- It dies with nobody: a session of its own, SIGTERM ignored, no lock held, started by exec and not by fork.
- It ends when nothing is left to be kept and hastd is gone, and LIMIT_SECONDS after hastd is gone in any case: then it
  aborts the devices, whose users get errors and do not wait for ever.
- Only root and its own user are heard, one at a time.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import socket
import stat
import struct
import sys
import syslog
import time
from pathlib import Path
from typing import Any

VERSION = 1
TITLE = "hastd: keeper"
SOCKET = "keeper.sock"  # in the run directory
LIMIT_SECONDS = 30.0  # from the end of a hastd to the start of the next one
ANSWER_SECONDS = 5.0  # for a hastd that asks to take its answer
MAX_MESSAGE = 64 * 1024  # bytes
MAX_FDS = 4  # descriptors with one message
MNT_FORCE = 1
IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

Record = dict[str, Any]


def now() -> float:
    """Seconds, those that the machine was suspended for included: the other node's clock went on then."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Keeper:
    """`listener` is the socket in the run directory, `main` the connection with the hastd that has started it."""

    def __init__(self, listener: socket.socket, main: socket.socket, limit: float) -> None:
        self.listener = listener
        self.main: socket.socket | None = main
        self.limit = limit
        self.works = True  # there is a hastd that has not said hello, or has said that it is here since
        self.since = now()  # when there was one last
        self.asked = 0.0  # when the one that is connected, and does not work yet, has said hello
        self.kept: dict[str, tuple[Record, list[int]]] = {}

    def serve(self) -> None:
        """Until there is nothing to be kept any more."""
        while self.main is not None or self.kept:
            left = self.left()
            if left is not None and left <= 0:
                self.abort()
                return
            poll = select.poll()
            poll.register(self.listener, select.POLLIN)
            if self.main is not None:
                poll.register(self.main, select.POLLIN)
            ready = {fd for fd, _ in poll.poll(None if left is None else left * 1000 + 1)}
            if self.main is not None and self.main.fileno() in ready:
                self.hear()
            elif self.listener.fileno() in ready:
                self.admit()

    def left(self) -> float | None:
        """Seconds that hastd has left to come back; None while it is there. One that has come, and has not started yet,
        has all of them for that."""
        return None if self.works else max(self.since, self.asked) + self.limit - now()

    def admit(self) -> None:
        """Somebody connects."""
        try:
            sock, _ = self.listener.accept()
        except OSError:
            return
        _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid in (0, os.geteuid()) and self.main is None:
            self.main = sock
        else:
            sock.close()

    def hear(self) -> None:
        """One message of hastd, or its end."""
        assert self.main is not None
        fds: list[int] = []
        try:
            data, fds, _, _ = socket.recv_fds(self.main, MAX_MESSAGE, MAX_FDS)
            if not data:
                self.lost()
                return
            self.take(json.loads(data), fds)
        except OSError:
            close_all(fds)
            self.lost()
        except (ValueError, KeyError, TypeError) as error:
            close_all(fds)
            say(f"a message that it cannot use: {error!r}")

    def take(self, message: Record, fds: list[int]) -> None:
        """Do what hastd says; the descriptors are kept or closed."""
        if not isinstance(message, dict):
            raise ValueError("no JSON object")
        command = message.get("cmd")
        if command == "keep":
            name, record = str(message["name"]), dict(message["record"])
            self.drop(name)
            self.kept[name] = (record, fds)
            return
        close_all(fds)
        if command == "drop":
            self.drop(str(message["name"]))
        elif command == "hello":
            self.answer()
        elif command == "here":
            self.works = True
        elif command == "end":
            for name in list(self.kept):
                self.drop(name)
            self.lost()

    def answer(self) -> None:
        """Everything that is kept, to a hastd that has come anew."""
        assert self.main is not None
        away = 0.0 if self.works else now() - self.since
        self.works, self.asked = False, now()
        self.main.settimeout(ANSWER_SECONDS)
        hello = {"event": "hello", "version": VERSION, "pid": os.getpid(), "away": away}
        self.main.send(json.dumps(hello).encode())
        for name, (record, fds) in self.kept.items():
            message = json.dumps({"event": "kept", "name": name, "record": record}).encode()
            socket.send_fds(self.main, [message], fds)
        self.main.send(json.dumps({"event": "all"}).encode())
        self.main.settimeout(None)

    def drop(self, name: str) -> None:
        _, fds = self.kept.pop(name, ({}, []))
        close_all(fds)

    def lost(self) -> None:
        """hastd is gone. One that never worked does not count: the time goes on from where it was."""
        assert self.main is not None
        self.main.close()
        self.main, self.asked = None, 0.0
        if self.works:
            self.works, self.since = False, now()

    def abort(self) -> None:
        """Nobody has come: fail everything that waits for the devices, now and from now on."""
        umount2 = ctypes.CDLL(None, use_errno=True).umount2
        for name, (record, fds) in self.kept.items():
            if fds:
                say(f"{name}: no hastd has come back for {self.limit:g} s, ending its block device")
            if record.get("mount"):
                umount2(os.fsencode(record["mount"]), MNT_FORCE)  # what it returns does not matter: closing comes next
            close_all(fds)


def close_all(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())


def say(text: str) -> None:
    """One line where hastd's go: stderr, or syslog where that is /dev/null."""
    line = f"hastd: keeper: {text}"
    if stat.S_ISCHR(os.fstat(2).st_mode) and os.fstat(2).st_rdev == os.stat(os.devnull).st_rdev:  # noqa: PTH116
        syslog.syslog(syslog.LOG_ERR, line)
    elif select.select([], [2], [], 0)[1]:  # never wait: the log may lie on a device that is kept here
        os.write(2, f"{line}\n".encode())


def main(settings: Record) -> None:
    """The process; settings as hast/keeping.py gives them."""
    from setproctitle import setproctitle

    setproctitle(TITLE)
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)  # hastd says when, or the time does
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED)
    os.chdir("/")
    os.set_inheritable(settings["listener"], False)
    os.set_inheritable(settings["main"], False)
    listener = socket.socket(fileno=settings["listener"])
    path = Path(settings["path"])
    made = path.lstat().st_ino
    keeper = Keeper(listener, socket.socket(fileno=settings["main"]), settings["limit"])
    syslog.openlog("hastd", 0, syslog.LOG_DAEMON)
    try:
        keeper.serve()
    finally:
        if path.exists() and path.lstat().st_ino == made:
            path.unlink()
        sys.stderr.flush()
