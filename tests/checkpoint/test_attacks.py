"""Attacks on the reader of checkpoints: each is an error that names the file, before memory is taken by a size that is only declared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from small_runs import BUDGET, config, folders, run, solo
from torch import Tensor

from fiited_ray.checkpoint import CheckpointError, Folder, load_model, open_checkpoint, restore
from fiited_ray.checkpoint.manifest import encode

ROWS = "rows-00000-0000-1024.safetensors"
SHARD = "shard-00000.safetensors"
PART = "part-00000.json"
MANIFEST = "manifest.json"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of a run: a whole one, two that build on it, a whole one."""
    folder = tmp_path_factory.mktemp("good")
    run(solo(config(steps=20)), folder)
    assert [json.loads((each / MANIFEST).read_text())["content"]["base"] is None for each in folders(folder)] == [True, False, False, True]
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy to be harmed; its last checkpoint is whole."""
    shutil.copytree(good, tmp_path / "run")
    return folders(tmp_path / "run")[-1]


def refused(folder: Path, message: str, scoring: bool = True) -> None:
    """A run that would go on from it refuses it, and so does scoring, unless it does not read that file."""
    with pytest.raises(CheckpointError, match=message):
        restore(open_checkpoint(Folder.of(folder)), solo(config(steps=20)))
    if scoring:
        with pytest.raises(CheckpointError, match=message):
            load_model(folder)


def change(path: Path, **changes: Any) -> None:
    """Change the content of a manifest or part, with a checksum that fits again; `a__b` is key b of a."""
    content = json.loads(path.read_text())["content"]
    for name, value in changes.items():
        *parents, leaf = (int(part) if part.isdecimal() else part for part in name.split("__"))
        node = content
        for parent in parents:
            node = node[parent]
        node[leaf] = value
    path.write_bytes(encode(content))


def forge(folder: Path, name: str, make: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Replace the tensors of a file and tell manifest and part its new size and checksum."""
    path = folder / name
    tensors = {key: tensor.clone() for key, tensor in safetensors.torch.load_file(path).items()}
    replace(folder, name, safetensors.torch.save(make(tensors)))


def replace(folder: Path, name: str, data: bytes) -> None:
    """Replace a file and tell manifest and part its new size and checksum."""
    facts = Folder.of(folder).write(name, data)
    for path in (folder / MANIFEST, folder / PART):
        content = json.loads(path.read_text())["content"]
        for each in [*content.get("files", []), *content.get("rows", []), *([content["shard"]] if "shard" in content else [])]:
            if each["name"] == name:
                each |= {"bytes": facts.bytes, "sha256": facts.sha256}
        path.write_bytes(encode(content))


OF_RUN = ["optimizer.safetensors", "history.safetensors"]  # not needed for scoring
FILES = [*OF_RUN, "config.yaml", "dense.safetensors", ROWS, SHARD, PART, MANIFEST]


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    refused(folder, f"{name}: missing", name not in OF_RUN)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
def test_a_truncated_file(folder: Path, name: str, kept: float) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(len(data) * kept)])
    refused(folder, rf"{name}: ([0-9]+ bytes, but the manifest says|not JSON)", name not in OF_RUN)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0.02, 0.3, 0.6, 0.9])
def test_a_flipped_bit(folder: Path, name: str, place: float) -> None:
    data = bytearray((folder / name).read_bytes())
    data[int(len(data) * place)] ^= 1
    (folder / name).write_bytes(data)
    refused(folder, rf"{name}: (its checksum differs|not JSON|not written by|format|version)", name not in OF_RUN)


@pytest.mark.parametrize("name", [ROWS, SHARD, PART, "dense.safetensors"])
def test_a_file_of_another_checkpoint(folder: Path, name: str) -> None:
    shutil.copy(folder.parent / "checkpoint_000000" / name, folder / name)
    refused(folder, rf"{name}: ([0-9]+ bytes, but|its checksum differs|belongs to another checkpoint)")


@pytest.mark.parametrize("name", [ROWS, MANIFEST])
def test_a_link_to_elsewhere(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    refused(folder, f"{name}: a link")


@pytest.mark.parametrize("name", [MANIFEST, PART])
def test_a_manifest_that_declares_nothing_but_is_huge(folder: Path, name: str) -> None:
    with (folder / name).open("wb") as file:
        file.truncate(1 << 40)  # takes no room on the disk
    refused(folder, f"{name}: 1099511627776 bytes, more than")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"sha256": 1, "content": {}, "content": {}}', "not JSON: a key stands twice"),
        ('{"sha256": 1, "content": {"step": NaN}}', "not JSON: NaN is not a number"),
        ('{"sha256": 1, "content": {"step": -Infinity}}', "not JSON: -Infinity is not a number"),
        ("[]", "not written by fiited-ray"),
        ('{"sha256": "", "content": {}, "more": 1}', "not written by fiited-ray"),
        ('{"format": "fiited-ray-model", "version": 1}', "not written by fiited-ray"),
        ("\ud800".encode("utf-8", "surrogatepass").decode("latin-1"), "not JSON"),
    ],
)
@pytest.mark.parametrize("name", [MANIFEST, PART])
def test_a_manifest_of_other_text(folder: Path, name: str, text: str, message: str) -> None:
    (folder / name).write_text(text)
    refused(folder, f"{name}: {message}")


