"""Count, mean and squared deviations of every layer, and the affine map of a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from flcore import _arrays, _updates, _variants
from flcore._arrays import View
from flcore.errors import InvalidInputError, NonFiniteError
from flcore.ops.combine import _targets, one_device
from flcore.reference.moments import Blend

__all__ = [
    "Moments",
    "accumulate_moments",
    "accumulate_views",
    "affine",
    "affine_views",
    "moments",
    "moments_each",
    "moments_views",
]

POLICIES = ("raise", "propagate")


class Moments(NamedTuple):
    """Moments of the layers of one update, (layers,), or of n updates, (n, layers); float64.

    Attributes
    ----------
    count : array
        Values of each layer.
    mean : array
        NaN for a layer of no values.
    m2 : array
        Sum of the squared deviations from the mean; 0 for a layer of no values.
    """

    count: np.ndarray  # type: ignore[assignment]  # tuple.count is not needed here
    mean: np.ndarray
    m2: np.ndarray

    def variance(self, unbiased: bool = False) -> np.ndarray:
        """Return ``m2 / count``, or ``m2 / (count - 1)`` if `unbiased`.

        NaN for a layer of no values, and for one of one value if `unbiased`.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(self.count > unbiased, self.m2 / (self.count - unbiased), np.nan)


def moments(update: Any, *, nonfinite: str = "raise", variant: str | None = None) -> Moments:
    r"""Count, mean and sum of squared deviations of every layer of one update.

    Reads every value once, s bytes for a dtype of s bytes, and writes nothing of that size.

    Parameters
    ----------
    update : update
        An array, or a list, tuple or dict of arrays (NumPy, or torch on CPU or CUDA) of float64,
        float32, float16 or bfloat16.
    nonfinite : {"raise", "propagate"}
        What a NaN or an infinity does: raise, or pass into the moments of its layer: the mean is
        what float64 gives, m2 is NaN.
    variant : {"reference", "cpu", "triton"}, optional
        Which implementation runs; by default the best for the device.

    Returns
    -------
    Moments
        Arrays of shape (layers,), in the order of the layers.

    Raises
    ------
    DTypeError, InvalidInputError
        Something that cannot be read, layers on more than one device, unknown options.
    NonFiniteError
        See `nonfinite`; also when squares of finite float64 values overflow.
    VariantUnavailableError
        The named variant cannot run here.

    Notes
    -----
    Sums are float64. Tiles of 4096 values, each shifted by one of its values, are joined in a fixed
    tree by the formula of Chan, Golub and LeVeque: the relative error of m2 stays near 10^-12 at
    most, however far the mean is from zero, and the bits are the same on every instruction set,
    device and number of threads.

    References
    ----------
    Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm for computing sample
    variances", COMPSTAT 1982.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.ops import moments
    >>> m = moments([np.float32([1, 2, 3, 4]), np.float32([[5, 5]])])
    >>> m.mean, m.variance(), m.variance(unbiased=True)
    (array([2.5, 5. ]), array([1.25, 0.  ]), array([1.66666667, 0.        ]))
    """
    layout, arrays = _updates.flatten(update)
    views = layout.views(arrays, "update")
    _check_policy(nonfinite)
    found = moments_views([views], variant=variant)
    if nonfinite == "raise" and (wrong := _not_finite([views], found, variant)):
        raise NonFiniteError(f"update: {wrong[1]}", wrong[0])
    return Moments(*(values[0] for values in found))


def moments_each(updates: Any, *, nonfinite: str = "raise", variant: str | None = None) -> Moments:
    """Count, mean and squared deviations of every layer of each of n updates, in one call.

    Parameters
    ----------
    updates : sequence of updates, or array of shape (n, ...)
        Alike in structure, shapes, dtypes and device.
    nonfinite : {"raise", "propagate"}
        As for `moments`; the error names the clients.
    variant : {"reference", "cpu", "triton"}, optional
        Which implementation runs.

    Returns
    -------
    Moments
        Arrays of shape (n, layers).

    Raises
    ------
    DTypeError, InvalidInputError, NonFiniteError, VariantUnavailableError
        As `moments`.
    """
    layout, rows = _updates.parse_updates(updates)
    views = [layout.views(row, f"updates[{i}]") for i, row in enumerate(rows)]
    _check_policy(nonfinite)
    found = moments_views(views, variant=variant)
    if nonfinite == "raise" and (wrong := _not_finite(views, found, variant)):
        names = ", ".join(f"updates[{i}]" for i in wrong[0]) or "updates"
        raise NonFiniteError(f"{names}: {wrong[1]}", wrong[0])
    return found


