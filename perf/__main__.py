"""The comparison: `make perf`, or in a built checkout `.venv/bin/python -m perf [SECTION...]`.

Sections, each with a result of its own (SECTION.json in the output directory):

    memory     all jobs against all systems, components in memory: 45 minutes
    disk       some jobs and systems, components on a disk, through the page cache: 14 minutes
    direct     the same with O_DIRECT: 13 minutes
    two        two resources at once: 6 minutes
    resync     full and 10% dirty, idle and under load; TCP streams: 6 minutes
    failover   half a minute
    calls      system calls per request: 3 minutes
    resources  1 to 32 resources, idle cost, memory: 5 minutes
    sizes      components of 64 MiB to 4 GiB: 3 minutes

After each section report.md (tables of ratios, a verdict for each bar) and the plots (*.svg) are written from all
results that the directory has, so a long run may be done in parts; --report only does that. Exit status 1: a section
failed; the others were run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from perf import calls, compare, failover, report, resync, scale
from perf.errors import ROOT, MissingError, PerfError, need
from perf.host import host
from perf.options import Options

SECTIONS: dict[str, Callable[[Options], dict[str, Any]]] = {
    "memory": compare.memory,
    "disk": compare.disk,
    "direct": compare.direct,
    "two": compare.two,
    "resync": resync.resync,
    "failover": failover.failover,
    "calls": calls.calls,
    "resources": scale.resources,
    "sizes": scale.sizes,
}


def arguments(words: list[str]) -> tuple[list[str], Options, Path, bool]:
    default = Options()
    parser = argparse.ArgumentParser(
        prog="python -m perf", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", metavar="SECTION", help="default: all")
    parser.add_argument("--repeats", type=int, default=default.repeats, help="rounds (%(default)s)")
    parser.add_argument("--seconds", type=float, default=default.seconds, help="for each run of a job (%(default)s)")
    parser.add_argument("--size", type=int, default=default.size, help="MiB of each component (%(default)s)")
    parser.add_argument("--resync-size", type=int, default=default.resync_size, help="MiB (%(default)s)")
    parser.add_argument("--resources", type=int, default=default.resources, help="how many (%(default)s)")
    parser.add_argument("--idle", type=float, default=default.idle, help="seconds of idle cost (%(default)s)")
    parser.add_argument("--systems", default="", help="such as 'hast mem*,nbdkit'; default: all")
    parser.add_argument("--jobs", default="", help="such as '*4k depth 1,mix*'; default: all")
    parser.add_argument("--out", type=Path, default=ROOT / ".build" / "perf", help="directory (%(default)s)")
    parser.add_argument("--report", action="store_true", help="measure nothing, write the report of what is there")
    found = parser.parse_args(words)
    unknown = sorted(set(found.sections) - set(SECTIONS))
    if unknown:
        parser.error(f"no such section: {', '.join(unknown)} (there are {', '.join(SECTIONS)})")
    if found.repeats < 1 or found.seconds <= 0:
        parser.error("there has to be something to measure: --repeats and --seconds")
    values = {field.name: getattr(found, field.name) for field in fields(Options)}
    for patterns in ("systems", "jobs"):
        values[patterns] = tuple(word.strip() for word in values[patterns].split(",") if word.strip())
    return found.sections or list(SECTIONS), Options(**values), found.out, found.report


def run(name: str, options: Options, out: Path) -> str | None:
    """One section, its result written; what went wrong."""
    print(f"---- {name}", file=sys.stderr, flush=True)
    about = host()
    try:
        result = SECTIONS[name](options)
    except MissingError as error:
        return f"{name}: left out: {error}"
    except (PerfError, AssertionError, OSError) as error:
        return f"{name}: {error}"
    result |= {"host": about, "repeats": options.repeats, "seconds": options.seconds}
    new = out / f"{name}.json.new"
    new.write_text(json.dumps(result, indent=1) + "\n")
    new.replace(out / f"{name}.json")
    return None


def main(words: list[str]) -> int:
    sections, options, out, only_report = arguments(words)
    out.mkdir(parents=True, exist_ok=True)
    failed = []
    if not only_report:
        os.chdir(ROOT)
        try:
            need("fio")
        except MissingError as error:
            sys.exit(f"perf: {error}: nothing can be measured")
        for name in sections:
            wrong = run(name, options, out)
            if wrong is not None:
                print(wrong, file=sys.stderr, flush=True)
                failed.append(wrong)
            report.write(out)
    print(report.write(out))
    for wrong in failed:
        print(f"FAILED: {wrong}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
