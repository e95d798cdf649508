"""Sizes as people write and read them: FreeBSD's expand_number(3) and humanize_number(3)."""

from __future__ import annotations

import re

UNITS = "BkMGTPE"
_NUMBER = re.compile(r"(0[xX][0-9a-fA-F]+|[0-9]+)([bkmgtpe]?)b?", re.IGNORECASE)
MAX = (1 << 63) - 1


def expand_number(text: str) -> int:
    """The number that `text` writes: decimal, octal (0...) or hexadecimal (0x...), then perhaps k, M, G, T, P or E.

    Raises ValueError.
    """
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a number with a unit of k, M, G, T, P or E")
    digits, unit = match.groups()
    base = 16 if digits[:2].lower() == "0x" else 8 if digits.startswith("0") else 10
    number = int(digits, base) << 10 * UNITS.lower().index(unit.lower() or "b")
    if number > MAX:
        raise ValueError(f"{text!r} is too large")
    return number


def humanize(number: int) -> str:
    """At most four characters: 0, 512, 2.0M, 64M. Divided by 1024 until it fits, one decimal below ten."""
    quotient, remainder, scale = number, 0, 0
    while quotient >= 1000 or (quotient == 999 and remainder >= 973):
        quotient, remainder = divmod(quotient, 1024)
        scale += 1
    unit = "" if scale == 0 else UNITS[scale]
    # Rounded to tenths: 9.95 and more are no longer written with a decimal.
    if scale > 0 and (quotient < 9 or (quotient == 9 and remainder < 973)):
        tenths = (remainder * 10 + 512) // 1024
        return f"{quotient + tenths // 10}.{tenths % 10}{unit}"
    return f"{quotient + (remainder + 512) // 1024}{unit}"
