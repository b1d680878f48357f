"""Dense parts of recommender models: dense columns [B, C] and vectors [B, F, D] in, logits [B] out."""

from __future__ import annotations

from torch import nn

from fiited_ray.config import ModelConfig
from fiited_ray.models.dcn import DCNv2
from fiited_ray.models.dlrm import DLRM

__all__ = ["DLRM", "DCNv2", "build_model"]


def build_model(config: ModelConfig, dense_columns: int, features: int, dim: int) -> nn.Module:
    """The model a configuration names, initialised from torch's generator."""
    if config.kind == "dlrm":
        return DLRM(dense_columns, features, dim, config.bottom, config.top)
    return DCNv2(dense_columns, features, dim, config.cross_layers, config.cross_rank, config.top)
