"""The log: one line for each message, and never a wait."""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from hast import log


@pytest.fixture(autouse=True)
def restore_logging() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("hast")
    handlers, levels = root.handlers[:], (root.level, ours.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    os.set_blocking(ends[0], False)
    yield ends
    for end in ends:
        os.close(end)


LOG = logging.getLogger("hast.test")


def test_foreground_line(pipe: tuple[int, int]) -> None:
    log.setup(True, 0, pipe[1])
    LOG.debug("not shown")
    LOG.info("data: role changed to %s", "primary")
    logging.getLogger("asyncio").info("not shown")
    logging.getLogger("asyncio").warning("shown")
    assert os.read(pipe[0], 4096) == b"hastd: data: role changed to primary\nhastd: shown\n"


def test_debug_line_has_details(pipe: tuple[int, int]) -> None:
    log.setup(True, 1, pipe[1])
    LOG.debug("shown")
    line = os.read(pipe[0], 4096).decode()
    assert re.fullmatch(rf"hastd\[{os.getpid()}\] \d\d:\d\d:\d\d\.\d\d\d debug: shown\n", line)


def test_exception_is_one_line(pipe: tuple[int, int]) -> None:
    log.setup(True, 0, pipe[1])
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        LOG.exception("data: it failed")
    line = os.read(pipe[0], 4096).decode()
    assert re.fullmatch(r"hastd: data: it failed: ValueError: first \| second \(test_log.py:\d+\)\n", line)


def test_arguments_that_do_not_fit_fail_nobody(pipe: tuple[int, int]) -> None:
    log.setup(True, 0, pipe[1])
    LOG.error("%d pieces", "many")
    assert b"%d pieces ('many',) (cannot be formatted" in os.read(pipe[0], 4096)


def test_long_message_is_cut(pipe: tuple[int, int]) -> None:
    log.setup(True, 0, pipe[1])
    LOG.error("x" * 100_000)
    line = os.read(pipe[0], 100_000)
    assert len(line) == log.MAX_LINE + 1 and line.endswith(b"x...\n")


def test_reader_that_has_stopped_costs_messages_and_no_time(pipe: tuple[int, int]) -> None:
    log.setup(True, 0, pipe[1])
    for _ in range(1000):  # a pipe holds 64 KiB
        LOG.error("x" * 1000)
    taken = 0
    try:
        while data := os.read(pipe[0], 65536):
            taken += data.count(b"\n")
    except BlockingIOError:
        pass
    assert 0 < taken < 1000
    LOG.error("again")
    lines = os.read(pipe[0], 65536).splitlines()
    assert lines[0].startswith(b"hastd: %d messages were dropped" % (1000 - taken))
    assert lines[1] == b"hastd: again"


def test_reader_that_is_gone_fails_nobody() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    log.setup(True, 0, writing)
    LOG.error("nobody hears")
    os.close(writing)


def test_syslog_datagram(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(path))
        server.setblocking(False)
        monkeypatch.setattr(log, "SYSLOG_SOCKETS", (str(tmp_path / "absent"), str(path)))
        log.setup(False, 0)
        LOG.error("data: component %s cannot be read", "/dev/x")
        LOG.warning("careful")
        first, second = server.recv(4096).decode(), server.recv(4096).decode()
        assert re.fullmatch(
            rf"<27>\w\w\w [ \d]\d \d\d:\d\d:\d\d hastd\[{os.getpid()}\]: data: component /dev/x cannot be read", first
        )
        assert first[:4] == "<27>" and second[:4] == "<28>"
        for _ in range(5000):  # a syslogd that has stopped
            LOG.info("x")
        while True:
            try:
                server.recv(4096)
            except BlockingIOError:
                break
        LOG.info("again")
        assert b"messages were dropped" in server.recv(4096)
        assert server.recv(4096).endswith(b": again")
    path.unlink()
    LOG.error("no syslogd is no error")
