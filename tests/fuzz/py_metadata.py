"""The metadata block: one of the errors that it has, or sizes that fit together, and then it is written back the same.

Input: nothing (4), the beginning of the block; zeros follow.
"""

from __future__ import annotations

import re

from hast.activemap import METADATA_SIZE
from hast.errors import DataError
from hast.metadata import check_media, unpack
from hast.nv import decode
from tests.fuzz.nvmutator import HEAD


def own_name(block: bytes) -> str:
    """The name that the block has, so that it is not always another resource's, if hast.conf can have it."""
    try:
        name = decode(block).get_string("resource", "data")
    except DataError:
        return "data"
    return name if re.fullmatch(r"[a-zA-Z0-9._-]+", name) else "data"


def check(data: bytes) -> None:
    block = data[HEAD : HEAD + METADATA_SIZE].ljust(METADATA_SIZE, b"\0")
    for name in {"data", own_name(block)}:
        try:
            metadata = unpack(block, name)
        except DataError as error:
            assert len(str(error).splitlines()) == 1
            continue
        assert 0 < metadata.mapsize <= 1 << 30 and metadata.datasize > 0
        extents = -(-metadata.datasize // metadata.extentsize)
        assert extents <= 8 * metadata.mapsize, "a map that is too small"
        assert unpack(metadata.pack(), name) == metadata, "another block comes back"
        check_media(metadata, metadata.offset + metadata.datasize)
