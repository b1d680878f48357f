"""Saved models: what comes back, and what every kind of damage says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fiited_ray.config import Config, DataConfig, TrainConfig
from fiited_ray.coordinator import LocalDecider
from fiited_ray.data.batch import Batch
from fiited_ray.exchange import Solo
from fiited_ray.train import checkpoint
from fiited_ray.train.loop import Worker, train_step
from fiited_ray.train.trainer import save


def make_worker() -> Worker:
    config = Config(data=DataConfig(dense=("d",), categorical=("a", "b")), train=TrainConfig(workers=1))
    return Worker(config, None, Solo(), LocalDecider(config.policy))


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Worker]:
    worker = make_worker()
    ids = torch.arange(20)
    for _ in range(3):
        batch = Batch(torch.randn(10, 1), (torch.rand(10) < 0.5).float(), ids, torch.arange(21))
        train_step(worker, batch)
    save(tmp_path, worker)
    return tmp_path, worker


def test_rows_and_dense_parameters_come_back_bit_for_bit(saved: tuple[Path, Worker]) -> None:
    folder, worker = saved
    model, again = checkpoint.open_model(folder), make_worker()
    checkpoint.restore(model, again.shard)
    checkpoint.load_dense(model, again.dense)
    assert model.step == 3
    assert model.config == worker.config
    for name, tensor in worker.shard.export_rows().tensors().items():
        assert torch.equal(tensor, again.shard.export_rows().tensors()[name]), name
    for name, tensor in worker.dense.state_dict().items():
        assert torch.equal(tensor, again.dense.state_dict()[name]), name


def manifest_with(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json: cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json: not JSON"),
        (lambda folder: manifest_with(folder, format="other"), "manifest.json: not a model saved by fiited-ray"),
        (lambda folder: manifest_with(folder, version=99), "manifest.json: version 99 is unknown"),
        (lambda folder: manifest_with(folder, files={}), "manifest.json: files or step are missing"),
        (lambda folder: (folder / "rows-00000.safetensors").unlink(), "rows-00000.safetensors: missing"),
        (lambda folder: (folder / "rows-00000.safetensors").write_bytes(b"x"), "rows-00000.safetensors: 1 bytes"),
        (lambda folder: flip(folder / "rows-00000.safetensors"), "rows-00000.safetensors: its checksum differs"),
        (lambda folder: flip(folder / "dense.safetensors"), "dense.safetensors: its checksum differs"),
    ],
)
def test_damage_names_the_file(saved: tuple[Path, Worker], damage: object, message: str) -> None:
    folder, _ = saved
    damage(folder)
    with pytest.raises(checkpoint.CheckpointError, match=message):
        checkpoint.open_model(folder)


def test_a_file_name_that_leaves_the_folder_is_refused(saved: tuple[Path, Worker]) -> None:
    folder, _ = saved
    files = json.loads((folder / "manifest.json").read_text())["files"]
    manifest_with(folder, files=files | {"../elsewhere": {"bytes": 1, "sha256": ""}})
    with pytest.raises(checkpoint.CheckpointError, match="leaves the folder"):
        checkpoint.open_model(folder)


def test_rows_that_the_manifest_does_not_name_stay_out(saved: tuple[Path, Worker]) -> None:
    folder, _ = saved
    (folder / "rows-00001.safetensors").write_bytes((folder / "rows-00000.safetensors").read_bytes())
    model, again = checkpoint.open_model(folder), make_worker()
    checkpoint.restore(model, again.shard)
    assert again.shard.stats().rows == 20


@pytest.mark.parametrize("name", ["widths", "values", "raw_ids", "state"])
def test_rows_whose_parts_do_not_match_are_refused(saved: tuple[Path, Worker], name: str) -> None:
    folder, worker = saved
    path = folder / "rows-00000.safetensors"
    tensors = worker.shard.export_rows().tensors()
    safetensors.torch.save_file(tensors | {name: tensors[name][:-1].clone()}, path)
    manifest_with(folder, files=checkpoint.describe(folder, ["config.yaml", "dense.safetensors", path.name]))
    with pytest.raises(checkpoint.CheckpointError, match=r"rows-00000\.safetensors: "):
        checkpoint.restore(checkpoint.open_model(folder), make_worker().shard)


def test_a_file_without_rows_is_refused(saved: tuple[Path, Worker]) -> None:
    folder, _ = saved
    with pytest.raises(checkpoint.CheckpointError, match=r"dense\.safetensors: not a file of rows"):
        checkpoint.load_rows(folder / "dense.safetensors")


def test_dense_parameters_of_another_model_are_refused(saved: tuple[Path, Worker]) -> None:
    folder, _ = saved
    with pytest.raises(checkpoint.CheckpointError, match=r"dense\.safetensors: does not fit"):
        checkpoint.load_dense(checkpoint.open_model(folder), torch.nn.Linear(2, 3))


def test_rows_that_are_there_already_are_refused(saved: tuple[Path, Worker]) -> None:
    folder, worker = saved
    with pytest.raises(checkpoint.CheckpointError, match=r"rows-00000\.safetensors: .*already in the store"):
        checkpoint.restore(checkpoint.open_model(folder), worker.shard)
