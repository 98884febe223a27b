"""Algorithms of flcore as Flower apps: what `flcore.simulation.run` does, in Flower's messages.

`server_app` selects the participants, sends them what the algorithm sends, and takes the server's
step; `client_app` runs the local steps and keeps what a client keeps in Flower's `Context.state`.
Both take the arguments of `run`, and give its numbers: on Flower's simulation engine, and between
SuperLink and SuperNode processes.  Needs Flower and torch (``flcore[flower]``)::

    # app.py, named twice in the pyproject.toml of a Flower app
    from flcore.integrations.flower_algorithm import client_app, server_app
    from flcore.simulation import Settings

    setup = ("scaffold", "mlp", "digits", Settings(clients=50, participation=5))
    server, client = server_app(*setup, output="run"), client_app(*setup)
"""

from __future__ import annotations

import copy
import functools
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flcore import _extras
from flcore.algorithms import Algorithm
from flcore.errors import FlcoreError, InvalidInputError
from flcore.simulation.datasets import Dataset
from flcore.simulation.engine import threads
from flcore.simulation.history import History
from flcore.simulation.notes import Note, State, read_state, state_note
from flcore.simulation.remote import ClientEnd, RemoteRounds, setup_text
from flcore.simulation.rounds import Observer
from flcore.simulation.settings import Settings

if TYPE_CHECKING:
    import torch
    from flwr.app import Context, Message, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp

__all__ = ["NoAnswerError", "client_app", "server_app"]

VALUES = "flcore"
"""Name of the record of plain values; arrays are in records "model" or "update", and "rest"."""

STATE = "flcore-state"
"""Name of what a client keeps, in its `Context.state`."""

MESSAGE_TYPES = {
    "hello": "query.hello",
    "remember": "query.remember",
    "train": "train",
    "evaluate": "evaluate",
}

LOG = logging.getLogger("flcore.flower")


class NoAnswerError(FlcoreError, RuntimeError):
    """Clients that a run needs did not come, or none of those that were asked answered."""


@dataclass(frozen=True)
class _Setup:
    """Arguments of both apps."""

    algorithm: str | Algorithm
    model: str | torch.nn.Module
    data: Any
    settings: Settings
    partition: Sequence[np.ndarray] | None

    def own_model(self) -> Any:
        """Give the model for one end: training overwrites it."""
        return self.model if isinstance(self.model, str) else copy.deepcopy(self.model)


def server_app(
    algorithm: str | Algorithm = "fedavg",
    model: str | torch.nn.Module = "mlp",
    data: str | Path | Dataset = "digits",
    settings: Settings | None = None,
    *,
    partition: Sequence[np.ndarray] | None = None,
    own_data: bool = False,
    output: str | Path | None = None,
    observer: Observer | None = None,
    timeout: float = 3600.0,
    done: Callable[[History], None] | None = None,
) -> ServerApp:
    """Make the Flower server of a run.

    Parameters
    ----------
    algorithm, model, data, settings, partition, output, observer
        As in `flcore.simulation.run`.  The run-config key ``num-server-rounds`` overrides
        `Settings.rounds`.
    own_data : bool
        Clients bring their own data, see `client_app`; `data` is only tested on.
    timeout : float
        Seconds to wait for the nodes before the first round, and for answers in each round.  A
        client without an answer is left out of the round.
    done : callable, optional
        Called with the History of the run at its end.

    Returns
    -------
    flwr.serverapp.ServerApp
        Waits for `Settings.clients` nodes.  Client i is the node whose ``partition-id`` is i; where
        nodes have none, the i-th by number.  The final model is left in `Context.state` as
        "model".  It raises NoAnswerError if nodes are missing or none of those asked answers, and
        what `run` raises.

    Raises
    ------
    MissingDependencyError
        Without Flower.
    """
    app = _extras.require("flwr.serverapp", "flower").ServerApp()
    setup = _Setup(algorithm, model, data, settings or Settings(), partition)

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        rounds = int(context.run_config.get("num-server-rounds", setup.settings.rounds))
        chosen = replace(setup.settings, rounds=rounds)
        post = _FlowerPost(grid, timeout)
        counts = post.meet(chosen.clients, setup_text(algorithm, chosen), own_data)
        with threads(chosen.threads):
            run = RemoteRounds(
                algorithm,
                setup.own_model(),
                data,
                chosen,
                post=post,
                partition=partition,
                examples=counts if own_data else None,
            )
            history = run.run(output=output, observer=observer or Observer())
        context.state["model"] = _array_record(history.model)
        if done is not None:
            done(history)

    return app


