"""Compiles the native test programs of tests/native against the very sources of the extension."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "tests" / "native"
FFI = ROOT / "hast" / "ffi"
FLAGS = ["-std=c11", "-D_GNU_SOURCE", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{FFI}", f"-I{NATIVE}"]
TIMEOUT = 120


def compiler() -> str | None:
    return shutil.which("gcc") or shutil.which("clang")


def compile_native(output: Path, sources: Sequence[Path], *flags: str) -> Path:
    """Compiles sources to output; a compiler's error fails the test with its text."""
    command = [compiler() or "gcc", *FLAGS, *flags, *map(str, sources), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
    return output


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
