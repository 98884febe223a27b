"""The networks of a run: the run's own, and those that clients bring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flcore.algorithms.base import Algorithm
from flcore.algorithms.layout import Layout, Vector
from flcore.simulation.datasets import Dataset
from flcore.simulation.local import LocalTrainer, choose_trainer
from flcore.simulation.models import build_model
from flcore.simulation.seeds import Purpose, generator
from flcore.simulation.settings import Settings

__all__ = ["Network", "Networks"]


@dataclass(frozen=True)
class Network:
    """One architecture.

    Parameters
    ----------
    layout : Layout
        Of its vector, with the algorithm's groups.
    trainer : LocalTrainer
        Runs and measures it.
    rounds : Trainer
        Trains the clients of a round that have it.
    """

    layout: Layout
    trainer: LocalTrainer
    rounds: Any


class Networks:
    """The network of each client; one that several clients have is made once.

    Parameters
    ----------
    own : Network
        The run's, which a client has that the algorithm names no other for.
    algorithm : Algorithm
    settings : Settings
    data : Dataset
    """

    def __init__(
        self, own: Network, algorithm: Algorithm, settings: Settings, data: Dataset
    ) -> None:
        self.own = own
        self.initial: Vector = own.trainer.initial
        """What clients with the run's network start from; its frozen tensors may be set."""
        self._algorithm, self._settings, self._data = algorithm, settings, data
        self._others: dict[str, Network] = {}
        self._starts: dict[int, Vector] = {}

    def __getitem__(self, client: int) -> Network:
        """Give the network of a client."""
        name = self._algorithm.architecture(client)
        if name is None:
            return self.own
        if name not in self._others:
            trainer = self._trainer(name, client)
            trainer.x, trainer.y = self.own.trainer.x, self.own.trainer.y
            rounds = choose_trainer(trainer, self._settings, self._algorithm)
            layout = self._algorithm.layout(trainer.layout)
            self._others[name] = Network(layout, trainer, rounds)
        return self._others[name]

    def start(self, client: int) -> Vector:
        """Give the model that a client starts the run from, random if it is of its own network."""
        name = self._algorithm.architecture(client)
        if name is None:
            return self.initial
        if client not in self._starts:
            self._starts[client] = self._trainer(name, client).initial
        return self._starts[client]

    def know(self, model: Vector) -> None:
        """Tell all clients the frozen tensors of the server's model."""
        layout = self.own.layout
        if layout.names("frozen"):
            self.initial = layout.put(self.initial, layout.take(model, "frozen"), "frozen")

    def _trainer(self, name: str, client: int) -> LocalTrainer:
        settings, data = self._settings, self._data
        rng = generator(settings.seed, Purpose.MODEL, 0, client + 1)
        model = build_model(name, data.example_shape, len(data.classes), rng)
        return LocalTrainer(
            self._algorithm.prepare_model(model),
            loss=settings.loss,
            optimizer=settings.optimizer,
            batch_loss=self._algorithm.batch_loss(),
            statistics=self._algorithm.statistics,
        )
