"""What ends a measurement: an error that is told in a sentence, and a tool that is not there, which is no error."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class PerfError(Exception):
    """A measurement failed: what was being done, and what went wrong."""


class MissingError(PerfError):
    """Something that a system needs is not on this machine; the others can be measured without it."""


def need(*tools: str) -> None:
    """MissingError, with the package to install, unless all these programs are there."""
    for tool in tools:
        if shutil.which(tool) is None:
            table = (ROOT / "tools" / "requirements").read_text()
            row = re.search(rf"^\w+ +{re.escape(tool)} +(\S+)", table, re.MULTILINE)
            package = f" (Debian package {row[1]})" if row else ""
            raise MissingError(f"{tool} is not installed{package}")
