"""What users run today for robust aggregation: ByzFL on torch and on NumPy, and torch itself.

Tensors are views of the same memory, and the stacked matrix that every peer wants is theirs free of
charge.  "torch ..." peers are what a careful user would write: distances from one product of the
stacked matrix with itself, selection by `torch.sort`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flcore.bench.byzfl_peer import byzfl_aggregators
from flcore.bench.cases import Setup
from flcore.bench.environment import BLAS_SPIN_S, optional
from flcore.bench.field import Absent, Field
from flcore.bench.rules_data import Clients
from flcore.bench.rules_expected import Expected, Rows, clip_radius
from flcore.bench.timers import Contestant
from flcore.reference.select import order_statistic

__all__ = ["rule_peers"]

# ByzFL's filter makes one power step from a random start.  Its weights are random, and when the
# start happens to be nearly orthogonal to the widest direction it returns the plain mean, in which
# the shift of the bad rows is 3 * 6 / 32 = 0.56 in every coordinate.
CAF_RMS = 0.7

# How ByzFL spells a rule: from (module, f, numel) to a fresh callable of the stacked matrix.
_BYZFL: dict[str, tuple[str, Callable[[Any, int, int], Callable[[Any], Any]]]] = {
    "mean": ("Average", lambda b, f, d: b.Average()),
    "median": ("Median", lambda b, f, d: b.Median()),
    "trimmed_mean": ("TrMean", lambda b, f, d: b.TrMean(f)),
    "meamed": ("Meamed", lambda b, f, d: b.Meamed(f)),
    "krum": ("Krum", lambda b, f, d: b.Krum(f)),
    "multi_krum": ("MultiKrum", lambda b, f, d: b.MultiKrum(f)),
    "geometric_median": ("GeometricMedian", lambda b, f, d: b.GeometricMedian()),
    # keeps its result as the next centre: a new one for each call
    "centered_clipping": (
        "CenteredClipping",
        lambda b, f, d: lambda x: b.CenteredClipping(tau=clip_radius(d))(x),
    ),
    "mda": ("MDA", lambda b, f, d: b.MDA(f)),
    "caf": ("CAF", lambda b, f, d: b.CAF(f)),
    "nnm_trimmed_mean": ("NNM, TrMean", lambda b, f, d: lambda x: b.TrMean(f)(b.NNM(f)(x))),
}


def rule_peers(rule: str, data: Clients, setup: Setup) -> tuple[list[Contestant], Absent]:
    """Peers of one rule, and the reasons of those that cannot run."""
    field = Field()
    _byzfl(field, rule, data)
    if rule in _TORCH:
        torch, reason = optional("torch")
        if torch is None:
            field.leave_out(reason, "torch")
        else:
            tensors = [torch.from_numpy(matrix) for matrix in data.stacked]
            _TORCH[rule](field, torch, tensors, data, setup)
    if rule == "trimmed_mean":
        _scipy(field, data)
    return field.peers, field.absent


# ---- ByzFL ---------------------------------------------------------------------------------------


def _byzfl(field: Field, rule: str, data: Clients) -> None:
    if rule == "smea":
        return field.leave_out("random, and reads all rows for each subset", "byzfl SMEA")
    if rule not in _BYZFL:
        return field.leave_out("has no such rule", "byzfl")
    name, make = _BYZFL[rule]
    names = f"byzfl {name}, torch", f"byzfl {name}, NumPy"
    byzfl, reason = byzfl_aggregators()
    if byzfl is None:
        return field.leave_out(reason, *names)
    if rule == "nnm_trimmed_mean" and not _gather_fits(data):
        return field.leave_out("its n (n - f) d gathered values exceed the memory", *names)
    torch: Any = optional("torch")[0]  # byzfl does not import without it
    apply = make(byzfl, data.bad, data.numel)
    check = data.loose_check(rule, CAF_RMS) if rule == "caf" else None
    tensors = [torch.from_numpy(matrix) for matrix in data.stacked]
    field.add(names[0], lambda slot: apply(tensors[slot]), check)
    # of its NumPy paths only that of the filter calls the BLAS
    rest_s = BLAS_SPIN_S if rule == "caf" else 0.0
    field.add(names[1], lambda slot: apply(data.stacked[slot]), check, rest_s)


def _gather_fits(data: Clients) -> bool:
    """Whether half of the free memory holds `vectors[indices]` of ByzFL's nearest-neighbour mix."""
    n = len(data.stacked[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return True
    free_kib = next((int(s.split()[1]) for s in lines if s.startswith("MemAvailable")), None)
    return free_kib is None or 4 * n * (n - data.bad) * data.numel < free_kib * 1024 / 2


# ---- torch ---------------------------------------------------------------------------------------


def _mean(field: Field, torch: Any, xs: list[Any], data: Clients, setup: Setup) -> None:
    field.add("torch x.mean(0)", lambda slot: xs[slot].mean(0))


def _median(field: Field, torch: Any, xs: list[Any], data: Clients, setup: Setup) -> None:
    def lower(rows: Rows, f: int) -> Expected:
        return Expected(order_statistic(rows.sample, "median", median="lower"))

    check = data.check("median", lower)
    field.add("torch x.median(0) (lower)", lambda slot: xs[slot].median(0).values, check)


def _trimmed_mean(field: Field, torch: Any, xs: list[Any], data: Clients, setup: Setup) -> None:
    f, n = data.bad, len(xs[0])
    field.add(
        "torch x.sort(0)[f:n-f].mean(0)", lambda slot: xs[slot].sort(0).values[f : n - f].mean(0)
    )


def _distances(torch: Any, x: Any) -> Any:
    """Squared distances from one product; exactly zero on the diagonal."""
    gram = x @ x.T
    norms = gram.diagonal()
    return (norms[:, None] + norms[None, :] - 2 * gram).clamp_(min=0).fill_diagonal_(0)


def _scores(torch: Any, x: Any, f: int) -> Any:
    return _distances(torch, x).sort(1).values[:, 1 : len(x) - f].sum(1)


def _krum(field: Field, torch: Any, xs: list[Any], data: Clients, setup: Setup) -> None:
    def krum(slot: int) -> Any:
        x = xs[slot]
        return x[_scores(torch, x, data.bad).argmin()].clone()

    field.add("torch, distances by x @ x.T", krum)


def _multi_krum(field: Field, torch: Any, xs: list[Any], data: Clients, setup: Setup) -> None:
    def multi_krum(slot: int) -> Any:
        x = xs[slot]
        kept = _scores(torch, x, data.bad).topk(len(x) - data.bad, largest=False).indices
        return x[kept].mean(0)

    field.add("torch, distances by x @ x.T", multi_krum)


def _geometric_median(field: Field, torch: Any, xs: list[Any], data: Clients, setup: Setup) -> None:
    def weiszfeld(x: Any) -> Any:
        z = torch.zeros_like(x[0])
        for _ in range(3):
            weights = 1 / torch.linalg.vector_norm(x - z, dim=1).clamp(min=0.1)
            z = (weights / weights.sum()) @ x
        return z

    field.add("torch, 3 steps", lambda slot: weiszfeld(xs[slot]))
    name = "torch.compile of 3 steps"
    if not setup.compiled:
        return field.leave_out("left out on request", name)
    fused = torch.compile(weiszfeld)
    field.add(name, lambda slot: fused(xs[slot]))


def _centered_clipping(
    field: Field, torch: Any, xs: list[Any], data: Clients, setup: Setup
) -> None:
    tau = clip_radius(data.numel)

    def clip(x: Any) -> Any:
        scale = (tau / torch.linalg.vector_norm(x, dim=1)).clamp(max=1)
        return (scale / len(x)) @ x

    field.add("torch, norms and weights @ x", lambda slot: clip(xs[slot]))
    name = "torch.compile of the same"
    if not setup.compiled:
        return field.leave_out("left out on request", name)
    fused = torch.compile(clip)
    field.add(name, lambda slot: fused(xs[slot]))


def _nnm_trimmed_mean(field: Field, torch: Any, xs: list[Any], data: Clients, setup: Setup) -> None:
    f = data.bad

    def mix_and_trim(slot: int) -> Any:
        x = xs[slot]
        n = len(x)
        nearest = _distances(torch, x).topk(n - f, dim=1, largest=False).indices
        mix = x.new_zeros(n, n).scatter_(1, nearest, 1 / (n - f))
        return (mix @ x).sort(0).values[f : n - f].mean(0)

    field.add("torch, x @ x.T, mix @ x, sort(0)", mix_and_trim)


_TORCH: dict[str, Callable[[Field, Any, list[Any], Clients, Setup], None]] = {
    "mean": _mean,
    "median": _median,
    "trimmed_mean": _trimmed_mean,
    "krum": _krum,
    "multi_krum": _multi_krum,
    "geometric_median": _geometric_median,
    "centered_clipping": _centered_clipping,
    "nnm_trimmed_mean": _nnm_trimmed_mean,
}


# ---- SciPy ---------------------------------------------------------------------------------------


def _scipy(field: Field, data: Clients) -> None:
    name = "scipy.stats.trim_mean"
    stats, reason = optional("scipy.stats")
    if stats is None:
        return field.leave_out(reason, name)
    # the portion is rounded down to whole rows: aim at the middle between f and f + 1
    portion = (data.bad + 0.5) / len(data.stacked[0])
    field.add(name, lambda slot: stats.trim_mean(data.stacked[slot], portion, axis=0))
