"""The report: markdown tables of what a directory of results holds, a verdict for each bar, and the plots."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from perf import pictures
from perf.bars import Results, verdicts
from perf.measure import median, spread

SECTIONS = ("memory", "disk", "direct", "two", "resync", "failover", "calls", "resources", "sizes")
QUIET = 10.0  # per cent of all processors that may be busy with something else
UNCOUNTED = ("file", "nbdkit")  # no process; threads that end with their connection, and their counts with them
TITLES = {
    "memory": "Components in memory",
    "disk": "Components on a disk, through the page cache",
    "direct": "Components on a disk, O_DIRECT",
    "two": "Two resources at once",
}


def read(out: Path) -> Results:
    return {
        name: json.loads((out / f"{name}.json").read_text()) for name in SECTIONS if (out / f"{name}.json").exists()
    }


def write(out: Path) -> str:
    """Write report.md and the plots; the report's text."""
    results = read(out)
    plots = pictures.draw(results, out)
    text = "\n".join(lines(results, plots)) + "\n"
    (out / "report.md").write_text(text)
    return text


def lines(results: Results, plots: Sequence[str]) -> Iterator[str]:
    if not results:
        yield "Nothing has been measured."
        return
    yield "# Comparison"
    yield ""
    yield from runs(results)
    yield from bars(results)
    for section in TITLES:
        if section in results:
            yield from compared(results[section], TITLES[section])
    for section, of in (
        ("resync", resync), ("failover", failover), ("calls", calls), ("resources", resources), ("sizes", sizes),
    ):  # fmt: skip
        if section in results:
            yield from of(results[section])
    for plot in plots:
        yield f"![{plot.removesuffix('.svg')}]({plot})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
    yield ""


def number(value: float) -> str:
    """Three digits, and k or M."""
    for limit, unit in ((1e6, "M"), (1e4, "k")):
        if value >= limit:
            return f"{value / float(limit if unit == 'M' else 1e3):.3g}{unit}"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def runs(results: Results) -> Iterator[str]:
    """The machine, and when each section was run."""
    host = next(iter(results.values()))["host"]
    yield (
        f"{host['processor']}, {host['memory']}, Linux {host['kernel']}; fio {host['fio']}, nbdkit {host['nbdkit']}, "
        f"qemu {host['qemu']}. Both nodes and the client share the processors. Figures are medians over interleaved "
        "rounds; ± is half of what lies between the extremes."
    )
    yield ""
    rows = [
        (
            name,
            of["host"]["date"],
            of["host"]["commit"],
            str(of["repeats"]),
            f"{of['seconds']:g}",
            of["host"]["load"],
            foreign(of),
        )
        for name, of in results.items()
    ]
    yield from table(("section", "date", "commit", "rounds", "seconds each", "load", "busy with else"), rows)
    if any(row[-1].startswith("**") for row in rows):
        yield (
            "**The machine was not quiet**: something else has used its processors while there was something to be "
            "measured. Ratios of such a run are doubtful, too."
        )
        yield ""


def foreign(result: dict[str, Any]) -> str:
    """What others have used of all processors, as a median over the samples; bold when it is too much."""
    samples = result.get("samples", {}).values()
    every = [
        sample["foreign %"]
        for by_system in samples if isinstance(by_system, dict)
        for system, of in by_system.items() if "fuse" not in system
        for sample in of if "foreign %" in sample
    ]  # fmt: skip
    if not every:
        return "-"
    middle = statistics.median(every)
    return f"**{middle:.0f}%**" if middle > QUIET else f"{middle:.0f}%"


def bars(results: Results) -> Iterator[str]:
    yield "## Bars"
    yield ""
    rows = []
    for verdict in verdicts(results):
        unit = verdict.unit
        reached = "-" if verdict.reached is None else f"{verdict.reached:.2f}{unit}"
        low_high = "" if verdict.range is None else f"{verdict.range[0]:.2f} to {verdict.range[1]:.2f}"
        bar = f"{'≥' if verdict.least else '≤'} {verdict.bar:g}{unit}"
        rows.append((verdict.group, verdict.what, reached, low_high, bar, verdict.word(), verdict.note))
    yield from table(("against", "what", "reached", "over the rounds", "bar", "", "calibrated"), rows)
    yield (
        "A ratio to the C hastd is one to a recorded run (perf/recorded.json). Calibrated: divided by how much faster "
        "nbdkit, or qemu-nbd, is in this run than in that recording."
    )
    yield ""


