"""hast.conf: what each statement means, which setting wins, who this node is."""

from __future__ import annotations

import re
from dataclasses import replace
from os.path import normpath
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hast.address import parse_address
from hast.config import Config, Resource, load, parse
from hast.conflex import KEYWORDS
from hast.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
HASTA = ("hasta.example.org", "hasta", "c0ffee00-1234-5678-9abc-def012345678", "hostid42")
HASTB = ("hastb.example.org", "hastb")

# In the style of FreeBSD's documentation: one file for both nodes, tabs, comments.
TWO_NODES = """\
# A two-node cluster.
listen tcp://0.0.0.0

on hasta {
	listen tcp://2001:db8::1
}
on hastb {
	listen tcp://2001:db8::2
}

resource shared {
	local /dev/da0

	on hasta {
		remote tcp://10.0.0.2
	}
	on hastb {
		remote tcp://10.0.0.1
	}
}
resource tank {
	on hasta {
		local /dev/mirror/tanka
		source tcp://10.0.0.1
		remote tcp://10.0.0.2
	}
	on hastb {
		local /dev/mirror/tankb
		source tcp://10.0.0.2
		remote tcp://10.0.0.1
	}
}
"""

DEFAULTS = Resource(
    name="data",
    provname="data",
    localpath="/dev/sdb",
    remote=None,
    source=None,
    replication="memsync",
    checksum="none",
    compression="hole",
    timeout=20,
    exec=None,
    metaflush=True,
    device="auto",
    directio="auto",
    keepawake=True,
    syncrate=0,
    on_io_error="detach",
)


def one(statements: str = "", in_resource: str = "", in_node: str = "") -> Resource:
    """The resource `data` for hasta, with statements at the three levels."""
    text = f"""{statements}
        resource data {{ {in_resource}
            on hasta {{ local /dev/sdb remote none {in_node} }} }}"""
    return parse(text, "hast.conf", HASTA).resources["data"]


def test_an_empty_file_is_a_configuration_of_defaults() -> None:
    assert parse("", "/etc/hast.conf", HASTA) == Config(
        path="/etc/hast.conf",
        node="hasta.example.org",
        control=parse_address("uds:///var/run/hastctl"),
        pidfile="/var/run/hastd.pid",
        listen=(parse_address("tcp4://0.0.0.0:8457"), parse_address("tcp6://[::]:8457")),
        rundir="/run/hast",
        resources={},
    )


def test_a_resource_with_only_what_is_required_has_the_defaults() -> None:
    assert one() == DEFAULTS


def test_both_nodes_of_one_file() -> None:
    a, b = parse(TWO_NODES, "hast.conf", HASTA), parse(TWO_NODES, "hast.conf", HASTB)
    assert list(a.resources) == list(b.resources) == ["shared", "tank"]
    assert a.listen == (parse_address("0.0.0.0"), parse_address("2001:db8::1"))
    assert b.listen == (parse_address("0.0.0.0"), parse_address("2001:db8::2"))
    assert a.resources["shared"].localpath == b.resources["shared"].localpath == "/dev/da0"
    assert str(a.resources["shared"].remote) == "tcp://10.0.0.2"
    assert str(b.resources["shared"].remote) == "tcp://10.0.0.1"
    assert a.resources["tank"].localpath == "/dev/mirror/tanka"
    assert b.resources["tank"].localpath == "/dev/mirror/tankb"
    source = a.resources["tank"].source
    assert source is not None
    assert (source.host, source.port, str(source)) == ("10.0.0.1", 0, "tcp://10.0.0.1")


@pytest.mark.parametrize(
    ("statement", "field", "value"),
    [
        ("replication fullsync", "replication", "fullsync"),
        ("replication memsync", "replication", "memsync"),
        ("replication async", "replication", "async"),
        ("checksum none", "checksum", "none"),
        ("checksum crc32", "checksum", "crc32"),
        ("checksum sha256", "checksum", "sha256"),
        ("compression none", "compression", "none"),
        ("compression hole", "compression", "hole"),
        ("compression lzf", "compression", "lzf"),
        ("timeout 1", "timeout", 1),
        ("timeout 2147483", "timeout", 2147483),
        ("exec /usr/local/sbin/hook", "exec", "/usr/local/sbin/hook"),
        ("metaflush on", "metaflush", True),
        ("metaflush off", "metaflush", False),
        ("device auto", "device", "auto"),
        ("device fuse", "device", "fuse"),
        ("device nbd", "device", "nbd"),
        ("device ublk", "device", "ublk"),
        ("device ggate", "device", "ggate"),
        ("directio on", "directio", "on"),
        ("directio off", "directio", "off"),
        ("directio auto", "directio", "auto"),
        ("keepawake on", "keepawake", True),
        ("keepawake off", "keepawake", False),
        ("syncrate 0", "syncrate", 0),
        ("syncrate 4096", "syncrate", 4096),
        ("syncrate 500k", "syncrate", 500 * 1024),
        ("syncrate 500K", "syncrate", 500 * 1024),
        ("syncrate 20M", "syncrate", 20 * 1024**2),
        ("syncrate 20m", "syncrate", 20 * 1024**2),
        ("syncrate 1G", "syncrate", 1024**3),
        ("syncrate 9223372036854775807", "syncrate", 2**63 - 1),
        ("on-io-error detach", "on_io_error", "detach"),
        ("on-io-error pass", "on_io_error", "pass"),
    ],
)
def test_each_setting_globally_and_in_the_resource(statement: str, field: str, value: object) -> None:
    expected = replace(DEFAULTS, **{field: value})
    assert one(statement) == expected
    assert one(in_resource=statement) == expected


