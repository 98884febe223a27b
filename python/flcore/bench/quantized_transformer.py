"""What low bits cost a small transformer, and what preparation gives back.

A character-level transformer is trained from several seeds; the linears of its blocks are then
rounded in many ways, as it is and with outlier channels planted behind its norms (the same function
in float), and its cross-entropy on held-out text is taken. Rounding is simulated in float: weights
by `flcore.quantization`, activations as `flcore.ops.qmatmul_int8` rounds them.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from flcore._extras import require

__all__ = [
    "METHODS",
    "Method",
    "Row",
    "draw",
    "quantized_transformer_markdown",
    "run_quantized_transformer",
    "write_quantized_transformer_json",
]

# Sequences of the training text that preparation sees, and of held-out text.
CALIBRATION, HELD = 16, 256
# Thresholds that OS+ tries; with 25 or the default of 100 the loss is the same to 2e-4.
THRESHOLDS = 50
MODELS = ("as trained", "with outlier channels")


@dataclass(frozen=True)
class Method:
    """Weights and activations in so many bits, and what is done before.

    `weights` is the name of a scheme, with a group of `group` where that is not 0; activations are
    rounded where `activations` is not 0, in blocks of `group` channels, or in whole rows.
    """

    name: str
    weights: str = ""
    activations: int = 0
    group: int = 0
    prepare: str = ""

    @property
    def label(self) -> str:
        """Bits and preparation."""
        return f"{self.name} {self.prepare or 'rounding'}" if self.weights else self.name


def _both(
    prepare: str, name: str, weights: str, activations: int = 0, group: int = 0
) -> tuple[Method, Method]:
    plain = Method(name, weights, activations, group)
    return plain, replace(plain, prepare=prepare)


METHODS = (
    Method("fp32"),
    *_both("OS+", "W8A8", "int8", 8),
    *_both("AWQ", "W4A16", "int4-asym", 0, 64),
    *_both("OS+", "W4A8", "int4-asym", 8, 64),
    *_both("AWQ", "W3A16", "int3-asym", 0, 64),
    *_both("AWQ", "W2A16", "int2", 0, 64),
)


@dataclass(frozen=True)
class Row:
    """Held-out loss, in nats a character, of one method on one model, by seed."""

    model: str
    method: Method
    losses: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return mean(self.losses)

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds; 0 for one."""
        return stdev(self.losses) if len(self.losses) > 1 else 0.0


Tell = Callable[[int, int, str, str, float], None]


def run_quantized_transformer(
    text: str | Path | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    size: Any = None,
    methods: Iterable[Method] = METHODS,
    tell: Tell | None = None,
) -> list[Row]:
    """Train, plant, prepare, round and measure, on one thread.

    Parameters
    ----------
    text : path, optional
        Text in UTF-8, of some 100,000 characters at least. By default the help pages that come
        with Python.
    seeds : sequence of int
    size : flcore.bench.char_transformer.Size, optional
    methods : iterable of Method
    tell : callable, optional
        Called with (done, all, what, stage, 0) before every step.

    Raises
    ------
    MissingDependencyError
        torch is not installed.
    InvalidInputError
        The text cannot be read or is too short.
    """
    torch: Any = require("torch", extra="train")
    from flcore.bench import char_transformer as small

    size, methods = size or small.Size(), tuple(methods)
    data = small.Text.of(small.default_text(text), size.context)
    total = len(seeds) * (1 + len(MODELS) * len(methods))
    done = 0

    def step(what: str, stage: str) -> None:
        nonlocal done
        if tell:
            tell(done, total, what, stage, 0.0)
        done += 1

    losses: dict[tuple[str, Method], list[float]] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for seed in seeds:
            step("training", f"seed {seed}")
            model = small.build(size, data.vocabulary, seed)
            small.train(model, data, size, seed)
            scene = _Scene.of(torch, data, size, seed)
            for kind in MODELS:
                if kind != MODELS[0]:
                    small.plant_outliers(model, seed)
                for method in methods:
                    step(method.label, f"seed {seed}, {kind}")
                    losses.setdefault((kind, method), []).append(scene.loss(model, method))
    finally:
        torch.set_num_threads(threads)
    return [Row(kind, method, tuple(found)) for (kind, method), found in losses.items()]


