"""Squared norms, squared distances and inner products of client updates, in one read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flcore import _native, _updates, _variants
from flcore._arrays import View
from flcore.errors import InvalidInputError
from flcore.ops._packet_rows import PacketRows, by_reference, packet_rows
from flcore.ops.combine import NONFINITE, bad_clients, one_device
from flcore.reference.gram import KINDS

__all__ = ["Gram", "gram"]

PRECISIONS = ("auto", "float32", "float64")


@dataclass(frozen=True)
class Gram:
    """What `gram` found, in float64; with ``per_layer`` an axis of L layers comes first.

    Attributes
    ----------
    norms : (n,) or (L, n)
        Squared L2 norms.
    distances : (n, n) or (L, n, n), or None
        Squared distances, symmetric with a zero diagonal; for kind "distances".
    products : (n, n) or (L, n, n), or None
        Inner products; for kind "products".
    nonfinite : tuple of int
        Updates that hold a NaN or an infinity.
    precision : str
        "float32" or "float64": type of the differences and of the sums over 1024 coordinates.
    """

    norms: np.ndarray
    distances: np.ndarray | None
    products: np.ndarray | None
    nonfinite: tuple[int, ...]
    precision: str


def gram(
    updates: Any,
    kind: str = "distances",
    *,
    per_layer: bool = False,
    precision: str = "auto",
    like: Any = None,
    nonfinite: str = "raise",
    variant: str | None = None,
) -> Gram:
    r"""Squared norms and, for all pairs, ``||x_i - x_j||^2`` or ``<x_i, x_j>`` of n updates.

    Reads every value once: s bytes a coordinate and client for a dtype of s bytes. Distances come
    from differences, so that a common offset costs no digits (a float32 Gram matrix of rows at 10
    with a spread of 0.01 is off by 70 %).

    Parameters
    ----------
    updates : sequence of updates, array of shape (n, ...), or list of packets
        One update a client, as for `flcore.ops.combine`. Packets are decoded in cache, a tile at a
        time.
    kind : {"distances", "norms", "products"}
        What is wanted beside the norms.
    per_layer : bool
        One matrix a layer instead of one for the whole update.
    precision : {"auto", "float32", "float64"}
        Type of differences and of the sums over 1024 coordinates (everything above is exact).
        float64 layers always use float64. "auto" is float32, and float64 in a second read when
        that range did not suffice (values above 1e19, differences below 1e-15).
    like : update, optional
        With packets: the layers, for ``per_layer``.
    nonfinite : {"raise", "exclude", "propagate"}
        A NaN or an infinity in an update: raise and name the client; list it in `nonfinite`, its
        norms and distances infinite and its products 0; or as the arithmetic gives it.
    variant : {"reference", "cpu", "cuda"}, optional
        Which implementation runs; by default the best for the device.

    Returns
    -------
    Gram

    Raises
    ------
    InvalidInputError, DTypeError, NonFiniteError, VariantUnavailableError
        As `flcore.ops.combine`.

    Notes
    -----
    On the CPU the result is the same bits for any order of the clients, any split of an update into
    layers, any instruction set and number of threads: coordinates are summed in tiles of 1024 in a
    fixed order and the tiles exactly.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.ops import gram
    >>> gram([np.float32([3, 4]), np.float32([0, 0])]).distances
    array([[ 0., 25.],
           [25.,  0.]])
    """
    if kind not in KINDS:
        raise InvalidInputError(f"kind: expected one of {KINDS}, got {kind!r}")
    if nonfinite not in NONFINITE:
        raise InvalidInputError(f"nonfinite: expected one of {NONFINITE}, got {nonfinite!r}")
    views: Any = packet_rows(updates, like)
    if views is None:
        layout, rows = _updates.parse_updates(updates)
        views = [layout.views(row, f"updates[{i}]") for i, row in enumerate(rows)]
    return gram_views(
        views,
        kind,
        per_layer=per_layer,
        precision=precision,
        nonfinite=nonfinite,
        variant=variant,
    )


def gram_views(
    views: Sequence[Sequence[View]] | PacketRows,
    kind: str,
    *,
    per_layer: bool = False,
    precision: str = "auto",
    nonfinite: str = "raise",
    variant: str | None = None,
) -> Gram:
    """Gram of viewed rows `[n][layers]` or of packets; the core of `gram` and of the rules."""
    if precision not in PRECISIONS:
        raise InvalidInputError(f"precision: expected one of {PRECISIONS}, got {precision!r}")
    packets = isinstance(views, PacketRows)
    layers = views.layers if isinstance(views, PacketRows) else views[0]
    device = one_device(layers)
    function = _variants.choose("gram_packets" if packets else "gram", device, variant)

    def search(rows: Sequence[int]) -> Sequence[bool]:
        if isinstance(views, PacketRows):
            return [False] * len(rows)
        return _variants.choose("nonfinite", device, variant)([views[i] for i in rows])

    segments = [[j] for j in range(len(layers))] if per_layer else [list(range(len(layers)))]
    return settle(
        lambda wide: function(views, layers=layers, kind=kind, wide=wide, segments=segments),
        search,
        kind,
        sizes=[sum(layers[j].numel for j in members) for members in segments],
        per_layer=per_layer,
        wide=precision == "float64" or any(v.dtype == "float64" for v in layers),
        widen=precision == "auto",
        nonfinite=nonfinite,
    )


def settle(
    compute: Callable[[bool], np.ndarray],
    search: Callable[[Sequence[int]], Sequence[bool]],
    kind: str,
    *,
    sizes: Sequence[int],
    per_layer: bool,
    wide: bool,
    widen: bool,
    nonfinite: str,
) -> Gram:
    """Find non-finite rows, and read once more where float32 does not do.

    `compute(wide)` gives the matrices, `search(rows)` says which of some rows are not finite;
    `sizes` are the elements of each segment, and `widen` allows the second read.
    """
    matrix = compute(wide)
    norms = matrix if kind == "norms" else np.diagonal(matrix, axis1=1, axis2=2)
    n = matrix.shape[1]
    bad: list[int] = []
    if not np.isfinite(matrix).all() and nonfinite != "propagate":
        suspects = [int(i) for i in np.flatnonzero(~np.isfinite(norms).all(axis=0))]
        bad = [i for i, is_bad in zip(suspects, search(suspects), strict=True) if is_bad]
        if bad and nonfinite == "raise":
            raise bad_clients(bad, ". Drop the client, or pass nonfinite='exclude' to leave it out")
    good = np.setdiff1d(np.arange(n), bad)
    if widen and not wide and _out_of_range(matrix, kind, good, sizes):
        wide = True
        matrix = compute(True)
    return _result(matrix.copy(), kind, per_layer, bad, wide)


def _out_of_range(matrix: np.ndarray, kind: str, good: np.ndarray, sizes: Sequence[int]) -> bool:
    """Whether squares of finite rows left the range of float32.

    They overflow to infinity; and below 2^-126 they lose digits, which matters when the mean square
    is below 2^-100 (then 2^-26 of the sum may be missing). Products of opposite signs may cancel,
    so that only their norms tell.
    """
    least = np.array(sizes) * 2.0**-100
    norms = matrix if kind == "norms" else np.diagonal(matrix, axis1=1, axis2=2)
    tested = norms[:, good]
    if kind == "distances":
        below = np.tril_indices(len(good), -1)
        tested = matrix[:, good[:, None], good[None, :]][:, below[0], below[1]]
        if not np.isfinite(norms[:, good]).all():
            return True
    return bool((~np.isfinite(tested) | (tested < least[:, None])).any())


def _result(matrix: np.ndarray, kind: str, per_layer: bool, bad: list[int], wide: bool) -> Gram:
    far = 0.0 if kind == "products" else np.inf
    if kind == "norms":
        norms = matrix
    else:
        norms = np.diagonal(matrix, axis1=1, axis2=2).copy()
        matrix[:, bad, :] = far
        matrix[:, :, bad] = far
        if kind == "distances":
            matrix[:, np.arange(len(matrix[0])), np.arange(len(matrix[0]))] = 0.0
    norms[:, bad] = np.inf
    if not per_layer:
        norms, matrix = norms[0], matrix[0]
    return Gram(
        norms,
        matrix if kind == "distances" else None,
        matrix if kind == "products" else None,
        tuple(bad),
        "float64" if wide else "float32",
    )


# ---- variants ----------------------------------------------------------------------------------


def _starts(layers: Sequence[View]) -> list[int]:
    return [0, *(int(s) for s in np.cumsum([v.numel for v in layers]))]


def exact_sums(
    rows: Sequence[Sequence[View]] | PacketRows,
    *,
    layers: Sequence[View],
    kind: str,
    wide: bool,
    segments: Sequence[Sequence[int]],
) -> np.ndarray:
    """Sums of the CPU kernel before they are rounded: int64 (segments, entries, words).

    They can be added to those of other coordinates in any order (see enum GramKind in csrc/api.h)
    and are rounded by `finish`.
    """
    core = _native.core
    starts = _starts(layers)
    sums = np.zeros((len(segments), *core.gram_shape(len(rows), KINDS.index(kind), wide)), np.int64)
    core.gram(
        [] if isinstance(rows, PacketRows) else [v.ptr for row in rows for v in row],
        len(rows),
        starts,
        [v.code for v in layers],
        KINDS.index(kind),
        wide,
        [*(starts[members[0]] if members else 0 for members in segments), starts[-1]],
        sums,
        _native.threads_for(starts[-1] * len(rows)),
        rows.native if isinstance(rows, PacketRows) else [],
    )
    return sums


def finish(sums: np.ndarray, n: int, kind: str, wide: bool) -> np.ndarray:
    """Round exact sums to float64: (segments, n), or symmetric (segments, n, n)."""
    values = _native.core.gram_finish(sums, wide, kind == "products")
    if kind == "norms":
        return values
    matrix = np.zeros((len(values), n, n))
    low = np.tril_indices(n)
    matrix[:, low[0], low[1]] = values
    matrix[:, low[1], low[0]] = values
    return matrix


def _gram_cpu(
    rows: Sequence[Sequence[View]] | PacketRows,
    *,
    layers: Sequence[View],
    kind: str,
    wide: bool,
    segments: Sequence[Sequence[int]],
) -> np.ndarray:
    """csrc/cpu/gram.isa.cpp."""
    sums = exact_sums(rows, layers=layers, kind=kind, wide=wide, segments=segments)
    return finish(sums, len(rows), kind, wide)


_variants.add("gram", "cpu", _variants.lazy(__name__, "_gram_cpu"), _variants.cpu_only)
_variants.add("gram", "reference", _variants.lazy("flcore.reference.gram", "gram"))
_variants.add("gram", "cuda", _variants.lazy("flcore.ops._gram_cuda", "gram"), _variants.needs_cuda)
_variants.add("gram_packets", "cpu", _variants.lazy(__name__, "_gram_cpu"), _variants.cpu_only)
_variants.add(
    "gram_packets",
    "reference",
    lambda: by_reference(_variants.lazy("flcore.reference.gram", "gram")()),
    _variants.cpu_only,
)
