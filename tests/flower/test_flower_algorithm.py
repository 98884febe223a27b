"""Algorithms as Flower apps: the numbers of a run in one process, message by message."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("flwr", reason="needs Flower: tests/flower.sh")
pytest.importorskip("torch")

from flower_grid import LocalGrid, serve
from flwr.app import ArrayRecord

from flcore.algorithms import create
from flcore.compression import EF14, TopK
from flcore.errors import InvalidInputError
from flcore.integrations.flower_algorithm import NoAnswerError, client_app, server_app
from flcore.simulation import Dataset, DivergedError, Settings, load_dataset, run
from flcore.simulation.remote import RemoteRounds

DIGITS = load_dataset("digits")
SMALL = {"rounds": 3, "clients": 10, "participation": 3, "alpha": 0.3}
DENSE = Settings(**SMALL, codec=None, feedback=None, execution="sequential")


def both(algorithm, settings=DENSE, *, model="mlp", data=DIGITS, grid=None, **server):
    """Run both apps on a grid in this process; give history, grid and the server's Context."""
    histories = []
    grid = LocalGrid(client_app(algorithm, model, data, settings), 10, **(grid or {}))
    data = DIGITS if callable(data) else data
    app = server_app(algorithm, model, data, settings, done=histories.append, **server)
    context = serve(app, grid)
    return histories[0], grid, context


def same(there, here):
    assert len(there) == len(here) > 0
    for a, b in zip(there, here, strict=True):
        assert (a.clients, a.accuracy, a.train_loss) == (b.clients, b.accuracy, b.train_loss)
    for name, value in here.model.items():
        np.testing.assert_array_equal(there.model[name], value)


@pytest.mark.parametrize("name", ["fedavg", "scaffold", "feddyn"])
def test_equal_to_a_run_in_one_process(name):
    algorithm = create(name, local_epochs=2)
    here = run(algorithm, "mlp", DIGITS, DENSE)
    there, _, context = both(algorithm)
    same(there, here)
    for name, array in context.state["model"].items():
        np.testing.assert_array_equal(array.numpy(), here.model[name])


@pytest.mark.parametrize("more", [{"codec": TopK(ratio=0.1), "feedback": EF14()}, {}], ids=str)
def test_packets_and_error_control(more):
    settings = Settings(**SMALL, **more, execution="sequential")  # by default EControl
    algorithm = create("fedavg", local_epochs=2)
    there, grid, _ = both(algorithm, settings)
    same(there, run(algorithm, "mlp", DIGITS, settings))
    assert there.bytes_up < there.bytes_down / 5
    kept = [key for context in grid.contexts.values() for key in context.state]
    assert "flcore-state.state" in kept


def test_personal_models_are_tested_where_they_are():
    algorithm = create("fedbn", local_epochs=2)
    here = run(algorithm, "mlp-bn", DIGITS, DENSE)
    same(both(algorithm, model="mlp-bn")[0], here)


def test_messages_hold_named_arrays():
    _, grid, _ = both(create("scaffold", local_epochs=1))
    content = next(m for m in grid.sent if m.metadata.message_type == "train").content
    assert isinstance(content["model"], ArrayRecord)
    assert {k: a.shape for k, a in content["model"].items()} == {
        "1.weight": (64, 64),
        "1.bias": (64,),
        "3.weight": (10, 64),
        "3.bias": (10,),
    }
    assert list(content["rest"]) == ["control"]
    assert content["flcore"]["round"] == 0


def test_what_a_client_keeps_is_in_its_context():
    history, grid, _ = both(create("scaffold", local_epochs=1))
    drawn = {client for record in history for client in record.clients}
    for context in grid.contexts.values():
        client = context.node_config["partition-id"]
        assert ("flcore-state.state" in context.state) == (client in drawn)
        if client in drawn:
            control = context.state["flcore-state.state"]["control"].numpy()
            assert control.shape == (4810,) and np.abs(control).max() > 0


def test_nodes_without_partition_ids_are_numbered():
    algorithm = create("scaffold", local_epochs=1)
    there, _, _ = both(algorithm, grid={"partition_ids": None})
    same(there, run(algorithm, "mlp", DIGITS, DENSE))


def test_clients_bring_their_own_data():
    algorithm = create("scaffold", weighting="examples", local_epochs=1)
    partition = RemoteRounds(algorithm, "mlp", DIGITS, DENSE, post=None).partition

    def mine(context):
        part = partition[context.node_config["partition-id"]]
        x, y = DIGITS.x_train[part], DIGITS.y_train[part]
        return Dataset("mine", x, y, x, y, DIGITS.classes)

    there, _, _ = both(algorithm, data=mine, own_data=True)
    same(there, run(algorithm, "mlp", DIGITS, DENSE))
    with pytest.raises(InvalidInputError, match="own_data: False at the server, but clients bring"):
        both(algorithm, data=mine)
    with pytest.raises(InvalidInputError, match="clients do not bring their own data"):
        both(algorithm, own_data=True)


def test_a_client_without_an_answer_is_left_out():
    history, _, _ = both(create("fedavg", local_epochs=1), grid={"lost": range(0, 10, 2)})
    assert all(client % 2 for record in history for client in record.clients)


def test_no_answer_at_all_is_an_error_with_the_first_reason():
    with pytest.raises(NoAnswerError, match="train: none of 3 clients answered; nothing came"):
        both(create("fedavg"), grid={"lost": range(10)})
    other = client_app(create("fedavg", local_lr=0.2), "mlp", DIGITS, DENSE)
    app = server_app(create("fedavg"), "mlp", DIGITS, DENSE)
    with pytest.raises(NoAnswerError, match="settings: server and clients must have the same"):
        serve(app, LocalGrid(other, 10))


def test_missing_and_repeated_clients_are_named():
    grid = LocalGrid(client_app("fedavg", "mlp", DIGITS, DENSE), 9)
    with pytest.raises(NoAnswerError, match=r"expected 10 Flower nodes, 9 came within 0\.1 s"):
        serve(server_app("fedavg", "mlp", DIGITS, DENSE, timeout=0.1), grid)
    with pytest.raises(NoAnswerError, match="every partition-id from 0 to 9"):
        both("fedavg", grid={"partition_ids": [0, *range(9)]})


def test_divergence_names_round_and_client():
    with pytest.raises(DivergedError, match=r"loss of client \d in round 1 is not finite"):
        both(create("fedavg", local_lr=1e30, clip=None, local_epochs=1))


def test_rounds_of_the_run_config_and_output_folder(tmp_path):
    app = server_app("fedavg", "mlp", DIGITS, DENSE, output=tmp_path / "run")
    grid = LocalGrid(client_app("fedavg", "mlp", DIGITS, DENSE), 10)
    serve(app, grid, **{"num-server-rounds": 2})
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "run" / "model.safetensors").is_file()
