"""Aggregation rules: `rule(updates, weights=None)` gives an aggregate of the kind of one update."""

from flcore.aggregation._accumulator import Accumulator
from flcore.aggregation._adaptive import FedAdagrad, FedAdam, FedAvgM, FedYogi
from flcore.aggregation._bulyan import Bulyan
from flcore.aggregation._centered_clipping import CenteredClipping
from flcore.aggregation._coding import (
    CodeCondition,
    CyclicCode,
    FractionalRepetition,
    GCSchedule,
    GilbertElliott,
    GradientCode,
    JobCode,
    JobSchedule,
    MSGCSchedule,
    Runtime,
    SRSGCSchedule,
    Task,
    gradient_code,
    is_bursty,
    simulate_runtime,
)
from flcore.aggregation._coordinate import MeaMed, Median, Phocas, TrimmedMean
from flcore.aggregation._decision import Diagnosis
from flcore.aggregation._fedram import FedRAM
from flcore.aggregation._geometric_median import GeometricMedian
from flcore.aggregation._krum import Krum, MultiKrum
from flcore.aggregation._majority_vote import MajorityVote
from flcore.aggregation._mean import Mean
from flcore.aggregation._nova import FedNova, NovaSteps, nova_normalizer, nova_weights
from flcore.aggregation._participation import ParticipationWeights, fedau_step
from flcore.aggregation._preaggregators import ARC, NNM, Bucketing, Clipping
from flcore.aggregation._reweighting import (
    client_weights,
    differential_loss,
    excess_loss,
    task_weights,
)
from flcore.aggregation._rule import Pipeline
from flcore.aggregation._server import ServerOptimizer
from flcore.aggregation._sharded import Sharded
from flcore.aggregation._shards import SHARD_CHUNK, gather, shard, shard_bounds
from flcore.aggregation._subsets import CAF, MDA, SMEA, NearestNeighborAverage
from flcore.aggregation._subspace import FlagAggregator, PrincipalGradient
from flcore.aggregation._variance import VarianceCorrected

__all__ = [
    "ARC",
    "CAF",
    "MDA",
    "NNM",
    "SHARD_CHUNK",
    "SMEA",
    "Accumulator",
    "Bucketing",
    "Bulyan",
    "CenteredClipping",
    "Clipping",
    "CodeCondition",
    "CyclicCode",
    "Diagnosis",
    "FedAdagrad",
    "FedAdam",
    "FedAvgM",
    "FedNova",
    "FedRAM",
    "FedYogi",
    "FlagAggregator",
    "FractionalRepetition",
    "GCSchedule",
    "GeometricMedian",
    "GilbertElliott",
    "GradientCode",
    "JobCode",
    "JobSchedule",
    "Krum",
    "MSGCSchedule",
    "MajorityVote",
    "MeaMed",
    "Mean",
    "Median",
    "MultiKrum",
    "NearestNeighborAverage",
    "NovaSteps",
    "ParticipationWeights",
    "Phocas",
    "Pipeline",
    "PrincipalGradient",
    "Runtime",
    "SRSGCSchedule",
    "ServerOptimizer",
    "Sharded",
    "Task",
    "TrimmedMean",
    "VarianceCorrected",
    "client_weights",
    "differential_loss",
    "excess_loss",
    "fedau_step",
    "gather",
    "gradient_code",
    "is_bursty",
    "nova_normalizer",
    "nova_weights",
    "shard",
    "shard_bounds",
    "simulate_runtime",
    "task_weights",
]
