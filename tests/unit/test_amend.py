"""What `hastctl role -f primary` makes of a component's metadata, beside what the run directory says of it."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from hast import boot
from hast.amend import change_component
from hast.component import Component, create, open_component
from hast.config import parse
from hast.control import Role
from hast.errors import TemporaryError
from hast.metadata import Metadata, Pair


def forced(tmp_path: Path, pair: Pair, syncing: bool, note: str) -> Metadata:
    """What "force" makes of a secondary with these; note: what the run directory says."""
    path = tmp_path / "disk"
    text = f"resource data {{ local {path}\n on here {{ remote tcp4://192.0.2.1:99 }} }}"
    resource = parse(text, "hast.conf", ["here"]).resources["data"]
    create("data", str(path), mediasize=8 << 20)
    with closing(open_component("data", str(path))) as component:
        metadata = component.read_metadata()
        metadata = replace(metadata, resuid=7, pair=pair, prevrole=Role.SECONDARY, syncing=syncing)
        component.write_metadata(metadata)
    if note != "power":
        boot.remember(tmp_path, "data")
    if note == "outdated":
        boot.outdate(tmp_path, "data", 7)
    if note == "another's":
        boot.outdate(tmp_path, "data", 8)
    change_component(resource, "force", boot.note(tmp_path, "data"))
    with closing(open_component("data", str(path))) as component:
        return component.read_metadata()


@pytest.mark.parametrize(
    ("syncing", "note", "after"),
    [
        (False, "", Pair(1, 1)),  # there is nothing to be forced
        (False, "another's", Pair(1, 1)),
        (True, "", Pair(2, 1)),
        # Its counters may be in step with the other node's, which has more: only a lower remotecnt has that found.
        (False, "outdated", Pair(2, 0)),
        (True, "outdated", Pair(2, 0)),
        # The same where it has lost power since the other one was complete with it, which it did not hear.
        (True, "power", Pair(2, 0)),
        (False, "power", Pair(1, 1)),
    ],
)
def test_what_a_forced_node_may_have_lost_is_found(tmp_path: Path, syncing: bool, note: str, after: Pair) -> None:
    made = forced(tmp_path, Pair(1, 1), syncing, note)
    assert made.pair == after and made.resuid == 7


@pytest.mark.parametrize("note", ["", "power"])
def test_where_the_counters_cannot_say_it_the_unique_id_does(tmp_path: Path, note: str) -> None:
    assert (forced(tmp_path, Pair(0, 0), True, note).resuid == 7) == (note == "")


def test_nothing_is_changed_when_nobody_waits_for_it_any_more(tmp_path: Path) -> None:
    """The disk has hung, hastctl has said that it is not forced, and something else may have been done since."""
    before = forced(tmp_path, Pair(1, 1), True, "")
    path = tmp_path / "disk"
    text = f"resource data {{ local {path}\n on here {{ remote tcp4://192.0.2.1:99 }} }}"
    resource = parse(text, "hast.conf", ["here"]).resources["data"]
    before = replace(before, syncing=True)
    with closing(open_component("data", str(path))) as component:
        component.write_metadata(before)
    with pytest.raises(TemporaryError):
        change_component(resource, "force", boot.note(tmp_path, "data"), lambda: False)
    with closing(open_component("data", str(path))) as component:
        assert component.read_metadata() == before


def test_nothing_is_changed_when_nobody_waits_any_more_for_the_map(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without `metaflush` it is marked first, and it is that for which the disk has hung."""
    before = replace(forced(tmp_path, Pair(1, 1), False, ""), prevrole=Role.PRIMARY)
    path = tmp_path / "disk"
    text = f"metaflush off\nresource data {{ local {path}\n on here {{ remote tcp4://192.0.2.1:99 }} }}"
    resource = parse(text, "hast.conf", ["here"]).resources["data"]
    with closing(open_component("data", str(path))) as component:
        component.write_metadata(before)
    note, filled = boot.note(tmp_path, "data"), []
    boot.spoil(note)
    monkeypatch.setattr(Component, "fill_map", lambda *_: filled.append(True))
    with pytest.raises(TemporaryError):
        change_component(resource, "force, lost", note, lambda: not filled)
    with closing(open_component("data", str(path))) as component:
        assert component.read_metadata() == before
