"""The compiled extension, as mypy sees it: what it has is declared in the headers (build.py)."""

from typing import Any

ffi: Any
lib: Any
