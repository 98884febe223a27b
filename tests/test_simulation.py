"""The simulation engine: what it learns, what it counts, how it stops, resumes and refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from flcore.algorithms import FedAvg
from flcore.compression import EF14, EF21, EControl, TopK
from flcore.errors import InvalidInputError, MissingDependencyError, PacketError
from flcore.simulation import (
    CheckpointError,
    Dataset,
    DivergedError,
    Observer,
    Settings,
    Simulation,
    load_dataset,
    run,
)
from flcore.simulation.history import History

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")

SHORT = FedAvg(local_epochs=1)
UPLINKS = {
    "dense": {"codec": None, "feedback": None},
    "topk": {"codec": TopK(ratio=0.1), "feedback": None},
    "ef14": {"codec": TopK(ratio=0.1), "feedback": EF14()},
    "econtrol": {"codec": TopK(ratio=0.1), "feedback": EControl()},
    "ef21": {"codec": TopK(ratio=0.1), "feedback": EF21(momentum=0.5)},
    "warm": {"codec": TopK(ratio=0.1), "feedback": EControl(), "start": "dense"},
    "paper": {"codec": TopK(ratio=0.1), "feedback": EControl(), "control_step": "paper"},
}


class StopAfter(Observer):
    """Stops a run after a number of rounds."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds

    def round_done(self, record) -> None:
        self.rounds -= 1

    def should_stop(self) -> bool:
        return self.rounds <= 0


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits")


def untimed(history: History) -> list[dict]:
    """All metrics but the times."""
    records = [json.loads(record.to_json()) for record in history]
    for record in records:
        del record["seconds"]
    return records


def flat(model: dict) -> np.ndarray:
    """All values of a model, an update or a control vector."""
    return np.concatenate([value.ravel() for value in model.values()])


