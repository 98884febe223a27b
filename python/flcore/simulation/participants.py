"""The clients of a run as the engine sees them: data, memory, faults and lies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flcore._extras import require
from flcore.algorithms.layout import Layout, Vector
from flcore.algorithms.state import Client, DataView, Payload
from flcore.simulation.attacks import Seen, check_attackers
from flcore.simulation.datasets import Dataset
from flcore.simulation.seeds import Purpose, generator
from flcore.simulation.settings import Settings

if TYPE_CHECKING:
    from flcore.simulation.networks import Networks

__all__ = ["Population", "Tools", "noisy_labels"]


class Tools:
    """`flcore.algorithms.tools.ModelTools` on a trainer.

    Parameters
    ----------
    trainer : LocalTrainer
        With the training data.
    data : Dataset
    indices : (n,) int64 array
        Training examples that the functions look at if not told otherwise.
    """

    def __init__(self, trainer: Any, data: Dataset, indices: np.ndarray) -> None:
        self._trainer, self._data, self._indices = trainer, data, indices
        self.layout: Layout = trainer.layout
        self.example_shape = data.example_shape

    @property
    def x(self) -> Any:
        """The examples, (n, ...) float32 tensor."""
        return self._trainer.x[self._indices]

    @property
    def y(self) -> Any:
        """Their labels, (n,) int64 tensor."""
        return self._trainer.y[self._indices]

    @property
    def groups(self) -> np.ndarray | None:
        """Domain or natural client of each example, if the data names any."""
        groups = self._data.groups_train
        return None if groups is None else groups[self._indices]

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self._data.classes)

    def losses(self, model: Vector, x: Any = None, y: Any = None) -> np.ndarray:
        """Cross-entropy of every example, (n,) float32."""
        return self._trainer.losses(model, *self._examples(x, y))

    def features(self, model: Vector, x: Any = None) -> np.ndarray:
        """What the last layer gets, of every example, (n, features) float32."""
        return self._trainer.features(model, self._examples(x, None)[0])

    def scores(self, model: Vector, x: Any = None) -> np.ndarray:
        """Class scores of every example, (n, classes) float32."""
        return self._trainer.scores(model, self._examples(x, None)[0])

    def gradient(self, model: Vector, x: Any = None, y: Any = None) -> Vector:
        """Gradient of the mean loss over the examples in training mode, (d,)."""
        return self._trainer.gradient(model, *self._examples(x, y))

    def forward(self, x: Any, parameters: Any, **options: Any) -> Any:
        """Scores as a function of a (d,) tensor that can be differentiated through, many times.

        Options go to the network.
        """
        return self._trainer.functional(x, parameters, **options)

    def _examples(self, x: Any, y: Any) -> tuple[Any, Any]:
        torch = require("torch", extra="train")
        x = self.x if x is None else torch.as_tensor(x)
        return x, (self.y if y is None else torch.as_tensor(y))


class Population:
    """All clients of a run.

    Parameters
    ----------
    partition : list of index arrays
        Training examples of each client.
    settings : Settings
    layout : Layout
        Of the model, with the algorithm's groups.
    trainer : LocalTrainer
    data : Dataset
    networks : Networks, optional
        Where clients may have networks of their own.

    Attributes
    ----------
    states : dict of client to dict
        What clients keep between rounds.
    attackers : set of int
    """

    def __init__(
        self,
        partition: Sequence[np.ndarray],
        settings: Settings,
        layout: Layout,
        trainer: Any,
        data: Dataset,
        networks: Networks | None = None,
    ) -> None:
        self.partition = list(partition)
        self.states: dict[int, dict[str, Any]] = {}
        self._settings, self._layout = settings, layout
        self._trainer, self._data, self._networks = trainer, data, networks
        count = check_attackers(settings.attack, settings.attackers, settings.clients)
        drawn = generator(settings.seed, Purpose.ATTACKERS).permutation(settings.clients)
        self.attackers = set(drawn[:count].tolist())

    def __len__(self) -> int:
        return len(self.partition)

    def client(self, id: int, round: int, purpose: Purpose = Purpose.LOCAL_TRAINING) -> Client:
        """Give one client in one round."""
        indices = self.partition[id]
        layout, trainer, initial = self._layout, self._trainer, self._trainer.initial
        if self._networks is not None:
            network = self._networks[id]
            layout, trainer = network.layout, network.trainer
            initial = self._networks.start(id)
        return Client(
            id=id,
            round=round,
            examples=len(indices),
            layout=layout,
            population=len(self.partition),
            participants=self._settings.participants,
            state=self.states.setdefault(id, {}),
            rng=generator(self._settings.seed, purpose, round, id),
            initial=initial,
            tools=Tools(trainer, self._data, indices),
            indices=indices,
        )

    def who_answers(self, clients: Sequence[int], round: int) -> list[int]:
        """Leave out the clients that drop out of this round."""
        share = self._settings.dropout
        if not share:
            return list(clients)
        rng = generator(self._settings.seed, Purpose.FAULTS, round)
        here = rng.random(len(self.partition)) >= share
        return [client for client in clients if here[client]]

    def slowed(self, view: DataView, client: int, round: int) -> DataView:
        """Give the part of the local steps that a straggler does; all, if it is none."""
        share = self._settings.stragglers
        if not share:
            return view
        rng = generator(self._settings.seed, Purpose.FAULTS, round, client + 1)
        if rng.random() >= share:
            return view
        return view.first(int(rng.integers(1, len(view.sizes), endpoint=True)))

    def lie(self, payloads: dict[int, Payload], round: int) -> None:
        """Replace the updates of attackers in the messages of this round."""
        attack = self._settings.attack
        sent = {client: p["update"] for client, p in payloads.items() if "update" in p}
        liars = [client for client in sent if client in self.attackers]
        if attack is None or not liars:
            return
        honest = [update for client, update in sent.items() if client not in self.attackers]
        for client in liars:
            rng = generator(self._settings.seed, Purpose.ATTACK, round, client)
            seen = Seen(sent[client], honest, len(liars), rng)
            payloads[client]["update"] = attack.update(seen)


def noisy_labels(
    data: Dataset, settings: Settings, partition: Sequence[np.ndarray], attackers: set[int]
) -> np.ndarray:
    """Give the training labels as clients see them: with noise, and with what attackers make of it.

    `label_noise` of all labels are replaced by one of the other classes each.
    """
    y = data.y_train.copy()
    classes = len(data.classes)
    if settings.label_noise and classes > 1:
        rng = generator(settings.seed, Purpose.LABEL_NOISE)
        wrong = rng.random(len(y)) < settings.label_noise
        y[wrong] = (y[wrong] + rng.integers(1, classes, wrong.sum())) % classes
    if settings.attack is not None:
        for client in sorted(attackers):
            y[partition[client]] = settings.attack.labels(y[partition[client]], classes)
    return y