def accumulate_moments(
    acc: Any,
    update: Any,
    weight: float = 1.0,
    *,
    nonfinite: str = "raise",
    variant: str | None = None,
) -> Moments:
    """Add ``weight * update`` to `acc` in place, and return the moments of `update`.

    On a CPU one read of the update serves both: s + 8 bytes a value for a float32 accumulator. With
    ``nonfinite="raise"``, and on a GPU, the moments come first, so that a bad update leaves `acc`
    as it was: 2 s + 8 bytes, less when the update is still in cache.

    Parameters
    ----------
    acc : update
        Of the structure and shapes of `update`; float64 for a float64 layer, float32 for any other.
        Contiguous.
    update : update
        As for `moments`.
    weight : float
        Finite.
    nonfinite : {"raise", "propagate"}
        What a NaN or an infinity in the update does: raise, with nothing written; or pass into
        `acc` and into the moments.
    variant : {"reference", "cpu", "triton"}, optional
        Which implementation runs.

    Returns
    -------
    Moments
        Of `update` without the weight, arrays of shape (layers,).

    Raises
    ------
    DTypeError, InvalidInputError, VariantUnavailableError
        As `moments`; `acc` has another structure, shape, dtype or device, is read-only or not
        contiguous.
    NonFiniteError
        See `nonfinite`; also when the sum overflows, in which case `acc` has been written.

    Notes
    -----
    The sums have the bits of a streaming `flcore.aggregation.Accumulator`.
    """
    layout, arrays = _updates.flatten(update)
    views = layout.views(arrays, "update")
    _check_policy(nonfinite)
    weight = _updates.parse_weights([weight], 1, signed=True, name="weight")[0]
    targets = _accumulators(acc, layout, views)
    found = accumulate_views(targets, views, weight, nonfinite=nonfinite, variant=variant)
    return Moments(*(values[0] for values in found))


def affine(
    update: Any,
    scale: Any,
    shift: Any,
    *,
    out: Any = None,
    nonfinite: str = "raise",
    variant: str | None = None,
) -> Any:
    """Map every layer: ``out_l = scale_l * x_l + shift_l``.

    Reads and writes every value once, 2 s bytes. Computed in float64 and rounded once.

    Parameters
    ----------
    update : update
        As for `moments`.
    scale, shift : (layers,) numbers, or one number for all layers
        Finite.
    out : update, optional
        Where the result goes; of the structure, shapes and dtypes of `update`, which it may be.
        Nothing is written when the call raises.
    nonfinite : {"raise", "propagate"}
        What a NaN or an infinity in the update, or an overflow of the dtype, does.
    variant : {"reference", "cpu", "triton"}, optional
        Which implementation runs.

    Returns
    -------
    update
        Of the kind, dtypes and device of `update`; `out` itself if it was given.

    Raises
    ------
    DTypeError, InvalidInputError, NonFiniteError, VariantUnavailableError
        As `moments`; numbers that are not finite or not one a layer.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.ops import affine
    >>> affine([np.float32([1, 2]), np.float32([3])], scale=[2, 10], shift=0.5)
    [array([2.5, 4.5], dtype=float32), array([30.5], dtype=float32)]
    """
    layout, arrays = _updates.flatten(update)
    views = layout.views(arrays, "update")
    _check_policy(nonfinite)
    scales = _per_layer(scale, len(views), "scale")
    shifts = _per_layer(shift, len(views), "shift")
    targets = None if out is None else layout.layers(out, "out")
    results, writes_through = _targets(views, arrays, targets, layout, nonfinite)
    if affine_views(views, scales, shifts, results, variant=variant) and nonfinite == "raise":
        raise NonFiniteError(f"update: {_reason([views], variant, 'a result')[1]}")
    if out is None:
        return layout.build([r.array for r in results])
    if not writes_through:
        for target, result in zip(targets or [], results, strict=True):
            _arrays.assign(target, result.array)
    return out


# ---- on views, for classes that keep their own layers ------------------------------------------


def moments_views(
    rows: Sequence[Sequence[View]], *, blend: Blend | None = None, variant: str | None = None
) -> Moments:
    """Moments of n rows of layers, or of one row blended into an accumulator; arrays (n, layers).

    `blend` is (acc, acc_weight, row_weight): the values are ``acc_weight acc + row_weight row``,
    formed in float64 and not written; at row_weight 0 the row is not read.
    """
    mean, m2 = _variants.choose("moments", one_device(rows[0]), variant)(rows, blend=blend)
    return _moments(rows, mean, m2)


