"""For all tests: a machine that is busy with something else makes nothing fail, and all of its processors have
something to do until the end: the slow ones come first."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("hast", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("hast")

SLOW_SECONDS = 600  # for a test that takes a minute when nothing else runs; pyproject.toml has the limit of the others


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_SECONDS))
    workers = int(getattr(config, "workerinput", {"workercount": 1})["workercount"])
    items[:] = slow_first(items, workers)


def slow_first(items: list[pytest.Item], workers: int) -> list[pytest.Item]:
    """Each worker begins with a part of this list, one after the other, and those that are done take from the others'
    last ones: nobody is to find a minute's work there at the very end."""
    slow = [item for item in items if item.get_closest_marker("slow")]
    rest = [item for item in items if not item.get_closest_marker("slow")]
    parts, done = [], 0
    for n in range(workers):
        end = len(rest) * (n + 1) // workers
        parts += slow[n::workers] + rest[done:end]
        done = end
    return parts
