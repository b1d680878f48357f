"""requirements.lock pins what pyproject.toml asks for, each with a hash, and names no registry."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
LOCK = (ROOT / "requirements.lock").read_text()
PINS = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;]+)[^\n]*\n((?:    --hash=sha256:[0-9a-f]{64}[^\n]*\n)*)", LOCK, re.MULTILINE)


def wanted() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = [*project["project"]["dependencies"], *project["project"]["optional-dependencies"]["dev"]]
    return [Requirement(text) for text in [*listed, *project["build-system"]["requires"]]]


@pytest.mark.parametrize("requirement", wanted(), ids=lambda each: each.name)
def test_a_dependency_is_pinned_within_its_range(requirement: Requirement) -> None:
    versions = [version for name, version, _ in PINS if canonicalize_name(name) == canonicalize_name(requirement.name)]
    assert versions
    assert all(version in requirement.specifier for version in versions)


def test_every_pin_has_a_hash_and_no_registry_is_named() -> None:
    assert [name for name, _, hashes in PINS if not hashes] == []
    assert "://" not in LOCK
    assert "--index-url" not in LOCK
