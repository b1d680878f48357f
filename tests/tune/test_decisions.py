"""What a sweep decides without training anything: what to try, what to stop, what to answer."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiited_ray.config import Config, ConfigError, DataConfig
from fiited_ray.tune.answer import BYTES, DENSE, KEPT, Reference, answer, table
from fiited_ray.tune.bisection import BudgetBisection, ladder, next_step
from fiited_ray.tune.measure import Measure
from fiited_ray.tune.pareto import front, page, picture
from fiited_ray.tune.records import Folder, Trial, trial_digest
from fiited_ray.tune.scheduler import octave_of
from fiited_ray.tune.search import QualityAndBytes, covers
from fiited_ray.tune.seeds import over_seeds
from fiited_ray.tune.space import Choices, Range, grid, label, parse_budgets, parse_vary, settings_of
from fiited_ray.tune.sweep import best_config

AUC = Measure("auc", "eval", 0.01)
NE = Measure("ne", "eval", 0.01)


def trial(method: str, budget: str, auc: float, mib: float, state: Any = "finished") -> Trial:
    values = {"eval/auc": auc, "eval/ne": 1 - auc, BYTES: mib * 2**20, DENSE: 2.0**30, KEPT: mib / 1024}
    return Trial(settings_of(method, budget), state, values)


TRIALS = [
    trial("full", "", 0.80, 1024),
    trial("fiited", "50%", 0.799, 500),
    trial("fiited", "25%", 0.795, 250),
    trial("fiited", "12.5%", 0.785, 125),
    trial("adaembed", "25%", 0.788, 240),
    trial("fiited", "6.25%", 0.799, 60, "stopped"),
]


@given(steps=st.integers(1, 500), data=st.data())
def test_bisection_finds_the_smallest_good_budget_in_as_few_trials_as_can_be(steps: int, data: st.DataObject) -> None:
    smallest = data.draw(st.integers(0, steps))  # `steps`: none but full width is good
    within: set[int] = set()
    outside: set[int] = set()
    while (step := next_step(steps, within, outside)) is not None:
        assert step not in within | outside
        (within if step >= smallest else outside).add(step)
    assert min(within, default=steps) == smallest
    assert len(within | outside) <= math.ceil(math.log2(steps + 1))


def test_the_ladder_goes_from_the_least_share_to_just_below_all_of_it() -> None:
    shares = ladder(0.1, 2.0)
    assert shares == pytest.approx([0.1, 0.125, 0.25, 0.5])


def test_a_budget_that_could_not_be_trained_counts_as_too_small_and_larger_ones_are_tried() -> None:
    searcher = BudgetBisection([settings_of("fiited", f"{at}%") for at in range(1, 8)], lambda result: True, "eval/auc", "max")
    assert searcher.suggest("a")["settings"]["budget"] == "4%"
    assert searcher.suggest("b") is None  # not before the first one has ended
    searcher.on_trial_complete("a", error=True)
    assert searcher.suggest("c")["settings"]["budget"] == "6%"
    searcher.on_trial_complete("c", {"eval/auc": 0.8})
    assert searcher.suggest("d")["settings"]["budget"] == "5%"
    searcher.on_trial_complete("d", {"eval/auc": 0.8})
    assert searcher.suggest("e") == "FINISHED"


def test_values_to_vary_are_read_as_yaml_and_ranges_by_two_dots() -> None:
    varied = parse_vary(["policy.alpha=1.5,2", "model.top=[8, 4],[16]", "policy.decay=0.9..0.99", "policy.interval=10..1000"])
    assert varied["policy.alpha"] == Choices((1.5, 2))
    assert varied["model.top"] == Choices(([8, 4], [16]))
    assert varied["policy.decay"] == Range(0.9, 0.99, whole=False)
    assert varied["policy.interval"] == Range(10, 1000, whole=True)
    assert [varied[key].log for key in ("policy.decay", "policy.interval")] == [False, True]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("policy.alpha", "write key=values"),
        ("policy.alpha=", "cannot read"),
        ("policy.alpha=3..2", "from the smaller to the larger"),
        ("policy.alpha=a..b", "not a range of numbers"),
        ("budget=1,2", "options of their own"),
        ("tracking.uri=a,b", "not searched"),
    ],
)
def test_values_that_cannot_be_varied_are_refused_by_their_key(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_vary([text])


def test_budgets_are_read_as_everywhere_else() -> None:
    assert parse_budgets("1/16,8MiB") == Choices(("6.25%", str(8 * 2**20)))
    assert parse_budgets("0.5%..50%") == Range(0.005, 0.5, whole=False, percent=True)
    with pytest.raises(ConfigError, match="from a smaller to a larger share"):
        parse_budgets("1MiB..2MiB")


def test_a_grid_trains_full_width_once_for_each_combination_and_names_each_trial() -> None:
    settings = list(grid(["full", "fiited"], Choices(("50%", str(2**20))), {"policy.alpha": Choices((2, 4))}))
    names = [label(each) for each in settings]
    assert names == ["full alpha=2", "full alpha=4", *(f"fiited {size} alpha={alpha}" for size in ("50%", "1MiB") for alpha in (2, 4))]


@given(st.lists(st.floats(0.006, 0.49), min_size=1, max_size=5))
def test_what_a_search_has_tried_before_it_suggests_again_to_the_letter_and_then_something_new(shares: list[float]) -> None:
    space = (["fiited", "hash"], parse_budgets("0.5%..50%"), parse_vary(["policy.alpha=1..8.5", "policy.interval=10..1000"]))
    first = QualityAndBytes(*space, AUC, seed=1)
    settings = [first.suggest(str(at))["settings"] for at in range(len(shares))]  # type: ignore[index]
    assert all(covers(*space, each) for each in settings)
    for seed in (2, 1):  # by what is known, not by the seed
        again = QualityAndBytes(*space, AUC, seed=seed, known=settings)
        assert [again.suggest(str(at))["settings"] for at in range(len(shares))] == settings  # type: ignore[index]
    assert again.suggest("new")["settings"] not in settings  # type: ignore[index]


def test_settings_outside_the_space_are_not_told_to_a_search() -> None:
    space = (["fiited"], parse_budgets("1%..50%"), parse_vary(["policy.alpha=2,4"]))
    inside = settings_of("fiited", "10%") | {"policy.alpha": 4}
    assert covers(*space, inside)
    assert not covers(*space, settings_of("fiited", "10%"))
    for key, value in (("method", "full"), ("budget", "60%"), ("budget", "8388608"), ("policy.alpha", 3)):
        assert not covers(*space, inside | {key: value})


def test_budgets_within_a_factor_of_two_are_like_and_bytes_are_not_like_shares() -> None:
    assert octave_of("7%") == octave_of("10%")
    assert octave_of("7%") != octave_of("20%")
    assert octave_of("none") is None
    assert octave_of("1") != octave_of("100%")


def test_the_answer_is_the_fewest_bytes_of_those_that_lose_no_more_than_allowed() -> None:
    reference = Reference.of(TRIALS, AUC)
    assert reference == Reference(0.80, "full width")
    found = answer(TRIALS, AUC, reference, " on synthetic data")
    assert found.best is TRIALS[2]
    assert found.sentence == (
        "fiited 25% (250.0 MiB, everything counted, 24.41% of full-width tables; AUC 0.7950) is the smallest within 0.01 AUC of full width "
        "(0.8000) on synthetic data; the next smaller one, fiited 12.5% (125.0 MiB), loses 0.0150."
    )


def test_normalised_entropy_may_rise_where_auc_may_fall() -> None:
    assert Reference.of(TRIALS, NE) == Reference(pytest.approx(0.2), "full width")
    assert answer(TRIALS, NE, Reference.of(TRIALS, NE)).best is TRIALS[2]
    assert NE.mode == "min"


def test_where_nothing_is_good_enough_the_answer_is_the_closest_and_says_so() -> None:
    found = answer(TRIALS, Measure("auc", "eval", 0.0001), Reference.of(TRIALS, AUC))
    assert found.best is TRIALS[1]
    assert found.sentence.startswith("No trial is within 0.0001 AUC of full width (0.8000); fiited 50%")
    assert answer(TRIALS[:1], AUC, Reference.of(TRIALS, AUC)).best is None


def test_without_full_width_the_best_trial_or_a_known_quality_is_the_reference() -> None:
    assert Reference.of(TRIALS[1:], AUC) == Reference(0.799, "the best trial")
    assert Reference.of(TRIALS[1:], AUC, 0.81) == Reference(0.81, "full width")
    assert Reference.of([], AUC) is None


def test_the_table_has_a_line_for_each_trial_with_its_state_and_marks_the_answer() -> None:
    failed = Trial(settings_of("fiited", "1%"), "failed", error="no | room")
    lines = table([*TRIALS, failed], AUC, Reference.of(TRIALS, AUC), TRIALS[2]).splitlines()
    assert len(lines) == 2 + 7
    assert len({line.count("|") for line in lines}) == 1
    assert [line for line in lines if "fiited 25% *" in line and "+0.0050" in line and "250.0" in line]
    assert [line for line in lines if "fiited 6.25%" in line and "stopped" in line]
    assert [line for line in lines if "fiited 1%" in line and "failed: no / room" in line]


def test_the_front_holds_what_nothing_beats_in_both_quality_and_size() -> None:
    assert [each.name for each in front(TRIALS, AUC, BYTES)] == ["fiited 12.5%", "adaembed 25%", "fiited 25%", "fiited 50%", "full"]
    worse = trial("hash", "25%", 0.70, 260)
    assert worse not in front([*TRIALS, worse], AUC, BYTES)


def test_the_picture_and_the_page_show_all_methods_against_bytes_and_parameters() -> None:
    reference = Reference.of(TRIALS, AUC)
    figure = picture(TRIALS, AUC, reference, TRIALS[2], ": sweep (synthetic data)")
    assert [axes.get_xlabel() for axes in figure.axes] == ["MiB, everything counted", "% of the parameters kept"]
    shown = {text.get_text() for text in figure.legends[0].get_texts()}
    assert {"full", "fiited", "adaembed", "the answer", "full width", "within 0.01"} <= shown
    text = page(TRIALS, AUC, reference, TRIALS[2], ": sweep", "This is the answer.")
    assert "This is the answer." in text
    assert "fiited 12.5%" in text
    assert '<script src="http' not in text  # it needs nothing from elsewhere


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(data=DataConfig(categorical=("a", "b")), name="sweep", output=str(tmp_path))


def test_a_trial_is_known_by_what_decides_its_result_and_by_nothing_else(config: Config) -> None:
    same = config.with_settings({"name": "other", "output": "elsewhere", "tracking.log_every": 3, "train.eval_every": 7})
    assert trial_digest(same, "data") == trial_digest(config, "data")
    others = [config.with_settings({key: value}) for key, value in (("seed", 1), ("budget", "5%"), ("policy.alpha", 3))]
    digests = {trial_digest(config, "data"), trial_digest(config, "other data"), *(trial_digest(each, "data") for each in others)}
    assert len(digests) == 5


def test_records_outlive_the_process_and_failures_are_tried_again(config: Config) -> None:
    folder = Folder.open(config, "data")
    folder.write("0", TRIALS[1])
    folder.write("1", Trial(TRIALS[2].settings, "failed", error="of memory"))
    folder.remember_parent({"run_id": "7"})
    again = Folder.open(config.with_settings({"budget": "5%", "method": "hash"}), "data")  # what a sweep varies anyhow
    assert again.trial("0") == TRIALS[1]
    assert again.trial("1") is None
    assert list(again.trials()) == [TRIALS[1]]
    assert again.parent() == {"run_id": "7"}


def test_a_folder_of_other_settings_or_data_is_refused(config: Config) -> None:
    Folder.open(config, "data")
    for other, data in ((config, "other"), (config.with_settings({"train.max_steps": 5}), "data")):
        with pytest.raises(ConfigError, match="holds a sweep of other settings or data"):
            Folder.open(other, data)


def test_a_damaged_record_is_refused_by_its_file(config: Config) -> None:
    folder = Folder.open(config, "data")
    path = folder.path / "trials" / "0.json"
    path.write_text(json.dumps({"settings": {}, "colour": 1}))
    with pytest.raises(ConfigError, match=r"0\.json: not a trial's record"):
        folder.trial("0")


def test_trials_of_several_seeds_are_compared_by_their_means() -> None:
    """The luckiest seed of the smaller budget is within the drop, its mean is not."""

    def seeded(method: str, budget: str, mib: float, aucs: list[float]) -> list[Trial]:
        return [
            dataclasses.replace(each, settings=each.settings | {"seed": seed}, run_id=f"{method}{seed}")
            for seed, auc in enumerate(aucs)
            for each in [trial(method, budget, auc, mib)]
        ]

    trials = seeded("full", "", 1024, [0.80, 0.82])
    trials += seeded("fiited", "25%", 250, [0.795, 0.815]) + seeded("fiited", "6.25%", 60, [0.81, 0.76])
    together = over_seeds(trials)
    assert [each.name for each in together] == ["full seed=0,1", "fiited 25% seed=0,1", "fiited 6.25% seed=0,1"]
    reference = Reference.of(together, AUC)
    assert reference is not None
    assert (reference.name, reference.value) == ("full width", pytest.approx(0.81))
    found = answer(together, AUC, reference)
    assert found.best is not None
    assert found.best.settings["budget"] == "25%"
    assert found.best.run_id == "fiited0"
    assert "0.8050 ± 0.0141 over 2 seeds" in found.sentence
    assert "0.7850 ± 0.0354" in table(together, AUC, reference, found.best)
    best = best_config(Config(data=DataConfig(categorical=("a", "b")), seed=7), found.best)
    assert (best.seed, str(best.budget)) == (7, "25%")


def test_a_seed_that_failed_leaves_its_configuration_out_of_the_answer() -> None:
    lost = Trial(settings_of("fiited", "6.25%") | {"seed": 1}, "failed", error="worker 0: no memory")
    won = dataclasses.replace(trial("fiited", "6.25%", 0.9, 60), settings=settings_of("fiited", "6.25%") | {"seed": 0})
    together = over_seeds([*TRIALS[:2], won, lost])
    found = answer(together, AUC, Reference.of(together, AUC))
    assert found.best is not None
    assert found.best.settings["budget"] == "50%"
    assert "failed: worker 0: no memory" in table(together, AUC, None, found.best)


def test_one_seed_stays_as_it_is() -> None:
    assert over_seeds(TRIALS) == TRIALS
