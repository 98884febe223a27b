"""FedRAM, first half: task weights and client weights learnt with a small model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from flcore.aggregation import FedRAM as Weights
from flcore.aggregation import differential_loss, excess_loss, task_weights
from flcore.algorithms.base import check_choice, check_number, check_whole
from flcore.algorithms.fedavg import FedAvg
from flcore.algorithms.layout import Vector
from flcore.algorithms.state import (
    Arrivals,
    Client,
    DataView,
    LocalResult,
    LocalWork,
    Payload,
    Server,
)
from flcore.algorithms.step import local_steps
from flcore.algorithms.tools import BatchLoss, Forward, mean_cross_entropy
from flcore.errors import InvalidInputError

__all__ = ["FedRAMProxy", "Reweighting"]


@dataclass(frozen=True, kw_only=True)
class Reweighting(FedAvg):
    """What both phases share: tasks, and the steps of the two weight vectors."""

    tasks: str = "classes"
    eta_task: float = 0.1
    eta_client: float = 0.1
    smoothing: float = 0.01
    scope: str = "client"
    baseline: str = "global"
    reference_epochs: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("tasks", self.tasks, ("classes", "groups"))
        check_choice("scope", self.scope, ("client", "global"))
        check_choice("baseline", self.baseline, ("global", "reference"))
        for option in ("eta_task", "eta_client"):
            check_number(option, getattr(self, option), lambda v: True, "a number")
        check_number("smoothing", self.smoothing, lambda v: 0 <= v <= 1, "a number in [0, 1]")
        check_whole("reference_epochs", self.reference_epochs)

    def count(self, clients: Sequence[Client]) -> np.ndarray:
        """Examples of each client and task, (K, T) float64."""
        tasks = [self.task(client) for client in clients]
        total = 1 + max(int(t.max()) for t in tasks)
        return np.stack([np.bincount(t, minlength=total) for t in tasks]).astype(np.float64)

    def task(self, client: Client) -> np.ndarray:
        """Task of each example of a client."""
        tools: Any = client.tools
        found = tools.y if self.tasks == "classes" else tools.groups
        if found is None:
            raise InvalidInputError('tasks: expected data with groups for tasks="groups"')
        return np.asarray(found)

    def begin(self, server: Server, counts: np.ndarray) -> Weights:
        """Make the weights, and write them into the server's state."""
        # a task that nobody has keeps no place among the weights
        weights = self.restore(counts, None)
        self.keep(server, counts, weights)
        return weights

    def restore(self, counts: np.ndarray, state: dict[str, Any] | None) -> Weights:
        """Make the weights from what the server keeps."""
        weights = Weights(
            counts[:, counts.sum(0) > 0],
            eta_task=self.eta_task,
            eta_client=self.eta_client,
            smoothing=self.smoothing,
            scope=self.scope,
        )
        if state is not None:
            weights.load_state_dict({name: state[name] for name in weights.state_dict()})
        return weights

    def keep(self, server: Server, counts: np.ndarray, weights: Weights) -> None:
        """Write the weights into the server's state."""
        table = np.zeros(counts.shape)
        table[:, counts.sum(0) > 0] = weights.task_weights
        server.state |= weights.state_dict()
        server.state |= {"task_weights": table, "client_weights": weights.client_weights}

    def pull(
        self, alpha: np.ndarray, losses: np.ndarray, reference: np.ndarray, task: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Give the excess of each task, and the factor on the mean gradient of its examples.

        Parameters
        ----------
        alpha : (T,)
        losses, task : (n,)
            Loss of the proxy on each example, and its task.
        reference : (T,)
            Sums of the reference's losses.
        """
        count = np.bincount(task, minlength=len(alpha)).astype(np.float64)
        sums = np.bincount(task, losses, len(alpha))
        excess = excess_loss(sums, reference, count)
        alpha = task_weights(alpha, excess, self.eta_task, self.smoothing, present=count > 0)
        share = np.divide(len(task), count, out=np.zeros(len(alpha)), where=count > 0)
        return excess, alpha * (excess > 0) * share


@dataclass(frozen=True, kw_only=True)
class FedRAMProxy(Reweighting):
    r"""Steps 1 and 2 of FedRAM (Wu, Yan, Liu, Lim, NeurIPS 2025), with the model of the run.

    Before it takes part first, client k trains a reference on its own data; nothing is sent.  Then,
    in every round, from the global proxy :math:`\theta^G`, for each task,

    .. math::
        l_{exc}^\tau &= \max\{ (L(D_k^\tau; \theta^G) - L(D_k^\tau; \theta_{ref}^k)) / |D_k^\tau|,
        0 \} \\
        \alpha &\leftarrow s\,\alpha + (1 - s)\,\alpha^+, \qquad
        \alpha^+_\tau \propto \alpha_\tau \exp(\eta_{task}\, l_{exc}^\tau),

    it descends on :math:`\sum_\tau \alpha_\tau l_{exc}^\tau`, and tells
    :math:`l_{dif} = (L(D_k; \theta^k) - L(D_k; \theta^G)) / |D_k|`.  The server averages the
    proxies by examples and takes :math:`w \leftarrow s w + (1 - s) w^+`,
    :math:`w^+_k \propto w_k \exp(\eta_{client}\, l_{dif}^k)`.

    The weights are in the state of the server, "task_weights" (K, T) and "client_weights" (K,).

    Parameters
    ----------
    tasks : {"classes", "groups"}
        What a task is: a class, or a group of the data.
    eta_task, eta_client : float
        Positive: tasks and clients of larger losses gain.
    smoothing : float
        s, the weight of the **old** value: 1 freezes.
    scope : {"client", "global"}
        Whether alpha is each client's own, or averaged by examples.
    baseline : {"global", "reference"}
        What :math:`l_{dif}` is a difference to: the global proxy (the listing), or the reference (a
        line of a proof).
    reference_epochs : int
        Of the reference, by plain steps.

    Notes
    -----
    The paper takes one step a round on all examples: ``local_epochs=1`` and a large `batch_size`.
    Excesses are measured, and alpha moves, once a round.
    """

    name: ClassVar[str] = "fedram-proxy"

    local_epochs: int = 1

    def one_time_exchange(
        self, server: Server, clients: Sequence[Client]
    ) -> tuple[list[Payload], list[Payload]]:
        """Let the clients tell how many examples of each task they have."""
        server["counts"] = counts = self.count(clients)
        self.begin(server, counts)
        return [{"counts": row} for row in counts], []

    def downlink(self, server: Server, client: int) -> Payload:
        """Send the proxy, and the client's task weights."""
        return super().downlink(server, client) | {"alpha": server["task_weights"][client]}

    def client_begin(self, payload: Payload, client: Client) -> LocalWork:
        """Measure the excess of each task, and weigh the gradients by it."""
        work = super().client_begin(payload, client)
        tools: Any = client.tools
        task, alpha = self.task(client), payload["alpha"]
        if "reference" not in client.state:
            losses = tools.losses(self._reference(client))
            client.state["reference"] = np.bincount(task, losses, len(alpha))
        losses = tools.losses(work.start)
        excess, factor = self.pull(alpha, losses, client.state["reference"], task)
        client.state |= {"excess": excess, "before": float(losses.sum(dtype=np.float64))}
        work.aux["factor"] = factor.astype(np.float32)
        return work

    def data_view(self, client: Client) -> DataView:
        """Give passes over the examples, with the task beside the class in their labels."""
        if self.tasks == "classes":
            return super().data_view(client)
        tools: Any = client.tools
        view = DataView.epochs(
            np.arange(client.examples), self.local_epochs, self.batch_size, client.rng
        )
        y = np.stack([np.asarray(tools.y), self.task(client)], axis=1)
        return DataView(view.order, view.sizes, tools.x, y)

    def batch_loss(self) -> BatchLoss:
        """Give the cross-entropy, each example times the factor of its task."""
        return factor_loss

    def client_end(self, result: LocalResult, client: Client) -> Payload:
        """Send the update, the excesses and the differential loss."""
        tools: Any = client.tools
        before = client.state.pop("before")
        if self.baseline == "reference":
            before = float(client.state["reference"].sum())
        after = tools.losses(result.end).sum(dtype=np.float64)
        difference = float(differential_loss(after, before, client.examples))
        payload = super().client_end(result, client)
        return payload | {"excess": client.state.pop("excess"), "differential": difference}

    def server_step(self, server: Server, mean: Vector, arrivals: Arrivals) -> None:
        """Average the proxies, and move both weight vectors."""
        super().server_step(server, mean, arrivals)
        counts, clients = server["counts"], [arrival.client for arrival in arrivals]
        weights = self.restore(counts, server.state)
        there = counts.sum(0) > 0
        weights.update_tasks(np.stack([a["excess"][there] for a in arrivals]), clients)
        weights.update_clients([a["differential"] for a in arrivals], clients)
        self.keep(server, counts, weights)

    def _reference(self, client: Client) -> Vector:
        tools: Any = client.tools
        x, y, rng = tools.x, tools.y, client.rng.spawn(1)[0]
        view = DataView.epochs(
            np.arange(client.examples), self.reference_epochs, self.batch_size, rng
        )
        batches = np.split(view.order, np.cumsum(view.sizes)[:-1])
        model = client.initial[None].copy()
        local_steps(
            model,
            lambda rows, k: tools.gradient(rows[0], x[batches[k]], y[batches[k]])[None],
            [self.spec(0)],
            [len(batches)],
        )
        return model[0]


def factor_loss(forward: Forward, x: Any, y: Any, weight: Any, aux: dict[str, Any]) -> Any:
    """Cross-entropy with the factor of each example's task, ``aux["factor"]`` (T,)."""
    classes, task = (y[:, 0], y[:, 1]) if y.ndim == 2 else (y, y)
    return mean_cross_entropy(forward(x), classes, weight * aux["factor"][task])
