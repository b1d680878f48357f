"""Step time over a slow network: two workers, each in a network namespace of its own, and a link of a set rate between them.

    sudo python benchmarks/scaling_network.py --json docs/scaling.json [--rates 100 10000]

Linux, and the right to make namespaces. Synthetic data, gloo, no Ray. What a step loses to the slower link is the time that the bytes
sent take there: how much of that a narrower embedding saves is the point.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import scaling
import torch
import torch.distributed as dist

from fiited_ray.config import PolicyConfig
from fiited_ray.data import check_files, count_distinct
from fiited_ray.data.synthetic import write_synthetic
from fiited_ray.policy import Decision, RoundState, ShardReport, decide

BUDGETS = (None, 1 / 8, 1 / 64)
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = 29_500


class GroupDecider:
    """Every worker gathers all reports and decides for itself: no actor is needed."""

    def decide(self, number: int, report: ShardReport, state: RoundState) -> Decision | None:
        reports: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(reports, report)
        return decide(reports, state, PolicyConfig())


def work(rank: int, path: str, ids: int, output: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://{ADDRESSES[0]}:{PORT}", rank=rank, world_size=2)
    cases = [scaling.Case("network", 2, scaling.GLOBAL, share) for share in BUDGETS]
    runs = [scaling.measure(case, path, ids, rank, GroupDecider()) for case in cases]
    if rank == 0:
        output.write_text(json.dumps(runs))
    dist.destroy_process_group()


def at_rate(megabits: int, path: str, ids: int, folder: Path) -> list[dict[str, Any]]:
    """All budgets over a link of so many megabits a second, each way."""
    spaces = [f"fiited-{os.getpid()}-{rank}" for rank in range(2)]
    links = [f"fr{os.getpid()}{end}" for end in "ab"]
    output = folder / f"{megabits}.json"
    try:
        for space in spaces:
            _ip("netns", "add", space)
        _ip("link", "add", links[0], "netns", spaces[0], "type", "veth", "peer", "name", links[1], "netns", spaces[1])
        for space, link, address in zip(spaces, links, ADDRESSES, strict=True):
            _ip("-n", space, "address", "add", f"{address}/24", "dev", link)
            _ip("-n", space, "link", "set", "lo", "up")
            _ip("-n", space, "link", "set", link, "up")
            shape = ("rate", f"{megabits}mbit", "burst", "256kb", "latency", "100ms")
            subprocess.run(["tc", "-n", space, "qdisc", "add", "dev", link, "root", "tbf", *shape], check=True)
        workers = []
        for rank, (space, link) in enumerate(zip(spaces, links, strict=True)):
            command = ["ip", "netns", "exec", space, sys.executable, __file__, "--worker", str(rank), path, str(ids), str(output)]
            workers.append(subprocess.Popen(command, env=os.environ | {"GLOO_SOCKET_IFNAME": link}))
        try:
            failed = [worker.wait() != 0 for worker in workers]
            if any(failed):
                raise SystemExit("a worker failed; its error stands above")
        finally:
            for worker in workers:
                worker.kill()
    finally:
        for space in spaces:
            subprocess.run(["ip", "netns", "delete", space], check=False)
    runs: list[dict[str, Any]] = json.loads(output.read_text())
    return [run | {"megabits": megabits} for run in runs]


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def main() -> int:
    if sys.argv[1:2] == ["--worker"]:
        rank, path, ids, output = sys.argv[2:]
        work(int(rank), path, int(ids), Path(output))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rates", nargs="+", type=int, default=[100, 10_000], help="megabits a second")
    arguments = parser.parse_args()
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        path, _ = write_synthetic(Path(name), scaling.SPEC)
        config = scaling.configuration(str(path), scaling.Case("network", 2, scaling.GLOBAL, None))
        ids = count_distinct(check_files(config.data.train, config.data), config.data)
        for rate in arguments.rates:
            runs += at_rate(rate, str(path), ids, Path(name))
            print(f"{rate} Mb/s")
            scaling.print_runs(runs[-len(BUDGETS) :])
    results = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    arguments.json.write_text(json.dumps(results | {"network": runs}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
