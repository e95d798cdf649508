"""A target that is wrong about what begins with "HA": does the runner find and report it?"""

from __future__ import annotations

from hast.nv import roundup8


def check(data: bytes) -> None:
    roundup8(len(data))
    if data[:1] == b"H" and data[1:2] == b"A":
        raise AssertionError("the mistake that was put in")