ESCAPES = [
    "../rows.safetensors",
    "/etc/rows.safetensors",
    "a/b.safetensors",
    "..",
    "",
    "rows\0.safetensors",
    "rows.safetensors\n",
    "~.yaml",
]


@pytest.mark.parametrize("name", ESCAPES)
def test_names_that_leave_the_folder(folder: Path, name: str) -> None:
    for path, key in ((MANIFEST, "files__0__name"), (PART, "rows__0__name"), (PART, "shard__name"), (MANIFEST, "base")):
        original = (folder / path).read_bytes()
        change(folder / path, **{key: {"folder": name, "id": "0" * 32} if key == "base" else name})
        refused(folder, rf"{path}: {key.replace('__', '.').replace('base', 'base')}")
        (folder / path).write_bytes(original)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "pickle"}, "format 'pickle' is not fiited-ray-checkpoint"),
        ({"version": 99}, "version 99 is unknown"),
        ({"version": "2"}, "version 2 is unknown"),
        ({"step": -1}, "step: -1"),
        ({"step": 20.0}, "step: 20.0"),
        ({"step": True}, "step: True"),
        ({"step": 2**70}, "step: "),
        ({"id": "x"}, "id: 'x'"),
        ({"workers": 10**9}, "workers: 1000000000"),
        ({"more": 1}, "'more' was unexpected"),
        ({"training__totals": [1, 2]}, r"training\.totals: "),
        ({"training": None}, "training: None"),
        ({"files": []}, "files: "),
    ],
)
def test_a_manifest_that_is_not_of_the_schema(folder: Path, changes: dict[str, Any], message: str) -> None:
    change(folder / MANIFEST, **changes)
    refused(folder, rf"{MANIFEST}: .*{message}")


def test_a_manifest_that_names_no_dense_model(folder: Path) -> None:
    content = json.loads((folder / MANIFEST).read_text())["content"]
    content["files"] = [each for each in content["files"] if each["name"] != "dense.safetensors"]
    (folder / MANIFEST).write_bytes(encode(content))
    refused(folder, f"{MANIFEST}: names no dense.safetensors")


def test_a_manifest_that_names_a_file_twice(folder: Path) -> None:
    content = json.loads((folder / MANIFEST).read_text())["content"]
    content["files"].append(content["files"][0])
    (folder / MANIFEST).write_bytes(encode(content))
    refused(folder, f"{MANIFEST}: a file stands in it twice")


def test_more_workers_than_there_are_parts(folder: Path) -> None:
    change(folder / MANIFEST, workers=2)
    refused(folder, r"part-0000[01]\.json: (missing|buckets)")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 1}, "belongs to another"),
        ({"id": "0" * 32}, "belongs to another"),
        ({"end_bucket": 512}, "buckets"),
        ({"rows__0__end_bucket": 2048}, "its buckets overlap"),
        ({"rows__0__first_bucket": 1024}, "its buckets overlap"),
        ({"rows__0__rows": 2**40}, "rows"),
        ({"rows_by_width": [2**40, 0, 0, 0]}, "rows"),
        ({"rows_by_width": [2**62] * 4}, "rows"),
        ({"rows_by_width": [1]}, "width"),
        ({"state__2": 2**40}, "out of range"),
        ({"state__1": -1}, "out of range"),
        ({"state": [0]}, "state"),
        ({"threshold": -1.0}, "threshold"),
    ],
)
def test_a_part_that_lies(folder: Path, changes: dict[str, Any], message: str) -> None:
    change(folder / PART, **changes)
    refused(folder, message)


def test_sizes_that_agree_with_each_other_but_not_with_the_file(folder: Path) -> None:
    """Declared alike everywhere, still no memory is taken for more rows than the file has bytes."""
    change(folder / PART, rows_by_width=[2**45, 0, 0, 0], rows__0__rows=2**45)
    refused(folder, f"{PART}: names {2**45} rows, but its files of [0-9]+ bytes")


