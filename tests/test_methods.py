"""Each method does what its source says, in the same training loop and within the same budget."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from fiited_ray.config import Config, DataConfig, EmbeddingConfig, PolicyConfig, load
from fiited_ray.store import ShardSpec

DATA = DataConfig(categorical=("user", "item"))
FIITED = Config(data=DATA, embedding=EmbeddingConfig(dim=12, chunk=4), policy=PolicyConfig(importance="norm"))


def spec_of(method: Any) -> ShardSpec:
    return ShardSpec.of(dataclasses.replace(FIITED, method=method), 1 << 20)


def test_fiited_takes_chunks_and_importance_from_their_keys() -> None:
    assert (spec_of("fiited").chunk, spec_of("fiited").chunks, spec_of("fiited").importance) == (4, 3, "norm")


def test_adaembed_has_whole_rows_by_frequency_times_gradient_norm() -> None:
    assert (spec_of("adaembed").chunk, spec_of("adaembed").chunks, spec_of("adaembed").importance) == (12, 1, "frequency_x_norm")


def test_frequency_has_whole_rows_by_number_of_lookups() -> None:
    assert (spec_of("frequency").chunk, spec_of("frequency").chunks, spec_of("frequency").importance) == (12, 1, "frequency")


def test_the_method_is_one_key_of_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("data: {categorical: [user, item]}\n")
    assert load(tmp_path / "c.yaml").method == "fiited"
    assert load(tmp_path / "c.yaml", ["method=adaembed"]).method == "adaembed"
