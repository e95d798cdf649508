"""python -m tests.chaos.sim --histories N --seed S --jobs J; --replay FILE tells a saved story."""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import sys
import time
from pathlib import Path

from tests.chaos.sim.runner import Totals, kind, record, replay, run, shorten

CHUNK = 500


def batch(task: tuple[int, int]) -> tuple[Totals, list[tuple[int, str]]]:
    first, count = task
    totals, failed = Totals(), []
    gc.disable()  # worlds are circular: they are collected a hundred at a time
    for seed in range(first, first + count):
        if seed % 100 == 0:
            gc.collect()
        try:
            totals.add(run(seed))
        except Exception as error:
            failed.append((seed, f"{type(error).__name__}: {error}"))
            totals.histories += 1
    return totals, failed


def tell(seed: int, directory: Path) -> None:
    story, text = record(seed)
    print(f"seed {seed}: {text}")
    if not text:
        print("  does not fail when it is recorded: it depends on something else than its seed")
        return
    short = shorten(story)
    text, told = replay(short, tells=True)
    path = directory / f"story-{seed}.json"
    directory.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(short) + "\n")
    print(f"  shortened to {len(short) - 1} steps, saved as {path} (--replay): {text}")
    for line in told[:100]:
        print("    " + line)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--histories", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=None, help="the first one (default: from the clock)")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--failures", type=int, default=3, help="stop after so many")
    parser.add_argument("--directory", type=Path, default=Path(), help="for stories that fail")
    parser.add_argument("--replay", type=Path, help="tell this story")
    args = parser.parse_args()
    if args.replay is not None:
        text, told = replay(json.loads(args.replay.read_text()), tells=True)
        print("\n".join(told))
        print(text or "nothing is broken")
        return 1 if text else 0
    first = args.seed if args.seed is not None else int(time.time()) * 1000
    began, totals, failed = time.monotonic(), Totals(), []
    tasks = [(at, min(CHUNK, first + args.histories - at)) for at in range(first, first + args.histories, CHUNK)]
    gc.freeze()
    with multiprocessing.get_context("fork").Pool(args.jobs) as pool:
        for done, bad in pool.imap(batch, tasks):
            totals.merge(done)
            failed += bad
            for seed, text in bad:
                print(f"seed {seed}: {text}", flush=True)
            if totals.histories % 20000 == 0:
                spent = time.monotonic() - began
                print(f"{totals.histories} histories, {totals.counts.total()} events, {spent:.0f} s", flush=True)
            if len(failed) >= args.failures:
                pool.terminate()
                break
    spent = time.monotonic() - began
    print(
        f"{totals.histories} histories from seed {first}, {totals.counts.total()} events,"
        f" {len(failed)} failed, {spent:.0f} s, {totals.histories / spent:.0f} a second"
    )
    print(", ".join(f"{name} {n}" for name, n in sorted(totals.counts.items())))
    print("handshakes: " + ", ".join(f"{name} {n}" for name, n in sorted(totals.outcomes.items())))
    kinds: dict[str, list[int]] = {}
    for seed, text in failed:
        kinds.setdefault(kind(text), []).append(seed)
    for text, seeds in kinds.items():
        print(f"{len(seeds)} of this kind: {text}")
        tell(min(seeds), args.directory)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
