"""The newest complete checkpoint of a folder is found by what lies there, and what was not written to its end is cleared away."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from small_runs import config, folders, run, solo

from fiited_ray.checkpoint import CheckpointError, Folder, newest, sweep
from fiited_ray.checkpoint.manifest import encode

RUN = "test"
STEPS = [6, 12, 18, 24, 30, 36, 40]  # the first and the fourth are whole, two build on each; the last is whole, and finished


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    run(solo(config()), folder)
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy to be harmed."""
    return Path(shutil.copytree(good, tmp_path / "run"))


def found(folder: Path, of: str | None = None) -> int | None:
    saved = newest(Folder.of(folder), of)
    return None if saved is None else saved.step


def test_nothing_is_found_where_nothing_is(tmp_path: Path) -> None:
    assert found(tmp_path) is None
    assert found(tmp_path / "nowhere") is None


@pytest.mark.parametrize("name", ["manifest.json", "part-00000.json"])
def test_one_without_its_manifest_or_a_part_does_not_count(folder: Path, name: str) -> None:
    (folders(folder)[-1] / name).unlink()
    assert found(folder) == STEPS[-2]


@pytest.mark.parametrize("name", ["manifest.json", "shard-00000.safetensors", "dense.safetensors"])
def test_one_that_is_damaged_or_cut_short_does_not_count_while_there_are_others(folder: Path, name: str) -> None:
    path = folders(folder)[-1] / name
    path.write_bytes(path.read_bytes()[:-9])
    assert found(folder) == STEPS[-2]


def test_damage_is_an_error_where_nothing_else_is_there(folder: Path) -> None:
    *others, last = folders(folder)
    for each in others:
        shutil.rmtree(each)
    (last / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"manifest\.json: not JSON"):
        found(folder)
    assert found(folder, RUN) is None  # a run that has just begun cannot say that it is its own


def test_one_run_that_was_killed_over_its_first_does_not_hide_another(folder: Path) -> None:
    first = Path(shutil.copytree(folders(folder)[0], folder / "checkpoint_999999"))
    content = json.loads((first / "manifest.json").read_text())["content"]
    (first / "manifest.json").write_bytes(encode(content | {"run": "another"}))
    assert found(folder) == STEPS[0]
    (first / "part-00000.json").unlink()
    assert found(folder) == STEPS[-1]


def test_one_whose_base_is_gone_does_not_count(folder: Path) -> None:
    shutil.rmtree(folders(folder)[-1])
    shutil.rmtree(folders(folder)[3])
    assert found(folder) == 18


def test_those_of_another_run_do_not_count(folder: Path) -> None:
    assert found(folder, RUN) == STEPS[-1]
    assert found(folder, "another") is None


def test_what_was_not_written_to_its_end_is_cleared_away_with_old_ones_that_nobody_lists(folder: Path) -> None:
    names = [each.name for each in folders(folder)]
    (folder / names[-1] / "manifest.json").unlink()
    (folder / "checkpoint_best").mkdir()  # a person's
    gone = sweep(Folder.of(folder), RUN, listed=[names[1]], keep=1)
    assert sorted(gone) == [names[2], names[6]]  # the listed one builds on the first, the newest on the fourth and fifth
    assert sorted(each.name for each in folder.iterdir()) == sorted([*(set(names) - set(gone)), "checkpoint_best"])
    assert found(folder) == 36


def test_a_listed_folder_is_left_to_ray_and_a_damaged_one_or_another_runs_to_a_person(folder: Path) -> None:
    names = [each.name for each in folders(folder)]
    (folder / names[-1] / "manifest.json").unlink()
    (folder / names[-2] / "manifest.json").write_text("{")
    assert sweep(Folder.of(folder), "another", listed=[names[-1]], keep=1) == []
