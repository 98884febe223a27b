"""Many weighted sums of the same client updates, ``A x`` for an m x n matrix A, in one read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flcore import _arrays, _native, _updates, _variants
from flcore._arrays import View
from flcore.errors import InvalidInputError, NonFiniteError
from flcore.ops.combine import ACCUMULATE, _check_options, _targets, one_device, settle

__all__ = ["combine_rows"]


def combine_rows(
    updates: Any,
    matrix: Any,
    *,
    out: Sequence[Any] | None = None,
    accumulate: str = "float32",
    nonfinite: str = "raise",
    variant: str | None = None,
) -> list[Any]:
    r"""Weighted sums of the same updates, ``sum_i matrix[k, i] * updates[i]`` for each line k.

    What mixing rules (nearest-neighbour mixing, bucketing) and gossip averaging do. A tile of all
    rows stays in cache while the m results are formed: ``n*s + m*s`` bytes a coordinate for a dtype
    of s bytes, however large m is. Each result has the bits of `combine` with that line of the
    matrix. A zero is not a weight: that row is not read for that result, and a client whose column
    is zero is not read at all.

    Parameters
    ----------
    updates : sequence of updates, or array of shape (n, ...)
        One update a client, as for `combine`.
    matrix : (m, n) numbers
        Finite, any sign.
    out : sequence of m updates, optional
        Where the results go. They may be the updates themselves. Nothing is written when the call
        raises.
    accumulate : {"float32", "float64", "reproducible"}
        Type of the sums, see `combine`.
    nonfinite : {"raise", "exclude", "propagate"}
        What a NaN or an infinity does, see `combine`. "exclude" takes the client out of every sum,
        which does not change the other coefficients, and raises when a sum has no client left.
    variant : {"reference", "cpu", "triton"}, optional
        Which implementation runs; by default the best for the device.

    Returns
    -------
    list of m updates
        The updates of `out` if it was given.

    Raises
    ------
    InvalidInputError, DTypeError, NonFiniteError, VariantUnavailableError
        See `combine`.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.ops import combine_rows
    >>> x = np.float32([[1, 2], [3, 4], [5, 6]])
    >>> combine_rows(x, [[0.5, 0.5, 0], [0, 0, 1]])
    [array([2., 3.], dtype=float32), array([5., 6.], dtype=float32)]
    """
    _check_options(accumulate, nonfinite, 1.0)
    layout, rows = _updates.parse_updates(updates)
    a = _parse_matrix(matrix, len(rows))
    views = [layout.views(row, f"updates[{i}]") for i, row in enumerate(rows)]
    device = one_device(views[0])
    given = None if out is None else _open_out(out, layout, len(a))
    pairs = [
        _targets(views[0], rows[0], None if given is None else given[k], layout, nonfinite)
        for k in range(len(a))
    ]
    direct = all(through for _, through in pairs)
    if direct and _arrays.overlap(
        (v for targets, _ in pairs for v in targets), (v for row in views for v in row)
    ):  # a result would be written over a row that a later result reads
        pairs = [_targets(views[0], rows[0], None, layout, nonfinite) for _ in a]
        direct = False
    targets = [views for views, _ in pairs]
    function = _variants.choose("combine_rows", device, variant)

    def run(keep: set[int], active: list[int], w: Sequence[float]) -> int:
        some = a[:, active]
        emptied = (a != 0).any(axis=1) & ~(some != 0).any(axis=1)
        for k in np.flatnonzero(emptied):
            lost = tuple(i for i in range(len(rows)) if i not in keep)
            raise NonFiniteError(
                f"updates: NaN or infinity found in {list(lost)}, and no client is left for line "
                f"{k} of the matrix",
                lost,
            )
        return function(
            [views[i] for i in active],
            some,
            layers=views[0],
            out=targets,
            accumulate=accumulate,
            check=nonfinite != "propagate" or accumulate == "reproducible",
        )

    read = (a != 0).any(axis=0)
    settle(
        run,
        views,
        lambda keep: [float(read[i]) if i in keep else 0.0 for i in range(len(rows))],
        device=device,
        variant=variant,
        nonfinite=nonfinite,
        accumulate=accumulate,
    )
    if given is None:
        return [layout.build([t.array for t in layers]) for layers in targets]
    if not direct:
        for layers, results in zip(given, targets, strict=True):
            for layer, result in zip(layers, results, strict=True):
                _arrays.assign(layer, result.array)
    assert out is not None
    return list(out)


def _parse_matrix(matrix: Any, n: int) -> np.ndarray:
    if _arrays.is_torch(matrix):
        matrix = matrix.detach().cpu().numpy()
    try:
        a = np.array(matrix, dtype=np.float64)
    except (TypeError, ValueError):
        raise InvalidInputError(f"matrix: expected (m, {n}) numbers, got {matrix!r}") from None
    if a.ndim != 2 or a.shape[1] != n or not len(a):
        raise InvalidInputError(
            f"matrix: expected shape (m, {n}), a line a result and a column a client, got {a.shape}"
        )
    if not np.isfinite(a).all():
        k, i = (int(v) for v in np.argwhere(~np.isfinite(a))[0])
        raise InvalidInputError(f"matrix[{k}, {i}]: expected a finite number, got {a[k, i]}")
    return a


def _open_out(out: Any, layout: _updates.Layout, m: int) -> list[list[Any]]:
    if not isinstance(out, list | tuple) or len(out) != m:
        got = f"{len(out)} of them" if isinstance(out, list | tuple) else type(out).__name__
        raise InvalidInputError(f"out: expected a list of {m} updates, got {got}")
    return [layout.layers(update, f"out[{k}]") for k, update in enumerate(out)]


# ---- variants ----------------------------------------------------------------------------------


def _combine_rows_cpu(
    rows: Sequence[Sequence[View]],
    matrix: np.ndarray,
    *,
    layers: Sequence[View],
    out: Sequence[Sequence[View]],
    accumulate: str,
    check: bool,
) -> int:
    """csrc/cpu/combine.isa.cpp; matrix (m, rows), out `[m][layers]`."""
    lines, index = np.nonzero(matrix)
    starts = np.zeros(len(matrix) + 1, dtype=np.int64)
    starts[1:] = np.cumsum(np.bincount(lines, minlength=len(matrix)))
    numel = [v.numel for v in layers]
    return _native.core.combine_rows(
        [v.ptr for row in rows for v in row],
        len(rows),
        starts.tolist(),
        index.tolist(),
        matrix[lines, index].tolist(),
        numel,
        [v.code for v in layers],
        [v.ptr for line in out for v in line],
        ACCUMULATE.index(accumulate),
        _native.threads_for(sum(numel) * (len(rows) + len(matrix))),
        check,
    )


_variants.add(
    "combine_rows", "cpu", _variants.lazy(__name__, "_combine_rows_cpu"), _variants.cpu_only
)
_variants.add(
    "combine_rows", "reference", _variants.lazy("flcore.reference.combine", "combine_rows")
)
_variants.add(
    "combine_rows",
    "triton",
    _variants.lazy("flcore.pykernels.combine_rows", "combine_rows"),
    _variants.needs_triton,
)
