"""The study of all methods and the one of drift, on synthetic data as small as they can do with."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from fiited_ray.data.synthetic import SyntheticSpec, write_synthetic

ROOT = Path(__file__).parent.parent


def benchmark(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))  # its runs are processes that import it by name
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_a_study_writes_a_row_for_each_run_and_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train, test = write_synthetic(tmp_path / "data", SyntheticSpec(rows=6000))
    config = {
        "data": {"train": str(train), "test": str(test), "categorical": ["c2", "c3"], "dense": ["d0"]},
        "model": {"bottom": [8], "top": [8]},
        "train": {"batch_size": 500},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    file = tmp_path / "results.json"
    quality = benchmark("quality", monkeypatch)

    def study(*settings: str) -> int:
        arguments = ["--config", str(tmp_path / "config.yaml"), "--seeds", "3", "--json", str(file), *settings]
        monkeypatch.setattr("sys.argv", ["quality.py", *arguments])
        return quality.main()

    assert study("--methods", "full", "fiited", "uniform", "--budgets", "100%", "200%", "1%") == 0
    shown = capsys.readouterr().out
    rows = json.loads(file.read_text())
    assert [(row["method"], row["budget"], row["seed"]) for row in rows] == [("full", 1.0, 3), ("fiited", 2.0, 3), ("uniform", 2.0, 3)]
    for row in rows:
        assert {"auc", "ne", "parameters_kept", "total_bytes", "samples_per_s"} <= row.keys()
        assert row["budget_bytes"] is None or row["peak_bytes"] <= row["budget_bytes"]
    assert "uniform at 1%, seed 3: left out" in shown
    assert "fiited at 1%, seed 3: left out" in shown
    assert "| fiited | 200.00% | 1 |" in shown

    marked = [row | {"auc": 0.123} for row in rows]  # what is there is kept as it is
    file.write_text(json.dumps(marked))
    assert study("--methods", "full", "fiited", "adaembed", "--budgets", "100%", "200%") == 0
    assert json.loads(file.read_text())[:3] == marked
    assert [row["method"] for row in json.loads(file.read_text())[3:]] == ["adaembed"]
    assert study("train.lr=0.5") == 2
    assert "holds results of" in capsys.readouterr().err


def test_a_frozen_allocation_lets_nobody_in_where_widths_that_follow_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drift = benchmark("drift", monkeypatch)
    file = tmp_path / "drift.json"
    settings = ["train.batch_size=256", "budget=2MiB", "model.bottom=[8]", "model.top=[8]", "data.dense=[d0]", "data.multi_hot=[]"]
    settings += ["data.categorical=[c2,c3,c9]"]
    arguments = ["--rows", "20000", "--often", "20", "--json", str(file), "--plot", str(tmp_path / "drift.png"), *settings]
    monkeypatch.setattr("sys.argv", ["drift.py", *arguments])
    assert drift.main() == 0
    assert (tmp_path / "drift.png").stat().st_size > 10_000
    runs = json.loads(file.read_text())["runs"]
    most = {name: max(width for width in run["widths"]["newcomers"] if not math.isnan(width)) for name, run in runs.items()}
    assert most.pop("frozen") == 0
    assert min(most.values()) > 8
    assert all(len(run["windows"]) == 20 for run in runs.values())
