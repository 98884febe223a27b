"""FetchSGD: the server that keeps momentum and error inside a sketch, and what it reaches."""

from __future__ import annotations

import numpy as np
import pytest

from flcore.compression import Encoder, FetchSGD, PacketError, Sketch, decode
from flcore.errors import InvalidInputError, NonFiniteError
from flcore.ops import sketch as ops
from flcore.reference import sketch as reference
from flcore.reference import wire

# ---- the server ----------------------------------------------------------------------------------


@pytest.mark.parametrize("subtract", [False, True])
def test_server_steps_follow_the_definition(subtract, rng):
    numel, rows, columns, k, rho, lr = 600, 3, 80, 7, 0.9, 0.1
    server = FetchSGD(
        numel, rows=rows, columns=columns, k=k, momentum=rho, subtract=subtract, seed=2
    )
    codec = Sketch(rows=rows, columns=columns, seed=2)
    s_u, s_e = np.zeros((rows, columns)), np.zeros((rows, columns))
    column, sign = reference.places(np.arange(numel), 2, rows, columns)
    for t in range(4):
        updates = [rng.standard_normal(numel) for _ in range(3)]
        step = server.step([Encoder(codec, like=g).encode(g) for g in updates], lr=lr)
        s = (
            sum(ops.sketch(g, rows=rows, columns=columns, seed=2).astype(float) for g in updates)
            / 3
        )
        s_u = rho * s_u + s
        s_e = s_e + lr * s_u
        estimates = np.median(sign * np.take_along_axis(s_e, column, 1), axis=0)
        want = np.sort(np.argsort(-np.abs(estimates), kind="stable")[:k])
        assert step.indices.tolist() == want.tolist()
        np.testing.assert_allclose(step.values, estimates[want], atol=1e-5)
        for i in range(rows):
            if subtract:
                np.add.at(s_e[i], column[i, want], -sign[i, want] * estimates[want])
            else:
                s_e[i, column[i, want]] = s_u[i, column[i, want]] = 0
        np.testing.assert_allclose(server.error_table, s_e, atol=1e-5)
        np.testing.assert_allclose(server.momentum_table, s_u, atol=1e-5)
        if not subtract:
            zero = np.zeros((rows, columns), bool)
            for i in range(rows):
                zero[i, column[i, want]] = True
            assert not server.error_table[zero].any() and not server.momentum_table[zero].any()
        dense = decode(step.packet)
        assert dense[step.indices].tobytes() == step.values.tobytes()
        assert np.count_nonzero(dense) <= k and step.packet.header.round == t
        assert wire.parse(bytes(step.packet))[1].indices.tolist() == want.tolist()


def test_wide_tables_are_true_top_k_with_error_feedback(rng):
    numel, k, lr = 60, 5, 0.5
    server = FetchSGD(numel, rows=5, columns=2**14, k=k, momentum=0.0, subtract=True)
    error = np.zeros(numel)
    for _ in range(6):
        g = rng.standard_normal(numel)
        step = server.step_table(ops.sketch(g, rows=5, columns=2**14), lr=lr)
        error += lr * g
        want = np.sort(np.argsort(-np.abs(error))[:k])
        assert step.indices.tolist() == want.tolist()
        np.testing.assert_allclose(step.values, error[want], rtol=1e-5)
        error[want] = 0


def test_state_can_be_kept(rng):
    settings = {"columns": 50, "rows": 3, "k": 4}
    one, two = FetchSGD(300, **settings), FetchSGD(300, **settings)
    tables = [ops.sketch(rng.standard_normal(300), rows=3, columns=50) for _ in range(4)]
    for table in tables[:2]:
        one.step_table(table)
    two.load_state_dict(one.state_dict())
    for table in tables[2:]:
        assert one.step_table(table).packet == two.step_table(table).packet
    assert one.round == two.round == 4
    state = one.state_dict()
    for change, match in (
        ({"seed": 1}, "seed"),
        ({"numel": 301}, "numel"),
        ({"error_table": np.zeros((3, 51), np.float32)}, "error_table"),
        ({"momentum_table": np.full((3, 50), np.nan, np.float32)}, "finite"),
        ({"more": 1}, "expected the keys"),
    ):
        with pytest.raises(InvalidInputError, match=match):
            one.load_state_dict(state | change)


