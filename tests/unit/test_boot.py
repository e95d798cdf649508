"""Whether the machine has started anew since a resource was last whole."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from hast import boot
from hast.control import Role
from hast.metadata import Metadata


def test_told_by_the_kernels_own_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert boot.anew(tmp_path, "data")
    boot.remember(tmp_path, "data")
    assert not boot.anew(tmp_path, "data")
    assert boot.anew(tmp_path, "other")
    (tmp_path / "boot_id").write_text("another start")
    monkeypatch.setattr(boot, "BOOT_ID", tmp_path / "boot_id")
    assert boot.anew(tmp_path, "data")


def test_a_flush_has_failed(tmp_path: Path) -> None:
    boot.remember(tmp_path, "data")
    assert not boot.lost(tmp_path, "data")
    boot.spoil(boot.note(tmp_path, "data"))
    assert boot.anew(tmp_path, "data") and boot.lost(tmp_path, "data")
    assert not boot.lost(tmp_path, "other")
    boot.remember(tmp_path, "data")
    assert not boot.lost(tmp_path, "data")


def test_the_component_is_out_of_date(tmp_path: Path) -> None:
    boot.remember(tmp_path, "data")
    assert not boot.outdated(tmp_path, "data", 7)
    boot.outdate(tmp_path, "data", 7)
    assert boot.outdated(tmp_path, "data", 7) and boot.anew(tmp_path, "data") and not boot.lost(tmp_path, "data")
    assert not boot.outdated(tmp_path, "data", 8), "that is another component, made since"
    boot.spoil(boot.note(tmp_path, "data"))
    assert boot.outdated(tmp_path, "data", 7), "a flush has failed as well"
    boot.remember(tmp_path, "data")
    assert not boot.outdated(tmp_path, "data", 7)


def test_what_is_known_outlives_an_attempt_to_say_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run directory is full; also whoever is killed in the middle of it leaves the old note or the new one."""
    boot.outdate(tmp_path, "data", 7, boot.TARGET)
    opened = Path.open

    def full(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = opened(self, mode, *args, **kwargs)
        if "w" in mode:
            file.close()  # it is empty now
            raise OSError(errno.ENOSPC, "No space left on device")
        return file

    monkeypatch.setattr(Path, "open", full)
    boot.outdate(tmp_path, "data", 7)
    monkeypatch.undo()
    assert boot.outdated(tmp_path, "data", 7) == boot.TARGET


def test_the_component_is_given_up(tmp_path: Path) -> None:
    metadata = Metadata("data", 1 << 20, 1 << 16, 2, 8192, resuid=7, prevrole=Role.PRIMARY, syncing=True)
    assert boot.given_up(tmp_path, "data") is None
    boot.give_up(tmp_path, metadata)
    assert boot.given_up(tmp_path, "data") == metadata
    assert [entry.name for entry in tmp_path.iterdir()] == ["data.detached"]
    boot.detached_note(tmp_path, "data").write_bytes(b"torn")
    assert boot.given_up(tmp_path, "data") is None


def test_in_doubt_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel without that number, a run directory that cannot be written."""
    boot.remember(tmp_path / "nowhere", "data")
    assert boot.anew(tmp_path / "nowhere", "data")
    boot.remember(tmp_path, "data")
    monkeypatch.setattr(boot, "BOOT_ID", tmp_path / "nowhere")
    assert boot.anew(tmp_path, "data")
    boot.remember(tmp_path, "data")
