"""What a benchmark case is, and the registry of all of them.

A `Case` says in words and numbers what is measured and builds a `Workload`: inputs, contestants
and the check against the reference.  Case families live in one module each (`aggregation`,
`compression`, `rules`); to add a case, append a `Case` to the list `CASES` of its family, to add a
family, name its module in `FAMILIES`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flcore.bench.environment import last_level_cache_bytes, optional
from flcore.bench.timers import Contestant

__all__ = [
    "FAMILIES",
    "Case",
    "Setup",
    "Workload",
    "all_cases",
    "difference",
    "select",
]

FAMILIES = {
    "aggregation": "flcore.bench.aggregation",
    "compression": "flcore.bench.compression",
    "embedding": "flcore.bench.qembedding",
    "local_step": "flcore.bench.local_step",
    "losses": "flcore.bench.losses",
    "low_rank": "flcore.bench.low_rank",
    "moments": "flcore.bench.moments",
    "optim": "flcore.bench.perp_grad",
    "packets": "flcore.bench.packets",
    "qmatmul": "flcore.bench.qmatmul",
    "rules": "flcore.bench.rules",
    "secure": "flcore.bench.secure",
    "server": "flcore.bench.server_step",
    "simulation": "flcore.bench.simulation",
    "sparse": "flcore.bench.sparse",
    "stablemax": "flcore.bench.stablemax",
    "weights": "flcore.bench.weight_quant",
}


@dataclass(frozen=True)
class Setup:
    """Where and how large a case is built.

    Attributes
    ----------
    device : str
        "cpu" or "cuda".
    threads : int
    tiny : bool
        Use the small sizes: the check of a case in a moment; its times mean nothing.
    compiled : bool
        Include `torch.compile` peers, whose compilation takes seconds to a minute each.
    seed : int
    """

    device: str = "cpu"
    threads: int = 1
    tiny: bool = False
    compiled: bool = True
    seed: int = 0

    def rng(self) -> np.random.Generator:
        """Return a fresh generator: the same data for every case and contestant."""
        return np.random.default_rng(self.seed)

    def cold_slots(self, nbytes: int) -> int:
        """How many input sets of `nbytes` it takes so that none is still in cache when it returns.

        Four times the cache, because a cache shared with other cores or hosts may be larger for
        one of them than the share it reports.
        """
        if self.device == "cuda":
            from flcore.bench.cuda import cache_bytes

            cache = cache_bytes()
        else:
            cache = last_level_cache_bytes()
        return 2 if self.tiny else max(1, -(-4 * cache // nbytes))


@dataclass
class Workload:
    """A case with its inputs.

    Attributes
    ----------
    contestants : list of Contestant
        Ours first.
    matches : callable
        `matches(slot, array)` returns None for a right result, else what is wrong.
    bytes_moved : int
        Bytes the operation must move: each input read once, each output written once.
    absent : dict
        Peers that cannot take part, with the reason ("not installed", ...).
    slots : int
        Number of input sets, taken in turn by all calls.
    verify_slots : sequence of int
        Calls, from the start state, whose results are verified.
    """

    contestants: list[Contestant]
    matches: Callable[[int, np.ndarray], str | None]
    bytes_moved: int
    absent: dict[str, str] = field(default_factory=dict)
    slots: int = 1
    verify_slots: Sequence[int] = (0,)


@dataclass(frozen=True)
class Case:
    """One row of the benchmark.

    Attributes
    ----------
    name : str
        Identifier; what `flcore bench NAME` takes.
    family : str
        Key of `FAMILIES`.
    title : str
        Operation and size in words.
    formula : str
        The bytes that must move, as text.
    build : callable
        `build(setup, **sizes)` returns a `Workload`.
    sizes, tiny : mapping
        Arguments of `build` for a measurement and for a check in a moment.
    dtype : str
        Of the inputs.
    bound : str
        "read" when reading dominates (the read bandwidth is the limit), else "copy".
    hot : bool
        The inputs fit in cache, and an untimed call precedes each timed one.
    devices : tuple of str
        Where the case exists.
    needs : tuple of str
        Packages without which not even ours can run.
    note : str
        What a reader of the numbers has to know.
    """

    name: str
    family: str
    title: str
    formula: str
    build: Callable[..., Workload]
    sizes: Mapping[str, Any]
    tiny: Mapping[str, Any]
    dtype: str = "float32"
    bound: str = "read"
    hot: bool = False
    devices: tuple[str, ...] = ("cpu",)
    needs: tuple[str, ...] = ()
    note: str = ""

    def missing(self) -> list[str]:
        """Return what the case needs and is not there, such as "torch: not installed"."""
        reasons = {name: optional(name)[1] for name in self.needs}
        return [f"{name}: {reason}" for name, reason in reasons.items() if reason]

    def workload(self, setup: Setup) -> Workload:
        """Build inputs and contestants."""
        return self.build(setup, **(self.tiny if setup.tiny else self.sizes))


def all_cases() -> list[Case]:
    """Every registered case, in the order of the families and of their lists."""
    return [case for module in FAMILIES.values() for case in importlib.import_module(module).CASES]


def select(wanted: str | None = None, device: str | None = None) -> list[Case]:
    """Cases of a family, of one name, or all; only those of `device` if it is given.

    Raises
    ------
    ValueError
        If `wanted` is neither a family nor a case; the message lists both.
    """
    cases = all_cases()
    if wanted is not None and wanted not in FAMILIES and wanted not in {c.name for c in cases}:
        raise ValueError(
            f"family: expected one of {', '.join(FAMILIES)} or a case name, got {wanted!r}. "
            f"Cases: {', '.join(c.name for c in cases)}"
        )
    return [
        case
        for case in cases
        if wanted in (None, case.family, case.name) and (device is None or device in case.devices)
    ]


def difference(result: np.ndarray, expected: np.ndarray, allowed: np.ndarray | float) -> str | None:
    """Compare element by element; None, or a sentence about the worst element.

    Parameters
    ----------
    result, expected : (n,) arrays
    allowed : float or (n,) array
        Largest absolute difference that is right.  A NaN in `result` is always wrong.
    """
    if result.shape != expected.shape:
        return f"shape {result.shape}, expected {expected.shape}"
    error = np.abs(result.astype(np.float64) - expected)
    excess = error - allowed
    worst = int(np.argmax(np.where(np.isnan(excess), np.inf, excess)))
    if error[worst] <= np.broadcast_to(allowed, error.shape)[worst]:
        return None
    return f"element {worst} is {result[worst]:.6g}, expected {expected[worst]:.6g}"