def assert_same_model(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


# ---- learning ----


def test_the_default_run_passes_ninety_percent(digits):
    history = run("fedavg", "mlp", digits, Settings(seed=1))
    assert history.complete and len(history) == 80
    assert history.accuracy > 0.94
    assert history.mean_accuracy(last=10) > 0.94
    assert 8 < history.rounds_to(0.9) < 40


@pytest.mark.parametrize("uplink", UPLINKS)
def test_every_uplink_learns(uplink, digits):
    settings = Settings(rounds=30, alpha=None, **UPLINKS[uplink])
    assert run(FedAvg(local_epochs=4), "mlp", digits, settings).accuracy > 0.85


@pytest.mark.parametrize("step", ["paper", "saga"])
def test_econtrol_that_sends_everything_is_fedavg_when_all_take_part(step, digits):
    everyone = {"rounds": 3, "clients": 10, "participation": 1.0}
    settings = Settings(codec=TopK(ratio=1.0), control_step=step, **everyone)
    controlled = run(SHORT, "mlp", digits, settings)
    plain = run(SHORT, "mlp", digits, Settings(codec=None, feedback=None, **everyone))
    for name in plain.model:
        np.testing.assert_allclose(controlled.model[name], plain.model[name], atol=2e-6)


def test_server_control_is_the_mean_of_what_all_clients_hold(digits):
    # absent clients count with what they said last, clients never seen with zero
    settings = Settings(clients=8, participation=3, control_step="paper")
    simulation = Simulation(SHORT, "mlp", digits, settings)
    for _ in range(5):
        before = simulation.history.model
        simulation.step()
    states = simulation.uplink.state_dict()
    assert 3 < len(states) <= 8
    now = SHORT.lr(4)  # absent clients hold h in the units of their last round
    mean = sum(state["h"] * (now / state["unit"]) for state in states.values()) / 8
    np.testing.assert_allclose(flat(simulation.aggregator.control), mean, atol=1e-6)
    for name, value in simulation.history.model.items():  # and the paper's step is along it
        np.testing.assert_array_equal(value, before[name] + simulation.aggregator.control[name])


@pytest.mark.parametrize("participants", [1, 3, 8])
@pytest.mark.parametrize("step", ["paper", "saga"])
def test_what_was_not_sent_is_only_late(step, participants, digits):
    # the model and all kept errors move along H and the news of those present, none of it lost:
    # weighted 1/S, an unbiased estimate of the mean update, by saga, and 1/N by the paper's step
    settings = Settings(
        clients=8, participation=participants, codec=TopK(ratio=0.05), control_step=step
    )
    algorithm = FedAvg(local_epochs=1, lr_decay=1.0, weighting="uniform")
    simulation = Simulation(algorithm, "mlp", digits, settings)
    uplink, updates = simulation.uplink, {}
    pack = uplink.pack

    def noted(client, update, round):
        updates[client] = update.copy()
        return pack(client, update, round)

    uplink.pack = noted
    share = 1 / (participants if step == "saga" else 8)
    for _ in range(6):
        updates.clear()
        model, control = simulation.server.model.copy(), flat(simulation.aggregator.control)
        before = uplink.state_dict()
        simulation.step()
        assert len(updates) == participants
        news = sum(u - (before[i]["h"] if i in before else 0) for i, u in updates.items())
        after = uplink.state_dict()
        late = sum(a["e"] - (before[i]["e"] if i in before else 0) for i, a in after.items())
        moved = simulation.server.model + share * late - model
        np.testing.assert_allclose(moved, control + share * news, atol=1e-6)


def test_both_control_steps_are_one_when_all_take_part(digits):
    everyone = {"rounds": 4, "clients": 10, "participation": 10, "codec": TopK(ratio=0.05)}
    paper, saga = (
        run(SHORT, "mlp", digits, Settings(control_step=step, **everyone))
        for step in ("paper", "saga")
    )
    for name in paper.model:
        np.testing.assert_allclose(paper.model[name], saga.model[name], atol=1e-6)
    few = Settings(**{**everyone, "participation": 5})
    assert few.control_step == "saga"
    assert not np.allclose(
        flat(run(SHORT, "mlp", digits, few).model),
        flat(run(SHORT, "mlp", digits, replace(few, control_step="paper")).model),
        atol=1e-4,
    )


def test_convolutions_learn_on_images(tmp_path):
    # two kinds of image, a bright and a dark half, with noise
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 260)
    images = rng.integers(0, 100, (260, 8, 8, 3))
    images[labels == 1, :4] += 100
    file = tmp_path / "halves.npz"
    np.savez(
        file,
        x_train=images[:200].astype(np.uint8),
        y_train=labels[:200],
        x_test=images[200:].astype(np.uint8),
        y_test=labels[200:],
        classes=np.array(["dark", "bright"]),
    )
    data = load_dataset(file)
    assert data.example_shape == (3, 8, 8) and data.classes == ("dark", "bright")
    np.testing.assert_allclose(data.x_train.mean(axis=(0, 2, 3)), 0, atol=1e-4)
    settings = Settings(rounds=5, clients=4, participation=2, alpha=1.0)
    assert run(FedAvg(local_epochs=2), "cnn", file, settings).accuracy > 0.9


def test_a_model_and_a_partition_of_ones_own(digits):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.1), torch.nn.Linear(64, 10))
    partition = np.array_split(np.arange(1000), [100, 400])
    settings = Settings(rounds=4, clients=3, participation=3)
    history = run(FedAvg(), model, digits, settings, partition=partition)
    assert history.accuracy > 0.8
    assert history.config["model"] == {"name": "Sequential", "parameters": 650}
    assert history.config["dataset"]["examples_per_client"] == [100, 600]


# ---- counting ----


