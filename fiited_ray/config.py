"""Configuration: frozen dataclasses, checked when they are made, read from YAML plus `key=value` overrides.

Every field is documented where it stands. `load` names the file and the key of whatever it refuses; the resolved
configuration of a run is written back with `Config.to_yaml`, and `load` takes that file as it is.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import yaml

from fiited_ray.credentials import mask_addresses, redact

_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


_DERIVED = {"derived": True}  # metadata of a field that is no key: it follows from others


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key and says what to do."""


def _require(holds: bool, message: str, value: object) -> None:
    if not holds:
        raise ConfigError(f"{message} (given: {value!r})")


@dataclass(frozen=True)
class Budget:
    """The memory budget of all shards together: bytes, a share of the dense-equivalent bytes, or none at all.

    Exactly one of the two fields is set, or neither ("none": rows are never pruned).
    """

    bytes: int | None = None
    share: float | None = None

    @staticmethod
    def parse(text: str | int | float) -> Budget:
        """Read `67108864`, `64MiB`, `6.25%`, `1/16` or `none`.

        Raises:
            ConfigError: when the text is none of these, or not positive.
        """
        raw = str(text).strip().lower()
        if raw == "none":
            return Budget()
        if match := re.fullmatch(r"([0-9]*\.?[0-9]+)\s*%", raw):
            return Budget(share=_positive_share(float(match[1]) / 100, text))
        if match := re.fullmatch(r"([0-9]+)\s*/\s*([0-9]+)", raw):
            if int(match[2]) == 0:
                raise ConfigError(f"budget: {text!r} divides by zero")
            return Budget(share=_positive_share(float(Fraction(int(match[1]), int(match[2]))), text))
        if match := re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([kmgt]?i?b)?", raw):
            size = float(match[1]) * _UNITS[match[2] or "b"]
            if size >= 1 and size == int(size):
                return Budget(bytes=int(size))
        raise ConfigError(
            f"budget: cannot read {text!r}; write bytes (67108864, 64MiB), a share of the dense-equivalent bytes (1/16, 6.25%) or none"
        )

    def __str__(self) -> str:
        if self.bytes is not None:
            return str(self.bytes)
        return "none" if self.share is None else f"{self.share * 100:.10g}%"


def _positive_share(share: float, text: object) -> float:
    if not share > 0:
        raise ConfigError(f"budget: {text!r} is not above zero")
    return share


@dataclass(frozen=True)
class Bin:
    """A derived integer column: floor(column / width). Usable wherever a categorical column is."""

    column: str
    width: float

    def __post_init__(self) -> None:
        _require(math.isfinite(self.width) and self.width > 0, "data.bins: width must be above 0", self.width)


