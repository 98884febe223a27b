"""Majority vote of the clients on the sign of every coordinate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from flcore import _arrays, _updates, _variants
from flcore.aggregation._checks import number
from flcore.aggregation._rule import check_choice
from flcore.errors import DTypeError
from flcore.ops._packet_rows import PacketRows, packet_rows, sign_packet
from flcore.ops.combine import ADVICE, bad_clients, one_device
from flcore.ops.vote import vote, vote_packet

if TYPE_CHECKING:
    from flcore.compression import Packet

__all__ = ["MajorityVote"]


@dataclass(frozen=True, kw_only=True)
class MajorityVote:
    r"""Sign of ``sum_i q_i s_ij``, the majority of the clients' signs; a tie is 0.

    Clients send one bit a coordinate: packets of codec `flcore.compression.Sign`, whose bits are
    counted as they are, without unpacking. Half of the clients, less one, cannot turn a coordinate
    on which the others agree. The result has no magnitude: take a step ``x -= lr * m`` of a fixed
    size with it, and do not feed it to an optimiser that expects the scale of a gradient.

    Parameters
    ----------
    scale : float
        Magnitude of the result, > 0.
    nonfinite : {"raise", "propagate"}
        What a NaN or an infinity in an update does: raise and name the client, or count with its
        sign, a NaN as positive. (Packets have neither.)

    Notes
    -----
    The sign of 0 is +1. Equal weights are counted exactly, others added in float32.

    References
    ----------
    Bernstein et al., "signSGD with Majority Vote is Communication Efficient and Fault Tolerant",
    ICLR 2019, arXiv 1810.05291.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.aggregation import MajorityVote
    >>> MajorityVote()([np.float32([3, -1]), np.float32([0, -2]), np.float32([-9, 5])])
    array([ 1., -1.], dtype=float32)
    """

    scale: float = 1.0
    nonfinite: str = "raise"

    def __post_init__(self) -> None:
        number("scale", self.scale, 0.0, float(np.finfo(np.float32).max), open="low")
        check_choice("nonfinite", self.nonfinite, ("raise", "propagate"))

    def __call__(
        self,
        updates: Any,
        weights: Sequence[float] | None = None,
        *,
        like: Any = None,
        out: Any = None,
        variant: str | None = None,
    ) -> Any:
        """Return the vote: -scale, 0 or +scale in every coordinate.

        Parameters
        ----------
        updates : list of packets, sequence of updates, or array of shape (n, ...)
            Packets of codec sign, or updates on the CPU, of which the signs are taken.
        weights : (n,) numbers >= 0, optional
            Not all zero; all equal when not given.
        like : update, optional
            With packets: what the result is like; by default one float32 array.
        out : update, optional
            Where the result goes; untouched when the call raises.
        variant : {"reference", "cpu"}, optional
            Which implementation counts.

        Raises
        ------
        InvalidInputError, DTypeError, NonFiniteError
            Updates, packets of another codec, weights or `out` that cannot be used.
        """
        rows = self._signs(updates, like)
        targets = None if out is None else rows.layout.layers(out, "out")
        votes = vote(rows.packets, weights, variant=variant)
        if self.scale != 1.0:
            votes *= np.float32(self.scale)

        def fill(layers: list[_arrays.View]) -> None:
            start = 0
            for layer in layers:
                _arrays.assign(layer.array, votes[start : start + layer.numel])
                start += layer.numel

        layers = rows.deliver(targets, fill)
        return out if out is not None else rows.layout.build(layers)

    def packet(
        self,
        updates: Any,
        weights: Sequence[float] | None = None,
        *,
        round: int = 0,
        seed: int = 0,
        epoch: int = 0,
        variant: str | None = None,
    ) -> Packet:
        """Return the vote as a packet of one bit a coordinate, for the way down; ties are positive.

        Parameters
        ----------
        updates, weights, variant
            As for a call.
        round, seed, epoch : int
            Header fields.
        """
        from flcore.compression import Packet

        rows = self._signs(updates, None)
        data = vote_packet(
            rows.packets,
            weights,
            scale=self.scale,
            round=round,
            seed=seed,
            epoch=epoch,
            variant=variant,
        )
        return Packet(data, trusted=True)

    def _signs(self, updates: Any, like: Any) -> PacketRows:
        """Return packets of signs: those of the clients, or made from their updates."""
        rows = packet_rows(updates, like)
        if rows is not None:
            return rows
        layout, arrays = _updates.parse_updates(updates)
        views = [layout.views(row, f"updates[{i}]") for i, row in enumerate(arrays)]
        device = one_device(views[0])
        if device != "cpu":
            raise DTypeError(f"updates: expected arrays on the CPU, got {device}")
        if self.nonfinite == "raise":
            found = _variants.choose("nonfinite", device)(views)
            if bad := [i for i, is_bad in enumerate(found) if is_bad]:
                raise bad_clients(bad, ADVICE)
        return PacketRows([sign_packet(row) for row in views], layout, arrays[0])
