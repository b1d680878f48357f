"""Fixtures shared by all tests."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import hypothesis
import pytest
import ray

hypothesis.settings.register_profile("any machine", deadline=None)  # a busy one takes its time over an example
hypothesis.settings.load_profile("any machine")


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """One Ray in this process's own cluster, for all tests that need one."""
    ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    yield
    ray.shutdown()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What waits longest comes first, so that the other process has something to do beside it."""
    items.sort(key=lambda item: item.path.parent.name != "train")
