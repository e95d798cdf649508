"""hast.conf: each mistake gives one line with its place, what was found and what was expected."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hast.config import load, parse
from hast.errors import ConfigError

NAMES = ("hasta.example.org", "hasta", "hostid42")

GLOBAL = (
    "a statement (control, pidfile, listen, rundir, replication, checksum, compression, timeout, exec, "
    "metaflush, device, directio, keepawake, syncrate, on-io-error, on, resource) or the end of the file"
)
NODE = "a statement (control, pidfile, listen, rundir, device, directio, keepawake, syncrate, on-io-error) or '}'"
RESOURCE = (
    "a statement (replication, checksum, compression, timeout, exec, metaflush, name, local, "
    "device, directio, keepawake, syncrate, on-io-error, on) or '}'"
)
RESOURCE_NODE = (
    "a statement (metaflush, name, local, remote, source, device, directio, keepawake, syncrate, on-io-error) or '}'"
)
CHARACTER = "a word of letters, digits and . - _ / : [ ], or '{' or '}'"
TCP = "[tcp://|tcp4://|tcp6://]host[:port]"
ADDRESS = f"an address {TCP}, or uds://path, unix://path or an absolute path"
SECONDS = "a number of seconds from 1 to 2147483"
RATE = "bytes per second, such as 0 (no limit), 500k, 100M or 1G"
KEYWORD = "is a keyword and cannot be a value here"
REMOTE = "('remote' stands in an 'on <node>' section of a resource)"
DIGITS = "digits alone are a number, and none can stand here"
RELATIVE = "hastd runs in '/', where a relative path means something else"
SLASH = "an address has no prefix length and no path"

# text, where the error is, what follows
STATEMENTS = [
    ("replicaton memsync", "1:1", f"found 'replicaton', expected {GLOBAL} (did you mean 'replication'?)"),
    ("\n\n\tTimeout 5", "3:2", f"found 'Timeout', expected {GLOBAL} (did you mean 'timeout'?)"),
    ("resources a {", "1:1", f"found 'resources', expected {GLOBAL} (did you mean 'resource'?)"),
    ("zzzz", "1:1", f"found 'zzzz', expected {GLOBAL}"),
    ("timeout 5 6", "1:11", f"found number '6', expected {GLOBAL}"),
    ("{", "1:1", f"found '{{', expected {GLOBAL}"),
    ("fullsync", "1:1", f"found keyword 'fullsync', expected {GLOBAL}"),
    (
        "timeout 5\nremote 10.0.0.1",
        "2:1",
        f"found keyword 'remote', expected {GLOBAL} {REMOTE}",
    ),
    (
        "local /x",
        "1:1",
        f"found keyword 'local', expected {GLOBAL} "
        "('local' stands in a 'resource' section or in an 'on <node>' section of a resource)",
    ),
    (
        "on hasta {\n  timeout 5\n}",
        "2:3",
        f"found keyword 'timeout', expected {NODE} "
        "('timeout' stands at the top of the file or in a 'resource' section)",
    ),
    (
        "resource a {\n remote none\n}",
        "2:2",
        f"found keyword 'remote', expected {RESOURCE} {REMOTE}",
    ),
    (
        "resource a { rundir /x }",
        "1:14",
        f"found 'rundir', expected {RESOURCE} "
        "('rundir' stands at the top of the file or in an 'on <node>' section at the top of the file)",
    ),
    (
        "resource a { on b { remot c } }",
        "1:21",
        f"found 'remot', expected {RESOURCE_NODE} (did you mean 'remote'?)",
    ),
    (
        "timeout 5\nchecksum none timeout 6",
        "2:15",
        "found a second 'timeout', expected 'timeout' once in a section (it is already set on line 1)",
    ),
    (
        "resource a { on other { local /x\nlocal /y } }",
        "2:1",
        "found a second 'local', expected 'local' once in a section (it is already set on line 1)",
    ),
]

BRACES = [
    ("}", "1:1", f"found '}}', expected {GLOBAL} (there is no open section that it could end)"),
    (
        "resource a {\n\ton hasta {\n\t\tremote none local /x\n\t}\n",
        "5:1",
        f"found the end of the file, expected {RESOURCE} ('}}' is missing for 'resource a' of line 1)",
    ),
    (
        "resource a {\n\ton hasta {\n\t\tremote none local /x",
        "3:23",
        f"found the end of the file, expected {RESOURCE_NODE} ('}}' is missing for 'on hasta' of line 2)",
    ),
    (
        "resource a {\n on hasta { remote none }\nresource b {",
        "3:1",
        f"found keyword 'resource', expected {RESOURCE} (is '}}' missing for 'resource a' of line 1?)",
    ),
    (
        "on hasta {\nresource b {",
        "2:1",
        f"found keyword 'resource', expected {NODE} (is '}}' missing for 'on hasta' of line 1?)",
    ),
    ("resource a\nlocal /x", "2:1", "found keyword 'local', expected '{' after 'resource a'"),
    ("on hasta", "1:9", "found the end of the file, expected '{' after 'on hasta'"),
    ("resource {", "1:10", "found '{', expected the name of a resource"),
    ("on {", "1:4", "found '{', expected the name of a node"),
    ("resource", "1:9", "found the end of the file, expected the name of a resource"),
]

CHARACTERS = [
    (
        'resource "a" {',
        "1:10",
        f"found character '\"', expected {CHARACTER} (values are written without quotes)",
    ),
    (
        "timeout = 5",
        "1:9",
        f"found character '=', expected {CHARACTER} "
        "(a statement is a name and a value with a space between, without '=')",
    ),
    (
        "timeout 5;",
        "1:10",
        f"found character ';', expected {CHARACTER} (statements need no ';' at their end)",
    ),
    (
        "listen ::1, ::2",
        "1:11",
        f"found character ',', expected {CHARACTER} "
        "(values are not separated by commas; repeat the statement instead)",
    ),
    (
        "listen fe80::1%eth0",
        "1:15",
        f"found character '%', expected {CHARACTER} (an address has no zone; use one that is not link-local)",
    ),
    (
        "\ufefftimeout 5",
        "1:1",
        f"found character '\\ufeff', expected {CHARACTER} (save the file without a byte order mark)",
    ),
    ("exec /caf\u00e9", "1:10", f"found character '\u00e9', expected {CHARACTER}"),
    ("exec /caf\udce9", "1:10", f"found character '\\xe9', expected {CHARACTER}"),
    ("a\0", "1:1", f"found 'a', expected {GLOBAL}"),  # the first error is the one reported
    ("timeout 5 \0", "1:11", f"found character '\\x00', expected {CHARACTER}"),
    ("timeout \x85 5", "1:9", f"found character '\\x85', expected {CHARACTER}"),
]

VALUES = [
    ("replication sync", "1:13", "found 'sync', expected fullsync, memsync or async (did you mean 'async'?)"),
    ("checksum sha1", "1:10", "found 'sha1', expected none, crc32 or sha256 (did you mean 'sha256'?)"),
    ("checksum md5", "1:10", "found 'md5', expected none, crc32 or sha256"),
    ("compression lz4", "1:13", "found 'lz4', expected none, hole or lzf (did you mean 'lzf'?)"),
    ("compression\n", "2:1", "found the end of the file, expected none, hole or lzf"),
    ("timeout 0", "1:9", f"found number '0', expected {SECONDS}"),
    ("timeout 2147484", "1:9", f"found number '2147484', expected {SECONDS}"),
    ("timeout -5", "1:9", f"found '-5', expected {SECONDS}"),
    ("timeout 5s", "1:9", f"found '5s', expected {SECONDS}"),
    ("timeout " + "9" * 5000, "1:9", f"found number '{'9' * 64}...', expected {SECONDS}"),
    ("metaflush yes", "1:11", "found 'yes', expected on or off"),
    ("metaflush auto", "1:11", "found 'auto', expected on or off"),
    ("device fusee", "1:8", "found 'fusee', expected auto, fuse, nbd, ublk or ggate (did you mean 'fuse'?)"),
    ("directio maybe", "1:10", "found 'maybe', expected auto, on or off"),
    ("on-io-error stop", "1:13", "found 'stop', expected detach or pass"),
    ("syncrate 1T", "1:10", f"found '1T', expected {RATE}"),
    ("syncrate fast", "1:10", f"found 'fast', expected {RATE}"),
    (
        "syncrate 9223372036854775808",
        "1:10",
        f"found number '9223372036854775808', expected {RATE} (at most 9223372036854775807)",
    ),
    (
        "syncrate 9999999999999G",
        "1:10",
        f"found '9999999999999G', expected {RATE} (at most 9223372036854775807)",
    ),
    ("syncrate 1" + "0" * 19, "1:10", f"found number '1{'0' * 19}', expected {RATE}"),
    ("exec hook", "1:6", f"found 'hook', expected an absolute path ({RELATIVE})"),
    ("pidfile run/pid", "1:9", f"found 'run/pid', expected an absolute path ({RELATIVE})"),
    ("rundir .", "1:8", f"found '.', expected an absolute path ({RELATIVE})"),
    ("exec none", "1:6", f"found keyword 'none', expected an absolute path ('none' {KEYWORD})"),
    ("exec 5", "1:6", f"found number '5', expected an absolute path ({DIGITS})"),
    ("exec {", "1:6", "found '{', expected an absolute path"),
    (
        "exec /" + "x" * 1023,
        "1:6",
        f"found '/{'x' * 63}...', expected a path of at most 1023 bytes (it has 1024)",
    ),
    ("listen 10", "1:8", f"found number '10', expected {ADDRESS} ({DIGITS})"),
    (
        "listen 10.0.0.256",
        "1:8",
        f"found '10.0.0.256', expected {ADDRESS} "
        "('10.0.0.256' is not an IPv4 address: that is four numbers from 0 to 255)",
    ),
    (
        "on b { listen tcp://2001:db8::1/64 }",
        "1:15",
        f"found 'tcp://2001:db8::1/64', expected {ADDRESS} (a '/' follows the host: {SLASH})",
    ),
    (
        "listen 10.0.0.1:0",
        "1:8",
        f"found '10.0.0.1:0', expected {ADDRESS} (port '0' is not a number from 1 to 65535)",
    ),
    ("control run/ctl", "1:9", f"found 'run/ctl', expected {ADDRESS} (a '/' follows the host: {SLASH})"),
    (
        "control uds://ctl",
        "1:9",
        f"found 'uds://ctl', expected {ADDRESS} (the path of a Unix socket must be absolute)",
    ),
    (
        "resource a { on b { remote /x } }",
        "1:28",
        f"found '/x', expected an address {TCP}, or none (a Unix socket cannot be used here)",
    ),
    (
        "resource a { on b { remote 0.0.0.0 } }",
        "1:28",
        "found '0.0.0.0', expected the address of the other node (this one means every address of this node)",
    ),
    (
        "resource a { on b { remote [::]:1 } }",
        "1:28",
        "found '[::]:1', expected the address of the other node (this one means every address of this node)",
    ),
    (
        "resource a { on b { source none } }",
        "1:28",
        f"found keyword 'none', expected an address {TCP} ('none' {KEYWORD})",
    ),
]

LONG = "n" * 64
NO_SECTION = (
    "found resource 'a' without a section for this node, "
    "expected an 'on' section with one of this node's names: hasta.example.org, hasta, hostid42"
)
A = "resource a { on hasta { remote none local /x } }\n"

RESOURCES = [
    ("resource on {", "1:10", f"found keyword 'on', expected the name of a resource ('on' {KEYWORD})"),
    ("resource 10 {", "1:10", f"found number '10', expected the name of a resource ({DIGITS})"),
    ("on off {", "1:4", f"found keyword 'off', expected the name of a node ('off' {KEYWORD})"),
    (
        "resource all {",
        "1:10",
        "found 'all', expected a name other than 'all' (for hastctl 'all' means every resource)",
    ),
    (
        "resource keeper {",
        "1:10",
        "found 'keeper', expected a name other than 'keeper' (hastd has a socket of that name itself)",
    ),
    (
        "resource events {",
        "1:10",
        "found 'events', expected a name other than 'events' (hastd has a socket of that name itself)",
    ),
    (f"resource {LONG} {{", "1:10", f"found '{LONG}', expected a name of at most 63 characters (it has 64)"),
    (
        f"resource a {{ name {LONG}",
        "1:19",
        f"found '{LONG}', expected a name of at most 63 characters (it has 64)",
    ),
    (
        "resource a/b {",
        "1:10",
        "found 'a/b', expected a name without '/', other than '.' and '..' (it names a file in /dev/hast)",
    ),
    (
        "resource a { name ..",
        "1:19",
        "found '..', expected a name without '/', other than '.' and '..' (it names a file in /dev/hast)",
    ),
    (
        A + "\nresource  a {",
        "3:11",
        "found a second resource 'a', expected each resource once (the first is on line 1)",
    ),
    ("resource a {\n local /x\n}", "1:10", f"{NO_SECTION} (it has no 'on' section at all)"),
    (
        "\n resource a { on hastb { remote none } on hastc { } }",
        "2:11",
        f"{NO_SECTION} (it has sections for: hastb, hastc)",
    ),
    (
        "resource a {\n on hasta { remote none }\n}",
        "1:10",
        "found resource 'a' without 'local', expected 'local <path>' in it or in its section 'on hasta'",
    ),
    (
        "resource a { on hastb { remote none local /x } on hasta { remote none } }",
        "1:10",
        "found resource 'a' without 'local', expected 'local <path>' in it or in its section 'on hasta'",
    ),
    (
        "resource a {\n local /x\n on hasta { }\n}",
        "3:5",
        "found section 'on hasta' of resource 'a' without 'remote', expected 'remote <address>' in it "
        "(write 'remote none' while there is no other node)",
    ),
    (
        "resource a { on hasta { remote none local /x }\n on hostid42 { remote hastb } }",
        "2:23",
        "found 'remote' a second time, expected 'remote' once for this node "
        "(another section for this node sets it on line 1)",
    ),
    (
        "on hasta { pidfile /a }\non hasta { pidfile /b }",
        "2:20",
        "found 'pidfile' a second time, expected 'pidfile' once for this node "
        "(another section for this node sets it on line 1)",
    ),
    (
        A + "resource b { on hasta { remote none local //x/. } }",
        "2:10",
        "found resource 'b' with the local path '//x/.', expected a local path of its own "
        "(resource 'a' on line 1 has it)",
    ),
    (
        A + "resource b { name a on hasta { remote none local /y } }",
        "2:10",
        "found resource 'b' with the name 'a', expected a name of its own in /dev/hast "
        "(resource 'a' on line 1 has it)",
    ),
    (
        "resource a { on hasta { local /x remote ::1\n source 10.0.0.1 } }",
        "2:9",
        "found '10.0.0.1', expected an address of the same family as 'remote ::1' "
        "(one is IPv4 and the other IPv6)",
    ),
]


@pytest.mark.parametrize(("text", "where", "what"), STATEMENTS + BRACES + CHARACTERS + VALUES + RESOURCES)
def test_message(text: str, where: str, what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, "/etc/hast.conf", NAMES)
    assert str(caught.value) == f"/etc/hast.conf:{where}: {what}"
    assert caught.value.exit_code == os.EX_CONFIG


def test_resources_that_meet_only_on_the_other_node_are_no_error_here() -> None:
    text = """
        resource a { on hasta { remote none local /x } on hastb { remote none local /z } }
        resource b { on hasta { remote none local /y } on hastb { remote none local /z } }"""
    assert list(parse(text, "x", ("hasta",)).resources) == ["a", "b"]
    with pytest.raises(ConfigError, match="a local path of its own"):
        parse(text, "x", ("hastb",))


def test_the_message_is_one_line_whatever_the_file_and_node_are_called() -> None:
    with pytest.raises(ConfigError) as caught:
        parse("resource a { }", "/tmp/x\ny", ("n\n1",))
    assert str(caught.value).isprintable()
    assert str(caught.value).startswith("/tmp/x\\ny:1:10: found ")


@pytest.mark.parametrize("size", [63, 1])
def test_names_up_to_the_limit_are_taken(size: int) -> None:
    name = "n" * size
    text = f"resource {name} {{ name {name} on hasta {{ remote none local /x }} }}"
    assert list(parse(text, "x", NAMES).resources) == [name]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "absent"
    with pytest.raises(ConfigError) as caught:
        load(str(path), NAMES)
    assert str(caught.value) == f"cannot read configuration '{path}': No such file or directory"


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^cannot read configuration '.*': Is a directory$"):
        load(str(tmp_path), NAMES)


def test_a_path_with_a_nul_byte() -> None:
    with pytest.raises(ConfigError, match=r"^cannot read configuration '/a\\x00b': embedded null byte$"):
        load("/a\0b", NAMES)


def test_a_file_without_end_is_not_read_to_its_end() -> None:
    with pytest.raises(ConfigError, match=r"'/dev/zero': it is larger than 1048576 bytes$"):
        load("/dev/zero", NAMES)


def test_an_error_of_a_file_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "hast.conf"
    path.write_text("timeout 0\n")
    with pytest.raises(ConfigError) as caught:
        load(str(path), NAMES)
    assert str(caught.value) == f"{path}:1:9: found number '0', expected {SECONDS}"
