"""hastctl: options, output and exit codes as FreeBSD's, components as FreeBSD makes them."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hast.cli import hastctl
from hast.cli.report import list_text, status_data, status_text
from hast.cli.sizes import expand_number, humanize
from hast.control import CMD_SET_ROLE, CMD_STATUS, CMD_STOP, ControlRequest, Role, StatusReply
from hast.messages import MAIN_HEADER, pack_message
from hast.nv import Nv, decode
from tests import vectors

MIB = 1 << 20


# Sizes.


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0", 0), ("512", 512), ("1b", 1), ("2k", 2048), ("2K", 2048), ("64M", 64 * MIB), ("64MB", 64 * MIB),
        ("1g", 1 << 30), ("3T", 3 << 40), ("1P", 1 << 50), ("7E", 7 << 60), ("0x10k", 16384), ("010", 8),
    ],
)  # fmt: skip
def test_expand_number(text: str, number: int) -> None:
    assert expand_number(text) == number


@pytest.mark.parametrize("text", ["", "k", "-1", "1x", "1 k", "1.5M", "M1", "1kM", "8E", "9" * 30, "0x", "08", "١"])
def test_numbers_that_are_none(text: str) -> None:
    with pytest.raises(ValueError):
        expand_number(text)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"), (1, "1"), (999, "999"), (1000, "1.0k"), (1024, "1.0k"), (1536, "1.5k"), (10 << 10, "10k"),
        (999 << 10, "999k"), (1023 << 10, "1.0M"), (2 * MIB, "2.0M"), (67104256, "64M"), (64 * MIB, "64M"),
        (5 << 30, "5.0G"), (100 << 40, "100T"), ((1 << 63) - 1, "8.0E"),
    ],
)  # fmt: skip
def test_humanize(number: int, text: str) -> None:
    assert humanize(number) == text


@given(st.integers(0, (1 << 63) - 1))
def test_humanized_is_short_and_near(number: int) -> None:
    text = humanize(number)
    assert len(text) <= 4
    digits = text.rstrip("kMGTPE")
    value = float(digits) * 1024 ** " kMGTPE".index(text[len(digits) :] or " ")
    assert abs(value - number) <= max(0.06 * value, 0.5)


# Output.


CAPTURE = StatusReply.from_nv(decode(vectors.load("ctl_status_reply").header)).entries


def test_status_table_of_the_capture() -> None:
    assert status_text(CAPTURE) == (
        "Name\tStatus\t Role\t\tComponents\n"
        "data\tcomplete primary        /var/hast/data.img\ttcp4://127.0.0.3:8457\n"
    )


def test_list_of_the_capture() -> None:
    assert list_text(CAPTURE) == (
        "data:\n"
        "  role: primary\n"
        "  provname: data\n"
        "  localpath: /var/hast/data.img\n"
        "  extentsize: 2097152 (2.0MB)\n"
        "  keepdirty: 64\n"
        "  remoteaddr: tcp4://127.0.0.3:8457\n"
        "  sourceaddr: tcp4://127.0.0.1\n"
        "  replication: memsync\n"
        "  status: complete\n"
        "  workerpid: 20160\n"
        "  dirty: 0 (0B)\n"
        "  statistics:\n"
        "    reads: 0\n"
        "    writes: 0\n"
        "    deletes: 0\n"
        "    flushes: 0\n"
        "    activemap updates: 0\n"
        "    local errors: read: 0, write: 0, delete: 0, flush: 0\n"
        "    queues: local: 0, send: 0, recv: 0, done: 0, idle: 255\n"
    )


def test_unknown_resource_in_tables() -> None:
    capture = vectors.load("ctl_status_reply_unknown").header
    entries = StatusReply.from_nv(decode(capture)).entries
    name = entries[0].resource
    assert status_text(entries) == f"Name\tStatus\t Role\t\tComponents\n{name}\tERR1\n"
    assert list_text(entries) == f"{name}:\n  error: 1\n"
    assert status_data(entries[0])["errmsg"] == "no such resource"


def test_no_resources_print_nothing() -> None:
    assert status_text(()) == "" and list_text(()) == ""


# Commands on components.


class Site:
    """A configuration, and hastctl with it."""

    def __init__(self, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.directory = directory
        self.conf = directory / "hast.conf"
        self.control = directory / "ctl"
        self.capsys = capsys
        self.write("data", "other")

    def write(self, *names: str) -> None:
        resources = [
            f"resource {name} {{ local {self.directory}/{name}.img\n on here {{ remote none }} }}" for name in names
        ]
        self.conf.write_text("\n".join([f"control {self.control}", *resources]) + "\n")

    def local(self, name: str = "data") -> Path:
        return self.directory / f"{name}.img"

    def media(self, size: int, name: str = "data") -> Path:
        with self.local(name).open("wb") as file:
            file.truncate(size)
        return self.local(name)

    def run(self, command: str, *arguments: str) -> tuple[int, str, str]:
        """Exit code, stdout and stderr."""
        code = hastctl.main([command, "-c", str(self.conf), *arguments])
        out, err = self.capsys.readouterr()
        return code, out, err


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Site:
    monkeypatch.setenv("HAST_NODE", "here")
    return Site(tmp_path, capsys)


def test_created_component_is_that_of_the_original(site: Site) -> None:
    path = site.media(64 * MIB)
    assert site.run("create", "data") == (0, "", "")
    block = path.read_bytes()[:4608]
    assert block[:4096] == vectors.load("metadata_init").normal
    assert block[4096:] == bytes(512)


def test_create_with_options_and_dump(site: Site) -> None:
    site.media(128 * MIB)
    assert site.run("create", "-e", "1M", "-k", "0x20", "-m", "64M", "data") == (0, "", "")
    code, out, err = site.run("dump", "data")
    assert (code, err) == (0, "")
    assert out == (
        "resource: data\n"
        "    datasize: 67104256 (64MB)\n"
        "    extentsize: 1048576 (1.0MB)\n"
        "    keepdirty: 32\n"
        "    localoff: 4608\n"
        "    resuid: 0\n"
        "    localcnt: 0\n"
        "    remotecnt: 0\n"
        "    prevrole: init\n"
        "    dirty: 0 (0 extents)\n"
    )


def test_dump_counts_dirty_extents(site: Site) -> None:
    path = site.media(64 * MIB)
    site.run("create", "data")
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\x05" + bytes(2) + b"\x80")  # 0, 2, and 31, the last one, which is 4608 bytes shorter
    code, out, _ = site.run("dump", "--json", "data")
    data = json.loads(out)
    assert code == 0 and [entry["resource"] for entry in data] == ["data"]
    assert (data[0]["dirtyextents"], data[0]["dirty"]) == (3, 6 * MIB - 4608)
    assert "    dirty: 6286848 (3 extents)\n" in site.run("dump")[1]


def test_dump_of_all_says_what_it_can(site: Site) -> None:
    site.media(8 * MIB, "other")
    site.run("create", "other")
    for names in ((), ("all",)):
        code, out, err = site.run("dump", *names)
        assert code == os.EX_NOINPUT
        assert out.startswith("resource: other\n")
        assert err == f"hastctl: data: component {site.local()} does not exist: check 'local' in hast.conf\n"


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (("create", "nosuch"), os.EX_DATAERR, "hastctl: nosuch: "),
        (("create", "-e", "3k", "data"), os.EX_DATAERR, "extent size 3072 is not a power of two"),
        (("create", "-e", "256", "data"), os.EX_DATAERR, "extent size 256"),
        (("create", "-k", "99999999999", "data"), os.EX_DATAERR, "keepdirty"),
        (("create", "-m", "1k", "data"), os.EX_DATAERR, "too small"),
        (("create", "other"), os.EX_NOINPUT, "does not exist"),
        (("dump", "data"), os.EX_DATAERR, "run 'hastctl create data' first"),
        (("dump", "nosuch"), os.EX_DATAERR, "hastctl: nosuch: "),
    ],
)
def test_components_that_cannot_be(site: Site, arguments: tuple[str, ...], code: int, complaint: str) -> None:
    site.media(8 * MIB)
    before = site.local().read_bytes()
    found, out, err = site.run(*arguments)
    assert (found, out) == (code, "")
    assert complaint in err and err.count("\n") == 1
    assert site.local().read_bytes() == before


def test_one_that_fails_does_not_keep_others_from_being_created(site: Site) -> None:
    site.media(8 * MIB, "other")
    code, _, err = site.run("create", "data", "nosuch", "other")
    assert code == os.EX_NOINPUT  # of the first that failed
    assert err.count("\n") == 2
    assert site.run("dump", "other")[0] == 0


@pytest.mark.parametrize(
    "arguments",
    [
        (), ("explode",), ("create",), ("role",), ("role", "primary"), ("role", "emperor", "data"), ("stop", "data"),
        ("create", "-e", "x", "data"), ("create", "-k", "-1", "data"), ("create", "-m", "1Q", "data"),
        ("status", "-x"), ("role", "--json", "init", "data"), ("create", "-e"), ("status", "-h"), ("-h",),
    ],
)  # fmt: skip
def test_usage(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert hastctl.main(arguments) == os.EX_USAGE
    out, err = capsys.readouterr()
    assert out == "" and ("usage: hastctl create" in err or "'hastctl -h' shows its usage" in err)


def test_configuration_that_is_wrong(site: Site) -> None:
    site.conf.write_text("resource data {\n  remote nowhere\n}\n")
    for command in ("status", "dump", "list", "stop"):
        code, out, err = site.run(command)
        assert (code, out) == (os.EX_CONFIG, "")
        assert err.startswith(f"hastctl: {site.conf}:2:3: ") and err.count("\n") == 1


def test_control_must_be_a_unix_socket(site: Site) -> None:
    site.conf.write_text("control tcp4://127.0.0.1:1\n")
    assert site.run("status")[0] == os.EX_CONFIG


# Commands for hastd, with a server that says what it is told to.


@contextmanager
def hastd(site: Site, reply: Nv) -> Iterator[list[ControlRequest]]:
    """Answers one request; what it was is in the list."""
    requests: list[ControlRequest] = []
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(site.control))
        sock.listen()

        def serve() -> None:
            connection, _ = sock.accept()
            with connection:
                requests.append(ControlRequest.from_nv(decode(connection.recv(65536)[MAIN_HEADER.size :])))
                connection.sendall(pack_message(2, reply))

        thread = threading.Thread(target=serve)
        thread.start()
        yield requests
        thread.join()
    site.control.unlink()


def captured(name: str) -> Nv:
    return decode(vectors.load(name).header)


def test_role(site: Site) -> None:
    with hastd(site, captured("ctl_role_reply")) as requests:
        code, out, err = site.run("role", "-d", "primary", "data")
    assert (code, out, err) == (0, "", "hastctl: data: role changed from init to primary\n")
    assert requests == [ControlRequest(CMD_SET_ROLE, ("data",), Role.PRIMARY)]


def test_role_that_fails(site: Site) -> None:
    reply = Nv()
    reply.add_string("resource0", "data")
    reply.add_int16("error0", 75)
    reply.add_string("errmsg0", "data: component is locked by another hastd or hastctl")
    reply.add_string("resource1", "other")
    reply.add_int16("error1", 1)
    with hastd(site, reply):
        code, out, err = site.run("role", "secondary", "data", "other")
    assert (code, out) == (75, "")
    assert err == (
        "hastctl: data: component is locked by another hastd or hastctl\nhastctl: other: no such resource\n"
    )


def test_status_and_list_ask_for_all(site: Site) -> None:
    for command in ("status", "list"):
        with hastd(site, captured("ctl_status_reply")) as requests:
            code, out, err = site.run(command)
        assert (code, err) == (0, "") and out.startswith(("Name\t", "data:\n"))
        assert requests == [ControlRequest(CMD_STATUS, ("all",))]
    with hastd(site, captured("ctl_status_reply")) as requests:
        data = json.loads(site.run("status", "--json", "data", "x")[1])
    assert requests == [ControlRequest(CMD_STATUS, ("data", "x"))]
    assert data[0]["resource"] == "data" and data[0]["role"] == "primary" and data[0]["errmsg"] is None


def test_status_of_an_unknown_resource(site: Site) -> None:
    with hastd(site, captured("ctl_status_reply_unknown")):
        code, out, err = site.run("status", "x")
    assert code == 1 and "\tERR1\n" in out and "no such resource" in err


def test_reply_that_is_an_error(site: Site) -> None:
    reply = Nv()
    reply.add_int16("error", 4)
    with hastd(site, reply):
        code, out, err = site.run("status")
    assert (code, out) == (os.EX_SOFTWARE, "") and "command not implemented (error 4)" in err


def test_stop_waits_for_the_end(site: Site) -> None:
    with hastd(site, Nv()) as requests:
        assert site.run("stop") == (0, "", "")
    assert requests == [ControlRequest(CMD_STOP)]


def test_no_hastd(site: Site) -> None:
    code, out, err = site.run("status")
    assert (code, out) == (os.EX_OSERR, "") and err.endswith("is hastd running?\n")
