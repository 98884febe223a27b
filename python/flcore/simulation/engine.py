"""Federated training of one model in one process: `run`.

What happens in a round is in `flcore.simulation.rounds`; here a run is put together, goes through
its rounds, and is written down so that it can be resumed.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import flcore
from flcore._extras import require
from flcore._native import num_threads
from flcore.algorithms import (
    Algorithm,
    Client,
    Server,
    create,
)
from flcore.errors import InvalidInputError, NonFiniteError
from flcore.simulation.base import held_out, make_base
from flcore.simulation.datasets import Dataset, load_dataset
from flcore.simulation.dealing import Partition, deal
from flcore.simulation.errors import CheckpointError, DivergedError
from flcore.simulation.history import History, RoundRecord
from flcore.simulation.local import LocalTrainer, choose_trainer
from flcore.simulation.models import build_model
from flcore.simulation.networks import Network, Networks
from flcore.simulation.participants import Population, Tools, noisy_labels
from flcore.simulation.partition import check_partition
from flcore.simulation.rounds import Observer, Rounds
from flcore.simulation.runfolder import FORMAT, Checkpoint, RunFolder
from flcore.simulation.seeds import Purpose, generator
from flcore.simulation.server import Aggregator
from flcore.simulation.settings import Settings
from flcore.simulation.uplink import (
    make_uplink,
)

if TYPE_CHECKING:
    import torch

__all__ = ["Observer", "Simulation", "run", "threads"]


def run(
    algorithm: str | Algorithm = "fedavg",
    model: str | torch.nn.Module = "mlp",
    data: str | Path | Dataset = "digits",
    settings: Settings | None = None,
    *,
    partition: Sequence[np.ndarray] | None = None,
    server_examples: np.ndarray | None = None,
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
    server_examples : (n,) integers, optional
        Training examples that the server has for itself, and no client: what algorithms that
        train at the server, too, do it on.
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
    with threads(settings.threads):
        simulation = Simulation(
            algorithm, model, data, settings, partition=partition, server_examples=server_examples
        )
        return simulation.run(output=output, resume=resume, observer=observer or Observer())


class Simulation(Rounds):
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
        server_examples: np.ndarray | None = None,
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
        network: Any = self.algorithm.prepare_model(model)
        own = np.empty(0, np.int64)  # the server's examples
        rest = np.arange(len(self.data.y_train))
        if settings.base_bits is not None and named:
            own, rest = held_out(self.data, settings)
        elif server_examples is not None:
            (own,) = check_partition([np.asarray(server_examples)], len(rest))
            rest = np.setdiff1d(rest, own)
        self.partition = self._partition(partition, rest)
        self.base = None
        if settings.base_bits is not None:
            self.base = make_base(network, self.data, settings, self.algorithm, own)
        self._model = network
        self._test = [torch.from_numpy(getattr(self.data, name)) for name in ("x_test", "y_test")]
        self.trainer = LocalTrainer(
            network,
            torch.from_numpy(self.data.x_train),
            loss=settings.loss,
            optimizer=settings.optimizer,
            batch_loss=self.algorithm.batch_loss(),
            statistics=self.algorithm.statistics,
        )
        self.rounds_trainer = choose_trainer(self.trainer, settings, self.algorithm)
        self.layout = self.algorithm.layout(self.trainer.layout)
        initial = self.trainer.initial
        own_network = Network(self.layout, self.trainer, self.rounds_trainer)
        self.networks = Networks(own_network, self.algorithm, settings, self.data)
        self.clients = Population(
            self.partition, settings, self.layout, self.trainer, self.data, self.networks
        )
        labels = noisy_labels(self.data, settings, self.partition, self.clients.attackers)
        self.trainer.y = torch.from_numpy(labels)
        self.server = Server(
            initial.copy(),
            self.layout,
            population=settings.clients,
            participants=settings.participants,
            tools=Tools(self.trainer, self.data, own),
        )
        self.algorithm.server_begin(self.server)
        self._clients: dict[int, Client] = {}
        weights = [self.algorithm.client_weight(len(indices)) for indices in self.partition]
        self.aggregator = Aggregator(self.algorithm, self.layout, settings, sum(weights))
        self.uplink = make_uplink(settings, self.aggregator.like, self.algorithm.lr)
        self.history = History(model=self._named_model(), config=self._config(model_name))

    def run(
        self, *, output: str | Path | None = None, resume: bool = False, observer: Observer
    ) -> History:
        """Do all rounds, or those that are left, or as many as the observer allows."""
        with threads(self.settings.threads):
            return self._run(output, resume, observer)

    def _run(self, output: str | Path | None, resume: bool, observer: Observer) -> History:
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
        self.history.model = self._named_model()
        return record

    def _partition(
        self, partition: Sequence[np.ndarray] | None, rest: np.ndarray
    ) -> list[np.ndarray]:
        """Deal the examples `rest`, which are not the server's."""
        settings, labels = self.settings, self.data.y_train
        if partition is None:
            rng = generator(settings.seed, Purpose.PARTITION)
            how = settings.partition or Partition.from_alpha(settings.alpha)
            return deal(self.data, settings.clients, how, rng, examples=rest)
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
        return {n: t.numpy() for n, t in state.items() if n not in self.layout.shapes}

    def _checkpoint(self) -> Checkpoint:
        return Checkpoint(
            round=len(self.history),
            model=self._named_model(),
            control=self.aggregator.control,
            clients=self.uplink.state_dict(),
            server=self.server.state,
            own=self.clients.states,
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
        model = [checkpoint.model[name].reshape(-1) for name in self.layout.shapes]
        self.server.model = np.concatenate(model)
        self.server.state = checkpoint.server
        self.clients.states = checkpoint.own
        self.networks.know(self.server.model)
        if self.aggregator.control is not None and checkpoint.control is not None:
            self.aggregator.control = {n: checkpoint.control[n] for n in self.aggregator.like}
        self.uplink.load_state_dict(checkpoint.clients)
        self.history.records = folder.load_history(checkpoint.round)
        self.history.model = self._named_model()
        return folder


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Set the threads of torch and flcore, and leave torch's random state as it was."""
    torch = require("torch", extra="train")
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with num_threads(count), torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(before)
