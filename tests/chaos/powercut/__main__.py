"""By hand: recordings in all modes, and as many states as are asked for.

python -m tests.chaos.powercut [--states N] [--revive N] [--amount N] [--seed N] [--only MODE] [--save DIRECTORY]
                               [--load FILE]
python -m tests.chaos.powercut --live N [--seed N]
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos.powercut.history import History
from tests.chaos.powercut.judge import Judge, Verdict, replay
from tests.chaos.powercut.live import SYNCRATE, Live
from tests.chaos.powercut.revive import Reviver
from tests.chaos.powercut.workload import Recorder
from tests.e2e.pair import said

MIB = 1 << 20
KEEPDIRTY = 4
MODES = ("fullsync", "memsync", "async")
EACH = 10  # states at each cut
Setup = tuple[str, bool, int, int]  # replication, metaflush, extentsize, size
SETUPS = [
    ("fullsync", True, 16384, 2 * MIB),
    ("memsync", True, 16384, 2 * MIB),
    ("async", True, 16384, 2 * MIB),
    ("fullsync", True, 512, 3 * MIB),
    ("memsync", True, 512, 3 * MIB),
    ("fullsync", False, 16384, 2 * MIB),
    ("memsync", False, 512, 3 * MIB),
    ("async", False, 16384, 2 * MIB),
]


def recorded(setup: Setup, options: argparse.Namespace, seed: int) -> tuple[History, list[str]]:
    """A recording, and the states that real nodes were started from."""
    mode, metaflush, extentsize, size = setup
    with tempfile.TemporaryDirectory() as where:
        recorder = Recorder(Path(where), mode, metaflush, extentsize, size, KEEPDIRTY, seed)
        try:
            history = recorder.run(options.amount)
            if options.save:
                options.save.mkdir(exist_ok=True)
                history.save(options.save / f"{seed}.history")
            revived: list[str] = []
            try:
                Reviver(recorder).some(Judge(history), options.revive, random.Random(seed), revived)
            except AssertionError as error:
                print(f"    revived: {error}")
                revived.append("a violation")
            return history, revived
        finally:
            for complaint in recorder.close():
                print(f"    {complaint}")


def lived(options: argparse.Namespace) -> int:
    """Stories of power cuts in life; how many of them are violations."""
    bad = 0
    for seed in range(options.seed, options.seed + options.live):
        mode = MODES[seed % len(MODES)]
        with tempfile.TemporaryDirectory() as where:
            recorder = Recorder(Path(where), mode, True, 16384, 2 * MIB, KEEPDIRTY, seed, SYNCRATE)
            try:
                print(f"{seed} ({mode}): {Live(recorder, random.Random(seed)).story()}")
            except AssertionError as error:
                bad += 1
                print(f"{seed} ({mode}): VIOLATION: {error}\n{said([recorder.pair])}")
            finally:
                for complaint in recorder.close():
                    print(f"    {complaint}")
        sys.stdout.flush()
    print(f"seed {options.seed}: {options.live} stories, {bad} violations")
    return bad


def report(history: History, verdict: Verdict, revived: list[str], seconds: float) -> None:
    flush = "on" if history.metaflush else "off"
    print(
        f"{history.replication}, metaflush {flush}, extents of {history.shape.extentsize}:"
        f" {len(history.requests)} requests, {sum(map(len, history.disks.values()))} disk operations;"
        f" {verdict.states} states, {len(verdict.violations)} violations; {len(revived)} revived; {seconds:.1f} s"
    )
    print("   ", ", ".join(f"{count} {name}" for name, count in verdict.outcomes.most_common()))
    alike: dict[str, list[str]] = {}
    for violation in verdict.violations:
        alike.setdefault(re.sub(r"[0-9]+", "#", violation.text.partition(": ")[2]), []).append(violation.text)
    for texts in alike.values():
        print(f"    {len(texts)} times: {texts[0]}")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(prog="powercut")
    parser.add_argument("--states", type=int, default=2000, help="of each configuration")
    parser.add_argument("--revive", type=int, default=20, help="states of each that real nodes are started from")
    parser.add_argument("--live", type=int, default=0, help="no recordings, but so many stories of cuts in life")
    parser.add_argument("--amount", type=int, default=120, help="requests in each part of a recording")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--only", default="", help="only this mode")
    parser.add_argument("--save", type=Path, help="keep recordings there")
    parser.add_argument("--load", type=Path, help="a recording that was kept; nothing is started then")
    options = parser.parse_args()
    if options.live:
        return 1 if lived(options) else 0
    total = bad = 0
    setups = [None] if options.load else [s for s in SETUPS if options.only in ("", s[0])]
    for number, setup in enumerate(setups):
        begin, revived = time.monotonic(), []
        if setup is None:
            history = History.load(options.load)
        else:
            history, revived = recorded(setup, options, options.seed + number)
        verdict = replay(history, max(1, options.states // EACH), EACH, options.seed)
        report(history, verdict, revived, time.monotonic() - begin)
        total += verdict.states
        bad += len(verdict.violations) + revived.count("a violation")
    print(f"seed {options.seed}: {total} states, {bad} violations")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
