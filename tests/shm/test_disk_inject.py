"""The disk pump under strace, which makes system calls fail or fall short and shows which ones were made.

A call that is made to fall short is not executed at all: what it claims to have done is missing afterwards, which shows
where the pump went on. (io_uring makes no such calls: its faults are in test_disk_faults.py.)
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.shm import diskrig
from tests.shm.diskrig import DATA_OFFSET, DATASIZE, DELETE, DURABLE, FLUSH, MAP, NOHOLE, READ, WRITE, ZERO, Rig

OLD, NEW = b"\x0d", b"\x0e"
CALLS = "pread64,pwrite64,fallocate,fdatasync"


@pytest.fixture(scope="module", autouse=True)
def strace() -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    probe = ["strace", "-f", "-o", "/dev/null", "-e", "inject=fdatasync:error=EIO", "true"]
    if subprocess.run(probe, capture_output=True).returncode != 0:
        pytest.skip("strace cannot trace here")


class Traced:
    """A rig under strace, and what strace has seen since."""

    def __init__(self, rig: Rig, log: Path, path: Path) -> None:
        self.rig = rig
        self.log = log
        self.path = path

    def end(self) -> list[str]:
        """Stop it. The calls on the component, in order, as "name" or "name=error"."""
        assert self.rig.stop() == 0
        calls = []
        for line in self.log.read_text().splitlines():
            if found := re.search(r"(\w+)\((?:\d+|\d+, .*)\) += (-?\d+)(?: (E\w+))?", line):
                name, _, error = found.groups()
                calls.append(f"{name}={error}" if error else name)
        return calls


@pytest.fixture(params=["inline", "threads"])
def traced(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Traced]]:
    with ExitStack() as stack:

        def begin(*inject: str) -> Traced:
            path = tmp_path / "component"
            path.write_bytes(OLD * (DATA_OFFSET + DATASIZE))
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            log = tmp_path / "trace"
            # -P: only calls on the component, so that Python's own do not count.
            prefix = ["strace", "-f", "-o", str(log), "-P", str(path), "-e", f"trace={CALLS}"]
            for one in inject:
                prefix += ["-e", f"inject={one}"]
            # One thread: the calls are in order.
            rig = diskrig.start(fd, request.param, prefix=prefix, depth=1)
            stack.callback(rig.close)
            return Traced(rig, log, path)

        yield begin


def test_what_reaches_fdatasync(traced: Callable[..., Traced]) -> None:
    run = traced()
    assert run.rig.error(WRITE, 0, data=NEW * 512) == 0
    assert run.rig.error(FLUSH) == 0
    assert run.rig.error(MAP, 0, data=NEW * 512) == 0
    assert run.rig.error(MAP, 0, data=NEW * 512, flags=DURABLE) == 0
    assert run.rig.error(READ, 0, 512) == 0
    assert run.end() == ["pwrite64", "fdatasync", "pwrite64", "pwrite64", "fdatasync", "pread64"]


@pytest.mark.parametrize("error", ["EINTR", "EAGAIN"])
def test_interrupted_calls_are_made_again(traced: Callable[..., Traced], error: str) -> None:
    run = traced(f"{CALLS}:error={error}:when=1..3")
    rig = run.rig
    assert rig.error(WRITE, 0, data=NEW * 512) == 0
    assert rig.error(WRITE, 512, 512, flags=ZERO) == 0
    assert rig.do(READ, 0, 1024).data == NEW * 512 + bytes(512)
    assert rig.error(FLUSH) == 0
    again = [f"pwrite64={error}"] * 3
    calls = run.end()
    assert calls[:4] == [*again, "pwrite64"]
    for name in CALLS.split(","):
        assert calls.count(f"{name}={error}") == 3
        assert calls.count(name) == 1


def test_one_that_is_never_ready_fails_in_the_end(traced: Callable[..., Traced]) -> None:
    run = traced("fdatasync:error=EINTR")
    assert run.rig.error(FLUSH) == errno.EIO
    assert run.rig.error(READ, 0, 512) == 0


def test_short_write_is_continued(traced: Callable[..., Traced]) -> None:
    run = traced("pwrite64:retval=512:when=1+2")
    assert run.rig.error(WRITE, 0, data=NEW * 4096) == 0
    assert run.rig.error(MAP, 0, data=NEW * 4096, flags=DURABLE) == 0
    assert run.end() == ["pwrite64", "pwrite64", "pwrite64", "pwrite64", "fdatasync"]
    content = run.path.read_bytes()
    assert content[DATA_OFFSET : DATA_OFFSET + 4096] == OLD * 512 + NEW * 3584
    assert content[4096 : 4096 + 4096] == OLD * 512 + NEW * 3584


def test_short_read_is_continued(traced: Callable[..., Traced]) -> None:
    run = traced("pread64:retval=1024:when=1")
    read = run.rig.do(READ, 0, 4096)
    # 0xee: what the slab held before, where the call that was not made says it has put data.
    assert (read.error, read.data) == (0, b"\xee" * 1024 + OLD * 3072)


def test_short_write_of_zeros_is_continued(traced: Callable[..., Traced]) -> None:
    run = traced("fallocate:error=EOPNOTSUPP", "pwrite64:retval=512:when=1")
    assert run.rig.error(WRITE, 0, 1 << 20, flags=ZERO) == 0
    assert run.path.read_bytes()[DATA_OFFSET:][: (1 << 20) + 1] == OLD * 512 + bytes((1 << 20) - 512) + OLD


def test_nothing_transferred_is_an_error(traced: Callable[..., Traced]) -> None:
    run = traced("pread64:retval=0", "pwrite64:retval=0")
    assert run.rig.error(READ, 0, 4096) == errno.EIO
    assert run.rig.error(WRITE, 0, data=NEW * 4096) == errno.EIO
    assert run.rig.error(MAP, 0, data=NEW * 4096, flags=DURABLE) == errno.EIO
    assert run.end() == ["pread64", "pwrite64", "pwrite64"], "a map that was not written was flushed"


@pytest.mark.parametrize("error", ["EIO", "ENOSPC", "EDQUOT", "EROFS"])
def test_errors_are_passed_on(traced: Callable[..., Traced], error: str) -> None:
    run = traced(f"pread64,pwrite64,fallocate:error={error}")
    number = getattr(errno, error)
    assert run.rig.error(READ, 0, 4096) == number
    assert run.rig.error(WRITE, 0, data=NEW * 4096) == number
    assert run.rig.error(WRITE, 0, 4096, flags=ZERO) == number
    assert run.rig.error(DELETE, 0, 4096) == number
    assert run.rig.error(MAP, 0, data=NEW * 512) == number
    assert run.rig.error(FLUSH) == 0


def test_failed_fdatasync_fails_all_later_ones(traced: Callable[..., Traced]) -> None:
    run = traced("fdatasync:error=EIO:when=2")
    assert run.rig.error(FLUSH) == 0
    assert run.rig.error(MAP, 0, data=NEW * 512, flags=DURABLE) == errno.EIO
    assert run.rig.error(FLUSH) == errno.EIO
    assert run.rig.error(WRITE, 0, data=NEW * 512) == 0
    assert run.rig.error(MAP, 0, data=NEW * 512) == 0


def test_without_holes_zeros_are_written(traced: Callable[..., Traced]) -> None:
    run = traced("fallocate:error=EOPNOTSUPP")
    assert run.rig.error(WRITE, 0, 4096, flags=ZERO) == 0
    assert run.rig.error(WRITE, 4096, 4096, flags=ZERO | NOHOLE) == 0
    for _ in range(2):
        assert run.rig.error(DELETE, 65536, 4096) == 0
    content = run.path.read_bytes()[DATA_OFFSET:]
    assert content[: 8192 + 1] == bytes(8192) + OLD
    assert content[65536:][: 4096 + 1] == bytes(4096) + OLD
    # Both ways were tried once, then never again.
    assert run.end() == ["fallocate=EOPNOTSUPP"] * 2 + ["pwrite64"] * 4


def test_second_best_way_to_zero(traced: Callable[..., Traced]) -> None:
    run = traced("fallocate:error=EOPNOTSUPP:when=1")
    assert run.rig.error(DELETE, 0, 4096) == 0
    assert run.rig.error(WRITE, 8192, 4096, flags=ZERO | NOHOLE) == 0
    assert run.rig.error(WRITE, 16384, 4096, flags=ZERO) == 0
    assert run.end() == ["fallocate=EOPNOTSUPP"] + ["fallocate"] * 3
    zeros = bytes(4096)
    assert run.path.read_bytes()[DATA_OFFSET:][:20480] == zeros + OLD * 4096 + zeros + OLD * 4096 + zeros


def test_flushes_share_an_fdatasync(traced: Callable[..., Traced]) -> None:
    """While one is under way those that come wait for the next."""
    run = traced()
    slots = [run.rig.fill(FLUSH) for _ in range(16)]
    run.rig.push(slots)
    assert {done.error for done in run.rig.collect(len(slots)).values()} == {0}
    assert run.end() == ["fdatasync"] * 2
