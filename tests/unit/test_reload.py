"""What a changed configuration means for a running hastd: the plan, and what each setting costs."""

from __future__ import annotations

import asyncio
import os
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hast import reloader
from hast.address import Address, parse_address
from hast.config import Config, Resource, parse
from hast.control import Role
from hast.errors import ConfigError
from hast.reload import (
    LIVE,
    RECONNECT,
    RESTART,
    START_ONLY,
    Action,
    action,
    changed_settings,
    check,
    check_change,
    plan,
)

BASE = parse("resource a { local /a on here { remote none } }", "hast.conf", ["here"])
RESOURCE = BASE.resources["a"]
ADDRESSES = [parse_address(text) for text in ("192.0.2.1", "tcp4://192.0.2.2:99", "tcp6://[2001:db8::1]", "/a/socket")]
NAMES = "abcd"


def other(value: object) -> object:
    """Another value of the same kind."""
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case str():
            return value + "x"
        case Address() | None:
            return ADDRESSES[1] if value == ADDRESSES[0] else ADDRESSES[0]
        case tuple():
            return (*value, ADDRESSES[1])
    raise AssertionError(value)


def with_other(resource: Resource, *settings: str) -> Resource:
    return replace(resource, **{name: other(getattr(resource, name)) for name in settings})


@st.composite
def resources(draw: st.DrawFn, name: str) -> Resource:
    """Few values, so that two of them often agree."""
    changed = draw(st.sets(st.sampled_from([f.name for f in fields(Resource) if f.name != "name"])))
    return with_other(replace(RESOURCE, name=name, provname=name, localpath=f"/{name}"), *changed)


@st.composite
def configs(draw: st.DrawFn) -> Config:
    names = draw(st.lists(st.sampled_from(NAMES), unique=True))
    return replace(
        BASE,
        node=draw(st.sampled_from(("here", "there"))),
        control=draw(st.sampled_from(ADDRESSES)),
        pidfile=draw(st.sampled_from(("/1", "/2"))),
        rundir=draw(st.sampled_from(("/1", "/2"))),
        listen=tuple(draw(st.lists(st.sampled_from(ADDRESSES), min_size=1, unique=True))),
        resources={name: draw(resources(name)) for name in names},
    )


@given(configs(), configs())
def test_applied_to_the_old_one_it_gives_the_new_one(old: Config, new: Config) -> None:
    planned = plan(old, new)
    expected = replace(new, **{name: getattr(old, name) for name in START_ONLY})
    after = planned.apply(old)
    assert after == expected
    assert list(after.resources) == list(new.resources)
    # Nothing is left to be done but what only a new start can do, and nothing was done that need not be.
    again = plan(after, new)
    assert not (again.globals or again.added or again.removed or again.changed)
    assert again.kept == planned.kept
    touched = {r.name for r in planned.added} | set(planned.removed) | {c.new.name for c in planned.changed}
    for name in old.resources.keys() | new.resources.keys():
        assert (name in touched) == (old.resources.get(name) != new.resources.get(name))


@given(configs())
def test_nothing_is_done_without_a_change(config: Config) -> None:
    planned = plan(config, replace(config))
    assert str(planned) == "nothing has changed"
    assert planned.kept_text(config) == ""


@given(configs(), configs())
def test_plan_is_one_line(old: Config, new: Config) -> None:
    planned = plan(old, new)
    assert "\n" not in str(planned) + planned.kept_text(old)
    assert (str(planned) == "nothing has changed") == (planned.apply(old) == replace(old, node=new.node))


def test_plan_in_words() -> None:
    old = parse("resource a { on here { local /a remote none } }", "hast.conf", ["here"])
    new = parse(
        "listen 192.0.2.1 pidfile /p rundir /r exec /hook\nresource b { on here { local /a remote none } }",
        "hast.conf",
        ["here"],
    )
    planned = plan(old, new)
    assert str(planned) == "added b; removed a; changed 'listen'"
    assert planned.kept_text(old) == (
        "pidfile /var/run/hastd.pid, rundir /run/hast: in use until hastd is started anew,"
        " it cannot be changed before"
    )
    both = replace(old, resources={"a": with_other(old.resources["a"], "localpath", "on_io_error", "exec")})
    assert str(plan(old, replace(both, control=ADDRESSES[3]))) == "changed 'control', a (local, exec, on-io-error)"


