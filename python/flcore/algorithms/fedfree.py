"""FedFree: clients with networks of different kinds teach each other layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from flcore.algorithms.base import Algorithm, check_choice, check_whole
from flcore.algorithms.layout import Layout, Parameters, Vector
from flcore.algorithms.state import Arrivals, Client, LocalResult, LocalWork, Payload, Server
from flcore.errors import InvalidInputError

__all__ = ["FedFree", "histogram_entropy", "layers", "project"]

ENTROPIES = ("shannon", "tsallis", "collision")


@dataclass(frozen=True, kw_only=True)
class FedFree(Algorithm):
    r"""Layer-wise alignment of unlike networks (NeurIPS 2025, OpenReview G10Y4vrhGF).

    Client i keeps a model of its own, :math:`\theta_i`, the server a small one, g.  In round t

    1. the client trains by SGD, and sends the k layers l that changed most, by
       :math:`\|\theta_{i,l}^t - \theta_{i,l}^{t-1}\|_2`;
    2. every layer j of the server takes a step towards what the layers :math:`M_j` that were sent
       for it do with Gaussian inputs,

       .. math:: g_j \leftarrow g_j - \alpha \nabla_{g_j} \frac{1}{|M_j|} \sum_{M_j}
           E \| \theta_{i,l}(X) - g_j(X) \|^2, \qquad X \sim N(0, I) ,

       which for linear layers is :math:`g_j - 2 \alpha (g_j - \mathrm{mean}_{M_j} \theta_{i,l})`;
    3. of the client's layers and the server's layers of the same kind, the pair with the largest
       :math:`H(g_j) - H(\theta_{i,l})` is found, H being the entropy of the histogram of the
       weights.  If it is above 0, the client gets :math:`g_j` before its next training, in the
       place of its layer l.

    Parameters
    ----------
    pool : tuple of str
        Networks of the clients, see `flcore.simulation.MODELS`: client i has ``pool[i % len]``,
        from random numbers of its own.  Empty: all have, and start from, the network of the run,
        which is the server's in any case.
    critical : int
        k; 0 is local training only.
    choice : {"change", "random"}
        Whether the layers that changed most are sent, or random ones.
    alpha : float
        :math:`\alpha`; steps of the server in a round: `server_steps`.
    probes : int
        Rows of X, drawn in each step; 0: the expectation.
    mapping : {"kind", "depth"}
        :math:`M_j`: all layers of the same kind, or those of them whose nearest by relative depth
        is j.
    entropy : {"shannon", "tsallis", "collision"}
        In bits; of order 2, ``1 - sum p^2``; of order 2 in bits, ``-log2 sum p^2``.
    bins : int
        Of the histogram, from the least weight to the largest.
    rest : {"keep", "zero"}
        What becomes of the values of a layer that is larger than what replaces it.

    Notes
    -----
    A layer is a weight of two or more dimensions with its bias, of a kind by its number of
    dimensions.  Layers of other shapes than g_j are cut, or filled up with g_j, before they are
    compared with it; a convolution is taken for the linear map of a patch.  Ties go to the layer
    that comes first.  The models that are tested are those of the clients after their training.
    """

    name: ClassVar[str] = "fedfree"
    evaluation: ClassVar[str] = "personal"
    statistics: ClassVar[bool] = True

    pool: tuple[str, ...] = ()
    critical: int = 2
    choice: str = "change"
    alpha: float = 0.01
    server_steps: int = 1
    probes: int = 0
    mapping: str = "kind"
    entropy: str = "shannon"
    bins: int = 256
    rest: str = "keep"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "pool", tuple(self.pool))
        for option, least in (("critical", 0), ("server_steps", 1), ("probes", 0), ("bins", 2)):
            check_whole(option, getattr(self, option), least)
        if not 0 < self.alpha < 1:
            raise InvalidInputError(
                f"alpha: expected a number above 0 and below 1, got {self.alpha!r}"
            )
        check_choice("choice", self.choice, ("change", "random"))
        check_choice("mapping", self.mapping, ("kind", "depth"))
        check_choice("entropy", self.entropy, ENTROPIES)
        check_choice("rest", self.rest, ("keep", "zero"))

    def architecture(self, client: int) -> str | None:
        """Name the network of a client."""
        return self.pool[client % len(self.pool)] if self.pool else None

    def layout(self, layout: Layout) -> Layout:
        """Let every client keep its whole model."""
        return layout.grouped(lambda name: "personal")

    def server_begin(self, server: Server) -> None:
        """Start with no layer for anybody."""
        server["given"] = {}

    # ---- client ----------------------------------------------------------------------------------

    def downlink(self, server: Server, client: int) -> Payload:
        """Send the layer that may help the client, if there is one."""
        payload = super().downlink(server, client)
        if str(client) in server["given"]:
            local, mine = server["given"][str(client)]
            named = server.layout.named(server.model)
            for tensor in layers(named)[mine]:
                payload[local + tensor.removeprefix(mine)] = named[tensor]
        return payload

    def client_begin(self, payload: Payload, client: Client) -> LocalWork:
        """Start from the client's own model, a layer of it replaced."""
        start = self.start(payload, client).copy()
        named = client.layout.named(start)
        for name in payload.keys() & named.keys():
            named[name][...] = project(payload[name], named[name], self.rest)
        return LocalWork(start, self.spec(client.round))

    def client_end(self, result: LocalResult, client: Client) -> Payload:
        """Send the layers that changed most, and how deep they lie."""
        self.sent(result, client)
        named, change = client.layout.named(result.end), client.layout.named(result.update)
        all_layers = layers(named)
        ids = list(all_layers)
        norms = [sum(float(np.sum(change[t] ** 2.0)) for t in all_layers[layer]) for layer in ids]
        order = np.argsort(np.negative(norms), kind="stable")
        if self.choice == "random":
            order = client.rng.permutation(len(ids))
        payload: Payload = {}
        for i in sorted(order[: self.critical].tolist()):
            payload |= {tensor: named[tensor] for tensor in all_layers[ids[i]]}
            payload[f"{ids[i]}.depth"] = depth(i, len(ids))
        return payload

    # ---- server ----------------------------------------------------------------------------------

    def server_step(self, server: Server, mean: Vector, arrivals: Arrivals) -> None:
        """Learn from the layers that were sent, then look for the best layer for each client."""
        model = server.model.copy()
        named = server.layout.named(model)
        pairs = [
            (arrival, local, layer)
            for arrival in arrivals
            for local in layers(arrival.payload)
            for layer in self.same(local, arrival.payload, named)
        ]
        for j, (layer, tensors) in enumerate(layers(named).items()):
            group = [aligned(a.payload, k, named, layer) for a, k, to in pairs if to == layer]
            if group:
                rng = np.random.default_rng([server.round, j])
                means = [np.mean(values, axis=0) for values in zip(*group, strict=True)]
                self.teach([named[tensor] for tensor in tensors], means, rng)
        server.model = model
        best: dict[int, tuple[float, list[str]]] = {a.client: (0.0, []) for a in arrivals}
        for arrival, local, layer in pairs:
            here, there = named[f"{layer}.weight"], arrival[f"{local}.weight"]
            gain = self.measure(here) - self.measure(there)
            if gain > best[arrival.client][0]:
                best[arrival.client] = gain, [local, layer]
        for client, (_, pair) in best.items():
            server["given"].pop(str(client), None)
            if pair:
                server["given"][str(client)] = pair

    def same(self, local: str, payload: Payload, mine: Parameters) -> list[str]:
        """Name the server's layers that a client's layer is compared with."""
        ids = list(layers(mine))
        kind = kind_of(payload, local)
        alike = [layer for layer in ids if kind_of(mine, layer) == kind]
        if self.mapping == "kind" or not alike:
            return alike
        at = payload[f"{local}.depth"]
        return [min(alike, key=lambda layer: abs(depth(ids.index(layer), len(ids)) - at))]

    def teach(
        self, mine: Sequence[np.ndarray], theirs: Sequence[np.ndarray], rng: np.random.Generator
    ) -> None:
        """Take the server's steps of one layer in place, towards the mean of the others'."""
        for _ in range(self.server_steps):
            gaps = [theirs - mine for mine, theirs in zip(mine, theirs, strict=True)]
            if self.probes:
                gaps = probed(gaps, rng.standard_normal((self.probes, gaps[0][0].size)))
            for tensor, gap in zip(mine, gaps, strict=True):
                tensor += 2 * self.alpha * gap

    def measure(self, weight: np.ndarray) -> float:
        """Give H of a weight."""
        return histogram_entropy(weight, self.bins, self.entropy)