@dataclass(frozen=True)
class _Scene:
    """Groups of the model, calibration data, and held-out windows, the same for all methods."""

    torch: Any
    groups: list[Any]
    calibration: Any
    held: tuple[Any, Any]

    @classmethod
    def of(cls, torch: Any, data: Any, size: Any, seed: int) -> _Scene:
        from flcore.bench import char_transformer as small

        generator = torch.Generator().manual_seed(1000 + seed)
        calibration = small.windows(data.train, size.context, CALIBRATION, generator)[0]
        generator = torch.Generator().manual_seed(2000)  # the same windows for all seeds
        held = small.windows(data.held, size.context, HELD, generator)
        return cls(torch, small.groups_of(size), calibration, held)

    def loss(self, model: Any, method: Method) -> float:
        """Return the held-out loss; the model stays as it is."""
        from flcore.quantization import Scheme
        from flcore.quantization import preparation as prep

        x, y = self.held
        if not method.weights:
            return self._cross_entropy(model, x, y)
        scheme = Scheme.of(method.weights, **({"group": method.group} if method.group else {}))
        grid = None
        if method.activations:
            grid = prep.ActivationGrid(method.activations, method.group or "token")
        model = copy.deepcopy(model)
        batches = [self.calibration]
        if method.prepare == "AWQ":
            prep.awq(model, self.groups, batches, scheme, progress=False)
        elif method.prepare == "OS+" and grid is not None:
            prep.os_plus(
                model, self.groups, batches, scheme, grid, steps=THRESHOLDS, progress=False
            )
        with prep.simulated(model, self.groups, scheme, grid):
            return self._cross_entropy(model, x, y)

    def _cross_entropy(self, model: Any, x: Any, y: Any) -> float:
        with self.torch.inference_mode():
            logits = model(x).flatten(0, 1)
            return float(self.torch.nn.functional.cross_entropy(logits, y.flatten()))


def tiny() -> Any:
    """Return a size that only shows that all runs."""
    from flcore.bench.char_transformer import Size

    return replace(Size(), layers=1, width=64, heads=2, context=32, batch=4, steps=4)


def write_quantized_transformer_json(rows: Sequence[Row], path: str | Path) -> None:
    """Write all numbers."""
    Path(path).write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def quantized_transformer_markdown(rows: Sequence[Row]) -> str:
    """Return a table: loss of each method, mean and spread, as trained and with outliers."""
    kinds = list(dict.fromkeys(row.model for row in rows))
    found = {(row.model, row.method): row for row in rows}
    lines = [
        f"| weights, activations | preparation | {' | '.join(f'{k} | to fp32' for k in kinds)} |",
        f"|---|---|{'---:|' * 2 * len(kinds)}",
    ]
    for method in dict.fromkeys(row.method for row in rows):
        cells = []
        for kind in kinds:
            row = found[kind, method]
            floats = next(r for (k, m), r in found.items() if k == kind and not m.weights)
            cells.append(f"{row.mean:.4f} ± {row.spread:.4f}")
            more = mean(a - b for a, b in zip(row.losses, floats.losses, strict=True))
            cells.append(f"{more:+.4f}" if method.weights else "")
        prepared = method.prepare or ("round to nearest" if method.weights else "")
        lines.append(f"| {method.name} | {prepared} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[Row], path: str | Path) -> None:
    """Draw what each method adds to the loss in float, a panel a model, a mark a seed.

    Raises
    ------
    MissingDependencyError
        Without matplotlib; the message names the extra.
    """
    matplotlib: Any = require("matplotlib", "train")
    figure_module: Any = require("matplotlib.figure", "train")
    kinds = list(dict.fromkeys(row.model for row in rows))
    colours = {"": "C7", "AWQ": "C0", "OS+": "C1"}
    with matplotlib.rc_context({"font.size": 8, "svg.hashsalt": "flcore", "axes.grid": True}):
        figure = figure_module.Figure(figsize=(10, 3.2), layout="constrained")
        panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
        for panel, kind in zip(panels, kinds, strict=True):
            mine = [row for row in rows if row.model == kind]
            floats = next(row for row in mine if not row.method.weights)
            shown = [row for row in mine if row.method.weights]
            for at, row in enumerate(shown):
                more = [max(a - b, 1e-5) for a, b in zip(row.losses, floats.losses, strict=True)]
                colour = colours[row.method.prepare]
                panel.bar(at, mean(more), color=colour, alpha=0.5, bottom=0)
                panel.plot([at] * len(more), more, ".", color=colour)
            names = [row.method.label.replace(" ", "\n") for row in shown]
            panel.set_xticks(range(len(shown)), names)
            panel.set_yscale("log")
            panel.grid(axis="x", visible=False)
            panel.set_title(kind)
        panels[0].set_ylabel("loss above float32, nats a character")
        figure.savefig(path, metadata={"Date": None} if str(path).endswith(".svg") else None)
