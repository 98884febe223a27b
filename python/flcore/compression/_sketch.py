"""Count sketches: clients without state, and the FetchSGD server that remembers for all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from flcore import _arrays, _native, _updates
from flcore.compression._codec import Codec, Job
from flcore.compression._packet import Packet, _as_packet
from flcore.errors import InvalidInputError, NonFiniteError
from flcore.ops import sketch as ops
from flcore.ops._encode import source_dtype
from flcore.ops._sparse_packet import sparse_packet
from flcore.ops.combine import combine
from flcore.reference import wire_frame as frame

__all__ = ["FetchSGD", "Sketch", "SketchStep", "sum_sketches"]


def _check_seed(seed: Any) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise InvalidInputError(f"seed: expected 0 <= seed < 2**64, got {seed!r}")


@dataclass(frozen=True)
class Sketch(Codec):
    """Send a count sketch: a linear map to rows x columns numbers, whatever the update.

    Sketches of many clients are summed before anything is read from them (:func:`sum_sketches`, or
    under secure aggregation), and `FetchSGD` keeps momentum and error inside the sum, so that
    clients need no memory and may come once only. Decoded on its own a packet gives an estimate of
    every coordinate, with noise of about ``|u|_2 / sqrt(columns)``.

    Parameters
    ----------
    columns : int
        d/100 to d/10 for d coordinates; the table may hold at most 2 d numbers.
    rows : {1, 3, 5, 7, 9}
        Estimates are medians of so many.
    seed : int
        Names the hashes; the same for all clients, the server, and all rounds. It takes the place
        of the seed in the header.

    Raises
    ------
    InvalidInputError
        A setting that cannot be used.

    References
    ----------
    Rothchild et al., "FetchSGD: Communication-Efficient Federated Learning with Sketching", ICML
    2020, arXiv 2007.07682.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.compression import Encoder, Sketch, decode
    >>> x = np.zeros(1000)
    >>> x[[3, 500]] = 5.0, -2.0
    >>> estimate = decode(Encoder(Sketch(columns=100), like=x).encode(x))
    >>> estimate[[3, 500]]
    array([ 5., -2.], dtype=float32)
    """

    columns: int
    rows: int = 5
    seed: int = 0
    name: ClassVar[str] = "sketch"
    shared_seed: ClassVar[bool] = True
    takes_feedback: ClassVar[bool] = False

    def __post_init__(self) -> None:
        ops.check_shape(self.rows, self.columns)
        _check_seed(self.seed)

    def check(self, shapes: Sequence[tuple[int, ...]]) -> None:
        """Raise `InvalidInputError` if the update is too small or too large for the table."""
        numel = sum(math.prod(shape) for shape in shapes)
        if numel > ops.MAX_NUMEL:
            raise InvalidInputError(f"update: a sketch has at most 2**34 coordinates, got {numel}")
        room = 2 * numel + (frame.SLACK_BYTES - 512) // 4
        if self.rows * self.columns > room:
            raise InvalidInputError(
                f"columns: a table of {self.rows} x {self.columns} numbers is more than twice the "
                f"{numel} coordinates"
            )

    def eta(self, numel: int) -> float:
        """Return 0: what a sketch loses cannot be collected by the client."""
        return 0.0

    def encode(self, job: Job) -> np.ndarray:
        """Return the packet; see `Codec.encode`.

        Raises
        ------
        InvalidInputError
            The encoder has a feedback; the memory of sketches is the server's.
        """
        if job.state.buffers():
            raise InvalidInputError(
                "feedback: expected None with Sketch: its error and momentum live in FetchSGD"
            )
        made = _native.core.PacketFrame(
            codec=frame.CODECS["sketch"],
            numel=job.numel,
            value_dtype=frame.VALUE_CODES["float32"],
            form=self.rows,
            bits=32,
            tile=self.columns,
            source_dtype=frame.SOURCE_DTYPES[source_dtype(_views(job.update))],
            sections=[(frame.VALUES, 4, 4 * self.rows * self.columns)],
            **{**job.header, "seed": self.seed},
        )
        packet = np.empty(made.nbytes, np.uint8)
        at = made.offset(frame.VALUES)
        cells = packet[at : at + 4 * self.rows * self.columns].view(np.float32)
        ops.sketch(
            job.update,
            rows=self.rows,
            columns=self.columns,
            seed=self.seed,
            out=cells.reshape(self.rows, self.columns),
        )
        made.seal(_arrays.address(packet))
        return packet


def _views(update: Any) -> list[_arrays.View]:
    layout, layers = _updates.flatten(update)
    return layout.views(layers, "update")


def _table(packet: Packet, name: str, rows: int, columns: int, seed: int, numel: int) -> Any:
    """View the table of a packet, checked to be of this family."""
    h = packet.header
    got = (h.codec, h.form, h.tile, h.seed, h.numel)
    want = ("sketch", rows, columns, seed, numel)
    for what, x, y in zip(("codec", "rows", "columns", "seed", "numel"), want, got, strict=True):
        if x != y:
            raise InvalidInputError(f"{name}: expected {what} {x}, got {y}")
    offset, length = packet.view.section(frame.VALUES)
    return packet.to_numpy()[offset : offset + length].view("<f4")


def sum_sketches(packets: Sequence[Any], weights: Any = None) -> np.ndarray:
    """Return ``sum_i weights[i] * table_i`` of sketch packets, float32 (rows, columns).

    The sum is made in float64, in list order, and rounded once.

    Parameters
    ----------
    packets : sequence of Packet or bytes
        Of one shape, seed and number of coordinates.
    weights : numbers, optional
        One a packet, finite, any sign; 1 by default.

    Raises
    ------
    PacketError
        Bytes that are not a packet.
    InvalidInputError
        Packets of another codec, shape or seed, or none.
    NonFiniteError
        The sum overflows.
    """
    parsed = [_as_packet(p, f"packets[{i}]") for i, p in enumerate(packets)]
    if not parsed:
        raise InvalidInputError("packets: expected at least one sketch, got none")
    h = parsed[0].header
    tables = [
        _table(p, f"packets[{i}]", h.form, h.tile, h.seed, h.numel)  # type: ignore[arg-type]
        for i, p in enumerate(parsed)
    ]
    weights = np.ones(len(tables)) if weights is None else weights
    return combine(tables, weights, accumulate="float64").reshape(h.form, h.tile)


class SketchStep(NamedTuple):
    """One step of `FetchSGD`: subtract `values` from the model at `indices`, or decode `packet`.

    Attributes
    ----------
    indices : (k,) int64, increasing
    values : (k,) float32
    packet : Packet
        The same as a sparse packet, for the broadcast.
    """

    indices: np.ndarray
    values: np.ndarray
    packet: Packet


class FetchSGD:
    """Server of sketched updates: momentum and error feedback inside the sketch.

    With S the mean sketch of a round::

        S_u <- momentum S_u + S
        S_e <- S_e + lr S_u
        Delta = the k largest estimates of S_e
        the model moves by -Delta

    and what Delta took is removed from S_e: by default every cell that Delta touches becomes 0, in
    S_u too (momentum masking), which is the form that converges in practice; with
    ``subtract=True`` the sketch of Delta is subtracted from S_e, as in the paper.

    Parameters
    ----------
    numel : int
        Number of coordinates d.
    columns, rows, seed
        Those of the clients' `Sketch`.
    k : int
        Entries of a step, 1 to d; about columns / 10.
    momentum : float
        0 <= momentum < 1. Then clients must have none of their own.
    subtract : bool
        The paper's form.

    Attributes
    ----------
    momentum_table, error_table : (rows, columns) float32 arrays
        S_u and S_e.
    round : int
        Steps so far; the round in the header of the next packet.

    Raises
    ------
    InvalidInputError
        A setting that cannot be used.

    References
    ----------
    Rothchild et al., "FetchSGD: Communication-Efficient Federated Learning with Sketching", ICML
    2020, arXiv 2007.07682.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.compression import Encoder, FetchSGD, Sketch
    >>> codec = Sketch(columns=50, rows=3)
    >>> server = FetchSGD(300, columns=50, rows=3, k=2, momentum=0.0)
    >>> g = np.zeros(300)
    >>> g[[7, 9]] = 4.0, -1.0
    >>> step = server.step([Encoder(codec, like=g).encode(g)], lr=0.5)
    >>> step.indices.tolist(), step.values.tolist()
    ([7, 9], [2.0, -0.5])
    """

    def __init__(
        self,
        numel: int,
        *,
        columns: int,
        k: int,
        rows: int = 5,
        momentum: float = 0.9,
        subtract: bool = False,
        seed: int = 0,
    ) -> None:
        ops.check_shape(rows, columns)
        _check_seed(seed)
        for name, value, low, high in (("numel", numel, 1, ops.MAX_NUMEL), ("k", k, 1, numel)):
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise InvalidInputError(f"{name}: expected {low} to {high}, got {value!r}")
        number = isinstance(momentum, int | float) and not isinstance(momentum, bool)
        if not (number and 0 <= momentum < 1):
            raise InvalidInputError(f"momentum: expected 0 <= momentum < 1, got {momentum!r}")
        self.numel, self.rows, self.columns, self.k, self.seed = numel, rows, columns, k, seed
        self.momentum, self.subtract = float(momentum), bool(subtract)
        self.momentum_table = np.zeros((rows, columns), np.float32)
        self.error_table = np.zeros((rows, columns), np.float32)
        self.round = 0

    def step(self, packets: Sequence[Any], weights: Any = None, *, lr: float = 1.0) -> SketchStep:
        """Take the sketches of one round and return how the model moves.

        Parameters
        ----------
        packets : sequence of Packet or bytes
            Of `Sketch` codecs with the server's rows, columns and seed.
        weights : numbers, optional
            Non-negative, one a packet; the mean is weighted by them.
        lr : float
            Step size; the error keeps the size that was current.

        Raises
        ------
        PacketError, InvalidInputError
            Packets or weights that cannot be used.
        NonFiniteError
            A table overflows.

        In each case nothing has changed.
        """
        parsed = [_as_packet(p, f"packets[{i}]") for i, p in enumerate(packets)]
        for i, p in enumerate(parsed):
            _table(p, f"packets[{i}]", self.rows, self.columns, self.seed, self.numel)  # type: ignore[arg-type]
        w = np.ones(len(parsed)) if weights is None else np.asarray(weights, np.float64)
        if w.shape != (len(parsed),) or not np.isfinite(w).all() or (w < 0).any() or not w.any():
            raise InvalidInputError(
                f"weights: expected {len(parsed)} finite numbers >= 0, not all 0, got {weights!r}"
            )
        return self.step_table(sum_sketches(parsed, w / w.sum()), lr=lr)

    def step_table(self, mean: np.ndarray, *, lr: float = 1.0) -> SketchStep:
        """Take the mean sketch itself, (rows, columns) float32: for sums made elsewhere.

        Parameters, errors and result as :meth:`step`.
        """
        if not isinstance(mean, np.ndarray) or mean.shape != self.error_table.shape:
            raise InvalidInputError(f"mean: expected an array {self.error_table.shape}")
        if not math.isfinite(lr):
            raise InvalidInputError(f"lr: expected a finite number, got {lr!r}")
        with np.errstate(over="ignore", invalid="ignore"):
            momentum = np.float32(self.momentum) * self.momentum_table + mean.astype(np.float32)
            error = self.error_table + np.float32(lr) * momentum
        if not (np.isfinite(momentum).all() and np.isfinite(error).all()):
            raise NonFiniteError("mean: not finite, or it overflows with the tables of the server")
        index, values = ops.sketch_top_k(error, self.numel, self.k, seed=self.seed)
        if self.subtract:
            ops.sketch_scatter(error, index, -values, seed=self.seed)
        else:
            ops.sketch_scatter(error, index, None, seed=self.seed)
            ops.sketch_scatter(momentum, index, None, seed=self.seed)
        data = sparse_packet(index, values, self.numel, round=self.round, seed=self.seed)
        self.momentum_table, self.error_table = momentum, error
        self.round += 1
        return SketchStep(index, values, Packet(data, trusted=True))

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the state: both tables, and the numbers that name the hashes."""
        return {
            "momentum_table": self.momentum_table.copy(),
            "error_table": self.error_table.copy(),
            "numel": self.numel,
            "seed": self.seed,
            "round": self.round,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state that :meth:`state_dict` returned.

        Raises
        ------
        InvalidInputError
            It is of another shape, seed or size, or not finite; the server is unchanged.
        """
        mine = self.state_dict()
        if state.keys() != mine.keys():
            raise InvalidInputError(f"state: expected the keys {sorted(mine)}, got {sorted(state)}")
        for name in ("numel", "seed"):
            if state[name] != mine[name]:
                raise InvalidInputError(
                    f"state[{name!r}]: expected {mine[name]!r}, got {state[name]!r}"
                )
        tables = {}
        for name in ("momentum_table", "error_table"):
            table = np.array(state[name])
            if table.dtype != np.float32 or table.shape != mine[name].shape:
                raise InvalidInputError(
                    f"state[{name!r}]: expected float32 {mine[name].shape}, "
                    f"got {table.dtype} {table.shape}"
                )
            if not np.isfinite(table).all():
                raise InvalidInputError(f"state[{name!r}]: expected finite values")
            tables[name] = table
        self.momentum_table, self.error_table = tables["momentum_table"], tables["error_table"]
        self.round = int(state["round"])
