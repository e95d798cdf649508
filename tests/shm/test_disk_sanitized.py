"""The disk pump under sanitizers: tests/native/disk_stress.c, compiled with them, once for each engine."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from hast.ffi import _hast
from tests.shm.native import FFI, NATIVE, built, sanitizer_missing

lib = _hast.lib
SHARED = ("arena", "ring", "doorbell", "trace")
SOURCES = [*sorted(FFI.glob("disk*.c")), *sorted(FFI.glob("seq*.c")), *(FFI / f"{name}.c" for name in SHARED)]


@pytest.fixture(scope="module", params=["thread", "address,undefined"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # The fence in the doorbell is not understood by the thread sanitizer, which says so; the rings do not rely on it.
    flags = ["-O1", "-Wno-tsan", f"-fsanitize={request.param}"]
    reason = sanitizer_missing(tmp_path_factory.mktemp("native"), *flags)
    if reason is not None:
        pytest.skip(reason)
    return built("disk_stress", [NATIVE / "disk_stress.c", *SOURCES], *flags)


@pytest.mark.parametrize("engine", ["INLINE", "URING", "THREADS"])
def test_no_sanitizer_complains(program: Path, engine: str, tmp_path: Path) -> None:
    if engine == "URING" and not lib.hast_disk_uring_works():
        pytest.skip("io_uring cannot be set up here")
    number = getattr(lib, f"HAST_DISK_{engine}")
    done = subprocess.run(
        [str(program), str(tmp_path / "component"), str(number), "100"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
