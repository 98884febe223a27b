"""What every rule shares: from updates to a small decision, and from the decision to one aggregate.

A rule decides on an n x n problem (`Rule._decide`) and never touches the vectors. The decision is
either a weighted sum of the clients or an order statistic of every coordinate; pre-aggregators only
replace the rows x by ``M x`` in between, and M is folded into the distances and into the last read.
So a rule costs one read of the data, or two when it needs distances.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from flcore.aggregation._call import Call
from flcore.aggregation._decision import Decision, Diagnosis
from flcore.aggregation._geometry import Geometry
from flcore.errors import DTypeError, InvalidInputError
from flcore.ops.combine import ACCUMULATE, NONFINITE

__all__ = ["Chain", "Pipeline", "PreAggregator", "Rule", "check_choice", "check_f"]


def check_f(f: Any, name: str = "f") -> int:
    """Return a count of bad clients as an int >= 0."""
    try:
        f = operator.index(f)
    except TypeError:
        raise DTypeError(f"{name}: expected an integer, got {f!r}") from None
    if f < 0:
        raise InvalidInputError(f"{name}: expected an integer >= 0, got {f}")
    return f


def check_choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raise unless `value` is one of `allowed`."""
    if value not in allowed:
        raise InvalidInputError(f"{name}: expected one of {tuple(allowed)}, got {value!r}")


@dataclass(frozen=True)
class Rule:
    """Base of the aggregation rules: immutable, called on updates, chained with ``>>``.

    Parameters
    ----------
    nonfinite : {"raise", "exclude", "propagate"}
        What a NaN or an infinity in an update does: raise and name the client; leave the client
        out, counted among the `f` bad ones; or, for rules by coordinate, pass into that coordinate
        (rules that work on distances take such a client as infinitely far, that is, left out).
    accumulate : {"float32", "float64", "reproducible"}
        Type of weighted sums, see `flcore.ops.combine`.
    """

    nonfinite: str = field(default="raise", kw_only=True)
    accumulate: str = field(default="float32", kw_only=True)

    needs: ClassVar[str] = "distances"  # nothing, norms, distances, products or layers
    weighted: ClassVar[bool] = False  # whether client weights have a meaning
    centred: ClassVar[bool] = False  # whether a centre may take the place of the zero vector
    shrinks: ClassVar[bool] = False  # whether far rows stay in, with weights next to nothing

    def __post_init__(self) -> None:
        check_choice("nonfinite", self.nonfinite, NONFINITE)
        check_choice("accumulate", self.accumulate, ACCUMULATE)
        if hasattr(self, "f"):
            object.__setattr__(self, "f", check_f(self.f))

    def _needs(self) -> str:
        """What the rule must know of its rows."""
        return self.needs

    def _decide(self, geometry: Geometry, weights: np.ndarray | None, excluded: int) -> Decision:
        """Solve the small problem.

        `geometry` has the rows in a canonical order with `index` for ties; `weights` (n,) are
        positive and not normalised, or None; `excluded` clients were left out as non-finite, and
        count among the f bad ones.
        """
        raise AssertionError(f"{type(self).__name__} does not decide")  # every rule does

    def _bad(self, n: int, excluded: int) -> int:
        """`f` without the clients already left out; 2 f < n holds."""
        f = max(0, self.f - excluded)  # type: ignore[attr-defined]
        if 2 * f >= n:
            raise InvalidInputError(
                f"f: expected 2 f < n, got f = {f} and n = {n} updates"
                + (f" after {excluded} were left out" if excluded else "")
            )
        return f

    def __call__(
        self,
        updates: Any,
        weights: Sequence[float] | None = None,
        *,
        center: Any = None,
        like: Any = None,
        out: Any = None,
        variant: str | None = None,
    ) -> Any:
        """Return the aggregate of `updates`.

        Parameters
        ----------
        updates : sequence of updates, array of shape (n, ...), or list of packets
            One update a client, alike in structure, shapes, dtypes and device. Or packets of
            `flcore.compression`, of any codecs: each tile of all packets is decoded in cache, and
            the result has the bits of the rule on the decoded float32 updates.
        weights : (n,) numbers >= 0, optional
            Not all zero; an error for rules without a weighted form. Clients of weight 0 are not
            read.
        center : update, optional
            For rules about a centre (previous aggregate): takes the place of the zero vector.
        like : update, optional
            With packets: what the result is like, floating layers on the CPU; by default one
            float32 array.
        out : update, optional
            Where the result goes; untouched when the call raises.
        variant : str, optional
            Which implementation of the ops runs, see `flcore.ops`.

        Returns
        -------
        update
            Of the kind, dtype and device of one update, or of `like`. Integer layers get the same
            aggregate in float64, rounded to the nearest integer.

        Raises
        ------
        InvalidInputError, DTypeError, NonFiniteError, VariantUnavailableError
            See `flcore.ops.combine`; also weights, `f` or a centre that the rule cannot use.
        """
        return Call((), self, updates, weights, center, variant, like).run(out)

    def diagnose(
        self,
        updates: Any,
        weights: Sequence[float] | None = None,
        *,
        center: Any = None,
        like: Any = None,
        variant: str | None = None,
    ) -> Diagnosis:
        """Return scores, selected and rejected clients, norms and non-finite clients.

        Takes the arguments of a call; NaN and infinities never raise here.
        """
        return Call((), self, updates, weights, center, variant, like).diagnose()


