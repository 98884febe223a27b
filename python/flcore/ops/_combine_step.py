"""A weighted sum of client updates and one step of a server optimiser along it, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from flcore import _arrays, _native, _updates, _variants
from flcore._arrays import View
from flcore.errors import InvalidInputError, NonFiniteError
from flcore.ops._combine_scales import parse_scales, row_weights
from flcore.ops._packet_rows import PacketRows, by_reference, holds_packets, packet_rows
from flcore.ops._step import INPUTS, KINDS, SERVER_STREAM, Noise, Step, Stepped
from flcore.ops._step_buffers import StepBuffers
from flcore.ops.combine import ACCUMULATE, _check_options, one_device, settle

__all__ = ["combine_step", "step_layers"]


def combine_step(
    updates: Any,
    weights: Sequence[float],
    model: Any,
    step: Step,
    *,
    m: Any = None,
    v: Any = None,
    inputs: str = "updates",
    scales: Any = None,
    noise: Noise | None = None,
    out: Any = None,
    m_out: Any = None,
    v_out: Any = None,
    cast: Any = None,
    accumulate: str = "float32",
    nonfinite: str = "raise",
    divisor: float = 1.0,
    variant: str | None = None,
) -> Stepped:
    r"""One step of a server optimiser along ``D = sum_i weights[i] * updates[i] / divisor``.

    D is formed tile by tile and never goes to memory: for n updates of s bytes a value and a
    float32 model, ``n*s + 24`` bytes a coordinate (adagrad, adam, yogi), ``n*s + 16`` (momentum) or
    ``n*s + 8`` (sgd), and 2 more with `cast`. The step is computed in float32, for float64 layers
    of the model in float64, with IEEE square roots and quotients and without fma: the same bits on
    every instruction set, for every number of threads, and in Triton.

    Parameters
    ----------
    updates, weights, scales, accumulate, divisor
        As for `combine`. Updates may be of another floating dtype than the model, or packets, which
        are decoded in cache.
    model : update
        The current w: structure, shapes and device of one update. Keep it in float32 or float64; a
        float16 or bfloat16 model is read and written in its own dtype and loses small steps.
    step : Step
        Which step, and its numbers.
    m, v : update, optional
        State: structure and shapes of the model, float64 for its float64 layers, else float32. What
        the step needs and is not given starts from zeros.
    inputs : {"updates", "models"}
        "models": the rows are client models, and ``updates[i] - model`` takes the place of the
        update, exactly 0 where they agree. Not together with `scales`.
    noise : Noise, optional
        Normal noise on D. (Under differential privacy the standard deviation has to fit the largest
        weight, which bounds what one client can change.)
    out, m_out, v_out : update, optional
        Where the new model and state go; allocated by default. If they overlap what is read (the
        model itself, say), results take a detour through scratch. Otherwise they are written
        directly, and hold nothing of use when the call raises.
    cast : {"float16", "bfloat16"} or update, optional
        Also return the new model in that dtype, for broadcasting; or write it into these arrays.
        (As in any cast, what is too large for float16 becomes infinite there.)
    nonfinite : {"raise", "exclude", "propagate"}
        As for `combine`. The new model and state are looked at too, in the same pass; `model`, `m`
        and `v` keep their values whatever happens.
    variant : {"reference", "cpu", "triton"}, optional
        Which implementation runs; by default the best for the device.

    Returns
    -------
    Stepped
        The new model, the new m and v, and the copy.

    Raises
    ------
    InvalidInputError, DTypeError, NonFiniteError, VariantUnavailableError
        See `combine`; NonFiniteError also when the updates are finite and the new model or state is
        not (``clients`` is then empty).

    References
    ----------
    Hsu, Qi, Brown, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
    Classification", 2019 (momentum). Reddi et al., "Adaptive Federated Optimization", ICLR 2021,
    Algorithm 2 (adagrad, adam, yogi).

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.ops import Step, combine_step
    >>> w = np.zeros(2, np.float32)
    >>> d = [np.float32([0.1, -0.2])]
    >>> combine_step(d, [1.0], w, Step("adam", lr=0.1, tau=1e-3)).model.round(4)
    array([ 0.0909, -0.0952], dtype=float32)
    """
    _check_options(accumulate, nonfinite, divisor)
    if inputs not in INPUTS:
        raise InvalidInputError(f"inputs: expected one of {INPUTS}, got {inputs!r}")
    packets = None
    if holds_packets(updates):
        packets = packet_rows(updates, model, like_name="model")
    rows: Any = packets
    if packets is None:
        layout, rows = _updates.parse_updates(updates)
    else:
        layout = packets.layout
        if inputs == "models" or scales is not None:
            raise InvalidInputError("updates: packets are updates and have scales of their own")
    w = _updates.parse_weights(weights, len(rows), signed=True)
    factors = None
    if scales is not None:
        if inputs == "models":
            raise InvalidInputError("scales: expected none with inputs='models'")
        factors = parse_scales(scales, len(rows), len(layout.specs))
    names = {"m": m, "v": v, "out": out, "m_out": m_out, "v_out": v_out, "cast": cast}
    given = {
        name: layout.layers(value, name, dtypes=False)
        for name, value in names.items()
        if value is not None and not isinstance(value, str)
    }
    result, _ = step_layers(
        rows,
        lambda keep: [w[i] if i in keep else 0.0 for i in range(len(w))],
        layout.layers(model, "model", dtypes=False),
        step,
        layout=layout,
        given=given,
        cast=cast if isinstance(cast, str) else None,
        models=inputs == "models",
        scales=factors,
        noise=noise,
        accumulate=accumulate,
        nonfinite=nonfinite,
        divisor=lambda keep: divisor,
        variant=variant,
    )
    return Stepped(*(None if layers is None else layout.build(layers) for layers in result))


def step_layers(
    rows: Sequence[Sequence[Any]] | PacketRows,
    weights: Callable[[set[int]], Sequence[float]],
    model: Sequence[Any],
    step: Step,
    *,
    layout: _updates.Layout,
    given: dict[str, list[Any]],
    cast: str | None,
    models: bool,
    scales: np.ndarray | None,
    noise: Noise | None,
    tensors: Sequence[int] | None = None,
    accumulate: str,
    nonfinite: str,
    divisor: Callable[[set[int]], float],
    variant: str | None,
    sums: tuple[list[View], list[View]] | None = None,
) -> tuple[Stepped, set[int]]:
    """Step along parsed rows `[n][layers]`; lists of layers in, lists of layers out.

    Also returns the clients that were not left out. `given`: the arrays of m, v, out, m_out, v_out
    and cast that the caller brings. `tensors`: the layers' names in the noise streams, by default
    0, 1, ... . `sums`, with packets: what their sum is added to, and where it then goes.
    """
    old = layout.views(model, "model")
    views: Any = rows
    op = "combine_step_packets" if sums is None else "control_step"
    read: list[View] = []
    more = {} if sums is None else {"sums": sums}
    if not isinstance(rows, PacketRows):
        codes = _arrays.DTYPE_CODES if scales is None else _arrays.ROW_CODES
        views = [layout.views(row, f"updates[{i}]", codes) for i, row in enumerate(rows)]
        op = "combine_step" if scales is None else "combine_step_scaled"
        read = [v for row in views for v in row]
    device = one_device(rows.layers if isinstance(rows, PacketRows) else views[0])
    buffers = StepBuffers(step, layout, old, model, given, cast, read)
    function = _variants.choose(op, device, variant)
    tensors = list(range(len(old))) if tensors is None else list(tensors)

    def run(keep: set[int], active: list[int], w: Sequence[float]) -> int:
        flags = function(
            rows.take(active) if isinstance(rows, PacketRows) else [views[i] for i in active],
            row_weights(w, active, scales),
            layers=rows.layers if isinstance(rows, PacketRows) else views[0],
            step=step,
            old=buffers.old,
            new=buffers.new,
            models=models,
            noise=noise if noise is not None and noise.std else None,
            tensors=tensors,
            accumulate=accumulate,
            divisor=divisor(keep),
            check=nonfinite != "propagate" or accumulate == "reproducible",
            **more,
        )
        core = _native.core
        if nonfinite == "propagate":
            return flags & ~core.STEP_NONFINITE
        if flags & core.STEP_NONFINITE and not flags & core.COMBINE_NONFINITE:
            _explain_step(buffers.old, device, variant, "the step overflows")
        if flags & core.COMBINE_NONFINITE and models:
            _explain_step(buffers.old[:1], device, variant, None)
        return flags

    kept = settle(
        run,
        views,
        weights,
        scales=scales,
        device=device,
        variant=variant,
        nonfinite=nonfinite,
        accumulate=accumulate,
    )
    return buffers.finish(), kept


def _explain_step(
    old: Sequence[Sequence[View]], device: str, variant: str | None, otherwise: str | None
) -> None:
    """Raise for a model or state that holds a NaN or an infinity, or else say `otherwise`."""
    find = _variants.choose("nonfinite", device, variant)
    for name, layers in zip(("model", "m", "v"), old, strict=False):
        if any(any(find([[layer]])) for layer in layers):
            raise NonFiniteError(f"{name}: NaN or infinity found")
    if otherwise:
        raise NonFiniteError(f"updates, model and state are finite but {otherwise}; lower lr")


# ---- variants ----------------------------------------------------------------------------------


def _combine_step_cpu(
    rows: Sequence[Sequence[View]] | PacketRows,
    weights: Sequence[float] | np.ndarray,
    *,
    layers: Sequence[View],
    step: Step,
    old: Sequence[Sequence[View]],
    new: Sequence[Sequence[View]],
    models: bool,
    noise: Noise | None,
    tensors: Sequence[int],
    accumulate: str,
    divisor: float,
    check: bool,
    sums: tuple[Sequence[View], Sequence[View]] | None = None,
) -> int:
    """csrc/cpu/combine.isa.cpp and step.h.

    `weights`: (rows,), or (rows, layers) with int8 rows; `old`: model and the states of the step;
    `new`: the same, and the copy if there is one.
    """
    states = len(step.states)
    none: list[View] = []
    read = [*old, none, none][:3]
    written = [*new[: 1 + states], none, none][:3]
    copy = new[1 + states] if len(new) > 1 + states else none
    numel = [v.numel for v in layers]
    by_layer = isinstance(weights, np.ndarray)
    return _native.core.combine_step(
        [] if isinstance(rows, PacketRows) else [v.ptr for row in rows for v in row],
        len(rows),
        np.asarray(weights, dtype=np.float64).reshape(-1).tolist(),
        by_layer,
        numel,
        [v.code for v in layers],
        [v.code for v in old[0]],
        [[v.ptr for v in views] for views in (*read, *written, copy)],
        KINDS.index(step.kind),
        [step.lr, step.beta1, step.beta2, step.tau],
        models,
        copy[0].code if copy else _arrays.DTYPE_CODES["float16"],
        noise.std if noise else 0.0,
        noise.seed if noise else 0,
        noise.round if noise else 0,
        SERVER_STREAM,
        list(tensors),
        ACCUMULATE.index(accumulate),
        divisor,
        _native.threads_for(sum(numel) * (len(rows) + 2 * len(old))),
        check,
        rows.native if isinstance(rows, PacketRows) else [],
        [] if sums is None else [[v.ptr for v in views] for views in sums],
    )


for _op in ("combine_step", "combine_step_scaled"):
    _variants.add(_op, "cpu", _variants.lazy(__name__, "_combine_step_cpu"), _variants.cpu_only)
    _variants.add(_op, "reference", _variants.lazy("flcore.reference.step", "combine_step"))
_variants.add(
    "combine_step",
    "triton",
    _variants.lazy("flcore.pykernels.combine_step", "combine_step"),
    _variants.needs_triton,
)
_variants.add(
    "combine_step_packets",
    "cpu",
    _variants.lazy(__name__, "_combine_step_cpu"),
    _variants.cpu_only,
)
_variants.add(
    "combine_step_packets",
    "reference",
    lambda: by_reference(_variants.lazy("flcore.reference.step", "combine_step")()),
    _variants.cpu_only,
)
