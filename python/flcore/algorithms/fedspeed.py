"""FedSpeed: FedDyn's correction of the proximal bias, with gradients taken uphill."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from flcore.algorithms.base import check_choice, check_number
from flcore.algorithms.feddyn import FedDyn
from flcore.algorithms.fedsam import FedSAM
from flcore.algorithms.layout import Vector
from flcore.algorithms.state import Arrivals, Client, LocalResult, Payload, Server
from flcore.algorithms.step import Ascent, StepSpec
from flcore.errors import InvalidInputError

__all__ = ["FedSpeed"]


@dataclass(frozen=True, kw_only=True)
class FedSpeed(FedSAM, FedDyn):
    r"""Prox-correction and perturbed gradients (Sun et al., ICLR 2023, arXiv 2302.10429).

    Client i keeps the prox-correction :math:`\hat g_i`, here as :math:`h_i = -\lambda \hat g_i`.
    With the same mini-batch for both gradients,

    .. math::
        g_1 &= \nabla f_i(x), \qquad g_2 = \nabla f_i(x + \rho g_1 / (\|g_1\| + 10^{-7})), \qquad
        \tilde g = (1 - \alpha) g_1 + \alpha g_2 \\
        x &\leftarrow x - \eta \bigl( \mathrm{clip}(\tilde g + \tfrac{1}{\lambda} (h_i - w^t))
            + (\omega + \tfrac{1}{\lambda}) x \bigr) \\
        h_i &\leftarrow h_i + u_i, \qquad u_i = x - w^t ,

    and the server takes FedDyn's step, :math:`w^{t+1} = \frac{1}{S} \sum_{S_t} x_i
    + \frac{1}{m} \sum_{\text{all}} h_i`.

    Parameters
    ----------
    prox : float
        :math:`1 / \lambda`: the paper's lambda is a denominator.
    rho : float
        0 is FedDyn.
    merge : float
        :math:`\alpha`, weight of the perturbed gradient; 1 in the authors' code.
    normalised : bool
        Whether the ascent has length rho, as in the authors' code, or is :math:`\rho g_1`, as in
        the paper.
    server_term : {"all", "active"}
        "active" is the paper's :math:`w^{t+1} = \frac{1}{S} \sum_{S_t} (x_i + h_i)`, which differs
        under partial participation and is unstable when few clients take part; clients then send
        :math:`u_i + h_i`.
    """

    name: ClassVar[str] = "fedspeed"

    weighting: str = "uniform"
    merge: float = 1.0
    normalised: bool = True
    server_term: str = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("merge", self.merge, lambda v: 0 <= v <= 1, "a number from 0 to 1")
        check_choice("server_term", self.server_term, ("all", "active"))
        if self.adaptive and not self.normalised:
            raise InvalidInputError("adaptive: expected False together with normalised=False")

    def spec(self, round: int, *, decay: float = 0.0, **numbers: Any) -> StepSpec:
        """Give FedDyn's step with the merged ascent in it."""
        shift = Ascent(self.rho, self.merge, self.normalised, self.adaptive)
        return super().spec(round, decay=decay, shift=shift, **numbers)

    def client_end(self, result: LocalResult, client: Client) -> Payload:
        """Renew h_i, send u_i, or u_i + h_i."""
        payload = super().client_end(result, client)
        if self.server_term == "active":
            moved = payload["update"] + client.layout.take(client.state["dual"])
            still = client.layout.statistics
            moved[still] = payload["update"][still]
            payload["update"] = moved
        return payload

    def server_step(self, server: Server, mean: Vector, arrivals: Arrivals) -> None:
        """Take FedDyn's step, or plainly the mean of what was sent."""
        if self.server_term == "active":
            self.move(server, mean, self.server_lr)
        else:
            super().server_step(server, mean, arrivals)
