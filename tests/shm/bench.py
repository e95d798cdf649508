"""Producers and a consumer as real processes over tests/native/ring_pump.c, which may be killed and replaced."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from tests.shm.native import FFI, NATIVE, compile_native

LOST_WAKE, WRONG_ENTRY, CORRUPT, GAP, SYSTEM_CALL = 10, 11, 12, 13, 14  # enum bench_result
MAX_BATCH = 64
DEADLINE = 90.0  # seconds for anything at all; each process also has an alarm
WAIT_MS = 30000  # of one wait in C: longer than any stop that the test makes
PR_SET_PDEATHSIG = 1

LIBC = ctypes.CDLL(None, use_errno=True)


def load(where: Path, *flags: str) -> ctypes.CDLL:
    """The pump as a library, compiled into a directory."""
    sources = [NATIVE / "ring_pump.c", FFI / "ring.c", FFI / "doorbell.c"]
    lib = ctypes.CDLL(str(compile_native(where / "ring_pump.so", sources, "-O2", "-fPIC", "-shared", *flags)))
    u32, u64, pointer = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_void_p
    lib.bench_size.argtypes, lib.bench_size.restype = [u32, u32], ctypes.c_size_t
    lib.bench_init.argtypes = [pointer, u32, u32, u32, u64, u32, ctypes.c_int, ctypes.POINTER(ctypes.c_int)]
    lib.bench_init.restype = None
    lib.bench_produce.argtypes = [pointer, u32, u32, ctypes.c_int]
    lib.bench_consume.argtypes = [pointer, u32]
    lib.bench_die_before_wake.argtypes, lib.bench_die_before_wake.restype = [pointer, u32], None
    lib.bench_damage_tail.argtypes, lib.bench_damage_tail.restype = [pointer, u32, u32], None
    for name in ("bench_stop", "bench_close"):
        getattr(lib, name).argtypes = [pointer]
    for name in ("bench_pushed", "bench_processed", "bench_lost"):
        getattr(lib, name).argtypes, getattr(lib, name).restype = [pointer, u32], u64
    lib.bench_waits.argtypes, lib.bench_waits.restype = [pointer], u64
    lib.bench_used.argtypes, lib.bench_used.restype = [pointer, u32], u32
    lib.bench_sleeping.argtypes, lib.bench_sleeping.restype = [pointer], u32
    return lib


def until(condition: Callable[[], bool], what: str) -> None:
    """Waits for a condition; fails with `what` at the deadline."""
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, f"timed out: {what}"
        time.sleep(0.0002)


class Bench:
    """A consumer and its producers in memory that they inherit. Use as a context manager: nobody outlives it."""

    def __init__(self, lib: ctypes.CDLL, lanes: int, entries: int, target: int, eventfd: bool, wait_ms: int = WAIT_MS):
        self.lib, self.lanes, self.target = lib, lanes, target
        self.memory = mmap.mmap(-1, lib.bench_size(lanes, entries))
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        flags = os.EFD_NONBLOCK | os.EFD_CLOEXEC
        self.fds = [os.eventfd(0, flags) if eventfd else -1 for _ in range(lanes + 1)]
        space = (ctypes.c_int * 4)(*self.fds[1:])
        # Both indices wrap early on.
        lib.bench_init(self.base, lanes, entries, 2**32 - 5000, target, wait_ms, self.fds[0], space)
        self.children: dict[int, str] = {}

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *exc: object) -> None:
        for pid in self.children:
            os.kill(pid, signal.SIGKILL)
        for pid in self.children:
            os.waitpid(pid, 0)
        for fd in self.fds:
            if fd >= 0:
                os.close(fd)

    def spawn(self, name: str, work: Callable[[], int]) -> int:
        """A child that ends with what work() returns, with its parent, or at its alarm."""
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(int(DEADLINE) + 10)
                LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
                code = work() if os.getppid() == parent else 98
            finally:
                os._exit(code)
        self.children[pid] = name
        return pid

    def consumer(self, seed: int) -> int:
        return self.spawn("consumer", functools.partial(self.lib.bench_consume, self.base, seed))

    def producer(self, lane: int, seed: int, successor: bool = False) -> int:
        work = functools.partial(self.lib.bench_produce, self.base, lane, seed, int(successor))
        return self.spawn(f"producer {lane}", work)

    def dying_producer(self, lane: int) -> int:
        def work() -> int:
            self.lib.bench_die_before_wake(self.base, lane)
            return 0

        return self.spawn(f"dying producer {lane}", work)

    def reap(self, pid: int) -> int:
        """The exit code of a child, -9 when it was killed; fails at the deadline."""
        status: list[int] = []

        def ended() -> bool:
            done, value = os.waitpid(pid, os.WNOHANG)
            if done:
                status.append(os.waitstatus_to_exitcode(value))
            return bool(done)

        until(ended, f"{self.children[pid]} does not end; {self.state()}")
        del self.children[pid]
        return status[0]

    def kill(self, pid: int) -> bool:
        """kill -9; whether it was still there to be killed (it may have ended by itself with code 0)."""
        os.kill(pid, signal.SIGKILL)
        code = self.reap(pid)
        assert code in (0, -signal.SIGKILL), f"ended with {code}; {self.state()}"
        return code != 0

    def close(self) -> None:
        assert self.lib.bench_close(self.base) == 0

    def stop(self) -> None:
        assert self.lib.bench_stop(self.base) == 0

    def pushed(self, lane: int) -> int:
        return int(self.lib.bench_pushed(self.base, lane))

    def processed(self, lane: int) -> int:
        return int(self.lib.bench_processed(self.base, lane))

    def lost(self, lane: int) -> int:
        return int(self.lib.bench_lost(self.base, lane))

    def used(self, lane: int) -> int:
        return int(self.lib.bench_used(self.base, lane))

    def waits(self) -> int:
        return int(self.lib.bench_waits(self.base))

    def sleeping(self) -> bool:
        return bool(self.lib.bench_sleeping(self.base))

    def total(self) -> int:
        return sum(self.processed(lane) for lane in range(self.lanes))

    def state(self) -> str:
        return "; ".join(
            f"lane {n}: pushed {self.pushed(n)} processed {self.processed(n)} lost {self.lost(n)} used {self.used(n)}"
            for n in range(self.lanes)
        )
