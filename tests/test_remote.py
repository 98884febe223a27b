"""Runs whose clients live elsewhere: the same numbers as a run in one process."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest

from flcore.errors import InvalidInputError
from support import HAS_TORCH

if not HAS_TORCH:
    pytest.skip("needs torch", allow_module_level=True)

from flcore.algorithms import create
from flcore.compression import EF14, Rotated, TopK
from flcore.simulation import Dataset, DivergedError, Observer, Settings, load_dataset, run
from flcore.simulation.notes import Note, read_state, state_note
from flcore.simulation.remote import ClientEnd, RemoteRounds, setup_text

DIGITS = load_dataset("digits")
SMALL = {"rounds": 4, "clients": 12, "participation": 4, "alpha": 0.3}
DENSE = Settings(**SMALL, codec=None, feedback=None, execution="sequential")


class Mail:
    """Notes as bytes, one state a client, and clients that can fail to answer."""

    def __init__(self, end, lost=()):
        self.end, self.lost = end, set(lost)
        self.states, self.log = {}, []

    def __call__(self, kind, notes):
        answers = {}
        for client, note in notes.items():
            self.log.append((kind, client))
            if client in self.lost:
                continue
            note = pickle.loads(pickle.dumps(note))
            state = read_state(self.states.get(client, state_note({})))
            end = self.end(client) if callable(self.end) else self.end
            answers[client] = pickle.loads(pickle.dumps(end.answer(kind, note, state)))
            self.states[client] = state_note(state)
        return answers


def remote(algorithm, settings=DENSE, *, lost=(), **more):
    end = ClientEnd(algorithm, "mlp", DIGITS, settings)
    mail = Mail(end, lost)
    rounds = RemoteRounds(algorithm, "mlp", DIGITS, settings, post=mail, **more)
    return rounds.run(observer=Observer()), mail


def same(history, other, exact=True):
    assert len(history) == len(other) > 0
    for a, b in zip(history, other, strict=True):
        assert (a.clients, a.accuracy, a.train_loss) == (b.clients, b.accuracy, b.train_loss)
    for name, value in history.model.items():
        np.testing.assert_array_equal(value, other.model[name])


QUICK = {"local_epochs": 2}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fedavg", {}),
        ("fedavg", {"relaxation": 0.1, "selection": "bernoulli"}),
        ("scaffold", {}),
        ("scaffold", {"weighting": "examples"}),  # learns the mean size before the first round
        ("feddyn", {}),
        ("fednova", {}),
        ("fedyogi", {}),
        ("fedsmoo", {}),
        ("moon", {}),
    ],
)
def test_equal_to_a_run_in_one_process(name, options):
    algorithm = create(name, **QUICK, **options)
    here = run(algorithm, "mlp", DIGITS, DENSE)
    there, _ = remote(algorithm)
    same(there, here)


@pytest.mark.parametrize(
    "more",
    [
        {"codec": TopK(ratio=0.1), "feedback": EF14()},
        {"codec": TopK(ratio=0.1)},  # EControl: the server keeps a control vector
        {"codec": Rotated(bits=2), "feedback": None},
        {"codec": None, "feedback": None, "dropout": 0.4, "stragglers": 0.5, "label_noise": 0.2},
    ],
    ids=["ef14", "econtrol", "rotated", "faults"],
)
def test_codecs_and_faults_as_in_one_process(more):
    settings = Settings(**SMALL, **more, execution="sequential")
    algorithm = create("fedavg", **QUICK)
    there, mail = remote(algorithm, settings)
    same(there, run(algorithm, "mlp", DIGITS, settings))
    kept = [name for note in mail.states.values() for name in read_state(note)]
    assert any(name.startswith("uplink.") for name in kept) == (settings.codec is not None)


def test_clients_test_their_own_models():
    algorithm = create("fedbn", **QUICK)
    here = run(algorithm, "mlp-bn", DIGITS, DENSE)
    mail = Mail(ClientEnd(algorithm, "mlp-bn", DIGITS, DENSE))
    there = RemoteRounds(algorithm, "mlp-bn", DIGITS, DENSE, post=mail).run(observer=Observer())
    same(there, here)
    assert mail.log.count(("evaluate", 11)) == DENSE.rounds


def test_what_was_exchanged_before_the_first_round_goes_to_the_clients():
    class Exchanging(type(create("fedavg"))):
        def one_time_exchange(self, server, clients):
            for client in clients:
                client.state |= {"mean": client.tools.x.numpy().mean(0).ravel(), "id": client.id}
            return None

    _, mail = remote(Exchanging(local_epochs=1))
    assert mail.log[:12] == [("remember", client) for client in range(12)]
    state = read_state(mail.states[3])
    assert state["id"] == 3 and state["mean"].shape == (64,)


def test_clients_bring_their_own_data():
    algorithm = create("scaffold", weighting="examples", **QUICK)
    here = run(algorithm, "mlp", DIGITS, DENSE)
    # the same examples in the same order, but nobody else has them
    full = RemoteRounds(algorithm, "mlp", DIGITS, DENSE, post=Mail(None))
    parts = full.partition

    def end(client):
        x, y = (getattr(DIGITS, name)[parts[client]] for name in ("x_train", "y_train"))
        own = Dataset("own", x, y, x, y, DIGITS.classes)
        return ClientEnd(algorithm, "mlp", own, DENSE, own=client)

    sizes = [len(part) for part in parts]
    rounds = RemoteRounds(algorithm, "mlp", DIGITS, DENSE, post=Mail(end), examples=sizes)
    same(rounds.run(observer=Observer()), here)


def test_an_exchange_that_needs_data_says_so_where_there_is_none():
    algorithm = create("curriculum", client_ordering="curr")
    rounds = RemoteRounds(algorithm, "mlp", DIGITS, DENSE, post=Mail(None), examples=[10] * 12)
    with pytest.raises(InvalidInputError, match="of the clients' data, which the server cannot"):
        rounds.run(observer=Observer())


def test_clients_that_do_not_answer_are_left_out():
    there, _ = remote(create("fedavg", **QUICK), lost=range(0, 12, 2))
    assert all(client % 2 for record in there for client in record.clients)
    assert there.accuracy > 0.5
    nobody, _ = remote(create("fedavg", **QUICK), lost=range(12))
    assert [record.clients for record in nobody] == [()] * 4
    np.testing.assert_array_equal(nobody.model["1.bias"], np.zeros(64))


def test_a_diverging_client_stops_the_run_by_name():
    with pytest.raises(DivergedError, match=r"loss of client \d+ in round 1 is not finite"):
        remote(create("fedavg", local_lr=1e30, clip=None))


def test_a_message_of_another_model_is_refused():
    end = ClientEnd("fedavg", "wide", DIGITS, DENSE)
    rounds = RemoteRounds("fedavg", "mlp", DIGITS, DENSE, post=Mail(end))
    with pytest.raises(
        InvalidInputError, match=r"message of the server: model: expected 1\.weight"
    ):
        rounds.run(observer=Observer())


@pytest.mark.parametrize(
    "more", [{"attack": "sign-flip", "attackers": 2}, {"base_bits": 4, "lora": 2}], ids=str
)
def test_what_needs_one_process_is_refused(more):
    settings = Settings(**SMALL, **more)
    with pytest.raises(InvalidInputError, match="for clients in this process"):
        RemoteRounds("fedavg", "mlp", DIGITS, settings, post=Mail(None))


def test_bytes_are_those_of_the_arrays():
    there, _ = remote(create("scaffold", **QUICK))
    vector = 4 * 4810
    assert there[0].bytes_down == 4 * 2 * vector  # model and control
    assert there[0].bytes_up == 4 * (vector + 8)  # update and number of steps


def test_setups_differ_where_both_ends_must_agree():
    one = setup_text("fedavg", DENSE)
    assert json.loads(one)["algorithm"]["name"] == "fedavg"
    assert one != setup_text("scaffold", DENSE)
    assert one != setup_text(
        "fedavg", Settings(**{**SMALL, "alpha": 0.4}, codec=None, feedback=None)
    )
    longer = Settings(**{**SMALL, "rounds": 9}, codec=None, feedback=None)
    assert one == setup_text("fedavg", longer)
    assert Note().nbytes == 0


@pytest.mark.parametrize("name", ["ddome", "fedfree"])
def test_algorithms_with_more_than_a_message_each_way_are_refused(name):
    with pytest.raises(InvalidInputError, match=f"{name} (asks|gives).* must be in this process"):
        RemoteRounds(name, "mlp", DIGITS, DENSE, post=Mail(None))