def compared(result: dict[str, Any], title: str) -> Iterator[str]:
    yield f"## {title} ({result['size'] >> 20} MiB each)"
    yield ""
    for job, by_system in result["samples"].items():
        unit = result["units"][job].replace("iops", "IOPS")
        reference = next((s for s in ("hast memsync", "hast fullsync") if s in by_system), next(iter(by_system)))
        rows = []
        for system, samples in by_system.items():
            ours = median(samples, "rate")
            rows.append(
                (
                    system,
                    f"{number(ours)} ±{100 * spread(samples, 'rate'):.0f}%",
                    f"{ours / median(by_system[reference], 'rate'):.2f}",
                    *(number(median(samples, key)) for key in ("p50", "p99", "p99.9")),
                    *(number(median(samples, key)) if system != "file" else "-" for key in ("cpu_gib", "cpu_million")),
                    number(median(samples, "machine_gib")),
                    f"{median(samples, 'switches'):.2f}" if system not in UNCOUNTED else "-",
                )
            )
        yield f"**{job}**"
        yield ""
        head = (
            "system", unit, f"to {reference}", "p50 us", "p99 us", "p99.9 us", "CPU s/GiB", "CPU s/million",
            "machine s/GiB", "switches each",
        )  # fmt: skip
        yield from table(head, rows)


def resync(result: dict[str, Any]) -> Iterator[str]:
    yield f"## Resynchronisation of {result['size'] >> 20} MiB in memory"
    yield ""
    names = {
        "tcp": "one TCP stream on loopback, 128 KiB messages", "tcp and files": "the same, from file to file",
        "full": "full, idle", "full, load": "full, under load", "dirty": "10% dirty, idle",
        "dirty, load": "10% dirty, under load", "load only": "the client alone",
    }  # fmt: skip
    rows = []
    for name, what in names.items():
        samples = result["samples"].get(name)
        if samples:
            row = [what]
            for key in ("rate", "seconds", "p50", "p99"):
                known = key in samples[0]
                row.append(f"{number(median(samples, key))} ±{100 * spread(samples, key):.0f}%" if known else "-")
            rows.append(row)
    yield from table(("what", "MB/s", "seconds", "client p50 us", "client p99 us"), rows)


def failover(result: dict[str, Any]) -> Iterator[str]:
    samples = result["samples"]["failover"]
    every = sorted(sample["seconds"] * 1000 for sample in samples)
    yield "## Failover"
    yield ""
    yield (
        f"From kill -9 of the primary node to the first acknowledged write on the other: median "
        f"{median(samples, 'seconds') * 1000:.0f} ms of {len(every)} ({every[0]:.0f} to {every[-1]:.0f}), of which "
        f"`hastctl role primary` {median(samples, 'role') * 1000:.0f} ms."
    )
    yield ""


def calls(result: dict[str, Any]) -> Iterator[str]:
    yield "## System calls per request"
    yield ""
    for job, by_system in result["calls"].items():
        rows = []
        for system, counts in by_system.items():
            most = ", ".join(f"{name} {n:.2f}" for name, n in counts.items() if name != "all" and n >= 0.01)
            rows.append((system, f"{counts['all']:.2f}", most))
        yield f"**{job}** (under strace, which changes what is asleep when)"
        yield ""
        yield from table(("system", "calls", "of which"), rows)


def resources(result: dict[str, Any]) -> Iterator[str]:
    idle, before, after = result["idle"], result["memory idle"], result["memory used"]
    yield "## Many resources"
    yield ""
    rows = [
        (
            node, f"{idle[f'{node} cpu %']:.2f}", f"{idle[f'{node} switches/s']:.0f}",
            f"{before[f'{node} processes']:.0f}", f"{before[f'{node} MiB']:.1f}", f"{after[f'{node} MiB']:.1f}",
        )
        for node in ("primary", "secondary")
    ]  # fmt: skip
    head = (
        "node",
        "idle, % of one processor",
        "idle, switches/s",
        "processes each",
        "MiB each, idle",
        "MiB each, used",
    )
    yield f"{idle['resources']:.0f} resources, connected and in sync."
    yield ""
    yield from table(head, rows)
    yield from scaling(result["samples"], "resources", "IOPS in total")


def sizes(result: dict[str, Any]) -> Iterator[str]:
    yield "## Size of the component (memsync)"
    yield ""
    yield from scaling(result["samples"], "MiB", "IOPS")


def scaling(samples: dict[str, dict[str, list[dict[str, float]]]], what: str, unit: str) -> Iterator[str]:
    for job, by in samples.items():
        rows = [
            (x, f"{number(median(of, 'rate'))} ±{100 * spread(of, 'rate'):.0f}%", number(median(of, "p99")),
             number(median(of, "cpu_million")))
            for x, of in by.items()
        ]  # fmt: skip
        yield f"**{re.sub(r'randwrite', 'random write', job)}**"
        yield ""
        yield from table((what, unit, "p99 us", "CPU s/million"), rows)
