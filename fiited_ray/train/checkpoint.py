"""A trained model on disk: a folder with a manifest, the configuration, the dense parameters and one file of rows per worker.

    manifest.json         format, version, and size and SHA-256 of every other file
    config.yaml           the resolved configuration
    dense.safetensors     parameters and buffers of the dense model
    rows-00000.safetensors ...   raw ids, tables, widths, importance, vectors, optimizer state

Nothing in it is pickled. Rows carry raw ids, so any number of shards can take them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor, nn

from fiited_ray.config import Config, load
from fiited_ray.store import Rows, VhpiShard

FORMAT = "fiited-ray-model"
VERSION = 1


class CheckpointError(RuntimeError):
    """A saved model that cannot be used; the message names the file."""


@dataclass(frozen=True)
class SavedModel:
    """What a saved model says of itself."""

    folder: Path
    config: Config
    step: int
    dense_columns: int
    files: tuple[str, ...]  # that the manifest names, verified


def save_rows(folder: Path, rank: int, shard: VhpiShard) -> str:
    """Write this worker's rows; returns the file's name."""
    name = f"rows-{rank:05d}.safetensors"
    safetensors.torch.save_file(shard.export_rows().tensors(), folder / name)
    return name


def save_dense(folder: Path, config: Config, model: nn.Module) -> list[str]:
    """Write the dense model and the configuration; returns the files' names."""
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(state, folder / "dense.safetensors")
    (folder / "config.yaml").write_text(config.to_yaml())
    return ["dense.safetensors", "config.yaml"]


def describe(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Size and checksum of files, as the manifest holds them."""
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)} for name in names}


def save_manifest(folder: Path, files: dict[str, dict[str, Any]], step: int) -> None:
    """Write the manifest last: a folder without one is not a saved model."""
    text = json.dumps({"format": FORMAT, "version": VERSION, "step": step, "files": files}, indent=1)
    partial = folder / "manifest.json.part"
    partial.write_text(text)
    partial.rename(folder / "manifest.json")


def open_model(folder: Path) -> SavedModel:
    """Read and verify a saved model's manifest and configuration.

    Raises:
        CheckpointError: naming the file that is missing, damaged or foreign.
    """
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); {folder} is not a saved model") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a model saved by fiited-ray")
    if manifest.get("version") != VERSION:
        raise CheckpointError(f"{path}: version {manifest.get('version')} is unknown; this release reads version {VERSION}")
    files, step = manifest.get("files"), manifest.get("step")
    if not isinstance(files, dict) or not isinstance(step, int) or not {"config.yaml", "dense.safetensors"} <= files.keys():
        raise CheckpointError(f"{path}: files or step are missing")
    for name, facts in files.items():
        _verify(folder, name, facts)
    config = load(folder / "config.yaml")
    return SavedModel(folder, config, step, len(config.data.dense), tuple(sorted(files)))


def row_files(model: SavedModel) -> list[Path]:
    """The files of rows that belong to the model; others in the folder, left by an earlier one, do not."""
    return [model.folder / name for name in model.files if name.startswith("rows-")]


def load_rows(path: Path) -> Rows:
    """Rows of one file.

    Raises:
        CheckpointError: when the file is damaged.
    """
    tensors = _load(path)
    try:
        return Rows(**tensors)
    except TypeError as error:
        raise CheckpointError(f"{path}: not a file of rows: it holds {', '.join(sorted(tensors))}") from error


def load_dense(model: SavedModel, into: nn.Module) -> None:
    """Load the dense parameters.

    Raises:
        CheckpointError: when they do not fit the model of the configuration.
    """
    path = model.folder / "dense.safetensors"
    try:
        into.load_state_dict(_load(path))
    except RuntimeError as error:
        raise CheckpointError(f"{path}: does not fit the model that config.yaml describes: {error}") from error


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def _verify(folder: Path, name: str, facts: Any) -> None:
    path = folder / name
    if Path(name).name != name:
        raise CheckpointError(f"{folder / 'manifest.json'}: file name {name!r} leaves the folder")
    if not path.is_file():
        raise CheckpointError(f"{path}: missing")
    if not isinstance(facts, dict) or path.stat().st_size != facts.get("bytes"):
        raise CheckpointError(
            f"{path}: {path.stat().st_size} bytes, but the manifest says {facts.get('bytes') if isinstance(facts, dict) else facts}"
        )
    if _sha256(path) != facts.get("sha256"):
        raise CheckpointError(f"{path}: its checksum differs from the manifest's; the file is damaged")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def restore(model: SavedModel, shard: VhpiShard) -> None:
    """Put all rows of a saved model into a shard that owns every bucket."""
    for path in row_files(model):
        try:
            shard.import_rows(load_rows(path))
        except RuntimeError as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path}: {error}") from error
