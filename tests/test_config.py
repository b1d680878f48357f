"""Configuration: what it refuses, with which words, and that a saved one is the one that was loaded."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fiited_ray.config import (
    Bin,
    Budget,
    CheckpointConfig,
    Config,
    ConfigError,
    DataConfig,
    EmbeddingConfig,
    ModelConfig,
    PolicyConfig,
    TrackingConfig,
    TrainConfig,
    load,
)

MINIMAL: dict[str, Any] = {"data": {"categorical": ["user", "item"]}}
Write = Callable[[Any], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes text as it is and anything else as YAML; gives the path."""

    def to_file(content: Any) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return path

    return to_file


# --- budget


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("67108864", Budget(bytes=67108864)),
        (67108864, Budget(bytes=67108864)),
        ("1", Budget(bytes=1)),
        ("64MiB", Budget(bytes=64 * 2**20)),
        ("64 mib", Budget(bytes=64 * 2**20)),
        ("1.5KiB", Budget(bytes=1536)),
        (".5kB", Budget(bytes=500)),
        ("2GB", Budget(bytes=2 * 10**9)),
        ("2GiB", Budget(bytes=2 * 2**30)),
        ("1TiB", Budget(bytes=2**40)),
        ("12B", Budget(bytes=12)),
        ("6.25%", Budget(share=0.0625)),
        ("6.25 %", Budget(share=0.0625)),
        ("150%", Budget(share=1.5)),
        ("1/16", Budget(share=1 / 16)),
        (" 1 / 16 ", Budget(share=1 / 16)),
        ("none", Budget()),
        ("None", Budget()),
    ],
)
def test_budget_reads(text: str | int, budget: Budget) -> None:
    assert Budget.parse(text) == budget


@pytest.mark.parametrize("text", ["", "lots", "-1", "-5%", "64Mi", "64XB", "1/", "/4", "1e9", "nan", "inf", "0x10", "1/2/3", "1.2.3MB"])
def test_budget_refuses_what_is_no_size_and_no_share(text: str) -> None:
    with pytest.raises(ConfigError, match="budget: cannot read"):
        Budget.parse(text)


@pytest.mark.parametrize("text", ["0", "0GiB", "0.5", "0.3B", "1.0001kB"])
def test_budget_refuses_no_bytes_and_parts_of_a_byte(text: str) -> None:
    with pytest.raises(ConfigError, match="budget: cannot read"):
        Budget.parse(text)


@pytest.mark.parametrize("text", ["0%", "0.0%", "0/16"])
def test_budget_refuses_a_share_of_nothing(text: str) -> None:
    with pytest.raises(ConfigError, match="is not above zero"):
        Budget.parse(text)


def test_budget_refuses_a_division_by_zero() -> None:
    with pytest.raises(ConfigError, match="divides by zero"):
        Budget.parse("1/0")


@given(st.integers(min_value=1, max_value=2**53))
def test_budget_in_bytes_survives_its_own_text(size: int) -> None:
    assert Budget.parse(str(Budget(bytes=size))) == Budget(bytes=size)


@given(st.integers(min_value=1, max_value=4096), st.integers(min_value=1, max_value=4096))
def test_budget_as_a_share_survives_its_own_text(part: int, whole: int) -> None:
    share = Budget.parse(f"{part}/{whole}").share
    assert Budget.parse(str(Budget(share=share))).share == pytest.approx(share, rel=1e-9)


# --- what each group refuses


