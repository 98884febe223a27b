"""How the robust rules grow with the number of clients, beside what limits them.

Two limits stand beside each time, both measured in the same rounds and with the same threads:

* memory: the bytes that the rule must read and write, at the read bandwidth;
* arithmetic: compare-exchanges of the sorting network, squared differences among n (n - 1) / 2
  pairs of rows and products of a mixing matrix, each at the rate that the vector units reach in
  registers.  Plain weighted sums, one product a value read, are left out: memory is their limit.

A rule that is close to the larger of the two has nothing left to gain from a better kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from typing import Any

from flcore.bench import environment, roofline
from flcore.bench.cases import Setup
from flcore.bench.intervals import Interval, PairedTimes
from flcore.bench.rules import RULES
from flcore.bench.rules_data import Clients, make_clients
from flcore.bench.timers import Contestant, HostTimer, Plan, run_paired
from flcore.bench.updates import to_numpy
from flcore.ops.select import comparators

__all__ = ["CLIENTS", "SCHEMA", "Point", "Scaling", "run_scaling"]

SCHEMA = "flcore.bench.scaling/1"

CLIENTS = (8, 16, 32, 64, 100)
NUMEL = 1_000_000
TINY_CLIENTS, TINY_NUMEL = (8, 12), 1031

# A fifth of the clients are bad, and rules are told so.  MDA gets 2, because its search grows with
# 2^f, and SMEA is left out: it solves C(n, f) eigenproblems, and the vectors no longer matter.
_BAD = {"mda": lambda n: 2}
_LEFT_OUT = ("smea",)

_STATISTICS = {
    "median": "median",
    "trimmed_mean": "trimmed_mean",
    "meamed": "near_median",
    "phocas": "near_trimmed",
}


def bad_clients(rule: str, n: int) -> int:
    """Return the `f` that `rule` gets for n clients."""
    return _BAD.get(rule, lambda clients: clients // 5)(n)


def operations(rule: str, n: int, f: int) -> dict[str, int]:
    """Operations that `rule` must do for each coordinate, by the probe that measures their rate."""
    if rule == "mean":
        return {}
    if rule in _STATISTICS:
        return {roofline.EXCHANGES: comparators(n, _STATISTICS[rule])}
    if rule == "centered_clipping":  # one step needs the norms alone
        return {roofline.PRODUCTS: n}
    pairs = {roofline.DIFFERENCES: n * (n - 1) // 2}
    if rule == "nnm_trimmed_mean":
        mixing = {roofline.PRODUCTS: n * (n - f)}
        return pairs | mixing | {roofline.EXCHANGES: comparators(n, "trimmed_mean")}
    if rule == "bulyan":
        return pairs | {roofline.EXCHANGES: comparators(n - 2 * f, "near_median")}
    return pairs


@dataclass(frozen=True)
class Point:
    """One rule with one number of clients.

    Attributes
    ----------
    rule : str
        Key of `flcore.bench.rules.RULES`.
    title : str
        As a user writes it.
    clients, numel, f : int
    median_ms, low_ms, high_ms : float
        The 50, 20 and 80 % quantiles of one call.
    rounds : int
    ns_per_value : float
        Median time over ``clients * numel``.
    bytes_moved : int
        Bytes one call must move.
    operations : dict
        For each coordinate: exchanges, differences, products.
    memory_ns, arithmetic_ns : float
        The two limits, per value.
    memory_share, arithmetic_share : Interval, optional
        The limits over the measured time, paired within rounds; 1 is as fast as it can be.
    """

    rule: str
    title: str
    clients: int
    numel: int
    f: int
    median_ms: float
    low_ms: float
    high_ms: float
    rounds: int
    ns_per_value: float
    bytes_moved: int
    operations: dict[str, int]
    memory_ns: float
    arithmetic_ns: float
    memory_share: Interval
    arithmetic_share: Interval | None

    @property
    def limit(self) -> str:
        """Return "memory" or "arithmetic", whichever takes longer."""
        return "memory" if self.memory_ns >= self.arithmetic_ns else "arithmetic"

    @property
    def share(self) -> Interval:
        """Share of the limit that takes longer."""
        if self.limit == "memory" or self.arithmetic_share is None:
            return self.memory_share
        return self.arithmetic_share


@dataclass(frozen=True)
class Scaling:
    """A whole run.

    Attributes
    ----------
    created, build_info, machine, versions, settings
        As in `flcore.bench.results.Report`.
    points : list of Point
        For each number of clients, all rules.
    """

    created: str
    build_info: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str | None]
    settings: dict[str, Any]
    points: list[Point]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON document as nested dicts and lists."""
        points = [{**asdict(point), "limit": point.limit} for point in self.points]
        return {"schema": SCHEMA, **asdict(self), "points": points}


