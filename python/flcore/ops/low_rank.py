"""Low-rank factors with feedback, from an update to a packet or to one summable factor.

Validation and choice of variant; :mod:`flcore.compression` has the classes on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flcore import _arrays, _native, _updates, _variants
from flcore._arrays import View
from flcore._state import State
from flcore.errors import DTypeError, InvalidInputError
from flcore.ops._encode import (
    check_header,
    device_of,
    flat_float32,
    native_source,
    nonfinite_error,
    source_dtype,
    viewed,
)
from flcore.ops._low_rank_packet import frame_of
from flcore.ops._low_rank_plan import choose_ranks, revive
from flcore.reference import low_rank as reference
from flcore.reference import wire_frame as frame
from flcore.reference import wire_writer
from flcore.reference.low_rank import MAX_RANK, Plan

__all__ = [
    "MAX_RANK",
    "Plan",
    "choose_ranks",
    "low_rank",
    "low_rank_half",
    "low_rank_residual",
    "orthonormalise",
    "revive",
]

VALUES = ("float32", "bfloat16")


def low_rank(
    update: Any,
    *,
    plan: Plan,
    start: np.ndarray,
    rank: int | None = None,
    values: str = "float32",
    state: State | None = None,
    round: int = 0,
    seed: int = 0,
    epoch: int = 0,
    flags: int = 0,
    tensors: bytes = b"",
    variant: str | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Factors of one power iteration of ``u`` as a packet; the state moves on.

    With the form of :class:`flcore._state.State` and, layer by layer, u as a matrix U::

        P = orth(U orth(Q)),   Q = U^T P,   D = P Q^T

    and ``D = u`` (rounded to `values`) for layers of rank 0. D is a projection of U: never longer
    than U, and U itself when its rank is at most that of the factors. Reads update and states three
    times and writes the states once: 28 bytes a coordinate for EF14, 12 without state.

    Parameters
    ----------
    update : array, or list, tuple or dict of arrays
        float64, float32, float16 or bfloat16, on the CPU; read where the layers lie.
    plan : Plan
        The layers as matrices.
    start : (plan.q,) float32
        Q^T of every layer to begin with: that of the call before (warm start) or random.
    rank : int, optional
        Largest rank, written into the header; by default the plan's, at least 1.
    values : {"float32", "bfloat16"}
        Type of factors and values on the wire, nearest even. P is rounded before Q is computed.
    state : State, optional
        Memory of the client.
    round, seed, epoch, flags : int
        Header fields (docs/packet.md).
    tensors : bytes
        Tensor table of the layers, without which the factors mean nothing.
    variant : {"reference", "cpu"}, optional
        Which implementation runs.

    Returns
    -------
    packet : (nbytes,) uint8
    next : (plan.q,) float32
        Q^T as it was sent, for the next call.

    Raises
    ------
    InvalidInputError
        Sizes or options that cannot be used.
    DTypeError
        A layer or a state of a type that cannot be read.
    NonFiniteError
        A value is a NaN or an infinity, or beyond 3.4e38 together with the state or in a product.

    In each case nothing has been written.

    References
    ----------
    Vogels, Karimireddy, Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed
    Optimization", NeurIPS 2019, arXiv 1905.13727.
    """
    layout, views, state = _checked(update, plan, state)
    check_header(round=round, seed=seed, epoch=epoch, flags=flags, tensors=tensors)
    if values not in VALUES:
        raise InvalidInputError(f"values: expected one of {', '.join(VALUES)}, got {values!r}")
    if len(tensors) != 64 * len(views) and plan.numel:
        raise InvalidInputError(
            f"tensors: expected a row of 64 bytes a layer ({len(views)}), got {len(tensors)} bytes"
        )
    largest = max(1, *plan.rank) if plan.rank else 1
    rank = largest if rank is None else rank
    if not largest <= rank <= MAX_RANK:
        raise InvalidInputError(f"rank: expected {largest} to {MAX_RANK}, got {rank}")
    _check_factor(start, "start", plan.q)
    fields = {
        "source_dtype": source_dtype(views),
        "round": round,
        "seed": seed,
        "epoch": epoch,
        "flags": flags,
    }
    result = _variants.choose("low_rank", device_of(views), variant)(
        views, plan, start, state, values, rank, tensors, fields
    )
    if result is None:
        raise nonfinite_error(views, layout)
    return result