@pytest.mark.parametrize(
    ("name", "field", "values"),
    [
        ("metaflush", "metaflush", [("on", True), ("off", False)]),
        ("device", "device", [("fuse", "fuse"), ("nbd", "nbd")]),
        ("directio", "directio", [("on", "on"), ("off", "off")]),
        ("keepawake", "keepawake", [("on", True), ("off", False)]),
        ("syncrate", "syncrate", [("1k", 1024), ("7", 7)]),
        ("on-io-error", "on_io_error", [("pass", "pass"), ("detach", "detach")]),
    ],
)
def test_the_innermost_place_wins(name: str, field: str, values: list[tuple[str, object]]) -> None:
    (outer, _), (inner, expected) = values
    places = ["statements", "in_resource", "in_node"]
    for i, place in enumerate(places):
        others = dict.fromkeys(places[:i], f"{name} {outer}")
        assert getattr(one(**others, **{place: f"{name} {inner}"}), field) == expected


@pytest.mark.parametrize("statement", ["device nbd", "directio off", "syncrate 5", "on-io-error pass"])
def test_the_nodes_own_section_stands_between_global_and_resource(statement: str) -> None:
    name, value = statement.split()
    field = name.replace("-", "_")
    other = {"device": "fuse", "directio": "on", "syncrate": "6", "on-io-error": "detach"}[name]
    node = f"on hasta {{ {statement} }} on hastb {{ {name} {other} }}"
    assert str(getattr(one(node), field)) == value
    assert str(getattr(one(f"{name} {other} {node}"), field)) == value
    assert str(getattr(one(node, in_resource=f"{name} {other}"), field)) == other


@pytest.mark.parametrize(
    ("name", "field", "inner", "outer"),
    [
        ("replication", "replication", "async", "fullsync"),
        ("checksum", "checksum", "none", "crc32"),
        ("compression", "compression", "none", "lzf"),
        ("exec", "exec", "/inner", "/outer"),
    ],
)
def test_the_resource_wins_over_global(name: str, field: str, inner: str, outer: str) -> None:
    assert getattr(one(f"{name} {outer}", f"{name} {inner}"), field) == inner


def test_name_and_local_in_the_resource_and_in_its_node_section() -> None:
    text = """resource data {
        name outer local /outer
        on hasta { remote none name inner local /inner }
        on hastb { remote none }
    }"""
    inner = parse(text, "hast.conf", HASTA).resources["data"]
    outer = parse(text, "hast.conf", HASTB).resources["data"]
    assert (inner.name, inner.provname, inner.localpath) == ("data", "inner", "/inner")
    assert (outer.name, outer.provname, outer.localpath) == ("data", "outer", "/outer")


def test_order_does_not_matter() -> None:
    text = """
        resource data { on hasta { remote none } timeout 3 local /dev/sdb }
        on hasta { rundir /run/a }
        checksum crc32 rundir /run/b"""
    config = parse(text, "hast.conf", HASTA)
    assert config.resources["data"] == replace(DEFAULTS, timeout=3, checksum="crc32")
    assert config.rundir == "/run/a"


def test_the_daemons_settings_globally_and_per_node() -> None:
    text = """
        control uds:///tmp/ctl pidfile /tmp/pid rundir /tmp/run
        on hasta { control tcp4://127.0.0.1:9000 pidfile /a/pid rundir /a/run listen unix:///a/l }
        listen 10.0.0.1:7 listen hasta"""
    a, b = parse(text, "hast.conf", HASTA), parse(text, "hast.conf", HASTB)
    assert (a.control, a.pidfile, a.rundir) == (parse_address("127.0.0.1:9000"), "/a/pid", "/a/run")
    assert (b.control, b.pidfile, b.rundir) == (parse_address("/tmp/ctl"), "/tmp/pid", "/tmp/run")
    assert [str(address) for address in a.listen] == ["10.0.0.1:7", "hasta", "unix:///a/l"]
    assert [str(address) for address in b.listen] == ["10.0.0.1:7", "hasta"]


