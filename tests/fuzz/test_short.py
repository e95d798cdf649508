"""Every fuzz target for a moment: on its committed corpus, then on new inputs (docs/fuzzing.md has the long form)."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz import minimise, run
from tests.fuzz.targets import TARGETS, checker
from tests.tools import ROOT

SECONDS = {"c": 2, "python": 1}
PYTHON = [name for name, target in TARGETS.items() if target.kind == "python"]
NATIVE = [name for name, target in TARGETS.items() if target.kind == "c"]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Refusals by the thousand are not worth a line each."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", PYTHON)
def test_corpus(name: str) -> None:
    """Needs no atheris. What a fuzzer once found interesting is a test from then on."""
    check, inputs = checker(name), sorted(TARGETS[name].corpus.iterdir())
    assert inputs
    for path in inputs:
        try:
            check(path.read_bytes())
        except Exception as error:
            raise AssertionError(f"{path}: {error!r}") from error


@pytest.mark.parametrize("name", [*NATIVE, *PYTHON])
def test_fuzz(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]
    try:
        outcome = run.fuzz(target, SECONDS[target.kind], tmp_path / "corpus", tmp_path / "crashes")
    except run.MissingError as error:
        pytest.skip(str(error))
    assert outcome.run.crashes == 0, outcome.report
    assert outcome.run.executions > 20, f"it hardly ran:\n{outcome.run}"


@pytest.mark.parametrize("name", list(TARGETS))
def test_corpora_are_small(name: str) -> None:
    inputs = [path.stat().st_size for path in TARGETS[name].corpus.iterdir()]
    assert inputs and sum(inputs) <= minimise.LIMIT


@pytest.mark.parametrize(("name", "found"), [("selftest_c", b"crash"), ("selftest_python", b"crash")])
def test_findings_are_reported(name: str, found: bytes, tmp_path: Path) -> None:
    """A target that is wrong about one input: the runner finds it, says how to repeat it, and ends with 1."""
    if (reason := run.missing(TARGETS["nv" if name == "selftest_python" else "wire"])) is not None:
        pytest.skip(reason)
    command = [sys.executable, "-m", "tests.fuzz.run", "--seconds", "20", "--crashes", str(tmp_path / "crashes")]
    command += ["--corpus", str(tmp_path / "corpus"), "--log", str(tmp_path / "log"), name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 1, done.stdout + done.stderr
    line = next(line for line in done.stdout.splitlines() if "repeat it: " in line)
    assert "-crash-" in line
    again = subprocess.run(line.partition("repeat it: ")[2].split(), cwd=ROOT, capture_output=True, timeout=60)
    assert again.returncode != 0
