"""Points beside the parameters, where some methods take their gradient, and norms of gradients."""

from __future__ import annotations

from typing import Any

import numpy as np

from flcore import _arrays, _updates
from flcore.ops._local_numbers import active_rows, parse_number
from flcore.ops._local_pieces import Pieces, one_model, parse_rows, slots
from flcore.ops.local_step import EPS, run

__all__ = [
    "global_norm",
    "global_norm_rows",
    "sam_shift",
    "sam_shift_rows",
    "shift",
    "shift_rows",
]


def shift(x: Any, v: Any, s: float, *, out: Any = None, variant: str | None = None) -> Any:
    """Return ``x + s v``; x keeps its bits, so that nothing has to be restored.

    12 bytes a float32 value.

    Parameters
    ----------
    x : array, or list, tuple or dict of arrays
        As in `flcore.ops.local_step`; only read.
    v : like x
    s : float
    out : like x, optional
        Where the result goes, allocated by default; may be x or v.
    variant : {"reference", "cpu", "triton"}, optional

    Returns
    -------
    like x
        `out`.

    Raises
    ------
    InvalidInputError, DTypeError, VariantUnavailableError
        As `flcore.ops.local_step`.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.ops import shift
    >>> shift(np.array([1.0, 2.0]), np.array([3.0, 4.0]), 0.5)
    array([2.5, 4. ])
    """
    out = _like(x) if out is None else out
    pieces = one_model(slots(x=("x", x), g=("v", v), out=("out", out)), ("out",))
    _run(pieces, "shift", rate=parse_number(s, "s", None), variant=variant)
    return out


def shift_rows(
    x: Any,
    v: Any,
    s: Any,
    *,
    out: Any = None,
    active: Any = None,
    variant: str | None = None,
) -> Any:
    """Return ``x + s v`` for the rows of (rows, d) arrays; s: float or (rows,) float64.

    See `shift`, and `flcore.ops.local_step_rows` for rows and `active`; rows of `out` that do not
    take part are not written.

    Raises
    ------
    InvalidInputError, DTypeError, VariantUnavailableError
        As `flcore.ops.local_step_rows`.
    """
    out = _like_rows(x) if out is None else out
    pieces = parse_rows(slots(x=("x", x), g=("v", v), out=("out", out)), ("out",))
    rate = parse_number(s, "s", pieces.groups)
    _run(pieces, "shift", rate=rate, active=active_rows(active, pieces.groups), variant=variant)
    return out


def sam_shift(
    x: Any,
    g: Any,
    rho: float,
    *,
    q: Any = None,
    alpha: float = 1.0,
    out: Any = None,
    eps: float = EPS,
    variant: str | None = None,
) -> Any:
    """Return ``x + rho / (||v|| + eps) v`` with ``v = alpha g + q``: the point SAM climbs to.

    The norm is that of all tensors together; it stays on the device. 12 bytes a float32 value
    without q, and 4 before for the norm, from cache where the model fits. A norm that is not
    finite gives NaN.

    Parameters
    ----------
    x, g : array, or list, tuple or dict of arrays
        As in `flcore.ops.local_step`; only read.
    rho : float
    q : like x, optional
    alpha : float
    out : like x, optional
        Where the result goes, allocated by default; may be x or g.
    eps : float
    variant : {"reference", "cpu", "triton"}, optional

    Returns
    -------
    like x
        `out`.

    Raises
    ------
    InvalidInputError, DTypeError, VariantUnavailableError
        As `flcore.ops.local_step`.

    References
    ----------
    Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", ICLR
    2021, arXiv 2010.01412, equation 2.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.ops import sam_shift
    >>> sam_shift(np.zeros(2), np.array([3.0, 4.0]), 0.5, eps=0.0)
    array([0.3, 0.4])
    """
    out = _like(x) if out is None else out
    pieces = one_model(slots(x=("x", x), g=("g", g), q=("q", q), out=("out", out)), ("out",))
    _sam(pieces, rho, alpha, eps, None, None, variant)
    return out


