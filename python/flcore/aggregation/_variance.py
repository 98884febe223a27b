"""Averaging in a gossip network that keeps the variance of the weights of every layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flcore import _arrays, _updates
from flcore.aggregation._checks import number
from flcore.aggregation._integers import split_layers
from flcore.aggregation._stream import zeros
from flcore.errors import InvalidInputError, NonFiniteError
from flcore.ops.combine import NONFINITE, _targets
from flcore.ops.moments import Moments, accumulate_views, affine_views, moments_views

__all__ = ["CONVENTIONS", "VarianceCorrected"]

TARGETS = ("others", "self", "mix")

# What the two programs of the authors fix; named after their repositories.
CONVENTIONS: dict[str, dict[str, Any]] = {
    "dfl2": {"eps": 0.0, "unbiased": False, "include_1d": False},
    "dfl_torch": {"eps": 1e-4, "unbiased": True, "include_1d": True},
}

KEEP = ("running_mean", "running_var", "num_batches_tracked")
TINY = 1e-30  # a layer of less variance is constant and is not scaled


class VarianceCorrected:
    r"""Average of received models, each layer rescaled around its mean to the variance they had.

    The mean of k weakly correlated networks has 1/k of the variance of each, far below what keeps
    signals alive, which slows learning by gossip. With the received models w_1, .., w_k, the own
    model w_s and the own share c, each layer l of the result is

    ``b = c w_s + (1 - c) mean_j w_j``, ``out = mean(b) + s (b - mean(b))``,
    ``s = 1 + ratio (sqrt((T + eps) / (var(b) + eps)) - 1)``

    where mean and var run over the elements of the layer and T is the target variance. Models
    stream: each is added in one read and can be dropped; memory is one accumulator.

    Parameters
    ----------
    own : float
        Share c of the own model, in [0, 1].
    target : {"others", "self", "mix"}
        T: the mean variance of the received models; the variance of the own model; or the two in
        the shares 1 - c and c.
    eps : float, optional
        Damps the correction of layers of small variance. With 0, a layer of variance below 1e-30 is
        not scaled.
    unbiased : bool, optional
        Variances divide by the number of elements less one. A layer of one element is not scaled.
    ratio : float
        Strength of the correction in [0, 1]. More would overshoot, which diverges after some
        thousand rounds.
    include_1d : bool, optional
        Rescale layers of less than two dimensions too. Biases start as zeros and the gains of
        normalisation layers lie close to 1: their small variance would be amplified.
    convention : {"dfl2", "dfl_torch"}
        Values of `eps`, `unbiased` and `include_1d` that are not given: 0, False, False of the C++
        simulator, or 1e-4, True, True of the PyTorch one. 1e-4 is large beside the variance of real
        layers (4e-4 for a deviation of 0.02) and damps the correction.
    keep : sequence of str
        Layers of a dict whose name contains one of these keep their own values, as integer layers
        do: statistics of batch normalisation are neither averaged nor rescaled.
    nonfinite : {"raise", "exclude", "propagate"}
        What a model with a NaN or an infinity does: raise `NonFiniteError`, nothing added; be
        counted in `excluded` and not added; or pass into the result. "propagate" reads each
        model once (s + 8 bytes a value of s bytes), the others check before they add (2 s + 8).
    variant : str, optional
        Which implementation runs, see `flcore.ops.moments`.

    Attributes
    ----------
    count : int
        Models that were added since the last `reset`.
    excluded : int
        Models that were left out as non-finite.
    nbytes : int
        Bytes held by the accumulator.

    Notes
    -----
    Robust aggregation comes first and correction after it: add only the models that a robust rule
    kept, because the target is taken from what was added.

    References
    ----------
    Tian, Al-Ars, Kitsak & Hofstee, "Vanishing Variance Problem in Fully Decentralized
    Neural-Network Systems", 2024, arXiv 2404.04616.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.aggregation import VarianceCorrected
    >>> node = VarianceCorrected(own=0.5)
    >>> for received in ([[1, 2], [3, 4]], [[4, 1], [0, 3]]):
    ...     _ = node.add(np.float32(received))
    >>> node.result(np.float32([[2, 2], [0, 0]]))
    array([[ 3.195702 ,  1.9391404],
           [-0.573983 ,  1.9391404]], dtype=float32)
    """

    def __init__(
        self,
        own: float = 0.5,
        target: str = "others",
        *,
        eps: float | None = None,
        unbiased: bool | None = None,
        ratio: float = 1.0,
        include_1d: bool | None = None,
        convention: str = "dfl2",
        keep: Sequence[str] = KEEP,
        nonfinite: str = "raise",
        variant: str | None = None,
    ) -> None:
        for name, value, allowed in (
            ("target", target, TARGETS),
            ("convention", convention, tuple(CONVENTIONS)),
            ("nonfinite", nonfinite, NONFINITE),
        ):
            if value not in allowed:
                raise InvalidInputError(f"{name}: expected one of {allowed}, got {value!r}")
        preset = CONVENTIONS[convention]
        self.own, self.target = number("own", own, 0.0, 1.0), target
        self.ratio = number("ratio", ratio, 0.0, 1.0)
        self.eps = number("eps", preset["eps"] if eps is None else eps, 0.0)
        self.unbiased = preset["unbiased"] if unbiased is None else bool(unbiased)
        self.include_1d = preset["include_1d"] if include_1d is None else bool(include_1d)
        self.convention, self.keep = convention, (keep,) if isinstance(keep, str) else tuple(keep)
        self.nonfinite, self.variant = nonfinite, variant
        self._layout: _updates.Layout | None = None
        self._averaged: list[int] = []  # positions of the layers that are averaged
        self._scaled = np.zeros(0, bool)  # which of these are rescaled
        self._acc: list[_arrays.View] = []
        self._variances = np.zeros(0)  # sums over the received models
        self.count = self.excluded = 0

    @property
    def nbytes(self) -> int:
        """Bytes held by the accumulator."""
        return sum(v.array.nbytes for v in self._acc)

    def add(self, model: Any) -> VarianceCorrected:
        """Fold in one received model; it is not kept.

        Parameters
        ----------
        model : update
            The first one fixes structure, shapes, dtypes and device for the life of this object.

        Returns
        -------
        VarianceCorrected
            Itself, so that calls can be chained.

        Raises
        ------
        InvalidInputError, DTypeError
            The structure differs; or no layer would be rescaled because all are 1-D.
        NonFiniteError
            See `nonfinite`; nothing was added. Also when finite values overflow the sums, which
            are then lost.
        """
        if self._layout is None:
            layers = self._open(model)
        else:
            layers = self._layout.layers(model, "model")
        views = [_arrays.view(layers[j]) for j in self._averaged]
        policy = "propagate" if self.nonfinite == "propagate" else "raise"
        try:
            found = accumulate_views(self._acc, views, 1.0, nonfinite=policy, variant=self.variant)
        except NonFiniteError as err:
            if not err.clients:  # finite values that overflow
                raise
            if self.nonfinite == "exclude":
                self.excluded += 1
                return self
            raise NonFiniteError(
                f"model {self.count} (counted from 0): NaN or infinity found; it was not added. "
                "Pass nonfinite='exclude' to leave such models out",
                (self.count,),
            ) from None
        self._variances += found.variance(self.unbiased)[0]
        self.count += 1
        return self

    def factors(self, own: Any) -> np.ndarray:
        """Return the factor s of every layer that `result(own)` applies; 1 where there is none.

        Near sqrt(k) for k independent networks, near 1 for models of one common start.

        Parameters
        ----------
        own : update
            The own model, like the received ones.

        Returns
        -------
        (layers,) float64 array
        """
        layers = self._own_layers(own)
        scale, _ = self._map([_arrays.view(layers[j]) for j in self._averaged])
        factors = np.ones(len(layers))
        factors[self._averaged] = scale
        return factors

    def result(self, own: Any, *, out: Any = None) -> Any:
        """Return the corrected average of the own and the received models.

        What was added stays until `reset`. Two reads of accumulator and own model, one write.

        Parameters
        ----------
        own : update
            The own model, like the received ones. Its floating layers are not read when c is 0 and
            the target is "others".
        out : update, optional
            Where the result goes; it may be `own`. Untouched when the call raises.

        Returns
        -------
        update
            Of the kind, dtype and device of the models; `out` itself if it was given.

        Raises
        ------
        InvalidInputError, DTypeError
            Nothing was added, or `own` or `out` differ from the received models in structure.
        NonFiniteError
            `own` holds a NaN or an infinity, or a result overflows its dtype; not with
            ``nonfinite="propagate"``.
        """
        layers = self._own_layers(own)
        assert self._layout is not None
        targets = None if out is None else self._layout.layers(out, "out")
        views = [_arrays.view(layers[j]) for j in self._averaged]
        scale, shift = self._map(views)
        results, writes_through = _targets(
            views,
            [layers[j] for j in self._averaged],
            None if targets is None else [targets[j] for j in self._averaged],
            self._layout.select(self._averaged),
            self.nonfinite,
        )
        overflow = affine_views(
            views,
            scale.tolist(),
            shift.tolist(),
            results,
            blend=self._blend(),
            variant=self.variant,
        )
        if overflow and self.nonfinite != "propagate":
            raise NonFiniteError("result: a corrected value overflows the dtype of its layer")
        done = {j: r.array for j, r in zip(self._averaged, results, strict=True)}
        for j, x in enumerate(layers):
            if j not in done:
                done[j] = _arrays.empty_like(x) if targets is None else targets[j]
                _arrays.assign(done[j], x)
            elif targets is not None and not writes_through:
                _arrays.assign(targets[j], done[j])
        return out if out is not None else self._layout.build([done[j] for j in range(len(layers))])

    def reset(self) -> VarianceCorrected:
        """Forget the received models, as after every averaging; the memory is kept."""
        for view in self._acc:
            view.array[...] = 0
        self._variances[...] = 0
        self.count = self.excluded = 0
        return self

    # ---- internals -----------------------------------------------------------------------------

    def _open(self, model: Any) -> list[Any]:
        """Take the structure from the first model; return its layers."""
        layout, layers = _updates.flatten(model, "model")
        floats, _ = split_layers(layout)
        averaged = [j for j in floats if not any(k in str(layout.keys[j]) for k in self.keep)]
        scaled = np.array([self.include_1d or len(layout.specs[j][2]) > 1 for j in averaged], bool)
        if averaged and not scaled.any():
            raise InvalidInputError(
                "model: expected a layer of two or more dimensions; others are averaged without a "
                "correction unless include_1d=True"
            )
        views = [_arrays.view(layers[j]) for j in averaged]
        self._acc = [_arrays.view(zeros(v, "float32")) for v in views]
        self._averaged, self._scaled = averaged, scaled
        self._variances = np.zeros(len(averaged))
        self._layout = layout
        return layers

    def _own_layers(self, own: Any) -> list[Any]:
        if self._layout is None or not self.count:
            raise InvalidInputError("result: no model was added")
        return self._layout.layers(own, "own")

    def _blend(self) -> tuple[list[_arrays.View], float, float]:
        return self._acc, (1 - self.own) / self.count, self.own

    def _map(self, own: list[_arrays.View]) -> tuple[np.ndarray, np.ndarray]:
        """Return scale and shift of each averaged layer: ``out = scale b + shift``."""
        blended = self._finite(moments_views([own], blend=self._blend(), variant=self.variant))
        target = self._variances / self.count
        if self.target != "others":
            mine = self._finite(moments_views([own], variant=self.variant))
            share = 1.0 if self.target == "self" else self.own
            target = share * mine.variance(self.unbiased)[0] + (1 - share) * target
        variance = blended.variance(self.unbiased)[0]
        with np.errstate(divide="ignore", invalid="ignore"):
            scale = 1 + self.ratio * (np.sqrt((target + self.eps) / (variance + self.eps)) - 1)
        constant = (variance + self.eps < TINY) | (blended.count[0] <= self.unbiased)
        scale[constant | ~self._scaled] = 1.0
        return scale, np.where(scale == 1, 0.0, blended.mean[0] * (1 - scale))

    def _finite(self, found: Moments) -> Moments:
        fine = np.isfinite(found.m2) & (np.isfinite(found.mean) | (found.count == 0))
        if self.nonfinite != "propagate" and not fine.all():
            assert self._layout is not None
            j = self._averaged[int(np.flatnonzero(~fine[0])[0])]
            raise NonFiniteError(
                f"{self._layout.label('own', j)}: NaN or infinity found, or its blend with the "
                "received models overflows"
            )
        return found
