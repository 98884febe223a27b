"""Grokking of modular addition: when a network that has fitted its training data generalises.

All pairs (a, b) of residues modulo p, their sum the class; a share of them is trained on, in one
batch, by an MLP 2p - 200 - 200 - p with ReLU and no biases. Under plain training with softmax the
logits grow until gradients vanish in float32, and test accuracy stays at chance. Gradients without
their part along the weights (`flcore.optim.PerpGrad`) generalise at once; StableMax cross-entropy
does in the long run. The set-up is that of Prieto et al., "Grokking at the Edge of Numerical
Stability", ICLR 2025, arXiv 2501.04697.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flcore._extras import require

__all__ = [
    "SCENES",
    "Run",
    "Scene",
    "draw",
    "grokking_markdown",
    "run_grokking",
    "train",
    "write_grokking_json",
]

WIDTH = 200


@dataclass(frozen=True)
class Method:
    """A loss ("softmax", "stablemax") and whether gradients are projected, and renormalised."""

    loss: str = "softmax"
    project: bool = False
    renormalize: bool = True

    @property
    def label(self) -> str:
        """What a figure calls it."""
        optimizer = "PerpGrad-AdamW" if self.project else "AdamW"
        return f"{optimizer}{'' if self.renormalize else ', no renormalisation'}, {self.loss}"


@dataclass(frozen=True)
class Scene:
    """A modulus with everything that its methods share.

    `fraction` of all pairs is trained on, for `steps` steps; test accuracy is taken every `every`.
    """

    p: int
    fraction: float
    steps: int
    every: int
    methods: tuple[Method, ...]
    lr: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    @property
    def title(self) -> str:
        """Modulus and share in words."""
        return f"p = {self.p}, {self.fraction:.0%} trained on"


PERP = Method(project=True)
SCENES = (
    Scene(47, 0.6, 400, 10, (Method(), PERP, Method(project=True, renormalize=False))),
    Scene(113, 0.4, 300, 10, (Method(), PERP, Method("stablemax", project=True))),
    Scene(59, 0.7, 4000, 100, (Method(), Method("stablemax")), eps=1e-25),
)


@dataclass(frozen=True)
class Run:
    """One training: accuracies, 0 to 1, after `steps` steps, and the mean training loss there."""

    scene: Scene
    method: Method
    seed: int
    steps: tuple[int, ...]
    train: tuple[float, ...]
    test: tuple[float, ...]
    loss: tuple[float, ...]
    seconds: float

    def test_at(self, step: int) -> float:
        """Test accuracy after `step` steps."""
        return self.test[self.steps.index(step)]


def train(scene: Scene, method: Method, seed: int) -> Run:
    """Train one network in float32, on as many threads as torch is set to.

    Raises
    ------
    MissingDependencyError
        torch is not installed.
    """
    torch: Any = require("torch", extra="train")
    loss_of = _loss(torch, method.loss)
    start = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        x, y, first = _pairs(torch, scene)
        sizes = (2 * scene.p, WIDTH, WIDTH, scene.p)
        model = torch.nn.Sequential(
            torch.nn.Linear(sizes[0], sizes[1], bias=False),
            torch.nn.ReLU(),
            torch.nn.Linear(sizes[1], sizes[2], bias=False),
            torch.nn.ReLU(),
            torch.nn.Linear(sizes[2], sizes[3], bias=False),
        )
    optimizer = _optimizer(torch, model, scene, method)
    x_train, y_train, x_test, y_test = x[:first], y[:first], x[first:], y[first:]
    rows: list[tuple[int, float, float, float]] = []
    for step in range(1, scene.steps + 1):
        optimizer.zero_grad()
        logits = model(x_train)
        loss = loss_of(logits, y_train)
        loss.backward()
        optimizer.step()
        if step % scene.every == 0:
            with torch.inference_mode():
                scores = [(model(a), b) for a, b in ((x_train, y_train), (x_test, y_test))]
                right = [float((s.argmax(1) == b).float().mean()) for s, b in scores]
            rows.append((step, right[0], right[1], float(loss.detach())))
    steps, train_accuracy, test_accuracy, losses = zip(*rows, strict=True)
    return Run(
        scene,
        method,
        seed,
        steps,
        train_accuracy,
        test_accuracy,
        losses,
        time.perf_counter() - start,
    )


def _pairs(torch: Any, scene: Scene) -> tuple[Any, Any, int]:
    """Return one-hot pairs in random order, their sums, and how many of them are trained on."""
    p = scene.p
    a, b = torch.arange(p).repeat_interleave(p), torch.arange(p).repeat(p)
    order = torch.randperm(p * p)
    x = torch.nn.functional.one_hot(torch.stack([a, b], 1)[order], p).float().reshape(p * p, 2 * p)
    return x, ((a + b) % p)[order], int(scene.fraction * p * p)


def _loss(torch: Any, name: str) -> Callable[..., Any]:
    if name == "softmax":
        return torch.nn.functional.cross_entropy
    from flcore.losses import stablemax_cross_entropy

    return stablemax_cross_entropy


def _optimizer(torch: Any, model: Any, scene: Scene, method: Method) -> Any:
    base = torch.optim.AdamW(
        model.parameters(), lr=scene.lr, betas=scene.betas, eps=scene.eps, weight_decay=0.0
    )
    if not method.project:
        return base
    from flcore.optim import PerpGrad

    return PerpGrad(base, renormalize=method.renormalize)


def run_grokking(
    seeds: Sequence[int] = (0, 1, 2),
    scenes: Sequence[Scene] = SCENES,
    tell: Callable[[int, int, str, str, float], None] | None = None,
) -> list[Run]:
    """Train every method of every scene, from every seed, on one thread.

    Parameters
    ----------
    seeds : sequence of int
    scenes : sequence of Scene
    tell : callable, optional
        Called with (done, all, what, stage, 0) before every training.
    """
    torch: Any = require("torch", extra="train")
    jobs = [(s, m, seed) for s in scenes for m in s.methods for seed in seeds]
    runs, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for number, (scene, method, seed) in enumerate(jobs):
            if tell:
                tell(number, len(jobs), f"{method.label}, seed {seed}", scene.title, 0.0)
            runs.append(train(scene, method, seed))
    finally:
        torch.set_num_threads(threads)
    return runs


def write_grokking_json(runs: Sequence[Run], path: str | Path) -> None:
    """Write all numbers."""
    Path(path).write_text(json.dumps([asdict(run) for run in runs], indent=1) + "\n")


def _by_method(runs: Sequence[Run]) -> dict[Scene, dict[Method, list[Run]]]:
    found: dict[Scene, dict[Method, list[Run]]] = {}
    for run in runs:
        found.setdefault(run.scene, {}).setdefault(run.method, []).append(run)
    return found


def grokking_markdown(runs: Sequence[Run]) -> str:
    """Return a table a scene: test accuracy of each seed at eight steps, and at the end."""
    parts = []
    for scene, methods in _by_method(runs).items():
        every = max(scene.every, scene.steps // 8 // scene.every * scene.every)
        marks = list(range(every, scene.steps + 1, every))
        lines = [
            f"### {scene.title}, {scene.steps} steps",
            "",
            f"| method | seed | {' | '.join(f'{step}' for step in marks)} | train |",
            f"|---|---|{'---:|' * (len(marks) + 1)}",
        ]
        for method, mine in methods.items():
            for run in mine:
                test = " | ".join(f"{run.test_at(step):.3f}" for step in marks)
                lines.append(f"| {method.label} | {run.seed} | {test} | {run.train[-1]:.3f} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def draw(runs: Sequence[Run], path: str | Path) -> None:
    """Draw test accuracy against steps, a panel a scene, a line a seed.

    Raises
    ------
    MissingDependencyError
        Without matplotlib; the message names the extra.
    """
    matplotlib: Any = require("matplotlib", "train")
    figure_module: Any = require("matplotlib.figure", "train")
    scenes = _by_method(runs)
    colours = {m: f"C{i}" for i, m in enumerate(dict.fromkeys(run.method for run in runs))}
    with matplotlib.rc_context({"font.size": 8, "svg.hashsalt": "flcore", "axes.grid": True}):
        figure = figure_module.Figure(figsize=(10, 3.2), layout="constrained")
        panels = figure.subplots(1, len(scenes), sharey=True, squeeze=False)[0]
        for panel, (scene, methods) in zip(panels, scenes.items(), strict=True):
            for method, mine in methods.items():
                for run in mine:
                    panel.plot(
                        run.steps,
                        [100 * value for value in run.test],
                        color=colours[method],
                        linewidth=1,
                        label=method.label if run is mine[0] else None,
                    )
            fitted = next(iter(methods.values()))[0]
            panel.plot(
                fitted.steps,
                [100 * value for value in fitted.train],
                color="0.5",
                linestyle=":",
                linewidth=1,
                label="training accuracy, AdamW",
            )
            panel.set_title(scene.title)
            panel.set_xlabel("steps")
            panel.legend(loc="center right", bbox_to_anchor=(1, 0.6), fontsize=6.5)
        panels[0].set_ylabel("test accuracy, %")
        figure.savefig(path, metadata={"Date": None} if str(path).endswith(".svg") else None)
