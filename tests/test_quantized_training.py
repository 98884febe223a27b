"""Federated training of adapters over a frozen base in few bits."""

from __future__ import annotations

import json

import numpy as np
import pytest

for module in ("torch", "sklearn", "safetensors"):
    pytest.importorskip(module)

import torch
from safetensors.numpy import load_file

from flcore.algorithms import FedAvg
from flcore.errors import InvalidInputError
from flcore.quantization import quantize_model
from flcore.simulation import Settings, build_model, load_dataset, run
from flcore.simulation.base import SHARE, held_out
from flcore.simulation.engine import Observer, Simulation

SHORT = {"rounds": 3, "clients": 20, "participation": 4, "base_bits": 4, "lora": 4}
EPOCH = FedAvg(local_epochs=1)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the networks are tiny: threads would wait for each other
    yield
    torch.set_num_threads(threads)


def test_adapters_alone_are_trained_and_sent():
    settings = Settings(**{**SHORT, "codec": None, "feedback": None})
    history = run(EPOCH, "mlp", "digits", settings)
    shapes = {name: value.shape for name, value in history.model.items()}
    assert shapes == {
        "1.lora_a": (4, 64),
        "1.lora_b": (64, 4),
        "3.lora_a": (4, 64),
        "3.lora_b": (10, 4),
    }
    values = sum(value.size for value in history.model.values())
    assert history.config["model"]["parameters"] == values == 808
    assert history.bytes_up == history.bytes_down == 3 * 4 * 4 * values
    base = history.config["model"]["base"]
    assert base["parameters"] == 4810 and base["bits"] == 4 and base["layers"] == 2
    # 4736 weights in half a byte, 74 scales of 2 bytes, 74 biases of 4
    assert base["bytes"] >= 4736 // 2 + 74 * 2 + 74 * 4 and base["bytes"] < 4 * 4810 / 5
    assert base["examples"] == round(SHARE * 1437)


def test_training_improves_on_the_base():
    settings = Settings(rounds=15, base_bits=2, lora=8, alpha=1.0)
    history = run("fedavg", "mlp", "digits", settings)
    base = history.config["model"]["base"]
    assert history.mean_accuracy() > base["accuracy"] + 0.02
    assert history.bytes_up < history.bytes_down / 4


def test_the_servers_examples_are_no_clients():
    data = load_dataset("digits")
    settings = Settings(**SHORT)
    own, rest = held_out(data, settings)
    assert sorted([*own, *rest]) == list(range(1437)) and len(own) == 287
    simulation = Simulation(EPOCH, "mlp", data, settings)
    dealt = np.concatenate(simulation.partition)
    assert not set(dealt.tolist()) & set(own.tolist()) and len(set(dealt.tolist())) == len(dealt)
    with pytest.raises(InvalidInputError, match="a client has examples that the server trains"):
        Simulation(EPOCH, "mlp", data, settings, partition=[own[:2]] * 20)


def test_a_module_is_taken_as_it_is():
    data = load_dataset("digits")
    model = build_model("wide", data.example_shape, 10, np.random.default_rng(0))
    weight = model[1].weight.detach().clone()
    simulation = Simulation(EPOCH, model, data, Settings(**SHORT))
    assert simulation.base.examples == 0
    assert sum(map(len, simulation.partition)) == 1437 // 20 * 20
    held = model[1].weight.dequantize("float32")
    assert (held - weight).norm() < 0.12 * weight.norm()


def test_a_run_can_be_put_together_from_its_files(tmp_path):
    settings = Settings(**SHORT)
    history = run(EPOCH, "cnn", "digits", settings, output=tmp_path)
    data = load_dataset("digits")
    model = build_model("cnn", data.example_shape, 10, np.random.default_rng(99))
    quantize_model(model, "int4", lora_rank=4)
    state = {
        **load_file(tmp_path / "base.safetensors"),
        **load_file(tmp_path / "model.safetensors"),
    }
    model.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    with torch.no_grad():
        found = model(torch.from_numpy(data.x_test)).argmax(1).numpy()
    assert (found == data.y_test).mean() == pytest.approx(history.accuracy, abs=1 / 360)
    assert set(load_file(tmp_path / "model.safetensors")) == {"7.lora_a", "7.lora_b"}
    assert load_file(tmp_path / "base.safetensors")["7.codes"].dtype == np.uint8


class StopAfter(Observer):
    def __init__(self, rounds: int) -> None:
        self.left = rounds

    def should_stop(self) -> bool:
        self.left -= 1
        return self.left == 0


def test_resume_is_bit_for_bit(tmp_path):
    settings = Settings(**SHORT)
    whole = run(EPOCH, "mlp", "digits", settings)
    run(EPOCH, "mlp", "digits", settings, output=tmp_path, observer=StopAfter(2))
    resumed = run(EPOCH, "mlp", "digits", settings, output=tmp_path, resume=True)
    assert [r.accuracy for r in resumed] == [r.accuracy for r in whole]
    for name, value in whole.model.items():
        assert value.tobytes() == resumed.model[name].tobytes()
    stored = json.loads((tmp_path / "config.json").read_text())["settings"]
    assert stored["base_bits"] == 4 and stored["lora"] == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"base_bits": 4}, "lora: rank 0 with base_bits=4"),
        ({"lora": 4}, "adapters a frozen base"),
        ({"base_bits": 5, "lora": 4}, "base_bits: expected 8, 4, 3, 2 or None, got 5"),
        ({"base_bits": 4, "lora": -1}, "lora: expected a whole number from 0"),
        ({"base_bits": 4, "lora": 1.5}, "lora: expected a whole number from 0"),
    ],
)
def test_settings_that_do_not_fit(options, words):
    with pytest.raises(InvalidInputError, match=words):
        Settings(**options)


def test_too_many_clients_for_what_the_server_leaves():
    with pytest.raises(InvalidInputError, match="share the 1150 of 1437 training examples"):
        run(EPOCH, "mlp", "digits", Settings(**{**SHORT, "clients": 1200}))


def test_the_command(tmp_path):
    typer = pytest.importorskip("typer")
    pytest.importorskip("matplotlib")
    from typer.testing import CliRunner

    from flcore.cli.train import train

    app = typer.Typer()
    app.command()(train)
    folder = tmp_path / "run"
    short = ["--local-epochs", "1", "--clients", "20", "--participation", "3", "--rounds", "2"]
    options = [*short, "--base-bits", "4", "--lora", "8", "-o", str(folder)]
    result = CliRunner().invoke(app, options)
    words = " ".join(result.output.split())
    assert result.exit_code == 0, words
    assert "base, once to each client" in words and "base.safetensors" in words
    assert (folder / "report.html").read_text().count("base before training") == 1
    resumed = CliRunner().invoke(app, ["--resume", "--rounds", "3", "-o", str(folder)])
    assert resumed.exit_code == 0, resumed.output
    wrong = CliRunner().invoke(app, ["--base-bits", "4", "-o", str(tmp_path / "other")])
    assert wrong.exit_code == 1 and "lora" in wrong.output
