"""Runs fuzz targets:  python -m tests.fuzz.run [--seconds N] [--jobs N] [target ...]   (docs/fuzzing.md)

Builds what is needed. New inputs are collected in .build/fuzz/corpus/<target>, findings in .build/fuzz/crashes; each
finding is printed with the command that repeats it, and then the exit code is 1.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzz import build, ledger, minimise, seeds
from tests.fuzz.targets import HERE, SELFTESTS, TARGETS, Target

ROOT = HERE.parents[1]
WORK = build.BUILD
ACCUMULATED = HERE / "accumulated.json"
GRACE = 120  # seconds that a run may take longer than it should
INPUT_SECONDS = 30  # for one input: more is a finding
MEMORY_MB = 1536
EXECUTED = re.compile(rb"stat::number_of_executed_units:\s*(\d+)")
SHOWN = 60  # lines of a finding's report


class MissingError(Exception):
    """What a target needs and is not here."""


@dataclass(frozen=True)
class Outcome:
    """A run, the inputs that it found, and what it said at its end."""

    run: ledger.Run
    found: list[Path] = field(default_factory=list)
    report: str = ""


def missing(target: Target) -> str | None:
    """Why a target cannot be fuzzed here, or None."""
    if target.kind == "c":
        return build.missing()
    try:
        import atheris  # noqa: F401
    except ImportError:
        return "the Python package atheris is not installed: make build, or pip install atheris"
    return None


def command(target: Target) -> list[str]:
    """What runs a target; libFuzzer's arguments follow."""
    if target.kind == "c":
        return [str(build.program(target))]
    return [sys.executable, "-m", "tests.fuzz.atheris_main", target.name]