def probed(gaps: list[np.ndarray], x: np.ndarray) -> list[np.ndarray]:
    """Give what the gaps of weight and bias look like through the inputs `x`, (n, fan-in)."""
    weight = gaps[0].reshape(len(gaps[0]), -1)
    out = x @ weight.T
    for bias in gaps[1:]:
        out = out + bias
    seen = [(out.T @ x / len(x)).reshape(gaps[0].shape)]
    return seen + [out.mean(0) for _ in gaps[1:]]


def histogram_entropy(values: np.ndarray, bins: int = 256, kind: str = "shannon") -> float:
    """Entropy of the histogram of an array between its least and its largest value.

    Parameters
    ----------
    values : array
        Of any shape, finite.
    bins : int
    kind : {"shannon", "tsallis", "collision"}
        See `FedFree`.

    Returns
    -------
    float
        0 if all values are the same.

    Examples
    --------
    >>> histogram_entropy(np.arange(256))
    8.0
    """
    values = np.asarray(values, np.float64).reshape(-1)
    least, largest = values.min(), values.max()
    if least == largest:
        return 0.0
    counts, _ = np.histogram(values, bins, (least, largest))
    p = counts[counts > 0] / values.size
    if kind == "shannon":
        return float(-(p * np.log2(p)).sum())
    order2 = float((p * p).sum())
    return 1 - order2 if kind == "tsallis" else -float(np.log2(order2))


