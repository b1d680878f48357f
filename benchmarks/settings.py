"""The configuration a benchmark runs: the one named, or the synthetic job's on data made for the occasion."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fiited_ray.config import Config, load
from fiited_ray.data.synthetic import SyntheticSpec, write_synthetic


def config_of(path: str | None, rows: int, folder: str, settings: Sequence[str]) -> Config:
    """The configuration at `path` with settings; without one, jobs/configs/synthetic.yaml on `rows` rows written into the folder."""
    if path is not None:
        return load(path, settings)
    train_file, test_file = write_synthetic(Path(folder) / "data", SyntheticSpec(rows=rows))
    synthetic = Path(__file__).parent.parent / "jobs" / "configs" / "synthetic.yaml"
    return load(synthetic, [f"data.train={train_file}", f"data.test={test_file}", *settings])
