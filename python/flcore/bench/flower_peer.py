"""Rounds per second of one federated problem: `flcore.simulation.run` beside Flower's simulation.

FedAvg on scikit-learn's digits: an MLP of 64-64-10 units, 50 clients with a Dirichlet(0.05) mix of
classes, 5 of them a round, 10 local epochs in batches of 10, SGD at 0.1, gradients clipped to
norm 10, weight decay 1e-3, and the test accuracy of the global model after every round.

Flower's part is written as its own examples are: a `ClientApp` with one train function over a torch
loop, the stock `FedAvg`, a central evaluation function, the simulation engine on Ray.  Examples
are loaded once a worker process, and start-up is not counted on either side.  Run it where both
are installed (``pip install "flcore[train,flower]"``)::

    python -m flcore.bench.flower_peer --rounds 40 --repeat 3
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flcore._extras import require
from flcore.bench.environment import machine, versions
from flcore.errors import InvalidInputError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Problem", "Rate", "compare", "flcore_rate", "flower_rate", "main"]

TORCH_THREADS = 1  # a network of 4,810 parameters is slower with more


Moment = tuple[float, float]
"""Seconds by the clock, and seconds that this process has computed."""


@dataclass(frozen=True)
class Problem:
    """What both sides train; the defaults are those of the page's table."""

    rounds: int = 40
    clients: int = 50
    participation: int = 5
    alpha: float = 0.05
    local_epochs: int = 10
    batch_size: int = 10
    lr: float = 0.1
    clip: float = 10.0
    weight_decay: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rounds < 2:
            raise InvalidInputError(
                f"rounds: expected at least 2, since the first is start-up, got {self.rounds}"
            )


@dataclass(frozen=True)
class Rate:
    """How fast one run was, start-up and first round not counted.

    Parameters
    ----------
    name : str
    rounds_per_second : float
    start_s : float
        Seconds until the first round was complete.
    accuracy : float
        Of the global model on the test data after the last round, 0 to 1.
    busy : float
        Share of the time that this process computed.  flcore has one thread: well below 1, other
        programs had its core.  Flower's workers are other processes.
    """

    name: str
    rounds_per_second: float
    start_s: float
    accuracy: float
    busy: float

    @classmethod
    def between(cls, name: str, begun: float, ends: list[Moment], accuracy: float) -> Rate:
        """Make the rate from the moments at which each round was complete."""
        (first, computed), (last, computed_last) = ends[0], ends[-1]
        span = last - first
        busy = (computed_last - computed) / span
        return cls(name, (len(ends) - 1) / span, first - begun, accuracy, busy)


def flcore_rate(problem: Problem, **settings: Any) -> Rate:
    """Run the problem with `flcore.simulation.run`; updates travel as float32.

    Parameters
    ----------
    problem : Problem
    **settings
        More fields of `flcore.simulation.Settings`.
    """
    from flcore.algorithms import create
    from flcore.simulation import Observer, Settings, run

    ends: list[Moment] = []

    class Ends(Observer):
        def round_done(self, record: Any) -> None:
            ends.append(_now())

    algorithm = create(
        "fedavg",
        local_lr=problem.lr,
        lr_decay=1.0,
        local_epochs=problem.local_epochs,
        batch_size=problem.batch_size,
        clip=problem.clip,
        weight_decay=problem.weight_decay,
    )
    chosen = Settings(
        rounds=problem.rounds,
        clients=problem.clients,
        participation=problem.participation,
        alpha=problem.alpha,
        seed=problem.seed,
        threads=TORCH_THREADS,
        **{"codec": None, "feedback": None, **settings},
    )
    begun = time.perf_counter()
    history = run(algorithm, "mlp", "digits", chosen, observer=Ends())
    return Rate.between("flcore", begun, ends, history.accuracy)


def flower_rate(problem: Problem, cpus_per_client: float = 1.0) -> Rate:
    """Run the problem with Flower's simulation engine on Ray.

    Parameters
    ----------
    problem : Problem
    cpus_per_client : float
        Share of the machine's cores that a worker takes: 1 makes one worker a core.

    Raises
    ------
    MissingDependencyError
        Without Flower or Ray.
    """
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    simulation = require("flwr.simulation", "flower")
    require("ray", "flower")
    logging.getLogger("flwr").setLevel(logging.ERROR)
    ends: list[tuple[Moment, float]] = []
    begun = time.perf_counter()
    simulation.run_simulation(
        server_app=_server_app(problem, ends),
        client_app=_client_app(problem),
        num_supernodes=problem.clients,
        backend_config={
            "client_resources": {"num_cpus": cpus_per_client, "num_gpus": 0.0},
            "init_args": {"object_store_memory": 200 * 2**20},
        },
    )
    if len(ends) != problem.rounds + 1:
        raise RuntimeError(f"Flower ended after {len(ends) - 1} of {problem.rounds} rounds")
    moments, accuracies = zip(*ends[1:], strict=True)
    return Rate.between("Flower", begun, list(moments), accuracies[-1])


def _now() -> Moment:
    return time.perf_counter(), time.process_time()