@pytest.mark.parametrize(
    ("group", "values", "message"),
    [
        (Bin, {"column": "age", "width": 0.0}, "data.bins: width must be above 0"),
        (Bin, {"column": "age", "width": float("nan")}, "data.bins: width must be above 0"),
        (DataConfig, {"categorical": ("a", "b", "a")}, "data: columns named twice.*'a'"),
        (DataConfig, {"categorical": ("a",), "dense": ("a",)}, "data: columns named twice.*'a'"),
        (DataConfig, {"categorical": ("label",)}, "data: columns named twice.*'label'"),
        (DataConfig, {"dense": ("price",)}, "data: no categorical, multi_hot or cross column named"),
        (DataConfig, {"categorical": ("a",), "weights": {"a": "w"}}, "data.weights.a: not a multi_hot column"),
        (DataConfig, {"multi_hot": ("m",), "weights": {"m": "m"}}, "data.weights.m: the column is used as something else.*'m'"),
        (DataConfig, {"categorical": ("a",), "cross": (("a",),)}, "data.cross: an entry needs two columns"),
        (DataConfig, {"multi_hot": ("tags",), "cross": (("a", "tags"),)}, "data.cross: multi_hot columns cannot be crossed.*'tags'"),
        (DataConfig, {"categorical": ("a",), "shared_tables": {"t": ("b",)}}, "data.shared_tables.t: no such feature.*'b'"),
        (
            DataConfig,
            {"categorical": ("a", "b"), "shared_tables": {"t": ("a", "b"), "u": ("b",)}},
            "data.shared_tables.u: already in table t.*'b'",
        ),
        (DataConfig, {"categorical": ("a",), "max_rows": 0}, "data.max_rows must be above 0"),
        (EmbeddingConfig, {"dim": 32, "chunk": 5}, "embedding: dim must be a multiple of chunk"),
        (EmbeddingConfig, {"dim": 0}, "embedding: dim must be a multiple of chunk"),
        (EmbeddingConfig, {"chunk": 0}, "embedding: dim must be a multiple of chunk"),
        (EmbeddingConfig, {"chunk": -8}, "embedding: dim must be a multiple of chunk"),
        (EmbeddingConfig, {"dim": 65, "chunk": 1}, "embedding: more than 64 chunks per row"),
        (EmbeddingConfig, {"lr": 0.0}, "embedding.lr must be above 0"),
        (EmbeddingConfig, {"eps": -1e-9}, "embedding.eps must not be negative"),
        (EmbeddingConfig, {"betas": (0.9, 1.0)}, r"embedding.betas must be in \[0, 1\)"),
        (EmbeddingConfig, {"init_scale": -0.1}, "embedding: init scales must not be negative"),
        (EmbeddingConfig, {"restore_scale": -0.1}, "embedding: init scales must not be negative"),
        (PolicyConfig, {"alpha": 0.99}, "policy.alpha must be at least 1"),
        (PolicyConfig, {"decay": 0.0}, r"policy.decay must be in \(0, 1\]"),
        (PolicyConfig, {"decay": 1.01}, r"policy.decay must be in \(0, 1\]"),
        (PolicyConfig, {"interval": 0}, "policy: interval and first_round must be above 0"),
        (PolicyConfig, {"first_round": 0}, "policy: interval and first_round must be above 0"),
        (PolicyConfig, {"min_change": 1.0}, r"policy.min_change must be in \[0, 1\)"),
        (PolicyConfig, {"headroom": -0.1}, r"policy.headroom must be in \[0, 1\)"),
        (PolicyConfig, {"sketch_share": 0.0}, r"policy.sketch_share must be in \(0, 0.5\)"),
        (PolicyConfig, {"sketch_share": 0.5}, r"policy.sketch_share must be in \(0, 0.5\)"),
        (ModelConfig, {"bottom": (64, 0)}, "model: layer widths must be above 0"),
        (ModelConfig, {"top": (-1,)}, "model: layer widths must be above 0"),
        (ModelConfig, {"cross_layers": 0}, "model: cross_layers and cross_rank must be above 0"),
        (ModelConfig, {"cross_rank": 0}, "model: cross_layers and cross_rank must be above 0"),
        (TrainConfig, {"workers": 0}, "train: workers and threads must be above 0"),
        (TrainConfig, {"threads": 0}, "train: workers and threads must be above 0"),
        (TrainConfig, {"workers": 1025}, "train.workers: at most 1024"),
        (TrainConfig, {"workers": 4, "batch_size": 3}, "train.batch_size must give each worker a row"),
        (TrainConfig, {"epochs": 0}, "train.epochs must be above 0"),
        (TrainConfig, {"max_steps": 0}, "train.max_steps must be above 0"),
        (TrainConfig, {"eval_every": 0}, "train.eval_every must be above 0"),
        (TrainConfig, {"overlap": 2}, "train.overlap must be 0 or 1"),
        (TrainConfig, {"lr": -0.1}, "train.lr must be above 0"),
        (TrackingConfig, {"uri": "file:///tmp/mlruns"}, "tracking.uri: MLflow no longer takes file: stores"),
        (CheckpointConfig, {"every": 0}, "checkpoint.every must be above 0, or none"),
        (CheckpointConfig, {"incremental": -1}, "checkpoint.incremental must be in"),
        (CheckpointConfig, {"keep": 0}, "checkpoint.keep must be above 0"),
        (CheckpointConfig, {"restarts": -1}, "checkpoint.restarts must not be negative"),
        (CheckpointConfig, {"staging_bytes": 1000}, "checkpoint.staging_bytes: at least 1 MiB"),
        (TrackingConfig, {"log_every": 0}, "tracking.log_every must be above 0"),
        (Config, {"data": DataConfig(categorical=("a", "b")), "name": "../run"}, "name: letters, digits"),
        (Config, {"data": DataConfig(categorical=("a", "b")), "name": ""}, "name: letters, digits"),
        (
            Config,
            {"data": DataConfig(categorical=("a", "b"), time="day"), "train": TrainConfig(epochs=2)},
            "train.epochs: time-ordered data is read once",
        ),
        (Config, {"data": DataConfig(categorical=("a",))}, "model.kind: dlrm learns from pairs .* set model.kind to dcnv2"),
    ],
)
def test_group_refuses(group: Callable[..., Any], values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        group(**values)


@pytest.mark.parametrize(
    ("columns", "model"),
    [
        ({"categorical": ("a",)}, ModelConfig(kind="dcnv2")),
        ({"categorical": ("a",), "dense": ("d",)}, ModelConfig()),
        ({"cross": (("a", "b"), ("a", "c"))}, ModelConfig()),
    ],
)
def test_a_model_is_taken_where_its_embedding_can_learn(columns: dict[str, Any], model: ModelConfig) -> None:
    Config(data=DataConfig(**columns), model=model)


def test_refusal_shows_the_value() -> None:
    with pytest.raises(ConfigError, match=r"given: 0\.5"):
        PolicyConfig(alpha=0.5)


# --- features and tables


def test_features_come_as_categorical_then_multi_hot_then_crosses() -> None:
    data = DataConfig(categorical=("user", "item"), multi_hot=("tags",), cross=(("user", "item"),))
    assert data.features == ("user", "item", "tags", "user x item")


def test_features_without_a_shared_table_have_one_each() -> None:
    data = DataConfig(categorical=("user", "item"), multi_hot=("tags",))
    assert data.tables == ("user", "item", "tags")
    assert data.feature_tables == (0, 1, 2)


def test_features_of_a_shared_table_have_its_number() -> None:
    data = DataConfig(categorical=("user", "item"), multi_hot=("seen",), shared_tables={"items": ("item", "seen")})
    assert data.tables == ("user", "items")
    assert data.feature_tables == (0, 1, 1)


def test_cross_can_share_a_table() -> None:
    data = DataConfig(categorical=("a", "b"), cross=(("a", "b"), ("b", "a")), shared_tables={"pairs": ("a x b", "b x a")})
    assert data.feature_tables == (0, 1, 2, 2)


def test_cross_alone_is_enough_of_a_feature() -> None:
    assert DataConfig(cross=(("a", "b"),)).features == ("a x b",)


# --- files


def test_file_with_data_alone_gets_the_defaults(write: Write) -> None:
    assert load(write(MINIMAL)) == Config(data=DataConfig(categorical=("user", "item")))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read"):
        load(tmp_path / "absent.yaml")


def test_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path)


