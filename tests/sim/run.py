"""Long runs: python -m tests.sim.run --seconds N --seed S. One line for each failure, with the seed that repeats it."""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

from tests.sim import variants
from tests.sim.harness import PRODUCTION
from tests.sim.history import History


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long")
    parser.add_argument("--seed", type=int, default=None, help="the first seed (default: from the clock)")
    parser.add_argument("--steps", type=int, default=1000, help="events of one history")
    parser.add_argument("--events", type=int, default=None, help="stop after so many events")
    parser.add_argument("--sanitized", metavar="LIBRARY", help="a build with sanitizers (see tests/sim/variants.py)")
    parser.add_argument("--once", action="store_true", help="this seed only")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at the first failure")
    args = parser.parse_args()
    seed = args.seed if args.seed is not None else int(time.time())
    library = variants.load(Path(args.sanitized), guarded=True) if args.sanitized else PRODUCTION
    began, counts, histories, failed = time.monotonic(), Counter[str](), 0, 0
    while time.monotonic() - began < args.seconds:
        history = History(seed, library)
        try:
            history.play(args.steps)
        except Exception:
            failed += 1
            traceback.print_exc()
            print(f"seed {seed}: python -m tests.sim.run --once --seed {seed} --steps {args.steps}")
            if not args.keep_going:
                break
        counts.update(history.counts)
        histories += 1
        seed += 1
        if args.once or (args.events is not None and counts.total() >= args.events):
            break
    spent = time.monotonic() - began
    print(f"{histories} histories, {counts.total()} events, {counts.total() / spent:.0f} a second, {failed} failed")
    print(", ".join(f"{name} {n}" for name, n in counts.most_common()))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
