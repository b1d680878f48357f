"""Every kind of bad input to jobs/train.py: one line that names the thing, exit code 2, and nothing started for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

ROOT = Path(__file__).parent.parent
ROWS: dict[str, Any] = {
    "label": [0, 1] * 500,
    "age": [0.5] * 1000,
    "user": list(range(1000)),
    "tags": [[1, 2], []] * 500,
    "seconds": [[0.5, 1.5], []] * 500,
}
MAIN = """
import contextlib, io, json, runpy, sys
told = []
for job in json.load(sys.stdin):
    sys.argv, errors, status = job, io.StringIO(), 0
    with contextlib.redirect_stderr(errors):
        try:
            runpy.run_path(job[0], run_name="__main__")
        except SystemExit as ended:
            status = ended.code
    told.append((status, errors.getvalue(), [name for name in ("torch", "ray", "mlflow") if name in sys.modules]))
print(json.dumps(told))
"""
FROM_METADATA = [
    ("data.categorical=[usre]", "FOLDER/good.parquet: no column 'usre' (data.categorical); did you mean 'user'?"),
    ("data.categorical=[age2]", "FOLDER/good.parquet: no column 'age2' (data.categorical); did you mean 'age'?"),
    ("data.label=tags2", "FOLDER/good.parquet: no column 'tags2' (data.label); did you mean 'tags'?"),
    (
        "data.categorical=[seconds]",
        "FOLDER/good.parquet: column 'seconds' (data.categorical) is list<element: double>; ids are integers",
    ),
    (
        "data.dense=[seconds]",
        "FOLDER/good.parquet: column 'seconds' (data.dense) is list<element: double>; a dense column holds numbers",
    ),
    ("data.weights.tags=label2", "FOLDER/good.parquet: no column 'label2' (data.weights.tags); did you mean 'label'?"),
    ("data.train=FOLDER/none.parquet", "data.train: no Parquet file at FOLDER/none.parquet"),
    ("data.test=FOLDER/none.parquet", "data.test: no Parquet file at FOLDER/none.parquet"),
    ("data.train=FOLDER/empty.parquet", "FOLDER/empty.parquet: not a readable Parquet file: "),
    ("data.train=FOLDER/without-rows.parquet", "FOLDER/without-rows.parquet: the file has no rows; remove it from data.train"),
    ("data.train=FOLDER/text.parquet", "FOLDER/text.parquet: not a readable Parquet file: "),
    ("data.train=FOLDER/short.parquet", "FOLDER/short.parquet: not a readable Parquet file: "),
    ("embeding.dim=8", "FOLDER/config.yaml: unknown key embeding; did you mean embedding?"),
    ("embedding.dims=8", "FOLDER/config.yaml: unknown key embedding.dims; did you mean dim?"),
    ("train.workers=two", "FOLDER/config.yaml: train.workers: int wanted, not 'two'"),
    ("budget=much", "FOLDER/config.yaml: budget: cannot read 'much'; write bytes (67108864, 64MiB), a share"),
    (
        "data.test=FOLDER/text-ids.parquet",
        "FOLDER/text-ids.parquet: column 'user' holds text, but integers in FOLDER/good.parquet: ids as text",
    ),
    ("data.test=[]", "data.test is empty and train.progressive is false: nothing would be scored; set one of them"),
]
FROM_A_LOOK = [
    ("budget=5000", "budget: 5000 bytes are too few for 2 shard(s); the smallest possible budget here is 1"),
    ("budget=1%", "budget: 1% of the dense-equivalent bytes, 1"),
    ("data.train=FOLDER/nan.parquet", "dense column 'age', row 999: nan; clean the data"),
    ("data.train=FOLDER/label.parquet", "label column 'label', row 999: 7.0; labels are 0 or 1"),
    ("data.train=FOLDER/weights.parquet data.weights.tags=seconds", "row 0 has 1 weights for 2 ids of 'tags'; every id needs one"),
    ("data.train=FOLDER/damaged.parquet", "FOLDER/damaged.parquet: reading it failed: "),
    ("budget=4MiB tracking.uri=sqlite:////proc/none/x.db", "tracking.uri sqlite:////proc/none/x.db: "),
    ("budget=4MiB output=/proc/none", "output: /proc/none cannot be made: No such file or directory; name a folder"),
    (
        "budget=4MiB tracking.uri=http://user:pass#word@host",
        "tracking.uri http://***@host: what stands before the @ holds a #, ? or /",
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files with one fault each, and a configuration that is good for `good.parquet`."""
    folder = tmp_path_factory.mktemp("bad")

    def write(name: str, **columns: list[Any]) -> Path:
        path = folder / f"{name}.parquet"
        pq.write_table(pa.table(ROWS | columns), path)
        return path

    good = write("good").read_bytes()
    write("nan", age=[*ROWS["age"][:-1], float("nan")])
    write("label", label=[*ROWS["label"][:-1], 7])
    write("weights", seconds=[[0.5], *ROWS["seconds"][1:]])
    write("text-ids", user=list(map(str, ROWS["user"])))
    pq.write_table(pa.table(ROWS).slice(0, 0), folder / "without-rows.parquet")
    (folder / "empty.parquet").write_bytes(b"")
    (folder / "text.parquet").write_text("label,age,user,tags")
    (folder / "short.parquet").write_bytes(good[:-20])
    (folder / "damaged.parquet").write_bytes(good[:40] + bytes(2000) + good[2040:])
    config = {
        "budget": "50%",
        "output": str(folder / "runs"),
        "data": {"train": str(folder / "good.parquet"), "test": str(folder / "good.parquet")},
        "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"},
    }
    config["data"] |= {"dense": ["age"], "categorical": ["user"], "multi_hot": ["tags"]}  # type: ignore[operator]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


