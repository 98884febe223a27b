"""Weighted sum of client updates: validation, choice of variant, policy for non-finite values."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from flcore import _arrays, _native, _updates, _variants
from flcore._arrays import View
from flcore.errors import InvalidInputError, NonFiniteError
from flcore.ops._combine_scales import parse_scales, row_weights, scaled_result
from flcore.ops._packet_rows import PacketRows, packet_rows

__all__ = ["ACCUMULATE", "NONFINITE", "combine"]

ACCUMULATE = ("float32", "float64", "reproducible")  # codes of enum Accumulate in csrc/api.h
NONFINITE = ("raise", "exclude", "propagate")


def combine(
    updates: Any,
    weights: Sequence[float],
    *,
    scales: Any = None,
    like: Any = None,
    out: Any = None,
    accumulate: str = "float32",
    nonfinite: str = "raise",
    divisor: float = 1.0,
    variant: str | None = None,
) -> Any:
    r"""Weighted sum of n client updates, ``sum_i weights[i] * updates[i] / divisor``.

    Reads every value once and writes one update: ``n*s + s`` bytes a coordinate for a dtype of s
    bytes. Layers are read where they lie, never concatenated. Rows whose weight is 0 are not read,
    so that a NaN in them has no effect.

    Parameters
    ----------
    updates : sequence of updates, array of shape (n, ...), or list of packets
        One update a client: an array, or a list, tuple or dict of arrays (NumPy, or torch on CPU or
        CUDA) of float64, float32, float16 or bfloat16, alike in structure, shapes and dtypes. Or
        packets of `flcore.compression` of any codecs, which are decoded in cache; a sum is then
        never -0.
    weights : (n,) numbers
        Finite, any sign.
    scales : (n,) or (n, layers) numbers, optional
        Factors that come with the updates, one a client or one a layer: the value of a row is
        ``scale * stored``. Layers may then be int8, too. ``weight * scale`` is rounded once to the
        type of the sums. A NaN or infinite scale counts as a non-finite update.
    like : update, optional
        With packets: what the result is like, floating layers on the CPU that hold as many values;
        by default one float32 array (numel,).
    out : update, optional
        Where the result goes; same structure, shapes and dtypes as one update. It may be one of
        the updates. Nothing is written when the call raises. For int8 layers it is of any floating
        dtype (without `out` the result is float32).
    accumulate : {"float32", "float64", "reproducible"}
        Type of the sums. float64 layers always use float64 at least. "reproducible" gives the same
        bits for any order of the clients: sums on an absolute grid, exact to 2^-74 a term, for
        ``|w x| < 2^46`` and at most 16,384 clients.
    nonfinite : {"raise", "exclude", "propagate"}
        What a NaN or an infinity in an update does: raise and name the client; leave that client
        out of the sum; or pass into the result. Found in the same pass, from the finished sums.
        ("reproducible" turns an infinity that is passed on into a NaN.)
    divisor : float
        Positive; applied once to the finished sums.
    variant : {"reference", "cpu", "cuda", "triton"}, optional
        Which implementation runs; by default the best for the device.

    Returns
    -------
    update
        Of the kind, dtype and device of one update; `out` itself if it was given.

    Raises
    ------
    InvalidInputError
        Structures, shapes, weights or options that cannot be used.
    DTypeError
        dtypes, kinds or devices that differ or cannot be read.
    NonFiniteError
        See `nonfinite`; also when finite inputs overflow the accumulator.
    VariantUnavailableError
        The named variant cannot run here.

    Notes
    -----
    fp32 sums run in client order, multiply then add without fma: the same bits on every
    instruction set and for every number of threads. In torch.compile and under autograd the
    torch op ``flcore::combine`` is called, whose gradient for update i is ``weights[i] / divisor``.
    On a GPU the work is queued on torch's current stream; the call waits for it only to look for
    non-finite values, so that ``nonfinite="propagate"`` can be captured in a CUDA graph.

    References
    ----------
    McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
    AISTATS 2017.
    """
    packets = packet_rows(updates, like)
    if packets is not None:
        from flcore.ops._combine_packets import combine_packets

        if scales is not None:
            raise InvalidInputError("scales: packets have their own; leave them out")
        _check_options(accumulate, nonfinite, divisor)
        layers = combine_packets(
            packets,
            _updates.parse_weights(weights, len(packets), signed=True),
            out=None if out is None else packets.layout.layers(out, "out"),
            accumulate=accumulate,
            nonfinite=nonfinite,
            divisor=divisor,
            variant=variant,
        )
        return out if out is not None else packets.layout.build(layers)
    layout, rows = _updates.parse_updates(updates)
    if scales is None and out is None and variant is None and _needs_torch_op(rows):
        from flcore import _torch_ops  # comes back here without gradients, a layer at a time

        layers = _torch_ops.combine_layers(
            rows, [float(w) for w in weights], accumulate, nonfinite, divisor
        )
        return layout.build(layers)
    _check_options(accumulate, nonfinite, divisor)
    w = _updates.parse_weights(weights, len(rows), signed=True)
    factors = None if scales is None else parse_scales(scales, len(rows), len(layout.specs))
    targets = None if out is None else layout.layers(out, "out", dtypes=scales is None)
    layers = combine_layers(
        rows,
        lambda keep: [w[i] if i in keep else 0.0 for i in range(len(w))],
        layout=layout,
        out=targets,
        accumulate=accumulate,
        nonfinite=nonfinite,
        divisor=lambda keep: divisor,
        variant=variant,
        scales=factors,
    )
    return out if out is not None else layout.build(layers)


def combine_layers(
    rows: Sequence[Sequence[Any]],
    weights: Callable[[set[int]], Sequence[float]],
    *,
    layout: _updates.Layout,
    out: Sequence[Any] | None,
    accumulate: str,
    nonfinite: str,
    divisor: Callable[[set[int]], float],
    variant: str | None,
    scales: np.ndarray | None = None,
) -> list[Any]:
    """Sum parsed rows `[n][layers]`; the core of `combine` and of `Mean`.

    `weights(keep)` and `divisor(keep)` say how the clients in `keep` are weighted: the mean
    normalises again when a client is left out, the plain sum does not. `scales`: (n, layers).
    """
    codes = _arrays.DTYPE_CODES if scales is None else _arrays.ROW_CODES
    views = [layout.views(row, f"updates[{i}]", codes) for i, row in enumerate(rows)]
    device = one_device(views[0])
    like = views[0] if scales is None else scaled_result(views[0], out)
    targets, writes_through = _targets(like, rows[0], out, layout, nonfinite)
    function = _variants.choose("combine" if scales is None else "combine_scaled", device, variant)

    def run(keep: set[int], active: list[int], w: Sequence[float]) -> int:
        return function(
            [views[i] for i in active],
            row_weights(w, active, scales),
            layers=views[0],
            state=None,
            out=targets,
            accumulate=accumulate,
            divisor=divisor(keep),
            check=nonfinite != "propagate" or accumulate == "reproducible",
        )

    settle(
        run,
        views,
        weights,
        scales=scales,
        device=device,
        variant=variant,
        nonfinite=nonfinite,
        accumulate=accumulate,
    )
    return deliver(out, targets, writes_through)


def deliver(out: Sequence[Any] | None, targets: Sequence[View], writes_through: bool) -> list[Any]:
    """Return the layers of a result: those of `out`, which get what was written elsewhere."""
    if out is None:
        return [t.array for t in targets]
    if not writes_through:
        for target, result in zip(out, targets, strict=True):
            _arrays.assign(target, result.array)
    return list(out)


def bad_clients(bad: Sequence[int], then: str) -> NonFiniteError:
    """Return the error that names the clients `bad` and goes on with `then`."""
    names = ", ".join(f"updates[{i}]" for i in bad)
    return NonFiniteError(f"{names}: NaN or infinity found{then}", tuple(bad))


ADVICE = (
    ". Drop the client, or pass nonfinite='exclude' to leave it out, or nonfinite='propagate' to "
    "let it through"
)


def check_terms(count: int, accumulate: str) -> None:
    """Raise when a reproducible sum has more terms than its accumulator takes."""
    if accumulate == "reproducible" and count > _native.core.BIN_MAX_TERMS:
        raise InvalidInputError(
            f"updates: reproducible sums take at most {_native.core.BIN_MAX_TERMS} clients, "
            f"got {count}; merge partial results of Accumulator in float64 instead"
        )


def settle(
    run: Callable[[set[int], list[int], Sequence[float]], int],
    views: Sequence[Sequence[View]] | PacketRows,
    weights: Callable[[set[int]], Sequence[float]],
    *,
    scales: np.ndarray | None = None,
    device: str,
    variant: str | None,
    nonfinite: str,
    accumulate: str,
) -> set[int]:
    """Run a sum until its clients are good, as `nonfinite` says; return who was not left out.

    `run(keep, active, w)` sums the rows of `active`, the clients whose weight ``w[i]`` is not 0,
    and returns CombineFlags; `weights(keep)` gives the weights when the others are left out.
    """
    keep = set(range(len(views)))
    while True:
        w = weights(keep)
        active = [i for i in range(len(views)) if w[i] != 0]
        check_terms(len(active), accumulate)
        bad: list[int] = []
        if scales is not None and nonfinite != "propagate":
            bad = [i for i in active if not np.isfinite(scales[i]).all()]
        if not bad:
            flags = run(keep, active, w)
            rows = [] if isinstance(views, PacketRows) else [views[i] for i in active]
            bad = explain(flags, rows, device, variant, nonfinite, accumulate)
            bad = [active[i] for i in bad]
        if not bad:
            return keep
        if nonfinite == "raise":
            raise bad_clients(bad, ADVICE)
        keep -= set(bad)
        if not any(weights(keep)):
            raise bad_clients(bad, " and no client is left to combine")


def explain(
    flags: int,
    views: Sequence[Sequence[View]],
    device: str,
    variant: str | None,
    nonfinite: str,
    accumulate: str,
) -> list[int]:
    """Positions of the non-finite rows, or an error when the sum itself is at fault."""
    core = _native.core
    if not flags or (nonfinite == "propagate" and not flags & core.COMBINE_OUT_OF_RANGE):
        return []
    found = _variants.choose("nonfinite", device, variant)(views)
    bad = [i for i, is_bad in enumerate(found) if is_bad]
    if nonfinite == "propagate" and bad:
        return []
    if not bad and flags & core.COMBINE_OUT_OF_RANGE:
        raise InvalidInputError(
            "updates: reproducible sums need |weight * value| < 2^46; scale the updates down or "
            "use accumulate='float64'"
        )
    if not bad:
        wider = " or use accumulate='float64'" if accumulate == "float32" else ""
        raise NonFiniteError(
            f"updates: all values are finite but their sum overflows; scale them down{wider}"
        )
    return bad


def one_device(layers: Sequence[View]) -> str:
    """Return the device that all layers share; "cpu" when there is none."""
    devices = sorted({v.device for v in layers})
    if len(devices) > 1:
        raise InvalidInputError(f"updates: expected all layers on one device, got {devices}")
    return devices[0] if devices else "cpu"


def _targets(
    first: Sequence[View],
    raw: Sequence[Any],
    out: Sequence[Any] | None,
    layout: _updates.Layout,
    nonfinite: str,
) -> tuple[list[View], bool]:
    """Views the kernel writes, and whether they are the user's own `out`.

    With a policy that can raise, the kernel writes to scratch that is copied when all went well
    (8 bytes a coordinate, once a call): an error then leaves `out` as it was.
    """
    if out is not None:
        views = [
            _arrays.writable_view(x, layout.label("out", j), first[j]) for j, x in enumerate(out)
        ]
        if nonfinite == "propagate" and all(v is not None for v in views):
            return [v for v in views if v is not None], True
    return [
        _arrays.view(_arrays.empty_like(x, None if _arrays.is_float(x) else v.dtype))
        for x, v in zip(raw, first, strict=True)
    ], False


def _check_options(accumulate: str, nonfinite: str, divisor: float) -> None:
    if accumulate not in ACCUMULATE:
        raise InvalidInputError(f"accumulate: expected one of {ACCUMULATE}, got {accumulate!r}")
    if nonfinite not in NONFINITE:
        raise InvalidInputError(f"nonfinite: expected one of {NONFINITE}, got {nonfinite!r}")
    if not (isinstance(divisor, int | float) and math.isfinite(divisor) and divisor > 0):
        raise InvalidInputError(f"divisor: expected a positive finite number, got {divisor!r}")


def _needs_torch_op(rows: Sequence[Sequence[Any]]) -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not rows[0] or isinstance(rows[0][0], np.ndarray):
        return False
    if torch.compiler.is_compiling():
        return True
    return torch.is_grad_enabled() and any(x.requires_grad for row in rows for x in row)


# ---- variants ----------------------------------------------------------------------------------


def _combine_cpu(
    rows: Sequence[Sequence[View]],
    weights: Sequence[float],
    *,
    layers: Sequence[View],
    state: Sequence | None,
    out: Sequence[View] | None,
    accumulate: str,
    divisor: float,
    check: bool,
) -> int:
    """csrc/cpu/combine.isa.cpp; `layers` gives sizes and dtypes, `state` the accumulators."""
    numel = [v.numel for v in layers]
    return _native.core.combine(
        [v.ptr for row in rows for v in row],
        weights,
        numel,
        [v.code for v in layers],
        [] if state is None else [_arrays.address(s) for s in state],
        [] if out is None else [v.ptr for v in out],
        ACCUMULATE.index(accumulate),
        divisor,
        _native.threads_for(sum(numel) * (len(rows) + 1)),
        check,
    )


def _nonfinite_cpu(rows: Sequence[Sequence[View]]) -> list[bool]:
    numel = [v.numel for v in rows[0]] if rows else []
    found = _native.core.nonfinite(
        [v.ptr for row in rows for v in row],
        len(rows),
        numel,
        [v.code for v in rows[0]] if rows else [],
        _native.threads_for(sum(numel) * len(rows)),
    )
    return [bool(f) for f in found]


for _op in ("combine", "nonfinite"):
    _variants.add(_op, "cpu", _variants.lazy(__name__, f"_{_op}_cpu"), _variants.cpu_only)
    _variants.add(_op, "reference", _variants.lazy("flcore.reference.combine", _op))
    _variants.add(
        _op, "triton", _variants.lazy("flcore.pykernels.combine", _op), _variants.needs_triton
    )
    _variants.add(
        _op, "cuda", _variants.lazy("flcore.ops._combine_cuda", _op), _variants.needs_cuda
    )
