"""Rules on updates whose coordinates are spread over the processes of torch.distributed.

Each process reads its own coordinates of all n clients. What it finds about their geometry are
exact integer sums, which add up over the processes to the bits that one process would have found;
the n x n problem is then solved once, and each process makes its part of the aggregate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from flcore import _arrays, _native, _variants
from flcore.aggregation._call import Call
from flcore.aggregation._decision import Decision, Diagnosis
from flcore.aggregation._geometry import Geometry, LayerProducts
from flcore.aggregation._mean import Mean
from flcore.aggregation._rule import Pipeline, Rule
from flcore.aggregation._team import Team
from flcore.errors import DTypeError, InvalidInputError, NonFiniteError, VariantUnavailableError
from flcore.ops.combine import one_device
from flcore.ops.gram import Gram, _gram_cpu, exact_sums, finish, settle
from flcore.reference.gram import KINDS

__all__ = ["Sharded"]


@dataclass(frozen=True)
class Sharded:
    r"""A rule whose clients are cut by coordinates over the processes of a group.

    Every process calls it with its shard (`flcore.aggregation.shard`) of all n updates, in the same
    order, and gets the same shard of the aggregate. Memory, reading and arithmetic are divided by
    the number of processes W; what travels is

    - the arguments and the errors of every process, a few hundred bytes;
    - for rules on distances, products or norms one sum of ``n (n + 1) / 2`` numbers of 96 bytes
      (norms: n; float64 updates: 552 bytes), and one solution of some n numbers;
    - n flags: which clients are not finite.

    Parameters
    ----------
    rule : rule
        Any rule of this package, with or without pre-aggregators. The same on all processes.
    group : torch.distributed.ProcessGroup, optional
        By default all processes. Any backend.

    Raises
    ------
    InvalidInputError, DTypeError, NonFiniteError, ...
        What the rule raises, on every process: ``rank 2: updates[5]: ...`` where another process
        found it. Also when processes differ in rule, number of clients, weights or layers. Like any
        collective, the call has to be made by all processes of the group.

    Notes
    -----
    On CPUs the result has the bits of one process that holds everything if shards begin at
    multiples of `SHARD_CHUNK` (`shard`, `shard_bounds`); for rules by layer, at multiples within
    each layer (``shard(..., per_layer=True)``). Other cuts are right to rounding: squares are then
    grouped differently before they are added exactly. Rules by coordinate and means do not care.
    The bits depend on the place of a cut alone, not on the number of processes. On GPUs the
    geometry is added in float64, in the order of the ranks.

    The small problem is solved on the first process. Integer layers are aggregated on each process
    from what it holds. `out` is written when all processes have succeeded.

    Examples
    --------
    With ``torchrun --nproc-per-node 4``::

        torch.distributed.init_process_group("gloo")
        mine = [shard(u, rank, 4) for u in updates]  # or only this part was ever received
        piece = Sharded(NNM(f=2) >> TrimmedMean(f=2))(mine)
        model = gather(piece, like=updates[0])
    """

    rule: Rule | Pipeline
    group: Any = None

    def __post_init__(self) -> None:
        if not isinstance(self.rule, Rule | Pipeline):
            raise DTypeError(f"rule: expected an aggregation rule, got {type(self.rule).__name__}")

    def __call__(
        self,
        updates: Any,
        weights: Sequence[float] | None = None,
        *,
        center: Any = None,
        out: Any = None,
        variant: str | None = None,
    ) -> Any:
        """Return this process's shard of the aggregate; arguments as for `Rule`, all shards."""
        return ShardedCall(self, updates, weights, center, variant, out).run(out)

    def diagnose(
        self,
        updates: Any,
        weights: Sequence[float] | None = None,
        *,
        center: Any = None,
        variant: str | None = None,
    ) -> Diagnosis:
        """Return what `Rule.diagnose` returns for the whole updates, on every process."""
        call = ShardedCall(self, updates, weights, center, variant, None, diagnosing=True)
        return call.diagnose()


@dataclass(frozen=True)
class _Facts:
    """What a process tells the others before the first read; the first four must agree."""

    rule: str
    n: int
    weights: list[tuple[int, float]] | None
    center: bool
    sizes: list[tuple[Any, int]]  # name and elements of each floating layer
    names: tuple[Any, ...]
    wide: bool  # holds float64
    exact: bool  # its variant of gram gives exact sums


_ARGUMENTS = {
    "rule": "rule",
    "n": "updates, their number",
    "weights": "weights that are not 0, by client",
    "center": "center, whether it is given",
}


