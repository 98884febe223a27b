"""Power iteration on the matrices of an update: the definition in NumPy.

A layer is a matrix U of n rows (its first dimension) and m columns (the rest) with factors P
(n, r) and, held as rows, Q^T (r, m). Sums are float32 within a tile of 64 rows and 1024 columns
and float64 above it, in a fixed order, so that factors and state of every variant equal these bit
for bit.

Vogels, Karimireddy, Jaggi, "PowerSGD", NeurIPS 2019, arXiv 1905.13727.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flcore._state import State
from flcore.reference import feedback
from flcore.reference.sparsify import round_values
from flcore.reference.wire_frame import Header, decode_values
from flcore.reference.wire_low_rank import LARGEST, MAX_RANK, LowRankBody

__all__ = [
    "COLUMNS",
    "LARGEST",
    "MAX_RANK",
    "ROWS",
    "Plan",
    "back",
    "decode",
    "encode",
    "half",
    "orthonormalise",
    "product",
    "project",
]

ROWS, COLUMNS, LANES = 64, 1024, 16
DEPENDENT = 1e-12  # of a vector's norm: what Gram-Schmidt leaves below is rounding


@dataclass(frozen=True)
class Plan:
    """Layers as matrices; rank 0 is a layer that is sent as its values.

    Attributes
    ----------
    numel, n, m, rank : tuples of int, one entry a layer
    """

    numel: tuple[int, ...]
    n: tuple[int, ...]
    m: tuple[int, ...]
    rank: tuple[int, ...]

    @classmethod
    def of(cls, shapes: Sequence[tuple[int, ...]], ranks: Sequence[int]) -> Plan:
        """Return the plan of layers of these shapes."""
        numel = [int(np.prod(s, dtype=np.int64)) for s in shapes]
        n = [s[0] if r else 1 for s, r in zip(shapes, ranks, strict=True)]
        m = [d // max(1, rows) for d, rows in zip(numel, n, strict=True)]
        return cls(tuple(numel), tuple(n), tuple(m), tuple(ranks))

    @property
    def p(self) -> int:
        """Number of elements of all P."""
        return sum(n * r for n, r in zip(self.n, self.rank, strict=True))

    @property
    def q(self) -> int:
        """Number of elements of all Q."""
        return sum(m * r for m, r in zip(self.m, self.rank, strict=True))

    @property
    def values(self) -> int:
        """Number of values of the layers that are not compressed."""
        return sum(d for d, r in zip(self.numel, self.rank, strict=True) if r == 0)

    def parts(self, flat: np.ndarray, kind: str) -> list[np.ndarray]:
        """Cut a flat array into what belongs to each layer, empty where it has none.

        `kind` is "p" for P (n, r), "q" for Q^T (r, m), "u" for the coordinates (n, m), "values".
        """
        parts, at = [], 0
        for d, n, m, r in zip(self.numel, self.n, self.m, self.rank, strict=True):
            shape = {"p": (n, r), "q": (r, m), "u": (n, m), "values": (0 if r else d,)}[kind]
            size = int(np.prod(shape))
            parts.append(flat[at : at + size].reshape(shape))
            at += size
        return parts


def _tree(lanes: np.ndarray) -> np.ndarray:
    """Sum the last axis of 16 lanes as a tree: c + (c + 8), c + (c + 4), ... ."""
    half = LANES // 2
    while half:
        lanes = lanes[..., :half] + lanes[..., half : 2 * half]
        half //= 2
    return lanes[..., 0]


def _pad(x: np.ndarray) -> np.ndarray:
    """Zeros behind the last axis up to a multiple of 16."""
    spare = -x.shape[-1] % LANES
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, spare)])


def project(u: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Return (U Q)^T as float64 (r, n); u (n, m) and q (r, m) float32."""
    total = np.zeros((q.shape[0], u.shape[0]))
    for first in range(0, u.shape[1], COLUMNS):
        a, b = _pad(u[:, first : first + COLUMNS]), _pad(q[:, first : first + COLUMNS])
        lanes = np.zeros((q.shape[0], u.shape[0], LANES), np.float32)
        for c in range(0, a.shape[1], LANES):
            lanes = lanes + a[None, :, c : c + LANES] * b[:, None, c : c + LANES]
        total = total + _tree(lanes).astype(np.float64)
    return total


def back(u: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Return (U^T P)^T as float64 (r, m); u (n, m) and p (n, r) float32."""
    total = np.zeros((p.shape[1], u.shape[1]))
    for first in range(0, u.shape[0], ROWS):
        sums = np.zeros((p.shape[1], u.shape[1]), np.float32)
        for i in range(first, min(first + ROWS, u.shape[0])):
            sums = sums + p[i, :, None] * u[i, None, :]
        total = total + sums.astype(np.float64)
    return total


def _dot(a: np.ndarray, b: np.ndarray) -> float:
    terms = _pad(a * b).reshape(-1, LANES)
    lanes = np.zeros(LANES)
    for row in terms:
        lanes = lanes + row
    return float(_tree(lanes))


def orthonormalise(x: np.ndarray) -> np.ndarray:
    """Return the rows of `x`, float64 (r, n), made orthonormal one after the other.

    Each is made orthogonal to those before it twice. A row that depends on them becomes 0.
    """
    x = np.array(x, np.float64)
    for k in range(x.shape[0]):
        before = np.sqrt(_dot(x[k], x[k]))
        for _ in range(2):
            for j in range(k):
                x[k] = x[k] - _dot(x[j], x[k]) * x[j]
        norm = np.sqrt(_dot(x[k], x[k]))
        x[k] = x[k] / norm if norm > DEPENDENT * before else 0.0
    return x


def product(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Return D = P Q^T, float32 (n, m): terms in the order of the columns of P, no fma."""
    d = p[:, :1] * q[:1]
    for k in range(1, p.shape[1]):
        d = d + p[:, k : k + 1] * q[k : k + 1]
    return d


def _rounded(x: np.ndarray, values: str) -> tuple[bytes, np.ndarray]:
    """Return the bytes of float32 `x` on the wire, and the float32 a receiver reads."""
    raw = round_values(np.ascontiguousarray(x, np.float32).reshape(-1), values)
    return raw.astype(raw.dtype.newbyteorder("<")).tobytes(), decode_values(raw, values)


def _join(parts: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *(x.reshape(-1).astype(dtype) for x in parts)])


