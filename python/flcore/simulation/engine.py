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
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import flcore
from flcore._extras import require
from flcore._native import num_threads
from flcore.algorithms import (
    Algorithm,
    Arrival,
    Arrivals,
    Client,
    LocalResult,
    Payload,
    Server,
    create,
)
from flcore.algorithms.layout import Parameters
from flcore.errors import InvalidInputError, NonFiniteError
from flcore.simulation.base import held_out, make_base
from flcore.simulation.datasets import Dataset, load_dataset
from flcore.simulation.dealing import Partition, deal
from flcore.simulation.errors import CheckpointError, DivergedError
from flcore.simulation.history import PHASES, History, RoundRecord
from flcore.simulation.local import Job, LocalTrainer, choose_trainer
from flcore.simulation.models import build_model
from flcore.simulation.networks import Network, Networks
from flcore.simulation.participants import Population, Tools, noisy_labels
from flcore.simulation.partition import check_partition
from flcore.simulation.runfolder import FORMAT, Checkpoint, RunFolder
from flcore.simulation.seeds import Purpose, generator
from flcore.simulation.server import Aggregator
from flcore.simulation.settings import Settings
from flcore.simulation.uplink import (
    make_uplink,
    pack_rest,
    payload_bytes,
    unpack_rest,
    vector_bytes,
)

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
    with _threads(settings.threads):
        simulation = Simulation(
            algorithm, model, data, settings, partition=partition, server_examples=server_examples
        )
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
        model = self.algorithm.prepare_model(model)
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
            self.base = make_base(model, self.data, settings, self.algorithm, own)
        self._model = model
        self._test = [torch.from_numpy(getattr(self.data, name)) for name in ("x_test", "y_test")]
        self.trainer = LocalTrainer(
            model,
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

    def _round(self, round: int, observer: Observer) -> RoundRecord:
        clock = _Clock()
        self.server.round = round
        exchanged = self._exchange() if round == 0 else (0, 0)
        drawn = self.algorithm.select(
            self.server, generator(self.settings.seed, Purpose.PARTICIPANTS, round)
        )
        clients = self.clients.who_answers(drawn, round)
        bytes_up, bytes_down = exchanged
        jobs = []
        for id in clients:
            client = self._clients[id] = self.clients.client(id, round)
            seed = int(client.rng.integers(2**63))
            payload, up, down = self._downlink(client)
            bytes_up, bytes_down = bytes_up + up, bytes_down + down
            jobs.append(self._job(client, payload, seed))
        with clock("train"):
            results = self._train(jobs, round, observer)
        with clock("encode"):
            payloads = {
                job.client: self.algorithm.client_end(result, self._clients[job.client])
                for job, result in zip(jobs, results, strict=True)
            }
            self.clients.lie(payloads, round)
            messages = [self._pack(client, payload, round) for client, payload in payloads.items()]
        with clock("aggregate"):
            arrivals = self._receive(clients, messages, round)
            if len(arrivals):
                mean = arrivals.mean(self.algorithm.weights(arrivals))
                self.algorithm.server_step(self.server, mean, arrivals)
            elif self.algorithm.counts_absent:
                nothing = np.zeros(self.layout.size(), np.float32)
                self.algorithm.server_step(self.server, nothing, arrivals)
        with clock("evaluate"):
            accuracy, loss = self._evaluate(round)
        return RoundRecord(
            round=round + 1,
            accuracy=accuracy,
            loss=loss,
            train_loss=sum(r.loss for r in results) / len(results) if results else math.nan,
            clients=tuple(clients),
            bytes_up=bytes_up + sum(len(main) + len(rest) for main, rest in messages),
            bytes_down=bytes_down,
            seconds=clock.seconds,
        )

    def _exchange(self) -> tuple[int, int]:
        """Let the algorithm exchange what it wants before the first round, and count the bytes."""
        everyone = [
            self.clients.client(client, 0, Purpose.EXCHANGE) for client in range(len(self.clients))
        ]
        up, down = self.algorithm.one_time_exchange(self.server, everyone) or ((), ())
        self.networks.know(self.server.model)
        return sum(map(payload_bytes, up)), sum(map(payload_bytes, down))

    def _downlink(self, client: Client) -> tuple[Payload, int, int]:
        """Give what a client gets, read from the bytes that were sent, and how many up and down."""
        payload = self.algorithm.downlink(self.server, client.id)
        main, rest = vector_bytes(payload["model"]), pack_rest(payload, "model")
        received = {"model": np.frombuffer(main, "<f4"), **unpack_rest(rest)}
        request = self.algorithm.request(received, client)
        if request is None:
            return received, 0, len(main) + len(rest)
        asked = pack_rest(request)
        more = pack_rest(self.algorithm.reply(self.server, unpack_rest(asked)))
        return received | unpack_rest(more), len(asked), len(main) + len(rest) + len(more)

    def _job(self, client: Client, payload: Payload, seed: int) -> Job:
        work = self.algorithm.client_begin(payload, client)
        view = self.clients.slowed(self.algorithm.data_view(client), client.id, client.round)
        return Job(client.id, work, view, seed)

    def _train(self, jobs: list[Job], round: int, observer: Observer) -> list[LocalResult]:
        results: list[LocalResult] = []
        for part, trainer in self._parts(jobs):
            results += trainer.train(part)
            for job, result in zip(part, results[-len(part) :], strict=True):
                if not math.isfinite(result.loss):
                    raise DivergedError(
                        f"training diverged: the loss of client {job.client} in round {round + 1} "
                        "is not finite; lower the local learning rate, or clip gradients",
                        round=round + 1,
                        client=job.client,
                    )
                observer.client_done(job.client)
        return results

    def _parts(self, jobs: list[Job]) -> Iterator[tuple[list[Job], Any]]:
        """Yield the jobs that are trained together, in order, and who trains them."""
        first = 0
        while first < len(jobs):
            network, last = self.networks[jobs[first].client], first + 1
            if network.rounds is not network.trainer:
                while last < len(jobs) and self.networks[jobs[last].client] is network:
                    last += 1
            yield jobs[first:last], network.rounds
            first = last

    def _pack(self, client: int, payload: Payload, round: int) -> tuple[bytes, bytes]:
        rest = pack_rest(payload, "update")
        if "update" not in payload:
            return b"", rest
        return self.uplink.pack(client, payload["update"], round), rest

    def _receive(
        self, clients: Sequence[int], messages: Sequence[tuple[bytes, bytes]], round: int
    ) -> Arrivals:
        arrivals = []
        for client, (main, rest) in zip(clients, messages, strict=True):
            payload = unpack_rest(rest)
            if main:
                payload["update"] = self.uplink.unpack(client, main, round)
            arrivals.append(Arrival(client, len(self.partition[client]), payload))
        return self.aggregator.receive(arrivals, round)

    def _evaluate(self, round: int) -> tuple[float, float]:
        if self.algorithm.evaluation == "personal":
            accuracy, loss = self._evaluate_personal(round)
        else:
            accuracy, loss = self.trainer.evaluate(self.server.model, *self._test)
        if not math.isfinite(loss):
            raise DivergedError(
                f"training diverged: the loss of the global model after round {round + 1} is not "
                "finite; lower the server learning rate, or the error control's eta",
                round=round + 1,
            )
        return accuracy, loss

    def _evaluate_personal(self, round: int) -> tuple[float, float]:
        """Mean over the clients of their own models on test data like theirs."""
        figures = []
        for client in self.algorithm.tested(len(self.clients)):
            person = self.clients.client(client, round)
            model = self.algorithm.own_model(self._downlink(person)[0], person)
            trainer, examples = self.networks[client].trainer, self._own_test[client]
            figures.append(trainer.evaluate(model, *(t[examples] for t in self._test)))
        accuracy, loss = np.mean(figures, axis=0).tolist()
        return accuracy, loss

    @cached_property
    def _own_test(self) -> list[Any]:
        """Test examples of each client: of its domains if the data names any, else its classes."""
        kind = "y" if self.data.groups_train is None else "groups"
        train, test = (getattr(self.data, f"{kind}_{part}") for part in ("train", "test"))
        return [np.flatnonzero(np.isin(test, train[indices])) for indices in self.partition]

    def _named_model(self) -> Parameters:
        return self.layout.named(self.server.model)

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
