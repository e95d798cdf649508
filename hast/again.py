"""Starting hastd anew in its own process: the same command line, the same process id, whatever code is installed now.

Invariants:
- Before anything ends, the new code has been run once and has understood the configuration (`hastd -t`).
- Signals that come between the old code and the new are blocked until the new one can take them: it ends then, or reads
  its configuration again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys

from hast.errors import SystemCallError, TemporaryError

CHECK_SECONDS = 20.0
MARK = "HAST_RESTARTED"  # in the environment of the new code: it is in the background already, if it is to be
DIRECTORY = os.getcwd()  # the command line may have relative paths  # noqa: PTH109


def command() -> list[str]:
    """How this process was started."""
    return [sys.executable, *sys.orig_argv[1:]]


async def check() -> None:
    """Raises TemporaryError, with its reason, when a new hastd would not start."""
    pipe, null = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
    try:
        process = await asyncio.create_subprocess_exec(
            *command(), "-t", stdin=null, stdout=null, stderr=pipe, cwd=DIRECTORY
        )
    except OSError as error:
        raise TemporaryError(f"cannot start {sys.executable}: {error.strerror}") from error
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            _, said = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise TemporaryError(f"a new hastd says nothing for {CHECK_SECONDS:g} s") from None
    if process.returncode != 0:
        lines = said.decode(errors="replace").splitlines() or [f"exit status {process.returncode}"]
        raise TemporaryError(f"a new hastd does not start: {lines[-1].removeprefix('hastd: ')}")


def execute() -> None:
    """Become the new hastd. Returns never, or raises SystemCallError."""
    with contextlib.suppress(OSError):
        os.chdir(DIRECTORY)
    try:
        os.execve(sys.executable, command(), os.environ | {MARK: "1"})
    except OSError as error:
        raise SystemCallError(f"cannot start {sys.executable}: {error.strerror}") from error


def was_executed() -> bool:
    """Whether this process is one that was started anew; asked once, children are not to know."""
    return os.environ.pop(MARK, None) is not None
