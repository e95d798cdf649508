"""Micro-benchmarks: `make perf-micro`, or `.venv/bin/python -m perf.micro`. A quarter of a minute.

tests/native/micro.c times the C that is on a bio's path, perf/micro_python.py what Python does. Each figure is a ratio
to a step of a calibration loop that is run before and after each sample, so that results of a faster or slower moment,
and to some degree of another machine, can be compared. The result is set beside the one that is kept in
perf/micro.json; --record keeps the new one.

Invariants:
- Each program is started several times: where its memory happens to be is a part of the spread.
- The lower quartile of a start counts as one sample (where sleep is measured, and not processor time: the fastest):
  what the rest of the machine does makes things slower, never faster. Of five starts or more the fastest and the
  slowest are left out; spread is half of what lies between the extremes, as a part of the median.
- A benchmark is called slower (or faster) only where the samples of now and then do not overlap, and by more than
  LEAST. Exit status 0 all the same: it is a person who judges.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from perf.errors import ROOT, PerfError
from perf.host import host
from tests.shm.native import FFI, NATIVE, built

KEPT = ROOT / "perf" / "micro.json"
LEAST = 0.05  # what is less than that is no difference, whatever the samples say
NAMES = ("ring", "doorbell", "arena", "wire", "lzf", "crc32", "sha256", "trace", "transform")
SOURCES = [
    *(NATIVE / f"micro{part}.c" for part in ("", "_shm", "_wire", "_seq")),
    *sorted(FFI.glob("seq*.c")),
    *(FFI / f"{name}.c" for name in NAMES),
]
ROUNDS = 12
SLEEPS = "round trip"  # what these names begin with is timed by the clock on the wall


@dataclass(frozen=True)
class Figure:
    """ns of an operation, and its ratio to a step of the calibration loop, with the extremes of that."""

    ns: float
    ratio: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        return (self.high - self.low) / 2 / self.ratio


Result = dict[str, Figure]


def measure(starts: int, sample_us: float) -> Result:
    """Every benchmark, in so many starts of each program. PerfError when one of them fails."""
    # -O2 as the extension has it.
    native = built("micro", SOURCES, "-O2")
    commands = [[str(native)], [sys.executable, "-m", "perf.micro_python"]]
    samples: dict[str, list[tuple[float, float]]] = {}
    for _ in range(starts):
        for command in commands:
            for name, of in run([*command, f"{sample_us:g}", str(ROUNDS)]).items():
                place = 0 if name.startswith(SLEEPS) else len(of) // 4
                ns, ratio = (sorted(values)[place] for values in zip(*of, strict=True))
                samples.setdefault(name, []).append((ns, ratio))
    return {name: figure(of) for name, of in samples.items()}


def run(command: list[str]) -> dict[str, list[tuple[float, float]]]:
    """The samples of one start: name -> (ns, ratio)."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode != 0:
        raise PerfError(f"{' '.join(command)}: exit status {done.returncode}\n{done.stderr}")
    found: dict[str, list[tuple[float, float]]] = {}
    for line in done.stdout.splitlines():
        ns, step, name = line.split(" ", 2)
        found.setdefault(name, []).append((float(ns), float(ns) / float(step)))
    return found


def figure(samples: Sequence[tuple[float, float]]) -> Figure:
    ratios = sorted(ratio for _, ratio in samples)
    if len(ratios) >= 5:
        ratios = ratios[1:-1]
    return Figure(
        round(statistics.median(ns for ns, _ in samples), 2),
        *(round(value, 4) for value in (statistics.median(ratios), min(ratios), max(ratios))),
    )


# ---- what is kept, and what is said ----


def load(path: Path) -> tuple[Result, dict[str, str]]:
    """A result that was kept, and the machine that it is of; nothing where there is none."""
    if not path.exists():
        return {}, {}
    kept = json.loads(path.read_text())
    return {name: Figure(**values) for name, values in kept["figures"].items()}, kept["host"]


def save(path: Path, result: Result, about: dict[str, str]) -> None:
    new = path.with_suffix(".new")
    kept = {"host": about, "figures": {name: asdict(of) for name, of in result.items()}}
    new.write_text(json.dumps(kept, indent=1) + "\n")
    new.replace(path)


def verdict(new: Figure, old: Figure) -> str:
    change = new.ratio / old.ratio
    if new.low > old.high and change > 1 + LEAST:
        return "SLOWER"
    return "faster" if new.high < old.low and change < 1 - LEAST else ""


def table(result: Result, old: Result) -> list[str]:
    width = max(map(len, result))
    lines = [f"{'':{width}} {'ns':>11} {'loop steps':>12} {'spread':>7} {'new/old':>8}"]
    for name, new in result.items():
        line = f"{name:{width}} {new.ns:11.1f} {new.ratio:12.2f} {new.spread:6.0%}"
        if name in old:
            line += f" {new.ratio / old[name].ratio:9.2f}  {verdict(new, old[name])}"
        else:
            line += f" {'new':>9}"
        lines.append(line.rstrip())
    lines += [f"{name:{width}} {'is not there any more':>43}" for name in old if name not in result]
    return lines


def heading(about: dict[str, str], then: dict[str, str]) -> list[str]:
    lines = [f"{about['processor']}, Linux {about['kernel']}, load {about['load']}"]
    if not then:
        return [*lines, "nothing is kept to compare with: --record keeps this one"]
    lines.append(f"old: {then['date']}, commit {then['commit']}")
    if then["processor"] != about["processor"]:
        lines.append(f"which was another machine ({then['processor']}): ratios of it say little")
    return lines


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m perf.micro", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", action="store_true", help="keep the result")
    parser.add_argument("--kept", type=Path, default=KEPT, help="where results are kept (%(default)s)")
    parser.add_argument("--starts", type=int, default=7, help="of each program (%(default)s)")
    parser.add_argument("--sample-us", type=float, default=2000, help="microseconds of a sample (%(default)s)")
    found = parser.parse_args(words)
    if found.starts < 1 or not found.sample_us > 0:
        parser.error("there has to be something to measure: --starts and --sample-us")
    about = host()
    old, then = load(found.kept)
    try:
        result = measure(found.starts, found.sample_us)
    except (PerfError, AssertionError, OSError) as error:
        print(f"perf.micro: {error}", file=sys.stderr)
        return 1
    print("\n".join([*heading(about, then), "", *table(result, old)]))
    if found.record:
        save(found.kept, result, about)
        print(f"\nkept in {found.kept}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
