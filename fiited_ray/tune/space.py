"""What a sweep varies, as a person writes it: `25%,6.25%`, `1.5,2,4` or `0.999..0.99999`; and the settings that make a trial of it."""

from __future__ import annotations

import itertools
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from fiited_ray.config import Budget, Config, ConfigError

METHODS: tuple[str, ...] = typing.get_args(typing.get_type_hints(Config)["method"])
METHOD, BUDGET = "method", "budget"  # the keys that options of their own set
FULL = "full"  # the baseline: every id at full width, without a budget
Settings = dict[str, Any]  # dotted configuration keys -> plain values
_LOG_FROM = 10.0  # a range whose ends are further apart than this factor is searched by its logarithm


@dataclass(frozen=True)
class Choices:
    """Values to take as they are."""

    values: tuple[Any, ...]

    def holds(self, setting: Any) -> bool:
        return setting in self.values


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included."""

    low: float
    high: float
    whole: bool  # integers only
    percent: bool = False  # shares, which settings hold as text such as `6.25%`

    @property
    def log(self) -> bool:
        return self.low > 0 and self.high / self.low >= _LOG_FROM

    def setting(self, number: float) -> Any:
        """The number as a configuration takes it."""
        return percent(number) if self.percent else number

    def number(self, setting: Any) -> Any:
        """What `setting` makes this setting of."""
        return Budget.parse(setting).share if self.percent else setting

    def holds(self, setting: Any) -> bool:
        number = self.number(setting)
        return isinstance(number, int | float) and self.low <= number <= self.high


def parse(key: str, text: str) -> Choices | Range:
    """Read what one key may be: a list of YAML values with commas between, or two numbers with `..` between.

    Raises:
        ConfigError: naming the key.
    """
    low, dots, high = text.partition("..")
    if dots:
        return _parse_range(key, low, high)
    try:
        values = yaml.safe_load(f"[{text}]")
    except yaml.YAMLError:
        values = []
    if not values:
        raise ConfigError(f"{key}: cannot read {text!r}; write values with commas between (1.5,2,4), or a range (0.999..0.99999)")
    return Choices(tuple(values))


def parse_budgets(text: str) -> Choices | Range:
    """Read budgets: `25%,6.25%,8MiB`, or a range of shares `0.5%..50%`.

    Raises:
        ConfigError: for what is not a budget, or a range of bytes.
    """
    low, dots, high = text.partition("..")
    if dots:
        ends = [Budget.parse(low).share, Budget.parse(high).share]
        if ends[0] is None or ends[1] is None or not ends[0] < ends[1]:
            raise ConfigError(f"budgets: a range goes from a smaller to a larger share, such as 0.5%..50%, not {text!r}")
        return Range(ends[0], ends[1], whole=False, percent=True)
    budgets = [Budget.parse(each) for each in text.split(",")]
    return Choices(tuple(map(str, budgets)))


def parse_vary(texts: Sequence[str]) -> dict[str, Choices | Range]:
    """Read `key=values` for each key to vary."""
    varied: dict[str, Choices | Range] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"vary {text!r}: write key=values, such as policy.alpha=1.5,2,4 or policy.decay=0.999..0.99999")
        if key in (BUDGET, METHOD, "name", "output") or key.startswith("tracking"):
            raise ConfigError(f"vary {key}: budgets and methods have options of their own, and a run's name and place are not searched")
        varied[key] = parse(key, values)
    return varied


def _parse_range(key: str, low: str, high: str) -> Range:
    try:
        ends = float(low), float(high)
    except ValueError:
        raise ConfigError(f"{key}: {low!r}..{high!r} is not a range of numbers") from None
    if not ends[0] < ends[1]:
        raise ConfigError(f"{key}: a range goes from the smaller to the larger number, not {low}..{high}")
    whole = all(text.strip().lstrip("-").isdigit() for text in (low, high))
    return Range(*ends, whole=whole)


def percent(share: float) -> str:
    """A share as a budget's text, to four significant digits: `6.25%`."""
    return f"{share * 100:.4g}%"


def settings_of(method: str, budget: str) -> Settings:
    """The settings that choose a method at a budget; the baseline has none."""
    return {METHOD: method, BUDGET: "none" if method == FULL else budget}


def grid(methods: Sequence[str], budgets: Choices, varied: Mapping[str, Choices]) -> Iterator[Settings]:
    """Every method at every budget with every combination of the varied keys; the baseline, which has no budget, once for each."""
    keys = list(varied)
    for method in methods:
        for budget in budgets.values[:1] if method == FULL else budgets.values:
            for values in itertools.product(*(varied[key].values for key in keys)):
                yield settings_of(method, budget) | dict(zip(keys, values, strict=True))


def label(settings: Mapping[str, Any]) -> str:
    """A trial's name: `fiited 6.25%`, `fiited 6.25% alpha=4`, `full`."""
    method = str(settings[METHOD])
    words = [method] if method == FULL else [method, budget_label(str(settings[BUDGET]))]
    words += [f"{key.rpartition('.')[2]}={_short(value)}" for key, value in settings.items() if key not in (METHOD, BUDGET)]
    return " ".join(words)


def budget_label(budget: str) -> str:
    """A budget as a person reads it: bytes in MiB."""
    return f"{int(budget) / 2**20:.4g}MiB" if budget.isdigit() else budget


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_short, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
