"""`make perf` does what it says: short jobs through the whole harness. No figure is judged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hast.device import fuse
from tests import tools
from tests.e2e.node import ROOT


def perf(out: Path, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "perf", *arguments, "--repeats=1", "--seconds=0.2", "--size=16", f"--out={out}"]
    return subprocess.run(
        command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=200
    )


def result(out: Path, section: str) -> dict[str, Any]:
    return dict(json.loads((out / f"{section}.json").read_text()))


def test_hast_beside_another_server(tmp_path: Path) -> None:
    tools.need("fio", "nbdkit")
    job = "randwrite 4k depth 8"
    done = perf(tmp_path, "memory", "--systems=hast memsync,hast degraded,nbdkit,file", f"--jobs={job}")
    assert done.returncode == 0, done.stdout + done.stderr
    samples = result(tmp_path, "memory")["samples"][job]
    assert list(samples) == ["hast memsync", "hast degraded", "nbdkit", "file"]
    for system, (figures,) in samples.items():
        assert figures["requests"] > 0, system
        assert figures["p50"] <= figures["p99"], system
    for of in ("hast memsync", "hast degraded", "nbdkit"):
        assert f"| {of} |" in done.stdout
    assert (tmp_path / "report.md").read_text().strip() == done.stdout.strip()
    assert (tmp_path / "memory-randwrite-8-latency.svg").exists()


def test_mirrors_of_qemu(tmp_path: Path) -> None:
    tools.need("fio", "qemu-storage-daemon")
    done = perf(tmp_path, "memory", "--systems=quorum,quorum unix,mirror,mirror unix", "--jobs=randread 4k depth 1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(result(tmp_path, "memory")["samples"]["randread 4k depth 1"]) == {
        "quorum", "quorum unix", "mirror", "mirror unix",
    }  # fmt: skip


def test_system_calls_are_counted(tmp_path: Path) -> None:
    tools.need("fio", "qemu-nbd", "strace")
    tools.need_root()
    job = "randread 4k depth 32"
    done = perf(tmp_path, "calls", "--systems=qemu-nbd", f"--jobs={job}")
    assert done.returncode == 0, done.stdout + done.stderr
    counts = result(tmp_path, "calls")["calls"][job]["qemu-nbd"]
    assert counts["pread64"] >= 1, "each request is one read of the file"


def test_a_tool_that_is_missing_is_named_and_the_rest_measured(tmp_path: Path) -> None:
    tools.need("fio")
    (tmp_path / "fio").symlink_to(str(tools.find("fio")))
    arguments = ("memory", "--systems=nbdkit,file", "--jobs=randread 4k depth 1")
    done = perf(tmp_path / "out", *arguments, env=os.environ | {"PATH": str(tmp_path)})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "left out: nbdkit: nbdkit is not installed (Debian package nbdkit)" in done.stderr
    assert list(result(tmp_path / "out", "memory")["samples"]["randread 4k depth 1"]) == ["file"]


def test_without_fio_nothing_is_measured(tmp_path: Path) -> None:
    done = perf(tmp_path / "out", "memory", env=os.environ | {"PATH": str(tmp_path)})
    assert done.returncode == 1
    assert "fio is not installed (Debian package fio): nothing can be measured" in done.stderr


def trace(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    tools.need("fio")
    command = [sys.executable, "-m", "perf.trace", *arguments, f"--out={out}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_a_trace_of_writes(tmp_path: Path) -> None:
    done = trace(tmp_path, "--what=write", "--modes=memsync", "--depths=1,8", "--seconds=0.1")
    depths = result(tmp_path, "trace")["modes"]["memsync"]
    assert list(depths) == ["1", "8"]
    for depth, found in depths.items():
        assert found["bios"] > 0
        assert {hop["node"] for hop in found["hops"]} == {"primary", "secondary"}
        assert found["hops"][-1]["what"] == "all of it"
        assert f"memsync, depth {depth}: {found['bios']} writes" in done.stdout
        assert (tmp_path / f"trace-memsync-{depth}.svg").read_text().startswith("<svg")


@pytest.mark.parametrize("front", ["nbd", pytest.param("fuse", marks=pytest.mark.root)])
def test_a_trace_of_reads(tmp_path: Path, front: str) -> None:
    if front == "fuse" and (reason := fuse.usable()) is not None:
        pytest.skip(reason)
    done = trace(tmp_path, "--what=read", f"--front={front}", "--depths=1,8", "--seconds=0.1")
    depths = result(tmp_path, "trace")["reads"][front]
    assert list(depths) == ["1", "8"]
    for depth, found in depths.items():
        assert found["reads"] > 0
        whats = [hop["what"] for hop in found["hops"]]
        assert whats[-2:] == ["all of it, in here", "rest of client's latency"]
        assert "receives it" in whats and "reads" in whats and "answers" in whats
        counts = found["counts"]
        assert counts["wakes"] > 0 and counts["requests"] > 0
        if front == "fuse":
            # One of each for each request, and the call that finds none. ggate may be asked other things as well.
            for name, count in (("answers", counts["answers"]), ("calls", counts["calls"] - counts["empty"])):
                assert 0.9 < count / counts["requests"] < 1.1, name
        assert 0.99 < sum(found["shares"]["primary: ggate"].values()) < 1.01
        assert found["processors"]["used"]["primary: ggate"][0] > 0
        assert f"{front}, depth {depth}: {found['reads']} reads" in done.stdout
        assert (tmp_path / f"trace-read-{front}-{depth}.svg").read_text().startswith("<svg")


@pytest.mark.slow
def test_a_trace_of_a_full_resynchronisation(tmp_path: Path) -> None:
    done = trace(tmp_path, "--what=resync", "--resync-size=256")
    found = result(tmp_path, "trace")["resync"]
    assert found["chunks"] > 0
    assert f"full resynchronisation: {found['chunks']} chunks" in done.stdout
    assert {hop["node"] for hop in found["hops"]} == {"primary", "secondary"}
    processes = ["primary: disk", "primary: ggate", "secondary: recv"]
    assert list(found["shares"]) == processes
    assert all(found["processors"]["used"][process][0] > 0 for process in processes)
    assert found["MB/s"]["traced"] > 0
    assert (tmp_path / "trace-resync.svg").read_text().startswith("<svg")


def test_a_resource_that_is_not_there_cannot_be_traced(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "perf.trace", "--attach=nothere", "--seconds=0.1", f"--out={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "no process here is titled 'hastd: nothere (primary)'" in done.stderr