def test_each_setting_has_its_place() -> None:
    """A new setting of a resource has to be put into a table, and into one only."""
    every = {f.name for f in fields(Resource)} - {"name"}
    tables = [RESTART[Role.PRIMARY], RECONNECT[Role.PRIMARY], LIVE]
    assert set().union(*tables) == every
    assert sum(map(len, tables)) == len(every)
    # hast/reloader.py asks for a primary before it knows the role: a secondary never needs more.
    assert RESTART[Role.SECONDARY] <= RESTART[Role.PRIMARY]
    assert RECONNECT[Role.SECONDARY] <= RECONNECT[Role.PRIMARY]


@pytest.mark.parametrize(
    ("settings", "primary", "secondary"),
    [
        ((), Action.NONE, Action.NONE),
        (("exec", "syncrate", "metaflush"), Action.NONE, Action.NONE),
        (("remote",), Action.RECONNECT, Action.RECONNECT),
        (("source", "replication"), Action.RECONNECT, Action.NONE),
        (("checksum",), Action.RECONNECT, Action.RECONNECT),
        (("provname",), Action.RESTART, Action.NONE),
        (("device", "on_io_error"), Action.RESTART, Action.NONE),
        (("on_io_error",), Action.NONE, Action.NONE),
        (("localpath",), Action.RESTART, Action.RESTART),
        (("keepawake",), Action.NONE, Action.NONE),
        (("exec", "timeout", "directio"), Action.RESTART, Action.RESTART),
    ],
)
def test_what_a_change_costs(settings: tuple[str, ...], primary: Action, secondary: Action) -> None:
    changed = changed_settings(RESOURCE, with_other(RESOURCE, *settings))
    assert set(changed) == set(settings)
    assert action(changed, Role.PRIMARY) is primary
    assert action(changed, Role.SECONDARY) is secondary
    assert action(changed, Role.INIT) is Action.NONE


def test_same_address_in_other_words_is_no_change() -> None:
    texts = ("192.0.2.1", "tcp://192.0.2.1:8457")
    confs = [f"listen {text}\nresource a {{ local /a on here {{ remote {text} }} }}" for text in texts]
    assert str(plan(*(parse(conf, "hast.conf", ["here"]) for conf in confs))) == "nothing has changed"


def test_control_on_tcp_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^hast.conf: control 192\.0\.2\.1: hastd listens to hastctl on Unix"):
        check(replace(BASE, control=ADDRESSES[0]))
    check(BASE)


def test_file_that_is_just_being_written_is_not_believed() -> None:
    empty = parse("# nothing yet\n", "hast.conf", ["here"])
    with pytest.raises(ConfigError, match=r"^hast.conf: it says nothing at all"):
        check_change(BASE, empty)
    check_change(empty, empty)
    check_change(BASE, parse("rundir /r", "hast.conf", ["here"]))  # the last resource is gone, and that is meant
    with pytest.raises(ConfigError, match="Unix sockets only"):
        check_change(BASE, replace(BASE, control=ADDRESSES[0]))


def test_file_that_cannot_be_read_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds up neither the others nor the end."""
    monkeypatch.setattr(reloader, "LOAD_SECONDS", 0.1)
    path = tmp_path / "hast.conf"
    os.mkfifo(path)  # nobody ever writes to it
    with pytest.raises(ConfigError, match=r"^cannot read configuration '.*/hast\.conf': it took more than 0\.1 s$"):
        asyncio.run(reloader.load(str(path)))
    os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))  # the reader goes on, and ends
    with pytest.raises(ConfigError, match=r"No such file or directory$"):
        asyncio.run(reloader.load(str(tmp_path / "absent")))
    path.unlink()
    path.write_text("rundir /r")
    monkeypatch.setattr(reloader, "LOAD_SECONDS", 30.0)
    assert asyncio.run(reloader.load(str(path))).rundir == "/r"
