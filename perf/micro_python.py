"""The micro-benchmarks of what Python does: `python -m perf.micro_python SAMPLE_US ROUNDS`, lines as those of
tests/native/micro.c. The calibration loop is one of Python's own: what makes the interpreter faster is in it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from time import process_time_ns

from hast import activemap
from hast.messages import HANDSHAKE_LIMIT, Cmd, DataInfo, Reply, Request, pack_message, unpack_message

Work = Callable[[], object]
STEPS = 1000
EXTENTS = 1 << 19  # 1 TiB in extents of 2 MiB
MAP = EXTENTS // 8


def loop() -> int:
    x = 1
    for _ in range(STEPS):
        x = (x * 1103515245 + 12345) & 0x7FFFFFFF
    return x


def benchmarks() -> dict[str, Work]:
    request = Request(Cmd.WRITE, 123456789, 4096 * 1000, 4096, True, DataInfo(4096))
    reply = Reply(123456789)
    sent, answered = pack_message(2, request.to_nv()), pack_message(2, reply.to_nv())
    sparse, bits = bytearray(MAP), bytearray(MAP)
    for extent in range(0, EXTENTS, 100):
        activemap.set_bit(sparse, extent)
    return {
        "Python: encode a write request": lambda: pack_message(2, request.to_nv()),
        "Python: decode a write request": lambda: Request.from_nv(unpack_message(sent, HANDSHAKE_LIMIT)[1]),
        "Python: encode a reply": lambda: pack_message(2, reply.to_nv()),
        "Python: decode a reply": lambda: Reply.from_nv(unpack_message(answered, HANDSHAKE_LIMIT)[1]),
        "Python: merge maps of 64 KiB": lambda: activemap.or_into(bits, sparse),
        "Python: count the dirty extents of 64 KiB": lambda: activemap.count_dirty(sparse, EXTENTS),
        "Python: dirty ranges of 64 KiB, 1% dirty": lambda: sum(1 for _ in activemap.dirty_ranges(sparse, EXTENTS)),
    }


def timed(work: Work, times: int) -> int:
    began = process_time_ns()
    for _ in range(times):
        work()
    return process_time_ns() - began


def main(sample_us: float, rounds: int) -> None:
    all_of_them = benchmarks()
    enough = {name: max(1, round(sample_us * 1000 / timed(work, 3) * 3)) for name, work in all_of_them.items()}
    for _ in range(rounds):
        for name, work in all_of_them.items():
            before = timed(loop, 1)
            took = timed(work, enough[name])
            step = (before + timed(loop, 1)) / 2 / STEPS
            print(f"{took / enough[name]:.4f} {step:.5f} {name}")


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