@dataclass(frozen=True)
class DataConfig:
    """What the columns of the Parquet files mean. Feature order: categorical, multi_hot, cross."""

    train: tuple[str, ...] = ()  # files, folders or glob patterns
    test: tuple[str, ...] = ()
    label: str = "label"  # 0 or 1
    dense: tuple[str, ...] = ()
    dense_transform: Literal["none", "log1p"] = "none"  # log1p: log(1 + max(x, 0))
    categorical: tuple[str, ...] = ()  # one id per row: integers or strings; null is an id of its own
    multi_hot: tuple[str, ...] = ()  # a list of ids per row; null and [] are an empty bag
    weights: dict[str, str] = field(default_factory=dict)  # multi_hot column -> column of as many numbers per row, one for each id
    cross: tuple[tuple[str, ...], ...] = ()  # each entry: columns (categorical or binned) joined into one id
    bins: dict[str, Bin] = field(default_factory=dict)
    shared_tables: dict[str, tuple[str, ...]] = field(default_factory=dict)  # table name -> features that share it
    time: str | None = None  # rows are read in this column's order
    max_rows: int | None = None  # read no more training rows than this
    reader: Literal["arrow", "ray"] = "arrow"  # arrow: each worker reads the files itself; ray: through Ray Data, which can also sort
    # a label that is not 0 or 1, a dense value, weight or binned number that is not finite, the id that stands for null: the run ends
    # with an error that names the row; or the row is left out, counted as data/skipped_rows, and named in the log
    bad_rows: Literal["error", "skip"] = "error"
    seed: int = field(default=0, metadata=_DERIVED)  # keys the hash of strings and crosses; Config sets it to the run's

    def __post_init__(self) -> None:
        names = [*self.dense, *self.categorical, *self.multi_hot, self.label]
        twice = sorted({name for name in names if names.count(name) > 1})
        _require(not twice, "data: columns named twice", twice)
        _require(bool(self.categorical or self.multi_hot or self.cross), "data: no categorical, multi_hot or cross column named", ())
        for feature, column in self.weights.items():
            _require(feature in self.multi_hot, f"data.weights.{feature}: not a multi_hot column; those are", self.multi_hot)
            _require(column not in names, f"data.weights.{feature}: the column is used as something else already", column)
        for cross in self.cross:
            _require(len(cross) >= 2, "data.cross: an entry needs two columns or more", cross)
            lists = sorted(set(cross) & set(self.multi_hot))
            _require(not lists, "data.cross: multi_hot columns cannot be crossed", lists)
        features = self.features
        owners: dict[str, str] = {}
        for table, members in self.shared_tables.items():
            for member in members:
                _require(member in features, f"data.shared_tables.{table}: no such feature", member)
                _require(member not in owners, f"data.shared_tables.{table}: already in table {owners.get(member)}", member)
                owners[member] = table
        _require(self.max_rows is None or self.max_rows > 0, "data.max_rows must be above 0", self.max_rows)

    @property
    def features(self) -> tuple[str, ...]:
        """Feature names in model order; a cross of a and b is called `a x b`."""
        return (*self.categorical, *self.multi_hot, *(" x ".join(cross) for cross in self.cross))

    @property
    def scalar(self) -> tuple[str, ...]:
        """Names with one id per row: categorical, or part of a cross; columns of the files or bins."""
        return tuple(dict.fromkeys([*self.categorical, *(name for cross in self.cross for name in cross)]))

    @property
    def id_columns(self) -> list[str]:
        """Columns of the files that hold ids, or lists of them, each once."""
        return [*(name for name in self.scalar if name not in self.bins), *self.multi_hot]

    @property
    def columns(self) -> list[str]:
        """Columns to read from the files, each once."""
        sources = [self.bins[name].column if name in self.bins else name for name in self.scalar]
        lists = [*self.multi_hot, *self.weights.values()]
        return list(dict.fromkeys([self.label, *self.dense, *sources, *lists, *([self.time] if self.time else [])]))

    @property
    def tables(self) -> tuple[str, ...]:
        """Distinct table names, in the order of their first feature."""
        return tuple(dict.fromkeys(self._table_of(feature) for feature in self.features))

    @property
    def feature_tables(self) -> tuple[int, ...]:
        """Table number of each feature."""
        numbers = {table: number for number, table in enumerate(self.tables)}
        return tuple(numbers[self._table_of(feature)] for feature in self.features)

    def _table_of(self, feature: str) -> str:
        return next((table for table, members in self.shared_tables.items() if feature in members), feature)


