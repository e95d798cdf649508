"""nv: any bytes are refused with a DataError, or understood; what was understood is written and read back the same."""

from __future__ import annotations

from hast.errors import DataError
from hast.nv import Nv, NvType, decode, printable
from tests.fuzz.nvmutator import HEAD

READERS = {
    NvType.INT8: Nv.get_int8,
    NvType.UINT8: Nv.get_uint8,
    NvType.INT16: Nv.get_int16,
    NvType.UINT16: Nv.get_uint16,
    NvType.INT32: Nv.get_int32,
    NvType.UINT32: Nv.get_uint32,
    NvType.INT64: Nv.get_int64,
    NvType.UINT64: Nv.get_uint64,
    NvType.UINT8_ARRAY: Nv.get_uint8_array,
    NvType.STRING: Nv.get_string,
}


def check(data: bytes) -> None:
    try:
        nv = decode(data[HEAD:], limit=4096)
    except DataError as error:
        assert len(str(error).splitlines()) == 1, "an error of more than one line"
        return
    again = decode(nv.encode())
    assert again == nv, "another thing comes back"
    first: dict[str, object] = {}
    for element in nv:
        first.setdefault(element.name, element.value)
        assert len(printable(element.name).splitlines()) <= 1
        for kind, reader in READERS.items():
            try:
                value = reader(nv, element.name)
            except DataError:
                continue
            assert value == first[element.name], f"not the first of its name, as {kind.label}"
