"""The simulation of two nodes (tests/chaos/sim/): a few thousand histories, and does it still find what is broken?

Longer: python -m tests.chaos.sim --histories 1000000 --jobs 2
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.chaos.sim import runner, shake, variants
from tests.sim import variants as compiled

FIRST, HISTORIES, GROUPS = 0, 4000, 4
ENOUGH = 4000  # histories in which a broken variant has to be found


@pytest.mark.slow
@pytest.mark.parametrize("group", range(GROUPS))
def test_no_history_breaks_a_promise(group: int) -> None:
    count = HISTORIES // GROUPS
    for seed in range(FIRST + group * count, FIRST + (group + 1) * count):
        try:
            runner.run(seed)
        except Exception as error:
            story, text = runner.record(seed)
            short = runner.shorten(story, tries=1000)
            _, told = runner.replay(short, tells=True)
            error.add_note(f"seed {seed}: {text}\n  " + "\n  ".join(told) + f"\n{json.dumps(short)}")
            raise


def test_one_seed_is_one_history() -> None:
    for seed in range(30):
        one, again = runner.run(seed), runner.run(seed)
        assert one.counts == again.counts and one.disks[0].dur == again.disks[0].dur
        story, text = runner.record(seed)
        assert not text and runner.replay(story)[0] == ""


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return compiled.compile_all(tmp_path_factory.mktemp("objects"))


@pytest.mark.parametrize("mistake", variants.IN_C, ids=lambda mistake: mistake.name)
def test_mistake_of_the_sequencer_is_found(mistake: compiled.Mistake, objects: dict[str, Path], tmp_path: Path) -> None:
    library = compiled.load(compiled.link(tmp_path, objects, mistake))
    assert variants.found_after(ENOUGH, library) is not None


def test_no_mistake_is_found_where_none_is(objects: dict[str, Path], tmp_path: Path) -> None:
    """In a sequencer that is built in the same way."""
    assert variants.found_after(100, compiled.load(compiled.link(tmp_path, objects))) is None


@pytest.mark.parametrize("mistake", variants.IN_WORKERS, ids=lambda mistake: mistake.name)
def test_mistake_of_a_worker_is_found(mistake: variants.Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    mistake.put(monkeypatch.setattr)
    shake.shake.cache_clear()
    try:
        assert variants.found_after(ENOUGH) is not None
    finally:
        shake.shake.cache_clear()


def test_failing_story_is_shortened_and_fails_again(monkeypatch: pytest.MonkeyPatch) -> None:
    variants.metadata_not_flushed(monkeypatch.setattr)
    seed = variants.found_after(ENOUGH)
    assert seed is not None
    story, text = runner.record(seed - 1)
    short = runner.shorten(story)
    again, told = runner.replay(short, tells=True)
    assert text and runner.kind(again) == runner.kind(text)
    assert len(short) < len(story) and told
