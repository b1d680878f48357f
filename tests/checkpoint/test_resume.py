"""A resumed run is the uninterrupted one, to the last bit."""

from __future__ import annotations

import dataclasses
import io
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from small_runs import BATCHES, BUDGET, batches, config, differences, folders, opened, resumed, run, solo, state_of

from fiited_ray.checkpoint import Folder, FolderPublisher, Saver, open_checkpoint, restore
from fiited_ray.config import ConfigError
from fiited_ray.data import Batch, DataError
from fiited_ray.data.files import Files
from fiited_ray.run_writer import RunWriter
from fiited_ray.store import VhpiShard
from fiited_ray.store.shard import ShardStats
from fiited_ray.train.loop import train
from fiited_ray.train.plots_of_run import log_plots
from fiited_ray.train.rounds import fit_budget

TIMED = ("time/", "time_of_run/", "ahead/", "speed/", "checkpoint/stopped_s")


@pytest.mark.parametrize(
    "groups",
    [
        {},
        {"embedding": {"optimizer": "adam", "dtype": "bfloat16"}, "train": {"optimizer": "adagrad"}, "checkpoint": {"incremental": 0}},
        {"embedding": {"optimizer": "adagrad", "dtype": "float16"}, "train": {"optimizer": "sgd", "overlap": 1}},
        {"policy": {"decay": 0.3}, "embedding": {"chunk": 32}},  # importance is scaled down every nine steps; whole rows
    ],
    ids=["rowwise", "adam-bfloat16", "adagrad-float16-overlap", "decay"],
)
def test_a_resumed_run_ends_as_the_uninterrupted_one_to_the_last_bit(tmp_path: Path, groups: dict[str, dict[str, object]]) -> None:
    made = config(**groups)
    whole = solo(made)
    results = run(whole, tmp_path / "whole")
    assert whole.shard.stats().asked_bytes > BUDGET  # not all rows found room
    checkpoints = folders(tmp_path / "whole")[:-1]
    assert len(checkpoints) == 6
    assert any(opened(each).base for each in checkpoints) == (made.checkpoint.incremental > 0)
    assert opened(checkpoints[-1]).training["epoch"] == 1
    for each in (checkpoints[0], checkpoints[2], checkpoints[-1]):
        worker = resumed(each, made)
        again = run(worker, tmp_path / f"from-{each.name}")
        assert differences(state_of(whole), state_of(worker)) == []
        assert {name: value for name, value in again.items() if not name.startswith(TIMED)} == {
            name: value for name, value in results.items() if not name.startswith(TIMED)
        }
        assert worker.history.steps == whole.history.steps
        assert worker.history.values["train/loss"] == whole.history.values["train/loss"]


def test_a_finished_run_goes_on_with_more_steps(tmp_path: Path) -> None:
    short, long = solo(config(steps=30)), solo(config(steps=40))
    run(short, tmp_path / "short")
    run(long, tmp_path / "long")
    worker = resumed(folders(tmp_path / "short")[-1], config(steps=40))
    run(worker, tmp_path / "more")
    assert differences(state_of(long), state_of(worker)) == []


def test_a_run_that_goes_on_without_its_budget_and_with_overlap_tells_and_draws_what_is_in_force(tmp_path: Path) -> None:
    run(solo(config(steps=30)), tmp_path / "before")
    worker = resumed(folders(tmp_path / "before")[-1], config(steps=40, train={"overlap": 1}), None)
    results = run(worker, tmp_path / "after")
    assert {"time/wait", "bytes/total"} <= results.keys()
    assert not {"time/data", "bytes/budget"} & results.keys()
    drawn = Drawn()
    log_plots(drawn, worker, results, False)
    assert set(drawn.names) >= {"plots/bytes.png", "plots/time.png", "plots/quality.png"}


