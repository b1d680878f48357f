"""`Saved`: a checkpoint that has been opened, its manifest and parts checked, with the checkpoints it builds on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from fiited_ray.checkpoint.files import Folder
from fiited_ray.checkpoint.manifest import (
    MANIFEST,
    MANIFEST_SCHEMA,
    PART_SCHEMA,
    CheckpointError,
    FileFacts,
    RowsFile,
    decode,
    part_name,
)
from fiited_ray.config import Config, ConfigError, load
from fiited_ray.store import bucket_range

_LONGEST_TEXT = 16 << 20
_LONGEST_CONFIG = 1 << 20
_DEEPEST_CONFIG = 8
_LONGEST_CHAIN = 1000


@dataclass(frozen=True)
class Part:
    """One worker's share: its shard's state and its files of rows."""

    content: dict[str, Any]

    @property
    def buckets(self) -> tuple[int, int]:
        return self.content["first_bucket"], self.content["end_bucket"]

    @property
    def state(self) -> list[int]:
        return self.content["state"]

    @property
    def rows_by_width(self) -> list[int]:
        return self.content["rows_by_width"]

    @property
    def shard(self) -> FileFacts:
        return FileFacts(**self.content["shard"])

    @property
    def files(self) -> list[RowsFile]:
        return [RowsFile(**each) for each in self.content["rows"]]


@dataclass(frozen=True)
class Saved:
    """A checkpoint. `base` is the one that holds the rows which did not change, None where all rows are here."""

    folder: Folder
    content: dict[str, Any]
    parts: tuple[Part, ...]
    base: Saved | None

    @property
    def step(self) -> int:
        return self.content["step"]

    @property
    def run(self) -> str:
        return self.content["run"]

    @property
    def text_ids(self) -> frozenset[str] | None:
        """Columns of the training data whose ids were text; None where nothing was said of them."""
        data = self.content["data"]
        return None if data is None else frozenset(data["text_ids"])

    @property
    def finished(self) -> bool:
        return self.content["finished"]

    @property
    def workers(self) -> int:
        return self.content["workers"]

    @property
    def training(self) -> dict[str, Any]:
        return self.content["training"]

    def facts(self, name: str) -> FileFacts:
        """A file of the manifest.

        Raises:
            CheckpointError: when the manifest does not name it.
        """
        for each in self.content["files"]:
            if each["name"] == name:
                return FileFacts(**each)
        raise CheckpointError(f"{self.folder.path}/{MANIFEST}: names no {name}")

    def config(self) -> Config:
        """The configuration it was trained by.

        Raises:
            CheckpointError: when the file is damaged or no configuration of this release.
        """
        where = f"{self.folder.path}/config.yaml"
        with self.folder.verified(self.facts("config.yaml")) as path:
            if path.stat().st_size > _LONGEST_CONFIG:
                raise CheckpointError(f"{where}: longer than {_LONGEST_CONFIG} bytes")
            try:
                _check_yaml(path.read_text(), where)
                return load(path)
            except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
                raise CheckpointError(f"{where}: not YAML: {type(error).__name__}") from None
            except ConfigError as error:
                raise CheckpointError(f"{where}: {error}") from error

    def check_sizes(self) -> None:
        """Look whether all files of this checkpoint and of those it builds on are there in full length; their checksums are not computed.

        Raises:
            CheckpointError: naming the first that is not.
        """
        for each in self.chain():
            of_parts = [facts for part in each.parts for facts in (part.shard, *part.files)]
            for facts in [FileFacts(**named) for named in each.content["files"]] + of_parts:
                if (size := each.folder.size(facts.name)) != facts.bytes:
                    there = "missing" if size is None else f"{size} bytes"
                    raise CheckpointError(f"{each.folder.path}/{facts.name}: {there}, but {facts.bytes} bytes were written")

    def chain(self) -> list[Saved]:
        """This checkpoint and those it builds on, newest first."""
        chain, at = [self], self.base
        while at is not None:
            chain.append(at)
            at = at.base
        return chain


def _check_yaml(text: str, where: str) -> None:
    """Refuse what makes a short text take much time or memory: aliases and deep nesting, of which a saved configuration has none."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise CheckpointError(f"{where}: has aliases, which no saved configuration has")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST_CONFIG:
            raise CheckpointError(f"{where}: nested deeper than any saved configuration")


def read_manifest(folder: Folder) -> dict[str, Any]:
    """The manifest of a checkpoint, checked; its files are not looked at.

    Raises:
        CheckpointError: naming the file that is missing, damaged or foreign.
    """
    content = decode(folder.read(MANIFEST, _LONGEST_TEXT), MANIFEST_SCHEMA, f"{folder.path}/{MANIFEST}")
    names = [each["name"] for each in content["files"]]
    if len(set(names)) < len(names):
        raise CheckpointError(f"{folder.path}/{MANIFEST}: a file stands in it twice")
    return content


def open_checkpoint(folder: Folder) -> Saved:
    """Open a checkpoint and those it builds on; files are verified when they are read.

    Raises:
        CheckpointError: naming the file that is missing, damaged or foreign.
    """
    chain: list[tuple[Folder, dict[str, Any]]] = []
    at: Folder | None = folder
    while at is not None:
        content = read_manifest(at)
        if chain:
            _check_link(chain[-1][0], chain[-1][1], at, content)
        chain.append((at, content))
        if len(chain) > _LONGEST_CHAIN:
            raise CheckpointError(f"{folder.path}/{MANIFEST}: builds on more than {_LONGEST_CHAIN} others")
        at = at.parent.child(content["base"]["folder"]) if content["base"] else None
    saved: Saved | None = None
    for where, content in reversed(chain):
        saved = Saved(where, content, tuple(_part(where, content, rank) for rank in range(content["workers"])), saved)
    assert saved is not None
    return saved


def _check_link(folder: Folder, content: dict[str, Any], base: Folder, found: dict[str, Any]) -> None:
    where = f"{base.path}/{MANIFEST}"
    if found["id"] != content["base"]["id"]:
        raise CheckpointError(f"{where}: not the checkpoint that {folder.path} builds on; that one was deleted or replaced")
    if found["step"] >= content["step"] or found["workers"] != content["workers"] or found["run"] != content["run"]:
        raise CheckpointError(f"{where}: {folder.path} cannot build on it: step, workers or run do not fit")


def _part(folder: Folder, manifest: dict[str, Any], rank: int) -> Part:
    where = f"{folder.path}/{part_name(rank)}"
    content = decode(folder.read(part_name(rank), _LONGEST_TEXT), PART_SCHEMA, where)
    if content["id"] != manifest["id"] or content["rank"] != rank:
        raise CheckpointError(f"{where}: belongs to another checkpoint, or to another worker")
    part = Part(content)
    if part.buckets != bucket_range(rank, manifest["workers"]):
        raise CheckpointError(f"{where}: buckets {part.buckets} are not those of worker {rank} of {manifest['workers']}")
    at, names = part.buckets[0], set()
    for file in part.files:
        if not at <= file.first_bucket < file.end_bucket <= part.buckets[1] or file.name in names:
            raise CheckpointError(f"{where}: {file.name}: its buckets overlap another file's or pass the shard's")
        at = file.end_bucket
        names.add(file.name)
    return part
