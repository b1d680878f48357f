"""Fixtures shared by all tests."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import hypothesis
import pytest
import ray

_LONGEST = {"train", "tune", "test_job_submit.py", "test_ray_resume.py", "test_end_to_end.py"}

# What Ray starts shall get its share of the processor beside other tests, and be asked more often than every other second how it is.
# A process that looks for notices of preemption, for each group of workers, is started where a test gives notice.
os.environ |= {"RAY_worker_niceness": "0", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}

hypothesis.settings.register_profile("any machine", deadline=None)  # a busy one takes its time over an example
hypothesis.settings.load_profile("any machine")


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """One Ray in this process's own cluster, for all tests that need one."""
    ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    yield
    ray.shutdown()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first: two processes share the files, and what one has left in the end the other cannot take."""
    items.sort(key=lambda item: _LONGEST.isdisjoint({item.path.parent.name, item.path.name}))
