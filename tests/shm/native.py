"""Compiles the native test programs of tests/native against the very sources of the extension.

Invariant: what is kept in .build/native is named by the text of all sources and headers, the flags and the compiler's
version. Several test processes share it, and nothing stale is ever run.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "tests" / "native"
BUILD = ROOT / ".build" / "native"
FFI = ROOT / "hast" / "ffi"
FLAGS = ["-std=c11", "-D_GNU_SOURCE", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{FFI}", f"-I{NATIVE}"]
TIMEOUT = 200  # seconds; less than the test has


def compiler() -> str | None:
    return shutil.which("gcc") or shutil.which("clang")


def compile_native(output: Path, sources: Sequence[Path], *flags: str) -> Path:
    """Compiles sources to output; a compiler's error fails the test with its text."""
    command = [compiler() or "gcc", *FLAGS, *flags, *map(str, sources), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
    return output


def built(name: str, sources: Sequence[Path], *flags: str) -> Path:
    """The program of these sources, compiled unless it is there: once for all tests and their processes."""
    asked = [compiler() or "gcc", "--version"]
    version = subprocess.run(asked, capture_output=True, timeout=TIMEOUT, check=True).stdout
    total = hashlib.sha256("\0".join([*FLAGS, *flags, *(path.name for path in sources)]).encode() + version)
    for path in sorted([*FFI.glob("*.[ch]"), *NATIVE.glob("*.[ch]")]):
        total.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    program = BUILD / f"{name}-{total.hexdigest()[:16]}"
    BUILD.mkdir(parents=True, exist_ok=True)
    with program.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists():
            compile_native(program.with_suffix(".new"), sources, *flags).replace(program)
    return program


def sanitizer_missing(where: Path, *flags: str) -> str | None:
    """Why programs with this sanitizer cannot be made or run here, or None: an empty one is tried."""
    if compiler() is None:
        return "no gcc and no clang"
    source = where / "empty.c"
    source.write_text("int main(void) { return 0; }\n")
    program = where / "empty"
    command = [compiler() or "gcc", *flags, str(source), "-o", str(program)]
    for step in (command, [str(program)]):
        done = subprocess.run(step, capture_output=True, text=True, timeout=TIMEOUT)
        if done.returncode != 0:
            return f"{' '.join(flags)} does not work here: {done.stderr.strip()[:200]}"
    return None
