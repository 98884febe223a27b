"""The round loop: federated training of one model in one process.

A round, in order: draw the participants; each loads the global model, trains on its own examples
and packs its update into bytes; the server unpacks and sums the messages, moves the model, and
measures it on the test data.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import flcore
from flcore._extras import require
from flcore._native import num_threads
from flcore.algorithms import Algorithm, create
from flcore.errors import InvalidInputError, NonFiniteError
from flcore.simulation.base import held_out, make_base
from flcore.simulation.datasets import Dataset, load_dataset
from flcore.simulation.errors import CheckpointError, DivergedError
from flcore.simulation.history import PHASES, History, RoundRecord
from flcore.simulation.local import LocalTrainer
from flcore.simulation.models import build_model
from flcore.simulation.partition import check_partition, split
from flcore.simulation.runfolder import FORMAT, Checkpoint, RunFolder
from flcore.simulation.seeds import Purpose, generator
from flcore.simulation.server import Server
from flcore.simulation.settings import Settings
from flcore.simulation.uplink import dense_bytes, make_uplink

if TYPE_CHECKING:
    import torch

__all__ = ["Observer", "Simulation", "run"]


class Observer:
    """Watches a run, and may stop it.  Every method does nothing here: override what you need."""

    def started(self, history: History) -> None:
        """Note that the run starts, or goes on after the rounds in `history`."""

    def client_done(self, client: int) -> None:
        """Note that `client` has trained and packed its update."""

    def round_done(self, record: RoundRecord) -> None:
        """Note that a round is complete."""

    def should_stop(self) -> bool:
        """Say whether the run should stop after the round just completed."""
        return False


def run(
    algorithm: str | Algorithm = "fedavg",
    model: str | torch.nn.Module = "mlp",
    data: str | Path | Dataset = "digits",
    settings: Settings | None = None,
    *,
    partition: Sequence[np.ndarray] | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    observer: Observer | None = None,
) -> History:
    """Train a model on the data of many clients.

    Parameters
    ----------
    algorithm : Algorithm, or a name in `flcore.algorithms.available`
    model : torch.nn.Module, or a name in `flcore.simulation.MODELS`
        A module maps a batch of examples to class scores; it is used for all clients in turn.
    data : Dataset, or what `load_dataset` takes
    settings : Settings, optional
        Defaults as in ``flcore train``.
    partition : list of index arrays, optional
        The training examples of each client, in place of the split that `settings` describes;
        there must be `settings.clients` of them.
    output : path, optional
        Folder for configuration, metrics, checkpoints and the final model.
    resume : bool
        Continue the run in `output`.  Every bit of the model and every metric but the times are
        as if it had never stopped, given the same versions, machine and threads.  `rounds` may
        be more than it was.
    observer : Observer, optional
        Told of every round, and asked whether to stop.

    Returns
    -------
    History

    Raises
    ------
    InvalidInputError
        If an argument does not make sense or does not fit another.
    DivergedError
        If a loss or a parameter becomes NaN or infinite.
    CheckpointError
        If `output` holds a run and `resume` is False, or holds a different run.

    Examples
    --------
    >>> from flcore.simulation import Settings, run
    >>> history = run("fedavg", "mlp", "digits", Settings(rounds=3, clients=20))
    >>> len(history), history.bytes_down
    (3, 288600)
    """
    settings = settings or Settings()
    with _threads(settings.threads):
        simulation = Simulation(algorithm, model, data, settings, partition=partition)
        return simulation.run(output=output, resume=resume, observer=observer or Observer())


class Simulation:
    """All parts of a run, put together; `step` does one round.

    Parameters are those of `run`.
    """

    def __init__(
        self,
        algorithm: str | Algorithm,
        model: str | torch.nn.Module,
        data: str | Path | Dataset,
        settings: Settings,
        *,
        partition: Sequence[np.ndarray] | None = None,
    ) -> None:
        torch = require("torch", extra="train")
        self.settings = settings
        self.algorithm = create(algorithm) if isinstance(algorithm, str) else algorithm
        self.data = data if isinstance(data, Dataset) else load_dataset(data)
        model_name = model if isinstance(model, str) else type(model).__name__
        named = isinstance(model, str)
        if isinstance(model, str):
            rng = generator(settings.seed, Purpose.MODEL)
            model = build_model(model, self.data.example_shape, len(self.data.classes), rng)
        own = np.empty(0, np.int64)  # the server's examples
        rest = np.arange(len(self.data.y_train))
        if settings.base_bits is not None and named:
            own, rest = held_out(self.data, settings)
        self.partition = self._partition(partition, rest)
        self.base = None
        if settings.base_bits is not None:
            self.base = make_base(model, self.data, settings, self.algorithm, own)
        self._model = model
        self.trainer = LocalTrainer(model, loss=settings.loss, optimizer=settings.optimizer)
        self._tensors = {
            name: torch.from_numpy(getattr(self.data, name))
            for name in ("x_train", "y_train", "x_test", "y_test")
        }
        self._examples = [torch.from_numpy(indices) for indices in self.partition]
        self._weights = [self.algorithm.client_weight(len(indices)) for indices in self.partition]
        self.uplink = make_uplink(settings, self.trainer.initial, self._unit)
        self.server = Server(
            self.algorithm, self.trainer.initial, settings, total_weight=sum(self._weights)
        )
        self.history = History(model=self.server.model, config=self._config(model_name))

    def run(
        self, *, output: str | Path | None = None, resume: bool = False, observer: Observer
    ) -> History:
        """Do all rounds, or those that are left, or as many as the observer allows."""
        folder = self._open(output, resume)
        if folder is not None and self.base is not None:
            folder.save_base(self._base_arrays())
        observer.started(self.history)
        saved = len(self.history)
        while len(self.history) < self.settings.rounds:
            record = self.step(observer)
            observer.round_done(record)
            stop = observer.should_stop()
            if folder is not None:
                folder.append(record)
                due = len(self.history) - saved >= self.settings.checkpoint_every
                if due or stop or self.history.complete:
                    folder.save_checkpoint(self._checkpoint())
                    saved = len(self.history)
            if stop:
                break
        if folder is not None and self.history.complete:
            folder.save_model(self.history.model)
        return self.history

    def step(self, observer: Observer | None = None) -> RoundRecord:
        """Do one round, and give its record, which is then in `history` too."""
        round = len(self.history)
        try:
            record = self._round(round, observer or Observer())
        except NonFiniteError as error:  # losses were finite, but the server's sums are not
            raise DivergedError(
                f"training diverged in round {round + 1}: {error}", round=round + 1
            ) from error
        self.history.records.append(record)
        self.history.model = self.server.model
        return record

    def _round(self, round: int, observer: Observer) -> RoundRecord:
        clients = self._draw(round)
        clock = _Clock()
        downlink = len(dense_bytes(self.server.model)) * len(clients)
        messages: list[tuple[int, bytes]] = []
        losses = []
        for client in clients:
            with clock("train"):
                update, loss = self._train(client, round)
            with clock("encode"):
                messages.append((client, self.uplink.pack(client, update, round)))
            losses.append(loss)
            observer.client_done(client)
        with clock("aggregate"):
            self.server.step(self._received(messages, round), round)
        with clock("evaluate"):
            accuracy, loss = self._evaluate(round)
        return RoundRecord(
            round=round + 1,
            accuracy=accuracy,
            loss=loss,
            train_loss=sum(losses) / len(losses),
            clients=tuple(clients),
            bytes_up=sum(len(message) for _, message in messages),
            bytes_down=downlink,
            seconds=clock.seconds,
        )

    def _draw(self, round: int) -> list[int]:
        rng = generator(self.settings.seed, Purpose.PARTICIPANTS, round)
        clients = rng.choice(self.settings.clients, self.settings.participants, replace=False)
        return sorted(clients.tolist())

    def _unit(self, round: int) -> float:
        """Local learning rate of a round: updates are proportional to it."""
        return self.algorithm.client_begin(round).lr

    def _train(self, client: int, round: int) -> tuple[dict[str, np.ndarray], float]:
        examples = self._examples[client]
        update, loss = self.trainer.train(
            self.server.model,
            self._tensors["x_train"][examples],
            self._tensors["y_train"][examples],
            self.algorithm.client_begin(round),
            epochs=self.algorithm.local_epochs,
            batch_size=self.algorithm.batch_size,
            rng=generator(self.settings.seed, Purpose.LOCAL_TRAINING, round, client),
        )
        if not math.isfinite(loss):
            raise DivergedError(
                f"training diverged: the loss of client {client} in round {round + 1} is not "
                "finite; lower the local learning rate, or clip gradients",
                round=round + 1,
                client=client,
            )
        return update, loss

    def _received(
        self, messages: list[tuple[int, bytes]], round: int
    ) -> Iterator[tuple[Any, float]]:
        for client, message in messages:
            yield self.uplink.unpack(client, message, round), self._weights[client]

    def _evaluate(self, round: int) -> tuple[float, float]:
        accuracy, loss = self.trainer.evaluate(
            self.server.model, self._tensors["x_test"], self._tensors["y_test"]
        )
        if not math.isfinite(loss):
            raise DivergedError(
                f"training diverged: the loss of the global model after round {round + 1} is not "
                "finite; lower the server learning rate, or the error control's eta",
                round=round + 1,
            )
        return accuracy, loss

    def _partition(
        self, partition: Sequence[np.ndarray] | None, rest: np.ndarray
    ) -> list[np.ndarray]:
        """Deal the examples `rest`, which are not the server's."""
        settings, labels = self.settings, self.data.y_train
        if partition is None:
            rng = generator(settings.seed, Purpose.PARTITION)
            dealt = split(labels[rest], settings.clients, settings.alpha, rng)
            return [rest[indices] for indices in dealt]
        if len(partition) != settings.clients:
            raise InvalidInputError(
                f"partition: expected {settings.clients} clients as in the settings, got "
                f"{len(partition)}"
            )
        checked = check_partition(partition, len(labels))
        if len(rest) < len(labels) and not np.isin(np.concatenate(checked), rest).all():
            raise InvalidInputError(
                "partition: a client has examples that the server trains the base on; bring a "
                "trained module, or leave the partition to the settings"
            )
        return checked

    def _config(self, model_name: str) -> dict[str, Any]:
        data = self.data
        sizes = [len(indices) for indices in self.partition]
        return {
            "format": FORMAT,
            "algorithm": self.algorithm.to_dict(),
            "model": {
                "name": model_name,
                "parameters": self.trainer.numel,
                **({} if self.base is None else {"base": self.base.to_dict()}),
            },
            "dataset": {
                "name": data.name,
                "fingerprint": data.fingerprint,
                "train": len(data.y_train),
                "test": len(data.y_test),
                "classes": len(data.classes),
                "examples_per_client": [min(sizes), max(sizes)],
            },
            "settings": self.settings.to_dict(),
            "versions": {
                "flcore": flcore.__version__,
                "torch": require("torch", extra="train").__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
        }

    def _base_arrays(self) -> dict[str, np.ndarray]:
        """Give the state of the model without its adapters."""
        state = self._model.state_dict()
        return {n: t.numpy() for n, t in state.items() if n not in self.trainer.initial}

    def _checkpoint(self) -> Checkpoint:
        return Checkpoint(
            round=len(self.history),
            model=self.server.model,
            control=self.server.control,
            clients=self.uplink.state_dict(),
        )

    def _open(self, output: str | Path | None, resume: bool) -> RunFolder | None:
        if output is None:
            if resume:
                raise CheckpointError("output: to resume a run, give the folder it is in")
            return None
        folder = RunFolder(output, self.history.config, resume=resume)
        checkpoint = folder.load_checkpoint() if resume else None
        if checkpoint is None:
            folder.load_history(0)
            return folder
        if checkpoint.round > self.settings.rounds:
            raise CheckpointError(
                f"output: {folder.path} holds {checkpoint.round} rounds already, more than the "
                f"{self.settings.rounds} asked for"
            )
        self.server.model = {name: checkpoint.model[name] for name in self.server.model}
        if self.server.control is not None and checkpoint.control is not None:
            self.server.control = {name: checkpoint.control[name] for name in self.server.control}
        self.uplink.load_state_dict(checkpoint.clients)
        self.history.records = folder.load_history(checkpoint.round)
        self.history.model = self.server.model
        return folder


class _Clock:
    """Adds up the time spent in each phase."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - start


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Set the threads of torch and flcore, and leave torch's random state as it was."""
    torch = require("torch", extra="train")
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with num_threads(count), torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(before)
