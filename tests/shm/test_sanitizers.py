"""Rings and doorbells between threads under ThreadSanitizer, and all of the arena's C under AddressSanitizer and
UndefinedBehaviorSanitizer. The same programs, broken on purpose, have to be found out: that a test passes says
something only when it can fail."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.shm.native import FFI, NATIVE, built, compiler, sanitizer_missing

RACE = 66  # the sanitizer's exit code
LOST_WAKE = 10  # BENCH_LOST_WAKE
TSAN = ["-fsanitize=thread", "-O1"]
ASAN = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1"]
PUMP = [NATIVE / "ring_pump.c", NATIVE / "ring_tsan.c", FFI / "ring.c", FFI / "doorbell.c"]
ARENA = [FFI / "ring.c", FFI / "doorbell.c", FFI / "arena.c", *sorted(FFI.glob("seq*.c"))]
PATIENCE = 20000  # ms that a thread of a right program may wait for a ring
IMPATIENCE = 500  # of a wrong one


def have(tmp_path: Path, flags: list[str]) -> None:
    reason = sanitizer_missing(tmp_path, *flags)
    if reason is not None:
        pytest.skip(reason)


def build_tsan(tmp_path: Path, *flags: str) -> Path:
    have(tmp_path, TSAN)
    # The sanitizer does not understand fences; what they order is not what it looks at.
    probe = tmp_path / "probe.c"
    probe.write_text("int main(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); return 0; }\n")
    command = [compiler() or "gcc", *TSAN, "-Wall", str(probe), "-o", str(tmp_path / "probe")]
    warned = "-Wtsan" in subprocess.run(command, capture_output=True, text=True).stderr
    quiet = ["-Wno-tsan"] if warned else []
    return built("ring_tsan", PUMP, *TSAN, *quiet, *flags)


def run(program: Path, *args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(program), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=120,
        env={"TSAN_OPTIONS": f"halt_on_error=1 exitcode={RACE}", "ASAN_OPTIONS": "detect_leaks=1"},
    )


def test_threads_without_races(tmp_path: Path) -> None:
    program = build_tsan(tmp_path)
    for kind in ("futex", "eventfd"):
        for lanes, entries, count in ((1, 1, 20000), (3, 64, 100000), (2, 1024, 200000)):
            done = run(program, lanes, entries, count, kind, PATIENCE)
            assert done.returncode == 0, f"{kind} {lanes} {entries}\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize(
    ("broken", "expected"), [("PUSH", RACE), ("POP", RACE), ("RECHECK", LOST_WAKE)], ids=["push", "pop", "recheck"]
)
def test_broken_ones_are_found_out(tmp_path: Path, broken: str, expected: int) -> None:
    program = build_tsan(tmp_path, f"-DHAST_TEST_BREAK_{broken}")
    for kind in ("futex", "eventfd"):
        done = run(program, 1, 1 if broken == "RECHECK" else 64, 200000, kind, IMPATIENCE)
        assert done.returncode == expected, f"{broken} {kind}\n{done.stdout}{done.stderr}"
        assert expected != RACE or "data race" in done.stderr


def test_arena_without_undefined_behaviour(tmp_path: Path) -> None:
    have(tmp_path, ASAN)
    done = run(built("shm_unit", [NATIVE / "shm_unit.c", *ARENA], *ASAN))
    assert done.returncode == 0, done.stdout + done.stderr


def test_address_sanitizer_sees_what_is_outside(tmp_path: Path) -> None:
    """The unit program, told to make its ring one entry too small."""
    have(tmp_path, ASAN)
    program = built("shm_unit", [NATIVE / "shm_unit.c", *ARENA], *ASAN, "-DHAST_TEST_BREAK_SIZE")
    done = run(program)
    assert done.returncode != 0
    assert "AddressSanitizer" in done.stderr


def test_threads_with_address_sanitizer(tmp_path: Path) -> None:
    have(tmp_path, ASAN)
    program = built("ring_asan", PUMP, *ASAN)
    for kind in ("futex", "eventfd"):
        done = run(program, 3, 16, 100000, kind, PATIENCE)
        assert done.returncode == 0, f"{kind}\n{done.stdout}{done.stderr}"
