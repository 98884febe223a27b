"""`flcore train` as a person meets it: files, resuming, Ctrl-C, and sentences for mistakes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

for module in ("torch", "sklearn", "rich", "typer", "matplotlib", "safetensors"):
    pytest.importorskip(module)

import typer
from safetensors.numpy import load_file
from typer.testing import CliRunner

from flcore.cli.train import train
from flcore.cli.train_display import console
from flcore.compression import TopK
from flcore.simulation import Settings
from flcore.simulation.budget import advice, coverage

app = typer.Typer()
app.command()(train)

QUICK = ["--local-epochs", "1", "--clients", "20", "--participation", "3"]


def flcore_train(*arguments: object, code: int = 0) -> str:
    """Run the command in this process and give what it printed, on one long line."""
    console.width = 240  # long names of folders are not broken
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return " ".join(result.output.split())


def metrics(folder: Path) -> list[dict]:
    """Metrics of a run without the times."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        del record["seconds"]
    return records


def test_a_run_leaves_all_its_files(tmp_path):
    output = flcore_train("--rounds", 4, *QUICK, "--output", tmp_path / "run")
    for part in ("test accuracy", "uplink", "downlink", "local training", "report.html"):
        assert part in output
    folder = tmp_path / "run"
    assert sorted(file.name for file in folder.iterdir()) == [
        "checkpoint.safetensors",
        "config.json",
        "metrics.jsonl",
        "model.safetensors",
        "report.html",
    ]
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["round"] for record in records] == [1, 2, 3, 4]
    assert set(records[0]["seconds"]) == {"train", "encode", "aggregate", "evaluate"}
    assert all(record["bytes_up"] < record["bytes_down"] / 4 for record in records)
    config = json.loads((folder / "config.json").read_text())
    assert config["settings"]["codec"]["ratio"] == 0.1
    model = load_file(folder / "model.safetensors")
    assert sum(value.size for value in model.values()) == config["model"]["parameters"] == 4810
    page = (folder / "report.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 4
    assert not re.search(r"(src|href)=\"http", page)  # one file, no network


def test_resume_is_bit_for_bit(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    flcore_train("--rounds", 6, *QUICK, "-o", a)
    flcore_train("--rounds", 3, *QUICK, "-o", b)
    flcore_train("--resume", "-o", b, "--rounds", 6)  # the other options come from the folder
    assert metrics(a) == metrics(b)
    model = [(folder / "model.safetensors").read_bytes() for folder in (a, b)]
    assert model[0] == model[1]


def test_resume_takes_over_every_option(tmp_path):
    options = {
        "--local-epochs": 2, "--clients": 9, "--participation": "34%", "--alpha": "iid",
        "--batch-size": 7, "--lr": 0.05, "--lr-decay": 0.9, "--weight-decay": 0.0, "--clip": 0.0,
        "--server-lr": 0.7, "--weighting": "uniform", "--accumulate": "float64", "--ratio": 0.2,
        "--error-control": "econtrol", "--eta": 0.15, "--control-step": "paper", "--seed": 3,
        "--model": "cnn", "--threads": 2, "--loss": "stablemax", "--optimizer": "perpgrad",
    }  # fmt: skip
    arguments = [part for option in options.items() for part in option]
    flcore_train("--rounds", 1, "-o", tmp_path, *arguments)
    before = json.loads((tmp_path / "config.json").read_text())
    flcore_train("--resume", "-o", tmp_path, "--rounds", 2)
    after = json.loads((tmp_path / "config.json").read_text())
    assert after["settings"].pop("rounds") == 2
    assert before["settings"].pop("rounds") == 1
    assert before == after and len(metrics(tmp_path)) == 2
    assert before["settings"]["participation"] == 0.34
    assert before["algorithm"]["clip"] is None
    assert before["settings"]["loss"] == "stablemax"
    assert before["settings"]["optimizer"] == "perpgrad"
    page = (tmp_path / "report.html").read_text()
    assert "stablemax cross-entropy" in page and "perpgrad" in page


def test_without_compression_nothing_is_left_to_control(tmp_path):
    flcore_train("--rounds", 1, *QUICK, "--compressor", "none", "-o", tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())["settings"]
    assert settings["codec"] is None and settings["feedback"] is None
    flcore_train("--resume", "--rounds", 2, "-o", tmp_path)
    assert metrics(tmp_path)[1]["bytes_up"] == metrics(tmp_path)[1]["bytes_down"]


def test_a_budget_that_cannot_converge_is_named(tmp_path):
    few = ("--rounds", 2, *QUICK, "--ratio", 0.001)
    output = flcore_train(*few, "-o", tmp_path / "few")
    assert "warning: a client takes part about" in output and "of the values" in output
    assert "warning" not in flcore_train("--rounds", 2, *QUICK, "-o", tmp_path / "enough",
                                         "--ratio", 0.9, "--participation", "50%")  # fmt: skip


def test_advice_counts_visits_and_shares():
    def share(codec, rounds=60, participation=5):
        settings = Settings(
            rounds=rounds, clients=50, participation=participation, codec=codec, feedback=None
        )
        return coverage(settings, 1000), advice(settings, 1000)

    assert share(TopK(ratio=0.01))[0] == pytest.approx(0.06)
    assert "train for 200 rounds" in share(TopK(ratio=0.01))[1]
    assert "send 0.033 of the values" in share(TopK(ratio=0.01))[1]
    assert share(TopK(ratio=0.01), participation=25) == (pytest.approx(0.3), None)
    assert share(TopK(k=100)) == (pytest.approx(0.6), None)
    assert share(None) == (pytest.approx(6), None)


def test_folders_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        flcore_train("--rounds", 1, *QUICK)
    assert sorted(os.listdir("runs")) == ["fedavg-digits-1", "fedavg-digits-2"]


def test_own_data_from_a_file(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((60, 5)).astype(np.float32), rng.integers(0, 3, 60)
    np.savez(tmp_path / "own.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    output = flcore_train(
        "--dataset", tmp_path / "own.npz", "--rounds", 1, *QUICK, "-o", tmp_path / "run"
    )
    assert "test accuracy" in output
    assert "own.npz" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--algorithm", "fedsgd"], "algorithm: there is no 'fedsgd'; choose one of: "),
        (["--participation", "0"], "participation: expected a whole number from 1, got 0"),
        (["--participation", "51"], "participation: 51 clients a round, but there are only 50"),
        (["--participation", "some"], "participation: expected a number or a percentage"),
        (["--participation", "0.0"], "participation: expected a fraction above 0"),
        (["--clients", "1500"], "some would have no data; use at most 1437 clients"),
        (["--alpha", "much"], "alpha: expected a number or iid, got 'much'"),
        (["--lr", "1e20", "--clip", "0"], "training diverged: the loss of client"),
        (["--ratio", "0"], "ratio: expected"),
        (["--compressor", "gzip"], "compressor: expected one of "),
        (["--compressor", "topk:ration=0.1"], "topk: expected settings like key=value"),
        (["--error-control", "magic"], "error-control: expected one of "),
        (["--error-control", "ef21:momentum=7"], "momentum: expected"),
        (["--compressor", "none", "--error-control", "ef14"], "EF14 corrects what a codec leaves"),
        (["--model", "rnn"], "model: there is no 'rnn'"),
        (["--dataset", "mnist2"], "dataset: there is no 'mnist2'"),
        (["--resume"], "--resume: there is no run in"),
        (["--rounds", "0"], "rounds: expected a whole number from 1, got 0"),
    ],
)
def test_mistakes_are_answered_with_a_sentence(arguments, message, tmp_path):
    output = flcore_train(*arguments, "-o", tmp_path / "run", code=1)
    assert "error: " in output and message in output
    assert "Traceback" not in output


def test_folders_are_not_overwritten_or_mixed(tmp_path):
    flcore_train("--rounds", 1, *QUICK, "-o", tmp_path)
    output = flcore_train("--rounds", 1, *QUICK, "-o", tmp_path, code=1)
    assert "already holds a run" in output
    output = flcore_train("--resume", "--lr", 0.3, "-o", tmp_path, code=1)
    assert "algorithm.local_lr: 0.1 there, 0.3 now" in output
    assert "--output" in flcore_train("--resume", code=1)


def test_control_c_leaves_a_run_that_can_be_resumed(tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "flcore", "train", "--rounds", "100000", *QUICK]
    process = subprocess.Popen(
        [*command, "--output", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    deadline = time.monotonic() + 60
    file = folder / "metrics.jsonl"
    while process.poll() is None and not (file.exists() and file.read_text().count("\n") >= 3):
        assert time.monotonic() < deadline, "the run did not start"
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 130, output
    done = len(metrics(folder))
    assert f"Stopped after round {done} of 100000" in output
    assert "flcore train --resume --output" in output and "Traceback" not in output

    rounds = done + 2
    flcore_train("--resume", "--output", folder, "--rounds", rounds)
    flcore_train("--rounds", rounds, *QUICK, "--output", tmp_path / "straight")
    assert metrics(folder) == metrics(tmp_path / "straight")
    model = [(f / "model.safetensors").read_bytes() for f in (folder, tmp_path / "straight")]
    assert model[0] == model[1]


def test_help_groups_the_options():
    output = flcore_train("--help")
    for panel in ("What is trained", "Clients", "Local training", "Uplink compression", "The run"):
        assert panel in output
