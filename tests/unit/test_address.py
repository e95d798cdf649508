"""Addresses: every way to write one, what each means, and what is refused and why."""

from __future__ import annotations

import ipaddress
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hast.address import DEFAULT_PORT, MAX_UNIX_PATH, Address, AddressError, literal_family, parse_address

TCP = [
    # text, protocol, host, port, canonical form
    ("10.0.0.1", "tcp4", "10.0.0.1", 8457, "tcp4://10.0.0.1:8457"),
    ("10.0.0.1:1", "tcp4", "10.0.0.1", 1, "tcp4://10.0.0.1:1"),
    ("tcp://10.0.0.1:65535", "tcp4", "10.0.0.1", 65535, "tcp4://10.0.0.1:65535"),
    ("tcp4://127.0.0.3:8457", "tcp4", "127.0.0.3", 8457, "tcp4://127.0.0.3:8457"),
    ("tcp4://0.0.0.0", "tcp4", "0.0.0.0", 8457, "tcp4://0.0.0.0:8457"),
    ("TCP4://10.0.0.1", "tcp4", "10.0.0.1", 8457, "tcp4://10.0.0.1:8457"),
    ("2001:db8::1", "tcp6", "2001:db8::1", 8457, "tcp6://[2001:db8::1]:8457"),
    ("2001:0DB8:0:0::1", "tcp6", "2001:db8::1", 8457, "tcp6://[2001:db8::1]:8457"),
    ("[2001:db8::1]", "tcp6", "2001:db8::1", 8457, "tcp6://[2001:db8::1]:8457"),
    ("[2001:db8::1]:99", "tcp6", "2001:db8::1", 99, "tcp6://[2001:db8::1]:99"),
    ("tcp://[::1]:99", "tcp6", "::1", 99, "tcp6://[::1]:99"),
    ("tcp6://::1", "tcp6", "::1", 8457, "tcp6://[::1]:8457"),
    ("tcp6://[::]:8457", "tcp6", "::", 8457, "tcp6://[::]:8457"),
    ("hasta", "tcp", "hasta", 8457, "tcp://hasta:8457"),
    ("hasta.example.org:8458", "tcp", "hasta.example.org", 8458, "tcp://hasta.example.org:8458"),
    ("tcp4://hasta.example.org", "tcp4", "hasta.example.org", 8457, "tcp4://hasta.example.org:8457"),
    ("tcp6://hasta:1", "tcp6", "hasta", 1, "tcp6://hasta:1"),
    ("hasta.", "tcp", "hasta.", 8457, "tcp://hasta.:8457"),
    ("node_1-b", "tcp", "node_1-b", 8457, "tcp://node_1-b:8457"),
    ("1und1.example", "tcp", "1und1.example", 8457, "tcp://1und1.example:8457"),
]

UNIX = [
    ("/var/run/hastctl", "/var/run/hastctl"),
    ("uds:///var/run/hastctl", "/var/run/hastctl"),
    ("unix:///var/run/hastctl", "/var/run/hastctl"),
    ("UDS:///tmp/x", "/tmp/x"),
    ("/" + "x" * (MAX_UNIX_PATH - 1), "/" + "x" * (MAX_UNIX_PATH - 1)),
]

WRONG = [
    ("", "the host is missing"),
    ("tcp://", "the host is missing"),
    (":8457", "the host is missing"),
    ("10.0.0.1:", "port '' is not a number from 1 to 65535"),
    ("10.0.0.1:0", "port '0' is not a number from 1 to 65535"),
    ("10.0.0.1:65536", "port '65536' is not a number from 1 to 65535"),
    ("10.0.0.1:000001", "port '000001' is not a number from 1 to 65535"),
    ("10.0.0.1:" + "9" * 5000, "port '" + "9" * 5000 + "' is not a number from 1 to 65535"),
    ("10.0.0.1:-1", "port '-1' is not a number from 1 to 65535"),
    ("10.0.0.1:\u0661", "port '\u0661' is not a number from 1 to 65535"),
    ("hasta:http", "port 'http' is not a number from 1 to 65535"),
    ("[::1]:", "port '' is not a number from 1 to 65535"),
    ("[::1", "']' is missing"),
    ("[::1]8457", "'8457' follows ']', only :port may"),
    ("[10.0.0.1]:1", "'10.0.0.1' in brackets is not an IPv6 address"),
    ("[]:1", "'' in brackets is not an IPv6 address"),
    ("[fe80::1%eth0]:1", "'fe80::1%eth0' in brackets is not an IPv6 address"),
    ("1:2:3", "'1:2:3' is not an IPv6 address, which before a port stands in brackets"),
    ("2001:db8::1::2", "'2001:db8::1::2' is not an IPv6 address, which before a port stands in brackets"),
    ("300.0.0.1", "'300.0.0.1' is not an IPv4 address: that is four numbers from 0 to 255"),
    ("10.1", "'10.1' is not an IPv4 address: that is four numbers from 0 to 255"),
    ("167772161", "'167772161' is not an IPv4 address: that is four numbers from 0 to 255"),
    ("10.0.0.1/24", "a '/' follows the host: an address has no prefix length and no path"),
    ("tcp://2001:db8::1/64", "a '/' follows the host: an address has no prefix length and no path"),
    ("tcp://10.0.0.1/", "a '/' follows the host: an address has no prefix length and no path"),
    ("tcp4://::1", "tcp4:// takes an IPv4 address, this is IPv6"),
    ("tcp6://10.0.0.1", "tcp6:// takes an IPv6 address, this is IPv4"),
    ("http://10.0.0.1", "http:// is not one of tcp://, tcp4://, tcp6://, uds://, unix://"),
    ("://x", ":// is not one of tcp://, tcp4://, tcp6://, uds://, unix://"),
    ("-hasta", "'-hasta' is not a host name"),
    ("ha sta", "'ha sta' is not a host name"),
    ("hasta..org", "'hasta..org' is not a host name"),
    ("x" * 64, f"'{'x' * 64}' is not a host name"),
    ("x." * 128, "the host name has 256 characters, the limit is 255"),
    ("uds://hastctl", "the path of a Unix socket must be absolute"),
    ("unix://", "the path of a Unix socket must be absolute"),
    ("/var/run/", "the path of a Unix socket must name a file"),
    ("/a\0b", "the path of a Unix socket holds a NUL byte"),
    ("/" + "x" * MAX_UNIX_PATH, f"the path of a Unix socket has {MAX_UNIX_PATH + 1} bytes, the limit is "
     f"{MAX_UNIX_PATH}"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "protocol", "host", "port", "canonical"), TCP)
