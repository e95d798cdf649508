"""Going to the background, so that the one who started hastd learns whether it worked.

Invariants:
- The starter ends only when the daemon has said that it runs (exit code 0), that it does not (its exit
  code; the reason went to the starter's stderr), or has died.
- The daemon has no terminal and no parent that waits for it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from hast import log


def daemonise() -> Callable[[int], None]:
    """Fork twice. Returns in the daemon only: a function that lets the starter end with an exit code.

    Until that is called the daemon has the starter's stderr; afterwards it has /dev/null. Raises OSError.
    """
    reading, writing = os.pipe()
    if os.fork() != 0:
        os.close(writing)
        _starter(reading)
    os.close(reading)
    os.setsid()
    if os.fork() != 0:
        os._exit(os.EX_OK)  # the daemon leads no session, so it can never get a terminal
    os.chdir("/")

    def report(code: int) -> None:
        nonlocal writing
        if writing >= 0:
            if code == os.EX_OK:
                log.to_null()
            try:
                os.write(writing, bytes([code]))
            except BrokenPipeError:
                pass  # the starter did not wait
            os.close(writing)
            writing = -1

    return report


def _starter(reading: int) -> None:
    """Wait for the daemon's word, and end with it."""
    try:
        word = os.read(reading, 1)
    except KeyboardInterrupt:
        os._exit(130)
    if not word:
        sys.stderr.write("hastd: it died while it was starting\n")
        sys.stderr.flush()
    os._exit(word[0] if word else os.EX_SOFTWARE)
