"""One round of federated training, from drawing the participants to measuring the model.

Each participant gets a message, trains on its own examples and packs its update into bytes; the
server unpacks and sums the messages and moves the model. Both ends read what was made of bytes, and
the bytes are counted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np

from flcore.algorithms import (
    Algorithm,
    Arrival,
    Arrivals,
    Client,
    Layout,
    LocalResult,
    Payload,
    Server,
)
from flcore.algorithms.layout import Parameters
from flcore.errors import InvalidInputError
from flcore.simulation.datasets import Dataset
from flcore.simulation.errors import DivergedError
from flcore.simulation.history import PHASES, History, RoundRecord
from flcore.simulation.local import Job, LocalTrainer
from flcore.simulation.networks import Networks
from flcore.simulation.participants import Population
from flcore.simulation.seeds import Purpose, generator
from flcore.simulation.server import Aggregator
from flcore.simulation.settings import Settings
from flcore.simulation.uplink import Uplink, pack_rest, payload_bytes, unpack_rest, vector_bytes

__all__ = ["Clock", "Observer", "Rounds"]


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


class Rounds:
    """The parts of a run that a round needs; `flcore.simulation.Simulation` makes them.

    Attributes
    ----------
    algorithm, settings, data
        As given to `run`.
    partition : list of index arrays
        Training examples of each client.
    server : Server
    clients : Population
    trainer : LocalTrainer
        Of the run's own network.
    networks : Networks
        All networks, if clients have different ones.
    aggregator, uplink
        The server's end of the messages, and both ends of the compressed update.
    """

    algorithm: Algorithm
    settings: Settings
    data: Dataset
    partition: list[np.ndarray]
    layout: Layout
    server: Server
    clients: Population
    trainer: LocalTrainer
    networks: Networks
    aggregator: Aggregator
    uplink: Uplink
    history: History
    _test: list[Any]
    _clients: dict[int, Client]

    def _round(self, round: int, observer: Observer) -> RoundRecord:
        clock = Clock()
        self.server.round = round
        exchanged = self._exchange() if round == 0 else (0, 0)
        clients = self._draw(round)
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
            self._server_step(arrivals)
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

    def _draw(self, round: int) -> list[int]:
        """Give the clients of this round that answer."""
        rng = generator(self.settings.seed, Purpose.PARTICIPANTS, round)
        return self.clients.who_answers(self.algorithm.select(self.server, rng), round)

    def _server_step(self, arrivals: Arrivals) -> None:
        """Move the model along what arrived."""
        if len(arrivals):
            mean = arrivals.mean(self.algorithm.weights(arrivals))
            self.algorithm.server_step(self.server, mean, arrivals)
        elif self.algorithm.counts_absent:
            nothing = np.zeros(self.layout.size(), np.float32)
            self.algorithm.server_step(self.server, nothing, arrivals)

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
        found = [np.flatnonzero(np.isin(test, train[indices])) for indices in self.partition]
        for client, examples in enumerate(found):
            if examples.size == 0:
                what = "classes" if kind == "y" else "domains"
                raise InvalidInputError(
                    f"{kind}_test: there is no test example of the {what} of client {client}, "
                    "whose own model is to be tested"
                )
        return found

    def _named_model(self) -> Parameters:
        return self.layout.named(self.server.model)


class Clock:
    """Adds up the time spent in each phase."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the time inside as that of one of `PHASES`."""
        start = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - start