# ---- the same problem, written for Flower --------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _examples(problem: Problem) -> tuple[Any, list[np.ndarray]]:
    """Load the data and deal it to the clients, once a process."""
    from flcore.simulation import load_dataset
    from flcore.simulation.partition import split
    from flcore.simulation.seeds import Purpose, generator

    data = load_dataset("digits")
    rng = generator(problem.seed, Purpose.PARTITION)
    return data, split(data.y_train, problem.clients, problem.alpha, rng)


def _model(problem: Problem) -> Any:
    from flcore.simulation import build_model
    from flcore.simulation.seeds import Purpose, generator

    return build_model("mlp", (1, 8, 8), 10, generator(problem.seed, Purpose.MODEL))


def _client_app(problem: Problem) -> Any:
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.train()
    def train(message: Any, context: Any) -> Any:
        import torch

        torch.set_num_threads(TORCH_THREADS)
        data, partition = _examples(problem)
        mine = partition[context.node_config["partition-id"]]
        dataset = torch.utils.data.TensorDataset(
            torch.from_numpy(data.x_train[mine]), torch.from_numpy(data.y_train[mine])
        )
        loader = torch.utils.data.DataLoader(dataset, problem.batch_size, shuffle=True)
        model = _model(problem)
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        optimizer = torch.optim.SGD(
            model.parameters(), lr=problem.lr, weight_decay=problem.weight_decay
        )
        model.train()
        total = 0.0
        for _ in range(problem.local_epochs):
            for x, y in loader:
                optimizer.zero_grad()
                loss = torch.nn.functional.cross_entropy(model(x), y)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), problem.clip)
                optimizer.step()
                total += loss.item()
        metrics = {"train_loss": total / (len(loader) * problem.local_epochs)}
        content = {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord({**metrics, "num-examples": len(mine)}),
        }
        return Message(content=RecordDict(content), reply_to=message)

    return app


def _server_app(problem: Problem, ends: list[tuple[Moment, float]]) -> Any:
    from flwr.app import ArrayRecord, MetricRecord
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg

    app = ServerApp()

    @app.main()
    def main(grid: Any, context: Any) -> None:
        import torch

        data, _ = _examples(problem)
        x, y = torch.from_numpy(data.x_test), torch.from_numpy(data.y_test)
        model = _model(problem)

        def evaluate(server_round: int, arrays: Any) -> Any:
            model.load_state_dict(arrays.to_torch_state_dict())
            with torch.inference_mode():
                accuracy = float((model(x).argmax(1) == y).float().mean())
            ends.append((_now(), accuracy))
            return MetricRecord({"accuracy": accuracy})

        strategy = FedAvg(
            fraction_train=problem.participation / problem.clients,
            fraction_evaluate=0.0,
            min_train_nodes=problem.participation,
            min_available_nodes=problem.clients,
        )
        strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord(model.state_dict()),
            num_rounds=problem.rounds,
            evaluate_fn=evaluate,
        )

    return app


# ---- both, in turn -------------------------------------------------------------------------------


def compare(problem: Problem, repeat: int = 3, cpus_per_client: float = 1.0) -> dict[str, Any]:
    """Run both `repeat` times in turn, and give all numbers.

    Returns
    -------
    dict
        ``machine``, ``versions``, ``problem``, ``runs`` (pairs of rates, flcore first), ``best``
        (rounds per second of the fastest run of each) and ``ratio``, the median over the pairs.
    """
    pairs = []
    for _ in range(repeat):
        peer = flower_rate(problem, cpus_per_client)
        pairs.append((flcore_rate(problem), peer))
    rates = [[rate.rounds_per_second for rate in pair] for pair in pairs]
    return {
        "machine": machine(),
        "versions": versions(),
        "problem": asdict(problem),
        "cpus_per_client": cpus_per_client,
        "runs": [[asdict(rate) for rate in pair] for pair in pairs],
        "best": {"flcore": max(r for r, _ in rates), "Flower": max(r for _, r in rates)},
        "ratio": statistics.median(ours / theirs for ours, theirs in rates),
    }


def main(arguments: list[str] | None = None) -> None:
    """Compare, and print one line a run."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--rounds", type=int, default=Problem.rounds)
    parser.add_argument("--repeat", type=int, default=3, help="runs of each, in turn")
    parser.add_argument("--cpus-per-client", type=float, default=1.0, help="of a Ray worker")
    parser.add_argument("--json", help="write all numbers to this file")
    chosen = parser.parse_args(arguments)
    report = compare(Problem(rounds=chosen.rounds), chosen.repeat, chosen.cpus_per_client)
    for run in (run for pair in report["runs"] for run in pair):
        print(
            f"{run['name']:8} {run['rounds_per_second']:8.2f} rounds/s, first round after "
            f"{run['start_s']:5.2f} s, accuracy {run['accuracy']:.1%}, busy {run['busy']:.0%}"
        )
    known = {name: version for name, version in report["versions"].items() if version}
    print(", ".join(f"{name} {version}" for name, version in known.items()))
    print(f"median of the pairs: {report['ratio']:.1f}x the rounds per second of Flower")
    if chosen.json:
        Path(chosen.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    # workers import the functions by their module's name, and keep what those have loaded
    from flcore.bench.flower_peer import main as main_of_module

    main_of_module()
