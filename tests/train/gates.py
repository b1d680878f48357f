"""Runs whose workers wait at gates until a test opens them: faults come at a known step. A gate is a step and a number of workers.

Imported by Ray's workers; as a program it is a driver: python gates.py CONFIG FOLDER STEP-WORKERS ...
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any

import dying

from fiited_ray.train import loop, trainer, worker

_POLL_SECONDS = 0.05
_work = worker.work  # as it is; the driver's module is patched, this one's name is not


def work(setup: dict[str, Any]) -> None:
    """`worker.work`, whose workers wait before the step after a gate's. Plots are left out: they take longer than all the rest."""
    import ray.train
    from ray.train.v2._internal.execution.context import get_train_context

    from fiited_ray.train import plots_of_run

    folder, gates = Path(setup["gates"]), set(setup["closed"])
    rank, workers = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    step = loop.train_step

    def waiting(worker: loop.Worker, *arguments: Any) -> None:
        if (gate := f"{worker.step}-{workers}") in gates:
            (folder / f"at-{gate}-{rank}.new").write_text(str(os.getpid()))
            (folder / f"at-{gate}-{rank}.new").replace(folder / f"at-{gate}-{rank}")
            while not (folder / f"open-{gate}").exists():
                if get_train_context().preemption_context.preemption_info is not None:
                    (folder / f"told-{gate}-{rank}").touch()
                threading.Event().wait(_POLL_SECONDS)
        step(worker, *arguments)

    loop.train_step = waiting
    plots_of_run.log_plots = lambda *arguments: None
    if setup["deaths"] is not None:
        dying.die_in_each_phase(Path(setup["deaths"]))
    _work(setup)


def gated(folder: Path, closed: list[str], deaths: Path | None = None) -> Any:
    """A stand-in for TorchTrainer whose workers do `work`, and first die in each phase where `deaths` is a folder to remember that in."""
    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(dying)  # workers of a Ray that other tests started do not find it
    if __name__ != "__main__":  # what that holds goes by value anyway
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    made = trainer.ray.train.torch.TorchTrainer

    def trainer_(_: Any, *, train_loop_config: dict[str, Any], **arguments: Any) -> Any:
        ours = {"gates": str(folder), "closed": closed, "deaths": deaths and str(deaths)}
        return made(work, train_loop_config=train_loop_config | ours, **arguments)

    return trainer_


def main() -> None:
    from fiited_ray.config import load
    from fiited_ray.train.plan import make_plan

    config, folder, *closed = sys.argv[1:]
    trainer.ray.train.torch.TorchTrainer = gated(Path(folder), closed)
    trainer.run(make_plan(load(Path(config))), lambda text: print(text, flush=True))


if __name__ == "__main__":
    main()
