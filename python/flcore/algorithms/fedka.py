"""FedKA: features that serve a domain without labels, and labels that the clients vote for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from flcore.algorithms._votes import fine_tune, majority, named_classes
from flcore.algorithms.base import check_choice, check_whole
from flcore.algorithms.fedavg import FedAvg
from flcore.algorithms.layout import Vector
from flcore.algorithms.state import Arrivals, Client, DataView, LocalWork, Payload, Server
from flcore.algorithms.tools import BatchLoss, Forward, mean_cross_entropy
from flcore.errors import InvalidInputError

__all__ = ["FedKA", "strength"]

ADAM = (0.9, 0.999, 1e-8)


@dataclass(frozen=True, kw_only=True)
class FedKA(FedAvg):
    r"""Federated knowledge alignment (Sun et al., ACML 2022, arXiv 2203.11635).

    Clients have labelled examples :math:`x_s` of their domains, the server unlabelled examples
    :math:`x_t` of the target domain.  The model is features F, classes C and domains D behind
    :math:`R_a`, which reverses gradients and multiplies them by a.  Batch i of L in round t of T
    has

    .. math::
        p = (i + tL) / (TL), \qquad a = 2 / (1 + e^{-5p}) - 1 .

    A client takes L steps of Adam against domains, then steps that match its features with those
    of the global model :math:`F_g`, each over several batches:

    .. math::
        \ell_1 &= \mathrm{NLL}(C(F(x_s)), y_s) + \mathrm{NLL}(D(R_a(F(x_s))), 0)
            + \mathrm{NLL}(D(R_a(F(x_t))), 1) \\
        \ell_2 &= a \, \mathrm{MMD}(F(x_s), F_g(x_t))

    The server takes the mean of the models.  Then each client's model names a class for each
    target example, the majority of them becomes its label :math:`\hat y`, and Adam, whose moments
    last, takes one step on :math:`a' \mathrm{NLL}(C(F_g(x_t)), \hat y)` a batch, a' rising in the
    same way over the batches.

    Parameters
    ----------
    rounds : int
        T, of the schedule.
    batches, vote_batches : int
        L, and batches of the fine-tuning in a round.
    accumulate : int
        Batches of a matching step; divides `batches`.
    matching : {"mean", "last"}
        A matching step's loss: the mean over its batches, or the last batch's alone divided by
        `accumulate`, as the released code has it by what looks like a slip.
    adversarial, align, voting : bool
        Leave out the domain terms, the matching, the fine-tuning.  Without all three this is
        FedAvg on the sources; with `adversarial` alone, f-DANN.
    broadcast_finetuned : bool
        Whether clients get the fine-tuned model, or, as in the released code, the mean: the
        fine-tuned model is then only tested.  Steps of Adam are no smaller when a' is, so that
        early votes, mostly wrong, can make a model that is broadcast collapse onto few classes.
    hidden : int
        Hidden units of D.

    Notes
    -----
    The server's examples (`Server.tools`) are the target domain; clients get them once, before the
    first round.  The server names the classes itself with the models it is sent, so that votes cost
    no messages; ties go to the lowest class.
    """

    name: ClassVar[str] = "fedka"
    statistics: ClassVar[bool] = True

    local_lr: float = 3e-4
    lr_decay: float = 1.0
    batch_size: int = 16
    weight_decay: float = 0.0
    clip: float | None = None
    weighting: str = "uniform"
    rounds: int = 200
    batches: int = 32
    vote_batches: int = 128
    accumulate: int = 8
    matching: str = "mean"
    adversarial: bool = True
    align: bool = True
    voting: bool = True
    broadcast_finetuned: bool = False
    hidden: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("rounds", "batches", "vote_batches", "accumulate", "hidden"):
            check_whole(option, getattr(self, option))
        check_choice("matching", self.matching, ("mean", "last"))
        if self.batches % self.accumulate:
            raise InvalidInputError(
                f"accumulate: expected a divisor of batches={self.batches}, got {self.accumulate}"
            )

    def prepare_model(self, model: Any) -> Any:
        """Add D."""
        from flcore.nn import DomainAdversarial
        from flcore.simulation.models import split_features

        features, head = split_features(model)
        width: Any = head.in_features
        return DomainAdversarial(features, head, width, hidden=self.hidden)

    def one_time_exchange(
        self, server: Server, clients: Sequence[Client]
    ) -> tuple[Sequence[Payload], Sequence[Payload]]:
        """Give the target examples to all clients."""
        target = None if server.tools is None else server.tools.x
        if target is None or not len(target):
            raise InvalidInputError(
                "server_examples: fedka needs the examples of the target domain at the server, "
                "as flcore.simulation.run(..., server_examples=) gives them; got none"
            )
        target = np.asarray(target, np.float32)
        for client in clients:
            client.state["target"] = target
        return [], [{"target": target}] * len(clients)

    def downlink(self, server: Server, client: int) -> Payload:
        """Send the fine-tuned model, or the mean."""
        return {"model": server.layout.take(self._base(server))}

    def client_begin(self, payload: Payload, client: Client) -> LocalWork:
        """Take steps of Adam, beside the global model and batches of the target domain."""
        work = super().client_begin(payload, client)
        target = client.state["target"]
        aux = {
            "global": client.layout.put(work.start, payload["model"]),
            "target": target,
            "drawn": client.rng.integers(len(target), size=(2 * self.batches, self.batch_size)),
            "strength": np.float32(strength(client.round, self.rounds, self.batches)),
        }
        spec = replace(work.spec, adam=ADAM)
        return replace(work, spec=spec, aux=aux if self.adversarial or self.align else {})

    def data_view(self, client: Client) -> DataView:
        """Draw full batches, passing over the examples again and again."""
        sizes = [self.batch_size] * self.batches
        if self.align:
            sizes += [self.batch_size * self.accumulate] * (self.batches // self.accumulate)
        passes = -(-sum(sizes) // len(client.indices))
        endless = DataView.epochs(client.indices, passes, self.batch_size, client.rng)
        return DataView(endless.order[: sum(sizes)], sizes)

    def batch_loss(self) -> BatchLoss | None:
        """Give the losses of both phases."""
        return Alignment(self) if self.adversarial or self.align else None

    def server_step(self, server: Server, mean: Vector, arrivals: Arrivals) -> None:
        """Take the mean of the models, and fine-tune it on the votes."""
        before = server.model = self._base(server)
        self.move(server, mean, self.server_lr)
        if not self.broadcast_finetuned:
            server["mean"] = server.model
        if self.voting:
            rising = strength(server.round, self.rounds, self.vote_batches)
            labels = majority(named_classes(server, before, arrivals))
            fine_tune(server, labels, rising, ADAM, lr=self.local_lr, batch_size=self.batch_size)

    def _base(self, server: Server) -> Vector:
        """Give what the clients of a round start from."""
        return server.state.get("mean", server.model)


def strength(round: int, rounds: int, batches: int) -> np.ndarray:
    """Give a for all batches of a round, (batches,): from 0 in the first to almost 1."""
    p = (np.arange(batches) + round * batches) / (rounds * batches)
    return 2 / (1 + np.exp(-5 * p)) - 1


@dataclass(frozen=True)
class Alignment:
    """The losses of both phases; a `BatchLoss`."""

    options: FedKA

    def __call__(self, forward: Forward, x: Any, y: Any, weight: Any, aux: dict[str, Any]) -> Any:
        """Tell by the number of the step which one it is."""
        o, step = self.options, aux["step"]
        if step >= o.batches:
            return self._match(forward, x, aux, (step - o.batches) * o.accumulate)
        if not o.adversarial:
            return mean_cross_entropy(forward(x), y, weight)
        a, target = aux["strength"][step], aux["target"][aux["drawn"][step]]
        scores, source = forward(x, reversal=a)
        _, other = forward(target, reversal=a)
        domains = source.log_softmax(1)[:, 0].mean() + other.log_softmax(1)[:, 1].mean()
        return mean_cross_entropy(scores, y, weight) - domains

    def _match(self, forward: Forward, x: Any, aux: dict[str, Any], first: int) -> Any:
        """Give the mean of a MMD over the batches of this step, which start with number `first`."""
        from flcore.losses import multi_kernel_mmd

        o = self.options
        drawn = aux["drawn"][o.batches + first : o.batches + first + o.accumulate].flatten()
        z = forward(x, features=True)[0].flatten(1).split(o.batch_size)
        t = forward(aux["target"][drawn], aux["global"], features=True)[0].flatten(1)
        a = aux["strength"][first : first + o.accumulate]
        each = zip(a, z, t.split(o.batch_size), strict=True)
        terms = [weight * multi_kernel_mmd(own, other) for weight, own, other in each]
        return (sum(terms) if o.matching == "mean" else terms[-1]) / o.accumulate