def run_scaling(
    setup: Setup,
    plan: Plan | None = None,
    progress: Callable[[int, int, str, str, float], None] | None = None,
    rules: Sequence[str] | None = None,
) -> Scaling:
    """Measure every rule for every number of clients, all rules in turns.

    Parameters
    ----------
    setup : Setup
        Host only.
    plan : Plan, optional
        Its budget is for one number of clients.
    progress : callable, optional
        `progress(number, count, name, stage, fraction)`.
    rules : sequence of str, optional
        Keys of `flcore.bench.rules.RULES`; all but SMEA unless given.

    Raises
    ------
    RuntimeError
        With a debug build, unless `setup.tiny`, or when the result of a rule is wrong.
    """
    build_info = environment.build_to_time(setup.tiny)
    plan = plan or Plan()
    # all rules and probes in the same rounds, instead of more rounds for the fast ones
    plan = replace(plan, max_rounds=min(plan.rounds, plan.max_rounds))
    tell = progress or (lambda *state: None)
    chosen = [rule for rule in RULES if rule not in _LEFT_OUT] if rules is None else list(rules)
    counts = TINY_CLIENTS if setup.tiny else CLIENTS
    points: list[Point] = []
    with environment.threads_set_to(setup.threads) as given:
        limits = _Limits(setup)
        for number, n in enumerate(counts):
            name = f"{n} clients"
            tell(number, len(counts), name, "prepare inputs", 0.0)

            def tell_stage(stage: str, done: float, at: int = number, what: str = name) -> None:
                tell(at, len(counts), what, stage, done)

            points += _measure(setup, plan, limits, chosen, n, tell_stage)
    return Scaling(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        build_info=build_info,
        machine=environment.machine(setup.device),
        versions=environment.versions(),
        settings={"threads": given, "tiny": setup.tiny, "plan": asdict(plan)},
        points=points,
    )


class _Limits:
    """Probes of memory and arithmetic."""

    def __init__(self, setup: Setup) -> None:
        nbytes = 2**20 if setup.tiny else roofline.PROBE_BYTES
        memory = roofline.probes("cpu", setup.threads, nbytes)
        arithmetic = roofline.arithmetic(setup.threads, 1000 if setup.tiny else 200_000)
        read = tuple(c for c in memory.contestants if c.name == roofline.READ)
        self.contestants = (*read, *arithmetic.contestants)
        self.amount_of = memory.amount_of | arithmetic.amount_of

    def calls(self, amounts: dict[str, int]) -> dict[str, float]:
        """Turn amounts into calls of the probes."""
        return {name: amount / self.amount_of[name] for name, amount in amounts.items()}


def _measure(
    setup: Setup,
    plan: Plan,
    limits: _Limits,
    rules: Sequence[str],
    n: int,
    progress: Callable[[str, float], None],
) -> list[Point]:
    """Time all `rules` on the same n updates."""
    numel = TINY_NUMEL if setup.tiny else NUMEL
    data = make_clients(setup, n, numel, bad_clients("", n))
    contestants = [_contestant(rule, data, n) for rule in rules]
    times = run_paired(
        [*contestants, *limits.contestants],
        lambda slot, result: None,  # each contestant has a check of its own
        plan=plan,
        timer=HostTimer(),
        slots=len(data.stacked),
        progress=progress,
    )
    if times.refused:
        problems = "; ".join(f"{name}: {reason}" for name, reason in times.refused.items())
        raise RuntimeError(f"{n} clients: {problems}")
    return [_point(rule, data, n, times, limits) for rule in rules]


def _contestant(rule: str, data: Clients, n: int) -> Contestant:
    from flcore import aggregation

    f = bad_clients(rule, n)
    make = RULES[rule].make(aggregation, f, data.numel)
    rows = [list(matrix) for matrix in data.stacked]
    return Contestant(
        RULES[rule].title.format(f=f),
        lambda slot: make(rows[slot]),
        to_numpy,
        matches=data.check(rule, f=f),
        kind="ours",
    )


def _point(rule: str, data: Clients, n: int, times: PairedTimes, limits: _Limits) -> Point:
    f, numel = bad_clients(rule, n), data.numel
    title = RULES[rule].title.format(f=f)
    second = data.expected(rule, f=f).combined if RULES[rule].two_reads else 0
    bytes_moved = 4 * (n + second + 1) * numel
    per_coordinate = operations(rule, n, f)
    memory = limits.calls({roofline.READ: bytes_moved})
    arithmetic = limits.calls({name: k * numel for name, k in per_coordinate.items()})

    def nanoseconds(calls: dict[str, float]) -> float:
        seconds = sum(k * times.quantiles(name)[1] for name, k in calls.items())
        return seconds * 1e9 / (n * numel)

    low, median, high = (seconds * 1e3 for seconds in times.quantiles(title))
    return Point(
        rule=rule,
        title=title,
        clients=n,
        numel=numel,
        f=f,
        median_ms=median,
        low_ms=low,
        high_ms=high,
        rounds=times.rounds(title),
        ns_per_value=median * 1e6 / (n * numel),
        bytes_moved=bytes_moved,
        operations=per_coordinate,
        memory_ns=nanoseconds(memory),
        arithmetic_ns=nanoseconds(arithmetic),
        memory_share=times.share(title, memory),
        arithmetic_share=times.share(title, arithmetic) if arithmetic else None,
    )