def test_a_row_of_another_width_than_the_part_says(folder: Path) -> None:
    held = json.loads((folder / PART).read_text())["content"]["rows_by_width"]
    given, taken = held.index(max(held)), held.index(min(held))
    held[given], held[taken] = held[given] - 1, held[taken] + 1
    change(folder / PART, rows_by_width=held)
    refused(folder, f"{ROWS}: .*has an address that is none of its width")


def test_a_row_that_never_comes(folder: Path) -> None:
    def without_the_last(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        size = int(tensors["widths"][-1]) * 8
        return {key: tensor[: -size if key == "values" else -1] for key, tensor in tensors.items()}

    forge(folder, ROWS, without_the_last)
    rows = json.loads((folder / PART).read_text())["content"]["rows"][0]["rows"]
    change(folder / PART, rows__0__rows=rows - 1)
    refused(folder, "names [0-9]+ rows, but|never came")


def put(at: int, value: float) -> Callable[[Tensor], Tensor]:
    def change_one(tensor: Tensor) -> Tensor:
        tensor[at] = value
        return tensor

    return change_one


def twice(tensor: Tensor) -> Tensor:
    tensor[1] = tensor[0]
    return tensor


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("widths", put(0, 0), "width is not between"),
        ("widths", put(0, 200), "width is not between"),
        ("widths", lambda tensor: tensor.int(), r"widths is torch\.int32"),
        ("tables", put(0, -1), "table is not one of"),
        ("tables", put(0, 2), "table is not one of"),
        ("importance", put(0, float("nan")), "the importance of row 0"),
        ("importance", put(0, float("inf")), "the importance of row 0"),
        ("importance", put(0, -1.0), "the importance of row 0"),
        ("values", put(3, float("nan")), "row 0 .* has a value that is not finite"),
        ("values", put(3, float("-inf")), "row 0 .* has a value that is not finite"),
        ("values", lambda tensor: tensor[:-1], "but its rows need"),
        ("values", lambda tensor: tensor.half(), "but its rows need"),
        ("state", put(0, float("nan")), "row 0 .* has NaN in its optimizer state"),
        ("state", lambda tensor: tensor[:0], "but its rows need"),
        ("addresses", twice, "has the address of another row|none of its width"),
        ("addresses", put(0, -1), "has an address that is none of its width"),
        ("addresses", put(0, 2**30 - 1), "has an address that is none of its width"),
        ("raw_ids", lambda tensor: tensor[:-1], "raw_ids has shape"),
        ("raw_ids", lambda tensor: tensor.reshape(1, -1), "raw_ids has shape"),
    ],
)
def test_a_file_of_rows_that_lies(folder: Path, name: str, make: Callable[[Tensor], Tensor], message: str) -> None:
    forge(folder, ROWS, lambda tensors: tensors | {name: make(tensors[name]).contiguous()})
    refused(folder, rf"{ROWS}: .*({message})")


def test_a_row_that_is_there_twice(folder: Path) -> None:
    forge(folder, ROWS, lambda tensors: tensors | {"raw_ids": twice(tensors["raw_ids"]), "tables": twice(tensors["tables"])})
    refused(folder, f"{ROWS}: row 1 .*is already in the store")


def test_files_of_rows_with_more_or_less_in_them(folder: Path) -> None:
    forge(folder, ROWS, lambda tensors: tensors | {"more": torch.zeros(1)})
    refused(folder, f"{ROWS}: not a file of rows")
    forge(folder, ROWS, lambda tensors: {key: tensor for key, tensor in tensors.items() if key not in ("more", "state")})
    refused(folder, f"{ROWS}: not a file of rows")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 8,
        (2**40).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"{}",
        (60).to_bytes(8, "little") + b'{"widths":{"dtype":"U8","shape":[1099511627776],"data_offsets":[0,1099511627776]}}',
        (62).to_bytes(8, "little") + b'{"widths":{"dtype":"U8","shape":[9],"data_offsets":[0,1]}}    ' + b"x",
        b"\x80\x04\x95" + b"c__builtin__\neval\n",
    ],
    ids=["empty", "header-of-2^64", "header-of-2^40", "no-tensor", "tensor-of-2^40", "shape-and-offsets", "pickle"],
)
@pytest.mark.parametrize("name", [ROWS, SHARD, "dense.safetensors"])
def test_bytes_that_are_no_tensors(folder: Path, name: str, data: bytes) -> None:
    replace(folder, name, data)
    refused(folder, rf"{name}: |its files of [0-9]+ bytes are said to hold")


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("sketch", lambda tensor: tensor[:-1], "sketch is not one of 1024 buckets"),
        ("sketch", lambda tensor: tensor.int(), r"sketch is torch\.int32"),
        ("distinct", lambda tensor: tensor[:, :2], "sketch is not one of 1024 buckets"),
    ],
)
def test_a_sketch_that_lies(folder: Path, name: str, make: Callable[[Tensor], Tensor], message: str) -> None:
    forge(folder, SHARD, lambda tensors: tensors | {name: make(tensors[name]).contiguous()})
    refused(folder, rf"{SHARD}: .*{message}")


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("generator", lambda tensor: tensor[:-1], "generator"),
        ("losses", lambda tensor: tensor.float(), "losses is"),
        ("progressive/at", put(0, 10**6), "progressive is not a state"),
        ("progressive/values", put(0, float("nan")), "progressive is not a state"),
        ("progressive/at", lambda tensor: tensor[:-1], "progressive is not a state"),
    ],
)
def test_a_workers_state_that_lies(folder: Path, name: str, make: Callable[[Tensor], Tensor], message: str) -> None:
    forge(folder, SHARD, lambda tensors: tensors | {name: make(tensors[name]).contiguous()})
    refused(folder, rf"{SHARD}: .*{message}", scoring=False)