@dataclass(frozen=True)
class EmbeddingConfig:
    """The store: what a row is and how it learns."""

    dim: int = 32
    chunk: int = 8  # consecutive dimensions kept or dropped together; chunk = dim prunes whole rows
    # of multi-hot bags; with data.weights: sum of weight * vector, for mean divided by the number of ids (not by the sum of weights)
    pooling: Literal["sum", "mean"] = "mean"
    optimizer: Literal["sgd", "adagrad", "rowwise_adagrad", "adam"] = "rowwise_adagrad"
    lr: float = 0.05
    eps: float = 1e-10  # torch.optim.Adagrad's default; Adam's usual value is 1e-8
    betas: tuple[float, float] = (0.9, 0.999)  # Adam
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the stored vectors; arithmetic is float32
    init_scale: float = 0.01  # a new row is uniform in +-init_scale, from a hash of (seed, key, dimension)
    restore_scale: float = 0.0  # the same for a chunk that an existing row wins back
    # what the budget leaves the methods that fix their rows beforehand; null: found by a pass over the training data
    rows: dict[str, int] | None = None  # hash: rows of each table that has fewer than ids; qr: rows of its quotients
    remainders: dict[str, int] | None = None  # qr: rows of the same tables' remainders
    kept_dim: int | None = None  # uniform: dimensions of every row

    def __post_init__(self) -> None:
        _require(
            self.chunk > 0 and self.dim > 0 and self.dim % self.chunk == 0,
            "embedding: dim must be a multiple of chunk",
            (self.dim, self.chunk),
        )
        _require(self.dim // self.chunk <= 64, "embedding: more than 64 chunks per row; take a larger chunk", self.dim // self.chunk)
        _require(self.lr > 0, "embedding.lr must be above 0", self.lr)
        _require(self.eps >= 0, "embedding.eps must not be negative", self.eps)
        _require(all(0 <= beta < 1 for beta in self.betas), "embedding.betas must be in [0, 1)", self.betas)
        for key, counts in (("rows", self.rows), ("remainders", self.remainders)):
            _require(all(count > 0 for count in (counts or {}).values()), f"embedding.{key} must be above 0", counts)
        _require(self.kept_dim is None or 0 < self.kept_dim <= self.dim, "embedding.kept_dim must be from 1 to dim", self.kept_dim)
        _require(self.init_scale >= 0 and self.restore_scale >= 0, "embedding: init scales must not be negative", self.init_scale)


@dataclass(frozen=True)
class PolicyConfig:
    """Which rows and chunks are worth their bytes, and when that is decided anew."""

    alpha: float = 2.0  # chunk j of a row with importance s has utility s / alpha**j
    importance: Literal["frequency_x_norm", "norm", "lookup_norm_sum", "frequency"] = "frequency_x_norm"
    admission: float = 1.4  # an id without a row must beat the threshold by this factor to get one
    decay: float = 0.9999  # of the importance, per step
    interval: int = 100  # steps between rounds, once the early ones are over
    first_round: int = 10  # the first round's step; the gap then doubles until it reaches `interval`
    min_change: float = 0.01  # a round that would move a smaller share of the budget is skipped
    headroom: float = 0.02  # most of the budget a round leaves free for the rows that ask to be let in before the next one
    sketch_share: float = 0.04  # share of the budget given to the importance of absent ids
    max_shard_bytes: int | None = None  # a worker's own memory; the budget binds all of them together

    def __post_init__(self) -> None:
        _require(self.alpha >= 1, "policy.alpha must be at least 1", self.alpha)
        _require(self.admission >= 1, "policy.admission must be at least 1", self.admission)
        _require(0 < self.decay <= 1, "policy.decay must be in (0, 1]", self.decay)
        _require(self.interval > 0 and self.first_round > 0, "policy: interval and first_round must be above 0", self.interval)
        _require(0 <= self.min_change < 1, "policy.min_change must be in [0, 1)", self.min_change)
        _require(0 <= self.headroom < 1, "policy.headroom must be in [0, 1)", self.headroom)
        _require(0 < self.sketch_share < 0.5, "policy.sketch_share must be in (0, 0.5)", self.sketch_share)


@dataclass(frozen=True)
class ModelConfig:
    """The dense part. It sees dense [B, C] and vectors [B, F, D] and gives logits [B]."""

    kind: Literal["dlrm", "dcnv2"] = "dlrm"
    bottom: tuple[int, ...] = (256, 64)  # DLRM: hidden widths of the dense tower; its last layer, of width dim, is added
    top: tuple[int, ...] = (256, 128)  # hidden widths of the tower that gives the logit
    cross_layers: int = 3  # DCN-v2
    cross_rank: int = 64  # DCN-v2: rank of each cross layer's weight
    # of matrix products while training; parameters, their gradients and optimizer, losses and all scoring are float32
    precision: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        _require(all(width > 0 for width in (*self.bottom, *self.top)), "model: layer widths must be above 0", (self.bottom, self.top))
        _require(self.cross_layers > 0 and self.cross_rank > 0, "model: cross_layers and cross_rank must be above 0", self.cross_layers)


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    workers: int | tuple[int, int] = 2  # or [fewest, most]: as many as the cluster has room for; the run goes on with fewer or more
    threads: int = 1  # per worker
    use_gpu: bool = False  # each worker has a GPU, which holds its part of the store and of the model
    batch_size: int = 4096  # rows of one step, over all workers
    epochs: int = 1
    max_steps: int | None = None
    optimizer: Literal["adam", "adagrad", "sgd"] = "adam"  # of the dense parameters
    lr: float = 0.001
    eval_every: int | None = None  # steps; the test set is always scored at the end
    progressive: bool = False  # score each batch before learning from it
    overlap: int = 0  # 1: check and route the next batch in a thread while this one is in the model; results are the same
    debug: bool = False  # check every invariant of the store after each step, naming the row that breaks one: slow
    # a loss or gradient that is not finite: the run ends before a row learns from it; or the step, or the bag, is skipped and counted
    not_finite: Literal["error", "skip"] = "error"
    stall_seconds: float = 60.0  # when no step ends for so long, every worker writes its stacks to OUTPUT/NAME/logs
    timeout_seconds: float = 600.0  # when none ends for so long, the worker gives up, and with it the attempt
    grace_seconds: float = 60.0  # a run that is told to end (SIGTERM) saves and ends within this time
    resize_seconds: float = 60.0  # with [fewest, most] workers: how often it is looked whether there is room for more

    def __post_init__(self) -> None:
        pair = isinstance(self.workers, tuple)
        _require(not pair or self.fewest_workers <= self.most_workers, "train.workers: write [fewest, most]", self.workers)
        _require(self.fewest_workers > 0 and self.threads > 0, "train: workers and threads must be above 0", (self.workers, self.threads))
        _require(self.overlap in (0, 1), "train.overlap must be 0 or 1", self.overlap)
        _require(self.most_workers <= 1024, "train.workers: at most 1024, one for each virtual bucket", self.workers)
        _require(self.batch_size >= self.most_workers, "train.batch_size must give each worker a row", self.batch_size)
        _require(self.epochs > 0, "train.epochs must be above 0", self.epochs)
        _require(self.max_steps is None or self.max_steps > 0, "train.max_steps must be above 0", self.max_steps)
        _require(self.eval_every is None or self.eval_every > 0, "train.eval_every must be above 0", self.eval_every)
        _require(self.lr > 0, "train.lr must be above 0", self.lr)
        _require(
            0 < self.stall_seconds < self.timeout_seconds,
            "train.stall_seconds must be above 0 and below train.timeout_seconds",
            (self.stall_seconds, self.timeout_seconds),
        )
        _require(
            self.grace_seconds > 0 and self.resize_seconds > 0,
            "train: grace_seconds and resize_seconds must be above 0",
            (self.grace_seconds, self.resize_seconds),
        )

    @property
    def most_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def fewest_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[0]


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints, from which a run goes on after a failure or when it is submitted again."""

    every: int | None = 1000  # steps; none: only the finished model is saved
    incremental: int = 0  # between two whole checkpoints, so many hold only the rows that changed since the one before
    keep: int = 2  # newest checkpoints that can be resumed from; what they build on is kept, too
    # auto: an unfinished run of this output and name goes on, a finished one starts anew; always: a finished one goes on, too; never
    resume: Literal["auto", "always", "never"] = "auto"
    restarts: int = 3  # times that workers which failed are started again, from the last checkpoint
    staging_bytes: int = 256 * 2**20  # of each worker: copies of rows on their way to the disk; training waits when they are full

    def __post_init__(self) -> None:
        _require(self.every is None or self.every > 0, "checkpoint.every must be above 0, or none", self.every)
        _require(0 <= self.incremental < 1000, "checkpoint.incremental must be in [0, 1000)", self.incremental)
        _require(self.keep > 0, "checkpoint.keep must be above 0", self.keep)
        _require(self.restarts >= 0, "checkpoint.restarts must not be negative", self.restarts)
        _require(self.staging_bytes >= 2**20, "checkpoint.staging_bytes: at least 1 MiB", self.staging_bytes)


@dataclass(frozen=True)
class TrackingConfig:
    """Where the run is written."""

    # a server's http(s) address on a cluster; user and password may stand in MLFLOW_TRACKING_USERNAME and _PASSWORD instead
    uri: str = field(default="sqlite:///mlflow.db", repr=False)
    experiment: str = "fiited-ray"
    log_every: int = 10  # steps
    system_every: float = 10.0  # seconds between samples of the first worker's machine (CPU, memory, disk, network, GPU); 0: none
    log_model: bool = True  # put the trained model among MLflow's, ready for its registry; it then lies there a second time
    patience_seconds: float = 300.0  # training never waits for the store; a finished run waits so long for one that is away

    def __post_init__(self) -> None:
        _require(
            not self.uri.startswith("file:"),
            "tracking.uri: MLflow no longer takes file: stores; use sqlite:///PATH or a server",
            redact(self.uri),
        )
        _require(self.log_every > 0, "tracking.log_every must be above 0", self.log_every)
        _require(self.system_every >= 0, "tracking.system_every must not be negative", self.system_every)
        _require(self.patience_seconds >= 0, "tracking.patience_seconds must not be negative", self.patience_seconds)


@dataclass(frozen=True)
class Config:
    """A whole run."""

    data: DataConfig
    name: str = "run"
    seed: int = 0
    # what the budget is spent on: `fiited` widths by chunk; `adaembed` whole rows by frequency x gradient norm; `frequency` whole rows by
    # number of lookups (neither heeds embedding.chunk or policy.importance); `hash` rows shared by ids modulo their number; `qr` products
    # of a quotient's and a remainder's row; `uniform` one smaller dimension for all rows; `full` every id at full width, no budget
    method: Literal["fiited", "adaembed", "frequency", "hash", "qr", "uniform", "full"] = "fiited"
    budget: Budget = Budget(share=1 / 16)
    output: str = "runs"  # checkpoints and the model go to OUTPUT/NAME; a folder, or an address such as s3://bucket/runs
    embedding: EmbeddingConfig = EmbeddingConfig()
    policy: PolicyConfig = PolicyConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", dataclasses.replace(self.data, seed=self.seed))
        _require(
            re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", self.name) is not None,
            "name: letters, digits, '.', '_' and '-' only, not '.' first",
            self.name,
        )
        _require(self.data.time is None or self.train.epochs == 1, "train.epochs: time-ordered data is read once", self.train.epochs)
        for key, counts in (("rows", self.embedding.rows), ("remainders", self.embedding.remainders)):
            unknown = sorted(set(counts or {}) - set(self.data.tables))
            _require(not unknown, f"embedding.{key}: no such table; those are {', '.join(self.data.tables)}", unknown)
        _require(
            self.model.kind != "dlrm" or len(self.data.features) > 1 or bool(self.data.dense),
            "model.kind: dlrm learns from pairs of vectors, and one feature without dense columns makes none; "
            "name another feature or a dense column, or set model.kind to dcnv2",
            self.data.features,
        )

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, as YAML holds them; the tracking store's address without its password."""
        tree: dict[str, Any] = _plain(self)
        tree["tracking"]["uri"] = redact(self.tracking.uri)
        return tree

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def flat(self) -> dict[str, str]:
        """`{"embedding.dim": "32", ...}`, as run parameters want them."""
        return dict(_flatten("", self.to_dict()))

    def with_settings(self, settings: typing.Mapping[str, Any]) -> Config:
        """This configuration with plain values under dotted keys, such as `{"budget": "1/16", "policy.alpha": 4}`.

        Raises:
            ConfigError: naming the key, as `load` does.
        """
        tree = _plain(self)
        for key, value in settings.items():
            _set(tree, key, value)
        return typing.cast(Config, _build(Config, tree, ""))


def load(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Read a YAML file and apply `key=value` overrides such as `train.workers=4` (the value is read as YAML).

    Raises:
        ConfigError: naming the file or override and the key, for anything unknown, of a wrong type or out of range.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {_without_text(error)}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a mapping of keys to values is wanted")
    for override in overrides:
        _override(tree, override)
    try:
        return typing.cast(Config, _build(Config, tree, ""))
    except ConfigError as error:
        raise ConfigError(mask_addresses(f"{path}: {error}")) from None


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {redact(override)!r}: write key=value, such as train.workers=4")
    try:
        _set(tree, key, yaml.safe_load(value))
    except yaml.YAMLError as error:
        raise ConfigError(f"override {key}: the value is not YAML: {_without_text(error)}") from None


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {key}: {parent} is a value, not a group of keys")
    node[leaf] = value


def _without_text(error: Exception) -> str:
    """What is wrong with a YAML text and where, without the text itself, in which a password may stand."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return type(error).__name__
    return f"{error.problem} at line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"


def _build(kind: Any, value: Any, key: str) -> Any:
    """Turn a YAML value into `kind`, naming `key` in whatever goes wrong."""
    where = key or "config"
    if kind is Budget:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ConfigError(f"{where}: a size, a share or none is wanted, not {value!r}")
        return Budget.parse(value)
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, key)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        choices = [arg for arg in args if arg is not type(None)]
        listed = [arg for arg in choices if typing.get_origin(arg) is tuple] if isinstance(value, list | tuple) else []
        return _build((listed or choices)[0], value, key)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{where}: {value!r} is not one of {', '.join(map(str, args))}")
        return value
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: a mapping is wanted, not {value!r}")
        return {str(name): _build(args[1], item, f"{key}.{name}") for name, item in value.items()}
    if origin is tuple:
        if isinstance(value, str) and args[0] is str:
            value = [value]
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where}: a list is wanted, not {value!r}")
        if args[-1] is not Ellipsis and len(value) != len(args):
            raise ConfigError(f"{where}: {len(args)} values are wanted, not {value!r}")
        return tuple(_build(args[0], item, f"{key}[{number}]") for number, item in enumerate(value))
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ConfigError(f"{where}: {value!r} is not finite")
        return float(value)
    if type(value) is not kind:
        if kind is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
            try:
                return _build(float, float(value), key)
            except ValueError:
                pass
        raise ConfigError(f"{where}: {kind.__name__} wanted, not {value!r}")
    return value


def _build_dataclass(kind: Any, value: Any, key: str) -> Any:
    if not isinstance(value, dict):
        raise ConfigError(f"{key or 'config'}: a group of keys is wanted, not {value!r}")
    derived = {each.name for each in dataclasses.fields(kind) if each.metadata == _DERIVED}
    hints = {name: hint for name, hint in typing.get_type_hints(kind).items() if name not in derived}
    for name in value:
        if name not in hints:
            close = difflib.get_close_matches(str(name), hints, 1)
            hint = f"; did you mean {close[0]}?" if close else f"; known keys: {', '.join(hints)}"
            raise ConfigError(f"unknown key {f'{key}.{name}'.lstrip('.')}{hint}")
    for each in dataclasses.fields(kind):
        if each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING and each.name not in value:
            raise ConfigError(f"{f'{key}.{each.name}'.lstrip('.')} is missing")
    return kind(**{name: _build(hints[name], item, f"{key}.{name}".lstrip(".")) for name, item in value.items()})


def _plain(value: Any) -> Any:
    if isinstance(value, Budget):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: _plain(getattr(value, each.name)) for each in dataclasses.fields(value) if each.metadata != _DERIVED}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return value


def _flatten(prefix: str, value: Any) -> typing.Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _flatten(f"{prefix}.{name}".lstrip("."), item)
    else:
        yield prefix, str(value)
