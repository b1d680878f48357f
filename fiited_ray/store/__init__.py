"""The VHPI store: virtually hashed, physically indexed rows of which each has its own width."""

from fiited_ray.store.layout import ShardSpec, bucket_range
from fiited_ray.store.reference import ReferenceShard
from fiited_ray.store.shard import Lookup, Rows, ShardStats, VhpiShard, backends

__all__ = ["Lookup", "ReferenceShard", "Rows", "ShardSpec", "ShardStats", "VhpiShard", "backends", "bucket_range"]
