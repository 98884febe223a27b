"""SCAFFOLD: control variates correct every local gradient for the client's drift."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from flcore.algorithms._sizes import WeighedLosses
from flcore.algorithms.base import check_choice
from flcore.algorithms.layout import Vector
from flcore.algorithms.state import Arrivals, Client, LocalResult, LocalWork, Payload, Server
from flcore.errors import InvalidInputError

__all__ = ["Scaffold"]


@dataclass(frozen=True, kw_only=True)
class Scaffold(WeighedLosses):
    r"""Stochastic controlled averaging (Karimireddy et al., ICML 2020, arXiv 1910.06378).

    Client i keeps :math:`c_i`, the server :math:`c`, both 0 at first. With :math:`K_i` local steps,

    .. math::
        x &\leftarrow x - \eta (\mathrm{clip}(g + c - c_i) + \omega x), \qquad u_i = x - w^t \\
        c_i^+ &= \nabla f_i(w^t) \;\text{ (option I), or }\;
            c_i - c - u_i / (K_i \eta) \;\text{ (option II)} \\
        w^{t+1} &= w^t + \eta_g \frac{1}{S} \sum_{S_t} u_i, \qquad
        c \leftarrow c + \frac{1}{m} \sum_{S_t} (c_i^+ - c_i) .

    All clients of a round use the same old c.  Since :math:`c_i^+ - c_i = -c - u_i / (K_i \eta)`
    with option II, clients send :math:`u_i` and :math:`K_i` only, half of the paper's listing.

    Parameters
    ----------
    option : {"II", "I"}
        "I" costs a gradient over all of a client's examples, and twice the uplink.
    server_lr : float
        :math:`\eta_g`.
    weighting : {"uniform", "examples"}
        "examples": with :math:`p_i = n_i / \bar n` clients correct by :math:`c / p_i - c_i`, and
        the server sums :math:`p_i (c_i^+ - c_i)`, as in the code of FedDyn, which makes the sum
        over *examples* the objective.  The mean of the updates is uniform either way.

    Notes
    -----
    With clipping, decay or momentum :math:`c_i` is no longer the mean of the gradients alone.
    ``c == mean of all p_i c_i`` after every round, as long as updates arrive as they were sent.
    """

    name: ClassVar[str] = "scaffold"

    option: str = "II"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("option", self.option, ("I", "II"))

    def server_begin(self, server: Server) -> None:
        """Start from c = 0."""
        server["control"] = server.zeros()

    def downlink(self, server: Server, client: int) -> Payload:
        """Send w and c."""
        return super().downlink(server, client) | {"control": server["control"]}

    def client_begin(self, payload: Payload, client: Client) -> LocalWork:
        """Correct gradients by ``c / p_i - c_i``."""
        work = super().client_begin(payload, client)
        common = payload["control"] / self.relative(client.examples, payload)
        return replace(work, spec=replace(work.spec, q=common - client.keep("control")))

    def client_end(self, result: LocalResult, client: Client) -> Payload:
        """Renew c_i; send u_i with K_i, or with the change of c_i."""
        payload = super().client_end(result, client)
        if self.option == "II":
            correction = result.work.spec.q
            assert correction is not None  # it is c / p_i - c_i
            client.state["control"] = -correction - result.update / (result.steps * result.lr)
            return payload | {"steps": result.steps}
        if client.tools is None:
            raise InvalidInputError(
                "option: 'I' needs the gradient over all of a client's examples, which cannot be "
                "computed here; choose 'II'"
            )
        before, after = client.keep("control"), client.tools.gradient(result.start)
        client.state["control"] = after
        return payload | {"control": after - before}

    def server_step(self, server: Server, mean: Vector, arrivals: Arrivals) -> None:
        """Move w along the mean, and c by the change of all c_i, each divided by m."""
        super().server_step(server, mean, arrivals)
        m, lr = server.population, self.lr(server.round)
        p = [self.relative(a.examples, server.state) / m for a in arrivals]
        if self.option == "I":
            server["control"] = server["control"] + arrivals.sum(p, "control")
        else:
            parts = zip(p, arrivals, strict=True)
            w = [share / (a["steps"] * lr) for share, a in parts]
            # equal work: the mean will do, which a robust rule or an error control stands behind
            drift = sum(w) * mean if len(set(w)) == 1 else arrivals.sum(w)
            server["control"] = server["control"] * (1 - len(arrivals) / m) - drift
