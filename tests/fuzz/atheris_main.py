"""Runs one Python target under atheris:  python -m tests.fuzz.atheris_main TARGET [libFuzzer's arguments]"""

from __future__ import annotations

import logging
import sys

import atheris

from tests.fuzz.nvmutator import mutate
from tests.fuzz.targets import SELFTESTS, TARGETS, checker


def custom_mutator(data: bytes, max_size: int, seed: int) -> bytes:
    return mutate(data, max_size, seed, atheris.Mutate)


def main() -> None:
    target = (TARGETS | SELFTESTS)[sys.argv[1]]
    logging.disable(logging.CRITICAL)
    with atheris.instrument_imports(include=["hast"]):
        check = checker(target.name)
    arguments = [sys.argv[0], *sys.argv[2:]]
    if target.nv:
        atheris.Setup(arguments, check, custom_mutator=custom_mutator)
    else:
        atheris.Setup(arguments, check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
