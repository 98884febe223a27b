"""The end of a client's round: its update, and its state from it, in one pass."""

from __future__ import annotations

from typing import Any

from flcore.errors import InvalidInputError
from flcore.ops._local_numbers import active_rows, parse_number
from flcore.ops._local_pieces import Pieces, one_model, parse_rows, slots
from flcore.ops._local_shift import _like, _like_rows
from flcore.ops.local_step import run

__all__ = ["KINDS", "round_end", "round_end_rows"]

KINDS = ("update", "dual", "control")


def round_end(
    x: Any,
    w: Any,
    *,
    kind: str = "update",
    state: Any = None,
    c: Any = None,
    scale: float | None = None,
    out: Any = None,
    variant: str | None = None,
) -> Any:
    """Return the update ``u = x - w`` of a client, and bring its state up to date in the same pass.

    ``update``: nothing else. ``dual``: ``state += u``, the dual variable of FedDyn and FedSpeed.
    ``control``: ``state <- state - c - scale u``, the control variate of SCAFFOLD with
    ``scale = 1 / (K lr)``. 12 bytes a float32 value, 20 (dual) or 24 (control).

    Parameters
    ----------
    x : array, or list, tuple or dict of arrays
        The trained parameters, as in `flcore.ops.local_step`; only read.
    w : like x
        Those that the round started from; only read.
    kind : {"update", "dual", "control"}
    state : like x
        For "dual" and "control"; overwritten.
    c : like x
        For "control": the server's control variate; only read.
    scale : float
        For "control".
    out : like x, optional
        Where u goes, allocated by default; may be x or w.
    variant : {"reference", "cpu", "triton"}, optional

    Returns
    -------
    like x
        `out`.

    Raises
    ------
    InvalidInputError, DTypeError, VariantUnavailableError
        As `flcore.ops.local_step`; InvalidInputError also when what the kind needs is missing, or
        something that it does not use is given.

    References
    ----------
    Karimireddy et al., "SCAFFOLD", ICML 2020, arXiv 1910.06378, Algorithm 1, option II. Acar et
    al., "Federated Learning Based on Dynamic Regularization", ICLR 2021, arXiv 2111.04263.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.ops import round_end
    >>> h = np.array([1.0, 1.0])
    >>> round_end(np.array([3.0, 5.0]), np.array([2.0, 2.0]), kind="dual", state=h)
    array([1., 3.])
    >>> h
    array([2., 4.])
    """
    _check(kind, state, c, scale)
    out = _like(x) if out is None else out
    given = slots(x=("x", x), g=("w", w), q=("c", c), state=("state", state), out=("out", out))
    pieces = one_model(given, ("out",) if state is None else ("state", "out"))
    _run(pieces, kind, 0.0 if scale is None else parse_number(scale, "scale", None), None, variant)
    return out


def round_end_rows(
    x: Any,
    w: Any,
    *,
    kind: str = "update",
    state: Any = None,
    c: Any = None,
    scale: Any = None,
    out: Any = None,
    active: Any = None,
    variant: str | None = None,
) -> Any:
    """Return `round_end` of the rows of (rows, d) arrays.

    c: (rows, d), or (d,) for all rows; scale: float or (rows,) float64. Rows and `active` are as in
    `flcore.ops.local_step_rows`; rows of `out` that do not take part are not written.

    Raises
    ------
    InvalidInputError, DTypeError, VariantUnavailableError
        As `round_end`.
    """
    _check(kind, state, c, scale)
    out = _like_rows(x) if out is None else out
    given = slots(x=("x", x), g=("w", w), q=("c", c), state=("state", state), out=("out", out))
    pieces = parse_rows(given, ("out",) if state is None else ("state", "out"))
    rate = 0.0 if scale is None else parse_number(scale, "scale", pieces.groups)
    _run(pieces, kind, rate, active_rows(active, pieces.groups), variant)
    return out


def _check(kind: str, state: Any, c: Any, scale: Any) -> None:
    if kind not in KINDS:
        raise InvalidInputError(f"kind: expected one of {KINDS}, got {kind!r}")
    for name, value, users in (
        ("state", state, ("dual", "control")),
        ("c", c, ("control",)),
        ("scale", scale, ("control",)),
    ):
        if (value is not None) != (kind in users):
            expected = "is needed" if kind in users else "is not used"
            raise InvalidInputError(f"{name}: {expected} with kind={kind!r}")


def _run(pieces: Pieces, kind: str, rate: Any, active: Any, variant: str | None) -> None:
    run(pieces, kind, rate=rate, active=active, variant=variant)
    pieces.deliver()