def test_an_address_listened_on_twice_counts_once() -> None:
    text = "listen 0.0.0.0 on hasta { listen tcp4://0.0.0.0:8457 listen ::1 }"
    assert [str(a) for a in parse(text, "hast.conf", HASTA).listen] == ["0.0.0.0", "::1"]


def test_a_port_of_source_is_dropped_because_the_primary_connects_twice() -> None:
    source = one(in_node="source 10.0.0.1:4000").source
    assert source is not None
    assert source.port == 0


def test_our_own_words_are_not_reserved() -> None:
    names = ["auto", "device", "fuse", "pass", "rundir", "detach", "syncrate", "directio", "memsync2"]
    text = "".join(f"resource {n} {{ on {n} {{ remote {n} local /{n} name x-{n} }} }}\n" for n in names)
    config = parse(text, "hast.conf", tuple(names))
    assert list(config.resources) == names
    assert str(config.resources["auto"].remote) == "auto"


def test_words_may_touch_braces_and_comments() -> None:
    text = "resource a{on hasta{remote none local /x#c } {\n}}#end"
    assert parse(text, "hast.conf", HASTA).resources["a"].localpath == "/x"


def test_lines_may_end_as_on_windows_and_comments_hold_any_bytes(tmp_path: Path) -> None:
    path = tmp_path / "hast.conf"
    path.write_bytes(
        b"# r\xe9seau \x00\r\ntimeout 5\r\nresource data {\r\non hasta {remote none local /x}}\r\n"
    )
    assert load(str(path), HASTA).resources["data"].timeout == 5


@pytest.mark.parametrize(
    "name", ["hasta", "HASTA", "hasta.example.org", "C0FFEE00-1234-5678-9ABC-DEF012345678", "hostid42"]
)
def test_each_name_of_the_node_counts(name: str) -> None:
    text = f"resource data {{ on other {{ remote none local /o }} on {name} {{ remote none local /m }} }}"
    assert parse(text, "hast.conf", HASTA).resources["data"].localpath == "/m"


def test_two_sections_for_this_node_add_up() -> None:
    text = "resource a { on hasta { remote none } on hostid42 { local /x } on hastb { local /y } }"
    assert parse(text, "hast.conf", HASTA).resources["a"].localpath == "/x"


def test_load_takes_the_node_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "hast.conf"
    path.write_text(TWO_NODES)
    monkeypatch.setenv("HAST_NODE", "hastb")
    config = load(str(path))
    assert (config.node, config.path) == ("hastb", str(path))
    assert config.resources["tank"].localpath == "/dev/mirror/tankb"


@pytest.mark.parametrize("names", [HASTA, HASTB])
def test_the_sample(names: tuple[str, ...]) -> None:
    config = load(str(ROOT / "etc/hast.conf.sample"), names)
    assert list(config.resources) == ["shared", "vm0"]
    assert config.resources["vm0"].syncrate == 50 * 1024**2


@pytest.mark.parametrize("names", [HASTA, HASTB])
def test_what_the_sample_calls_a_default_is_one(names: tuple[str, ...]) -> None:
    text = (ROOT / "etc/hast.conf.sample").read_text()
    commented = re.findall(r"^#([a-z-]+ .*)$", text, re.MULTILINE)
    assert len(commented) == 16
    defaults = [line for line in commented if not line.startswith("exec")]
    shared = "resource shared { local /dev/sdb on hasta { remote 10.0.0.2 } on hastb { remote 10.0.0.1 } }"
    config = parse("\n".join([*defaults, shared]), "x", names)
    assert config == parse(shared, "x", names)


def manual_examples() -> list[str]:
    page = (ROOT / "docs/hast.conf.5").read_text()
    section = page.partition(".Sh EXAMPLES")[2].partition(".Sh DIAGNOSTICS")[0]
    return re.findall(r"^\.Bd [^\n]*\n(.*?)^\.Ed$", section, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("number", "resources"), [(0, ["shared"]), (1, ["tank", "mail"]), (2, ["data"])])
def test_the_examples_of_the_manual(number: int, resources: list[str]) -> None:
    examples = manual_examples()
    assert len(examples) == 3
    assert list(parse(examples[number], "hast.conf", HASTA).resources) == resources


def test_the_manual_has_every_statement() -> None:
    from hast.confgrammar import STATEMENTS

    page = (ROOT / "docs/hast.conf.5").read_text()
    for name in [*STATEMENTS, "resource"]:
        assert re.search(rf"^\.It Ic {name} ", page, re.MULTILINE), name
        assert re.search(rf"^\t*{name}[ ,]|[ ,]{name}(,|$)", page, re.MULTILINE), name


# --- any valid configuration round-trips -------------------------------------------------------------

