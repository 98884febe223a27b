"""Preparation of models for low bits: AWQ for weights, OS+ for activations too.

Both rewrite a float model into one that computes the same and rounds better, for any
`torch.nn.Module` described by a few lines::

    groups = [
        ScalingGroup("norm1", ("attn.q", "attn.k", "attn.v"), inspect="attn"),
        ScalingGroup("mlp.act", "mlp.fc2"),
    ]
    awq(model, groups, batches, "int4-asym")

Needs torch: ``pip install 'flcore[torch]'``.
"""

from flcore.quantization.preparation._awq import (
    AWQReport,
    ScaleSearch,
    awq,
    awq_scale,
    merge_searches,
    search_scales,
)
from flcore.quantization.preparation._capture import collect_statistics
from flcore.quantization.preparation._clip import Clip, clip_linear, clip_search
from flcore.quantization.preparation._fold import Migrated, fold_scales
from flcore.quantization.preparation._grid import ActivationGrid, UniformGrid
from flcore.quantization.preparation._groups import ScalingGroup
from flcore.quantization.preparation._losses import Gated, JointAttention, gram, gram_loss
from flcore.quantization.preparation._os_plus import (
    Migration,
    OSPlusReport,
    migration_scale,
    os_plus,
    search_migrations,
    thresholds,
)
from flcore.quantization.preparation._simulate import simulated
from flcore.quantization.preparation._statistics import ActivationStatistics, merge_statistics

__all__ = [
    "AWQReport",
    "ActivationGrid",
    "ActivationStatistics",
    "Clip",
    "Gated",
    "JointAttention",
    "Migrated",
    "Migration",
    "OSPlusReport",
    "ScaleSearch",
    "ScalingGroup",
    "UniformGrid",
    "awq",
    "awq_scale",
    "clip_linear",
    "clip_search",
    "collect_statistics",
    "fold_scales",
    "gram",
    "gram_loss",
    "merge_searches",
    "merge_statistics",
    "migration_scale",
    "os_plus",
    "search_migrations",
    "search_scales",
    "simulated",
    "thresholds",
]
