"""A program: writes files with fsync below a directory, and a line `name sha256` on stdout for each that is safe.

usage: python -m tests.e2e.filewriter directory prefix [seconds between two files]

It ends when something fails, as it does when the device below goes away.
"""

from __future__ import annotations

import hashlib
import os
import random
import sys
import time
from pathlib import Path


def write(path: Path, data: bytes) -> None:
    """The file with this content, safe with its name when this returns."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def main(root: Path, prefix: str, pause: float) -> None:
    rng = random.Random(prefix)
    for number in range(1 << 30):
        path = root / f"d{number % 10}" / f"{prefix}-{number}"
        path.parent.mkdir(exist_ok=True)
        data = rng.randbytes(rng.choice([100, 5000, 70000]))
        write(path, data)
        print(path.relative_to(root), hashlib.sha256(data).hexdigest(), flush=True)
        time.sleep(pause)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]) if len(sys.argv) > 3 else 0.0)
    except OSError as error:
        sys.exit(f"filewriter: {error}")
