"""For all tests: a machine that is busy with something else makes nothing fail."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("hast", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("hast")

SLOW_SECONDS = 600  # for a test that takes a minute when nothing else runs; pyproject.toml has the limit of the others


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_SECONDS))
