"""Forks a stage from its worker, and tells when it has ended.

Invariants:
- The worker is single-threaded, so the child is a clean copy of it: nothing is imported or opened to start one.
- The child never returns into the worker's code: it ends with os._exit().
- A stage does not outlive its worker (PR_SET_PDEATHSIG, and end of file on its channel). The disk stage ends what it
  has begun before that, which the kernel does in any case: a flush among it that fails is told to nobody else.
- Its end is known from a pidfd: no signal handler, no polling, no confusion with a reused pid.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from setproctitle import setproctitle

from hast.channel import Channel
from hast.errors import HastError, refusal
from hast.stages.context import DISK, StageContext

log = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1

Entry = Callable[[StageContext], int]


@dataclass
class Child:
    """A running child process. `pidfd` is readable when it has ended; `status` is its wait status then."""

    pid: int
    pidfd: int
    channel: Channel | None
    name: str
    status: int | None = None

    def reap(self) -> str:
        """Collect it after its end; how it ended, in words. Blocks until then."""
        if self.status is None:
            _, self.status = os.waitpid(self.pid, 0)
            os.close(self.pidfd)
            if self.channel is not None:
                self.channel.close()
        return ended(self.status)

    @property
    def killed(self) -> bool:
        """Whether a signal has ended it; once it was collected."""
        return self.status is not None and os.WIFSIGNALED(self.status)

    @property
    def may_live(self) -> bool:
        """Whether another one may do what this one could not; once it was collected."""
        return self.killed or (self.status is not None and os.WEXITSTATUS(self.status) == os.EX_TEMPFAIL)

    def kill(self) -> None:
        """SIGKILL, if it is still there."""
        self.send(signal.SIGKILL)

    def send(self, number: signal.Signals) -> None:
        """This signal, if it is still there."""
        if self.status is None:
            os.kill(self.pid, number)


def in_kernels_hands(pid: int) -> bool:
    """Whether it waits for a disk, or what else cannot be interrupted. SIGKILL ends it no sooner than that lets it go,
    and then it can tell nobody that a flush has failed."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "D"
    except (OSError, IndexError):
        return False


def ended(status: int) -> str:
    """A wait status in words: "exited with code 70", "was killed by signal 9 (SIGKILL)"."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return f"was killed by signal {number} ({signal.Signals(number).name})"
    return f"exited with code {os.waitstatus_to_exitcode(status)}"


def fork(
    title: str,
    keep: set[int],
    body: Callable[[], int],
    channel: Channel | None = None,
    at_parents_end: signal.Signals = signal.SIGKILL,
) -> Child:
    """Fork a child that is titled `title`, keeps only the descriptors `keep`, and exits with body()'s result.
    at_parents_end: the signal that it gets when its parent has ended.

    Raises TemporaryError when the system has no process or descriptor left, SystemCallError.
    """
    parent = os.getpid()
    try:
        pid = os.fork()
    except OSError as error:
        raise refusal(f"cannot start {title}: {error.strerror}", error.errno) from error
    if pid == 0:
        _child(title, keep, body, parent, at_parents_end)
    try:
        return Child(pid, os.pidfd_open(pid), channel, title)
    except OSError as error:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise refusal(f"cannot watch {title}: {error.strerror}", error.errno) from error


def start_stage(context: StageContext, entry: Entry, channel: Channel) -> Child:
    """Fork the stage; `channel` is the worker's end, context.control the stage's own, which is closed here."""


    def body() -> int:
        # As SIGINT, it may be sent to everybody (`systemctl kill`, the end of the machine).
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return entry(context)

    # The disk stage sees the end of file, also when somebody has stopped it.
    number = signal.SIGCONT if context.stage == DISK else signal.SIGKILL
    child = fork(context.title, context.keep_fds(), body, channel, number)
    context.control.close()
    return child


def _child(
    title: str, keep: set[int], body: Callable[[], int], parent: int, at_parents_end: signal.Signals
) -> None:
    code = os.EX_SOFTWARE
    try:
        _prepare(keep, parent, at_parents_end)
        setproctitle(title)
        code = body()
    except HastError as error:
        log.error("%s", error)
        code = error.exit_code
    except BaseException:
        log.exception("%s: unexpected error", title)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _prepare(keep: set[int], parent: int, at_parents_end: signal.Signals) -> None:
    """Undo what belongs to the worker: signal handlers, its event loop's descriptors, its other channels."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, at_parents_end, 0, 0, 0) != 0 or os.getppid() != parent:
        os._exit(os.EX_OSERR)
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    # A terminal sends SIGINT to everybody; who ends when is the worker's decision.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for handler in logging.getLogger().handlers:
        keep = keep | _log_fds(handler)
    close_except({0, 1, 2} | keep)


def _log_fds(handler: logging.Handler) -> set[int]:
    sock = getattr(handler, "socket", None)  # logging.handlers.SysLogHandler
    return {sock.fileno()} if sock is not None and sock.fileno() >= 0 else set()


def close_except(keep: set[int]) -> None:
    """Close every descriptor that is not in `keep`."""
    low = 0
    for fd in sorted(keep):
        # An empty range that starts at 0 must not get there: os.closerange(0, 0) closes everything on Linux.
        if low < fd:
            os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, os.sysconf("SC_OPEN_MAX"))
