"""Speed of one node without a peer, beside servers that do not replicate, in one run.

Each round runs every job against every server in turn, so that a slow moment of the machine hits all of them;
figures are medians over the rounds, ratios are to hast. Components are files in memory (/dev/shm): what is measured is
the path of a request, not a disk. Needs fio (nbd engine), nbdkit and qemu-nbd; and a built checkout.

    python perf/one_node.py [--rounds N] [--seconds N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SIZE = 1 << 30


@dataclass(frozen=True)
class Job:
    name: str
    args: tuple[str, ...]
    unit: str  # "iops" or "MB/s"


def job(name: str, rw: str, bs: str, depth: int, unit: str = "iops") -> Job:
    return Job(name, (f"--rw={rw}", f"--bs={bs}", f"--iodepth={depth}"), unit)


JOBS = (
    job("randwrite 4k depth 1", "randwrite", "4k", 1),
    job("randwrite 4k depth 32", "randwrite", "4k", 32),
    job("randread 4k depth 1", "randread", "4k", 1),
    job("randread 4k depth 32", "randread", "4k", 32),
    job("write 128k depth 8", "write", "128k", 8, "MB/s"),
    job("read 128k depth 8", "read", "128k", 8, "MB/s"),
)


def wait_for(path: Path, process: subprocess.Popen[bytes] | None = None) -> None:
    deadline = time.monotonic() + 15
    while not path.exists():
        if time.monotonic() > deadline or (process is not None and process.poll() is not None):
            raise SystemExit(f"{path} did not appear")
        time.sleep(0.01)


@contextmanager
def server(command: list[str], sock: Path) -> Iterator[str]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(sock, process)
        yield f"nbd+unix:///?socket={sock}"
    finally:
        process.terminate()
        process.wait()


@contextmanager
def hast(directory: Path, memory: Path) -> Iterator[str]:
    """One node with `remote none` and the NBD socket only."""
    component = memory / "hast.img"
    config = directory / "hast.conf"
    config.write_text(
        f"control {directory}/ctl\npidfile {directory}/pid\nlisten tcp4://127.0.0.1:8457\nrundir {directory}/run\n"
        f"resource perf {{\n device nbd\n on perf {{\n local {component}\n remote none\n }}\n}}\n"
    )
    env = {**os.environ, "HAST_NODE": "perf"}

    def hastctl(*args: str) -> None:
        subprocess.run([ROOT / "bin/hastctl", *args], env=env, check=True)

    hastctl("create", "-c", str(config), "-m", str(SIZE + (1 << 20)), "perf")
    daemon = subprocess.Popen([ROOT / "bin/hastd", "-F", "-c", str(config)], env=env)
    try:
        wait_for(directory / "ctl", daemon)
        hastctl("role", "-c", str(config), "primary", "perf")
        yield f"nbd+unix:///perf?socket={directory}/run/perf.sock"
    finally:
        daemon.terminate()
        daemon.wait()


def fio(uri: str, which: Job, seconds: int) -> dict[str, float]:
    """Run a job; its rate, median and 99th percentile latency in microseconds."""
    out = subprocess.run(
        ["fio", "--name=job", "--ioengine=nbd", f"--uri={uri}", *which.args, f"--size={SIZE}", "--time_based",
         f"--runtime={seconds}", "--ramp_time=1", "--randrepeat=0", "--norandommap", "--output-format=json"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    result = json.loads(out.stdout[out.stdout.index("{") :])["jobs"][0]
    side = result["write" if "write" in which.args[0] else "read"]
    percentiles = side["clat_ns"]["percentile"]
    rate = side["iops"] if which.unit == "iops" else side["bw_bytes"] / 1e6
    return {"rate": rate, "p50": percentiles["50.000000"] / 1e3, "p99": percentiles["99.000000"] / 1e3}


def measure(rounds: int, seconds: int) -> dict[str, dict[str, dict[str, float]]]:
    """job -> server -> medians."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hastperf.")))
        memory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hastperf.", dir="/dev/shm")))
        for name in ("nbdkit", "qemu"):
            with (memory / name).open("wb") as f:
                f.truncate(SIZE)
        kit, qemu = directory / "nbdkit.sock", directory / "qemu.sock"
        servers = {
            "hast": stack.enter_context(hast(directory, memory)),
            "nbdkit file": stack.enter_context(
                server(["nbdkit", "-f", "-U", str(kit), "file", str(memory / "nbdkit")], kit)
            ),
            "qemu-nbd": stack.enter_context(
                server(["qemu-nbd", "-t", "-f", "raw", "-e", "8", "-k", str(qemu), str(memory / "qemu")], qemu)
            ),
        }
        for uri in servers.values():  # every block allocated before anything is timed
            fio(uri, job("fill", "write", "1m", 4, "MB/s"), 3)
        samples: dict[str, dict[str, list[dict[str, float]]]] = {}
        for _ in range(rounds):
            for which in JOBS:
                for name, uri in servers.items():
                    samples.setdefault(which.name, {}).setdefault(name, []).append(fio(uri, which, seconds))
    return {
        which: {
            name: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            for name, runs in by_server.items()
        }
        for which, by_server in samples.items()
    }


def table(result: dict[str, dict[str, dict[str, float]]]) -> str:
    lines = [f"{'job':<24}{'server':<14}{'rate':>12}{'p50 us':>10}{'p99 us':>10}{'hast is':>10}"]
    units = {which.name: which.unit for which in JOBS}
    for which, by_server in result.items():
        for name, figures in by_server.items():
            ratio = by_server["hast"]["rate"] / figures["rate"]
            rate = f"{figures['rate']:.0f} {units[which]}"
            lines.append(
                f"{which:<24}{name:<14}{rate:>12}{figures['p50']:>10.0f}{figures['p99']:>10.0f}{ratio:>9.2f}x"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=4)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    missing = [tool for tool in ("fio", "nbdkit", "qemu-nbd") if shutil.which(tool) is None]
    if missing:
        sys.exit(f"needed and not installed: {', '.join(missing)}")
    result = measure(args.rounds, args.seconds)
    print(table(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