def project(values: np.ndarray, onto: np.ndarray, rest: str = "keep") -> np.ndarray:
    """Put the values of one tensor, in order, into the shape of another.

    Parameters
    ----------
    values, onto : arrays
        Of any shapes.
    rest : {"keep", "zero"}
        What follows where `values` has fewer: the values of `onto`, or zeros.

    Returns
    -------
    array of the shape of `onto`.

    Examples
    --------
    >>> project(np.array([1, 2, 3]), np.array([9, 9, 9, 9, 9]))
    array([1, 2, 3, 9, 9])
    """
    flat = onto.flatten() if rest == "keep" else np.zeros(onto.size, onto.dtype)
    size = min(values.size, flat.size)
    flat[:size] = values.reshape(-1)[:size]
    return flat.reshape(onto.shape)


def layers(named: Mapping[str, Any]) -> dict[str, list[str]]:
    """Name the layers, and of each the weight and, if there is one, the bias.

    Examples
    --------
    >>> layers({"1.weight": np.ones((2, 3)), "1.bias": np.ones(2), "2.weight": np.ones(2)})
    {'1': ['1.weight', '1.bias']}
    """
    found = {}
    for name, value in named.items():
        layer, _, tensor = name.rpartition(".")
        if tensor == "weight" and np.ndim(value) > 1:
            found[layer] = [name, *([f"{layer}.bias"] if f"{layer}.bias" in named else [])]
    return found


def depth(i: int, count: int) -> float:
    """Relative depth of layer i, from 0 to 1."""
    return i / max(count - 1, 1)


def kind_of(named: Mapping[str, Any], layer: str) -> int:
    """Give the kind of a layer: 2 for linear ones, 4 for convolutions of images."""
    return np.ndim(named[f"{layer}.weight"])


def aligned(theirs: Payload, local: str, mine: Parameters, layer: str) -> list[np.ndarray]:
    """Give a client's layer in the shapes of the server's; what it lacks is the server's."""
    return [
        project(theirs.get(local + tensor.removeprefix(layer), mine[tensor]), mine[tensor])
        for tensor in layers(mine)[layer]
    ]
