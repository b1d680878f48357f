"""A machine's load among a run's metrics: MLflow's own sampler, as `system/...`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from fiited_ray.tracking_address import RunRef


@contextmanager
def watching(ref: RunRef, seconds: float) -> Iterator[None]:
    """Sample this machine every `seconds` as long as the context lasts; 0: not at all."""
    if not seconds:
        yield
        return
    for name in ("system_metrics_monitor", "metrics.gpu_monitor"):  # what goes wrong there would be logged with the store's password
        logging.getLogger(f"mlflow.system_metrics.{name}").disabled = True
    monitor = SystemMetricsMonitor(ref.run_id, sampling_interval=seconds, resume_logging=True, tracking_uri=ref.uri)
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()
