"""Streaming weighted mean: clients arrive, are folded in and freed."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np

from flcore import _arrays, _native, _updates, _variants
from flcore.aggregation._integers import IntegerLayer, split_layers
from flcore.aggregation._norm_bound import NormBound
from flcore.aggregation._preaggregators import Clipping
from flcore.aggregation._stream import as_packet, dense, facts, fresh, zeros
from flcore.errors import DTypeError, InvalidInputError, NonFiniteError
from flcore.ops.combine import ACCUMULATE, NONFINITE, _targets, explain, one_device

__all__ = ["Accumulator"]


class Accumulator:
    r"""Weighted mean of updates that arrive one at a time, ``sum_i q_i D_i / sum_i q_i``.

    Memory is one accumulator, however many clients come. Partial accumulators of threads,
    processes or machines are joined by `merge`. Packets of `flcore.compression` are added without
    a dense copy.

    Parameters
    ----------
    like : update
        Gives structure, shapes, dtypes and device; its values are not used.
    dtype : {"float32", "float64", "reproducible"}
        Type of the sums: 4, 8 or 24 bytes a value. "reproducible": the result has the same bits
        for any order of `add` and any tree of `merge` (``|q D| < 2^46``, 16,384 clients at most).
        float64 layers always use float64 at least.
    before : Clipping, optional
        Norm bounding: every update is scaled down to a norm of at most c before it is added, as in
        ``Clipping(c) >> Mean()``.
    center : update, optional
        With `before`, the point v about which updates are clipped: one step of `CenteredClipping`,
        ``v + sum_i p_i min(1, c / ||x_i - v||) (x_i - v)``. It is kept, not copied, and must not
        change.
    nonfinite : {"raise", "exclude", "propagate"}
        What an update with a NaN or an infinity does: raise `NonFiniteError`, the accumulator
        unchanged; be counted in `excluded` and not added; or pass into the sum.
    integers : {"mean", "max", "sum", "first"}
        Policy for integer layers, as in `Mean`.
    variant : str, optional
        Which implementation of the sum runs, see `flcore.ops.combine`.

    Attributes
    ----------
    count : int
        Updates that were added.
    excluded : int
        Updates that were left out as non-finite.
    total_weight : float
        Sum of the weights of what was added.
    nbytes : int
        Bytes held by the accumulator, the centre not counted.

    Notes
    -----
    The weight of the first update is the unit of the sums (weights are divided by it), so that
    example counts of 10^6 do not shorten the range and a single update comes out exactly. The
    check for non-finite values reads an update once before it is added: 16 bytes a coordinate for
    float32 instead of 12, less when the update is still in cache; "propagate" skips it. With
    `before` the norm tells, at the same cost, and "propagate" is as "exclude".

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.aggregation import Accumulator
    >>> total = Accumulator(like=np.zeros(2, np.float32))
    >>> for update, examples in [([1, -2], 1), ([3, 0], 3), ([-1, 4], 4)]:
    ...     _ = total.add(np.float32(update), weight=examples)
    >>> total.result()
    array([0.75, 1.75], dtype=float32)
    """

    def __init__(
        self,
        like: Any,
        dtype: str = "float32",
        *,
        before: Clipping | None = None,
        center: Any = None,
        nonfinite: str = "raise",
        integers: str = "mean",
        variant: str | None = None,
    ) -> None:
        if dtype not in ACCUMULATE:
            raise InvalidInputError(f"dtype: expected one of {ACCUMULATE}, got {dtype!r}")
        if nonfinite not in NONFINITE:
            raise InvalidInputError(f"nonfinite: expected one of {NONFINITE}, got {nonfinite!r}")
        self.dtype, self.nonfinite, self.variant = dtype, nonfinite, variant
        self._layout, layers = _updates.flatten(like, "like")
        self._floats, integer_layers = split_layers(self._layout)
        self._like = [facts(layers[j], self._layout.label("like", j)) for j in self._floats]
        self._device = one_device(self._like)
        self._bound = self._norm_bound(before, center)
        self._state = [zeros(v, dtype) for v in self._like]
        self._integers = {
            j: IntegerLayer(_arrays.empty_like(layers[j]), integers) for j in integer_layers
        }
        self._total = Fraction(0)  # of the weights
        self._taken = Fraction(0)  # of the weights, less what clipping took from them
        self._unit: float | None = 1.0 if dtype == "reproducible" else None
        self.count = self.excluded = 0

    @property
    def total_weight(self) -> float:
        """Sum of the weights of what was added, rounded once."""
        return float(self._total)

    @property
    def nbytes(self) -> int:
        """Bytes held by the accumulators of the floating layers."""
        return sum(s.nbytes for s in self._state)

    def add(self, update: Any, weight: float = 1.0) -> Accumulator:
        """Fold in one update, or one packet of `flcore.compression`.

        Parameters
        ----------
        update : update, Packet or bytes
            An update like the one given at construction; or a packet for as many values as its
            floating layers have, in order. Bytes are checked as `Packet.from_bytes` does. With
            `before` a packet is made dense, because its norm has to be known first.
        weight : float
            Finite, >= 0. An update of weight 0 is counted and not read.

        Returns
        -------
        Accumulator
            Itself, so that calls can be chained.

        Raises
        ------
        InvalidInputError, DTypeError
            Structure, shapes, dtypes or the weight cannot be used; nothing was added.
        NonFiniteError
            See `nonfinite`; nothing was added. Also when finite values overflow the sums, which
            are then lost: use dtype="float64".
        PacketError
            The packet is corrupt or of another size; nothing was added.
        """
        weight = _updates.parse_weights([weight], 1, signed=False if weight else True)[0]
        packet = as_packet(update)
        layers = None if packet is not None else self._layout.layers(update, "update")
        if packet is not None:
            self._check_packet(packet)
        factor = 1.0
        if weight != 0:
            scale = weight / (self._unit or weight)
            if packet is None or self._bound is not None or self.dtype == "reproducible":
                if layers is not None:
                    views = [_arrays.view(layers[j]) for j in self._floats]
                else:
                    views = dense(packet, self._like, wide=self.dtype == "reproducible")
                admitted = self._admit(views, scale)
                if admitted is None:
                    self.excluded += 1
                    return self
                factor = admitted
                self._sum(views, scale * factor)
            else:
                from flcore.ops.decode import decode_add_into

                decode_add_into([packet], [scale], self._state)
            if layers is not None:
                for j, integer in self._integers.items():
                    integer.add(layers[j], weight * factor)
            self._unit = self._unit or weight
        self._total += Fraction(weight)
        self._taken += Fraction(weight * factor)
        self.count += 1
        return self

    def merge(self, other: Accumulator) -> Accumulator:
        """Fold in another accumulator of the same layout and dtype; `other` is unchanged.

        Raises
        ------
        InvalidInputError
            `other` has another layout, dtype, clipping or centre.
        """
        if not isinstance(other, Accumulator):
            raise DTypeError(f"other: expected an Accumulator, got {type(other).__name__}")
        for what, mine, theirs in (
            ("dtype", self.dtype, other.dtype),
            ("layout", self._layout, other._layout),
        ):
            if mine != theirs:
                raise InvalidInputError(f"other: expected {what} {mine}, got {theirs}")
        one, two = self._bound, other._bound
        if (one is None) != (two is None) or (one and two and not one.same(two)):
            raise InvalidInputError("other: expected the same clipping, about the same centre")
        if other._unit is not None and other._total:
            if self.dtype == "reproducible":
                self._check_terms(other.count)
                for mine, theirs in zip(self._state, other._state, strict=True):
                    mine += theirs
            else:
                self._unit = self._unit or other._unit
                self._sum([_arrays.view(s) for s in other._state], other._unit / self._unit)
            for j, integer in self._integers.items():
                integer.merge(other._integers[j])
        self._total += other._total
        self._taken += other._taken
        self.count += other.count
        self.excluded += other.excluded
        return self

    def result(self, divisor: float | None = None, *, out: Any = None) -> Any:
        """Return the mean so far, or the weighted sum divided by `divisor`.

        The accumulator is unchanged and can take more updates.

        Parameters
        ----------
        divisor : float, optional
            Positive. By default the sum of the weights, which gives the mean. Error control with
            partial participation divides by the total number of clients instead.
        out : update, optional
            Where the result goes: the last update, say, so that no memory is asked for.

        Returns
        -------
        update
            Of the structure, dtype and device of `like`; `out` itself if it was given.

        Raises
        ------
        InvalidInputError, DTypeError
            Nothing of positive weight was added and no divisor was given; or `out` is not like
            `like`.
        """
        missing = self._total - self._taken
        if divisor is None:
            if not self._total:
                raise InvalidInputError("result: nothing of positive weight was added")
            divisor = self.total_weight
        elif not (np.isfinite(divisor) and divisor > 0):
            raise InvalidInputError(f"divisor: expected a positive finite number, got {divisor!r}")
        else:
            missing = Fraction(float(divisor)) - self._taken
        if out is None:
            results = [
                fresh(v, self._layout.specs[j][2])
                for j, v in zip(self._floats, self._like, strict=True)
            ]
            self._finish(results, divisor, missing)
            layers = self._integer_layers()
            layers |= {j: v.array for j, v in zip(self._floats, results, strict=True)}
            return self._layout.build([layers[j] for j in range(len(layers))])
        targets = self._layout.layers(out, "out")
        own = [targets[j] for j in self._floats]
        results, direct = _targets(
            self._like, own, own, self._layout.select(self._floats), "propagate"
        )
        self._finish(results, divisor, missing)
        for target, result in zip(own, results, strict=True):
            if not direct:
                _arrays.assign(target, result.array)
        for j, layer in self._integer_layers().items():
            _arrays.assign(targets[j], layer)
        return out

    def reset(self) -> Accumulator:
        """Forget everything that was added; the memory is kept."""
        for state in self._state:
            state[...] = 0
        for integer in self._integers.values():
            integer.value = None
        self._total = self._taken = Fraction(0)
        self._unit = 1.0 if self.dtype == "reproducible" else None
        self.count = self.excluded = 0
        return self

    # ---- internals -----------------------------------------------------------------------------

    def _call(self, rows: list, weights: list[float], *, layers: list, out: Any, divisor: float):
        function = _variants.choose("combine", self._device, self.variant)
        return function(
            rows,
            weights,
            layers=layers,
            state=self._state,
            out=out,
            accumulate=self.dtype,
            divisor=divisor,
            check=self.nonfinite != "propagate" or self.dtype == "reproducible",
        )

    def _finish(self, results: list[_arrays.View], divisor: float, missing: Fraction) -> None:
        """Write the sums over `divisor`; the weight that is `missing` belongs to the centre."""
        unit = self._unit or 1.0
        center = self._bound.views() if self._bound and missing else []
        self._call(
            [center] if center else [],
            [float(missing) / unit] if center else [],
            layers=self._like,
            out=results,
            divisor=divisor / unit,
        )

    def _integer_layers(self) -> dict[int, Any]:
        for integer in self._integers.values():
            if integer.value is None:  # only packets came: they carry no integer layers
                integer.add(np.zeros(tuple(integer.like.shape), np.int64), 0.0)
        weight = float(self._taken) or 1.0
        return {j: integer.result(weight) for j, integer in self._integers.items()}

    def _sum(self, row: list[_arrays.View], scale: float) -> None:
        """Add ``scale * row`` to the state."""
        flags = self._call([row], [scale], layers=row, out=None, divisor=1.0)
        if flags and self.nonfinite != "propagate":
            wider = "; use dtype='float64'" if self.dtype == "float32" else ""
            raise NonFiniteError(f"the accumulated sum overflows {self.dtype}{wider}")

    def _admit(self, views: list[_arrays.View], scale: float) -> float | None:
        """Return the factor an update gets, or None if it is left out.

        Raises what the policy says, the state untouched.
        """
        self._check_terms(1)
        factor: float | None = 1.0
        if self._bound is not None:
            factor = self._bound.factor(views)
        if factor is not None and self.dtype == "reproducible":
            good = self._fits(views, scale * factor)
        elif self._bound is None and self.nonfinite != "propagate":
            good = not any(_variants.choose("nonfinite", self._device, self.variant)([views]))
        else:
            good = factor is not None
        if not good and self.nonfinite == "raise":
            raise NonFiniteError(
                f"update {self.count} (counted from 0): NaN or infinity found; it was not added. "
                "Pass nonfinite='exclude' to leave such updates out",
                (self.count,),
            )
        return factor if good else None

    def _fits(self, views: list[_arrays.View], scale: float) -> bool:
        """Whether a reproducible sum can take an update: a trial tells; beyond the grid raises."""
        scratch = [_arrays.view(_arrays.empty_like(v.array)) for v in views]
        flags = _variants.choose("combine", self._device, self.variant)(
            [views],
            [scale],
            layers=views,
            state=None,
            out=scratch,
            accumulate=self.dtype,
            divisor=1.0,
            check=True,
        )
        return not explain(flags, [views], self._device, self.variant, self.nonfinite, self.dtype)

    def _norm_bound(self, before: Any, center: Any) -> NormBound | None:
        if before is None:
            if center is not None:
                raise InvalidInputError("center: expected before=Clipping(c) with it")
            return None
        if center is None:
            return NormBound(before, None, self.variant)
        layers = self._layout.layers(center, "center")
        views = [_arrays.view(layers[j]) for j in self._floats]
        return NormBound(before, [v.array for v in views], self.variant)

    def _check_terms(self, more: int) -> None:
        limit = _native.core.BIN_MAX_TERMS
        if self.dtype == "reproducible" and self.count + more > limit:
            raise InvalidInputError(f"a reproducible accumulator takes at most {limit} updates")

    def _check_packet(self, packet: Any) -> None:
        if self._device != "cpu":
            raise DTypeError(f"packets are added on the CPU; this accumulator is on {self._device}")
        expected = sum(v.numel for v in self._like)
        if packet.header.numel != expected:
            raise InvalidInputError(
                f"packet: expected {expected} values like the accumulator, "
                f"got {packet.header.numel}"
            )
        self._check_terms(1)