def client_app(
    algorithm: str | Algorithm = "fedavg",
    model: str | torch.nn.Module = "mlp",
    data: str | Path | Dataset | Callable[[Context], Dataset] = "digits",
    settings: Settings | None = None,
    *,
    partition: Sequence[np.ndarray] | None = None,
    mods: Sequence[Callable[..., Any]] = (),
) -> ClientApp:
    """Make the Flower client of a run.

    Parameters
    ----------
    algorithm, model, data, settings, partition
        The same as at the server.  In the place of `data`, a function gives the Dataset of one
        client from its Flower `Context`; the server must then have ``own_data=True``.
    mods : list of Flower mods
        Run around every message.

    Returns
    -------
    flwr.clientapp.ClientApp
        Answers train, evaluate and query messages of `server_app`.  What a client keeps between
        rounds is in `Context.state` under "flcore-state".

    Raises
    ------
    MissingDependencyError
        Without Flower.
    """
    app = _extras.require("flwr.clientapp", "flower").ClientApp(mods=list(mods))
    setup = _Setup(algorithm, model, data, settings or Settings(), partition)
    token = uuid.uuid4().hex  # travels with the app: a worker knows it has met this one before

    @app.query("hello")
    def hello(message: Message, context: Context) -> Message:
        return _reply(message, _introduce(setup, _note(message.content), context))

    def answer(kind: str) -> Callable[[Message, Context], Message]:
        def handle(message: Message, context: Context) -> Message:
            note = _note(message.content)
            state = _load_state(context)
            with threads(setup.settings.threads):
                end = _end(setup, token, int(note.values["client"]), context)
                answered = end.answer(kind, note, state)
            _save_state(context, state)
            return _reply(message, answered)

        return handle

    app.query("remember")(answer("remember"))
    app.train()(answer("train"))
    app.evaluate()(answer("evaluate"))
    return app


# ---- client --------------------------------------------------------------------------------------


def _introduce(setup: _Setup, note: Note, context: Context) -> Note:
    """Say which client this is and how many examples it has, and that both ends agree."""
    ours = setup_text(setup.algorithm, setup.settings)
    if note.values["setup"] != ours:
        raise InvalidInputError(
            f"settings: server and clients must have the same algorithm and settings; the server "
            f"has {note.values['setup']}, this client {ours}"
        )
    id = int(context.node_config.get("partition-id", -1))
    examples = len(setup.data(context).y_train) if callable(setup.data) else 0
    return Note({"client": id, "examples": examples})


def _end(setup: _Setup, token: str, client: int, context: Context) -> ClientEnd:
    if callable(setup.data):
        data = setup.data(context)
        return ClientEnd(setup.algorithm, setup.own_model(), data, setup.settings, own=client)
    return _shared_end(_Known(token, setup))


@dataclass(frozen=True)
class _Known:
    """Makes a setup a key by its token alone."""

    token: str
    setup: _Setup

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Known) and other.token == self.token

    def __hash__(self) -> int:
        return hash(self.token)


@functools.lru_cache(maxsize=1)
def _shared_end(known: _Known) -> ClientEnd:
    """Load data and model once a process, for all clients that it simulates."""
    setup = known.setup
    return ClientEnd(
        setup.algorithm,
        setup.own_model(),
        setup.data,
        setup.settings,
        partition=setup.partition,
    )


def _load_state(context: Context) -> State:
    kept = {
        key.removeprefix(f"{STATE}."): record
        for key, record in context.state.items()
        if key.startswith(f"{STATE}.")
    }
    return read_state(_note(kept)) if kept else {}


