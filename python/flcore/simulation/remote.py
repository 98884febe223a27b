"""The two ends of a run whose clients live elsewhere: in other processes, or on other machines.

`RemoteRounds` is the server's end and `ClientEnd` the clients'; together they do what `run` does in
one process, with the same numbers.  Between them pass `Note`s, which hold arrays and plain values
only; how they travel is the business of a `Post`, such as the one of
`flcore.integrations.flower_algorithm`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from flcore.algorithms import Algorithm, Arrival, Client, Payload, create
from flcore.algorithms.layout import Vector
from flcore.errors import InvalidInputError
from flcore.simulation.datasets import Dataset
from flcore.simulation.engine import Simulation, threads
from flcore.simulation.errors import DivergedError
from flcore.simulation.history import RoundRecord
from flcore.simulation.local import Job
from flcore.simulation.notes import Note, State, parts, read_payload, read_state, state_note
from flcore.simulation.participants import Population
from flcore.simulation.rounds import Clock, Observer
from flcore.simulation.seeds import Purpose
from flcore.simulation.settings import Settings

if TYPE_CHECKING:
    import torch

__all__ = ["ClientEnd", "Post", "RemoteRounds", "setup_text"]

UPLINK = "uplink."
"""First part of the names in a `State` that belong to a codec and its error control."""

AGREED = (
    *("clients", "participation", "alpha", "partition", "seed", "label_noise", "stragglers"),
    *("codec", "feedback", "start", "loss", "optimizer"),
)
"""Settings that clients go by."""


class Post(Protocol):
    """Carries notes to clients and back."""

    def __call__(self, kind: str, notes: Mapping[int, Note]) -> dict[int, Note]:
        """Deliver one note to each client, and give the answers of those that answered.

        Parameters
        ----------
        kind : {"train", "evaluate", "remember"}
            What `ClientEnd.answer` is asked for.
        notes : dict of client to Note
        """


class RemoteRounds(Simulation):
    """The server's end of a run: clients are asked by post; parameters as in `run`, and two more.

    Parameters
    ----------
    post : Post
    examples : list of int, optional
        Number of training examples of each client, when clients bring their own data; `data` is
        then only tested on.

    Raises
    ------
    InvalidInputError
        As in `run`, and for what only a simulation in one process can do: attackers, and a base in
        few bits.
    """

    def __init__(
        self,
        algorithm: str | Algorithm,
        model: str | torch.nn.Module,
        data: str | Path | Dataset,
        settings: Settings,
        *,
        post: Post,
        partition: Sequence[np.ndarray] | None = None,
        examples: Sequence[int] | None = None,
    ) -> None:
        for name, value in (("attack", settings.attack), ("base_bits", settings.base_bits)):
            if value is not None:
                raise InvalidInputError(
                    f"{name}: {value!r} is for clients in this process (flcore.simulation.run); "
                    "leave it out where they live elsewhere"
                )
        if examples is not None:
            partition = [np.zeros(count, np.int64) for count in examples]  # only counted
        super().__init__(algorithm, model, data, settings, partition=partition)
        self._post = post
        _check_one_way(self.algorithm)
        if examples is not None:
            self.clients = _Unseen(self.partition, settings, self.layout, self.trainer, self.data)

    def _exchange(self) -> tuple[int, int]:
        """Exchange at the server, then let the clients keep what is theirs."""
        sizes = super()._exchange()
        notes = {
            client: state_note(state) for client, state in self.clients.states.items() if state
        }
        if notes:
            self._post("remember", notes)
        return sizes

    def _round(self, round: int, observer: Observer) -> RoundRecord:
        clock = Clock()
        self.server.round = round
        up, down = self._exchange() if round == 0 else (0, 0)
        clients = self._draw(round)
        with clock("train"):
            notes = {client: self._note(client, round) for client in clients}
            replies = self._post("train", notes) if notes else {}
            clients = [client for client in clients if client in replies]
            losses = [self._loss(client, replies[client], round, observer) for client in clients]
        with clock("aggregate"):
            arrivals = self.aggregator.receive(
                [self._arrival(client, replies[client], round) for client in clients], round
            )
            self._server_step(arrivals)
        with clock("evaluate"):
            accuracy, loss = self._evaluate(round)
        return RoundRecord(
            round=round + 1,
            accuracy=accuracy,
            loss=loss,
            train_loss=sum(losses) / len(losses) if losses else math.nan,
            clients=tuple(clients),
            bytes_up=up + sum(replies[client].nbytes for client in clients),
            bytes_down=down + sum(note.nbytes for note in notes.values()),
            seconds=clock.seconds,
        )

    def _note(self, client: int, round: int) -> Note:
        payload = self.algorithm.downlink(self.server, client)
        return Note(
            {"round": round, "client": client}, parts(payload, "model", self.aggregator.like)
        )

    def _loss(self, client: int, reply: Note, round: int, observer: Observer) -> float:
        loss = float(reply.values["loss"])
        if not math.isfinite(loss):
            raise DivergedError(
                f"training diverged: the loss of client {client} in round {round + 1} is not "
                "finite; lower the local learning rate, or clip gradients",
                round=round + 1,
                client=client,
            )
        observer.client_done(client)
        return loss

    def _arrival(self, client: int, reply: Note, round: int) -> Arrival:
        payload = read_payload(reply, "update", self.aggregator.like, f"answer of client {client}")
        if self.settings.codec is not None and "update" in payload:
            payload["update"] = self.uplink.unpack(client, payload["update"].tobytes(), round)
        return Arrival(client, len(self.partition[client]), payload)

    def _evaluate_personal(self, round: int) -> tuple[float, float]:
        """Mean over the clients that answer of their own models on their own test data."""
        tested = self.algorithm.tested(len(self.partition))
        notes = {client: self._note(client, round) for client in tested}
        replies = self._post("evaluate", notes)
        values = [replies[client].values for client in tested if client in replies]
        figures = [(found["accuracy"], found["loss"]) for found in values]
        accuracy, loss = np.mean(figures, axis=0).tolist()
        return accuracy, loss


class ClientEnd:
    """What a client does with a note; one object can stand for all clients that share their data.

    Parameters
    ----------
    algorithm, model, data, settings, partition
        As in `run`, and the same as at the server.
    own : int, optional
        The one client that all training examples of `data` belong to, and all test examples.
    """

    def __init__(
        self,
        algorithm: str | Algorithm,
        model: str | torch.nn.Module,
        data: str | Path | Dataset,
        settings: Settings,
        *,
        partition: Sequence[np.ndarray] | None = None,
        own: int | None = None,
    ) -> None:
        self._own = own
        if own is not None:
            from flcore.simulation.datasets import load_dataset

            data = data if isinstance(data, Dataset) else load_dataset(data)
            partition = [np.zeros(1, np.int64)] * settings.clients
            partition[own] = np.arange(len(data.y_train))
        self._run = Simulation(algorithm, model, data, settings, partition=partition)

    def examples(self, client: int) -> int:
        """Give the number of training examples of a client."""
        return len(self._run.partition[client])

    def answer(self, kind: str, note: Note, state: State) -> Note:
        """Do what a note asks for.

        Parameters
        ----------
        kind : {"train", "evaluate", "remember"}
            Train and give the update, test the client's own model, or keep what was exchanged.
        note : Note
        state : State
            What the client keeps; changed in place.
        """
        if kind == "remember":
            state |= read_state(note)
            return Note()
        with threads(self._run.settings.threads):
            return self._answer(kind, note, state)

    def _answer(self, kind: str, note: Note, state: State) -> Note:
        run, id, round = self._run, int(note.values["client"]), int(note.values["round"])
        run.clients.states = {id: {k: v for k, v in state.items() if not k.startswith(UPLINK)}}
        client = run.clients.client(id, round)
        payload = read_payload(note, "model", run.aggregator.like, "message of the server")
        if kind == "evaluate":
            return self._evaluate(payload, client)
        reply = self._train(payload, client)
        if run.settings.codec is not None and "update" in reply.arrays:
            packed = self._pack(reply.arrays["update"]["vector"], id, round, state)
            reply.arrays["update"] = {"packet": packed}
        for name in [name for name in state if not name.startswith(UPLINK)]:
            del state[name]
        state |= client.state
        return reply

    def _train(self, payload: Payload, client: Client) -> Note:
        run = self._run
        seed = int(client.rng.integers(2**63))
        work = run.algorithm.client_begin(payload, client)
        view = run.clients.slowed(run.algorithm.data_view(client), client.id, client.round)
        (result,) = run.trainer.train([Job(client.id, work, view, seed)])
        values = {"loss": result.loss, "steps": result.steps, "num-examples": client.examples}
        if not math.isfinite(result.loss):
            return Note(values)
        sent = run.algorithm.client_end(result, client)
        like = {} if run.settings.codec is not None else run.aggregator.like
        return Note(values, parts(sent, "update", like))

    def _pack(self, update: Vector, id: int, round: int, state: State) -> np.ndarray:
        uplink = self._run.uplink
        kept = {k.removeprefix(UPLINK): v for k, v in state.items() if k.startswith(UPLINK)}
        uplink.load_state_dict({id: kept} if kept else {})
        packet = np.frombuffer(uplink.pack(id, update, round), np.uint8)
        state |= {UPLINK + name: value for name, value in uplink.state_dict()[id].items()}
        return packet

    def _evaluate(self, payload: Payload, client: Client) -> Note:
        run = self._run
        model = run.algorithm.own_model(payload, client)
        all_of_it = np.arange(len(run.data.y_test))
        mine = run._own_test[client.id] if self._own is None else all_of_it
        import torch

        x, y = torch.from_numpy(run.data.x_test[mine]), torch.from_numpy(run.data.y_test[mine])
        accuracy, loss = run.trainer.evaluate(model, x, y)
        return Note({"accuracy": accuracy, "loss": loss, "num-examples": len(mine)})


class _Unseen(Population):
    """Clients whose data nobody but they can see."""

    def client(self, id: int, round: int, purpose: Purpose = Purpose.LOCAL_TRAINING) -> Client:
        """Give a client without data."""
        client = super().client(id, round, purpose)
        return replace(client, tools=_NoData(), indices=np.empty(0, np.int64))


class _NoData:
    """Stands for the tools of a client whose data is not here."""

    def __getattr__(self, name: str) -> Any:
        raise InvalidInputError(
            f"algorithm: its exchange before the first round asks for `{name}` of the clients' "
            "data, which the server cannot see; give the data to the server, too, or choose an "
            "algorithm that needs no such exchange"
        )


def _check_one_way(algorithm: Algorithm) -> None:
    """Refuse what asks for more than one message each way, or for another model at each client."""
    for hook, what in (
        ("request", "asks the server a second time in a round"),
        ("architecture", "gives clients models of their own"),
    ):
        if getattr(type(algorithm), hook, None) is not getattr(Algorithm, hook, None):
            raise InvalidInputError(
                f"algorithm: {algorithm.name} {what}, for which clients must be in this process "
                "(flcore.simulation.run)"
            )


def setup_text(algorithm: str | Algorithm, settings: Settings) -> str:
    """Give as text what both ends must agree on."""
    chosen = create(algorithm) if isinstance(algorithm, str) else algorithm
    known = settings.to_dict()
    agreed = {"algorithm": chosen.to_dict(), **{name: known[name] for name in AGREED}}
    return json.dumps(agreed, sort_keys=True, default=str)
