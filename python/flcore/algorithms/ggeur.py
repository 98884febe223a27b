"""GGEUR: clients fill up their classes along the principal directions of all clients' data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from flcore.algorithms.base import check_choice, check_number, check_whole
from flcore.algorithms.fedavg import FedAvg
from flcore.algorithms.state import Client, DataView, Payload, Server
from flcore.errors import InvalidInputError

__all__ = ["GGEUR", "augment", "class_moments", "directions", "pool_moments"]

Moments = dict[int, tuple[int, np.ndarray, np.ndarray]]
"""Class -> examples n, mean (p,) and covariance (p, p), divided by n."""


@dataclass(frozen=True, kw_only=True)
class GGEUR(FedAvg):
    r"""Global geometry for local augmentation (CVPR 2025, arXiv 2503.06457), then FedAvg.

    Before the first round client k tells, for each of its classes, the number, mean and covariance
    of its embeddings, :math:`(n_k, \mu_k, \Sigma_k)`.  The server pools them exactly,

    .. math::
        N = \sum_k n_k, \quad \mu = \sum_k n_k \mu_k / N, \quad
        \Sigma = \frac{1}{N} \sum_k n_k
        \left( \Sigma_k + (\mu_k - \mu)(\mu_k - \mu)^T \right),

    decomposes :math:`\Sigma = \sum_m \lambda_m \xi_m \xi_m^T` and sends :math:`(\lambda, \xi)`.
    Clients fill up each class they have to `target` examples, from embeddings X of their own,

    .. math:: X' = X + \sum_m \epsilon_m s_m \xi_m, \qquad \epsilon_m \sim N(0, 1),

    :math:`s_m = \sqrt{\lambda_m}` in the authors' code, :math:`\lambda_m` in the paper's formula.
    What they have stays in, classes they lack stay absent.

    Parameters
    ----------
    target : int
        Examples of each class after it; a class with more keeps all.
    noise : {"sqrt", "lambda", "none"}
        :math:`s_m`; "none" duplicates examples, which is what to compare with.
    guide : float
        Only the clients with most examples of a class tell about it, as many as have this part of
        them together (the authors: 0.8); 1: all.
    per_example : int
        Embeddings made from one, ten times as many where a client has fewer than ten, of which
        those that are missing are drawn.  More where that would not do; one each of different ones
        where there are enough.
    prototypes : bool
        For clients of different domains: new embeddings are drawn from `own` around the client's
        own, 12 of each at most, and `per_prototype` around every other client's mean of the class,
        which the server passes on.  A class that a client lacks is made of the latter alone.
    own, per_prototype : int
    space : {"inputs", "features"}
        Embeddings are the examples themselves; or what the last layer of the model gets, of which
        then only the last layer is trained.  Examples in the shape of features are taken as such.

    Notes
    -----
    Compare at equal numbers of local steps.  A covariance of one or two examples reveals them.
    In the authors' training loop clients never take over the averaged model; here they do.
    """

    name: ClassVar[str] = "ggeur"

    target: int = 2000
    noise: str = "sqrt"
    guide: float = 1.0
    per_example: int = 50
    prototypes: bool = False
    own: int = 500
    per_prototype: int = 500
    space: str = "inputs"

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("target", "per_example", "own", "per_prototype"):
            check_whole(option, getattr(self, option))
        check_choice("noise", self.noise, ("sqrt", "lambda", "none"))
        check_choice("space", self.space, ("inputs", "features"))
        check_number("guide", self.guide, lambda v: 0 < v <= 1, "a number above 0 up to 1")

    def prepare_model(self, model: Any) -> Any:
        """Freeze all but the last layer, where the space is that of the features."""
        if self.space == "inputs":
            return model
        from flcore.simulation.layers import FrozenFeatures

        return FrozenFeatures(model)

    def one_time_exchange(
        self, server: Server, clients: Sequence[Client]
    ) -> tuple[list[Payload], list[Payload]]:
        """Pool means and covariances, and let the clients fill up their classes."""
        data = [self._embeddings(client, server) for client in clients]
        up = [to_payload(class_moments(z, y)) for z, y in data]
        told = self._guides([from_payload(payload) for payload in up])
        up = [to_payload(moments) for moments in told]  # the others do not send theirs
        known = [from_payload(payload) for payload in up]
        geometry = {
            c: directions(pool_moments([m[c] for m in known if c in m])[2])
            for c in sorted({c for m in known for c in m})
        }
        down: list[Payload] = []
        for client, (z, y) in zip(clients, data, strict=True):
            others = {
                c: [m[c][1] for k, m in enumerate(known) if c in m and k != client.id]
                for c in geometry
                if self.prototypes
            }
            classes = [c for c in geometry if (y == c).any() or others.get(c)]
            sent: Payload = {f"values.{c}": geometry[c][0] for c in classes}
            sent |= {f"directions.{c}": geometry[c][1] for c in classes}
            sent |= {
                f"means.{c}": np.array(others[c], np.float32) for c in classes if others.get(c)
            }
            down.append(sent)
            parts = [(z, y)]
            for c in classes:
                new = self._new(z[y == c], others.get(c, []), *geometry[c], client.rng)
                parts.append((new, np.full(len(new), c)))
            shape = z.shape[1:] if self.space == "features" else np.shape(tools_of(client).x)[1:]
            x = np.concatenate([part[0] for part in parts])
            client.state["x"] = x.reshape(-1, *shape).astype(np.float32)
            client.state["y"] = np.concatenate([part[1] for part in parts]).astype(np.int64)
        return up, down

    def data_view(self, client: Client) -> DataView:
        """Give mini-batches of what the client has and what it made."""
        x, y = client.state["x"], client.state["y"]
        view = DataView.epochs(np.arange(len(y)), self.local_epochs, self.batch_size, client.rng)
        return DataView(view.order, view.sizes, x, y)

    def _embeddings(self, client: Client, server: Server) -> tuple[np.ndarray, np.ndarray]:
        tools = tools_of(client)
        z = tools.features(server.model) if self.space == "features" else np.asarray(tools.x)
        return z.reshape(len(z), -1).astype(np.float64), np.asarray(tools.y)

    def _guides(self, moments: list[Moments]) -> list[Moments]:
        """Leave, of each class, the clients with most examples."""
        told: list[Moments] = [{} for _ in moments]
        for c in {c for m in moments for c in m}:
            having = sorted(
                (k for k, m in enumerate(moments) if c in m), key=lambda k: moments[k][c][0]
            )
            missing = self.guide * sum(moments[k][c][0] for k in having)
            while missing > 0 and having:
                told[having[-1]][c] = moments[having[-1]][c]
                missing -= moments[having.pop()][c][0]
        return told

    def _new(
        self,
        z: np.ndarray,
        means: list[np.ndarray],
        values: np.ndarray,
        vectors: np.ndarray,
        rng: np.random.Generator,
    ) -> np.ndarray:
        """Give what is missing of one class."""
        n, missing = len(z), max(0, self.target - len(z))
        if self.prototypes:
            base = np.repeat(z, 12, axis=0)
            base = base[rng.permutation(len(base))[: self.own]]
            base = np.concatenate([base, *(np.tile(m, (self.per_prototype, 1)) for m in means)])
        elif missing <= n:
            base = z
        else:
            each = self.per_example * (10 if n < 10 else 1)
            base = np.repeat(z, max(each, -(-missing // n)), axis=0)
        base = base[rng.permutation(len(base))[:missing]]
        scale = {"sqrt": np.sqrt(values), "lambda": values, "none": 0 * values}[self.noise]
        return augment(base, scale, vectors, rng)


def class_moments(z: np.ndarray, y: np.ndarray) -> Moments:
    """Number, mean and covariance (divided by the number) of each class of the rows of `z`."""
    rows = {int(c): z[y == c] for c in np.unique(y)}
    return {
        c: (len(x), x.mean(0), np.cov(x, rowvar=False, bias=True).reshape(z.shape[1], -1))
        for c, x in rows.items()
    }


def pool_moments(
    parts: Sequence[tuple[int, np.ndarray, np.ndarray]],
) -> tuple[int, np.ndarray, np.ndarray]:
    """Number, mean and covariance of all rows together, from those of the parts.

    Examples
    --------
    >>> a, b = np.array([[0, 0], [2, 0.0]]), np.array([[0, 3], [0, 5], [3, 4.0]])
    >>> zeros = (np.zeros(2, int), np.zeros(3, int))
    >>> n, mean, covariance = pool_moments([class_moments(x, y)[0] for x, y in zip((a, b), zeros)])
    >>> n, mean.tolist(), covariance.round(6).tolist()
    (5, [1.0, 2.4], [[1.6, 0.0], [0.0, 4.24]])
    """
    total = sum(n for n, _, _ in parts)
    mean = sum(n * mu for n, mu, _ in parts) / total
    covariance = sum(n * (s + np.outer(mu - mean, mu - mean)) for n, mu, s in parts) / total
    return total, np.asarray(mean), np.asarray(covariance)


def directions(covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues (p,), none below 0, and eigenvectors in the columns (p, p), in float32."""
    values, vectors = np.linalg.eigh(covariance)
    return np.maximum(values, 0.0).astype(np.float32), vectors.astype(np.float32)


