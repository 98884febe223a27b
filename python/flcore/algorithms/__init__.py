"""Federated algorithms, one class a file, each short enough to hold against its paper.

`available()` lists them by name and `create()` makes one from a name, as the command line does.
How a round runs is not here: see `flcore.simulation`.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from flcore.algorithms.base import Algorithm
from flcore.algorithms.curricula import Curriculum
from flcore.algorithms.ddome import DDOME
from flcore.algorithms.fedau import FedAU
from flcore.algorithms.fedavg import FedAvg
from flcore.algorithms.fedbn import FedBN
from flcore.algorithms.fedcm import FedCM
from flcore.algorithms.feddyn import FedDyn
from flcore.algorithms.fedfree import FedFree
from flcore.algorithms.fedgamma import FedGamma
from flcore.algorithms.fedgps import FedGPS
from flcore.algorithms.fedgps_goal import FedGPSGoal
from flcore.algorithms.fedka import FedKA
from flcore.algorithms.fedld import FedLD
from flcore.algorithms.fednova import FedNova
from flcore.algorithms.fedopt import FedAdagrad, FedAdam, FedAvgM, FedYogi
from flcore.algorithms.fedprox import FedProx
from flcore.algorithms.fedram import FedRAM
from flcore.algorithms.fedram_proxy import FedRAMProxy
from flcore.algorithms.fedsam import FedSAM
from flcore.algorithms.fedsmoo import FedSMOO
from flcore.algorithms.fedspeed import FedSpeed
from flcore.algorithms.fedwon import FedWon
from flcore.algorithms.ggeur import GGEUR
from flcore.algorithms.layout import Layout
from flcore.algorithms.mofedsam import MoFedSAM
from flcore.algorithms.moon import Moon
from flcore.algorithms.router_ensemble import RouterEnsemble
from flcore.algorithms.scaffold import Scaffold
from flcore.algorithms.staleness import Staleness
from flcore.algorithms.state import (
    Arrival,
    Arrivals,
    Client,
    DataView,
    LocalResult,
    LocalWork,
    Payload,
    Server,
)
from flcore.algorithms.step import Ascent, DualAscent, Shift, StepSpec, UnitClip, local_steps
from flcore.errors import InvalidInputError

__all__ = [
    "DDOME",
    "GGEUR",
    "Algorithm",
    "Arrival",
    "Arrivals",
    "Ascent",
    "Client",
    "Curriculum",
    "DataView",
    "DualAscent",
    "FedAU",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedBN",
    "FedCM",
    "FedDyn",
    "FedFree",
    "FedGPS",
    "FedGPSGoal",
    "FedGamma",
    "FedKA",
    "FedLD",
    "FedNova",
    "FedProx",
    "FedRAM",
    "FedRAMProxy",
    "FedSAM",
    "FedSMOO",
    "FedSpeed",
    "FedWon",
    "FedYogi",
    "Layout",
    "LocalResult",
    "LocalWork",
    "MoFedSAM",
    "Moon",
    "Payload",
    "RouterEnsemble",
    "Scaffold",
    "Server",
    "Shift",
    "Staleness",
    "StepSpec",
    "UnitClip",
    "available",
    "create",
    "local_steps",
]

ALL = (
    FedAvg,
    Scaffold,
    FedAU,
    FedLD,
    FedCM,
    FedDyn,
    FedGamma,
    FedGPS,
    FedNova,
    FedAdagrad,
    FedAdam,
    FedAvgM,
    FedYogi,
    FedProx,
    FedSAM,
    FedSMOO,
    FedSpeed,
    MoFedSAM,
    FedBN,
    FedGPSGoal,
    FedKA,
    FedWon,
    Moon,
    Curriculum,
    GGEUR,
    Staleness,
    FedRAM,
    FedRAMProxy,
    DDOME,
    RouterEnsemble,
    FedFree,
)


def available() -> dict[str, type[Algorithm]]:
    """Name of every algorithm and its class.

    Examples
    --------
    >>> "fedavg" in available()
    True
    """
    return {cls.name: cls for cls in ALL}


def create(name: str, **options: Any) -> Algorithm:
    """Make the algorithm called `name`, in any case, with `options` as its fields.

    Raises
    ------
    InvalidInputError
        If there is no such algorithm, or it has no such option; the message lists those there are.
    """
    classes = available()
    if name.lower() not in classes:
        known = ", ".join(sorted(classes))
        raise InvalidInputError(f"algorithm: there is no {name!r}; choose one of: {known}")
    kind = classes[name.lower()]
    known_options = {field.name for field in fields(kind)}
    if unknown := sorted(set(options) - known_options):
        raise InvalidInputError(
            f"{unknown[0]}: {kind.name} has no such option; it has: "
            f"{', '.join(sorted(known_options))}"
        )
    return kind(**options)
