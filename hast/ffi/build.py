"""Builds hast.ffi._hast, the one C extension, from hast/ffi/*.c (cffi, API mode).

Invariants:
- What Python sees of a header is exactly the text between its `/* cffi: begin */` and
  `/* cffi: end */` lines: plain declarations, which the C compiler checks against the real ones.
- Every *.c of this directory is part of the extension; every *.h is a dependency of it, so that a
  changed layout never meets an old object file.
- A header that declares types comes before those that use them: HEADERS is the order, and headers
  that it does not name follow in alphabetical order.

HAST_WERROR=1 in the environment turns warnings into errors (`make check`).
"""

import os
import re
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

# Base types first. A name that is not (yet) there is skipped.
HEADERS = [
    "ring.h",
    "doorbell.h",
    "arena.h",
    "pump.h",
    "seq.h",
    "wire.h",
    "lzf.h",
    "disk.h",
    "conn.h",
    "ggate.h",
]

SECTION = re.compile(
    r"^[ \t]*/\* cffi: begin \*/[ \t]*$(.*?)^[ \t]*/\* cffi: end \*/[ \t]*$", re.MULTILINE | re.DOTALL
)


def headers() -> list[Path]:
    """The headers that have a cffi section, in the order in which Python must read them."""
    rank = {name: n for n, name in enumerate(HEADERS)}
    found = sorted(HERE.glob("*.h"), key=lambda p: (rank.get(p.name, len(HEADERS)), p.name))
    return [path for path in found if SECTION.search(path.read_text()) and implemented(path)]


def implemented(path: Path) -> bool:
    """Whether what a header declares to Python can be linked: pump.h has constants only."""
    return path.name == "pump.h" or path.with_suffix(".c").exists()


def declarations(path: Path) -> str:
    """The text of all cffi sections of one header."""
    return "\n".join(section.group(1) for section in SECTION.finditer(path.read_text()))


def relative(paths: list[Path]) -> list[str]:
    """Paths as setuptools wants them: relative to setup.py, with slashes."""
    return [path.relative_to(ROOT).as_posix() for path in sorted(paths)]


def make_builder() -> FFI:
    """The cffi builder; setup.py and this file run as a script both use it."""
    builder = FFI()
    # The wrapper that cffi generates has unused parameters of its own; our sources may have none.
    preamble = [
        '#pragma GCC diagnostic ignored "-Wunused-parameter"',
        '#pragma GCC diagnostic ignored "-Wmissing-field-initializers"',
    ]
    for path in headers():
        builder.cdef(declarations(path))
        preamble.append(f'#include "{path.name}"')
    flags = ["-std=c11", "-D_GNU_SOURCE", "-O2", "-Wall", "-Wextra", "-pthread"]
    if os.environ.get("HAST_WERROR") == "1":
        flags.append("-Werror")
    builder.set_source(
        "hast.ffi._hast",
        "\n".join(preamble) + "\n",
        sources=relative(list(HERE.glob("*.c"))),
        include_dirs=[HERE.relative_to(ROOT).as_posix()],
        depends=relative([*HERE.glob("*.h"), HERE / "build.py"]),
        extra_compile_args=flags,
        extra_link_args=["-pthread"],
    )
    return builder


ffibuilder = make_builder()

if __name__ == "__main__":
    os.chdir(ROOT)
    ffibuilder.compile(verbose=True)
