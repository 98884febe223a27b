"""Training at the server, on labels that the clients' models vote for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flcore.algorithms.layout import Vector
from flcore.algorithms.state import Arrivals, Server
from flcore.ops import combine

__all__ = ["fine_tune", "majority", "named_classes"]


def named_classes(server: Server, before: Vector, arrivals: Arrivals) -> list[np.ndarray]:
    """Give the class that each client's model names for each of the server's examples.

    Parameters
    ----------
    server : Server
    before : (d,) array
        The model that the clients started from.
    arrivals : Arrivals
        With the change of the shared tensors as "update".
    """
    assert server.tools is not None
    layout, tools = server.layout, server.tools
    shared = layout.take(before)
    ends = [combine([shared, arrival["update"]], [1.0, 1.0]) for arrival in arrivals]
    return [tools.scores(layout.put(before, end)).argmax(1) for end in ends]


def majority(named: Sequence[np.ndarray]) -> np.ndarray:
    """Give the class that most voters name, of each example; the lowest of several.

    Parameters
    ----------
    named : voters x (n,) integers

    Returns
    -------
    (n,) int64 array.
    """
    votes = np.stack(named)
    counts = (votes[:, :, None] == np.arange(votes.max() + 1)).sum(0)
    return counts.argmax(1)


def fine_tune(
    server: Server,
    labels: np.ndarray,
    strengths: np.ndarray,
    adam: tuple[float, float, float],
    *,
    lr: float,
    batch_size: int,
) -> None:
    """Take steps of Adam on random batches of the server's examples; its moments last.

    Parameters
    ----------
    server : Server
        Whose model is changed.
    labels : (n,) integers
        Of its examples.
    strengths : (steps,) array
        Factor on the cross-entropy of each batch.
    adam : (beta1, beta2, epsilon)
    lr : float
    batch_size : int
    """
    assert server.tools is not None
    x, tools = server.tools.x, server.tools
    rng = np.random.default_rng(server.round)
    b1, b2, epsilon = adam
    m, v = (server.state.get(name, server.zeros()) for name in ("adam_m", "adam_v"))
    done = server.state.get("adam_steps", 0)
    model = server.model.copy()
    for step, strength in enumerate(strengths.tolist(), done + 1):
        drawn = rng.choice(len(labels), min(batch_size, len(labels)), replace=False)
        g = strength * tools.gradient(model, x[drawn], labels[drawn])
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        scale = lr * (1 - b2**step) ** 0.5 / (1 - b1**step)
        model -= scale * m / (v**0.5 + epsilon * (1 - b2**step) ** 0.5)
    server.model = model
    server.state |= {"adam_m": m, "adam_v": v, "adam_steps": done + len(strengths)}