def augment(
    x: np.ndarray, scale: np.ndarray, vectors: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Add normal noise along `vectors` (p, r), of deviation `scale` (r,), to the rows of `x`."""
    used = scale > 0  # the rank is low where there are few examples
    noise = rng.standard_normal((len(x), int(used.sum())))
    return x + (noise * scale[used]) @ vectors[:, used].T


def to_payload(moments: Moments) -> Payload:
    """Give a message with half of each covariance, in float32."""
    payload: Payload = {}
    for c, (n, mean, covariance) in moments.items():
        half = covariance[np.triu_indices(len(mean))]
        payload |= {
            f"n.{c}": n,
            f"mean.{c}": mean.astype(np.float32),
            f"half.{c}": half.astype(np.float32),
        }
    return payload


def from_payload(payload: Payload) -> Moments:
    """Read `to_payload`."""
    moments: Moments = {}
    for name, n in payload.items():
        if name.startswith("n."):
            c = name[2:]
            mean = payload[f"mean.{c}"].astype(np.float64)
            covariance = np.zeros((len(mean), len(mean)))
            covariance[np.triu_indices(len(mean))] = payload[f"half.{c}"]
            covariance += np.triu(covariance, 1).T
            moments[int(c)] = (n, mean, covariance)
    return moments


def tools_of(client: Client) -> Any:
    """Give the client's tools, of which this needs the data."""
    if client.tools is None:
        raise InvalidInputError("tools: augmentation needs the examples of the clients")
    return client.tools