def test_a_dense_model_that_lies(folder: Path) -> None:
    name = next(iter(safetensors.torch.load_file(folder / "dense.safetensors")))
    for make, message in ((lambda tensor: tensor * float("nan"), "not finite"), (lambda tensor: tensor[:-1], "does not fit")):
        original = (folder / "dense.safetensors").read_bytes()
        forge(folder, "dense.safetensors", lambda tensors, make=make: tensors | {name: make(tensors[name]).contiguous()})
        refused(folder, rf"dense\.safetensors: .*{message}")
        replace(folder, "dense.safetensors", original)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda tensors: tensors | {"999/step": torch.zeros(())}, "is state of no parameter"),
        (lambda tensors: tensors | {"x/step": torch.zeros(())}, "is state of no parameter"),
        (lambda tensors: tensors | {"0/exp_avg": torch.zeros(1)}, "has shape"),
        (lambda tensors: tensors | {"0/exp_avg": tensors["0/exp_avg"] * float("inf")}, "not finite"),
        (lambda tensors: tensors | {"0/more": torch.zeros(())}, "not the state of adam"),
        (lambda tensors: {"0/step": tensors["0/step"]}, "not the state of adam"),
    ],
)
def test_an_optimizer_that_lies(folder: Path, make: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str) -> None:
    forge(folder, "optimizer.safetensors", make)
    refused(folder, rf"optimizer\.safetensors: .*{message}", scoring=False)


def test_a_history_longer_than_its_steps(folder: Path) -> None:
    forge(folder, "history.safetensors", lambda tensors: tensors | {"steps": tensors["steps"][:1]})
    refused(folder, r"history\.safetensors: a series is longer", scoring=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [x]\nb: *a\n", "aliases"),
        ("data: 1\n", "group of keys"),
        ("!!python/object/apply:os.system [ls]\n", "not YAML"),
        ("x: " + "[" * 100_000, "nested deeper"),
        ("- " * 100_000, "nested deeper"),
    ],
)
def test_a_configuration_that_lies(folder: Path, text: str, message: str) -> None:
    replace(folder, "config.yaml", text.encode())
    refused(folder, rf"config\.yaml: .*{message}")


def test_a_checkpoint_that_builds_on_itself(folder: Path) -> None:
    ident = json.loads((folder / MANIFEST).read_text())["content"]["id"]
    change(folder / MANIFEST, base={"folder": folder.name, "id": ident})
    refused(folder, "cannot build on it")


def test_a_checkpoint_whose_base_was_deleted(folder: Path) -> None:
    shutil.rmtree(folder.parent / "checkpoint_000000")
    refused(folder.parent / "checkpoint_000001", r"checkpoint_000000/manifest\.json: missing")


def test_a_checkpoint_whose_base_was_replaced(folder: Path) -> None:
    change(folder.parent / "checkpoint_000000" / MANIFEST, id="0" * 32)
    refused(folder.parent / "checkpoint_000001", "not the checkpoint that .* builds on; that one was deleted or replaced")


@pytest.mark.parametrize("make", [torch.zeros_like, lambda tensor: tensor[:0], lambda tensor: tensor.long()])
def test_an_increment_that_lies_about_what_it_changed(folder: Path, make: Callable[[Tensor], Tensor]) -> None:
    increment = folder.parent / "checkpoint_000002"
    forge(increment, SHARD, lambda tensors: tensors | {"changed": make(tensors["changed"]).contiguous()})
    refused(increment, "changed is|is already in the store|has the address of another row|never came")


def test_unharmed_it_loads(folder: Path) -> None:
    for each in folders(folder.parent):
        model = load_model(each)
        assert model.rows > 0
        assert model.rows < BUDGET
