"""FedGPS, goal and path: clients share a made-up distribution that ties their features together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from flcore._extras import require
from flcore.algorithms.base import check_number, check_whole
from flcore.algorithms.fedgps import FedGPS
from flcore.algorithms.layout import Vector
from flcore.algorithms.state import Arrivals, Client, LocalResult, LocalWork, Payload, Server
from flcore.algorithms.tools import BatchLoss, Forward, mean_cross_entropy
from flcore.errors import InvalidInputError

__all__ = ["FedGPSGoal", "surrogates"]


@dataclass(frozen=True, kw_only=True)
class FedGPSGoal(FedGPS):
    r"""Goal-path synergy (NeurIPS 2025, arXiv 2510.20250): the path of `FedGPS`, and the goal.

    All clients make the same surrogate examples :math:`x_s` from a seed, class c from a Gaussian of
    its own.  The last layer has 2C outputs, C for the real classes, C for the surrogates'.  A batch
    with features z, and :math:`z_s` of a surrogate batch, has the loss

    .. math::
        \mathrm{CE}(x, y) &+ a_s \mathrm{CE}(x_s, y_s + C)
            + b \operatorname{mean} (z_s - E_{y_s})^2 \\
        &+ \lambda_1 \operatorname{SupCon}([z, \bar z_s], [y, y_s + C])
            + \lambda_2 \operatorname{SupCon}(z_s, y_s)

    with :math:`\bar z_s` constant in the gradient and SupCon the supervised contrastive loss of
    normalised features at temperature T.  Clients send :math:`u_k`, and mean :math:`E_c^k` and
    count :math:`n_c^k` of the surrogate features of each class; from the second round on they get

    .. math:: E_c = \sum_k n_c^k E_c^k / \sum_k n_c^k .

    Parameters
    ----------
    surrogate_weight, prototype_weight : float
        :math:`a_s` and b.
    joint_weight, surrogate_contrast : float
        :math:`\lambda_1` and :math:`\lambda_2`.  With these four at 0 this is `FedGPS`, and with
        rho = 0 besides FedAvg.
    matched : bool
        Give real and surrogate examples of one class one label in the joint contrast, as in the
        method it is derived from (VHL).  The released code keeps them apart.
    temperature : float
        T.
    surrogate_batch, surrogate_examples : int
        Surrogate examples in a step, and of each class.
    surrogate_deviation : float
        Of a surrogate class around its mean, a draw from N(0, 1) for each input.
    surrogate_seed : int

    Notes
    -----
    Class means are taken over all surrogate examples under the local model as it is sent, in the
    place of what the steps of the last epoch happened to see.
    """

    name: ClassVar[str] = "fedgps-goal"
    statistics: ClassVar[bool] = True

    surrogate_weight: float = 1.0
    prototype_weight: float = 0.1
    joint_weight: float = 1.0
    surrogate_contrast: float = 0.1
    matched: bool = False
    temperature: float = 0.07
    surrogate_batch: int = 128
    surrogate_examples: int = 50
    surrogate_deviation: float = 0.1
    surrogate_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in (*WEIGHTS, "surrogate_deviation"):
            check_number(option, getattr(self, option), lambda v: v >= 0, "a number from 0")
        check_number("temperature", self.temperature, lambda v: v > 0, "a number above 0")
        for option in ("surrogate_batch", "surrogate_examples"):
            check_whole(option, getattr(self, option))
        check_whole("surrogate_seed", self.surrogate_seed, least=0)

    @property
    def goal(self) -> bool:
        """Whether the surrogates play any part."""
        return any(getattr(self, option) for option in WEIGHTS)

    def prepare_model(self, model: Any) -> Any:
        """Double the outputs."""
        from flcore.simulation.heads import widen_head
        from flcore.simulation.models import split_features

        outputs: Any = split_features(model)[1].out_features
        return widen_head(model, 2 * outputs) if self.goal else model

    def downlink(self, server: Server, client: int) -> Payload:
        """Send what the path needs, and E."""
        goal = {name: server[name] for name in ("prototypes",) if name in server.state}
        return super().downlink(server, client) | goal

    def client_begin(self, payload: Payload, client: Client) -> LocalWork:
        """Take the path's steps, beside batches of surrogates."""
        work = super().client_begin(payload, client)
        if not self.goal:
            return work
        x, y = self._surrogates(client)
        batches = -(-len(y) // self.surrogate_batch)
        order = np.resize(client.rng.permutation(len(y)), (batches, self.surrogate_batch))
        aux = {"surrogates": x, "classes": y, "drawn": order}
        goal = {name: payload[name] for name in ("prototypes",) if name in payload}
        return replace(work, aux=aux | goal)

    def batch_loss(self) -> BatchLoss | None:
        """Add what ties the features to the surrogates."""
        return Goal(self) if self.goal else None

    def client_end(self, result: LocalResult, client: Client) -> Payload:
        """Send u_k, the class means and their counts."""
        message = super().client_end(result, client)
        if not self.goal:
            return message
        assert client.tools is not None
        x, y = self._surrogates(client)
        features = client.tools.features(result.end, x).reshape(len(y), -1)
        means = [features[y == c].mean(0) for c in range(y.max() + 1)]
        counts = np.bincount(y).astype(np.float32)
        return message | {"means": np.stack(means), "counts": counts}

    def server_step(self, server: Server, mean: Vector, arrivals: Arrivals) -> None:
        """Take the path's step, and the mean of the class means."""
        super().server_step(server, mean, arrivals)
        if self.goal:
            counts = np.stack([a["counts"] for a in arrivals])[:, :, None]
            sums = (counts * np.stack([a["means"] for a in arrivals])).sum(0)
            server["prototypes"] = sums / counts.sum(0)

    def _surrogates(self, client: Client) -> tuple[np.ndarray, np.ndarray]:
        if client.tools is None:
            raise InvalidInputError("fedgps-goal: surrogates need a model and data, got none")
        return surrogates(
            client.tools.example_shape,
            client.tools.classes,
            self.surrogate_examples,
            self.surrogate_deviation,
            self.surrogate_seed,
        )


WEIGHTS = ("surrogate_weight", "prototype_weight", "joint_weight", "surrogate_contrast")


@lru_cache(maxsize=4)
def surrogates(
    shape: tuple[int, ...], classes: int, each: int, deviation: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw `each` examples of every class, (classes * each, *shape) float32, and their labels."""
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(classes), each)
    x = rng.standard_normal((classes, *shape))[y]
    x = x + deviation * rng.standard_normal(x.shape)
    return x.astype(np.float32), y


@dataclass(frozen=True)
class Goal:
    """The loss of a batch and a batch of surrogates; a `BatchLoss`."""

    options: FedGPSGoal

    def __call__(self, forward: Forward, x: Any, y: Any, weight: Any, aux: dict[str, Any]) -> Any:
        """Run both through the model together."""
        from flcore.losses import supervised_contrastive_loss

        o, torch = self.options, require("torch", extra="train")
        drawn = aux["drawn"][aux["step"] % len(aux["drawn"])]
        classes = aux["classes"][drawn]
        z, scores = forward(torch.cat([x, aux["surrogates"][drawn]]), features=True)
        n, z, apart = len(y), z.flatten(1), scores.shape[1] // 2
        own, z_s = z[:n], z[n:]
        alike = torch.full_like(classes, 1.0 / len(classes), dtype=x.dtype)
        loss = mean_cross_entropy(scores[:n], y, weight)
        loss = loss + o.surrogate_weight * mean_cross_entropy(scores[n:], classes + apart, alike)
        if "prototypes" in aux:
            distance = (z_s - aux["prototypes"][classes]).square().mean()
            loss = loss + o.prototype_weight * distance
        if o.joint_weight:
            both = torch.cat([own, z_s.detach()])
            labels = torch.cat([y, classes if o.matched else classes + apart])
            there = torch.cat([weight, alike])
            joint = supervised_contrastive_loss(
                both, labels, temperature=o.temperature, weight=there
            )
            loss = loss + o.joint_weight * joint
        if o.surrogate_contrast:
            alone = supervised_contrastive_loss(z_s, classes, temperature=o.temperature)
            loss = loss + o.surrogate_contrast * alone
        return loss
