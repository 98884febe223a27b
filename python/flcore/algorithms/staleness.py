"""Late updates brought up to date by gradient inversion, and what that competes with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from flcore.algorithms._inversion import TARGETS, LocalTraining, Recovered, invert
from flcore.algorithms.base import check_choice, check_number, check_whole
from flcore.algorithms.fedavg import FedAvg
from flcore.algorithms.layout import Vector
from flcore.algorithms.state import Arrival, Arrivals, Client, LocalResult, Payload, Server
from flcore.errors import InvalidInputError
from flcore.ops import combine, gram

__all__ = ["Staleness", "is_unique"]

CORRECTIONS = ("invert", "direct", "weighted", "first-order")


@dataclass(frozen=True, kw_only=True)
class Staleness(FedAvg):
    r"""Gradient inversion against staleness (AAAI 2025, arXiv 2309.13536).

    The updates of the clients `stale` arrive :math:`\tau` rounds late: in round t the server gets
    :math:`u = x - w^{t - \tau}`.  It looks for data D = (X, soft labels) of `recovered` examples,

    .. math::
        \min_D J = \| \text{mask} \odot (\mathrm{LocalUpdate}(w^{t - \tau}; D) - u) \|_1 ,

    LocalUpdate being the K full-batch steps of the client, and averages, in the place of u,

    .. math:: \gamma \hat u + (1 - \gamma) u, \qquad \hat u = \mathrm{LocalUpdate}(w^t; D) .

    The mask keeps the largest coordinates of u.  A client is inverted only if its update is unlike
    the fresh ones (`is_unique`), and until inversion is no better than nothing: when its true
    :math:`u^t` arrives, in round :math:`t + \tau`, and
    :math:`\|\hat u^t - u^t\|_1 > \|u^{t - \tau} - u^t\|_1`, gamma falls to 0.

    What it competes with: u as it is (asynchronous FedAvg); :math:`2^{-\tau/h} u`; and the first
    order, :math:`u - \lambda\, u \odot u \odot (w^t - w^{t - \tau})` (DC-ASGD).

    Parameters
    ----------
    stale : tuple of int
        Clients whose updates are late.
    delay : int
        tau; 0: not at all.
    correction : {"invert", "direct", "weighted", "first-order"}
    recovered : int
        Examples that are looked for.
    iterations : int
        Of an inversion; the authors take 10,000 and more.
    inversion_lr : float
        Of Adam; 1 is for inputs in a box of pixels.
    kept : float
        Part of the coordinates in the mask; 1: all.
    box : (float, float) or None
        Range that inputs are clamped to.
    targets : {"softmax", "sigmoid"}
        Loss of the steps on soft labels: cross-entropy, which clients train with; or the binary one
        of the authors' code.
    warm_start : bool
        Start from what was found for the client before.
    uniqueness : float or None
        Quantile in `is_unique`; None: invert always, as the authors' code does.
    switch_back : bool
        Whether to stop where inversion is no better.
    window : int
        Rounds in which gamma falls to 0, in equal steps.
    gamma : float
        Before that.
    stop : int or None
        No inversion from this round on (300 in the authors' experiments).
    half_life, compensation : float
        h and lambda.

    Notes
    -----
    **Inversion is an attack**: the server makes data like those of the client.  The mask makes it
    less exact.  Set `batch_size` so that clients train on all their examples at once; a larger
    model takes minutes a client and round.  The server keeps the models and updates of tau rounds.
    """

    name: ClassVar[str] = "staleness"
    counts_absent: ClassVar[bool] = True

    stale: tuple[int, ...] = ()
    delay: int = 40
    correction: str = "invert"
    recovered: int = 128
    iterations: int = 1000
    inversion_lr: float = 1.0
    kept: float = 0.05
    box: tuple[float, float] | None = None
    targets: str = "softmax"
    warm_start: bool = True
    uniqueness: float | None = 1.0
    switch_back: bool = True
    window: int = 10
    gamma: float = 1.0
    stop: int | None = None
    half_life: float = 20.0
    compensation: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "stale", tuple(self.stale))
        check_choice("correction", self.correction, CORRECTIONS)
        check_choice("targets", self.targets, TARGETS)
        for option in ("recovered", "iterations"):
            check_whole(option, getattr(self, option))
        for option in ("delay", "window"):
            check_whole(option, getattr(self, option), least=0)
        for option in ("inversion_lr", "half_life"):
            check_number(option, getattr(self, option), lambda v: v > 0, "a number above 0")
        check_number("kept", self.kept, lambda v: 0 < v <= 1, "a number above 0 up to 1")
        check_number("gamma", self.gamma, lambda v: 0 <= v <= 1, "a number in [0, 1]")
        check_number("compensation", self.compensation, lambda v: v >= 0, "a number from 0")
        if self.uniqueness is not None:
            check_number("uniqueness", self.uniqueness, lambda v: 0 <= v <= 1, "one in [0, 1]")
        if self.stop is not None:
            check_whole("stop", self.stop, least=0)
        if self.box is not None:
            object.__setattr__(self, "box", tuple(self.box))
            if not (len(self.box) == 2 and self.box[0] < self.box[1]):
                raise InvalidInputError(f"box: expected two increasing numbers, got {self.box!r}")

    def server_begin(self, server: Server) -> None:
        """Start with nothing on its way."""
        unknown = [i for i in self.stale if not 0 <= i < server.population]
        if unknown:
            raise InvalidInputError(
                f"stale: expected clients from 0 to {server.population - 1}, got {unknown}"
            )
        server["late"] = []  # round, client, examples and steps of what is on its way
        server["switched"] = {}  # client -> round in which inversion was found to be no better

    def client_end(self, result: LocalResult, client: Client) -> Payload:
        """Send u_i and K_i."""
        return super().client_end(result, client) | {"steps": result.steps}

    def server_step(self, server: Server, mean: Vector, arrivals: Arrivals) -> None:
        """Hold back what is late, correct what is due, and average."""
        now = server.round
        fresh = []
        for arrival, update in zip(arrivals, arrivals.updates(), strict=True):
            if arrival.client not in self.stale:
                fresh.append(Arrival(arrival.client, arrival.examples, {"update": update}))
                continue
            server[f"update.{now}.{arrival.client}"] = update
            server[f"model.{now}"] = server.model.copy()
            server["late"].append([now, arrival.client, arrival.examples, arrival["steps"]])
        due = [entry for entry in server["late"] if entry[0] <= now - self.delay]
        server["late"] = [entry for entry in server["late"] if entry not in due]
        known = [arrival["update"] for arrival in fresh]
        corrected = [
            Arrival(entry[1], entry[2], {"update": self._correct(server, entry, known)})
            for entry in due
        ]
        for name in {f"model.{entry[0]}" for entry in due}:
            del server.state[name]
        messages = Arrivals(sorted([*fresh, *corrected], key=lambda arrival: arrival.client))
        if len(messages):
            super().server_step(server, messages.mean(self.weights(messages)), messages)

    def _correct(self, server: Server, entry: list[int], fresh: list[Vector]) -> Vector:
        """Give what is averaged in the place of a late update."""
        sent, client, _, steps = entry
        u, old = server.state.pop(f"update.{sent}.{client}"), server[f"model.{sent}"]
        if self.correction == "direct":
            return u
        if self.correction == "weighted":
            return u * u.dtype.type(2 ** (-(server.round - sent) / self.half_life))
        if self.correction == "first-order":
            return u - u.dtype.type(self.compensation) * u * u * (server.model - old)
        self._judge(server, sent, client, u)
        gamma = self._gamma(server, client)
        different = self.uniqueness is None or is_unique(u, fresh, self.uniqueness)
        if gamma == 0 or not different:
            return u
        found = self._recover(server, client, old, u, self._training(server, sent, steps), sent)
        guess = found.update(self._training(server, server.round, steps), server.model)
        if self.switch_back and self.delay:
            server[f"guess.{server.round}.{client}"] = guess
            server[f"before.{server.round}.{client}"] = u
        return guess if gamma == 1 else combine([guess, u], [gamma, 1 - gamma])

    def _training(self, server: Server, round: int, steps: int) -> LocalTraining:
        tools: Any = server.tools
        if tools is None:
            raise InvalidInputError("tools: inversion needs the server to run the model")
        return LocalTraining(
            tools.forward,
            steps,
            self.lr(round),
            self.weight_decay,
            self.local_momentum,
            self.clip,
            self.targets,
        )

    def _recover(
        self,
        server: Server,
        client: int,
        old: Vector,
        u: Vector,
        training: LocalTraining,
        sent: int,
    ) -> Recovered:
        tools: Any = server.tools
        rng = np.random.default_rng([sent, client])
        shapes = ((self.recovered, *tools.example_shape), (self.recovered, tools.classes))
        x, labels = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
        if self.warm_start:
            x = server.state.get(f"x.{client}", x)
            labels = server.state.get(f"labels.{client}", labels)
        found = invert(
            training,
            old,
            u,
            Recovered(x, labels, np.inf),
            iterations=self.iterations,
            lr=self.inversion_lr,
            kept=self.kept,
            box=self.box,
        )
        if self.warm_start:
            server[f"x.{client}"], server[f"labels.{client}"] = found.x, found.labels
        return found

    def _judge(self, server: Server, sent: int, client: int, truth: Vector) -> None:
        """Compare what was made up for the round `sent` with what came of it."""
        guess = server.state.pop(f"guess.{sent}.{client}", None)
        before = server.state.pop(f"before.{sent}.{client}", None)
        if guess is None or str(client) in server["switched"]:
            return
        if np.abs(guess - truth).sum(dtype=np.float64) > np.abs(before - truth).sum(
            dtype=np.float64
        ):
            server["switched"][str(client)] = server.round

    def _gamma(self, server: Server, client: int) -> float:
        if self.stop is not None and server.round >= self.stop:
            return 0.0
        switched = server["switched"].get(str(client))
        if switched is None:
            return self.gamma
        return self.gamma * max(0.0, 1 - (server.round - switched + 1) / (self.window + 1))


def is_unique(update: Vector, fresh: list[Vector], quantile: float = 1.0) -> bool:
    """Say whether an update points elsewhere than the fresh ones do.

    It does if its mean cosine distance to them is above that `quantile` of their own mean distances
    to each other; and where there are fewer than two to compare with.  (The paper derives its
    threshold from the distances among fresh clients; how is not known to us.)

    Parameters
    ----------
    update : (d,) array
    fresh : list of (d,) arrays
    quantile : float
        In [0, 1]; 1: the largest.
    """
    if len(fresh) < 2:
        return True
    products = gram([*fresh, update], "products").products
    assert products is not None
    lengths = np.sqrt(np.maximum(np.diagonal(products), 1e-30))
    distances = 1 - products / np.outer(lengths, lengths)
    n = len(fresh)
    between = distances[:n, :n].sum(1) - np.diagonal(distances)[:n]
    return bool(distances[n, :n].mean() > np.quantile(between / (n - 1), quantile))
