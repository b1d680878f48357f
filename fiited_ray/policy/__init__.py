"""What is worth its bytes: importance -> histogram -> threshold -> width. Pure functions; no Ray, no I/O."""

from fiited_ray.policy.decision import Decision, RoundState, ShardReport, decide, shard_limit, smallest_budget
from fiited_ray.policy.histogram import BINS, bin_edges, importance_bin
from fiited_ray.policy.schedule import RoundSchedule
from fiited_ray.policy.threshold import find_threshold, levels_of, planned_bytes, width_of

__all__ = [
    "BINS",
    "Decision",
    "RoundSchedule",
    "RoundState",
    "ShardReport",
    "bin_edges",
    "decide",
    "find_threshold",
    "importance_bin",
    "levels_of",
    "planned_bytes",
    "shard_limit",
    "smallest_budget",
    "width_of",
]
