"""Federated training in one process, on real data and through real packets: `run`.

torch and the other packages of the extra `train` are imported when a run starts, not before.
"""

from __future__ import annotations

from flcore.simulation.datasets import Dataset, load_dataset
from flcore.simulation.dealing import PARTITIONS, Partition, deal, partition_from_text
from flcore.simulation.engine import Observer, Simulation, run
from flcore.simulation.errors import CheckpointError, DivergedError
from flcore.simulation.history import History, RoundRecord
from flcore.simulation.models import MODELS, build_model, split_features
from flcore.simulation.partition import dirichlet_partition, iid_partition
from flcore.simulation.partition_table import describe_partition
from flcore.simulation.plays import load_plays
from flcore.simulation.settings import Settings

__all__ = [
    "MODELS",
    "PARTITIONS",
    "CheckpointError",
    "Dataset",
    "DivergedError",
    "History",
    "Observer",
    "Partition",
    "RoundRecord",
    "Settings",
    "Simulation",
    "build_model",
    "deal",
    "describe_partition",
    "dirichlet_partition",
    "iid_partition",
    "load_dataset",
    "load_plays",
    "partition_from_text",
    "run",
    "split_features",
]
