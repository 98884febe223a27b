"""Cases of the rules family: robust aggregation of 32 clients beside ByzFL and torch.

Every rule takes the rows where they lie.  Rules on distances read the data once for the inner
products or distances of the rows, and once more for the rows that have a share in the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flcore.bench.cases import Case, Setup, Workload
from flcore.bench.rules_data import make_clients
from flcore.bench.rules_expected import clip_radius
from flcore.bench.rules_peers import rule_peers
from flcore.bench.timers import Contestant
from flcore.bench.updates import to_numpy

__all__ = ["BY_COORDINATE", "CASES", "RULES", "RuleSpec", "build_rule"]

# Rules whose last read sorts the values of each coordinate.
BY_COORDINATE = ("median", "trimmed_mean", "meamed", "phocas", "bulyan", "nnm_trimmed_mean")


@dataclass(frozen=True)
class RuleSpec:
    """One rule as the benchmarks call it.

    Attributes
    ----------
    title : str
        How a user writes it, with `f` for the number of bad clients.
    make : callable
        `make(flcore.aggregation, f, numel)` returns the rule.
    two_reads : bool
        It looks at distances or norms first.
    """

    title: str
    make: Callable[[Any, int, int], Any]
    two_reads: bool = True


RULES: dict[str, RuleSpec] = {
    "mean": RuleSpec("Mean()", lambda a, f, d: a.Mean(), two_reads=False),
    "median": RuleSpec("Median()", lambda a, f, d: a.Median(), two_reads=False),
    "trimmed_mean": RuleSpec("TrimmedMean({f})", lambda a, f, d: a.TrimmedMean(f), two_reads=False),
    "meamed": RuleSpec("MeaMed({f})", lambda a, f, d: a.MeaMed(f), two_reads=False),
    "phocas": RuleSpec("Phocas({f})", lambda a, f, d: a.Phocas(f), two_reads=False),
    "krum": RuleSpec("Krum({f})", lambda a, f, d: a.Krum(f, convention="byzfl")),
    "multi_krum": RuleSpec("MultiKrum({f})", lambda a, f, d: a.MultiKrum(f, convention="byzfl")),
    "bulyan": RuleSpec("Bulyan({f})", lambda a, f, d: a.Bulyan(f)),
    "geometric_median": RuleSpec(
        "GeometricMedian(), 3 steps from zero", lambda a, f, d: a.GeometricMedian("byzfl")
    ),
    "centered_clipping": RuleSpec(
        "CenteredClipping(), 1 step from zero",
        lambda a, f, d: a.CenteredClipping(radius=clip_radius(d)),
    ),
    "mda": RuleSpec("MDA({f})", lambda a, f, d: a.MDA(f)),
    "smea": RuleSpec("SMEA({f})", lambda a, f, d: a.SMEA(f)),
    "caf": RuleSpec("CAF({f})", lambda a, f, d: a.CAF(f)),
    "nnm_trimmed_mean": RuleSpec(
        "NNM({f}) >> TrimmedMean({f})", lambda a, f, d: a.NNM(f) >> a.TrimmedMean(f)
    ),
}


def build_rule(setup: Setup, *, rule: str, clients: int, numel: int, f: int) -> Workload:
    """One robust rule on resident flat updates, `f` of them bad."""
    from flcore import aggregation

    data = make_clients(setup, clients, numel, f)
    spec = RULES[rule]
    ours = spec.make(aggregation, f, numel)
    rows = [list(matrix) for matrix in data.stacked]
    name = f"flcore {spec.title.format(f=f)}"
    first = Contestant(name, lambda slot: ours(rows[slot]), to_numpy, kind="ours")
    others, absent = rule_peers(rule, data, setup)
    second = data.expected(rule).combined if spec.two_reads else 0
    return Workload(
        contestants=[first, *others],
        matches=data.check(rule),
        bytes_moved=4 * (clients + second + 1) * numel,
        absent=absent,
        slots=len(data.stacked),
    )


_ONE = "4·(n + 1)·d: every update read once, the result written once"
_TWO = "4·(n + m + 1)·d: every update read, then the m that have a share, the result written once"
_NOTES = {
    "caf": "byzfl makes one power step from a random start where flcore takes the eigenvector; its "
    "results differ from call to call, up to the plain mean, and are verified by their root mean "
    "square alone.",
    "median": "`torch.median` returns the lower of the two middle values and is verified with that "
    "definition.",
    "krum": "flcore with `convention='byzfl'`: n - f - 1 neighbours.",
    "multi_krum": "flcore with `convention='byzfl'`: n - f - 1 neighbours, n - f rows averaged.",
}
# MDA and SMEA look for the best of C(n, f) subsets
_FEW = ("mda", "smea")


def _case(rule: str, spec: RuleSpec) -> Case:
    f = 2 if rule in _FEW else 6
    return Case(
        name=f"{rule}_32x1m",
        family="rules",
        title=f"{spec.title.format(f=f)}, 32 clients x 1,000,000",
        formula=_TWO if spec.two_reads else _ONE,
        build=build_rule,
        sizes={"rule": rule, "clients": 32, "numel": 1_000_000, "f": f},
        tiny={"rule": rule, "clients": 12, "numel": 1031, "f": 2},
        note=_NOTES.get(rule, ""),
    )


CASES = [_case(rule, spec) for rule, spec in RULES.items()]
