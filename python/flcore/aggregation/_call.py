"""One application of pre-aggregators and a rule: look at the rows, decide, read them once more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flcore import _arrays, _updates
from flcore.aggregation._decision import Decision, Diagnosis
from flcore.aggregation._geometry import Geometry, LayerProducts
from flcore.aggregation._integers import IntegerLayer, split_layers
from flcore.errors import InvalidInputError, NonFiniteError
from flcore.ops._combine_packets import combine_packets
from flcore.ops._packet_rows import PacketRows, packet_rows
from flcore.ops.combine import combine_layers
from flcore.ops.gram import Gram, gram_views
from flcore.ops.select import select_layers
from flcore.reference.select import order_statistic

if TYPE_CHECKING:
    from flcore.aggregation._rule import PreAggregator, Rule

__all__ = ["Call"]

# Squared norms above this (of float64 updates) would overflow in sums over clients.
LARGEST_SQUARE = 2.0**900


class Call:
    """The arguments of one call, parsed, and what was found about them.

    Attributes
    ----------
    clients : (m,) int
        Positions in the call of the clients that are read: first those with a weight, after the
        first look those whose values are finite, in canonical order.
    nonfinite : tuple of int
        Positions of the clients that were left out.
    """

    def __init__(
        self,
        before: tuple[PreAggregator, ...],
        rule: Rule,
        updates: Any,
        weights: Sequence[float] | None,
        center: Any,
        variant: str | None,
        like: Any = None,
    ) -> None:
        self.before, self.rule, self.variant = before, rule, variant
        name = type(rule).__name__
        self.packets = packet_rows(updates, like)
        self.all_rows: list[Any]
        if self.packets is not None:
            self.layout, self.all_rows = self.packets.layout, self.packets.packets
        else:
            self.layout, self.all_rows = _updates.parse_updates(updates)
        self.clients = np.arange(len(self.all_rows))
        self.weights = None
        if weights is not None:
            if not rule.weighted:
                raise InvalidInputError(f"weights: {name} has no weighted form; leave them out")
            mixing = [type(b).__name__ for b in before if not b.keeps_weights]
            if mixing:
                raise InvalidInputError(
                    f"weights: {mixing[0]} mixes clients, so that weights lose their owners"
                )
            q = np.array(_updates.parse_weights(weights, len(self.all_rows), signed=False))
            self.clients = np.flatnonzero(q)
            self.weights = q[self.clients]
        self.floats, self.integers = split_layers(self.layout)
        self.sub = self.layout.select(self.floats)
        self.center = None
        if center is not None:
            if not rule.centred:
                raise InvalidInputError(f"center: {name} has no centre")
            if before:
                raise InvalidInputError(
                    f"center: {type(before[0]).__name__} works about zero and not about a centre; "
                    "subtract the centre from the updates instead"
                )
            self.center = self.layout.layers(center, "center")
        self.needs = self._needs()
        self.nonfinite: tuple[int, ...] = ()

    def _needs(self) -> set[str]:
        """What must be known of the rows; norms of mixed rows come from distances."""
        needs = set() if self.center is None else {"distances"}
        mixed = False
        for step in self._steps():
            own = step._needs()
            needs.add("distances" if own == "norms" and mixed else own)
            mixed = mixed or not getattr(step, "keeps_weights", True)
        return needs - {"nothing"}

    def _steps(self) -> list[PreAggregator | Rule]:
        return [*self.before, self.rule]

    def rows(self) -> Any:
        """Floating layers of the clients that are read, and of the centre; or their packets."""
        if self.packets is not None:
            found = self.packets.take(self.clients)
            return found if self.center is None else found.beside(self.center, "center")
        rows = [[self.all_rows[i][j] for j in self.floats] for i in self.clients]
        if self.center is not None:
            rows.append([self.center[j] for j in self.floats])
        return rows

    # ---- the small problem -------------------------------------------------------------------

    def look(self, policy: str) -> Geometry:
        """First read; leaves non-finite clients out and puts the others in canonical order."""
        needs = set(self.needs)
        if not needs and policy == "exclude" and (self.before or self.weights is not None):
            needs = {"norms"}
        if not needs:
            return Geometry.of(None, np.zeros(len(self.clients)))
        views: Any = self.rows()
        if self.packets is None:
            views = [self.sub.views(row, f"updates[{i}]") for i, row in enumerate(views)]
        order = ("distances", "products", "layers", "norms")
        kinds: list[str] = [kind for kind in order if kind in needs]
        if len(kinds) > 1 and kinds[-1] == "norms":
            kinds.pop()  # the others tell
        found = {kind: self._gram(views, kind) for kind in kinds}
        good = self._leave_out(next(iter(found.values())), policy)
        geometry = self._geometry(found).take(good)
        if any(step.shrinks for step in self._steps()) and "products" not in found:
            if "distances" in found and geometry.far.any():
                found["products"] = self._gram(views, "products")
                geometry = self._geometry(found).take(good)
        geometry = geometry.take(
            geometry.canonical(None if self.weights is None else self.weights[good])
        )
        self.clients = self.clients[geometry.index]
        if self.weights is not None:
            self.weights = self.weights[geometry.index]
        return geometry.renamed(self.clients)

    def _gram(self, views: Sequence[Any], kind: str) -> Gram:
        layers = kind == "layers"
        return gram_views(
            views,
            "products" if layers else kind,
            per_layer=layers,
            nonfinite="exclude",
            variant=self.variant,
        )

    def _geometry(self, found: dict[str, Gram]) -> Geometry:
        """Put the matrices that were found together; rows in the order of the call."""
        first = next(iter(found.values()))
        distances = found["distances"].distances if "distances" in found else None
        products = found["products"].products if "products" in found else None
        layers = None
        norms = first.norms
        if "layers" in found:
            by_layer = found["layers"].products
            assert by_layer is not None
            sizes = [int(np.prod(shape, dtype=int)) for _, _, shape, _ in self.sub.specs]
            layers = LayerProducts(by_layer, self.sub.keys, tuple(sizes), self.layout.keys)
            norms = norms.sum(axis=0) if norms.ndim == 2 else norms
            products = by_layer.sum(axis=0) if products is None else products
        accuracy = 2.0**-24 if first.precision == "float32" else 2.0**-53
        if self.center is not None:
            assert distances is not None
            return Geometry(distances, np.arange(len(distances) - 1), products, None, accuracy)
        return Geometry.of(distances, norms, products, layers, accuracy)

    def _leave_out(self, found: Gram, policy: str) -> np.ndarray:
        """Rows (m,) that are usable; names the others, or raises."""
        norms = found.norms if found.norms.ndim == 1 else found.norms.sum(axis=0)
        bad = ~(norms < LARGEST_SQUARE)
        if self.center is not None:
            if bad[-1]:
                raise NonFiniteError("center: NaN or infinity found, or squares that overflow")
            bad = bad[:-1]
        self.nonfinite = tuple(int(i) for i in self.clients[bad])
        names = ", ".join(f"updates[{i}]" for i in self.nonfinite)
        if self.nonfinite and policy == "raise":
            raise NonFiniteError(
                f"{names}: NaN or infinity found, or squares that overflow. Drop the client, or "
                "pass nonfinite='exclude' to leave it out",
                self.nonfinite,
            )
        if bad.all():
            raise NonFiniteError(
                f"{names}: NaN or infinity found and no client is left", self.nonfinite
            )
        return np.flatnonzero(~bad)

    def decide(self, policy: str) -> tuple[Geometry, np.ndarray | None, Decision]:
        """Return the geometry of the clients, the mixing matrix and the rule's decision."""
        geometry = seen = self.look(policy)
        excluded = len(self.nonfinite)
        mix = None
        for step in self.before:
            matrix = step._matrix(seen, excluded)
            seen = seen.mixed(matrix, renames=step.renames)
            mix = matrix if mix is None else np.einsum("ai,ij->aj", matrix, mix)
        return geometry, mix, self.rule._decide(seen, self.weights, excluded)

    # ---- the aggregate -----------------------------------------------------------------------

    def run(self, out: Any) -> Any:
        """Return the aggregate, in `out` if it is given."""
        targets = None if out is None else self.layout.layers(out, "out")
        policy = self.rule.nonfinite
        _, mix, decision = self.decide(policy)
        float_targets = None if targets is None else [targets[j] for j in self.floats]
        if decision.statistic is not None:
            results = self._statistic(decision, mix, float_targets, policy)
        elif decision.by_layer is not None:
            results = self._by_layer(decision.by_layer, mix, float_targets, policy)
        else:
            assert decision.coefficients is not None
            shares = self._carried(decision.coefficients, mix)
            results = self._combination(shares, slice(None), float_targets, policy)
        layers = dict(zip(self.floats, results, strict=True))
        for j in self.integers:
            layers[j] = self._integer(j, decision, mix)
            if targets is not None:
                _arrays.assign(targets[j], layers[j])
        if out is not None:
            return out
        return self.layout.build([layers[j] for j in range(len(layers))])

    def _combination(
        self, coefficients: np.ndarray, part: slice, out: Any, policy: str
    ) -> list[Any]:
        """Weighted sum of the layers in `part`."""
        if self.center is not None:
            coefficients = np.append(coefficients, 1.0 - coefficients.sum())
        wanted = [float(c) for c in coefficients]
        rows = self.rows()
        if isinstance(rows, PacketRows):
            return self._packet_sum(rows, coefficients, out, policy)
        return combine_layers(
            [row[part] for row in rows],
            lambda keep: [c if i in keep else 0.0 for i, c in enumerate(wanted)],
            layout=self.sub.select(range(len(self.floats))[part]),
            out=out,
            accumulate=self.rule.accumulate,
            nonfinite="raise" if policy == "exclude" else policy,  # those were left out before
            divisor=lambda keep: 1.0,
            variant=self.variant,
        )

    def _packet_sum(self, rows: PacketRows, weights: np.ndarray, out: Any, policy: str) -> Any:
        return combine_packets(
            rows,
            weights,
            out=out,
            accumulate=self.rule.accumulate,
            nonfinite=policy,
            divisor=1.0,
            variant=self.variant,
        )

    def _by_layer(
        self, coefficients: np.ndarray, mix: np.ndarray | None, out: Any, policy: str
    ) -> list[Any]:
        """Sum of every layer with its own weights; `out` is written when all went well."""
        carried = self._carried(coefficients, mix)
        rows = self.rows()
        if isinstance(rows, PacketRows):
            return self._packet_sum(rows, carried.T, out, policy)
        layers = []
        for j, shares in enumerate(carried):
            layers += self._combination(shares, slice(j, j + 1), None, policy)
        if out is None:
            return layers
        for target, layer in zip(out, layers, strict=True):
            _arrays.assign(target, layer)
        return list(out)

    def _statistic(
        self, decision: Decision, mix: np.ndarray | None, out: Any, policy: str
    ) -> list[Any]:
        rows: Any = self.rows()
        want = decision.statistic
        assert want is not None
        entries = None
        if decision.selected is not None and mix is None:
            chosen = np.flatnonzero(decision.selected)
            rows = rows.take(chosen) if self.packets is not None else [rows[i] for i in chosen]
        elif mix is not None:
            kept = mix if decision.selected is None else mix[decision.selected]
            entries = [[(int(j), float(row[j])) for j in np.flatnonzero(row)] for row in kept]
        results, left_out = select_layers(
            rows,
            want.op,
            layout=self.sub,
            f=want.f,
            keep=want.keep,
            median=want.median,
            mix=entries,
            out=out,
            nonfinite=policy,
            variant=self.variant,
        )
        self.nonfinite += tuple(int(self.clients[i]) for i in left_out)
        return results

    def _integer(self, j: int, decision: Decision, mix: np.ndarray | None) -> Any:
        """Aggregate one integer layer in float64 and round it; a few numbers, so NumPy does it.

        Shares are scaled to sum to one: a step counter is not to be clipped.
        """
        like = self.all_rows[0][j]
        present = [i for i in self.clients if i not in self.nonfinite]
        integers = getattr(self.rule, "integers", "mean")
        if integers != "mean":
            layer = IntegerLayer(like, integers)
            for i in sorted(present):
                layer.add(self.all_rows[i][j], 1.0)
            return layer.result(1.0)
        x = np.stack([_arrays.to_float64(self.all_rows[i][j]) for i in present])
        if decision.statistic is not None:
            want = decision.statistic
            x = x if mix is None else np.einsum("ai,ij->aj", mix, x)
            x = x if decision.selected is None else x[decision.selected]
            f, keep = want.f, want.keep
            if len(present) < len(self.clients):
                f = max(0, f - (len(self.clients) - len(present)))
            keep = len(x) - f if keep is None else min(keep, len(x))
            value = order_statistic(x, want.op, median=want.median, f=f, keep=keep)
        else:
            own = decision.coefficients if decision.shares is None else decision.shares
            c = np.ones(len(x)) if own is None or not own.any() else self._carried(own, mix)
            value = np.einsum("i,ij->j", c / c.sum(), x)
        result = _arrays.empty_like(like)
        _arrays.assign(result, np.rint(value).reshape(tuple(like.shape)))
        return result

    @staticmethod
    def _carried(coefficients: np.ndarray, mix: np.ndarray | None) -> np.ndarray:
        """Coefficients (..., n) on the clients, from those on the mixed rows."""
        return coefficients if mix is None else np.einsum("...a,ai->...i", coefficients, mix)

    # ---- why -----------------------------------------------------------------------------------

    def diagnose(self) -> Diagnosis:
        """Decide, and tell about it by the positions of the call."""
        n = len(self.all_rows)
        self.needs = self.needs or {"norms"}
        try:
            geometry, mix, decision = self.decide("exclude")
        except NonFiniteError:
            if len(self.nonfinite) < len(self.clients):  # it is about the centre
                raise
            norms = np.full(n, np.inf)
            return Diagnosis(None, None, (), tuple(range(n)), norms, None, self.nonfinite)
        names = self.clients
        if any(step.renames for step in self.before):
            assert mix is not None
            names = np.arange(len(mix))
        rows = n if names is self.clients else len(names)
        chosen = decision.selected
        if chosen is None and decision.coefficients is not None:
            chosen = decision.coefficients != 0
        selected = sorted(int(i) for i in (names if chosen is None else names[chosen]))
        coefficients = scores = distances = None
        if decision.coefficients is not None:
            coefficients = np.zeros(n)
            coefficients[self.clients] = self._carried(decision.coefficients, mix)
        if decision.scores is not None:
            scores = np.full(rows, np.nan)
            scores[names] = decision.scores
        norms = np.full(n, np.inf)
        norms[self.clients] = np.sqrt(geometry.norms)
        if "distances" in self.needs:
            distances = np.full((n, n), np.inf)
            distances[np.ix_(self.clients, self.clients)] = np.sqrt(geometry.distances)
        return Diagnosis(
            coefficients=coefficients,
            scores=scores,
            selected=tuple(selected),
            rejected=tuple(sorted(set(range(rows)) - set(selected))),
            norms=norms,
            distances=distances,
            nonfinite=self.nonfinite,
        )