@dataclass(frozen=True)
class PreAggregator:
    """Base of what comes before a rule: replaces the rows x by ``M x``."""

    needs: ClassVar[str] = "nothing"
    keeps_weights: ClassVar[bool] = False  # M is diagonal
    renames: ClassVar[bool] = False  # row i is no longer about client i
    shrinks: ClassVar[bool] = False  # as for `Rule`

    def __post_init__(self) -> None:
        if hasattr(self, "f"):
            object.__setattr__(self, "f", check_f(self.f))

    def __rshift__(self, after: Any) -> Any:
        return Chain((self,)) >> after

    def _needs(self) -> str:
        """What must be known of the rows."""
        return self.needs

    def _matrix(self, geometry: Geometry, excluded: int) -> np.ndarray:
        """Return M, (m, n), for the rows of `geometry`."""
        raise AssertionError(f"{type(self).__name__} does not mix")  # every one does


@dataclass(frozen=True)
class Chain:
    """Pre-aggregators that wait for a rule: ``Clipping(2.0) >> NNM(1)``."""

    before: tuple[PreAggregator, ...]

    def __rshift__(self, after: Any) -> Any:
        if isinstance(after, Pipeline):
            return Pipeline((*self.before, *after.before), after.rule)
        if isinstance(after, Chain | PreAggregator):
            more = after.before if isinstance(after, Chain) else (after,)
            return Chain((*self.before, *more))
        return Pipeline(self.before, after) if isinstance(after, Rule) else NotImplemented


@dataclass(frozen=True)
class Pipeline:
    """Pre-aggregators, first to last, and a rule: ``NNM(f=3) >> TrimmedMean(f=3)``; itself a rule.

    Each pre-aggregator sees the rows that the one before it made. Nothing is written in between:
    the matrices act on the distances, and the last read applies their product.
    """

    before: tuple[PreAggregator, ...]
    rule: Rule

    def __call__(
        self,
        updates: Any,
        weights: Sequence[float] | None = None,
        *,
        center: Any = None,
        like: Any = None,
        out: Any = None,
        variant: str | None = None,
    ) -> Any:
        """Return the aggregate; arguments as for `Rule`."""
        return Call(self.before, self.rule, updates, weights, center, variant, like).run(out)

    def diagnose(
        self,
        updates: Any,
        weights: Sequence[float] | None = None,
        *,
        center: Any = None,
        like: Any = None,
        variant: str | None = None,
    ) -> Diagnosis:
        """Return what `Rule.diagnose` returns, for the rows that the rule sees."""
        return Call(self.before, self.rule, updates, weights, center, variant, like).diagnose()
