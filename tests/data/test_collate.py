"""Arrow tables to batches: every column type, nulls, lists, bins and crosses, against a reference that goes row by row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fiited_ray.config import Bin, DataConfig
from fiited_ray.data import Batch, Collator, DataError
from fiited_ray.data.collate import NULL_ID
from fiited_ray.store.ops import ops


def hash_of(text: str | bytes) -> int:
    """The id of one string."""
    content = text.encode() if isinstance(text, str) else text
    bytes_ = torch.tensor(list(content), dtype=torch.uint8)
    return int(ops("cpu").hash_strings(torch.tensor([0, len(content)]), bytes_, 0)[0])


def cross_of(*ids: int) -> int:
    """The id of a cross of ids."""
    crossed = torch.tensor([ids[0]])
    for each in ids[1:]:
        crossed = ops("cpu").cross_ids(crossed, torch.tensor([each]), 0)
    return int(crossed[0])


def bags(batch: Batch) -> list[list[list[int]]]:
    """Ids by feature and row."""
    flat = [batch.ids[begin:end].tolist() for begin, end in zip(batch.offsets[:-1].tolist(), batch.offsets[1:].tolist(), strict=True)]
    return [flat[at : at + batch.rows] for at in range(0, len(flat), batch.rows)] if batch.rows else []


def collate(column: pa.Array | pa.ChunkedArray, role: str = "categorical") -> list[Any]:
    """What a column becomes: ids by row, or dense values."""
    roles: dict[str, Any] = {"categorical": ("other",)} | {role: ("x",)}
    config = DataConfig(**roles)
    table = pa.table({"label": np.zeros(len(column)), "other": np.arange(len(column)), "x": column})
    batch = Collator(config)(table)
    if role == "dense":
        return batch.dense[:, 0].tolist()
    found = bags(batch)[config.features.index("x")]
    return found if role == "multi_hot" else [only for (only,) in found]


INTEGERS = (pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64())
STRINGS = (pa.string(), pa.large_string(), pa.binary(), pa.large_binary())


@pytest.mark.parametrize("kind", INTEGERS, ids=str)
def test_integers_are_their_own_ids_and_null_has_one(kind: pa.DataType) -> None:
    assert collate(pa.array([3, None, 0, 127], kind)) == [3, NULL_ID, 0, 127]


def test_unsigned_64_bit_ids_keep_their_bits() -> None:
    assert collate(pa.array([2**64 - 1, 2**63 - 1, 2**63 + 5, None], pa.uint64())) == [-1, 2**63 - 1, 5 - 2**63, NULL_ID]


def test_large_integers_beside_a_null_keep_every_digit() -> None:
    assert collate(pa.array([2**53 + 1, None, -(2**63) + 1], pa.int64())) == [2**53 + 1, NULL_ID, -(2**63) + 1]


def test_booleans_are_0_and_1() -> None:
    assert collate(pa.array([True, None, False])) == [1, NULL_ID, 0]


@pytest.mark.parametrize("kind", STRINGS, ids=str)
def test_strings_are_hashed_alike_in_every_string_type(kind: pa.DataType) -> None:
    assert collate(pa.array(["a", None, "", "Zürich"], kind)) == [hash_of("a"), NULL_ID, hash_of(""), hash_of("Zürich")]


@pytest.mark.parametrize("index", [pa.int8(), pa.uint16(), pa.int32(), pa.int64()], ids=str)
@pytest.mark.parametrize("value", [pa.string(), pa.large_string(), pa.int64()], ids=str)
def test_a_dictionary_gives_the_ids_of_its_entries(index: pa.DataType, value: pa.DataType) -> None:
    plain = pa.array([7, None, 9, 7, 8] if value == pa.int64() else ["x", None, "y", "x", "z"], value)
    encoded = pa.array(plain.to_pylist(), pa.dictionary(index, value))
    assert collate(encoded) == collate(plain)


def test_a_null_among_a_dictionarys_entries_is_a_missing_value() -> None:
    encoded = pa.DictionaryArray.from_arrays(pa.array([0, 1, None], pa.int32()), pa.array(["a", None]))
    assert collate(encoded) == [hash_of("a"), NULL_ID, NULL_ID]


def test_a_dictionary_without_entries_is_all_missing() -> None:
    assert collate(pa.array([None, None], pa.dictionary(pa.int32(), pa.string()))) == [NULL_ID, NULL_ID]


def test_chunks_with_dictionaries_of_their_own_agree() -> None:
    chunks = pa.chunked_array([pa.array(part).dictionary_encode() for part in (["a", "b"], ["b", "c"])])
    assert collate(chunks) == [hash_of(each) for each in "abbc"]


@pytest.mark.parametrize("kind", [*INTEGERS, *STRINGS, pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_a_slice_gives_the_ids_of_its_own_rows(kind: pa.DataType) -> None:
    values = [str(at) if not pa.types.is_integer(kind) else at for at in range(10)]
    column = pa.array([*values[:4], None, *values[5:]], kind)
    assert collate(column.slice(3, 4)) == collate(column)[3:7]


@pytest.mark.parametrize("outer", [pa.list_, pa.large_list], ids=["list", "large_list"])
@pytest.mark.parametrize("inner", [pa.int32(), pa.uint64(), pa.string(), pa.large_string()], ids=str)
def test_lists_become_bags_and_null_lists_empty_ones(outer: Any, inner: pa.DataType) -> None:
    rows = [[1, 2], None, [], [None, 3]] if pa.types.is_integer(inner) else [["a", "b"], None, [], [None, "c"]]
    ids = {1: 1, 2: 2, 3: 3, "a": hash_of("a"), "b": hash_of("b"), "c": hash_of("c"), None: NULL_ID}
    expected = [[ids[each] for each in row or []] for row in rows]
    assert collate(pa.array(rows, outer(inner)), "multi_hot") == expected
    assert collate(pa.array(rows * 3, outer(inner)).slice(2, 5), "multi_hot") == (expected * 3)[2:7]


def test_fixed_size_lists_become_bags() -> None:
    column = pa.array([[1, 2], None, [3, 4]], pa.list_(pa.int64(), 2))
    assert collate(column, "multi_hot") == [[1, 2], [], [3, 4]]
    assert collate(column.slice(1, 2), "multi_hot") == [[], [3, 4]]


def test_a_null_list_over_hidden_values_is_empty() -> None:
    column = pa.ListArray.from_arrays(pa.array([0, 2, 5, 6], pa.int32()), pa.array(range(6)), mask=pa.array([False, True, False]))
    assert collate(column, "multi_hot") == [[0, 1], [], [5]]


@pytest.mark.parametrize("kind", [pa.float32(), pa.float64(), pa.int8(), pa.uint64(), pa.bool_(), pa.float16()], ids=str)
def test_any_number_can_be_dense_and_null_is_zero(kind: pa.DataType) -> None:
    values = [True, None, False] if kind == pa.bool_() else [np.float16(1), None, np.float16(0)] if kind == pa.float16() else [1, None, 0]
    assert collate(pa.array(values, kind), "dense") == [1.0, 0.0, 0.0]


def test_log1p_takes_negative_values_as_zero() -> None:
    config = DataConfig(categorical=("c",), dense=("x",), dense_transform="log1p")
    table = pa.table({"label": [0, 1, 0, 1], "c": [1, 2, 3, 4], "x": pa.array([0.0, -5.0, np.e - 1, None])})
    assert Collator(config)(table).dense[:, 0].tolist() == pytest.approx([0, 0, 1, 0])


def test_a_bin_is_the_floor_of_value_over_width() -> None:
    config = DataConfig(categorical=("band",), bins={"band": Bin("x", 0.25)})
    table = pa.table({"label": [0] * 5, "x": pa.array([0.24, 0.25, -0.01, None, 3.99])})
    assert bags(Collator(config)(table)) == [[[0], [1], [-1], [NULL_ID], [15]]]


def test_a_bin_may_be_used_in_a_cross_alone() -> None:
    config = DataConfig(cross=(("user", "decade"),), bins={"decade": Bin("year", 10)})
    table = pa.table({"label": [0, 1], "user": [5, 5], "year": [1994, 2001]})
    assert bags(Collator(config)(table)) == [[[cross_of(5, 199)], [cross_of(5, 200)]]]


def test_the_order_of_a_cross_matters() -> None:
    config = DataConfig(cross=(("a", "b"), ("b", "a")))
    (one,), (two,) = bags(Collator(config)(pa.table({"label": [0], "a": [3], "b": [4]})))
    assert one != two
    assert (one, two) == ([cross_of(3, 4)], [cross_of(4, 3)])


def test_a_cross_of_three_tells_apart_every_combination() -> None:
    values = [[a, b, c] for a in range(6) for b in range(6) for c in range(6)]
    table = pa.table({"label": [0] * 216} | {name: [each[at] for each in values] for at, name in enumerate("abc")})
    assert len(set(Collator(DataConfig(cross=(("a", "b", "c"),)))(table).ids.tolist())) == 216


def test_a_cross_with_a_null_is_an_id_of_its_own() -> None:
    table = pa.table({"label": [0, 0], "a": [3, 3], "b": pa.array([None, 0], pa.int64())})
    (missing,), (zero,) = bags(Collator(DataConfig(cross=(("a", "b"),)))(table))[0]
    assert missing == cross_of(3, NULL_ID)
    assert missing != zero


def test_columns_name_each_source_once() -> None:
    config = DataConfig(
        dense=("rating",),
        categorical=("user", "band"),
        cross=(("user", "band"),),
        bins={"band": Bin("rating", 1)},
        multi_hot=("tags",),
        time="t",
    )
    assert config.columns == ["label", "rating", "user", "tags", "t"]


def test_an_empty_table_is_an_empty_batch() -> None:
    config = DataConfig(categorical=("c", "s"), multi_hot=("m",), cross=(("c", "s"),), dense=("d",))
    types = {"label": pa.int8(), "c": pa.int64(), "s": pa.string(), "m": pa.list_(pa.string()), "d": pa.float32()}
    batch = Collator(config)(pa.schema(list(types.items())).empty_table())
    assert (batch.rows, batch.ids.tolist(), batch.offsets.tolist(), tuple(batch.dense.shape)) == (0, [], [0], (0, 1))
    batch.validate(config.features, config.dense)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": [0, 2, 1]}, "part 7: label column 'label', row 1: 2.0; labels are 0 or 1"),
        ({"label": [0, 1, float("nan")]}, "part 7: label column 'label', row 2: nan; labels are 0 or 1"),
        ({"label": [0, 1, None]}, "part 7: label column 'label', row 2 is null; every row needs a label of 0 or 1"),
        ({"d": [0.0, float("nan"), 1.0]}, "part 7: dense column 'd', row 1: nan; clean the data, or leave the value null if it is missing"),
        (
            {"d": [0.0, 1.0, float("-inf")]},
            "part 7: dense column 'd', row 2: -inf; clean the data, or leave the value null if it is missing",
        ),
        ({"d": [None, float("nan"), None]}, "part 7: dense column 'd', row 1: nan"),  # null is missing, not a number is not
        ({"d": [0.0, 1e300, 1.0]}, "part 7: dense column 'd', row 1: inf; clean the data"),
        ({"c": [0, 1, -(2**63)]}, "part 7: column 'c', row 2: the id -2**63 stands for a missing value; write null instead"),
        ({"c": [0.5, 1.0, 2.0]}, "part 7: column 'c' is double; ids are integers or strings (bin it with data.bins)"),
        ({"c": [[0], [1], [2]]}, "part 7: column 'c' is list<"),
        ({"m": [1, 2, 3]}, "part 7: column 'm' is int64; a multi_hot column holds lists"),
        ({"m": [[1.5], [], []]}, "part 7: column 'm' is double; ids are integers or strings"),
        ({"x": [0.0, float("inf"), 1.0]}, "part 7: column 'x', row 1: inf cannot be binned; leave the value null if it is missing"),
        ({"x": [0.0, 1.0, 1e300]}, "part 7: column 'x', row 2: 1e+300 cannot be binned"),
    ],
)
def test_bad_data_is_refused_with_source_column_row_and_value(change: dict[str, Any], message: str) -> None:
    config = DataConfig(categorical=("c", "b"), dense=("d",), multi_hot=("m",), bins={"b": Bin("x", 1)})
    good = {"label": [0, 1, 0], "c": [1, 2, 3], "d": [0.0, 0.5, 1.0], "m": [[1], [], [2]], "x": [0.0, 0.5, 1.0]}
    with pytest.raises(DataError) as caught:
        Collator(config)(pa.table(good | change), "part 7")
    assert str(caught.value).startswith(message)


def test_the_reserved_id_in_a_list_is_refused_by_the_row_of_the_table() -> None:
    table = pa.table({"label": [0, 0, 0], "m": [[1, 2, 3], [4], [5, -(2**63)]]})
    with pytest.raises(DataError, match=r"column 'm', row 2: the id -2\*\*63"):
        Collator(DataConfig(multi_hot=("m",)))(table)


WEIGHTED = DataConfig(categorical=("c",), multi_hot=("m", "n"), weights={"n": "w"}, cross=(("c", "d"),))


def weighted(ids: Any, weights: Any) -> list[list[list[float]]]:
    """Weights by feature and row."""
    rows = len(ids)
    table = pa.table({"label": [0] * rows, "c": range(rows), "d": range(rows), "m": [[1, 2]] * rows, "n": ids, "w": weights})
    batch = Collator(WEIGHTED)(table, "part 7")
    batch.validate(WEIGHTED.features)
    assert batch.weights is not None
    return bags(replace(batch, ids=batch.weights))


@pytest.mark.parametrize("kind", [pa.float32(), pa.float64(), pa.float16(), pa.int8(), pa.int64()], ids=str)
@pytest.mark.parametrize("outer", [pa.list_, pa.large_list], ids=["list", "large_list"])
def test_ids_weigh_what_their_features_weights_say_and_all_others_1(outer: Any, kind: pa.DataType) -> None:
    numbers = [np.float16(each) for each in (2, -3, 0)] if kind == pa.float16() else [2, -3, 0]
    found = weighted([[5], None, [6, 7], []], pa.array([numbers[:1], None, numbers[1:], []], outer(kind)))
    assert found == [[[1.0]] * 4, [[1.0, 1.0]] * 4, [[2.0], [], [-3.0, 0.0], []], [[1.0]] * 4]


def test_a_null_list_of_weights_goes_with_an_empty_bag_and_the_other_way_round() -> None:
    assert weighted([[], None, [5]], pa.array([None, [], [0.5]]))[2] == [[], [], [0.5]]


def test_weights_in_lists_of_a_fixed_size_are_taken() -> None:
    ids = pa.array([[1, 2], None, [3, 4]], pa.list_(pa.int64(), 2))
    assert weighted(ids, pa.array([[1, 2], None, [3, 4]], pa.list_(pa.float32(), 2)))[2] == [[1, 2], [], [3, 4]]


def test_without_weights_named_a_batch_has_none() -> None:
    config = replace(WEIGHTED, weights={})
    table = pa.table({"label": [0], "c": [1], "d": [2], "m": [[1]], "n": [[2]], "w": [[0.5]]})
    assert Collator(config)(table).weights is None
    assert "w" not in config.columns
    assert "w" in WEIGHTED.columns


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([[1.0], [1.0]], "column 'w' (data.weights.n), row 1 has 1 weights for 2 ids of 'n'; every id needs one"),
        ([[1.0], None], "column 'w' (data.weights.n), row 1 has 0 weights for 2 ids of 'n'; every id needs one"),
        ([[1.0], [1.0, float("nan")]], "column 'w' (data.weights.n), row 1: nan; every id needs a finite weight"),
        ([[1.0], [1e300, 1.0]], "column 'w' (data.weights.n), row 1: inf; every id needs a finite weight"),
        ([[None], [1.0, 1.0]], "column 'w' (data.weights.n), row 0: null; every id needs a finite weight"),
        ([0.5, 0.5], "column 'w' is double; the weights of 'n' are lists of numbers"),
        ([["a"], ["b", "c"]], "column 'w' is list<"),
    ],
)
def test_a_wrong_weight_is_refused_by_feature_column_and_row(weights: list[Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        weighted([[5], [6, 7]], weights)
    assert str(caught.value).startswith(f"part 7: {message}")


RAW_ID = st.none() | st.integers(-(2**63) + 1, 2**63 - 1)
TEXT = st.none() | st.text(max_size=6)
ROW = st.fixed_dictionaries(
    {
        "label": st.integers(0, 1),
        "d": st.none() | st.floats(-100, 100, width=32),
        "number": RAW_ID,
        "text": TEXT,
        "word": st.none() | st.sampled_from(["a", "b", ""]),
        "x": st.none() | st.floats(-50, 50),
        "numbers": st.none() | st.lists(RAW_ID, max_size=4),
        "texts": st.none() | st.lists(TEXT, max_size=4),
    }
).flatmap(
    lambda row: st.lists(st.floats(-9, 9, width=32), min_size=len(row["texts"] or []), max_size=len(row["texts"] or [])).map(
        lambda weights: row | {"weights": weights}
    )
)
SCHEMA = pa.schema(
    [
        ("label", pa.int8()),
        ("d", pa.float32()),
        ("number", pa.int64()),
        ("text", pa.string()),
        ("word", pa.dictionary(pa.int32(), pa.string())),
        ("x", pa.float64()),
        ("numbers", pa.list_(pa.int64())),
        ("texts", pa.large_list(pa.large_string())),
        ("weights", pa.list_(pa.float64())),
    ]
)
CONFIG = DataConfig(
    dense=("d",),
    categorical=("number", "text", "word", "band"),
    multi_hot=("numbers", "texts"),
    weights={"texts": "weights"},
    cross=(("number", "text"), ("word", "band", "number")),
    bins={"band": Bin("x", 2.5)},
)


def id_of(value: Any) -> int:
    return NULL_ID if value is None else hash_of(value) if isinstance(value, str) else value


def row_by_row(row: dict[str, Any]) -> list[list[int]]:
    """Bags of one row, feature by feature."""
    ids = {name: id_of(row[name]) for name in ("number", "text", "word")}
    ids["band"] = NULL_ID if row["x"] is None else int(np.floor(row["x"] / 2.5))
    scalar = [[ids[name]] for name in CONFIG.categorical]
    lists = [[id_of(each) for each in row[name] or []] for name in CONFIG.multi_hot]
    return scalar + lists + [[cross_of(*(ids[name] for name in cross))] for cross in CONFIG.cross]


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(ROW, max_size=12), cut=st.integers(0, 12), begin=st.integers(0, 4))
def test_whole_columns_give_what_row_by_row_gives(rows: list[dict[str, Any]], cut: int, begin: int) -> None:
    parts = [pa.Table.from_pylist(part, SCHEMA) for part in (rows[:cut], rows[cut:])]
    batch = Collator(CONFIG)(pa.concat_tables(parts).slice(begin))
    rows = rows[begin:]
    expected = [row_by_row(row) for row in rows]
    assert bags(batch) == [[row[feature] for row in expected] for feature in range(len(CONFIG.features) if rows else 0)]
    assert batch.labels.tolist() == [row["label"] for row in rows]
    assert batch.dense[:, 0].tolist() == [row["d"] or 0.0 for row in rows]
    batch.validate(CONFIG.features, CONFIG.dense)
    assert batch.weights is not None
    found = bags(replace(batch, ids=batch.weights)) if rows else []
    at = CONFIG.features.index("texts")
    for feature, weights in enumerate(found):
        assert weights == [row["weights"] if feature == at else [1.0] * len(ids[feature]) for row, ids in zip(rows, expected, strict=True)]


def test_integers_beyond_a_floats_digits_can_be_binned() -> None:
    config = DataConfig(categorical=("b",), bins={"b": Bin("t", 2.0**40)})
    table = pa.table({"label": [0], "t": pa.array([2**62 + 1], pa.int64())})
    assert bags(Collator(config)(table)) == [[[2**22]]]
