"""What this machine can do, so that only what can be asked for is."""

from __future__ import annotations

import os
from functools import cache

from tests import faultdisk, tools


@cache
def has(feature: str) -> bool:
    """An empty name: nothing is needed."""
    if not feature:
        return True
    if feature == "disk":  # tests/faultdisk.py
        return faultdisk.missing() is None and tools.find("cc") is not None
    if feature == "net":  # network namespaces
        return os.geteuid() == 0 and all(tools.find(tool) for tool in ("ip", "tc", "nsenter"))
    raise AssertionError(f"nobody knows of {feature}")