def sam_shift_rows(
    x: Any,
    g: Any,
    rho: Any,
    *,
    q: Any = None,
    alpha: Any = 1.0,
    out: Any = None,
    eps: float = EPS,
    active: Any = None,
    variant: str | None = None,
) -> Any:
    """Return `sam_shift` of the rows of (rows, d) arrays, each with a norm of its own.

    rho, alpha: float or (rows,) float64; q: (rows, d) or (d,). Rows and `active` are as in
    `flcore.ops.local_step_rows`; rows of `out` that do not take part are not written.

    Raises
    ------
    InvalidInputError, DTypeError, VariantUnavailableError
        As `flcore.ops.local_step_rows`.
    """
    out = _like_rows(x) if out is None else out
    pieces = parse_rows(slots(x=("x", x), g=("g", g), q=("q", q), out=("out", out)), ("out",))
    _sam(pieces, rho, alpha, eps, pieces.groups, active, variant)
    return out


def global_norm(g: Any, q: Any = None, *, alpha: float = 1.0, variant: str | None = None) -> float:
    """Return ``||alpha g + q||`` over all tensors, summed in float64.

    4 bytes a float32 value, 8 with q. (On a GPU this waits for the device.)

    Parameters
    ----------
    g : array, or list, tuple or dict of arrays
        As in `flcore.ops.local_step`.
    q : like g, optional
    alpha : float
    variant : {"reference", "cpu", "triton"}, optional

    Raises
    ------
    InvalidInputError, DTypeError, VariantUnavailableError
        As `flcore.ops.local_step`.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.ops import global_norm
    >>> global_norm([np.array([3.0]), np.array([[4.0]])])
    5.0
    """
    pieces = one_model(slots(g=("g", g), q=("q", q)), ())
    _, arrays = _updates.flatten(g, "g")
    norms = _empty_norms(arrays[0] if arrays else np.empty(0), 1)
    _norm(pieces, norms, alpha, None, None, variant)
    return float(norms[0])


def global_norm_rows(
    g: Any, q: Any = None, *, alpha: Any = 1.0, active: Any = None, variant: str | None = None
) -> Any:
    """Return ``||alpha g + q||`` of each row, (rows,) float64, where g is; 0 for others.

    alpha: float or (rows,) float64; q: (rows, d) or (d,). Rows and `active` are as in
    `flcore.ops.local_step_rows`; norms of rows that do not take part are 0.

    Raises
    ------
    InvalidInputError, DTypeError, VariantUnavailableError
        As `flcore.ops.local_step_rows`.
    """
    pieces = parse_rows(slots(g=("g", g), q=("q", q)), ())
    norms = _empty_norms(g, pieces.groups)
    _norm(pieces, norms, alpha, pieces.groups, active, variant)
    return norms


# ---- what the forms share ----------------------------------------------------------------------


def _sam(
    pieces: Pieces,
    rho: Any,
    alpha: Any,
    eps: float,
    rows: int | None,
    active: Any,
    variant: str | None,
) -> None:
    _run(
        pieces,
        "sam",
        rate=parse_number(rho, "rho", rows),
        alpha=parse_number(alpha, "alpha", rows),
        eps=parse_number(eps, "eps", None),
        with_q="q" in pieces.operands,
        active=active_rows(active, rows or 1),
        variant=variant,
    )


def _norm(
    pieces: Pieces, norms: Any, alpha: Any, rows: int | None, active: Any, variant: str | None
) -> None:
    run(
        pieces,
        "norm",
        alpha=parse_number(alpha, "alpha", rows),
        with_q="q" in pieces.operands,
        active=active_rows(active, rows or 1),
        norms=norms,
        variant=variant,
    )


def _run(pieces: Pieces, kind: str, **options: Any) -> None:
    run(pieces, kind, **options)
    pieces.deliver()


def _empty_norms(like: Any, groups: int) -> Any:
    if isinstance(like, np.ndarray):
        return np.zeros(groups)
    return like.new_zeros(groups, dtype=_float64(like))


def _float64(like: Any) -> Any:
    import sys

    return sys.modules["torch"].float64


def _like(x: Any) -> Any:
    """Return new arrays of the structure of `x`."""
    layout, arrays = _updates.flatten(x, "x")
    return layout.build([_arrays.empty_like(a) for a in arrays])


def _like_rows(x: Any) -> Any:
    from flcore.errors import DTypeError

    if not _arrays.is_array(x):
        raise DTypeError(f"x: expected an array (rows, d), got {type(x).__name__}")
    return _arrays.empty_like(x)