def test_bytes_are_those_of_the_messages(digits):
    sent = []

    class Spy(Simulation):
        def _receive(self, clients, messages, round):
            sent.extend(len(update) + len(rest) for update, rest in messages)
            return super()._receive(clients, messages, round)

    simulation = Spy(SHORT, "mlp", digits, Settings(clients=10, participation=4))
    record = simulation.step()
    assert len(sent) == 4 and record.bytes_up == sum(sent)
    # 481 values of 4 bytes and one bit for each of 4,810 coordinates, and headers
    assert 4 * (481 * 4 + 4810 // 8) < record.bytes_up < 4 * (481 * 4 + 4810 // 8 + 300)
    assert record.bytes_down == 4 * 4 * 4810
    assert len(record.clients) == len(set(record.clients)) == 4


def test_an_uncompressed_message_has_four_bytes_a_parameter(digits):
    settings = Settings(rounds=2, clients=10, participation=4, **UPLINKS["dense"])
    history = run(SHORT, "mlp", digits, settings)
    assert history.bytes_up == history.bytes_down == 2 * 4 * 4 * 4810


def test_a_packet_of_another_round_or_state_is_refused(digits):
    simulation = Simulation(SHORT, "mlp", digits, Settings(clients=4, participation=2))
    update = np.ones_like(simulation.server.model)
    message = simulation.uplink.pack(0, update, 0)
    with pytest.raises(PacketError, match="client 0: round: expected 1, got 0"):
        simulation.uplink.unpack(0, message, 1)
    simulation.uplink.unpack(0, message, 0)
    with pytest.raises(PacketError, match="client 0: epoch: expected 1, got 0"):
        simulation.uplink.unpack(0, message, 0)  # the same packet a second time
    with pytest.raises(PacketError):
        simulation.uplink.unpack(0, message[:-1], 0)


@pytest.mark.parametrize(("participation", "count"), [(5, 5), (1, 1), (0.1, 5), (1.0, 50)])
def test_participation_is_a_count_or_a_share(participation, count):
    assert Settings(participation=participation).participants == count


@pytest.mark.parametrize("loss", ["softmax", "stablemax"])
@pytest.mark.parametrize("optimizer", ["sgd", "perpgrad"])
def test_losses_and_optimizers_learn(optimizer, loss, digits):
    settings = Settings(
        rounds=12, clients=10, alpha=None, codec=None, feedback=None, loss=loss, optimizer=optimizer
    )
    history = run(FedAvg(local_epochs=4), "mlp", digits, settings)
    assert history.accuracy > 0.85
    assert history.config["settings"]["loss"] == loss
    assert history.config["settings"]["optimizer"] == optimizer


def test_local_steps_use_the_loss_and_the_projection_that_were_asked_for(digits):
    from flcore.losses import stablemax_cross_entropy
    from flcore.optim import perp_grad_

    everyone = {"rounds": 1, "clients": 1, "participation": 1, "codec": None, "feedback": None}
    settings = Settings(loss="stablemax", optimizer="perpgrad", **everyone)
    algorithm = FedAvg(local_epochs=1, batch_size=len(digits.y_train), clip=None, weight_decay=0.1)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    by_hand = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    by_hand.load_state_dict(model.state_dict())
    history = run(algorithm, model, digits, settings)
    scores = by_hand(torch.from_numpy(digits.x_train))
    loss = stablemax_cross_entropy(scores, torch.from_numpy(digits.y_train))
    loss.backward()
    perp_grad_(by_hand.parameters())
    for name, p in by_hand.named_parameters():  # decay is not projected
        want = p - 0.1 * (p.grad + 0.1 * p)
        np.testing.assert_allclose(history.model[name], want.detach(), rtol=1e-4, atol=1e-6)
    assert history.records[0].train_loss == pytest.approx(loss.item(), rel=1e-5)


def test_softmax_and_plain_steps_are_the_default(digits):
    settings = Settings(rounds=2)
    assert (settings.loss, settings.optimizer) == ("softmax", "sgd")
    named = Settings(rounds=2, loss="softmax", optimizer="sgd")
    assert_same_model(*(run(SHORT, "mlp", digits, s).model for s in (settings, named)))


def test_a_run_from_before_there_were_losses_goes_on(digits, tmp_path):
    run(SHORT, "mlp", digits, Settings(rounds=1), output=tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["settings"]["loss"], config["settings"]["optimizer"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    other = Settings(rounds=2, optimizer="perpgrad")
    with pytest.raises(CheckpointError, match=r"settings\.optimizer: 'sgd' there, 'perpgrad' now"):
        run(SHORT, "mlp", digits, other, output=tmp_path, resume=True)
    assert len(run(SHORT, "mlp", digits, Settings(rounds=2), output=tmp_path, resume=True)) == 2


def test_accumulating_otherwise_changes_little(digits):
    models = [
        run(SHORT, "mlp", digits, Settings(rounds=2, accumulate=dtype)).model
        for dtype in ("float32", "float64", "reproducible")
    ]
    for model in models[1:]:
        for name in model:
            np.testing.assert_allclose(model[name], models[0][name], atol=1e-5)


# ---- the same again ----


def test_the_same_seed_gives_the_same_bits(digits):
    a, b, c = (run(SHORT, "mlp", digits, Settings(rounds=3, seed=s)) for s in (4, 4, 5))
    assert_same_model(a.model, b.model)
    assert untimed(a) == untimed(b) != untimed(c)


@pytest.mark.parametrize("uplink", UPLINKS)
def test_a_stopped_run_goes_on_bit_for_bit(uplink, digits, tmp_path):
    settings = Settings(rounds=6, clients=12, participation=3, **UPLINKS[uplink])
    straight = run(SHORT, "mlp", digits, settings, output=tmp_path / "a")
    stopped = run(SHORT, "mlp", digits, settings, output=tmp_path / "b", observer=StopAfter(3))
    assert len(stopped) == 3 and not stopped.complete
    assert not (tmp_path / "b" / "model.safetensors").exists()
    resumed = run(SHORT, "mlp", digits, settings, output=tmp_path / "b", resume=True)
    assert untimed(resumed) == untimed(straight)
    assert_same_model(resumed.model, straight.model)
    for name in ("model.safetensors", "checkpoint.safetensors"):
        assert (tmp_path / "a" / name).stat().st_size == (tmp_path / "b" / name).stat().st_size
    model = [(tmp_path / run / "model.safetensors").read_bytes() for run in "ab"]
    assert model[0] == model[1]


def test_a_killed_run_goes_on_from_its_last_checkpoint(digits, tmp_path):
    settings = Settings(rounds=5, checkpoint_every=2)

    class Killed(StopAfter):
        def should_stop(self) -> bool:
            if self.rounds <= 0:
                raise KeyboardInterrupt
            return False

    with pytest.raises(KeyboardInterrupt):  # in round 4, which leaves no trace
        run(SHORT, "mlp", digits, settings, output=tmp_path / "b", observer=Killed(4))
    metrics = tmp_path / "b" / "metrics.jsonl"
    assert len(metrics.read_text().splitlines()) == 3
    metrics.write_text(metrics.read_text() + '{"round": 4, "accu')  # torn off while writing
    resumed = run(SHORT, "mlp", digits, settings, output=tmp_path / "b", resume=True)
    straight = run(SHORT, "mlp", digits, settings)
    assert untimed(resumed) == untimed(straight)
    assert_same_model(resumed.model, straight.model)
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2, 3, 4, 5]


def test_a_complete_run_can_be_made_longer(digits, tmp_path):
    short, long = Settings(rounds=2), Settings(rounds=4)
    run(SHORT, "mlp", digits, short, output=tmp_path)
    longer = run(SHORT, "mlp", digits, long, output=tmp_path, resume=True)
    assert untimed(longer) == untimed(run(SHORT, "mlp", digits, long))
    with pytest.raises(CheckpointError, match="holds 4 rounds already, more than the 2 asked for"):
        run(SHORT, "mlp", digits, short, output=tmp_path, resume=True)


def test_resuming_what_never_reached_a_checkpoint_starts_anew(digits, tmp_path):
    settings = Settings(rounds=2)
    run(SHORT, "mlp", digits, settings, output=tmp_path)
    (tmp_path / "checkpoint.safetensors").unlink()
    assert len(run(SHORT, "mlp", digits, settings, output=tmp_path, resume=True)) == 2


def test_threads_and_random_state_are_left_as_they_were(digits):
    torch.manual_seed(3)
    expected, threads = torch.rand(1).item(), torch.get_num_threads()
    torch.manual_seed(3)
    run(SHORT, "mlp", digits, Settings(rounds=1, threads=1))
    assert torch.rand(1).item() == expected
    assert torch.get_num_threads() == threads


# ---- refusals ----


def test_an_occupied_folder_needs_resume(digits, tmp_path):
    run(SHORT, "mlp", digits, Settings(rounds=1), output=tmp_path)
    with pytest.raises(CheckpointError, match="already holds a run; resume it, or choose another"):
        run(SHORT, "mlp", digits, Settings(rounds=1), output=tmp_path)


def test_files_of_unknown_origin_are_left_alone(digits, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("precious")
    with pytest.raises(CheckpointError, match=r"holds metrics\.jsonl but no config\.json"):
        run(SHORT, "mlp", digits, Settings(rounds=1), output=tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == "precious"


def test_a_different_run_is_not_resumed(digits, tmp_path):
    run(SHORT, "mlp", digits, Settings(rounds=1), output=tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(CheckpointError) as caught:
        run(SHORT, "mlp", digits, Settings(rounds=2, seed=9), output=tmp_path, resume=True)
    assert "settings.seed: 0 there, 9 now" in str(caught.value)
    assert "rounds" not in str(caught.value)
    with pytest.raises(CheckpointError, match=r"algorithm\.local_lr: 0\.1 there, 0\.2 now"):
        other = FedAvg(local_epochs=1, local_lr=0.2)
        run(other, "mlp", digits, Settings(rounds=2), output=tmp_path, resume=True)
    assert (tmp_path / "config.json").read_bytes() == before


def test_a_broken_checkpoint_is_reported(digits, tmp_path):
    run(SHORT, "mlp", digits, Settings(rounds=1), output=tmp_path)
    file = tmp_path / "checkpoint.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        run(SHORT, "mlp", digits, Settings(rounds=2), output=tmp_path, resume=True)


def test_resume_needs_a_folder(digits):
    with pytest.raises(CheckpointError, match="give the folder"):
        run(SHORT, "mlp", digits, Settings(rounds=1), resume=True)


def test_divergence_names_the_client_and_the_round(digits):
    wild = FedAvg(local_epochs=1, local_lr=1e20, clip=None)
    with pytest.raises(DivergedError, match=r"round 1 is not finite; lower the local") as caught:
        run(wild, "mlp", digits, Settings(rounds=3))
    assert caught.value.round == 1 and caught.value.client in range(50)


def test_divergence_of_the_server_is_found(digits):
    wild = FedAvg(local_epochs=1, server_lr=1e38)
    with pytest.raises(DivergedError, match="diverged"):
        run(wild, "mlp", digits, Settings(rounds=5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"participation": 0}, "participation: expected a whole number from 1, got 0"),
        ({"participation": 51}, "participation: 51 clients a round, but there are only 50"),
        ({"participation": 0.0}, "participation: expected a fraction above 0"),
        ({"participation": 1.5}, "participation: expected a fraction above 0"),
        ({"rounds": 0}, "rounds: expected a whole number from 1"),
        ({"seed": -1}, "seed: expected a whole number from 0"),
        ({"alpha": 0.0}, "alpha: expected a positive number"),
        ({"codec": None}, "feedback: EControl corrects what a codec leaves out"),
        ({"accumulate": "float16"}, "accumulate: expected one of float32, float64, reproducible"),
        ({"feedback": EF14(), "control_step": "paper"}, "control_step: 'paper' is for EControl"),
        ({"control_step": "sag"}, "control_step: expected one of saga, paper"),
        ({"feedback": EF14(), "start": "dense"}, "start: 'dense' is for EControl and EF21"),
        ({"start": "warm"}, "start: expected one of zero, dense"),
        ({"loss": "hinge"}, "loss: expected one of softmax, stablemax"),
        ({"optimizer": "adam"}, "optimizer: expected one of sgd, perpgrad"),
        ({"codec": "topk"}, "codec: expected a codec of flcore.compression, or None"),
        ({"feedback": TopK(k=1)}, "feedback: expected an error control of flcore.compression"),
    ],
)
def test_impossible_settings_are_named(settings, message):
    with pytest.raises(InvalidInputError, match=message):
        Settings(**settings)


def test_a_client_without_data_is_named(digits):
    with pytest.raises(InvalidInputError, match="1500 clients share 1437 training examples"):
        run(SHORT, "mlp", digits, Settings(clients=1500))
    with pytest.raises(InvalidInputError, match="client 1 has no data"):
        partition = [np.arange(3), np.arange(0)]
        run(SHORT, "mlp", digits, Settings(clients=2, participation=1), partition=partition)
    with pytest.raises(InvalidInputError, match="expected 50 clients as in the settings, got 1"):
        run(SHORT, "mlp", digits, Settings(), partition=[np.arange(3)])


def test_unusable_models_are_refused(digits):
    settings = Settings(rounds=1)
    with pytest.raises(InvalidInputError, match="no 'vgg'; choose one of: mlp, wide, cnn"):
        run(SHORT, "vgg", digits, settings)
    with pytest.raises(InvalidInputError, match="running statistic"):
        norm = torch.nn.Sequential(torch.nn.BatchNorm2d(1), torch.nn.Flatten())
        run(SHORT, norm, digits, settings)
    with pytest.raises(InvalidInputError, match="no trainable parameter"):
        run(SHORT, torch.nn.Flatten(), digits, settings)
    with pytest.raises(InvalidInputError, match="must be float32 on the CPU"):
        run(SHORT, torch.nn.Linear(64, 10).double(), digits, settings)


def test_unusable_data_is_refused(tmp_path):
    with pytest.raises(InvalidInputError, match="there is no 'mnist2'"):
        load_dataset("mnist2")
    with pytest.raises(InvalidInputError, match="there is no file"):
        load_dataset(tmp_path / "absent.npz")
    file = tmp_path / "data.npz"
    file.write_text("not an archive")
    with pytest.raises(InvalidInputError, match=r"not a readable \.npz file"):
        load_dataset(file)
    x, y = np.zeros((4, 3), np.float32), np.arange(4)
    np.savez(file, x_train=x, y_train=y)
    with pytest.raises(InvalidInputError, match="has no x_test, y_test; it has x_train, y_train"):
        load_dataset(file)
    np.savez(file, x_train=x, y_train=y[:3], x_test=x, y_test=y)
    with pytest.raises(InvalidInputError, match="x_train: expected as many examples"):
        load_dataset(file)
    np.savez(file, x_train=x * np.nan, y_train=y, x_test=x, y_test=y)
    with pytest.raises(InvalidInputError, match="x_train: contains NaN"):
        load_dataset(file)
    np.savez(file, x_train=x, y_train=y - 1, x_test=x, y_test=y)
    with pytest.raises(InvalidInputError, match="y_train: expected a 1-D array of class numbers"):
        load_dataset(file)


def test_hugging_face_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match="pip install datasets"):
        load_dataset("cifar10")


def test_importing_the_package_imports_no_heavy_library():
    heavy = "torch sklearn matplotlib rich typer safetensors datasets"
    code = (
        "import sys, flcore.simulation, flcore.algorithms\n"
        f"sys.exit(' '.join(m for m in '{heavy}'.split() if m in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
