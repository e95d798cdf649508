"""Addresses: an AddressError, or an endpoint whose full form means the same."""

from __future__ import annotations

from hast.address import AddressError, parse_address


def check(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    for unix in (True, False):
        try:
            address = parse_address(text, allow_unix=unix)
        except AddressError as error:
            assert error.reason
            continue
        assert str(address) == text
        assert address.is_unix <= unix
        assert address.path.startswith("/") if address.is_unix else address.host and 1 <= address.port <= 65535
        assert parse_address(address.canonical()) == address, "its full form is another address"
