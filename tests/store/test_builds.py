"""The library's builds for other vector instructions: whichever a machine loads, the rows are the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = """
import hashlib, numpy, torch
from test_pooled_step import FEATURES, BATCH, looked_up
from helpers import make_spec
from fiited_ray.store import VhpiShard, _extension
digest = hashlib.sha256()
for optimizer in ("rowwise_adagrad", "adam"):
    for storage in ("float32", "bfloat16"):
        shard = VhpiShard(make_spec(optimizer=optimizer, storage=storage))
        for step in range(1, 7):
            found, bags = looked_up(shard, step, False, True, step)
            digest.update(shard.pool(found, bags).numpy().tobytes())
            numbers = numpy.random.default_rng(step).standard_normal((BATCH, FEATURES, shard.spec.dim), numpy.float32)
            shard.update_pooled(found, torch.from_numpy(numbers), bags, None, 0.1, step)
            if step % 2 == 0:
                shard.resize(4.0)
        for tensor in shard.export_rows().tensors().values():
            digest.update(tensor.numpy().tobytes())
print(_extension.find("fiited").name, digest.hexdigest())
"""


def run(capability: str) -> list[str]:
    here = Path(__file__).parent
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": os.pathsep.join(map(str, (here, here.parent.parent)))}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="this machine has one build's instructions only")
def test_every_build_gives_the_same_rows_and_vectors_to_the_last_bit() -> None:
    wanted = {"default": "_C.so", "avx2": "_C_avx2.so"}
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        wanted["avx512"] = "_C_avx512.so"
    results = {capability: run(capability) for capability in wanted}
    assert {capability: result[0] for capability, result in results.items()} == wanted
    assert len({result[1] for result in results.values()}) == 1
