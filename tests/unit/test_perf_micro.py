"""`make perf-micro` measures what it says and compares it with what is kept. No figure is judged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from perf import micro
from perf.micro import Figure
from tests.tools import ROOT


def run(*arguments: str) -> str:
    command = [sys.executable, "-m", "perf.micro", "--starts=2", "--sample-us=20", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_result_is_kept_and_the_next_one_compared_with_it(tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    first = run(f"--kept={kept}", "--record")
    assert "nothing is kept to compare with" in first
    names = json.loads(kept.read_text())["figures"].keys()
    for part in ("ring", "doorbell", "round trip", "message", "lzf", "crc32", "sha256", "sequencer", "map", "Python"):
        assert any(name.startswith(f"{part}:") for name in names), part
    recorded = kept.read_text()
    second = run(f"--kept={kept}")
    assert kept.read_text() == recorded, "nothing is recorded that was not asked for"
    lines = second.splitlines()
    rows = {name: line[len(name) :].split() for name in names for line in lines if line.startswith(f"{name} ")}
    for name in names:
        ns, ratio, spread, change = rows[name][:4]
        assert float(ns) > 0 and float(ratio) > 0 and float(change) >= 0, name
        assert spread.endswith("%"), name


def test_what_is_kept_in_the_repository_can_be_read() -> None:
    figures, about = micro.load(micro.KEPT)
    assert len(figures) > 40 and about["processor"]


def figure(ratio: float, spread: float) -> Figure:
    return Figure(ns=ratio, ratio=ratio, low=ratio * (1 - spread), high=ratio * (1 + spread))


@pytest.mark.parametrize(
    ("new", "spread", "word"),
    [(100, 0.1, ""), (104, 0.0, ""), (110, 0.2, ""), (130, 0.1, "SLOWER"), (70, 0.1, "faster"), (90, 0.2, "")],
)
def test_slower_is_what_is_so_by_more_than_its_spread(new: float, spread: float, word: str) -> None:
    assert micro.verdict(figure(new, spread), figure(100, spread)) == word
    line = micro.table({"a": figure(new, spread)}, {"a": figure(100, spread)})[1]
    assert line.endswith(word) and f"{new / 100:.2f}" in line


def test_benchmarks_that_come_and_go_are_said_so() -> None:
    text = micro.table({"a": figure(1, 0)}, {"b": figure(1, 0)})
    assert text[1].split() == ["a", "1.0", "1.00", "0%", "new"]
    assert text[2].split() == ["b", "is", "not", "there", "any", "more"]


def test_a_program_that_fails_is_told_of() -> None:
    with pytest.raises(micro.PerfError, match="exit status 3\nno"):
        micro.run([sys.executable, "-c", "import sys; sys.stderr.write('no'); sys.exit(3)"])
