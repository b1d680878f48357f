"""Checkpoints of the device's store, emulated on the CPU: taken, resumed, and carried from one device to the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import BUDGET, config, differences, folders, opened, resumed, run, solo, state_of

from fiited_ray.store import _extension

MODEL = {"kind": "dcnv2", "bottom": (8,), "top": (8,)}  # DLRM's interaction on the CPU's tensors is an operator of the CPU's library


@contextmanager
def on(namespace: str) -> Iterator[None]:
    """With this library's operators on the CPU's tensors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_extension.NAMESPACES, "cpu", namespace)
        yield


@pytest.mark.parametrize(
    "groups",
    [
        {},
        {"embedding": {"optimizer": "adam", "dtype": "bfloat16"}, "policy": {"decay": 0.3}, "train": {"overlap": 1}},
    ],
    ids=["rowwise", "adam-bfloat16-decay-overlap"],
)
def test_a_resumed_run_ends_as_the_uninterrupted_one_to_the_last_bit(tmp_path: Path, groups: dict[str, dict[str, Any]]) -> None:
    made = config(model=MODEL, **groups)
    with on("fiited_emulated"):
        whole = solo(made)
        run(whole, tmp_path / "whole")
        assert whole.shard.stats().asked_bytes > BUDGET  # not all rows found room
        checkpoints = folders(tmp_path / "whole")[:-1]
        assert any(opened(each).base for each in checkpoints)
        for each in (checkpoints[1], checkpoints[-1]):
            worker = resumed(each, made)
            run(worker, tmp_path / f"from-{each.name}")
            assert differences(state_of(whole), state_of(worker)) == []


@pytest.mark.parametrize(("one", "other"), [("fiited", "fiited_emulated"), ("fiited_emulated", "fiited")])
def test_a_run_goes_on_from_a_checkpoint_of_another_device(tmp_path: Path, one: str, other: str) -> None:
    made = config(model=MODEL)
    with on(one):
        whole = solo(made)
        run(whole, tmp_path / "whole")
    before, last = folders(tmp_path / "whole")[1], folders(tmp_path / "whole")[-1]
    with on(other):
        assert differences(state_of(whole), state_of(resumed(last, made))) == []
        worker = resumed(before, made)
        run(worker, tmp_path / "again")
    ours, theirs = whole.shard.export_rows().tensors(), worker.shard.export_rows().tensors()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name])
    assert whole.shard.stats().planned == worker.shard.stats().planned
    torch.testing.assert_close(worker.history.values["train/loss"], whole.history.values["train/loss"])
