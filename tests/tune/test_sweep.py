"""Sweeps for real: Ray Tune over Ray Train runs, logged to MLflow, and its pages on one of them in a real browser."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, Sweep, small_config  # type: ignore[import-not-found]
from mlflow import MlflowClient
from mlflow.entities import Run
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from fiited_ray import tracking
from fiited_ray.config import Config, load
from fiited_ray.tracked_data import data_digest
from fiited_ray.train.plan import make_plan
from fiited_ray.tune.measure import Measure
from fiited_ray.tune.records import Folder, Trial, trial_digest
from fiited_ray.tune.scheduler import AshaByBudget
from fiited_ray.tune.space import parse_budgets, parse_vary, settings_of
from fiited_ray.tune.sweep import Grid, Outcome, Question, Search
from fiited_ray.tune.sweep import sweep as run_sweep

SILENT: Any = lambda text: None  # noqa: E731
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver on the PATH")
PATIENCE = 120  # seconds that a page may take on a busy machine


def runs_of(uri: str) -> tuple[Run, list[Run]]:
    """The sweep's run and those below it, from the first on."""
    client = MlflowClient(uri)
    found = client.search_runs([each.experiment_id for each in client.search_experiments()], order_by=["attributes.start_time"])
    parents = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    assert len(parents) == 1
    children = [run for run in found if run.data.tags.get("mlflow.parentRunId") == parents[0].info.run_id]
    return parents[0], children


def test_a_killed_sweep_goes_on_where_it_stopped_and_trains_nothing_twice(sweep: Sweep) -> None:
    assert "full: AUC" in sweep.killed
    assert "full, known from before" in sweep.resumed
    assert "full: AUC" not in sweep.resumed
    parent, children = runs_of(sweep.uri)
    assert parent.info.status == "FINISHED"
    ended = [(run.info.run_name, run.info.status) for run in children]
    assert ended.count(("full", "FINISHED")) == 1
    assert ended.count(("fiited 50%", "FINISHED")) == 1
    assert not [name for name, status in ended if status == "RUNNING"]


