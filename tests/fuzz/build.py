"""Builds the C targets in .build/fuzz: objects once for all of them, and a program for each.

Invariant: what is built depends on the text of all sources, headers and flags; nothing stale is ever run.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import time
from pathlib import Path

from tests.fuzz.targets import HERE, Target

ROOT = HERE.parents[1]
FFI = ROOT / "hast" / "ffi"
NATIVE = HERE / "native"
BUILD = ROOT / ".build" / "fuzz"
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
FLAGS = ["-std=c11", "-D_GNU_SOURCE", "-g1", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread"]
INCLUDE = [f"-I{FFI}", f"-I{NATIVE}"]
COVER = "-fsanitize=fuzzer-no-link"
# Of hast/ffi: the disk stage gets nothing from strangers; a disk in memory stands in for it.
SKIP = ("disk.", "disk_inline", "disk_op", "disk_threads", "disk_uring")
TIMEOUT = 300
KEPT_SECONDS = 86400


class BuildError(Exception):
    """The compiler's own words."""


def missing() -> str | None:
    """Why C targets cannot be built here, or None: an empty one is tried."""
    if shutil.which("clang") is None:
        return "clang is not installed (Debian packages clang and libclang-rt-dev): run tools/requirements.sh"
    BUILD.mkdir(parents=True, exist_ok=True)
    source = BUILD / "empty.c"
    source.write_text(
        "int LLVMFuzzerTestOneInput(const char *at, unsigned long n);\n"
        "int LLVMFuzzerTestOneInput(const char *at, unsigned long n) { return at == 0 && n > 0; }\n"
    )
    command = ["clang", "-fsanitize=fuzzer,address,undefined", str(source), "-o", str(BUILD / "empty")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    if done.returncode != 0:
        return f"clang has no libFuzzer here (Debian package libclang-rt-dev): {done.stderr.strip()[:300]}"
    return None


def program(target: Target) -> Path:
    """The program of a C target, up to date. Raises BuildError."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        where = BUILD / "bin" / _digest()
        if not (where / "complete").exists():
            _forget_old()
            _objects(where)
            (where / "complete").touch()
        return _link(target, where)


def _forget_old() -> None:
    """What was built of other sources, unless it may still be run."""
    for old in (BUILD / "bin").glob("*"):
        if old.stat().st_mtime < time.time() - KEPT_SECONDS:
            shutil.rmtree(old)


def _sources() -> list[Path]:
    return [path for path in sorted(FFI.glob("*.c")) if not path.name.startswith((*SKIP, "_hast"))]


def _digest() -> str:
    total = hashlib.sha256(" ".join([*FLAGS, *SANITIZE, COVER]).encode())
    for path in sorted([*_sources(), *FFI.glob("*.h"), *NATIVE.glob("*.[ch]")]):
        total.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()[:16]


def _objects(where: Path) -> None:
    for kind, extra in (("cover", [COVER]), ("plain", [])):
        (where / kind).mkdir(parents=True, exist_ok=True)
        sources = _sources() if kind == "cover" else [*_sources(), NATIVE / "rig.c"]
        if kind == "plain":
            wanted = {"rig", "lzf", "crc32", "sha256"}
            sources = [path for path in sources if path.stem in wanted]
        for source in sources:
            output = where / kind / f"{source.stem}.o"
            _run(["clang", "-c", *FLAGS, *INCLUDE, *SANITIZE, *extra, str(source), "-o", str(output)])


def _link(target: Target, where: Path) -> Path:
    output = where / f"fuzz_{target.name}"
    if output.exists():
        return output
    objects = [where / ("plain" if path.stem in target.plain else "cover") / f"{path.stem}.o" for path in _sources()]
    objects.append(where / "plain" / "rig.o")
    libfuzzer = "-fsanitize=fuzzer"
    made = output.with_suffix(".new")
    _run(["clang", *FLAGS, *INCLUDE, *SANITIZE, libfuzzer, str(target.source), *map(str, objects), "-o", str(made)])
    made.rename(output)
    return output


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{done.stderr}")
