"""The kernel's word that processors wake quickly while a stage has work: hast/ffi/awake.h says when it is asked for.

/dev/cpu_dma_latency takes the longest time, in microseconds, that a processor may take to wake, for as long as it is
open (Documentation/power/pm_qos_interface.rst of Linux). Only root may open it, and a machine whose processors never
sleep has none: all works without it, only slower while there is little to do.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)

DEVICE = Path("/dev/cpu_dma_latency")
GOVERNOR = Path("/sys/devices/system/cpu/cpuidle/current_governor")

# A processor's lightest sleep takes a microsecond or two to end, and may stay.
LIMIT_US = 2
# In a virtual machine every sleep goes through the hypervisor, whatever the kernel says of it; the governor of such
# machines does without any at 0 only.
GUEST_LIMIT_US = 0


def limit() -> int:
    """The longest time to wake, us, that helps on this machine."""
    try:
        guest = GOVERNOR.read_text().strip() == "haltpoll"
    except OSError:
        guest = False
    return GUEST_LIMIT_US if guest else LIMIT_US


class Keeper:
    """The setting `keepawake` of a stage. use: gives the pump a descriptor and a limit, which it uses from then on."""

    def __init__(self, resource: str, use: Callable[[int, int], None]) -> None:
        self._resource, self._use = resource, use
        self._fd = -1

    def set(self, on: bool) -> None:
        """From now on; what the kernel was asked for is taken back when it is off."""
        if on == (self._fd >= 0):
            return
        before, self._fd = self._fd, open_device(self._resource) if on else -1
        self._use(self._fd, limit())
        if before >= 0:
            os.close(before)


def open_device(resource: str) -> int:
    """A descriptor to ask through, or -1 where that cannot be done. Nothing is asked yet."""
    try:
        return os.open(DEVICE, os.O_WRONLY | os.O_CLOEXEC)
    except OSError as error:
        log.debug("%s: processors may sleep while it has work: %s: %s", resource, DEVICE, error.strerror)
        return -1
