"""Which plots a directory of results gives: latency percentiles, throughput against depth, and how it grows."""

from __future__ import annotations

import re
from pathlib import Path

from perf.bars import Results
from perf.fio import PERCENTILES
from perf.measure import median
from perf.svg import Series, chart

DEPTHS = (1, 8, 32)
PLACES = {"memory": "components in memory", "disk": "components on a disk", "direct": "on a disk, O_DIRECT"}


def draw(results: Results, out: Path) -> list[str]:
    """Write what can be drawn; the files' names."""
    charts: dict[str, str] = {}
    for section, place in PLACES.items():
        samples = results.get(section, {}).get("samples", {})
        for rw, what in (("randwrite", "Random write"), ("randread", "Random read")):
            by_depth = against_depth(samples, rw)
            if any(len(points) > 1 for points in by_depth.values()):
                title = f"{what} of 4 KiB, {place}"
                charts[f"{section}-{rw}-depth"] = chart(title, "requests under way", "IOPS", by_depth)
            for depth in DEPTHS:
                series = latencies(samples.get(f"{rw} 4k depth {depth}", {}))
                if series:
                    title = f"{what} of 4 KiB at depth {depth}, {place}"
                    name = f"{section}-{rw}-{depth}-latency"
                    charts[name] = chart(title, "percentile", "microseconds", series, logarithmic=True)
    for section, x_title, title in (
        ("resources", "resources in use", "Throughput of many resources (memsync)"),
        ("sizes", "MiB of the component", "Throughput and the size of the component (memsync)"),
    ):
        samples = results.get(section, {}).get("samples", {})
        series = {job: {x: median(of, "rate") for x, of in by.items()} for job, by in samples.items()}
        if series:
            charts[f"scaling-{section}"] = chart(title, x_title, "IOPS", series)
    for name, drawing in charts.items():
        (out / f"{name}.svg").write_text(drawing)
    return [f"{name}.svg" for name in charts]


def against_depth(samples: dict[str, dict[str, list[dict[str, float]]]], rw: str) -> Series:
    series: Series = {}
    for job, by_system in samples.items():
        match = re.fullmatch(rf"{rw} 4k depth (\d+)", job)
        if match:
            for system, of in by_system.items():
                series.setdefault(system, {})[match[1]] = median(of, "rate")
    return series


def latencies(by_system: dict[str, list[dict[str, float]]]) -> Series:
    return {system: {name: median(of, name) for name in PERCENTILES} for system, of in by_system.items()}
