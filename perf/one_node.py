"""Speed of one node without a peer, beside servers that do not replicate, in one run.

Figures are medians over the rounds, ratios are to hast; "cpu" is that of the server. Components are files in memory
(/dev/shm): what is measured is the path of a request, not a disk. Needs fio (nbd engine), nbdkit and qemu-nbd; and a
built checkout.

    python perf/one_node.py [--rounds N] [--seconds N] [--json FILE]
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import common
from common import JOBS, SIZE, Figures, Result, System

sys.path.insert(0, str(common.ROOT))
from tests.e2e.node import Node

ALL_JOBS = (*JOBS, common.job("read 128k depth 8", "read", "128k", 8, "MB/s"))


@contextmanager
def hast() -> Iterator[System]:
    """One node with `remote none` and the NBD socket only."""
    node = Node({"perf": SIZE})
    try:
        node.primary()
        yield System("hast", node.uri("perf"), node.pids)
    finally:
        for complaint in node.close():
            print(complaint, file=sys.stderr)


def compare(rounds: int, seconds: int) -> Result:
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hastperf.")))
        memory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hastperf.", dir="/dev/shm")))

        def other(name: str, sock: Path, *command: str | Path) -> System:
            pid = stack.enter_context(common.server([str(word) for word in command], sock.exists))
            return System(name, f"nbd+unix:///?socket={sock}", lambda: [pid])

        kit, kit_file = directory / "nbdkit.sock", common.empty_file(memory / "nbdkit")
        qemu, qemu_file = directory / "qemu.sock", common.empty_file(memory / "qemu")
        systems = [
            stack.enter_context(hast()),
            other("nbdkit file", kit, "nbdkit", "-f", "-U", kit, "file", kit_file),
            other("qemu-nbd", qemu, "qemu-nbd", "-t", "-f", "raw", "-e", "8", "-k", qemu, qemu_file),
        ]
        return common.measure(systems, ALL_JOBS, rounds, seconds)


def ratio(by_system: dict[str, Figures], name: str) -> float:
    return by_system["hast"]["rate"] / by_system[name]["rate"]


def main() -> None:
    args = common.arguments(__doc__, "fio", "nbdkit", "qemu-nbd")
    print(f"One node, no peer; {common.machine()}", flush=True)
    result = compare(args.rounds, args.seconds)
    print(common.table(result, ALL_JOBS, "hast is", ratio))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