def test_a_refused_round_changes_nothing(rng):
    server = FetchSGD(300, columns=50, rows=3, k=4)
    server.step_table(ops.sketch(rng.standard_normal(300), rows=3, columns=50))
    before = server.state_dict()
    good = Encoder(Sketch(columns=50, rows=3), like=np.ones(300)).encode(rng.standard_normal(300))
    for call, error in (
        (lambda: server.step([]), InvalidInputError),
        (lambda: server.step([good], weights=[-1]), InvalidInputError),
        (lambda: server.step([good], lr=np.inf), InvalidInputError),
        (lambda: server.step([bytes(good)[:-1]]), PacketError),
        (lambda: server.step_table(np.full((3, 50), np.nan, np.float32)), NonFiniteError),
        (lambda: server.step_table(np.zeros((3, 51), np.float32)), InvalidInputError),
    ):
        with pytest.raises(error):
            call()
    after = server.state_dict()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    for options, match in (({"k": 0}, "k"), ({"momentum": 1.0}, "momentum"), ({"rows": 2}, "rows")):
        with pytest.raises(InvalidInputError, match=match):
            FetchSGD(300, **({"columns": 50, "k": 4} | options))


# ---- results -------------------------------------------------------------------------------------


class Clients:
    """1000 clients with one example each, of one of two classes; logistic regression.

    40 of 4000 features say what the class is; 200 others are large and the client's own. A client
    is seen once.
    """

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.shared = self.rng.choice([-1.0, 1.0], 40)
        self.x, self.y = self._examples()
        self.test_x, self.test_y = self._examples()
        self.order = self.rng.permutation(1000).reshape(100, 10)

    def _examples(self):
        y, x = np.where(np.arange(1000) % 2, 1.0, -1.0), np.zeros((1000, 4000))
        for row in x:
            row[40 + self.rng.choice(3960, 200, replace=False)] = self.rng.choice([-1.0, 1.0], 200)
        x[:, :40] = 0.5 * y[:, None] * self.shared * (self.rng.random((1000, 40)) < 0.8)
        return x, y

    def gradients(self, w, chosen):
        margin = self.y[chosen] * (self.x[chosen] @ w)
        return -(self.y[chosen] / (1 + np.exp(margin)))[:, None] * self.x[chosen]

    def loss(self, w) -> float:
        return float(np.mean(np.logaddexp(0, -self.test_y * (self.test_x @ w))))


def largest(u: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-np.abs(u), kind="stable")[:k]


def train(clients: Clients, mode: str) -> float:
    """Loss on unseen clients after 100 rounds of 10, lr 0.1, momentum 0.9.

    Up: a table of 3 x 133, or 200 pairs of the client's own top-k. Down: 20 pairs for the sketch
    and for true top-k, which has the whole sum.
    """
    lr, k = 0.1, 20
    w, momentum, error = np.zeros(4000), np.zeros(4000), np.zeros(4000)
    server = FetchSGD(4000, columns=133, rows=3, k=k)
    encoder = Encoder(Sketch(columns=133, rows=3), like=w)
    for chosen in clients.order:
        gradients = clients.gradients(w, chosen)
        if mode == "sketch":
            step = server.step([encoder.encode(g) for g in gradients], lr=lr)
            w[step.indices] -= step.values
            continue
        if mode == "local":
            for g in gradients:
                g[largest(g, 4000)[200:]] = 0
        momentum = 0.9 * momentum + gradients.mean(axis=0)
        error += lr * momentum
        sent = largest(error, k if mode == "true" else 4000)
        w[sent] -= error[sent]
        error[sent] = 0
        if mode == "true":
            momentum[sent] = 0
    return clients.loss(w)


def test_sketches_find_what_no_client_sends():
    """Measured: uncompressed 0.0004, true top-k 0.002, FetchSGD 0.02, local top-k 2."""
    clients = Clients()
    losses = {mode: train(clients, mode) for mode in ("all", "true", "sketch", "local")}
    assert losses["all"] < losses["true"] < losses["sketch"] < 0.1, losses
    assert losses["local"] > np.log(2), losses  # worse than knowing nothing