def test_the_target_is_told_in_one_sentence_below_a_table_of_all_trials(sweep: Sweep) -> None:
    table = [line for line in sweep.resumed.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 2
    assert [line for line in table if "fiited 50% *" in line and "finished" in line]
    assert "is the smallest within 0.5 AUC of full width" in sweep.resumed
    assert "on synthetic data" in sweep.resumed
    parent, _ = runs_of(sweep.uri)
    assert "is the smallest within 0.5 AUC of full width" in parent.data.tags["mlflow.note.content"]


def test_the_best_configuration_is_one_that_training_takes(sweep: Sweep) -> None:
    best = load(sweep.output / "best.yaml")
    assert (best.name, best.method, str(best.budget)) == ("sweep-best", "fiited", "50%")
    assert make_plan(best).budget_bytes


def test_plots_and_configuration_are_artifacts_of_the_sweeps_run(sweep: Sweep) -> None:
    parent, _ = runs_of(sweep.uri)
    names = {each.path for each in MlflowClient(sweep.uri).list_artifacts(parent.info.run_id)}
    assert {"pareto.png", "pareto.html", "best.yaml"} <= names


def test_each_trial_has_parameters_metrics_by_step_data_and_tags_to_group_by(sweep: Sweep) -> None:
    parent, children = runs_of(sweep.uri)
    client = MlflowClient(sweep.uri)
    trial = next(run for run in children if run.info.run_name == "fiited 50%" and run.info.status == "FINISHED")
    assert (trial.data.params["method"], trial.data.params["budget"]) == ("fiited", "50%")
    assert {"method": "fiited", "budget": "50%", "sweep": "sweep", "synthetic_data": "True"}.items() <= trial.data.tags.items()
    assert [each.step for each in client.get_metric_history(trial.info.run_id, "train/loss")] == [4, 8, 12, 15]
    assert {"eval/auc", "bytes/total", "parameters/kept_share"} <= trial.data.metrics.keys()
    assert len(trial.inputs.dataset_inputs) == len(parent.inputs.dataset_inputs) == 2


def test_only_the_best_trials_model_is_put_among_mlflows(sweep: Sweep) -> None:
    _, children = runs_of(sweep.uri)
    logged = {run.info.run_name for run in children if run.outputs and run.outputs.model_outputs}
    assert logged == {"fiited 50%"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, synthetic: tuple[Path, Path]) -> Config:
    return load(small_config(tmp_path_factory.mktemp("base"), *synthetic))


GOOD = settings_of("qr", "40%") | {"policy.alpha": 2}


@pytest.fixture(scope="module")
def half_failed(base: Config, ray_local: None) -> Outcome:
    """A grid of a trial that trains and one whose two workers meet a bad row. Each has to end its own run: the sweep does not."""
    table = pq.read_table(base.data.train[0]).slice(0, 3000)
    values = table["d1"].to_numpy().copy()
    values[2500] = np.nan
    table = table.set_column(table.schema.names.index("d1"), "d1", pa.array(values, pa.float32(), from_pandas=False))
    pq.write_table(table, Path(base.output).parent / "bad.parquet")
    bad = settings_of("fiited", "none") | {"data.train": (str(Path(base.output).parent / "bad.parquet"),), "train.workers": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracking, "end_children", lambda *arguments: None)
        return run_sweep(Question(base, Grid((bad, GOOD)), Measure("auc", "eval", 0.5)), SILENT)


def test_a_failed_trial_is_told_and_the_others_go_on(half_failed: Outcome) -> None:
    assert half_failed.answer.best is not None
    assert half_failed.answer.best.settings == GOOD
    assert sorted(trial.state for trial in half_failed.trials) == ["failed", "finished"]


def test_a_workers_error_is_told_with_its_cause_and_the_run_is_marked_failed(half_failed: Outcome) -> None:
    (error,) = [trial.error for trial in half_failed.trials if trial.error]
    assert re.match(r"worker \d: .*dense column 'd1', row", error)
    assert "dense column 'd1', row" in half_failed.table
    _, children = runs_of(half_failed.run.uri)
    assert sorted(run.info.status for run in children) == ["FAILED", "FINISHED"]


def test_a_method_that_fixes_its_rows_trains_within_the_budget_and_its_saved_model_scores_the_same(
    base: Config, half_failed: Outcome, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, trial = make_plan(base.with_settings(GOOD)), half_failed.answer.best
    assert trial is not None
    assert plan.config.embedding.rows
    assert trial.metrics["bytes/peak_of_run"] <= (plan.budget_bytes or 0)
    assert trial.metrics["parameters/kept_share"] < 0.5  # of the ids that the files hold, not of the rows they share
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--model", trial.model_folder])
    capsys.readouterr()
    assert runpy.run_path(str(ROOT / "jobs" / "evaluate.py"))["main"]() == 0
    assert f"AUC {trial.metrics['eval/auc']:.4f}" in capsys.readouterr().out


def test_a_search_reports_scores_on_the_way_and_begins_with_what_is_known(base: Config, half_failed: Outcome) -> None:
    # what is new, at 61%, is of another octave than what is known, which then cannot stop it early
    space = (("fiited", "qr"), parse_budgets("40%..90%"), parse_vary(["policy.alpha=2,4"]))
    lines: list[str] = []
    outcome = run_sweep(Question(base, Search(*space, trials=2), Measure("auc", "eval", 0.5)), lines.append)
    known = [trial for trial in half_failed.trials if trial.state == "finished"]
    (new,) = [trial for trial in outcome.trials if trial not in known]
    assert len(outcome.trials) == 2
    assert [line for line in lines if "known from before" in line]
    history = MlflowClient(outcome.run.uri).get_metric_history(new.run_id, "eval/auc")
    assert len({each.step for each in history}) >= 4  # at each quarter, by which ASHA decides


def test_a_sweep_that_is_asked_again_shows_the_metrics_of_its_newest_answer(base: Config, ray_local: None) -> None:
    base = base.with_settings({"name": "asked-twice"})
    digest = data_digest(make_plan(base.with_settings(settings_of("full", ""))))
    folder = Folder.open(base, digest)
    large, small = settings_of("fiited", "50%"), settings_of("fiited", "40%")
    of_large = {"step": 176.0, "eval/auc": 0.79, "bytes/total": 500.0, "parameters/kept_share": 0.5, "rows/width_2": 8.0}
    of_small = {"step": 88.0, "eval/auc": 0.70, "bytes/total": 250.0, "parameters/kept_share": 0.3}
    for settings, metrics in ((large, of_large), (small, of_small)):
        folder.write(trial_digest(base.with_settings(settings), digest), Trial(settings, "finished", metrics))
    for drop, best, metrics in ((0.02, large, of_large), (0.2, small, of_small)):
        outcome = run_sweep(Question(base, Grid((large, small)), Measure("auc", "eval", drop), baseline=0.8), SILENT)
        assert outcome.answer.best is not None
        assert outcome.answer.best.settings == best
        shown = MlflowClient(outcome.run.uri).get_run(outcome.run.run_id).data.metrics
        assert {name: value for name, value in shown.items() if value == value} == metrics


def test_a_trial_is_stopped_early_only_by_trials_of_like_budget() -> None:
    scheduler = AshaByBudget("step", "eval/auc", "max", grace=10, most=40)

    def score(name: str, budget: str, auc: float) -> str:
        trial = SimpleNamespace(trial_id=name, config={"settings": settings_of("fiited", budget)})
        scheduler.on_trial_add(None, trial)
        return scheduler.on_trial_result(None, trial, {"step": 10, "eval/auc": auc})

    assert score("a", "30%", 0.80) == "CONTINUE"
    assert score("b", "28%", 0.70) == "STOP"
    assert score("c", "2%", 0.60) == "CONTINUE"
    assert score("d", "30%", 0.90) == "CONTINUE"


@pytest.fixture(scope="module")
def server(sweep: Sweep) -> Iterator[str]:
    """Address of `mlflow ui` on the sweep's store, as `make ui` starts it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "ui", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", sweep.uri]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        address = f"http://127.0.0.1:{port}"
        try:
            while process.poll() is None:
                try:
                    urllib.request.urlopen(f"{address}/health", timeout=PATIENCE)
                    break
                except OSError:
                    time.sleep(0.1)
            assert process.poll() is None, "mlflow ui has ended"
            yield address
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = str(CHROMIUM)
    profile = tmp_path_factory.mktemp("profile")
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1600,1000", f"--user-data-dir={profile}"):
        options.add_argument(argument)
    driver = Chrome(options=options, service=ChromeService(DRIVER))
    yield driver
    driver.quit()


def wait_for_text(browser: Chrome, *texts: str) -> None:
    """Wait until the page shows all texts."""
    missing = list(texts)

    def shown(driver: Chrome) -> bool:
        body = driver.find_element(By.TAG_NAME, "body").text
        missing[:] = [text for text in texts if text not in body]
        return not missing

    try:
        WebDriverWait(browser, PATIENCE, ignored_exceptions=[Exception]).until(shown)
    except Exception:
        pytest.fail(f"the page does not show {missing}: {browser.find_element(By.TAG_NAME, 'body').text[:2000]}")


def run_ids(sweep: Sweep) -> tuple[str, str]:
    """(experiment, the sweep's run)."""
    parent, _ = runs_of(sweep.uri)
    return parent.info.experiment_id, parent.info.run_id


@needs_browser
def test_the_list_of_runs_shows_the_sweep(server: str, browser: Chrome, sweep: Sweep) -> None:
    experiment, _ = run_ids(sweep)
    browser.get(f"{server}/#/experiments/{experiment}/runs?workflowType=machine_learning")
    wait_for_text(browser, "sweep", "clicks")


@needs_browser
def test_the_sweeps_page_tells_the_answer_and_leads_to_its_trials(server: str, browser: Chrome, sweep: Sweep) -> None:
    experiment, run = run_ids(sweep)
    browser.get(f"{server}/#/experiments/{experiment}/runs/{run}?workflowType=machine_learning")
    wait_for_text(browser, "is the smallest within 0.5 AUC of full width", "Child runs", "full")
    browser.find_element(By.LINK_TEXT, "full").click()
    wait_for_text(browser, "Parent run", "eval/auc")


@needs_browser
def test_the_interactive_plot_opens_among_the_artifacts(server: str, browser: Chrome, sweep: Sweep) -> None:
    experiment, run = run_ids(sweep)
    browser.get(f"{server}/#/experiments/{experiment}/runs/{run}/artifacts/pareto.html?workflowType=machine_learning")
    WebDriverWait(browser, PATIENCE).until(lambda driver: driver.find_elements(By.TAG_NAME, "iframe"))
    browser.switch_to.frame(browser.find_element(By.TAG_NAME, "iframe"))
    wait_for_text(browser, "Quality against size", "MiB, everything counted", "% of the parameters kept", "fiited", "full")
    assert browser.find_elements(By.CSS_SELECTOR, ".scatterlayer .point")
    browser.switch_to.default_content()
