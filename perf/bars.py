"""The bars: what hast is to reach, and whether it does. Each is a ratio of medians, or a figure, of the results.

Invariants:
- A bar of which nothing was measured is "not measured", never met.
- A ratio between systems comes with the range of that ratio over the rounds, each of which ran both.
- Of several possible readings the harder one is taken; where a ratio is to a recorded figure, that is said.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perf.measure import median, ratios
from perf.nodes import MODES

RECORDED = json.loads((Path(__file__).parent / "recorded.json").read_text())["recorded"]

Results = dict[str, Any]  # section -> what it has written


@dataclass(frozen=True)
class Verdict:
    group: str
    what: str
    reached: float | None
    bar: float
    least: bool = True  # the bar is what has to be reached at least; else at most
    unit: str = "x"
    range: tuple[float, float] | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        if self.reached is None:
            return None
        return self.reached >= self.bar if self.least else self.reached <= self.bar

    def word(self) -> str:
        return {None: "not measured", True: "met", False: "**missed**"}[self.met]


def samples(results: Results, job: str, system: str, section: str = "memory") -> list[dict[str, float]]:
    found = results.get(section, {}).get("samples", {}).get(job, {}).get(system, [])
    return list(found)


def between(results: Results, group: str, job: str, ours: str, theirs: str, bar: float) -> Verdict:
    """The ratio of two systems' rates."""
    one, other = samples(results, job, ours), samples(results, job, theirs)
    what = f"{job}: {ours} / {theirs}"
    if not one or not other:
        return Verdict(group, what, None, bar)
    by_round = ratios(one, other, "rate")
    return Verdict(group, what, median(one, "rate") / median(other, "rate"), bar, range=(min(by_round), max(by_round)))


def recorded(results: Results, mode: str, job: str, bar: float, key: str = "rate", least: bool = True) -> Verdict:
    """The ratio to the C hastd's recorded figure; the note has that by way of nbdkit's and qemu-nbd's."""
    group, ours = "C hastd (recorded)", f"hast {mode}"
    then = RECORDED[f"C hastd {mode}"][job][key]
    one = samples(results, job, ours)
    what = f"{job}: {ours} / C hastd{' (CPU s/GiB)' if key != 'rate' else ''}"
    if not one:
        return Verdict(group, what, None, bar, least)
    reached = median(one, key) / then
    notes = []
    for calibration in ("nbdkit", "qemu-nbd"):
        theirs = samples(results, job, calibration)
        its_then = RECORDED[calibration].get(job)
        if key == "rate" and theirs and its_then:
            machine = median(theirs, "rate") / its_then["rate"]
            notes.append(f"{reached / machine:.2f}x by {calibration}")
    return Verdict(group, what, reached, bar, least, note="; ".join(notes))


def against_c_hastd(results: Results) -> Iterator[Verdict]:
    for mode in MODES:
        yield recorded(results, mode, "randwrite 4k depth 1", 1.5)
        yield recorded(results, mode, "randwrite 4k depth 32", 3.0)
    yield recorded(results, "memsync", "randwrite 4k depth 32", 0.5, "cpu_gib", least=False)
    for mode in MODES:
        yield recorded(results, mode, "randread 4k depth 1", 1.0)
        yield recorded(results, mode, "randread 4k depth 32", 1.0)
        yield recorded(results, mode, "write 128k depth 8", 1.3)


def against_others(results: Results) -> Iterator[Verdict]:
    for theirs in ("quorum", "quorum unix", "mirror", "mirror unix"):
        for mode in ("fullsync", "memsync"):
            for depth, bar in ((1, 1.5), (32, 6.0)):
                job = f"randwrite 4k depth {depth}"
                yield between(results, "user-space mirrors", job, f"hast {mode}", theirs, bar)
    for job, theirs, bar in (
        ("randread 4k depth 1", "qemu-nbd", 2.0),
        ("randread 4k depth 32", "qemu-nbd", 2.0),
        ("randwrite 4k depth 32", "qemu-nbd", 1.0),
        ("randread 4k depth 1", "nbdkit", 0.95),
        ("randread 4k depth 32", "nbdkit", 0.95),
    ):
        for mode in ("fullsync", "memsync"):
            yield between(results, "one file, no replication", job, f"hast {mode}", theirs, bar)
    for mode in MODES:
        for job, bar in (("randwrite 4k depth 32", 0.6), ("randread 4k depth 32", 0.7), ("randread 4k depth 1", 0.7)):
            yield between(results, "block device", job, f"hast fuse {mode}", f"hast {mode}", bar)


def of_sections(results: Results) -> Iterator[Verdict]:
    """Resynchronisation, failover, many resources."""
    full, tcp = (samples_of(results, "resync", name) for name in ("full", "tcp"))
    what = "full, idle / one TCP stream with the same messages"
    yield Verdict("resync", what, ratio_of(full, tcp, "rate"), 0.8, range=range_of(full, tcp, "rate"))
    base = samples_of(results, "resync", "load only")
    for kind in ("full", "dirty"):
        loaded = samples_of(results, "resync", f"{kind}, load")
        what = f"client p99 during a {'full' if kind == 'full' else '10%'} resync / without"
        reached = ratio_of(loaded, base, "p99")
        yield Verdict("resync", what, reached, 3.0, least=False, range=range_of(loaded, base, "p99"))
    taken = samples_of(results, "failover", "failover")
    milliseconds = [sample["seconds"] * 1000 for sample in taken]
    yield Verdict(
        "failover", "kill -9 of the node to the first acknowledged write on the other, median",
        median(taken, "seconds") * 1000 if taken else None, 150, least=False, unit=" ms",
        range=(min(milliseconds), max(milliseconds)) if taken else None,
    )  # fmt: skip
    idle = results.get("resources", {}).get("idle", {})
    for node in ("primary", "secondary"):
        what = f"{idle.get('resources', 32):.0f} idle resources, {node} node, of one processor"
        yield Verdict("idle", what, idle.get(f"{node} cpu %"), 1.0, least=False, unit=" %")


def samples_of(results: Results, section: str, name: str) -> list[dict[str, float]]:
    return list(results.get(section, {}).get("samples", {}).get(name, []))


def ratio_of(one: list[dict[str, float]], other: list[dict[str, float]], key: str) -> float | None:
    return median(one, key) / median(other, key) if one and other else None


def range_of(one: list[dict[str, float]], other: list[dict[str, float]], key: str) -> tuple[float, float] | None:
    by_round = ratios(one, other, key)
    return (min(by_round), max(by_round)) if by_round else None


def verdicts(results: Results) -> list[Verdict]:
    return [*against_c_hastd(results), *against_others(results), *of_sections(results)]