def test_file_that_is_no_yaml_is_named(write: Write) -> None:
    with pytest.raises(ConfigError, match=r"config\.yaml: not YAML"):
        load(write("data: [unclosed"))


def test_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00data")
    with pytest.raises(ConfigError, match=r"binary\.yaml: not YAML"):
        load(path)


def test_python_objects_in_a_file_are_refused(write: Write) -> None:
    with pytest.raises(ConfigError, match="not YAML"):
        load(write("data: !!python/object/apply:os.getcwd []"))


@pytest.mark.parametrize("content", ["", "- a\n- b\n", "just text", "7"])
def test_file_without_keys_is_refused(write: Write, content: str) -> None:
    with pytest.raises(ConfigError, match="a mapping of keys to values is wanted"):
        load(write(content))


def test_refusal_of_a_value_names_the_file(write: Write) -> None:
    with pytest.raises(ConfigError, match=r"config\.yaml: policy\.alpha must be at least 1"):
        load(write(MINIMAL | {"policy": {"alpha": 0.5}}))


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"name": "x"}, "data is missing"),
        (MINIMAL | {"trian": {}}, "unknown key trian; did you mean train?"),
        (MINIMAL | {"embedding": {"dims": 32}}, "unknown key embedding.dims; did you mean dim?"),
        (MINIMAL | {"policy": {"zzz": 1}}, "unknown key policy.zzz; known keys: alpha, "),
        (MINIMAL | {"train": 3}, "train: a group of keys is wanted, not 3"),
        (MINIMAL | {"train": None}, "train: a group of keys is wanted, not None"),
        (MINIMAL | {"train": {"workers": "two"}}, "train.workers: int wanted, not 'two'"),
        (MINIMAL | {"train": {"workers": 2.0}}, "train.workers: int wanted, not 2.0"),
        (MINIMAL | {"train": {"workers": True}}, "train.workers: int wanted, not True"),
        (MINIMAL | {"train": {"workers": None}}, "train.workers: int wanted, not None"),
        (MINIMAL | {"train": {"use_gpu": 1}}, "train.use_gpu: bool wanted, not 1"),
        (MINIMAL | {"train": {"max_steps": "many"}}, "train.max_steps: int wanted, not 'many'"),
        (MINIMAL | {"train": {"lr": "fast"}}, "train.lr: float wanted, not 'fast'"),
        (MINIMAL | {"train": {"lr": True}}, "train.lr: float wanted, not True"),
        (MINIMAL | {"train": {"lr": float("nan")}}, "train.lr: nan is not finite"),
        (MINIMAL | {"train": {"lr": float("inf")}}, "train.lr: inf is not finite"),
        (MINIMAL | {"train": {"lr": "inf"}}, "train.lr: float wanted, not 'inf'"),
        (MINIMAL | {"model": {"kind": "gbdt"}}, "model.kind: 'gbdt' is not one of dlrm, dcnv2"),
        (MINIMAL | {"model": {"top": 64}}, "model.top: a list is wanted, not 64"),
        (MINIMAL | {"model": {"top": [64, "wide"]}}, r"model.top\[1\]: int wanted, not 'wide'"),
        (MINIMAL | {"embedding": {"betas": [0.9]}}, "embedding.betas: 2 values are wanted"),
        (MINIMAL | {"budget": True}, "budget: a size, a share or none is wanted, not True"),
        (MINIMAL | {"budget": [1, 16]}, "budget: a size, a share or none is wanted"),
        (MINIMAL | {"budget": "plenty"}, "budget: cannot read 'plenty'"),
        ({"data": {"categorical": ["a"], "shared_tables": ["a"]}}, "data.shared_tables: a mapping is wanted"),
        ({"data": {"categorical": ["a"], "bins": {"age10": {"column": "age"}}}}, "data.bins.age10.width is missing"),
        ({"data": {"categorical": ["a"], "bins": {"age10": {"column": "age", "width": -1}}}}, "data.bins: width must be above 0"),
    ],
)
def test_file_refuses_naming_the_key(write: Write, tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(write(tree))


def test_exponent_without_a_point_is_a_number(write: Write) -> None:
    assert load(write("data: {categorical: [user, item]}\ntrain: {lr: 1e-3}")).train.lr == 1e-3


def test_whole_number_serves_as_a_float(write: Write) -> None:
    alpha = load(write(MINIMAL | {"policy": {"alpha": 4}})).policy.alpha
    assert alpha == 4.0
    assert isinstance(alpha, float)


def test_single_name_serves_as_a_list(write: Write) -> None:
    assert load(write({"model": {"kind": "dcnv2"}, "data": {"categorical": "user", "train": "a.parquet"}})).data.train == ("a.parquet",)


# --- overrides


def test_override_replaces_a_value(write: Write) -> None:
    assert load(write(MINIMAL | {"train": {"workers": 2}}), ["train.workers=4"]).train.workers == 4


def test_override_makes_a_group_that_the_file_lacks(write: Write) -> None:
    assert load(write(MINIMAL), ["policy.max_shard_bytes=1000"]).policy.max_shard_bytes == 1000


def test_last_override_holds(write: Write) -> None:
    assert load(write(MINIMAL), ["seed=1", "seed=2"]).seed == 2


def test_override_keeps_the_equals_signs_of_its_value(write: Write) -> None:
    assert load(write(MINIMAL), ["tracking.uri=sqlite:///a.db?mode=ro"]).tracking.uri == "sqlite:///a.db?mode=ro"


def test_override_takes_lists_and_null(write: Write) -> None:
    config = load(write(MINIMAL | {"train": {"max_steps": 9}}), ["model.top=[64, 32]", "train.max_steps=null"])
    assert config.model.top == (64, 32)
    assert config.train.max_steps is None


def test_override_of_the_budget_is_read_as_one(write: Write) -> None:
    assert load(write(MINIMAL), ["budget=64MiB"]).budget == Budget(bytes=64 * 2**20)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.workers", "override 'train.workers': write key=value"),
        ("=4", "override '=4': write key=value"),
        ("name.first=x", "override name.first: name is a value, not a group of keys"),
        ("model.top=[64", r"override model.top: the value is not YAML: .* at line 1, column 4"),
        ("train.wrokers=4", "unknown key train.wrokers; did you mean workers?"),
        ("train.workers=0", "train: workers and threads must be above 0"),
    ],
)
def test_override_refuses(write: Write, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(write(MINIMAL | {"name": "run"}), [override])


# --- passwords


@pytest.mark.parametrize(
    "override", ["tracking.uri=http://user:s3cret@[host", "tracking.uri=[http://user:s3cret@host", "tracking.uri http://u:s3cret@h"]
)
def test_a_refused_override_does_not_repeat_a_password(write: Write, override: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load(write(MINIMAL), [override, "seed=x"])
    assert "s3cret" not in "".join(traceback.format_exception(raised.value))


@pytest.mark.parametrize(
    "text", ["tracking: {uri: [http://user:s3cret@host]}", "tracking:\n  uri: http://user:s3: cret@host\n", "a: [s3cret@"]
)
def test_a_refused_file_does_not_repeat_a_password(write: Write, text: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load(write(f"data: {{categorical: [a, b]}}\n{text}"))
    assert "s3" not in "".join(traceback.format_exception(raised.value))


def test_a_configuration_is_shown_and_saved_without_its_password() -> None:
    config = Config(data=DataConfig(categorical=("a", "b")), tracking=TrackingConfig(uri="http://user:s3cret#1@host"))
    for shown in (config.to_yaml(), repr(config), repr(config.flat())):
        assert "s3cret" not in shown
    assert config.flat()["tracking.uri"] == "http://***@host"


# --- round trip


def full_config() -> Config:
    """No field has its default, so that none can get lost unseen."""
    return Config(
        data=DataConfig(
            train=("a.parquet", "b/*.parquet"),
            test=("c.parquet",),
            label="click",
            dense=("price", "naïve"),
            dense_transform="log1p",
            categorical=("user", "item"),
            multi_hot=("seen",),
            weights={"seen": "seen_seconds"},
            cross=(("user", "age10"),),
            bins={"age10": Bin("age", 10.0)},
            shared_tables={"items": ("item", "seen")},
            time="day",
            max_rows=1000,
            reader="ray",
            bad_rows="skip",
        ),
        name="all-set",
        seed=7,
        method="frequency",
        budget=Budget(bytes=64 * 2**20),
        output="elsewhere",
        embedding=EmbeddingConfig(64, 16, "sum", "adam", 0.1, 1e-8, (0.8, 0.99), "bfloat16", 0.02, 0.001, {"user": 9}, {"user": 3}, 5),
        policy=PolicyConfig(5.0, "norm", 1.5, 0.99, 50, 5, 0.02, 0.1, 0.03, 10**9),
        model=ModelConfig("dcnv2", (32,), (16,), 2, 8, "bfloat16"),
        train=TrainConfig((1, 3), 2, True, 512, 1, 100, "sgd", 0.01, 10, True, 1, True, "skip", 5.0, 50.0, 7.0, 8.0),
        checkpoint=CheckpointConfig(7, 3, 4, "always", 5, 2**21),
        tracking=TrackingConfig("sqlite:///other.db", "other", 5, 0.0, False, 9.0),
    )


def test_full_configuration_differs_from_the_default_everywhere() -> None:
    plain, full = Config(data=DataConfig(categorical=("a", "b"))).flat(), full_config().flat()
    kept = {key for key in plain if full.get(key) == plain[key]}
    assert kept == {"train.epochs"}  # data in time order is read once


def test_saved_configuration_loads_as_the_same(write: Write) -> None:
    assert load(write(full_config().to_yaml())) == full_config()


@given(st.fractions(min_value=1 / 4096, max_value=2), st.floats(min_value=1, max_value=64), st.lists(st.integers(1, 512), max_size=4))
def test_dictionary_form_holds_plain_values_that_load(
    tmp_path_factory: pytest.TempPathFactory, share: Any, alpha: float, top: list[int]
) -> None:
    config = dataclasses.replace(
        full_config(),
        budget=Budget.parse(f"{share.numerator}/{share.denominator}"),
        policy=PolicyConfig(alpha=alpha),
        model=ModelConfig(top=tuple(top)),
    )
    path = tmp_path_factory.getbasetemp() / "property.yaml"
    path.write_text(yaml.safe_dump(config.to_dict()))
    loaded = load(path)
    assert loaded.budget.share == pytest.approx(config.budget.share, rel=1e-9)
    assert dataclasses.replace(loaded, budget=config.budget) == config


def test_flat_form_names_every_leaf_by_its_path() -> None:
    flat = full_config().flat()
    assert flat["embedding.dim"] == "64"
    assert flat["budget"] == "67108864"
    assert flat["data.bins.age10.column"] == "age"


def test_configuration_cannot_be_changed_in_place() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        full_config().seed = 1  # type: ignore[misc]
