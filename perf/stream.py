"""What one TCP stream on loopback carries: 128 KiB messages from one process to another, with and without the copies
from and to the components that a synchronisation makes as well."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

from perf.errors import PerfError
from perf.scene import MIB

MESSAGE = 128 << 10
HEADER = 128  # bytes before each message; about what a write of the protocol has
SLABS = 32  # buffers that are used in turn where files are read and written, as the window of a synchronisation does


def slabs(files: bool) -> list[bytearray]:
    """A bare stream uses one buffer again and again: nothing is faster, so it is the harder measure."""
    return [bytearray(os.urandom(MESSAGE)) for _ in range(SLABS if files else 1)]


def receive(listener: socket.socket, messages: int, target: int | None) -> None:
    """In a process of its own: take all messages, one system call for each, answer with one byte at the end."""
    with listener.accept()[0] as sock:
        header, buffers = bytearray(HEADER), slabs(target is not None)
        for number in range(messages):
            slab = buffers[number % len(buffers)]
            have = sock.recvmsg_into([header, slab], 0, socket.MSG_WAITALL)[0]
            if have < HEADER + MESSAGE:
                raise EOFError
            if target is not None:
                os.pwrite(target, slab, number * MESSAGE)
        sock.sendall(b"!")


def send(sock: socket.socket, messages: int, source: int | None) -> None:
    header, buffers = bytes(HEADER), slabs(source is not None)
    for number in range(messages):
        slab = buffers[number % len(buffers)]
        if source is not None:
            os.preadv(source, [slab], number * MESSAGE)
        sent = sock.sendmsg([header, slab])
        if sent < HEADER + MESSAGE:
            sock.sendall((header + slab)[sent:])
    if sock.recv(1) != b"!":
        raise PerfError("the receiver of the TCP stream has failed")


def rate(size: int, source: Path | None = None, target: Path | None = None) -> float:
    """MB/s for so many bytes, read from and written to these files if they are given."""
    messages = size // MESSAGE
    with socket.create_server(("127.0.0.1", 0)) as listener:
        flags = os.O_RDWR | os.O_CLOEXEC
        files = [None if path is None else os.open(path, flags) for path in (source, target)]
        child = os.fork()
        if child == 0:
            code = 1
            try:
                receive(listener, messages, files[1])
                code = 0
            finally:
                os._exit(code)
        try:
            with socket.create_connection(listener.getsockname(), 60) as sock:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                began = time.monotonic()
                send(sock, messages, files[0])
                taken = time.monotonic() - began
        finally:
            os.waitpid(child, 0)
            for file in files:
                if file is not None:
                    os.close(file)
    return messages * MESSAGE / 1e6 / taken


if __name__ == "__main__":
    print(f"{rate(1024 * MIB):.0f} MB/s")
