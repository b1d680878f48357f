"""Coverage-guided fuzzing of what reads a checkpoint: python tests/checkpoint/fuzz_reader.py CORPUS [-max_total_time=20]

The first byte of an input says which file of a small good checkpoint is replaced by the rest, and whether manifests are told its new size
and checksum, so that the reading behind them is reached. Whatever comes, the checkpoint loads or is refused with a `CheckpointError`.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["fiited_ray.checkpoint"]):
    from fiited_ray.checkpoint import CheckpointError, Folder, open_checkpoint, restore
    from fiited_ray.checkpoint.load import load_shard
    from fiited_ray.checkpoint.manifest import encode

import torch
from small_runs import config, folders, run, solo

from fiited_ray.store import ShardSpec, VhpiShard

NAMES = ["manifest.json", "part-00000.json", "rows", "shard-00000.safetensors", "dense.safetensors", "optimizer.safetensors", "config.yaml"]
SEALED = 128  # added to the number of the file


def make_good(folder: Path) -> Path:
    """One whole checkpoint of a few rows."""
    made = config(steps=1)
    run(solo(made, None), folder)
    return folders(folder)[-1]


def names_of(good: Path) -> list[str]:
    rows = next(good.glob("rows-*")).name
    return [rows if name == "rows" else name for name in NAMES]


def write_corpus(good: Path, corpus: Path) -> None:
    """The good files themselves, as inputs."""
    for number, name in enumerate(names_of(good)):
        for flag in (0, SEALED):
            (corpus / f"{number}-{flag}").write_bytes(bytes([number | flag]) + (good / name).read_bytes())


class Target:
    def __init__(self, good: Path) -> None:
        self.good, self.names = good, names_of(good)
        self.originals = {name: (good / name).read_bytes() for name in self.names}
        self.config = config(steps=1)
        self.spec = ShardSpec.of(self.config, None)

    def __call__(self, data: bytes) -> None:
        if not data:
            return
        name = self.names[(data[0] & ~SEALED) % len(self.names)]
        self._replace(name, data[1:], bool(data[0] & SEALED))
        try:
            saved = open_checkpoint(Folder.of(self.good))
            if name.startswith("rows"):
                load_shard(saved, VhpiShard(self.spec))
            elif name == "config.yaml":
                saved.config()
            else:
                restore(saved, solo(self.config, None))
        except CheckpointError:
            pass
        finally:
            for each, original in self.originals.items():
                (self.good / each).write_bytes(original)

    def _replace(self, name: str, data: bytes, sealed: bool) -> None:
        path = self.good / name
        if name.endswith(".json") and sealed:
            try:
                content = json.loads(data)["content"]
                path.write_bytes(encode(content))
            except (ValueError, KeyError, TypeError, RecursionError):
                path.write_bytes(data)
            return
        path.write_bytes(data)
        if not sealed:
            return
        facts = Folder.of(self.good).write(name, data)
        for manifest in ("manifest.json", "part-00000.json"):
            content = json.loads(self.originals[manifest])["content"]
            for each in [*content.get("files", []), *content.get("rows", []), *([content["shard"]] if "shard" in content else [])]:
                if each["name"] == name:
                    each |= {"bytes": facts.bytes, "sha256": facts.sha256}
            (self.good / manifest).write_bytes(encode(content))


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    try:
        good = make_good(folder)
        corpus = Path(sys.argv[1])
        corpus.mkdir(parents=True, exist_ok=True)
        write_corpus(good, corpus)
        atheris.Setup(sys.argv, Target(good))
        atheris.Fuzz()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