def environment() -> dict[str, str]:
    return os.environ | {
        "ASAN_OPTIONS": "quarantine_size_mb=16:detect_leaks=1:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def fuzz(target: Target, seconds: int, corpus: Path, crashes: Path) -> Outcome:
    """Run a target for some seconds. Raises MissingError, build.BuildError."""
    reason = missing(target)
    if reason is not None:
        raise MissingError(f"{target.name}: {reason}")
    corpus.mkdir(parents=True, exist_ok=True)
    crashes.mkdir(parents=True, exist_ok=True)
    arguments = [
        f"-max_total_time={seconds}",
        f"-max_len={target.max_len}",
        f"-timeout={INPUT_SECONDS}",
        f"-rss_limit_mb={MEMORY_MB}",
        f"-artifact_prefix={crashes}/{target.name}-",
        "-report_slow_units=60",
        "-len_control=20",
        "-print_final_stats=1",
    ]
    if target.dictionary is not None:
        arguments.append(f"-dict={target.dictionary}")
    corpora = [corpus, seeds.write(target, WORK / "seeds" / target.name)]
    if target.corpus.is_dir():
        corpora.append(target.corpus)
    before = set(crashes.iterdir())
    code, wall, cpu, said = execute([*command(target), *arguments, *map(str, corpora)], seconds + GRACE)
    found = sorted(path for path in set(crashes.iterdir()) - before if path.name.startswith(f"{target.name}-"))
    executed = EXECUTED.findall(said)
    run = ledger.Run(target.name, wall, cpu, int(executed[-1]) if executed else 0, int(code != 0))
    report = "\n".join(said.decode(errors="replace").splitlines()[-SHOWN:]) if code != 0 else ""
    return Outcome(run, found, report)


def execute(argv: Sequence[str], limit: float) -> tuple[int, float, float, bytes]:
    """Exit code, wall seconds, CPU seconds, and what it said. After `limit` seconds it is killed."""
    begin = time.monotonic()
    read_end, write_end = os.pipe()
    process = subprocess.Popen(argv, stdout=write_end, stderr=write_end, cwd=ROOT, env=environment())
    os.close(write_end)
    with ThreadPoolExecutor(1) as pool, os.fdopen(read_end, "rb") as pipe:
        said = pool.submit(pipe.read)
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        while pid == 0:
            if time.monotonic() - begin > limit:
                process.kill()
            time.sleep(0.05)
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        process.returncode = os.waitstatus_to_exitcode(status)
        text = said.result()
    return process.returncode, time.monotonic() - begin, usage.ru_utime + usage.ru_stime, text


def repeat(target: Target, files: Sequence[Path]) -> int:
    """Run a target on given inputs only. Its exit code."""
    return subprocess.run([*command(target), *map(str, files)], cwd=ROOT, env=environment()).returncode


def show(outcome: Outcome) -> None:
    run = outcome.run
    print(f"{run.target}: {run.executions} executions, {run.wall:.0f} s, {run.cpu:.0f} s of CPU", flush=True)
    if run.crashes:
        print(f"{outcome.report}\n{run.target}: FOUND SOMETHING")
        for path in outcome.found:
            print(f"  repeat it: {sys.executable} -m tests.fuzz.run --repeat {path} {run.target}", flush=True)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.run", description="Run fuzz targets.")
    parser.add_argument("targets", nargs="*", metavar="target", help=f"default: all: {' '.join(TARGETS)}")
    parser.add_argument("--seconds", type=int, default=10, help="for each target (10)")
    parser.add_argument("--jobs", type=int, default=1, help="targets at the same time (1)")
    parser.add_argument("--rounds", type=int, default=1, help="how often all of it (1)")
    parser.add_argument("--log", type=Path, help="a JSON file outside of the repository to add the time run to")
    parser.add_argument("--accumulate", action="store_true", help=f"add it to {ACCUMULATED.relative_to(ROOT)} as well")
    parser.add_argument("--corpus", type=Path, default=WORK / "corpus", help="where new inputs are collected")
    parser.add_argument("--crashes", type=Path, default=WORK / "crashes", help="where findings are written")
    parser.add_argument("--minimise", action="store_true", help="do not fuzz: make the committed corpora anew")
    parser.add_argument("--repeat", type=Path, action="append", metavar="FILE", help="do not fuzz: run this input")
    options = parser.parse_args(argv)
    unknown = [name for name in options.targets if name not in TARGETS | SELFTESTS]
    if unknown:
        parser.error(f"no such target: {' '.join(unknown)}")
    return options


def run_all(targets: Sequence[Target], options: argparse.Namespace) -> int:
    """Fuzz; 1 when something was found, 2 when something could not be run."""
    code = 0

    def one(target: Target) -> None:
        nonlocal code
        try:
            outcome = fuzz(target, options.seconds, options.corpus / target.name, options.crashes)
        except (MissingError, build.BuildError) as error:
            print(error, file=sys.stderr)
            code = code or 2
            return
        show(outcome)
        for path in ([options.log] if options.log else []) + ([ACCUMULATED] if options.accumulate else []):
            ledger.add(path, [outcome.run])
        runs.append(outcome.run)
        if outcome.run.crashes:
            code = 1

    runs: list[ledger.Run] = []
    for _ in range(options.rounds):
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(one, targets))
    totals: dict[str, dict[str, float]] = {}
    for run in runs:
        ledger.count(totals, run)
    print(ledger.table(totals))
    if options.log:
        print(f"all that {options.log} knows:\n{ledger.table(ledger.add(options.log, []))}")
    return code


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    targets = [(TARGETS | SELFTESTS)[name] for name in options.targets or TARGETS]
    if options.repeat:
        return max(repeat(target, options.repeat) for target in targets)
    if options.minimise:
        for target in targets:
            kept = minimise.minimise(target, [options.corpus / target.name, target.corpus])
            minimise.store(target, kept)
            print(f"{target.name}: {len(kept)} inputs, {sum(map(len, kept))} bytes")
        return 0
    return run_all(targets, options)


if __name__ == "__main__":
    sys.exit(main())
