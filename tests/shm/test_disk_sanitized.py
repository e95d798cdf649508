"""The disk pump under sanitizers: tests/native/disk_stress.c, compiled with them, once for each engine."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from hast.ffi import _hast

lib = _hast.lib
ROOT = Path(__file__).resolve().parents[2]
FFI = ROOT / "hast" / "ffi"
SOURCES = [*FFI.glob("disk*.c"), *FFI.glob("seq*.c"), *(FFI / f"{name}.c" for name in ("arena", "ring", "doorbell"))]


@pytest.fixture(scope="module", params=["thread", "address,undefined"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("native") / "disk_stress"
    # The fence in the doorbell is not understood by the thread sanitizer, which says so; the rings do not rely on it.
    flags = ["-std=c11", "-D_GNU_SOURCE", "-g", "-O1", "-Wno-tsan", "-pthread", f"-fsanitize={request.param}"]
    empty = made.with_suffix(".c")
    empty.write_text("int main(void) { return 0; }\n")
    probe = subprocess.run(["cc", *flags, "-o", str(made), str(empty)], capture_output=True, text=True)
    if probe.returncode != 0 or subprocess.run([str(made)], capture_output=True).returncode != 0:
        pytest.skip(f"no {request.param} sanitizer here: {probe.stderr.strip()}")
    stress = ROOT / "tests" / "native" / "disk_stress.c"
    subprocess.run(["cc", *flags, f"-I{FFI}", "-o", str(made), str(stress), *map(str, SOURCES)], check=True)
    return made


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
