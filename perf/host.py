"""The machine and the programs that a result is of."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from pathlib import Path

from perf.errors import ROOT

PROGRAMS = {
    "fio": ["fio", "--version"],
    "nbdkit": ["nbdkit", "--version"],
    "qemu": ["qemu-nbd", "--version"],
}


def host() -> dict[str, str]:
    found = {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "processor": f"{len(os.sched_getaffinity(0))} x {processor()}",
        "memory": f"{round(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / (1 << 30))} GiB",
        "kernel": platform.release(),
        "load": f"{os.getloadavg()[0]:.1f} at the start",
        "commit": said(["git", "-C", str(ROOT), "describe", "--always", "--dirty"]),
    }
    for name, command in PROGRAMS.items():
        match = re.search(r"\d+\.\d+(\.\d+)?", said(command))
        found[name] = match[0] if match else "not there"
    return found


def processor() -> str:
    match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return match[1] if match else platform.machine()


def said(command: list[str]) -> str:
    """The first line of a program's output; nothing when there is no such program."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except OSError:
        return ""
    return done.stdout.strip().split("\n")[0]
