"""The command line of the hunter. Exit code 0: no violation; 1: there was one, and its history is kept.

--replay makes the same choices again: configuration, faults, pauses, requests. Processes, disks and sockets take the
time that they take, so the same choices may meet other moments: repeat it (--times) when once does not show it.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos.nemesis import faults, features
from tests.chaos.nemesis.session import ROUNDS, Session, Tally
from tests.chaos.nemesis.story import table


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.nemesis", description=__doc__)
    parser.add_argument("--faults", type=int, default=50, help="stop after so many")
    parser.add_argument("--seed", default=None, help="any word or number; default: the time")
    parser.add_argument("--replay", metavar="SEED/SESSION", help="the choices of one session again")
    parser.add_argument("--times", type=int, default=1, help="replay it so often")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="rounds of a session at most")
    parser.add_argument("--kinds", action="append", metavar="PATTERN", help="only these kinds of faults")
    parser.add_argument("--without", action="append", metavar="PATTERN", default=[], help="and not these")
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "nemesis", help="for histories")
    parser.add_argument("--go-on", action="store_true", help="with other sessions after a violation")
    parser.add_argument("--loud", action="store_true", help="tell everything while it happens")
    parser.add_argument("--list", action="store_true", help="the kinds of faults, and which are possible")
    return parser.parse_args()


def chosen(patterns: list[str] | None, without: list[str]) -> list[str]:
    """Kinds that are wanted and possible."""
    return [
        fault.name
        for fault in faults.TABLE
        if features.has(fault.needs)
        and any(fnmatch.fnmatch(fault.name, pattern) for pattern in patterns or ["*"])
        and not any(fnmatch.fnmatch(fault.name, pattern) for pattern in without)
    ]


def main() -> int:
    options = arguments()
    if options.list:
        for fault in faults.TABLE:
            print(f"{'' if features.has(fault.needs) else f'(needs {fault.needs}) '}{fault.name}")
        return 0
    kinds = chosen(options.kinds, options.without)
    if not kinds:
        print("no such kind of fault, or none that is possible here: --list tells them", file=sys.stderr)
        return os.EX_USAGE
    seed = options.seed or str(int(time.time()))
    tally, failures, began = Tally(), 0, time.monotonic()
    number = 0
    while tally.total < options.faults:
        if options.replay:
            if number == options.times:
                break
            word, _, session = options.replay.rpartition("/")
            run = Session(word, int(session), kinds, tally, options.loud)
        else:
            run = Session(seed, number, kinds, tally, options.loud)
        number += 1
        failure = run.run(options.faults, options.keep, options.rounds)
        print(
            f"session {run.replay}: {'VIOLATION' if failure else 'well'}; {tally.total} faults, {tally.rounds} rounds,"
            f" {tally.requests} requests, {time.monotonic() - began:.0f} s",
            flush=True,
        )
        if failure is not None:
            failures += 1
            print(f"\n{failure.story}\n\n{failure.complaint}\nkept: {failure.kept}\nagain: --replay {failure.replay}\n")
            if not options.go_on:
                break
    print(
        f"{tally.total} faults in {tally.rounds} rounds of {tally.sessions} sessions, {tally.promotions} promotions,"
        f" {tally.split_brains} split brains, {tally.requests} requests acknowledged, {tally.forgiven} errors forgiven,"
        f" longest wait {tally.slowest:.1f} s, {failures} violations\n{table(tally.faults)}"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