class Drawn(RunWriter):
    """A writer that draws its figures and keeps their names."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def figure(self, name: str, figure: Figure) -> None:
        figure.savefig(io.BytesIO())
        self.names.append(name)


def test_the_position_in_the_data_is_that_of_the_next_batch(tmp_path: Path) -> None:
    run(solo(config()), tmp_path)
    positions = [(each.training["epoch"], each.training["batch"]) for each in map(opened, folders(tmp_path))]
    assert positions == [divmod(step, BATCHES) for step in (6, 12, 18)] + [(0, 24)] + [divmod(step, BATCHES) for step in (30, 36, 40)]


def test_half_the_budget_narrows_rows_before_the_first_step(tmp_path: Path) -> None:
    made = config()
    run(solo(made), tmp_path)
    worker = resumed(folders(tmp_path)[-1], made, BUDGET // 2)
    before = worker.shard.stats()
    assert before.planned > BUDGET // 2
    fit_budget(worker)
    after = worker.shard.stats()
    assert after.planned <= BUDGET // 2
    assert 0 < after.rows < before.rows


def test_the_same_budget_holds_no_round(tmp_path: Path) -> None:
    made = config()
    run(solo(made), tmp_path)
    worker = resumed(folders(tmp_path)[-1], made)
    before = state_of(worker)
    fit_budget(worker)
    assert differences(before, state_of(worker)) == []


def test_a_ceiling_without_a_budget_holds_after_a_resume(tmp_path: Path) -> None:
    made = config(policy={"max_shard_bytes": BUDGET})
    run(solo(made, None), tmp_path)
    worker = resumed(folders(tmp_path)[0], made, None)
    fit_budget(worker)
    assert worker.shard.stats().limit == BUDGET
    run(worker, tmp_path / "more")
    assert worker.history.values["bytes/peak"][-1] <= BUDGET


def test_a_round_that_loaded_rows_need_is_an_error_where_no_decision_can_be_had(tmp_path: Path) -> None:
    made = config()
    run(solo(made), tmp_path)
    worker = resumed(folders(tmp_path)[-1], made, BUDGET // 2)
    worker.decider = Silent()
    with pytest.raises(RuntimeError, match="step 40: the rows that were loaded pass the budget, and the coordinator gave no decision"):
        fit_budget(worker)


class Silent:
    """A coordinator that does not answer."""

    def decide(self, *question: object) -> None:
        return None


def test_what_was_left_out_is_counted_on(tmp_path: Path) -> None:
    worker = solo(config())
    saver = Saver(worker, FolderPublisher(Folder.of(tmp_path)), "test")
    worker.skipped_rows, worker.embedding.skipped_bags = 5, 2
    worker.skipped.steps, worker.skipped.in_a_row = 7, 3
    saver.save()
    saver.wait()
    again = resumed(folders(tmp_path)[0], config())
    assert (again.skipped_rows, again.embedding.skipped_bags, again.skipped) == (5, 2, worker.skipped)


def test_a_second_checkpoint_of_a_step_can_be_read(tmp_path: Path) -> None:
    worker = solo(config(steps=6))  # takes one after step 6
    saver = Saver(worker, FolderPublisher(Folder.of(tmp_path)), "test")
    train(worker, batches, saver=saver)
    saver.save()
    saver.wait()
    assert [opened(each).step for each in folders(tmp_path)] == [6, 6]
    assert differences(state_of(worker), state_of(resumed(folders(tmp_path)[1], config(steps=6)))) == []


def test_a_state_that_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    worker = solo(config(steps=6))
    train(worker, batches)
    next(iter(worker.optimizer.state.values()))["exp_avg_sq"][3] = torch.inf
    with pytest.raises(ValueError, match=r"step 6: 0/exp_avg_sq of the dense model or its optimizer is not finite"):
        Saver(worker, FolderPublisher(Folder.of(tmp_path)), "test").save()


def test_no_peak_is_missed_between_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks: list[int] = []
    stats = VhpiShard.stats

    def noted(shard: VhpiShard) -> ShardStats:
        found = stats(shard)
        peaks.append(found.peak)
        return found

    monkeypatch.setattr(VhpiShard, "stats", noted)
    for interval in (1, 2, 4):
        peaks.clear()
        results = train(solo(config(policy={"interval": interval, "first_round": interval})), lambda: batches(count=16))
        assert results["bytes/peak_of_run"] == max(peaks)


def test_scoring_counts_as_training_neither_by_its_time_nor_by_its_phases() -> None:
    entered = []

    def scored() -> Iterator[Batch]:
        entered.append((dict(worker.times.seconds), worker.window_start, time.perf_counter()))
        yield from batches(0, 9, 3)

    worker = solo(config(steps=10, train={"eval_every": 3}))
    worker.scored = lambda values: left.append((dict(worker.times.seconds), worker.window_start, time.perf_counter()))
    left: list[tuple[dict[str, float], tuple[float, int, int], float]] = []
    results = train(worker, batches, scored)
    assert len(entered) == 4  # and after the last step
    assert len(left) == 3
    for (seconds, window, clock), (seconds_after, window_after, clock_after) in zip(entered, left, strict=False):
        assert seconds_after == seconds
        assert window_after[1:] == window[1:]
        assert 0 < window_after[0] - window[0] <= clock_after - clock + 0.01
    assert results["eval/auc"] > 0
    assert worker.history.reported == 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 7}, "seed: 7 now, but 0 when"),
        ({"embedding": {"dim": 16}}, r"embedding\.dim: 16 now, but 32 when"),
        ({"train": {"batch_size": 128}}, r"train\.batch_size: 128 now, but 64 when"),
    ],
)
def test_another_configuration_is_refused_by_its_key(tmp_path: Path, change: dict[str, object], message: str) -> None:
    made = config(steps=6)
    run(solo(made), tmp_path)
    other = made
    for name, value in change.items():
        new = dataclasses.replace(getattr(made, name), **value) if isinstance(value, dict) else value
        other = dataclasses.replace(other, **{name: new})
    with pytest.raises(ConfigError, match=message):
        restore(opened(folders(tmp_path)[-1]), solo(other))


def test_precision_and_rate_may_be_others_when_a_run_goes_on(tmp_path: Path) -> None:
    run(solo(config(steps=6)), tmp_path)
    worker = solo(config(steps=9, model={"precision": "bfloat16"}, embedding={"lr": 0.01}))
    restore(opened(folders(tmp_path)[-1]), worker)
    train(worker, lambda: batches(worker.position.batch))
    assert worker.step == 9


def test_other_training_files_are_refused(tmp_path: Path) -> None:
    worker = solo(config(steps=6))
    files = Files(("a.parquet", "b.parquet"), (100, 28), False, ("user",))
    saver = Saver(worker, FolderPublisher(Folder.of(tmp_path)), "test", files)
    saver.save()
    saver.wait()
    restore(opened(folders(tmp_path)[0]), solo(config(steps=6)), files)
    with pytest.raises(ConfigError, match=r"data\.train: 99 rows in 1 files now, but 128 in 2 when"):
        restore(opened(folders(tmp_path)[0]), solo(config(steps=6)), Files(("a.parquet",), (99,), False, ("user",)))
    rewritten = dataclasses.replace(files, text_ids=())
    with pytest.raises(DataError, match=r"a\.parquet: column 'user' holds integers, but text in the data that .* has learned from"):
        restore(opened(folders(tmp_path)[0]), solo(config(steps=6)), rewritten)


def test_checkpoints_lie_on_any_filesystem_that_fsspec_knows(tmp_path: Path) -> None:
    made = config(steps=12)
    whole = solo(made)
    place = Folder.of(f"fsspec+file://{tmp_path}/deep/down")
    saver = Saver(whole, FolderPublisher(place), "test")
    train(whole, lambda: batches(whole.position.batch), None, saver)
    saver.save(finished=True)
    saver.wait()
    last = place.child("checkpoint_000002")
    assert not last.is_local
    worker = solo(made)
    restore(open_checkpoint(last), worker)
    assert differences(state_of(whole), state_of(worker)) == []