Told = tuple[int, str, list[str]]


def train(folder: Path, cases: list[list[str]]) -> list[Told]:
    """For each case what jobs/train.py exits with, what it says as its error, and which heavy libraries were imported by then.

    All in one process, as most of the time goes by in importing.
    """
    jobs = [
        [str(ROOT / "jobs" / "train.py"), "--config", f"{folder}/config.yaml", *(each.replace("FOLDER", str(folder)) for each in case)]
        for case in cases
    ]
    done = subprocess.run([sys.executable, "-c", MAIN], input=json.dumps(jobs), cwd=ROOT, capture_output=True, text=True, check=True)
    assert not done.stderr
    return [tuple(each) for each in json.loads(done.stdout.splitlines()[-1])]


@pytest.fixture(scope="module")
def from_metadata(folder: Path) -> dict[str, Told]:
    """By override."""
    return dict(zip(dict(FROM_METADATA), train(folder, [[override] for override, _ in FROM_METADATA]), strict=True))


@pytest.fixture(scope="module")
def from_a_look(folder: Path) -> dict[str, Told]:
    """By overrides."""
    return dict(zip(dict(FROM_A_LOOK), train(folder, [overrides.split() for overrides, _ in FROM_A_LOOK]), strict=True))


def error_of(told: Told) -> str:
    """The one line said."""
    status, said, _ = told
    assert status == 2, said
    assert said.count("\n") == 1, said
    assert said.startswith("error: ")
    return said.removeprefix("error: ").rstrip("\n")


@pytest.mark.parametrize(("override", "message"), FROM_METADATA)
def test_what_configuration_and_metadata_tell_is_told_without_torch_ray_and_mlflow(
    from_metadata: dict[str, Told], folder: Path, override: str, message: str
) -> None:
    told = from_metadata[override]
    assert error_of(told).startswith(message.replace("FOLDER", str(folder)))
    assert not told[2]


@pytest.mark.parametrize(("overrides", "message"), FROM_A_LOOK)
def test_what_a_look_at_budget_and_data_tells_is_told_before_ray_starts(
    from_a_look: dict[str, Told], folder: Path, overrides: str, message: str
) -> None:
    told = from_a_look[overrides]
    assert message.replace("FOLDER", str(folder)) in error_of(told)
    assert set(told[2]) <= {"torch"}