def low_rank_half(
    update: Any,
    *,
    plan: Plan,
    factor: np.ndarray,
    back: bool,
    state: State | None = None,
    variant: str | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """One factor of the linear form: ``P = U Q``, or ``Q = U^T P`` with `back`; e keeps U.

    For a given `factor` the result is linear in U, so that those of many clients can be summed
    before anything is decoded. Layers of rank 0 are returned as values, and e becomes 0 there.

    Parameters
    ----------
    update, plan, variant
        As :func:`low_rank`.
    factor : (plan.q,) or, with `back`, (plan.p,) float32
        Q^T or P of every layer, the same for all clients.
    state : State, optional
        None, or e alone with a spare; afterwards it holds t, from which
        :func:`low_rank_residual` takes what was sent.

    Returns
    -------
    product : (plan.p,) or, with `back`, (plan.q,) float32
    values : (plan.values,) float32

    Raises
    ------
    InvalidInputError, DTypeError, NonFiniteError
        As :func:`low_rank`; nothing has been written.
    """
    layout, views, state = _checked(update, plan, state)
    if state.h is not None or state.v is not None:
        raise InvalidInputError("state: expected e alone, got h or v")
    if state.in_place:
        raise InvalidInputError("state: expected a spare for e")
    _check_factor(factor, "factor", plan.p if back else plan.q)
    name = "low_rank_half"
    result = _variants.choose(name, device_of(views), variant)(views, plan, factor, back, state)
    if result is None:
        raise nonfinite_error(views, layout)
    return result


def low_rank_residual(
    e: np.ndarray, *, plan: Plan, p: np.ndarray, q: np.ndarray, variant: str | None = None
) -> None:
    """Subtract ``P Q^T`` from `e`, (d,) float32, in place, where a layer has factors.

    `p` (plan.p,) and `q` (plan.q,) float32 hold P and Q^T of every layer.
    """
    numel = sum(plan.numel)
    _check_factor(e, "e", numel)
    if not e.flags.writeable:
        raise InvalidInputError("e: the array is read-only; pass one that can be written")
    _check_factor(p, "p", plan.p)
    _check_factor(q, "q", plan.q)
    _variants.choose("low_rank_residual", "cpu", variant)(plan, p, q, e)


def orthonormalise(
    factor: np.ndarray, *, plan: Plan, columns: bool, variant: str | None = None
) -> np.ndarray:
    """Return P with orthonormal columns or, for `columns`, Q^T with orthonormal rows, as float32.

    Gram-Schmidt in float64, twice, in a fixed order: the same bits everywhere. A vector that
    depends on those before it becomes 0.
    """
    _check_factor(factor, "factor", plan.q if columns else plan.p)
    return _variants.choose("low_rank_orthonormalise", "cpu", variant)(plan, columns, factor)


def _checked(
    update: Any, plan: Plan, state: State | None
) -> tuple[_updates.Layout, list[View], State]:
    layout, views, _ = viewed(update)
    if tuple(v.numel for v in views) != plan.numel:
        raise InvalidInputError(
            f"plan: expected layers of {[v.numel for v in views]} values, got {list(plan.numel)}"
        )
    if any(r > MAX_RANK for r in plan.rank):
        raise InvalidInputError(f"plan: expected ranks up to {MAX_RANK}, got {max(plan.rank)}")
    state = state or State()
    state.check(sum(plan.numel))
    return layout, views, state


def _check_factor(x: Any, name: str, size: int) -> None:
    if not isinstance(x, np.ndarray) or x.dtype != np.float32 or not x.dtype.isnative:
        got = x.dtype if isinstance(x, np.ndarray) else type(x).__name__
        raise DTypeError(f"{name}: expected a float32 NumPy array, got {got}")
    if x.shape != (size,) or not x.flags.c_contiguous:
        raise InvalidInputError(f"{name}: expected a contiguous array ({size},), got {x.shape}")


# ---- variants ----------------------------------------------------------------------------------


def _native_plan(plan: Plan) -> Any:
    return _native.core.LowRankPlan(plan.numel, plan.n, plan.m, plan.rank)


def _cpu(
    views: Sequence[View],
    plan: Plan,
    start: np.ndarray,
    state: State,
    values: str,
    rank: int,
    tensors: bytes,
    fields: dict[str, Any],
) -> tuple[np.ndarray, np.ndarray] | None:
    made, packet = frame_of(plan, rank, values, tensors=tensors, **fields)
    address = _arrays.address(packet)
    following = np.empty(plan.q, np.float32)
    finite = _native.core.low_rank(
        **native_source(views, state),
        seed=fields["seed"],
        round=fields["round"],
        plan=_native_plan(plan),
        start=_arrays.address(start),
        next=_arrays.address(following),
        value_dtype=frame.VALUE_CODES[values],
        p=address + made.offset(frame.FACTOR_P),
        q=address + made.offset(frame.FACTOR_Q),
        values=address + made.offset(frame.VALUES),
    )
    if not finite:
        return None
    made.seal(address)
    state.commit()
    return packet, following


def _reference(
    views: Sequence[View],
    plan: Plan,
    start: np.ndarray,
    state: State,
    values: str,
    rank: int,
    tensors: bytes,
    fields: dict[str, Any],
) -> tuple[np.ndarray, np.ndarray] | None:
    result = reference.encode(
        flat_float32(views), plan, start, state, values, fields["seed"], fields["round"]
    )
    if result is None:
        return None
    bodies, following = result
    size = frame.VALUE_BYTES[frame.VALUE_CODES[values]]
    packet = wire_writer.frame(
        [
            (frame.COUNTS, 4, np.array(plan.rank, "<u4").tobytes()),
            (frame.VALUES, size, bodies["values"]),
            (frame.FACTOR_P, size, bodies["p"]),
            (frame.FACTOR_Q, size, bodies["q"]),
        ],
        codec="low_rank",
        numel=sum(plan.numel),
        values=values,
        form=0,
        bits=8 * size,
        tile=rank,
        tensors=tensors,
        **fields,
    )
    return np.frombuffer(bytearray(packet), np.uint8), following


def _half_cpu(
    views: Sequence[View], plan: Plan, factor: np.ndarray, back: bool, state: State
) -> tuple[np.ndarray, np.ndarray] | None:
    product = np.empty(plan.q if back else plan.p, np.float32)
    dense = np.empty(plan.values, np.float32)
    finite = _native.core.low_rank_half(
        **native_source(views, state),
        seed=0,
        round=0,
        plan=_native_plan(plan),
        back=back,
        factor=_arrays.address(factor),
        product=_arrays.address(product),
        values=_arrays.address(dense),
    )
    if not finite:
        return None
    state.commit()
    return product, dense


def _half_reference(
    views: Sequence[View], plan: Plan, factor: np.ndarray, back: bool, state: State
) -> tuple[np.ndarray, np.ndarray] | None:
    return reference.half(flat_float32(views), plan, factor, back, state, 0, 0)


def _residual_cpu(plan: Plan, p: np.ndarray, q: np.ndarray, e: np.ndarray) -> None:
    address = _arrays.address(e)
    _native.core.low_rank_residual(
        plan=_native_plan(plan),
        p=_arrays.address(p),
        q=_arrays.address(q),
        e=address,
        e_new=address,
        threads=_native.threads_for(e.size),
    )


def _residual_reference(plan: Plan, p: np.ndarray, q: np.ndarray, e: np.ndarray) -> None:
    reference.residual(plan, p, q, e.copy(), e)


def _orthonormalise_cpu(plan: Plan, columns: bool, factor: np.ndarray) -> np.ndarray:
    out = np.empty_like(factor)
    _native.core.low_rank_orthonormalise(
        _native_plan(plan),
        columns,
        _arrays.address(factor),
        _arrays.address(out),
        _native.threads_for(factor.size),
    )
    return out


_variants.add("low_rank", "cpu", lambda: _cpu, _variants.cpu_only)
_variants.add("low_rank", "reference", lambda: _reference, _variants.cpu_only)
_variants.add("low_rank_half", "cpu", lambda: _half_cpu, _variants.cpu_only)
_variants.add("low_rank_half", "reference", lambda: _half_reference, _variants.cpu_only)
_variants.add("low_rank_residual", "cpu", lambda: _residual_cpu, _variants.cpu_only)
_variants.add("low_rank_residual", "reference", lambda: _residual_reference, _variants.cpu_only)
_variants.add("low_rank_orthonormalise", "cpu", lambda: _orthonormalise_cpu, _variants.cpu_only)
_variants.add(
    "low_rank_orthonormalise", "reference", lambda: reference.orthonormal, _variants.cpu_only
)
