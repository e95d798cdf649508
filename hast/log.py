"""Where messages go: stderr in the foreground, syslog in the background; all processes of hastd inherit it.

Invariants:
- Modules write with logging.getLogger(__name__); only this one decides where to and how it looks.
- Writing a message never waits: the log may lie on a device that waits for the very process that writes. What
  cannot be written at once is dropped, counted, and the number said with the next message that gets through.
- One message is one line; its text is that of the error, without the traceback, which -d adds.
- No descriptor is kept open for syslog, so that a fork that closes descriptors cannot break it.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import sys
import time
from pathlib import Path

PROGRAM = "hastd"
SYSLOG_SOCKETS = ("/dev/log", "/var/run/log")  # Linux, FreeBSD
FACILITY = 3 << 3  # LOG_DAEMON
MAX_LINE = 4000  # bytes; no more than one write to a pipe takes at once (PIPE_BUF is 4096 on Linux)

# Severities of RFC 5424.
_SEVERITIES = (
    (logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (0, 7),
)  # fmt: skip


def setup(foreground: bool, debug: int, stderr: int = 2) -> None:
    """Send all messages of this process, and of those it forks, to stderr or to syslog.

    `debug` counts the -d options: from 1 on, debug messages, times and tracebacks are shown, from 2 on those
    of libraries as well. Called again, it replaces what was set before.
    """
    handler: _Handler = _StderrHandler(stderr) if foreground else _SyslogHandler()
    handler.setFormatter(_Formatter(debug > 0, foreground))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.DEBUG if debug > 1 else logging.WARNING)
    logging.getLogger("hast").setLevel(logging.DEBUG if debug > 0 else logging.INFO)


class _Formatter(logging.Formatter):
    """`hastd: message` on stderr, just the message for syslog; with details when debugging."""

    def __init__(self, details: bool, foreground: bool) -> None:
        super().__init__()
        self.details = details
        self.foreground = foreground

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            text += self._exception(record)
        text = " | ".join(part for part in text.splitlines() if part.strip())
        if not self.foreground:
            return text
        if not self.details:
            return f"{PROGRAM}: {text}"
        at = time.strftime("%H:%M:%S", time.localtime(record.created))
        level = record.levelname.lower()
        return f"{PROGRAM}[{os.getpid()}] {at}.{int(record.msecs):03d} {level}: {text}"

    def _exception(self, record: logging.LogRecord) -> str:
        assert record.exc_info is not None
        error = record.exc_info[1]
        assert error is not None
        if self.details:
            return "\n" + self.formatException(record.exc_info)
        where = ""
        if error.__traceback__ is not None:
            last = error.__traceback__
            while last.tb_next is not None:
                last = last.tb_next
            where = f" ({Path(last.tb_frame.f_code.co_filename).name}:{last.tb_lineno})"
        return f": {type(error).__name__}: {error}{where}"


class _Handler(logging.Handler):
    """Writes lines, and says how many it had to drop."""

    dropped = 0

    def emit(self, record: logging.LogRecord) -> None:
        line = self._line(record)
        if self.dropped:
            note = f"{self.dropped} messages were dropped here: the log could not take them in time"
            lost = logging.LogRecord(__name__, logging.WARNING, "", 0, note, None, None)
            if not self.write(lost, self.format(lost)):
                self.dropped += 1
                return
            self.dropped = 0
        if not self.write(record, line):
            self.dropped += 1

    def _line(self, record: logging.LogRecord) -> str:
        try:
            return self.format(record)
        except Exception as error:  # arguments that do not fit the text: say it rather than fail the caller
            return f"{record.msg} {record.args} (cannot be formatted: {error})"

    def write(self, record: logging.LogRecord, line: str) -> bool:
        """Write one line without waiting; whether it was taken."""
        raise NotImplementedError


def _bounded(line: str) -> bytes:
    data = line.encode("utf-8", "backslashreplace")
    return data if len(data) <= MAX_LINE else data[: MAX_LINE - 3] + b"..."


class _StderrHandler(_Handler):
    def __init__(self, fd: int) -> None:
        super().__init__()
        self.fd = fd

    def write(self, record: logging.LogRecord, line: str) -> bool:
        # O_NONBLOCK would change the terminal for all who share it. poll says that PIPE_BUF bytes fit.
        poll = select.poll()
        poll.register(self.fd, select.POLLOUT)
        try:
            if not poll.poll(0):
                return False
            os.write(self.fd, _bounded(line) + b"\n")
        except OSError:  # nobody reads any more
            return False
        return True


class _SyslogHandler(_Handler):
    """RFC 3164 datagrams, as the C library's syslog() sends them, but never waiting."""

    def write(self, record: logging.LogRecord, line: str) -> bool:
        level = next(severity for least, severity in _SEVERITIES if record.levelno >= least)
        at = time.strftime("%b %e %H:%M:%S", time.localtime(record.created))
        data = _bounded(f"<{FACILITY | level}>{at} {PROGRAM}[{os.getpid()}]: {line}")
        for path in SYSLOG_SOCKETS:
            try:
                with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                    sock.setblocking(False)
                    sock.sendto(data, path)
            except FileNotFoundError:
                continue
            except OSError:
                return False
            return True
        return False


def to_null() -> None:
    """Let go of the terminal: standard input, output and error become /dev/null."""
    null = os.open(os.devnull, os.O_RDWR)
    sys.stdout.flush()
    sys.stderr.flush()
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    if null > 2:
        os.close(null)
