"""Aggregation rules: `rule(updates, weights=None)` gives an aggregate of the kind of one update."""

from flcore.aggregation._accumulator import Accumulator
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
from flcore.aggregation._fedram import FedRAM
from flcore.aggregation._mean import Mean
from flcore.aggregation._nova import FedNova, NovaSteps, nova_normalizer, nova_weights
from flcore.aggregation._participation import ParticipationWeights, fedau_step
from flcore.aggregation._reweighting import (
    client_weights,
    differential_loss,
    excess_loss,
    task_weights,
)
from flcore.aggregation._variance import VarianceCorrected

__all__ = [
    "Accumulator",
    "CodeCondition",
    "CyclicCode",
    "FedNova",
    "FedRAM",
    "FractionalRepetition",
    "GCSchedule",
    "GilbertElliott",
    "GradientCode",
    "JobCode",
    "JobSchedule",
    "MSGCSchedule",
    "Mean",
    "NovaSteps",
    "ParticipationWeights",
    "Runtime",
    "SRSGCSchedule",
    "Task",
    "VarianceCorrected",
    "client_weights",
    "differential_loss",
    "excess_loss",
    "fedau_step",
    "gradient_code",
    "is_bursty",
    "nova_normalizer",
    "nova_weights",
    "simulate_runtime",
    "task_weights",
]