def _save_state(context: Context, state: State) -> None:
    for key in [key for key in context.state if key.startswith(f"{STATE}.")]:
        del context.state[key]
    for key, record in _records(state_note(state)).items():
        context.state[f"{STATE}.{key}"] = record


# ---- server --------------------------------------------------------------------------------------


class _FlowerPost:
    """`flcore.simulation.remote.Post` over a Flower Grid."""

    def __init__(self, grid: Grid, timeout: float) -> None:
        self._grid, self._timeout = grid, timeout
        self._nodes: dict[int, int] = {}  # client -> node

    def meet(self, clients: int, setup: str, own_data: bool) -> list[int]:
        """Wait for the nodes, learn which client each of them is, and how many examples it has."""
        end = time.monotonic() + self._timeout
        while len(nodes := sorted(self._grid.get_node_ids())) < clients:
            if time.monotonic() > end:
                raise NoAnswerError(
                    f"clients: expected {clients} Flower nodes, {len(nodes)} came within "
                    f"{self._timeout:g} s"
                )
            time.sleep(0.2)
        self._nodes = dict(enumerate(nodes))
        met = self("hello", {number: Note({"setup": setup}) for number in self._nodes})
        told = {number: int(note.values["client"]) for number, note in met.items()}
        if any(id >= 0 for id in told.values()):
            by_id = {id: number for number, id in told.items()}
            missing = [id for id in range(clients) if id not in by_id]
            if missing or len(by_id) < len(told):
                raise NoAnswerError(
                    f"clients: expected nodes with every partition-id from 0 to {clients - 1} "
                    f"once, got {sorted(told.values())}"
                )
        elif len(met) < clients:
            raise NoAnswerError(f"clients: {len(met)} of {clients} nodes answered")
        else:
            by_id = dict(enumerate(sorted(met)))
        self._nodes = {id: nodes[by_id[id]] for id in range(clients)}
        counts = [int(met[by_id[id]].values["examples"]) for id in range(clients)]
        if own_data != any(counts):
            raise InvalidInputError(
                f"own_data: {own_data} at the server, but clients "
                f"{'bring' if any(counts) else 'do not bring'} their own data"
            )
        return counts

    def __call__(self, kind: str, notes: Mapping[int, Note]) -> dict[int, Note]:
        """Send, wait, and give the answers; NoAnswerError if there is none."""
        from flwr.app import Message

        of_node = {self._nodes[client]: client for client in notes}
        messages = [
            Message(
                content=_records(note),
                dst_node_id=self._nodes[client],
                message_type=MESSAGE_TYPES[kind],
                group_id=str(note.values.get("round", "")),
            )
            for client, note in notes.items()
        ]
        answers, reasons = {}, []
        for reply in self._grid.send_and_receive(messages, timeout=self._timeout):
            client = of_node[reply.metadata.src_node_id]
            if reply.has_error():
                reasons.append(f"client {client}: {reply.error.reason}")
                LOG.warning("%s: no answer of %s", kind, reasons[-1])
            else:
                answers[client] = _note(reply.content)
        if not answers:
            why = reasons[0] if reasons else f"nothing came within {self._timeout:g} s"
            raise NoAnswerError(f"{kind}: none of {len(notes)} clients answered; {why}")
        return answers


# ---- notes as Flower's records -------------------------------------------------------------------


def _records(note: Note) -> RecordDict:
    from flwr.app import ConfigRecord, RecordDict

    records: Any = {VALUES: ConfigRecord(dict(note.values))}
    return RecordDict(records | {key: _array_record(part) for key, part in note.arrays.items()})


def _array_record(arrays: Mapping[str, np.ndarray]) -> Any:
    from flwr.app import Array, ArrayRecord

    return ArrayRecord({name: Array(np.asarray(array)) for name, array in arrays.items()})


def _note(records: Mapping[str, Any]) -> Note:
    values = {key: value for key, value in records.items() if key == VALUES}
    return Note(
        dict(values[VALUES]),
        {
            key: {name: array.numpy() for name, array in record.items()}
            for key, record in records.items()
            if key != VALUES
        },
    )


def _reply(message: Message, note: Note) -> Message:
    from flwr.app import Message as FlowerMessage

    return FlowerMessage(content=_records(note), reply_to=message)
