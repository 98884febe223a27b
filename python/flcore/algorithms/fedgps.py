"""FedGPS, the path: local gradients are taken ahead, where the other clients went last."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from flcore.algorithms.base import check_number
from flcore.algorithms.fedavg import FedAvg
from flcore.algorithms.layout import Layout, Vector
from flcore.algorithms.state import Arrivals, Client, LocalResult, LocalWork, Payload, Server
from flcore.algorithms.step import EPSILON, Shift

__all__ = ["FedGPS"]


@dataclass(frozen=True, kw_only=True)
class FedGPS(FedAvg):
    r"""Path of the goal-path synergy (NeurIPS 2025, arXiv 2510.20250).

    The server keeps the mean update of the last round, :math:`\Delta = \frac{1}{S} \sum u_i`,
    client k its own, :math:`\Delta_k`.  All gradients of a round are taken at a shifted point,

    .. math::
        x \leftarrow x - \eta (\mathrm{clip}(\nabla f_k(x + e)) + \omega x), \qquad
        e = \rho d / \Bigl( \sum_l \|d_l\| - 10^{-7} \Bigr) ,

    where l runs over the tensors of the model, and d is the mean of the others' updates,
    :math:`d = (S \Delta - \Delta_k) / (S - 1)`, for who was there in the last round,
    :math:`\Delta` for who was there before, and 0 for who comes for the first time.

    Parameters
    ----------
    rho : float
        Bound on the length of the shift; 0 is FedAvg.
    weighting : {"uniform", "examples"}
        Of the mean of the updates; :math:`\Delta` is that mean, and uniform in the paper.

    Notes
    -----
    The shift goes along a *descent* direction: a look ahead, not an ascent.  With one participant
    a round there are no others, and no shift.  Statistics of the model do not enter it.
    """

    name: ClassVar[str] = "fedgps"

    weighting: str = "uniform"
    rho: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("rho", self.rho, lambda v: v >= 0, "a number from 0")

    def downlink(self, server: Server, client: int) -> Payload:
        """Send w, and from the second round on Delta and how many it is a mean of."""
        state = {name: server[name] for name in ("path", "senders") if name in server.state}
        return super().downlink(server, client) | state

    def client_begin(self, payload: Payload, client: Client) -> LocalWork:
        """Shift the point of all gradients of the round."""
        work = super().client_begin(payload, client)
        shift = Shift(self.rho * unit(self.others(payload, client), client.layout))
        return replace(work, spec=replace(work.spec, shift=shift))

    def others(self, payload: Payload, client: Client) -> Vector:
        """Give d."""
        if "path" not in payload or "path" not in client.state:
            return np.zeros_like(client.initial)
        path, n = payload["path"], payload["senders"]
        if client.state["path_round"] != client.round - 1:
            return path
        return (n * path - client.state["path"]) / (n - 1) if n > 1 else np.zeros_like(path)

    def client_end(self, result: LocalResult, client: Client) -> Payload:
        """Send u_i, and remember it with its round."""
        client.state["path"] = result.update
        client.state["path_round"] = client.round
        return super().client_end(result, client)

    def server_step(self, server: Server, mean: Vector, arrivals: Arrivals) -> None:
        """Take FedAvg's step, and remember the mean."""
        super().server_step(server, mean, arrivals)
        server["path"], server["senders"] = mean, len(arrivals)


def unit(d: Vector, layout: Layout) -> Vector:
    """Divide d by the sum of its tensors' norms; 0 stays 0."""
    pieces = [piece for piece in layout.slices.values() if piece.stop <= layout.trained]
    norm = sum(float(np.linalg.norm(d[piece])) for piece in pieces)
    return d / (norm - EPSILON) if norm > EPSILON else np.zeros_like(d)
