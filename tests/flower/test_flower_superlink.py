"""Algorithms between real processes: a SuperLink, SuperNodes and `flwr run`, on loopback."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("flwr", reason="needs Flower: tests/flower.sh")
pytest.importorskip("torch")

from safetensors.numpy import load_file

import flcore
from flcore.algorithms import create
from flcore.simulation import Settings, run

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
CLIENTS, ROUNDS, PATIENCE_S = 2, 2, 300

PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "flcore-scaffold"
version = "1.0.0"
description = "SCAFFOLD on digits"
license = "Apache-2.0"
dependencies = []

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "flcore"

[tool.flwr.app.components]
serverapp = "scaffold_app:server"
clientapp = "scaffold_app:client"

[tool.flwr.app.config]
num-server-rounds = 9
"""

APP = """
from flcore.algorithms import create
from flcore.integrations.flower_algorithm import client_app, server_app
from flcore.simulation import Settings

settings = Settings(clients={clients}, participation={clients}, codec=None, feedback=None)
setup = (create("scaffold", local_epochs=1), "mlp", "digits", settings)
server = server_app(*setup, output={output!r}, timeout={patience})
client = client_app(*setup)
"""

CONFIG = """
[superlink]
default = "loopback"

[superlink.loopback]
address = "127.0.0.1:{port}"
insecure = true
"""


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture
def federation(tmp_path):
    """Give a function that starts a program of Flower; what it started ends with the test."""
    home = tmp_path / "home"
    home.mkdir()
    source = Path(flcore.__file__).parents[1]
    path = os.pathsep.join(filter(None, [str(source), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": path,
    }
    with contextlib.ExitStack() as stack:

        def start(program, *arguments):
            log = stack.enter_context(
                open(tmp_path / f"{program}-{len(os.listdir(tmp_path))}", "w")
            )
            process = subprocess.Popen(
                [BIN / program, *arguments],
                env=environment,
                cwd=tmp_path,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

            def end():
                process.terminate()
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

            stack.callback(end)
            return process

        yield start


def wait_for(port, process):
    """Wait until somebody listens."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        assert process.poll() is None, "it ended"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.2)
    raise AssertionError(f"nobody listens at {port}")


def logs(folder):
    return "\n".join(p.read_text()[-2000:] for p in folder.iterdir() if p.is_file())


@pytest.mark.skipif(
    not (BIN / "flower-superlink").exists(), reason="no flower-superlink beside python"
)
def test_superlink_and_supernodes_give_the_numbers_of_one_process(federation, tmp_path):
    app, output = tmp_path / "app", tmp_path / "out"
    app.mkdir()
    (app / "pyproject.toml").write_text(PYPROJECT)
    (app / "scaffold_app.py").write_text(
        APP.format(clients=CLIENTS, output=str(output), patience=PATIENCE_S)
    )
    link, *nodes = free_ports(CLIENTS + 1)
    (tmp_path / "home" / "config.toml").write_text(CONFIG.format(port=link))
    here = ("--insecure", "--host", "127.0.0.1", "--port")
    server = federation(
        "flower-superlink", *here, str(link), "--disable-runtime-dependency-installation"
    )
    wait_for(link, server)
    for id, port in enumerate(nodes):
        config = f"partition-id={id} num-partitions={CLIENTS}"
        at = ("--superlink", f"127.0.0.1:{link}", "--node-config", config)
        federation("flower-supernode", *here, str(port), *at)
    submitted = federation(
        "flwr", "run", str(app), "loopback", "--run-config", f"num-server-rounds={ROUNDS}"
    )
    assert submitted.wait(PATIENCE_S) == 0, logs(tmp_path)
    end = time.monotonic() + PATIENCE_S
    while not (output / "model.safetensors").exists():
        assert time.monotonic() < end, logs(tmp_path)
        time.sleep(0.5)

    settings = Settings(
        rounds=ROUNDS,
        clients=CLIENTS,
        participation=CLIENTS,
        codec=None,
        feedback=None,
        execution="sequential",
    )
    expected = run(create("scaffold", local_epochs=1), "mlp", "digits", settings)
    model = load_file(output / "model.safetensors")
    assert model.keys() == expected.model.keys()
    for name, value in expected.model.items():
        np.testing.assert_allclose(model[name], value, rtol=1e-5, atol=1e-5)
    lines = (output / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["clients"] for line in lines] == [[0, 1]] * ROUNDS