def test_tcp(text: str, protocol: str, host: str, port: int, canonical: str) -> None:
    address = parse_address(text)
    assert (address.protocol, address.host, address.port, address.path) == (protocol, host, port, "")
    assert not address.is_unix
    assert str(address) == text  # FreeBSD's hastctl shows what the file says
    assert address.canonical() == canonical
    assert parse_address(canonical) == address


@pytest.mark.parametrize(("text", "path"), UNIX)
def test_unix(text: str, path: str) -> None:
    address = parse_address(text)
    assert address == Address("unix", path=path)
    assert address.is_unix
    assert address.family == socket.AF_UNIX
    assert str(address) == text
    assert address.canonical() == f"uds://{path}"


@pytest.mark.parametrize(("text", "reason"), WRONG)
def test_wrong(text: str, reason: str) -> None:
    with pytest.raises(AddressError) as caught:
        parse_address(text)
    assert caught.value.reason == reason
    assert str(caught.value) == f"address {text!r}: {reason}"
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("text", ["/var/run/x", "uds:///var/run/x", "unix:///var/run/x"])
def test_unix_where_only_tcp_is_meant(text: str) -> None:
    with pytest.raises(AddressError) as caught:
        parse_address(text, allow_unix=False)
    assert caught.value.reason == "a Unix socket cannot be used here"


def test_unknown_protocol_names_only_those_allowed() -> None:
    with pytest.raises(AddressError) as caught:
        parse_address("udp://x", allow_unix=False)
    assert caught.value.reason == "udp:// is not one of tcp://, tcp4://, tcp6://"


def test_default_port_is_hastds_or_the_callers() -> None:
    assert DEFAULT_PORT == 8457
    assert parse_address("10.0.0.1", default_port=0).port == 0
    assert parse_address("10.0.0.1:7", default_port=0).port == 7
    assert parse_address("[::1]", default_port=0).canonical() == "tcp6://[::1]"


@pytest.mark.parametrize(
    ("text", "family"),
    [
        ("10.0.0.1", socket.AF_INET),
        ("::1", socket.AF_INET6),
        ("hasta", socket.AF_UNSPEC),
        ("tcp4://hasta", socket.AF_INET),
        ("tcp6://hasta", socket.AF_INET6),
    ],
)
def test_family_for_getaddrinfo(text: str, family: int) -> None:
    assert parse_address(text).family == family


def test_equality_is_about_the_endpoint() -> None:
    same = ["10.0.0.1", "10.0.0.1:8457", "tcp://10.0.0.1", "tcp4://10.0.0.1:8457"]
    assert len({parse_address(text) for text in same}) == 1
    assert parse_address("::1") == parse_address("tcp6://[0:0::1]:8457")
    assert parse_address("/x") == parse_address("uds:///x") == parse_address("unix:///x")
    for other in ["10.0.0.1:8458", "10.0.0.2", "hasta", "::1", "/10.0.0.1"]:
        assert parse_address("10.0.0.1") != parse_address(other)


def test_an_address_that_was_not_written_shows_its_full_form() -> None:
    assert str(Address("tcp6", "::1", 9)) == "tcp6://[::1]:9"


def test_literal_family_refuses_what_is_not_an_address() -> None:
    assert literal_family("10.0.0.1") == socket.AF_INET
    assert literal_family("::ffff:10.0.0.1") == socket.AF_INET6
    for text in ["", "hasta", "10.0.0", "010.0.0.1", "::g", "1\0", "\udcff"]:
        assert literal_family(text) is None


ips = st.ip_addresses()
ports = st.integers(1, 65535)


@given(ips, ports, st.booleans())
def test_every_ip_address_round_trips(
    ip: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int, prefix: bool
) -> None:
    host = f"[{ip}]" if ip.version == 6 else str(ip)
    address = parse_address(f"tcp{ip.version}://{host}:{port}" if prefix else f"{host}:{port}")
    assert ipaddress.ip_address(address.host) == ip
    assert (address.protocol, address.port) == (f"tcp{ip.version}", port)
    assert parse_address(address.canonical()) == address


@given(st.text(), st.booleans())
def test_any_text_is_an_address_or_an_address_error(text: str, allow_unix: bool) -> None:
    try:
        address = parse_address(text, allow_unix=allow_unix)
    except AddressError as error:
        assert error.reason
        return
    assert str(address) == text
    assert address.path.startswith("/") if address.is_unix else address.host and 1 <= address.port <= 65535
    assert parse_address(address.canonical(), allow_unix=allow_unix) == address


@given(st.text(alphabet="tcpudsnix46:/[].01f%-a", max_size=24))
def test_texts_that_nearly_are_addresses(text: str) -> None:
    try:
        address = parse_address(text)
    except AddressError:
        return
    assert parse_address(address.canonical()) == address