words = st.from_regex(r"[a-zA-Z][a-zA-Z0-9_.-]{0,62}", fullmatch=True).filter(
    lambda word: word not in KEYWORDS | {"all"}
)
paths = st.from_regex(r"(/[a-zA-Z0-9_.\-:\[\]]{1,9}){1,4}", fullmatch=True)
hosts = st.builds(parse_address, st.ip_addresses(v=4).map(str).filter(lambda h: h != "0.0.0.0"))
resources = st.builds(
    Resource,
    name=words,
    provname=words,
    localpath=paths,
    remote=st.none() | hosts,
    source=st.none() | hosts.map(lambda a: replace(a, port=0)),
    replication=st.sampled_from(["fullsync", "memsync", "async"]),
    checksum=st.sampled_from(["none", "crc32", "sha256"]),
    compression=st.sampled_from(["none", "hole", "lzf"]),
    timeout=st.integers(1, 2147483),
    exec=st.none() | paths,
    metaflush=st.booleans(),
    device=st.sampled_from(["auto", "fuse", "nbd", "ublk", "ggate"]),
    directio=st.sampled_from(["auto", "on", "off"]),
    keepawake=st.booleans(),
    syncrate=st.integers(0, 2**63 - 1),
    on_io_error=st.sampled_from(["detach", "pass"]),
)


def written(r: Resource, blank: str) -> str:
    """`r` as a file writes it."""
    node = ["on hasta {", f"name {r.provname}", f"remote {r.remote or 'none'}", f"local {r.localpath}"]
    node += [f"source {r.source}"] if r.source else []
    node += [f"metaflush {'on' if r.metaflush else 'off'}", f"device {r.device}", "}"]
    body = [f"resource {r.name} {{", "on other { remote elsewhere local /elsewhere }", *node]
    body += [f"replication {r.replication}", f"checksum {r.checksum}", f"compression {r.compression}"]
    body += [f"timeout {r.timeout}", f"directio {r.directio}", f"syncrate {r.syncrate}"]
    body += [f"keepawake {'on' if r.keepawake else 'off'}"]
    body += [f"exec {r.exec}"] if r.exec else []
    return blank.join([*body, f"on-io-error {r.on_io_error}", "}"])


@settings(max_examples=60)
@given(
    st.lists(
        resources,
        max_size=4,
        unique_by=(lambda r: r.name, lambda r: r.provname, lambda r: normpath(r.localpath)),
    ),
    st.sampled_from([" ", "\n", "\t# comment } {\n\n"]),
)
def test_every_configuration_round_trips(expected: list[Resource], blank: str) -> None:
    text = blank.join(written(r, blank) for r in expected)
    assert list(parse(text, "hast.conf", HASTA).resources.values()) == expected


# --- nothing but ConfigError ---------------------------------------------------------------------------

pieces = st.sampled_from(
    [
        *sorted(KEYWORDS),
        *(
            "{",
            "}",
            "{",
            "}",
            "on hasta {",
            "resource a {",
            "resource",
            "device",
            "syncrate",
            "auto",
            "rundir",
        ),
        *("directio", "on-io-error", "hasta", "/dev/x", "10.0.0.1", "0", "7", "9" * 5000, "1G", "#", "\n"),
        *('"', "=", "\x00", "\ufeff", "[::1]:9", "uds://x", "http://x", "\udcff"),
    ]
)


def check_soup(text: str) -> None:
    try:
        parse(text, "hast.conf", HASTA)
    except ConfigError as error:
        message = str(error)
        found = re.fullmatch(r"hast\.conf:([0-9]+):([0-9]+): found .+, expected .+", message)
        assert found, message
        assert message.isprintable()
        line, column = int(found[1]), int(found[2])
        lines = text.split("\n")
        assert 1 <= line <= len(lines)
        assert 1 <= column <= len(lines[line - 1]) + 1


@settings(max_examples=200)
@given(st.lists(pieces, max_size=30).map(" ".join))
def test_token_soup_is_a_configuration_or_a_config_error(text: str) -> None:
    check_soup(text)


@settings(max_examples=100)
@given(st.text(max_size=60))
def test_any_text_is_a_configuration_or_a_config_error(text: str) -> None:
    check_soup(text)


@settings(max_examples=150)
@given(st.integers(0, len(TWO_NODES)), st.integers(0, 12), st.sampled_from(["", "}", "{", "on", '"', "é"]))
def test_a_damaged_file_is_a_configuration_or_a_config_error(start: int, length: int, instead: str) -> None:
    check_soup(TWO_NODES[:start] + instead + TWO_NODES[start + length :])


@pytest.mark.parametrize("names", [(), []])
def test_a_node_without_a_name_is_a_mistake_of_the_caller(names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="at least one name"):
        parse("", "hast.conf", names)
