"""MLflow's pages on a finished sweep, in a real browser."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator

import pytest
from conftest import Sweep  # type: ignore[import-not-found]
from mlflow import MlflowClient
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver on the PATH")
PATIENCE = 120  # seconds that a page may take on a busy machine


@pytest.fixture(scope="module")
def server(sweep: Sweep) -> Iterator[str]:
    """Address of `mlflow ui` on the sweep's store, with the arguments that `make ui` and the jobs name."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "ui", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    with subprocess.Popen([*command, "--backend-store-uri", sweep.uri], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        address = f"http://127.0.0.1:{port}"
        try:
            while process.poll() is None:
                try:
                    urllib.request.urlopen(f"{address}/health", timeout=PATIENCE)
                    break
                except OSError:
                    continue
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
    client = MlflowClient(sweep.uri)
    experiment = client.get_experiment_by_name("fiited-ray")
    assert experiment is not None
    (parent,) = (run for run in client.search_runs([experiment.experiment_id]) if "mlflow.parentRunId" not in run.data.tags)
    return experiment.experiment_id, parent.info.run_id


def test_the_list_of_runs_shows_the_sweep(server: str, browser: Chrome, sweep: Sweep) -> None:
    experiment, _ = run_ids(sweep)
    browser.get(f"{server}/#/experiments/{experiment}/runs?workflowType=machine_learning")
    wait_for_text(browser, "sweep", "clicks")


def test_the_sweeps_page_tells_the_answer_and_leads_to_its_trials(server: str, browser: Chrome, sweep: Sweep) -> None:
    experiment, run = run_ids(sweep)
    browser.get(f"{server}/#/experiments/{experiment}/runs/{run}?workflowType=machine_learning")
    wait_for_text(browser, "is the smallest within 0.5 AUC of full width", "Child runs", "full")
    browser.find_element(By.LINK_TEXT, "full").click()
    wait_for_text(browser, "Parent run", "eval/auc")


def test_the_interactive_plot_opens_among_the_artifacts(server: str, browser: Chrome, sweep: Sweep) -> None:
    experiment, run = run_ids(sweep)
    browser.get(f"{server}/#/experiments/{experiment}/runs/{run}/artifacts/pareto.html?workflowType=machine_learning")
    WebDriverWait(browser, PATIENCE).until(lambda driver: driver.find_elements(By.TAG_NAME, "iframe"))
    browser.switch_to.frame(browser.find_element(By.TAG_NAME, "iframe"))
    wait_for_text(browser, "Quality against size", "MiB, everything counted", "% of the parameters kept", "fiited", "full")
    assert browser.find_elements(By.CSS_SELECTOR, ".scatterlayer .point")
    browser.switch_to.default_content()
