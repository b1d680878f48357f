"""The synthetic click log: repeatable, sized as told, marked as synthetic, with drift and a signal in its ids."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fiited_ray.config import load
from fiited_ray.data import DataError, check_files
from fiited_ray.data.files import SYNTHETIC_KEY
from fiited_ray.data.synthetic import CARDINALITIES, CATEGORICAL, DENSE, SyntheticSpec, write_synthetic

SPEC = SyntheticSpec(rows=60_000, seed=3)  # more than one block


def make(folder: Path, spec: SyntheticSpec) -> pa.Table:
    """All rows, training and test."""
    return pa.concat_tables([pq.read_table(path) for path in write_synthetic(folder, spec)])


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    return make(tmp_path_factory.mktemp("synthetic"), SPEC)


def test_the_same_seed_gives_the_same_rows_and_another_seed_others(tmp_path: Path) -> None:
    spec = SyntheticSpec(rows=2000, seed=5)
    first = make(tmp_path / "a", spec)
    assert first.equals(make(tmp_path / "b", spec))
    assert not first.equals(make(tmp_path / "c", replace(spec, seed=6)))


def test_the_last_rows_are_the_test_and_time_runs_through(tmp_path: Path) -> None:
    train, test = (pq.read_table(path) for path in write_synthetic(tmp_path, SyntheticSpec(rows=1000, test_share=0.3)))
    assert (train.num_rows, test.num_rows) == (700, 300)
    assert [*train["time"].to_pylist(), *test["time"].to_pylist()] == list(range(1000))


def test_a_set_without_rows_is_neither_written_nor_named(tmp_path: Path) -> None:
    assert write_synthetic(tmp_path, SyntheticSpec(rows=100, test_share=0)) == (tmp_path / "train.parquet",)


def test_files_are_marked_as_synthetic(tmp_path: Path) -> None:
    for path in write_synthetic(tmp_path, SyntheticSpec(rows=500)):
        assert SYNTHETIC_KEY in pq.read_schema(path).metadata


def test_the_embedded_configuration_reads_the_files(tmp_path: Path) -> None:
    train, _ = write_synthetic(tmp_path, SyntheticSpec(rows=500))
    config = load(Path(__file__).parents[2] / "jobs" / "configs" / "synthetic.yaml").data
    files = check_files((str(train),), config)
    assert (files.total_rows, files.synthetic) == (450, True)
    assert (len(config.dense), len(config.features)) == (DENSE, CATEGORICAL)


def test_no_column_holds_more_ids_than_its_cardinality_and_those_renewed(rows: pa.Table) -> None:
    for column in range(CATEGORICAL - 1):
        ids = rows[f"c{column}"].to_numpy()
        assert ids.min() >= 0
        assert ids.max() < 2 * SPEC.cardinality(column)


def test_without_drift_small_columns_hold_exactly_their_published_values(tmp_path: Path) -> None:
    table = make(tmp_path, replace(SPEC, drift=0.0))
    for column in (8, 16, 19):
        assert len(set(table[f"c{column}"].to_pylist())) == CARDINALITIES[column] == SPEC.cardinality(column)


def test_large_columns_grow_with_the_rows_and_never_beyond_the_published_ones() -> None:
    sizes = [SyntheticSpec(rows=rows).cardinality(2) for rows in (10_000, 1_000_000, 10**9)]
    assert sizes[0] < sizes[1] < sizes[2] == CARDINALITIES[2]


def test_ids_follow_a_power_law(rows: pa.Table) -> None:
    ids = rows["c2"].to_numpy()
    counts = np.array(sorted(Counter(ids.tolist()).values(), reverse=True))
    assert counts[: len(counts) // 10].sum() > 0.5 * len(ids)
    assert (counts == 1).mean() > 0.3


def shared_popularity(table: pa.Table) -> float:
    """The share of the most frequent 200 ids of the first fifth that are still so in the last fifth."""
    ids = table["c2"].to_numpy()
    fifth = len(ids) // 5
    early, late = ({each for each, _ in Counter(part.tolist()).most_common(200)} for part in (ids[:fifth], ids[-fifth:]))
    return len(early & late) / 200


def test_drift_changes_which_ids_are_popular(tmp_path: Path) -> None:
    spec = SyntheticSpec(rows=50_000)
    still, moving = (shared_popularity(make(tmp_path / str(drift), replace(spec, drift=drift))) for drift in (0.0, 0.9))
    assert still > 0.5
    assert moving < still - 0.3


def click_rates(table: pa.Table, popular: list[int]) -> list[np.ndarray]:
    """Labels' mean for each of the popular ids, in the first third and in the last one."""
    ids, labels, third = table["c0"].to_numpy(), table["label"].to_numpy(), table.num_rows // 3
    return [np.array([labels[part][ids[part] == each].mean() for each in popular]) for part in (slice(third), slice(-third, None))]