def accumulate_views(
    acc: Sequence[View], row: Sequence[View], weight: float, *, nonfinite: str, variant: str | None
) -> Moments:
    """Core of `accumulate_moments`; arrays (1, layers)."""
    device = one_device(row)
    if nonfinite == "propagate":
        add = _variants.choose("accumulate_moments", device, variant)
        return _moments([row], *add(acc, row, weight))
    found = moments_views([row], variant=variant)
    if wrong := _not_finite([row], found, variant):
        raise NonFiniteError(f"update: {wrong[1]}; it was not added", wrong[0])
    overflow = _variants.choose("combine", device, variant)(
        [row],
        [weight],
        layers=row,
        state=[a.array for a in acc],
        out=None,
        accumulate="float32",
        divisor=1.0,
        check=True,
    )
    if overflow:
        raise NonFiniteError("acc: the accumulated sum overflows; add with a smaller weight")
    return found


def affine_views(
    row: Sequence[View],
    scale: Sequence[float],
    shift: Sequence[float],
    out: Sequence[View],
    *,
    blend: Blend | None = None,
    variant: str | None = None,
) -> bool:
    """Write the map of a row, or of a blend, into `out`; whether a result is not finite."""
    function = _variants.choose("affine", one_device(row), variant)
    return function(row, scale, shift, out=out, blend=blend)


def _moments(rows: Sequence[Sequence[View]], mean: np.ndarray, m2: np.ndarray) -> Moments:
    count = np.array([[float(v.numel) for v in row] for row in rows]).reshape(mean.shape)
    return Moments(count, np.where(count > 0, mean, np.nan), m2)


def _not_finite(
    rows: Sequence[Sequence[View]], found: Moments, variant: str | None
) -> tuple[tuple[int, ...], str] | None:
    """Rows that hold a NaN or an infinity, and a sentence; None when all moments are finite."""
    fine = np.isfinite(found.m2) & (np.isfinite(found.mean) | (found.count == 0))
    return None if fine.all() else _reason(rows, variant, "a sum of squares")


def _reason(
    rows: Sequence[Sequence[View]], variant: str | None, what: str
) -> tuple[tuple[int, ...], str]:
    flags = _variants.choose("nonfinite", one_device(rows[0]), variant)(rows)
    bad = tuple(i for i, is_bad in enumerate(flags) if is_bad)
    if bad:
        return bad, "NaN or infinity found. nonfinite='propagate' lets it through"
    return bad, f"all values are finite but {what} overflows; scale the values down"


def _accumulators(acc: Any, layout: _updates.Layout, like: Sequence[View]) -> list[View]:
    own, arrays = _updates.flatten(acc, "acc")
    if own.kind is not layout.kind or set(own.keys) != set(layout.keys):
        raise InvalidInputError("acc: expected the structure of update, got another")
    if own.keys != layout.keys:
        arrays = [acc[key] for key in layout.keys]
    views = []
    for j, (x, v) in enumerate(zip(arrays, like, strict=True)):
        label = layout.label("acc", j)
        if tuple(x.shape) != layout.specs[j][2]:
            raise InvalidInputError(
                f"{label}: expected shape {layout.specs[j][2]}, got {tuple(x.shape)}"
            )
        wide = "float64" if v.dtype == "float64" else "float32"
        view = _arrays.writable_view(x, label, v._replace(dtype=wide))
        if view is None:
            raise InvalidInputError(f"{label}: expected a contiguous array")
        views.append(view)
    return views


def _check_policy(nonfinite: str) -> None:
    if nonfinite not in POLICIES:
        raise InvalidInputError(f"nonfinite: expected one of {POLICIES}, got {nonfinite!r}")


def _per_layer(values: Any, layers: int, name: str) -> list[float]:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise InvalidInputError(f"{name}: expected numbers, got {values!r}") from None
    if array.shape not in ((), (layers,)):
        raise InvalidInputError(
            f"{name}: expected one number or {layers}, one a layer, got shape {array.shape}"
        )
    if not np.isfinite(array).all():
        raise InvalidInputError(f"{name}: expected finite numbers, got {values!r}")
    return np.broadcast_to(array, (layers,)).tolist()


for _op in ("moments", "accumulate_moments", "affine"):
    for _name, _module, _missing in (
        ("cpu", "flcore.ops._moments_cpu", _variants.cpu_only),
        ("reference", "flcore.reference.moments", lambda device: ""),
        ("triton", "flcore.pykernels.moments", _variants.needs_triton),
    ):
        _variants.add(_op, _name, _variants.lazy(_module, _op), _missing)
