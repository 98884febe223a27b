"""The numbers of a run, as plain data: what the tables are made of and what the JSON holds.

`Report.to_dict` is the JSON document; its fields are those of the classes below, nested, and
`docs/benchmarks.md` shows one.  Times are in milliseconds, sizes in bytes, bandwidths in GB/s
(1e9 bytes per second), intervals are 95 %.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from flcore.bench.intervals import Interval

__all__ = ["SCHEMA", "CaseResult", "ContestantResult", "Report"]

SCHEMA = "flcore.bench/1"


@dataclass(frozen=True)
class ContestantResult:
    """One contestant of one case.

    Attributes
    ----------
    name : str
    kind : str
        "ours", "variant" (ours with other options) or "peer".
    status : str
        "timed", "absent" (cannot take part here) or "refused" (failed, or a wrong result).
    reason : str
        Why it is absent or refused; empty when timed.
    median_ms, low_ms, high_ms : float, optional
        The 50, 20 and 80 % quantiles of one call.
    rounds : int
        Rounds it took part in.
    few_rounds : bool
        It was too slow for its share of the time and got fewer rounds than the plan asks for.
    ratio : Interval, optional
        Its time over ours, paired within rounds: above 1 means that flcore is faster.
    verdict : str
        "flcore faster", "same" (the interval contains 1) or "flcore slower"; empty for ours.
    """

    name: str
    kind: str
    status: str = "timed"
    reason: str = ""
    median_ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    rounds: int = 0
    few_rounds: bool = False
    ratio: Interval | None = None
    verdict: str = ""


@dataclass(frozen=True)
class CaseResult:
    """One case: its facts, the roofline beside it, and its contestants, ours first.

    Attributes
    ----------
    name, family, title, dtype, formula, bound, note : str
        As in `flcore.bench.cases.Case`.
    device : str
    threads : int
    isa : str
        Instruction-set level of flcore's kernels, or "cuda".
    state : str
        "hot" or "cold".
    status : str
        "measured", "not run" (does not exist here) or "failed" (an error, or a wrong result).
    reason : str
        Why it was not measured.
    bytes_moved : int
        Bytes one call must move.
    gbs : float
        `bytes_moved` over the median time of ours.
    read_gbs, copy_gbs : float
        Bandwidths measured in the rounds of this case.
    percent_of_read, percent_of_copy : Interval
        Ours relative to them, paired within rounds.
    contestants : list of ContestantResult
    """

    name: str
    family: str
    title: str
    dtype: str
    formula: str
    bound: str
    note: str
    device: str
    threads: int
    isa: str
    state: str
    status: str = "measured"
    reason: str = ""
    bytes_moved: int = 0
    gbs: float | None = None
    read_gbs: float | None = None
    copy_gbs: float | None = None
    percent_of_read: Interval | None = None
    percent_of_copy: Interval | None = None
    contestants: list[ContestantResult] = field(default_factory=list)

    @property
    def ours(self) -> ContestantResult | None:
        """The yardstick of the case; None if it was not measured."""
        return next((c for c in self.contestants if c.kind == "ours"), None)

    def best_peer(self) -> ContestantResult | None:
        """Return the fastest peer that was timed."""
        timed = [c for c in self.contestants if c.kind == "peer" and c.median_ms is not None]
        return min(timed, key=lambda c: c.median_ms or 0.0, default=None)


@dataclass(frozen=True)
class Report:
    """A whole run.

    Attributes
    ----------
    created : str
        UTC time, ISO 8601.
    build_info : dict
        `flcore.build_info()`.
    machine : dict
        Processor, caches, system, Python; on a GPU also its name and sizes.
    versions : dict
        Package versions; None where not installed.
    settings : dict
        Device, thread counts given to every library, tiny or not, and the plan.
    cases : list of CaseResult
    """

    created: str
    build_info: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str | None]
    settings: dict[str, Any]
    cases: list[CaseResult]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON document as nested dicts and lists."""
        return {"schema": SCHEMA, **asdict(self)}

    def failed(self) -> list[CaseResult]:
        """Return the cases in which ours could not be measured although it should have been."""
        return [c for c in self.cases if c.status == "failed"]