def test_preference_drift_changes_what_ids_mean_for_the_label(tmp_path: Path) -> None:
    spec = SyntheticSpec(rows=100_000, drift=0.0)
    agreement = {}
    for drift in (0.0, 2.0):
        table = make(tmp_path / str(drift), replace(spec, preference_drift=drift))
        popular = [each for each, _ in Counter(table["c0"].to_pylist()).most_common(12)]
        agreement[drift] = np.corrcoef(click_rates(table, popular))[0, 1]
    assert agreement[0.0] > 0.7
    assert agreement[2.0] < 0  # half a turn: the opposite


def test_popularity_can_be_renewed_more_than_once(tmp_path: Path) -> None:
    spec = replace(SPEC, drift=3.0)
    ids = make(tmp_path, spec)["c2"].to_numpy()
    assert set(ids // spec.cardinality(2)) == {0, 1, 2, 3}


def test_the_label_depends_on_the_ids(rows: pa.Table) -> None:
    labels = rows["label"].to_numpy().astype(float)
    ids = rows["c0"].to_numpy()
    popular = [each for each, count in Counter(ids.tolist()).most_common(20) if count > 500]
    # the rate of each popular id in units of its standard error: about 1 were the label independent of it
    scores = [(labels[ids == each].mean() - labels.mean()) / np.sqrt(labels.var() / (ids == each).sum()) for each in popular]
    assert len(popular) >= 5
    assert np.sqrt(np.mean(np.square(scores))) > 3


def test_about_as_many_clicks_as_told(rows: pa.Table) -> None:
    labels = rows["label"].to_numpy()
    assert set(labels.tolist()) == {0, 1}
    assert 0.15 < labels.mean() < 0.4


def test_some_dense_values_are_missing_and_lists_are_never_empty(rows: pa.Table) -> None:
    assert rows["d0"].null_count == 0
    assert 0 < rows["d3"].null_count < rows.num_rows // 10
    assert min(map(len, rows["c25"].to_pylist())) == 1


@pytest.mark.parametrize(
    "wrong",
    [{"rows": 0}, {"seed": -1}, {"test_share": 1.0}, {"skew": -0.1}, {"drift": -0.5}, {"preference_drift": -0.5}, {"click_rate": 0.0}],
    ids=lambda each: next(iter(each)),
)
def test_a_log_that_cannot_be_made_is_refused_by_name(wrong: dict[str, float]) -> None:
    with pytest.raises(DataError, match=f"{next(iter(wrong))} must be"):
        replace(SPEC, **wrong)


def test_a_log_that_is_already_there_is_not_written_over(tmp_path: Path) -> None:
    train, _ = write_synthetic(tmp_path, SyntheticSpec(rows=500))
    with pytest.raises(DataError, match=r"train\.parquet: already there"):
        write_synthetic(tmp_path, SyntheticSpec(rows=900))
    assert pq.read_metadata(train).num_rows == 450


def test_nothing_else_is_left_in_the_folder(tmp_path: Path) -> None:
    write_synthetic(tmp_path, SyntheticSpec(rows=500))
    assert sorted(each.name for each in tmp_path.iterdir()) == ["test.parquet", "train.parquet"]
