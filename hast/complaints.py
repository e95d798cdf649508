"""Warnings that anybody outside can cause: said, but never so often that they bury the log or fill a disk.

Invariant: at most LINES lines in PERIOD seconds; how many were left out is said with the next one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

LINES = 20
PERIOD = 10.0  # seconds


class Complaints:
    """Warnings of one source to `logger`."""

    def __init__(self, logger: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._logger = logger
        self._clock = clock
        self._began = clock()
        self._lines = 0
        self._left_out = 0

    def warning(self, text: str, *args: object) -> None:
        """One line, if there were not too many."""
        now = self._clock()
        if now - self._began >= PERIOD:
            self._began, self._lines = now, 0
        if self._lines >= LINES:
            self._left_out += 1
            return
        self._lines += 1
        if self._left_out:
            self._logger.warning("%d more warnings like the next one were left out", self._left_out)
            self._left_out = 0
        self._logger.warning(text, *args)
