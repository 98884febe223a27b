"""Order statistics of every coordinate over client updates: median, trimmed mean and their kin."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from flcore import _native, _updates, _variants
from flcore._arrays import View
from flcore.errors import DTypeError, InvalidInputError
from flcore.ops._packet_rows import PacketRows, by_reference, packet_rows
from flcore.ops.combine import ADVICE, NONFINITE, _targets, bad_clients, deliver, one_device
from flcore.reference.select import OPS
from flcore.reference.select import comparators as _network

__all__ = ["MEDIANS", "comparators", "select"]

MEDIANS = ("average", "lower", "upper")  # enum MedianOf in csrc/api.h

Mix = list[list[tuple[int, float]]]  # for each mixed row: (row, coefficient), zeros left out


def select(
    updates: Any,
    op: str = "median",
    *,
    f: int = 0,
    keep: int | None = None,
    median: str = "average",
    mix: Any = None,
    like: Any = None,
    out: Any = None,
    nonfinite: str = "raise",
    variant: str | None = None,
) -> Any:
    r"""One order statistic of every coordinate over n updates.

    Reads every value once and writes one update: ``n*s + s`` bytes a coordinate for a dtype of s
    bytes. The values of a coordinate are sorted in registers by a network without branches.

    Parameters
    ----------
    updates : sequence of updates, array of shape (n, ...), or list of packets
        One update a client, as for `flcore.ops.combine`. Packets are decoded in cache, a tile at a
        time: the bytes of the packets are read and ``4`` bytes a coordinate written.
    op : {"median", "trimmed_mean", "near_median", "near_trimmed"}
        The median; the mean without the `f` smallest and the `f` largest values; the mean of the
        `keep` values nearest to the median, or to the trimmed mean.
    f : int
        Values trimmed on each side, ``0 <= 2 f < n``.
    keep : int, optional
        Values that are averaged, ``1 <= keep <= n``; by default ``n - f``. Of two values at the
        same distance the smaller one is taken.
    median : {"average", "lower", "upper"}
        Median of an even number of values.
    mix : (m, n) array, optional
        Replaces the n values x by the m values ``mix @ x`` first; `f` and `keep` then refer to m.
        Nothing but the result is written. Zero coefficients are not read.
    like : update, optional
        With packets: what the result is like; by default a float32 array (numel,). It is computed
        in float32 whatever the dtypes.
    out : update, optional
        Where the result goes; untouched when the call raises.
    nonfinite : {"raise", "exclude", "propagate"}
        A NaN or an infinity in an update: raise and name the client; leave the client out, and as
        it is one of the `f` bad ones, trim one value less; or order infinities as numbers while a
        NaN makes the coordinate NaN.
    variant : {"reference", "cpu", "cuda"}, optional
        Which implementation runs; by default the best for the device.

    Returns
    -------
    update
        Of the kind, dtype and device of one update; `out` itself if it was given.

    Raises
    ------
    InvalidInputError, DTypeError, NonFiniteError, VariantUnavailableError
        As `flcore.ops.combine`; also an `f`, `keep` or `mix` that does not fit.

    Notes
    -----
    The result has the same bits for any order of the clients (without `mix`, whose sums run in the
    order of the rows), on every instruction set and for every number of threads. Means are float32
    sums from the smallest value up, divided once.

    References
    ----------
    Yin et al., "Byzantine-Robust Distributed Learning", ICML 2018; Xie et al., arXiv 1802.10116
    (MeaMed: near_median) and arXiv 1805.09682 (Phocas: near_trimmed).

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.ops import select
    >>> select(np.float32([[1], [2], [3], [10], [4], [-50]]), "trimmed_mean", f=1)
    array([2.5], dtype=float32)
    """
    packets = packet_rows(updates, like)
    rows: Any = packets
    if packets is not None:
        layout = packets.layout
    else:
        layout, rows = _updates.parse_updates(updates)
    targets = None if out is None else layout.layers(out, "out")
    layers, _ = select_layers(
        rows,
        op,
        layout=layout,
        f=f,
        keep=keep,
        median=median,
        mix=None if mix is None else parse_mix(mix, len(rows)),
        out=targets,
        nonfinite=nonfinite,
        variant=variant,
    )
    return out if out is not None else layout.build(layers)


def select_layers(
    rows: Sequence[Sequence[Any]] | PacketRows,
    op: str,
    *,
    layout: _updates.Layout,
    f: int = 0,
    keep: int | None = None,
    median: str = "average",
    mix: Mix | None = None,
    out: Sequence[Any] | None = None,
    nonfinite: str = "raise",
    variant: str | None = None,
) -> tuple[list[Any], list[int]]:
    """Select over parsed rows `[n][layers]`; returns the layers and the rows that were left out."""
    for name, value, allowed in (
        ("op", op, OPS),
        ("median", median, MEDIANS),
        ("nonfinite", nonfinite, NONFINITE),
    ):
        if value not in allowed:
            raise InvalidInputError(f"{name}: expected one of {allowed}, got {value!r}")
    if isinstance(rows, PacketRows):
        f, keep = _check_counts(len(rows) if mix is None else len(mix), op, f, keep)
        options = {"op": op, "median": median, "f": f, "keep": keep, "mix": mix}
        return _select_packets(rows, options, out, variant), []
    views = [layout.views(row, f"updates[{i}]") for i, row in enumerate(rows)]
    device = one_device(views[0])
    targets, writes_through = _targets(views[0], rows[0], out, layout, nonfinite)
    function = _variants.choose("select", device, variant)
    f, keep = _check_counts(len(rows) if mix is None else len(mix), op, f, keep)
    active = list(range(len(rows)))
    while True:
        flags = function(
            [views[i] for i in active],
            layers=views[0],
            op=op,
            median=median,
            f=f,
            keep=keep,
            mix=mix,
            propagate=nonfinite == "propagate",
            out=targets,
        )
        bad = _nonfinite_rows(flags, [views[i] for i in active], device, variant)
        if not bad:
            break
        bad = [active[i] for i in bad]
        if nonfinite == "raise" or mix is not None:
            raise bad_clients(bad, ADVICE)
        active = [i for i in active if i not in bad]
        if not active:
            raise bad_clients(bad, " and no client is left")
        f, keep = max(0, f - len(bad)), min(keep, len(active))
    excluded = sorted(set(range(len(rows))) - set(active))
    return deliver(out, targets, writes_through), excluded


def _select_packets(
    rows: PacketRows, options: dict[str, Any], out: Sequence[Any] | None, variant: str | None
) -> list[Any]:
    function = _variants.choose("select_packets", "cpu", variant)
    return rows.deliver(
        out,
        lambda targets: function(rows, layers=rows.layers, propagate=False, out=targets, **options),
    )


def _nonfinite_rows(
    flags: int, views: Sequence[Sequence[View]], device: str, variant: str | None
) -> list[int]:
    """Rows at fault when a flag was raised; none when finite values only overflowed a check."""
    if not flags:
        return []
    found = _variants.choose("nonfinite", device, variant)(views)
    return [i for i, is_bad in enumerate(found) if is_bad]


def parse_mix(mix: Any, n: int) -> Mix:
    """Return the nonzero entries of an (m, n) mixing matrix by rows."""
    try:
        matrix = np.asarray(mix, dtype=np.float64)
    except (TypeError, ValueError):
        raise InvalidInputError(f"mix: expected an (m, {n}) matrix, got {mix!r}") from None
    if matrix.ndim != 2 or matrix.shape[1] != n or not len(matrix):
        raise InvalidInputError(
            f"mix: expected shape (m, {n}), a column a client, got {matrix.shape}"
        )
    if not np.isfinite(matrix).all():
        raise InvalidInputError("mix: expected finite coefficients")
    return [[(int(j), float(row[j])) for j in np.flatnonzero(row)] for row in matrix]


def _check_counts(n: int, op: str, f: Any, keep: Any) -> tuple[int, int]:
    try:
        f = operator.index(f)
        keep = n - f if keep is None else operator.index(keep)
    except TypeError:
        raise DTypeError(f"f, keep: expected integers, got {f!r} and {keep!r}") from None
    if not 0 <= 2 * f < n and op != "median":
        raise InvalidInputError(f"f: expected 0 <= 2 f < n = {n} values, got f = {f}")
    if not 1 <= keep <= n and op.startswith("near"):
        raise InvalidInputError(f"keep: expected 1 <= keep <= n = {n} values, got {keep}")
    return f, keep


def comparators(n: int, op: str = "median") -> int:
    """Compare-exchanges a coordinate costs: the second limit beside memory bandwidth.

    Each is one minimum and one maximum. The median needs the middle of the sorted order only, the
    other ops all of it.
    """
    if op == "median":
        return len(_network(n, (n - 1) // 2, n // 2)[0])
    return len(_network(n)[0])


# ---- variants ----------------------------------------------------------------------------------


def _select_cpu(
    rows: Sequence[Sequence[View]] | PacketRows,
    *,
    layers: Sequence[View],
    op: str,
    median: str,
    f: int,
    keep: int,
    mix: Mix | None,
    propagate: bool,
    out: Sequence[View],
) -> int:
    """csrc/cpu/select.isa.cpp."""
    numel = [v.numel for v in layers]
    entries = [] if mix is None else mix
    packets = rows.native if isinstance(rows, PacketRows) else []
    return _native.core.select(
        [] if isinstance(rows, PacketRows) else [v.ptr for row in rows for v in row],
        len(rows),
        numel,
        [v.code for v in layers],
        OPS.index(op),
        MEDIANS.index(median),
        f,
        keep,
        mix is not None,
        [0, *np.cumsum([len(row) for row in entries]).tolist()] if entries else [0],
        [i for row in entries for i, _ in row],
        [w for row in entries for _, w in row],
        propagate,
        [v.ptr for v in out],
        _native.threads_for(sum(numel) * len(rows)),
        packets,
    )


_variants.add("select", "cpu", _variants.lazy(__name__, "_select_cpu"), _variants.cpu_only)
_variants.add("select", "reference", _variants.lazy("flcore.reference.select", "select"))
_variants.add(
    "select", "cuda", _variants.lazy("flcore.ops._select_cuda", "select"), _variants.needs_cuda
)
_variants.add("select_packets", "cpu", _variants.lazy(__name__, "_select_cpu"), _variants.cpu_only)
_variants.add(
    "select_packets",
    "reference",
    lambda: by_reference(_variants.lazy("flcore.reference.select", "select")()),
    _variants.cpu_only,
)
