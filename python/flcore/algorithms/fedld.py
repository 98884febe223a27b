"""FedLD: a margin-control loss at the clients, principal directions at the server."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np

from flcore.aggregation import PrincipalGradient
from flcore.algorithms.base import check_choice, check_number
from flcore.algorithms.fedavg import FedAvg
from flcore.algorithms.layout import Vector, named_views
from flcore.algorithms.state import Arrivals, Server
from flcore.algorithms.tools import BatchLoss, Forward
from flcore.errors import InvalidInputError

__all__ = ["FedLD", "margin_loss"]


@dataclass(frozen=True, kw_only=True)
class FedLD(FedAvg):
    r"""Loss decomposition (Zeng et al., MICCAI 2024, arXiv 2408.12300).

    Clients minimise, with scores Z of a batch, :math:`P = \mathrm{softmax}(Z)`,

    .. math:: L = CE(Z, y) + \lambda \log(1 + \|P\|_F^2) .

    The server works on each tensor by itself.  With G the m x d matrix of the clients' changes
    :math:`g_i` of it and :math:`G G^T / m = E \,\mathrm{diag}(s)\, E^T`, it keeps the directions
    :math:`v_j = G^T e_j`, :math:`j \le k = \lfloor m \kappa \rfloor`, and takes

    .. math::
        u = \frac{1}{m} \sum_i \sum_{j \le k} \frac{s_j}{\sum_{l \le m} s_l}\,
        \|g_i\|\, \mathrm{sign}\langle g_i, v_j \rangle \frac{v_j}{\|v_j\|}, \qquad
        w \leftarrow w + \eta_g u .

    It is ``sum_i alpha_i g_i`` with alpha from the m x m products
    (`flcore.aggregation.PrincipalGradient`).  In the first round, for tensors of one element, for
    those in `exclude` and where k is 0 it is the plain mean.  Numbers of examples have no effect.

    Parameters
    ----------
    margin : float
        lambda; 0: cross-entropy alone.
    reduction : {"batch", "sample"}
        Whether the norm is over the whole batch, as in the authors' code, which makes the term
        depend on the size of the batch, or the term is a mean over the examples.
    keep : float or None
        kappa, above 0 up to 1; None: the mean in every round.
    exclude : tuple of str or None
        Tensors that get the mean; None: the model's statistics (running mean and variance of
        BatchNorm).  The authors' code projects all: ``exclude=()``.
    """

    name: ClassVar[str] = "fedld"
    statistics: ClassVar[bool] = True

    weighting: str = "uniform"
    margin: float = 0.03
    reduction: str = "batch"
    keep: float | None = 0.8
    exclude: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("margin", self.margin, lambda v: v >= 0, "a number from 0")
        check_choice("reduction", self.reduction, ("batch", "sample"))
        if self.keep is not None:
            check_number("keep", self.keep, lambda v: 0 < v <= 1, "a number above 0 up to 1")
        if self.exclude is not None:
            object.__setattr__(self, "exclude", tuple(self.exclude))

    def batch_loss(self) -> BatchLoss | None:
        """Give the loss with its margin term; the run's own where there is none."""
        if not self.margin:
            return None
        return partial(margin_loss, margin=self.margin, reduction=self.reduction)

    def server_step(self, server: Server, mean: Vector, arrivals: Arrivals) -> None:
        """Move w along the principal directions of each tensor."""
        if self.keep is None:
            super().server_step(server, mean, arrivals)
            return
        updates = arrivals.updates()
        if server.round == 0:
            super().server_step(server, mean, arrivals)
            return
        layout = server.layout
        shapes = {name: layout.shapes[name] for name in layout.names()}
        means = [n for n in shapes if layout.slices[n].start >= layout.trained]
        if self.exclude is not None:
            means = [n for n in self.exclude if n in shapes]
            if unknown := set(self.exclude) - set(layout.shapes):
                raise InvalidInputError(f"exclude: the model has no tensors {sorted(unknown)}")
        rule = PrincipalGradient(keep=self.keep, plain=means, nonfinite="raise")  # type: ignore[arg-type]
        update = rule([named_views(u, shapes) for u in updates])
        self.move(server, np.concatenate([u.ravel() for u in update.values()]), self.server_lr)


def margin_loss(
    forward: Forward,
    x: Any,
    y: Any,
    weight: Any,
    aux: dict[str, Any],
    *,
    margin: float,
    reduction: str = "batch",
) -> Any:
    """Cross-entropy and ``margin * log(1 + ||P||^2)``, P the probabilities.

    Parameters
    ----------
    forward, x, y, weight, aux
        See `flcore.algorithms.tools.BatchLoss`; examples of weight 0 do not count in the norm.
    margin : float
    reduction : {"batch", "sample"}
        See `FedLD`.
    """
    logs = forward(x).log_softmax(1)
    entropy = -(weight * logs.gather(1, y[:, None])[:, 0]).sum()
    squares = (2 * logs).exp().sum(1)
    if reduction == "sample":
        return entropy + margin * (weight * squares.log1p()).sum()
    return entropy + margin * (squares * (weight > 0)).sum().log1p()
