"""The weighted mean of client updates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from flcore import _arrays, _updates
from flcore.aggregation._decision import Decision
from flcore.aggregation._geometry import Geometry
from flcore.aggregation._integers import POLICIES, IntegerLayer, split_layers
from flcore.aggregation._rule import Rule, check_choice
from flcore.ops._combine_packets import combine_packets
from flcore.ops._packet_rows import packet_rows
from flcore.ops.combine import combine_layers

__all__ = ["Mean"]


@dataclass(frozen=True, kw_only=True)
class Mean(Rule):
    r"""Weighted mean, ``sum_i p_i x_i`` with ``p_i = q_i / sum_j q_j``.

    The rule of FedAvg when the weights ``q_i`` are example counts. One read of every value.

    Parameters
    ----------
    accumulate : {"float32", "float64", "reproducible"}
        Type of the sums, see `flcore.ops.combine`. "reproducible": the same bits for any order of
        the clients, equal to `Accumulator(dtype="reproducible")` over any split.
    nonfinite : {"raise", "exclude", "propagate"}
        What a NaN or an infinity does. "exclude" leaves the client out and normalises the weights
        of the others.
    integers : {"mean", "max", "sum", "first"}
        What happens to integer and boolean layers (step counters): the weighted mean in float64
        rounded to the nearest integer, or a reduction that ignores the weights.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.aggregation import Mean
    >>> Mean()([np.float32([1, -2]), np.float32([3, 0]), np.float32([-1, 4])], weights=[1, 3, 4])
    array([0.75, 1.75], dtype=float32)

    References
    ----------
    McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
    AISTATS 2017.
    """

    integers: str = "mean"
    needs: ClassVar[str] = "nothing"
    weighted: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("integers", self.integers, POLICIES)

    def _decide(self, geometry: Geometry, weights: np.ndarray | None, excluded: int) -> Decision:
        q = np.ones(geometry.n) if weights is None else weights
        return Decision(q / q.sum())

    def __call__(  # type: ignore[override]  # has no centre
        self,
        updates: Any,
        weights: Sequence[float] | None = None,
        *,
        like: Any = None,
        out: Any = None,
        variant: str | None = None,
    ) -> Any:
        """Return the mean of `updates`.

        Parameters
        ----------
        updates : sequence of updates, array of shape (n, ...), or list of packets
            One update a client, alike in structure, shapes, dtypes and device; or packets of
            `flcore.compression`, of any codecs.
        weights : (n,) numbers >= 0, optional
            Not all zero; all equal when not given. A client of weight 0 is not read.
        like : update, optional
            With packets: what the result is like; by default one float32 array.
        out : update, optional
            Where the result goes; untouched when the call raises.
        variant : str, optional
            Which implementation runs, see `flcore.ops.combine`.

        Returns
        -------
        update
            Of the kind, dtype and device of one update.

        Raises
        ------
        InvalidInputError, DTypeError, NonFiniteError, VariantUnavailableError
            See `flcore.ops.combine`; also weights that are negative or sum to zero.
        """
        packets = packet_rows(updates, like)
        rows: Any = packets
        if packets is None:
            layout, rows = _updates.parse_updates(updates)
        else:
            layout = packets.layout
        n = len(rows)
        q = [1.0] * n if weights is None else _updates.parse_weights(weights, n, signed=False)
        targets = None if out is None else layout.layers(out, "out")
        floats, integers = split_layers(layout)
        exact = self.accumulate == "reproducible"  # raw weights, one division at the end
        kept = set(range(n))

        def total(keep: set[int]) -> float:
            return math.fsum(q[i] for i in keep)

        if packets is not None:
            everyone = total(set(range(n)))
            results = combine_packets(
                packets,
                q if exact else [share / everyone for share in q],
                out=targets,
                accumulate=self.accumulate,
                nonfinite=self.nonfinite,
                divisor=everyone if exact else 1.0,
                variant=variant,
            )
            return out if out is not None else layout.build(results)

        def shares(keep: set[int]) -> list[float]:
            kept.intersection_update(keep)
            scale = 1.0 if exact else total(keep)
            return [q[i] / scale if i in keep and q[i] else 0.0 for i in range(n)]

        results = combine_layers(
            [[row[j] for j in floats] for row in rows],
            shares,
            layout=layout.select(floats),
            out=None if targets is None else [targets[j] for j in floats],
            accumulate=self.accumulate,
            nonfinite=self.nonfinite,
            divisor=lambda keep: total(keep) if exact else 1.0,
            variant=variant,
        )
        layers = dict(zip(floats, results, strict=True))
        for j in integers:
            layer = IntegerLayer(rows[0][j], self.integers)
            for i in sorted(kept):
                if q[i]:
                    layer.add(rows[i][j], q[i])
            layers[j] = layer.result(total(kept))
            if targets is not None:
                _arrays.assign(targets[j], layers[j])
        return out if out is not None else layout.build([layers[j] for j in range(len(layers))])
