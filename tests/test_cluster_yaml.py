"""cluster.yaml is what Ray's cluster launcher takes, keeps strangers out, and agrees with pyproject.toml."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parent.parent


@pytest.fixture
def cluster() -> dict[str, Any]:
    loaded = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    assert isinstance(loaded, dict)
    return loaded


@pytest.fixture
def start_commands(cluster: dict[str, Any]) -> list[str]:
    commands = cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]
    return [command for command in commands if "ray start" in command]


def requirements() -> dict[str, Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = map(Requirement, [*project["project"]["dependencies"], *project["build-system"]["requires"]])
    return {requirement.name: requirement for requirement in listed}


def test_launcher_accepts_the_file(cluster: dict[str, Any]) -> None:
    validate_config(prepare_config(cluster))


def test_launcher_refuses_an_unknown_key(cluster: dict[str, Any]) -> None:
    cluster["max_wokers"] = 3
    with pytest.raises(jsonschema.ValidationError, match="max_wokers"):
        validate_config(prepare_config(cluster))


def test_data_and_train_nodes_are_types_of_their_own(cluster: dict[str, Any]) -> None:
    kinds = prepare_config(cluster)["available_node_types"]
    assert "GPU" not in kinds["data"]["resources"]
    assert kinds["train"]["resources"]["GPU"] > 0
    assert kinds["head"]["resources"]["CPU"] == 0
    assert cluster["head_node_type"] == "head"


def test_every_node_starts_with_token_authentication(start_commands: list[str]) -> None:
    assert len(start_commands) == 2
    assert all(command.startswith("RAY_AUTH_MODE=token ray start") for command in start_commands)


def test_every_node_is_given_the_token(cluster: dict[str, Any]) -> None:
    assert prepare_config(cluster)["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


def test_dashboard_listens_on_loopback_only(start_commands: list[str]) -> None:
    hosts = [host for command in start_commands for host in re.findall(r"--dashboard-host=(\S+)", command)]
    assert hosts == ["127.0.0.1"]


@pytest.mark.parametrize("name", ["torch", "setuptools"])
def test_setup_installs_the_range_of_pyproject(cluster: dict[str, Any], name: str) -> None:
    asked = [Requirement(text) for command in cluster["setup_commands"] for text in re.findall(r'"([^"]+)"', command)]
    assert [each.specifier for each in asked if each.name == name] == [requirements()[name].specifier]


def test_images_hold_a_ray_that_the_project_takes(cluster: dict[str, Any]) -> None:
    images = [cluster["docker"]["head_image"], cluster["docker"]["worker_image"]]
    images += [kind["docker"]["worker_image"] for kind in cluster["available_node_types"].values() if "docker" in kind]
    versions = {re.fullmatch(r"rayproject/ray:([0-9.]+)-py311-\w+", image)[1] for image in images}  # type: ignore[index]
    assert len(versions) == 1
    assert versions.pop() in requirements()["ray"].specifier
