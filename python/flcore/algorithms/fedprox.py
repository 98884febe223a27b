"""FedProx: a penalty on the distance from the received model limits the drift of clients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from flcore.algorithms.base import check_choice, check_number
from flcore.algorithms.fedavg import FedAvg
from flcore.algorithms.state import Client, LocalWork, Payload

__all__ = ["FedProx"]


@dataclass(frozen=True, kw_only=True)
class FedProx(FedAvg):
    r"""Proximal local objectives (Li et al., MLSys 2020, arXiv 1812.06127).

    Clients minimise :math:`f_i(x) + \frac{\mu}{2} \|x - w^t\|^2` instead of :math:`f_i`; the rest
    is FedAvg.  The two forms of a step,

    .. math::
        \text{linear: } & x \leftarrow x - \eta (\mathrm{clip}(g - \mu w^t) + (\omega + \mu) x) \\
        \text{direct: } & x \leftarrow x - \eta (\mathrm{clip}(g) + \omega x + \mu (x - w^t)) ,

    differ where the clip is active, and under local momentum.

    Parameters
    ----------
    mu : float
        0 is FedAvg.
    form : {"linear", "direct"}
        "linear" clips one half of the penalty, as the FL-Simulator code base does, and local
        momentum accumulates it.  "direct" keeps the penalty out of clip and momentum, as the code
        of FedNova does.

    Notes
    -----
    :math:`w^t` is where the client starts, which `relaxation` moves.  The paper's devices may do
    any amount of local work; here that is an option of the engine (stragglers).
    """

    name: ClassVar[str] = "fedprox"

    mu: float = 0.01
    form: str = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("mu", self.mu, lambda v: v >= 0, "a number from 0")
        check_choice("form", self.form, ("linear", "direct"))

    def client_begin(self, payload: Payload, client: Client) -> LocalWork:
        """Start from w and pull every step towards it."""
        work = super().client_begin(payload, client)
        if self.form == "direct":
            return replace(work, spec=replace(work.spec, pull=self.mu, anchor=work.start))
        return replace(work, spec=self.spec(client.round, q=-self.mu * work.start, decay=self.mu))
