"""MOON: keep local features near those of the global model, away from those of the last round."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from flcore._extras import require
from flcore.algorithms.base import check_number, check_whole
from flcore.algorithms.fedavg import FedAvg
from flcore.algorithms.layout import Vector
from flcore.algorithms.state import Arrivals, Client, LocalResult, LocalWork, Payload, Server
from flcore.algorithms.tools import BatchLoss, Forward, mean_cross_entropy

__all__ = ["Moon"]


@dataclass(frozen=True, kw_only=True)
class Moon(FedAvg):
    r"""Model-contrastive federated learning (Li et al., CVPR 2021, arXiv 2103.16257).

    With z the features of an example under the local model, :math:`z_g` under the global model
    that it started from, :math:`z_j` under the client's last local models, a batch has the loss

    .. math::
        \mathrm{CE} + \mu \operatorname{mean} \left( -\log
        \frac{e^{\cos(z, z_g) / T}}{e^{\cos(z, z_g) / T} + \sum_j e^{\cos(z, z_j) / T}} \right)

    Global and last models are frozen and in evaluation mode.  In its first round a client has no
    last model, and the second term is 0.  The server takes FedAvg's step, or with a damped momentum

    .. math:: v \leftarrow \beta v + (1 - \beta) \sum_i p_i u_i, \qquad w \leftarrow w + \eta_g v .

    Parameters
    ----------
    mu : float
        5 on CIFAR-10 and 1 elsewhere in the paper; 0 is FedAvg.
    temperature : float
        T.
    buffer : int
        Last local models that a client keeps, the newest first.
    server_momentum : float
        beta.

    Notes
    -----
    Features are what the last layer gets.  The paper puts a projection head before it (model
    "mlp-projection"), for the methods it compares with, too.  A step runs 2 + `buffer` forward
    passes, one of them with a backward pass; messages are FedAvg's.
    """

    name: ClassVar[str] = "moon"
    statistics: ClassVar[bool] = True

    local_lr: float = 0.01
    lr_decay: float = 1.0
    batch_size: int = 64
    weight_decay: float = 1e-5
    clip: float | None = None
    local_momentum: float = 0.9
    mu: float = 1.0
    temperature: float = 0.5
    buffer: int = 1
    server_momentum: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("mu", self.mu, lambda v: v >= 0, "a number from 0")
        check_number("temperature", self.temperature, lambda v: v > 0, "a number above 0")
        check_whole("buffer", self.buffer)
        check_number(
            "server_momentum", self.server_momentum, lambda v: 0 <= v < 1, "a number from 0 below 1"
        )

    def client_begin(self, payload: Payload, client: Client) -> LocalWork:
        """Take FedAvg's steps, beside the global model and the last local ones."""
        work = super().client_begin(payload, client)
        if not self.mu:
            return work
        w = client.layout.put(work.start, payload["model"])
        previous = client.state.get("previous", w[None][:0])
        known = np.arange(self.buffer) < len(previous)
        filled = np.concatenate([previous, np.tile(w, (self.buffer - len(previous), 1))])
        aux = {"global": w, "previous": filled, "known": known.astype(np.float32)}
        return replace(work, aux=aux)

    def batch_loss(self) -> BatchLoss | None:
        """Add the contrastive term."""
        return Contrast(self.mu, self.temperature) if self.mu else None

    def client_end(self, result: LocalResult, client: Client) -> Payload:
        """Send u_i, and keep the local model."""
        if self.mu:
            previous = client.state.get("previous", result.end[None][:0])
            newest = np.concatenate([result.end[None], previous])
            client.state["previous"] = newest[: self.buffer]
        return super().client_end(result, client)

    def server_step(self, server: Server, mean: Vector, arrivals: Arrivals) -> None:
        """Move w along the mean, or along its moving average."""
        if self.server_momentum:
            beta = self.server_momentum
            mean = beta * server.state.get("velocity", np.zeros_like(mean)) + (1 - beta) * mean
            server["velocity"] = mean
        super().server_step(server, mean, arrivals)


@dataclass(frozen=True)
class Contrast:
    """Cross-entropy plus `mu` times the model-contrastive loss; a `BatchLoss`."""

    mu: float
    temperature: float

    def __call__(self, forward: Forward, x: Any, y: Any, weight: Any, aux: dict[str, Any]) -> Any:
        """Run the batch through all models."""
        from flcore.losses import model_contrastive_loss

        torch = require("torch", extra="train")
        z, scores = forward(x, features=True)
        towards, _ = forward(x, aux["global"], features=True)
        away = [forward(x, last, features=True)[0] for last in aux["previous"]]
        contrast = model_contrastive_loss(
            z.flatten(1),
            towards.flatten(1),
            torch.stack(away).flatten(2),
            temperature=self.temperature,
            known=aux["known"],
            weight=weight,
        )
        return mean_cross_entropy(scores, y, weight) + self.mu * contrast
