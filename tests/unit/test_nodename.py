"""What this node answers to in hast.conf."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from hast import nodename
from hast.nodename import is_named, node_names

NAMES = ("hasta.example.org", "hasta", "c0ffee00-1234-5678-9abc-def012345678", "hostid42")
UUID = "4C4C4544-0042-3510-8056-b4c04f595831"


def machine_uuid(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the machine have this UUID file."""
    path = tmp_path / "uuid"
    path.write_bytes(content)
    monkeypatch.setattr(nodename, "_DMI_UUID", path)
    monkeypatch.setattr(nodename, "_FREEBSD_UUID", path)


@pytest.mark.parametrize(
    "name", ["hasta", "HASTA", "hasta.example.org", "C0FFEE00-1234-5678-9ABC-DEF012345678", "hostid42"]
)
def test_each_name_counts_in_either_case(name: str) -> None:
    assert is_named(name, NAMES)


@pytest.mark.parametrize("name", ["hast", "hasta.example", "example.org", "hastaa", "hostid4", "hostid042"])
def test_no_other_name_counts(name: str) -> None:
    assert not is_named(name, NAMES)


@pytest.mark.parametrize(
    ("value", "names"), [("a.b.c", ("a.b.c", "a")), ("a", ("a",)), (".x", (".x",)), ("x.", ("x.", "x"))]
)
def test_the_environment_takes_the_place_of_all_names(value: str, names: tuple[str, ...]) -> None:
    assert node_names({"HAST_NODE": value}) == names


@pytest.mark.parametrize("environ", [{}, {"HAST_NODE": ""}])
def test_the_machine_names_the_node(
    environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine_uuid(UUID.encode() + b"\n", tmp_path, monkeypatch)
    names = node_names(environ)
    host = os.uname().nodename
    assert names[0] == host
    assert UUID in names
    assert set(names) - {host, host.partition(".")[0], UUID} == {n for n in names if n.startswith("hostid")}
    assert all(re.fullmatch(r"hostid[1-9][0-9]*", n) for n in names if n.startswith("hostid"))


def test_the_host_id_is_read_only_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine_uuid(UUID.encode(), tmp_path, monkeypatch)

    def unwanted() -> tuple[str, ...]:
        raise AssertionError("the host ID was read, which may ask a name server")

    monkeypatch.setattr(nodename, "_host_id_name", unwanted)
    assert node_names({}, with_host_id=False)[-1] == UUID
    assert node_names({"HAST_NODE": "a"}) == ("a",)
    with pytest.raises(AssertionError, match="host ID was read"):
        node_names({})


@pytest.mark.parametrize(
    "content", [b"", b"Not Settable\n", b"\xff\xfe", UUID.encode() + b"0", UUID.encode() * 2]
)
def test_a_uuid_that_is_none_is_ignored(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine_uuid(content, tmp_path, monkeypatch)
    host = os.uname().nodename
    assert set(node_names({}, with_host_id=False)) == {host, host.partition(".")[0]}


def test_a_machine_without_a_uuid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodename, "_DMI_UUID", tmp_path / "absent")
    monkeypatch.setattr(nodename, "_FREEBSD_UUID", tmp_path)  # a directory cannot be read either
    host = os.uname().nodename
    assert set(node_names({}, with_host_id=False)) == {host, host.partition(".")[0]}