def _orthonormal(plan: Plan, q: np.ndarray) -> list[np.ndarray]:
    return [orthonormalise(x).astype(np.float32) for x in plan.parts(q, "q")]


def encode(
    g: np.ndarray, plan: Plan, start: np.ndarray, state: State, values: str, seed: int, round: int
) -> tuple[dict[str, bytes], np.ndarray] | None:
    """One power iteration of every layer, and the state after it; None where that is not finite.

    Parameters
    ----------
    g : (d,) float32
        The update.
    start : (plan.q,) float32
        Q^T of every layer to begin with.
    values : {"float32", "bfloat16"}
        What factors and values are rounded to.

    Returns
    -------
    sections : dict
        Bytes of "p", "q" and "values".
    next : (plan.q,) float32
        Q^T as it was sent.
    """
    with np.errstate(all="ignore"):
        block = feedback.form(g, state)
        if not block.finite:
            return None
        u = plan.parts(block.u, "u")
        wide = [project(x, q) for x, q in zip(u, _orthonormal(plan, start), strict=True)]
        if not all(np.isfinite(x).all() for x in wide):
            return None
        p_bytes, p = _rounded(_join([orthonormalise(x).T for x in wide], np.float32), values)
        factors_p = plan.parts(p, "p")
        wide = [back(x, y) for x, y in zip(u, factors_p, strict=True)]
        if not all(np.isfinite(x).all() for x in wide):
            return None
        q_bytes, q = _rounded(_join(wide, np.float32), values)
        factors_q = plan.parts(q, "q")
        most = max((float(np.abs(x).max()) for x in (block.t, state.h) if x is not None and x.size),
                   default=0.0)  # fmt: skip
        reach = [
            (np.abs(x).max(0).astype(float) * np.abs(y).max(1)).sum() if x.size else 0.0
            for x, y in zip(factors_p, factors_q, strict=True)
        ]
        if not most + max(reach, default=0.0) <= LARGEST:
            return None
    dense = [x.reshape(-1) for x, r in zip(u, plan.rank, strict=True) if r == 0]
    v_bytes, sent_values = _rounded(_join(dense, np.float32), values)
    sent = [
        product(x, y).reshape(-1) if r else z
        for x, y, z, r in zip(
            factors_p, factors_q, plan.parts(sent_values, "values"), plan.rank, strict=True
        )
    ]
    feedback.store(state, block, _join(sent, np.float32), seed, round)
    return {"p": p_bytes, "q": q_bytes, "values": v_bytes}, q


def half(
    g: np.ndarray,
    plan: Plan,
    factor: np.ndarray,
    is_back: bool,
    state: State,
    seed: int,
    round: int,
) -> tuple[np.ndarray, np.ndarray] | None:
    """One factor of the linear form and the values, float32; e keeps U until D is known.

    Returns P (plan.p,) or, `is_back`, Q^T (plan.q,), and the values (plan.values,).
    """
    with np.errstate(all="ignore"):
        block = feedback.form(g, state)
        if not block.finite:
            return None
        u = plan.parts(block.u, "u")
        parts = plan.parts(factor, "p" if is_back else "q")
        if is_back:
            wide = [back(x, p) for x, p in zip(u, parts, strict=True)]
        else:
            wide = [project(x, q).T for x, q in zip(u, parts, strict=True)]
        result = _join(wide, np.float32)
    if not np.isfinite(result).all():
        return None
    sent = [
        np.zeros(x.size, np.float32) if r else x.reshape(-1)
        for x, r in zip(u, plan.rank, strict=True)
    ]
    feedback.store(state, block, _join(sent, np.float32), seed, round)
    dense = [x for x, r in zip(sent, plan.rank, strict=True) if r == 0]
    return result, _join(dense, np.float32)


def decode(header: Header, body: LowRankBody) -> np.ndarray:
    """Return the update of a checked packet as float32 (d,)."""
    plan = Plan.of([t.shape for t in body.tensors], body.ranks.tolist())
    factors = zip(
        plan.parts(body.p, "p"), plan.parts(body.q, "q"), plan.parts(body.values, "values"),
        plan.rank, strict=True,
    )  # fmt: skip
    return _join([product(x, y) if r else z for x, y, z, r in factors], np.float32)


def residual(plan: Plan, p: np.ndarray, q: np.ndarray, e: np.ndarray, out: np.ndarray) -> None:
    """Write ``e - P Q^T`` into `out` where a layer has factors, else e."""
    layers = zip(
        plan.parts(p, "p"), plan.parts(q, "q"), plan.parts(e, "u"), plan.parts(out, "u"),
        plan.rank, strict=True,
    )  # fmt: skip
    for x, y, old, new, r in layers:
        new[...] = old - product(x, y) if r else old


def orthonormal(plan: Plan, columns: bool, factor: np.ndarray) -> np.ndarray:
    """Return P with orthonormal columns, or Q^T with orthonormal rows (`columns`), as float32."""
    if columns:
        return _join(_orthonormal(plan, factor), np.float32)
    return _join([orthonormalise(x.T).T for x in plan.parts(factor, "p")], np.float32)
