"""Gradient coding against stragglers: codes, schedules over rounds, simulated run times."""

from flcore.aggregation._coding._codes import (
    CodeCondition,
    CyclicCode,
    FractionalRepetition,
    GradientCode,
    gradient_code,
)
from flcore.aggregation._coding._jobcode import JobCode
from flcore.aggregation._coding._runtime import Runtime, simulate_runtime
from flcore.aggregation._coding._schedule import JobSchedule, Task
from flcore.aggregation._coding._schemes import GCSchedule, MSGCSchedule, SRSGCSchedule
from flcore.aggregation._coding._stragglers import GilbertElliott, is_bursty

__all__ = [
    "CodeCondition",
    "CyclicCode",
    "FractionalRepetition",
    "GCSchedule",
    "GilbertElliott",
    "GradientCode",
    "JobCode",
    "JobSchedule",
    "MSGCSchedule",
    "Runtime",
    "SRSGCSchedule",
    "Task",
    "gradient_code",
    "is_bursty",
    "simulate_runtime",
]
