"""The connection's pumps under sanitizers: tests/native/conn_stress.c, damaged streams by the hundred."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.shm.native import FFI, NATIVE, built, sanitizer_missing

FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1"]
NAMES = (
    "conn", "link", "send", "recv", "recv_primary", "recv_secondary", "recv_order", "transform", "crc32", "sha256",
    "lzf", "wire", "awake", "direct", "disk_probe", "arena", "ring", "doorbell", "trace",
)  # fmt: skip
SOURCES = [*sorted(FFI.glob("seq*.c")), *(FFI / f"{name}.c" for name in NAMES)]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("native")
    reason = sanitizer_missing(where, *FLAGS)
    if reason is not None:
        pytest.skip(reason)
    return built("conn_stress", [NATIVE / "conn_stress.c", *SOURCES], *FLAGS)


@pytest.mark.parametrize("seed", range(1, 5))
def test_damaged_streams(program: Path, seed: int) -> None:
    done = subprocess.run([str(program), str(seed), "150"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