class ShardedCall(Call):
    """One call; what `Call` finds out about rows is found out together."""

    def __init__(
        self,
        sharded: Sharded,
        updates: Any,
        weights: Sequence[float] | None,
        center: Any,
        variant: str | None,
        out: Any,
        *,
        diagnosing: bool = False,
    ) -> None:
        rule = sharded.rule
        before, last = (rule.before, rule.rule) if isinstance(rule, Pipeline) else ((), rule)
        self.team = Team(sharded.group)
        self._seen: Geometry | None = None
        self._solved: tuple[Geometry, np.ndarray | None, Decision] | None = None

        def open_arguments() -> _Facts:
            super(ShardedCall, self).__init__(before, last, updates, weights, center, variant)
            if self.packets is not None:
                raise DTypeError("updates: expected shards of updates, got packets; decode them")
            if diagnosing:
                self.needs = self.needs or {"norms"}
            self._open(out)
            return self._facts()

        everyone = self.team.together(open_arguments)
        first = everyone[0]
        for rank, facts in enumerate(everyone):
            for what in _ARGUMENTS:
                if getattr(facts, what) != getattr(first, what):
                    raise InvalidInputError(
                        f"{_ARGUMENTS[what]}: expected the same on every rank; rank 0 has "
                        f"{getattr(first, what)}, rank {rank} {getattr(facts, what)}"
                    )
        self.wide = any(facts.wide for facts in everyone)
        self.exact = all(facts.exact for facts in everyone)
        self.sizes: dict[Any, int] = {}  # of the whole layers
        for facts in everyone:
            for key, size in facts.sizes:
                self.sizes[key] = self.sizes.get(key, 0) + size
        self.names = tuple(dict.fromkeys(key for facts in everyone for key in facts.names))

    def _open(self, out: Any) -> None:
        """Check what a read or a write could stumble over later, on this process alone."""
        for i in self.clients:
            self._make_readable(self.all_rows[i], f"updates[{i}]")
        if self.center is not None:
            self._make_readable(self.center, "center")
        self.targets = None if out is None else self.layout.layers(out, "out")
        if self.targets is not None:
            like = self.sub.views(self.rows()[0], "updates[0]")
            for j, v in zip(self.floats, like, strict=True):
                _arrays.writable_view(self.targets[j], self.layout.label("out", j), v)

    def _make_readable(self, layers: list[Any], name: str) -> None:
        """Put the contiguous form of each floating layer in its place."""
        views = self.sub.views([layers[j] for j in self.floats], name)
        for j, v in zip(self.floats, views, strict=True):
            layers[j] = v.array

    def _facts(self) -> _Facts:
        device = one_device(self.sub.views(self.rows()[0], "updates[0]"))
        try:
            exact = _variants.choose("gram", device, self.variant) is _gram_cpu
        except VariantUnavailableError:
            if self.needs:
                raise
            exact = False
        specs = self.sub.specs
        weights = None
        if self.weights is not None:
            weights = [(int(i), float(q)) for i, q in zip(self.clients, self.weights, strict=True)]
        return _Facts(
            rule=" >> ".join(map(repr, self._steps())),
            n=len(self.all_rows),
            weights=weights,
            center=self.center is not None,
            sizes=[
                (key, int(np.prod(shape, dtype=np.int64)))
                for key, (_, _, shape, _) in zip(self.sub.keys, specs, strict=True)
            ],
            names=self.layout.keys,
            wide=any(dtype == "float64" for _, dtype, _, _ in specs),
            exact=exact,
        )

    # ---- the small problem -------------------------------------------------------------------

    def look(self, policy: str) -> Geometry:
        """First read, once a call."""
        if self._seen is None:
            self._seen = super().look(policy)
        return self._seen

    def decide(self, policy: str) -> tuple[Geometry, np.ndarray | None, Decision]:
        """Decide once, on one process where the decision rests on sums of floating numbers."""
        if self._solved is None:
            self.look(policy)
            solve = super().decide
            if self.needs:
                self._solved = (self.look(policy), *self.team.solved(lambda: solve(policy)[1:]))
            else:
                self._solved = solve(policy)
        return self._solved

    def _gram(self, views: Sequence[Any], kind: str) -> Gram:
        by_layer = kind == "layers"
        kind = "products" if by_layer else kind
        keys = list(self.sizes) if by_layer else [None]
        own = [[j] for j in range(len(self.floats))] if by_layer else [[*range(len(self.floats))]]
        places = self._places() if by_layer else [0]
        device = one_device(views[0])
        function = _variants.choose("gram", device, self.variant)

        def compute(wide: bool) -> np.ndarray:
            arguments = dict(layers=views[0], kind=kind, wide=wide, segments=own)
            if self.exact:
                shape = _native.core.gram_shape(len(views), KINDS.index(kind), wide)
                sums = self._total(
                    lambda: exact_sums(views, **arguments), places, (len(keys), *shape)
                )
                return finish(sums, len(views), kind, wide)
            return self._added(lambda: function(views, **arguments), places, len(keys))

        def search(rows: Sequence[int]) -> list[bool]:
            def found() -> list[bool]:
                find = _variants.choose("nonfinite", device, self.variant)
                return list(find([views[i] for i in rows]))

            return [any(flags) for flags in zip(*self.team.together(found), strict=True)]

        return settle(
            compute,
            search,
            kind,
            sizes=[self.sizes[key] for key in keys] if by_layer else [sum(self.sizes.values())],
            per_layer=by_layer,
            wide=self.wide,
            widen=True,
            nonfinite="exclude",
        )

    def _total(
        self, compute: Callable[[], np.ndarray], places: list[int], shape: tuple[int, ...]
    ) -> np.ndarray:
        """Sum of exact sums over all processes; an error on one is raised on all."""
        words = np.zeros(int(np.prod(shape)) + 1, np.int64)  # the last one counts errors
        sums, failed = words[:-1].reshape(shape), None
        try:
            if self.floats:
                sums[places] = compute()
        except Exception as error:
            words[-1], failed = 1, error
        words = self.team.add(words)
        if words[-1]:
            self.team.share(failed)
        return words[:-1].reshape(shape)

    def _added(
        self, compute: Callable[[], np.ndarray], places: list[int], segments: int
    ) -> np.ndarray:
        """Sum of float64 matrices over all processes, by rank."""
        everyone = self.team.together(lambda: (places, compute() if self.floats else None))
        found = [(where, part) for where, part in everyone if part is not None]
        total = np.zeros((segments, *found[0][1].shape[1:]))
        with np.errstate(invalid="ignore"):
            for where, part in found:
                total[where] += part
        return total

    def _geometry(self, found: dict[str, Gram]) -> Geometry:
        geometry = super()._geometry(found)
        if geometry.layers is None:
            return geometry
        keys, sizes = tuple(self.sizes), tuple(self.sizes.values())
        layers = LayerProducts(geometry.layers.products, keys, sizes, self.names)
        return replace(geometry, layers=layers)

    def _places(self) -> list[int]:
        """Number of each floating layer of this process among those of all."""
        keys = list(self.sizes)
        return [keys.index(key) for key in self.sub.keys]

    # ---- the aggregate -----------------------------------------------------------------------

    def run(self, out: Any) -> Any:
        """Return this process's part of the aggregate, in `out` if it is given."""
        policy = self.rule.nonfinite
        averages = isinstance(self.rule, Mean) and not self.before
        attempt = self._mean if averages else super().run
        if not averages:
            self.decide(policy)
        while bad := self._failed(attempt):
            self._drop(bad, policy)
        if self.targets is None:
            return self._result
        layers = self.layout.layers(self._result, "result")
        for target, layer in zip(self.targets, layers, strict=True):
            _arrays.assign(target, layer)
        return out

    def _failed(self, attempt: Callable[[Any], Any]) -> list[int]:
        """Make the result; returns the clients that some process found not finite."""
        flags = np.zeros(len(self.all_rows) + 1, np.int64)  # the last one: another error
        failed = None
        try:
            self._result = attempt(None)
        except Exception as error:
            clients = [self.clients[i] for i in getattr(error, "clients", ())]
            flags[clients or -1] = 1
            failed = None if clients else error
        flags = self.team.most(flags)
        if flags[-1]:
            self.team.share(failed)
        return [int(i) for i in np.flatnonzero(flags[:-1])]

    def _drop(self, bad: list[int], policy: str) -> None:
        """Leave clients out, or raise what the policy says."""
        names = ", ".join(f"updates[{i}]" for i in bad)
        if policy != "exclude":
            raise NonFiniteError(
                f"{names}: NaN or infinity found. Drop the client, or pass nonfinite='exclude' to "
                "leave it out, or nonfinite='propagate' to let it through",
                tuple(bad),
            )
        kept = ~np.isin(self.clients, bad)
        if not kept.any():
            raise NonFiniteError(
                f"{names}: NaN or infinity found and no client is left", tuple(bad)
            )
        self.nonfinite += tuple(bad)
        self.clients = self.clients[kept]
        if self.weights is not None:
            self.weights = self.weights[kept]
        if self._solved is not None:
            geometry, mix, decision = self._solved
            want = decision.statistic
            assert want is not None and mix is None  # the others know who is finite beforehand
            keep = None if want.keep is None else min(want.keep, len(self.clients))
            want = replace(want, f=max(0, want.f - len(bad)), keep=keep)
            self._solved = geometry, mix, replace(decision, statistic=want)

    def _by_layer(
        self, coefficients: np.ndarray, mix: np.ndarray | None, out: Any, policy: str
    ) -> list[Any]:
        return super()._by_layer(coefficients[self._places()], mix, out, policy)

    def _statistic(
        self, decision: Decision, mix: np.ndarray | None, out: Any, policy: str
    ) -> list[Any]:
        return super()._statistic(decision, mix, out, "raise" if policy == "exclude" else policy)

    def _mean(self, out: Any) -> Any:
        """`Mean` of the clients that are read, whose sums differ from those of `Call`."""
        rule = self.rule
        if rule.nonfinite == "exclude":
            rule = replace(rule, nonfinite="raise")
        rows = [self.layout.build(self.all_rows[i]) for i in self.clients]
        assert isinstance(rule, Mean)
        weights = None if self.weights is None else list(self.weights)
        return Mean.__call__(rule, rows, weights, variant=self.variant)
