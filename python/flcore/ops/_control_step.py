"""The server's step of controlled errors: increments into H, and a step along H, in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from flcore import _arrays, _updates, _variants
from flcore._arrays import View
from flcore.errors import DTypeError, InvalidInputError
from flcore.ops._combine_step import step_layers
from flcore.ops._packet_rows import PacketRows, by_reference, holds_packets, packet_rows
from flcore.ops._step import Step
from flcore.ops.combine import NONFINITE, _check_options

__all__ = ["Controlled", "control_step"]


class Controlled(NamedTuple):
    """What a step gives; None for what it does not have."""

    h: Any
    model: Any
    m: Any = None
    v: Any = None


def control_step(
    packets: Sequence[Any],
    weights: Sequence[float],
    h: Any,
    model: Any,
    step: Step,
    *,
    total: float,
    m: Any = None,
    v: Any = None,
    h_out: Any = None,
    out: Any = None,
    nonfinite: str = "raise",
    variant: str | None = None,
) -> Controlled:
    r"""``H += sum_i weights[i] D_i``, and a step of a server optimiser along ``H / total``.

    What the server of EControl and EF21 does in a round: clients send increments D_i of their
    estimates, and H, their weighted sum, stays where a client does not report. The sums go from
    the packets through cache into H and the model: for a float32 model, beside the packets, 16
    bytes a coordinate (sgd), 24 (momentum) or 32 (adagrad, adam, yogi).

    Parameters
    ----------
    packets : list of packets, or of bytes
        Of this round; may be empty, and of any codecs.
    weights : (n,) numbers
        Those of the clients, the same in every round.
    h : update
        H before the round: structure and shapes of the model, all layers float32, or all float64.
        Float64 layers of a model need float64.
    model : update
        NumPy or torch on the CPU, floating layers.
    step : Step
        Clients that send updates want a positive `lr`, clients that send gradients a negative one.
    total : float
        Sum of the weights of all clients, also of those that did not report.
    m, v : update, optional
        State of the step, see `flcore.ops.combine_step`.
    h_out, out : update, optional
        Where the new H and model go; allocated by default.
    nonfinite : {"raise", "propagate"}
        What happens when a new value is not finite.
    variant : {"reference", "cpu"}, optional
        Which implementation runs.

    Returns
    -------
    Controlled
        The new H, model, m and v.

    Raises
    ------
    InvalidInputError, DTypeError, NonFiniteError
        See `flcore.ops.combine_step`. `h`, `model`, `m` and `v` keep their values; `out`, unless
        it is the model, holds nothing of use.

    References
    ----------
    Gao, Islamov, Stich, "EControl", ICLR 2024, arXiv 2311.05645. Richtarik et al., "EF21",
    NeurIPS 2021, arXiv 2106.05203.
    """
    if nonfinite not in ("raise", "propagate"):
        raise InvalidInputError(f"nonfinite: expected raise or propagate, got {nonfinite!r}")
    _check_options("float32", NONFINITE[0], total)
    if not isinstance(packets, list | tuple):
        raise DTypeError(f"packets: expected a list of packets, got {type(packets).__name__}")
    if packets:
        if not holds_packets(packets):
            raise DTypeError(f"packets[0]: expected a packet, got {type(packets[0]).__name__}")
        rows = packet_rows(packets, model, name="packets", like_name="model")
        assert rows is not None
    else:
        layout, arrays = _updates.flatten(model, "model")
        rows = PacketRows([], layout, arrays)
    layout = rows.layout
    w = _updates.parse_weights(weights, len(rows), signed=True)
    arrays = layout.layers(model, "model")
    old = layout.views(layout.layers(h, "h", dtypes=False), "h")
    accumulate = _sum_type(old, layout.views(arrays, "model"), layout)
    given = {"m": m, "v": v, "out": out}
    targets = None if h_out is None else layout.layers(h_out, "h_out", dtypes=False)
    fresh = [_arrays.view(_arrays.empty_like(x.array)) for x in old]
    if not any(w):  # nobody reported: H stays, and the step goes along it
        for new, x in zip(fresh, old, strict=True):
            _arrays.assign(new.array, x.array)
    if targets is not None:
        for j, (x, like) in enumerate(zip(targets, old, strict=True)):
            _arrays.writable_view(x, layout.label("h_out", j), like)
    result, _ = step_layers(
        rows if any(w) else [[x.array for x in old]],
        lambda keep: w if any(w) else [1.0],
        arrays,
        step,
        layout=layout,
        given={
            name: layout.layers(value, name, dtypes=False)
            for name, value in given.items()
            if value is not None
        },
        cast=None,
        models=False,
        scales=None,
        noise=None,
        accumulate=accumulate,
        nonfinite=nonfinite,
        divisor=lambda keep: float(total),
        variant=variant,
        sums=(old, fresh) if any(w) else None,
    )
    layers = [view.array for view in fresh]
    if targets is not None:
        for x, view in zip(targets, fresh, strict=True):
            _arrays.assign(x, view.array)
        layers = list(targets)
    built = [None if x is None else layout.build(x) for x in (result.model, result.m, result.v)]
    return Controlled(h_out if h_out is not None else layout.build(layers), *built)


def _sum_type(h: Sequence[View], model: Sequence[View], layout: _updates.Layout) -> str:
    """Return the type of the sums, which is that of every layer of `h`."""
    kinds = {v.dtype for v in h}
    if len(kinds) > 1 or not kinds <= {"float32", "float64"}:
        raise DTypeError(f"h: expected layers of float32, or all of float64, got {sorted(kinds)}")
    for j, (mine, theirs) in enumerate(zip(h, model, strict=True)):
        if theirs.dtype == "float64" and mine.dtype != "float64":
            raise DTypeError(
                f"{layout.label('h', j)}: expected float64 for a float64 layer of the model, "
                f"got {mine.dtype}"
            )
    return kinds.pop() if kinds else "float32"


# ---- variants ----------------------------------------------------------------------------------


def _reference() -> Any:
    from flcore.reference.step import combine_step

    def run(
        rows: Sequence[Sequence[View]],
        weights: Sequence[float],
        *,
        sums: tuple[Sequence[View], Sequence[View]],
        **options: Any,
    ) -> int:
        for j, (old, new) in enumerate(zip(*sums, strict=True)):
            total = _arrays.to_float64(old.array)
            for row, weight in zip(rows, weights, strict=True):
                total = total + weight * _arrays.to_float64(row[j].array)
            with np.errstate(over="ignore"):
                _arrays.assign(new.array, total)
        return combine_step([sums[1]], [1.0], **options)

    return by_reference(run)


_variants.add(
    "control_step",
    "cpu",
    _variants.lazy("flcore.ops._combine_step", "_combine_step_cpu"),
    _variants.cpu_only,
)
_variants.add("control_step", "reference", _reference, _variants.cpu_only)
