"""FedRAM: worked numbers, the simplex, absent tasks, scopes, and three tasks of unequal size."""

from __future__ import annotations

import numpy as np
import pytest

from flcore.aggregation import (
    FedRAM,
    client_weights,
    differential_loss,
    excess_loss,
    task_weights,
)
from flcore.errors import InvalidInputError
from flcore.ops import combine

ALPHA, EXCESS = (0.5, 0.3, 0.2), (0.4, 0.0, 1.0)
QUARTER, DIFFERENCE = (0.25,) * 4, (0.2, -0.1, 0.5, 0.0)
EXAMPLES = np.array([[30, 10, 0], [0, 40, 5], [20, 20, 20.0]])


# ---- single steps ------------------------------------------------------------------------------


def test_steps_by_hand():
    for smoothing, want in (
        (0.0, (0.499698, 0.288063, 0.212239)),
        (0.01, (0.499701, 0.288182, 0.212117)),
    ):
        got = task_weights(ALPHA, EXCESS, eta=0.1, smoothing=smoothing)
        np.testing.assert_allclose(got, want, atol=5e-7)
    for smoothing, want in (
        (0.0, (0.251187, 0.243763, 0.258837, 0.246213)),
        (0.01, (0.251175, 0.243826, 0.258748, 0.246251)),
    ):
        got = client_weights(QUARTER, DIFFERENCE, eta=0.1, smoothing=smoothing)
        np.testing.assert_allclose(got, want, atol=5e-7)


def test_losses_by_hand():
    got = excess_loss([5, 3, 7], [1, 4, 0], [10, 10, 0])
    np.testing.assert_array_equal(got, [0.4, 0, 0])  # worse, better, no examples
    np.testing.assert_array_equal(differential_loss([5, 3], [1, 4], 10), [0.4, -0.1])
    assert excess_loss(2.0, 1.5) == 0.5
    with pytest.raises(InvalidInputError, match="one shape for all"):
        excess_loss([1, 2], [1, 2, 3])
    with pytest.raises(InvalidInputError, match=r"local\[1\]: expected a finite number, got nan"):
        excess_loss([1, np.nan], [1, 2])
    with pytest.raises(InvalidInputError, match=r"examples\[0\]: expected a finite number from 0"):
        differential_loss([1, 2], [1, 2], [-1, 2])


@pytest.mark.parametrize("step", [task_weights, client_weights])
def test_what_leaves_the_weights_alone(step, rng):
    w, gain = rng.dirichlet(np.ones(6)), rng.standard_normal(6)
    for got in (
        step(w, gain, eta=0.0),
        step(w, gain, smoothing=1.0),
        step(w, np.full(6, 0.7)),
        step(7 * w, np.zeros(6)),
    ):
        np.testing.assert_allclose(got, w, rtol=1e-14)
    np.testing.assert_allclose(step(w, gain + 300.0), step(w, gain), rtol=1e-12)
    assert (np.argsort(step(w, gain, eta=5.0, smoothing=0.0) / w) == np.argsort(gain)).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.01, 0.5])
def test_weights_stay_in_the_simplex_for_huge_losses(smoothing, rng):
    w = rng.dirichlet(np.ones(5))
    for scale in (1.0, 700.0, 1e6, 1e300):
        got = task_weights(w, scale * rng.standard_normal(5), 1.0, smoothing)
        assert (got >= 0).all() and abs(got.sum() - 1) < 1e-14
        if smoothing:  # the old value holds up what the step puts down
            assert (got >= 0.99 * smoothing * w).all()


def test_a_weight_of_zero_stays_zero():
    np.testing.assert_allclose(task_weights([0, 1, 1], [9, 0, 0]), [0, 0.5, 0.5])


def test_absent_tasks_keep_their_weight_and_the_others_share_the_rest():
    got = task_weights(ALPHA, (0.4, 5.0, 1.0), present=[0, 2])
    among = task_weights((0.5, 0.2), (0.4, 1.0))
    np.testing.assert_allclose(got, [0.7 * among[0], 0.3, 0.7 * among[1]], rtol=1e-14)
    np.testing.assert_allclose(task_weights(ALPHA, EXCESS, present=[False] * 3), ALPHA)
    np.testing.assert_allclose(task_weights((0, 1, 0), EXCESS, present=[0]), (0, 1, 0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((ALPHA, (0, 1)), r"excess: expected shape \(3,\), got \(2,\)"),
        (((0, 0, 0), EXCESS), "alpha: expected a positive sum"),
        (((1, -1, 1), EXCESS), r"alpha\[1\]: expected a finite number from 0, got -1"),
        ((ALPHA, EXCESS, np.nan), "eta: expected a finite number"),
        ((ALPHA, (0, 1, 1e300), 1e10), "eta: expected finite products"),
        ((ALPHA, EXCESS, 0.1, 1.5), r"smoothing: expected a finite number in \[0, 1\], got 1.5"),
        (("abc", EXCESS), "alpha: expected numbers"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(InvalidInputError, match=message):
        task_weights(*arguments)


# ---- over rounds -------------------------------------------------------------------------------


def test_rounds_of_one_difference_add_up_even_where_float64_would_underflow():
    weights, gain = FedRAM(np.ones((3, 1)), smoothing=0.0), np.array([0.0, 1.0, -8000.0])
    for _ in range(7):
        weights.update_clients(gain)
    want = np.exp(0.1 * 7 * gain)
    np.testing.assert_allclose(weights.client_weights, want / want.sum(), rtol=1e-13)
    assert weights.client_weights[2] == 0.0
    for _ in range(7):
        weights.update_clients(-gain)
    np.testing.assert_allclose(weights.client_weights, 1 / 3, rtol=1e-10)


def test_first_weights_are_shares_of_the_data():
    share = EXAMPLES.sum(axis=0) / EXAMPLES.sum()
    first = FedRAM(EXAMPLES)
    np.testing.assert_allclose(first.task_weights[2], share)
    np.testing.assert_allclose(first.task_weights[0], [*(share[:2] / share[:2].sum()), 0])
    np.testing.assert_allclose(first.client_weights, 1 / 3)
    own = FedRAM(EXAMPLES, start="client")
    np.testing.assert_allclose(own.task_weights, EXAMPLES / EXAMPLES.sum(axis=1, keepdims=True))


def test_uniform_client_weights_are_the_uniform_mean(rng):
    d = rng.standard_normal((3, 50))
    got = combine(d, FedRAM(EXAMPLES).client_weights)
    np.testing.assert_allclose(got, d.mean(axis=0), rtol=0, atol=1e-14)


def test_scope_client_steps_every_client_on_its_own(rng):
    weights, excess = FedRAM(EXAMPLES), rng.random((3, 3))
    before = weights.task_weights
    got = weights.update_tasks(excess).task_weights
    for k in range(3):
        np.testing.assert_allclose(got[k], task_weights(before[k], excess[k]), rtol=1e-13)
    assert (got[EXAMPLES == 0] == 0).all()
    alone = FedRAM(EXAMPLES).update_tasks(excess[[2]], clients=[2]).task_weights
    np.testing.assert_array_equal(alone, [*before[:2], got[2]])


def test_scope_global_averages_by_examples_and_keeps_absent_tasks(rng):
    weights, excess = FedRAM(EXAMPLES, scope="global"), rng.random((3, 3))
    old = weights.task_weights[2]
    np.testing.assert_allclose(
        weights.update_tasks(np.zeros((3, 3))).task_weights[2], old, rtol=1e-13
    )
    np.testing.assert_allclose(
        weights.update_tasks(np.full((3, 3), 0.3)).task_weights[2], old, rtol=1e-13
    )
    steps = [task_weights(old, e, present=n > 0) for e, n in zip(excess, EXAMPLES, strict=True)]
    want = EXAMPLES.sum(axis=1) / EXAMPLES.sum() @ np.array(steps)
    got = weights.update_tasks(excess).task_weights
    np.testing.assert_allclose(got[2], want, rtol=1e-13)
    np.testing.assert_allclose(got[0], [*(want[:2] / want[:2].sum()), 0], rtol=1e-13)
    np.testing.assert_allclose(got.sum(axis=1), 1)


def test_clients_that_were_absent_keep_their_weight():
    weights = FedRAM(EXAMPLES).update_clients([1.0, 0.5], clients=[2, 0])
    w = weights.client_weights
    np.testing.assert_allclose(w[1], 1 / 3)
    np.testing.assert_allclose(w[[2, 0]], client_weights([1, 1], [1.0, 0.5]) * 2 / 3)
    np.testing.assert_array_equal(weights.update_clients([], clients=[]).client_weights, w)
    np.testing.assert_allclose(weights.update_clients([9.0], clients=[1]).client_weights, w)


@pytest.mark.parametrize("scope", ["client", "global"])
def test_state_goes_on_where_it_was(scope, rng):
    first, second = FedRAM(EXAMPLES, scope=scope), FedRAM(EXAMPLES, scope=scope)
    first.update_tasks(rng.random((3, 3))).update_clients(rng.random(3))
    second.load_state_dict(first.state_dict())
    excess, difference = rng.random((3, 3)), rng.random(3)
    for weights in (first, second):
        weights.update_tasks(excess).update_clients(difference)
    assert first.task_weights.tobytes() == second.task_weights.tobytes()
    assert first.client_weights.tobytes() == second.client_weights.tobytes()
    state = first.state_dict()
    for change, message in (
        ({"log_client": np.zeros(2)}, "expected shape"),
        ({"log_client": np.array([np.nan, 0, 0])}, "expected logarithms"),
        ({"log_task": np.ones((3, 3))}, "expected logarithms"),
        ({"more": 0}, "expected the keys"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            second.load_state_dict({**state, **change})
    assert second.client_weights.tobytes() == first.client_weights.tobytes()


def test_wrong_options_are_named():
    for options, message in (
        ({"scope": "server"}, "scope"),
        ({"start": "uniform"}, "start"),
        ({"scope": "global", "start": "client"}, "start"),
        ({"eta_task": np.inf}, "eta_task"),
        ({"smoothing": -0.1}, "smoothing"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            FedRAM(EXAMPLES, **options)
    with pytest.raises(InvalidInputError, match="every task, got none for task 1"):
        FedRAM([[1, 0], [2, 0]])
    with pytest.raises(InvalidInputError, match="every client, got none for client 0"):
        FedRAM([[0, 0], [2, 1]])
    with pytest.raises(InvalidInputError, match="examples: expected shape"):
        FedRAM([1, 2])
    weights = FedRAM(EXAMPLES)
    with pytest.raises(InvalidInputError, match="clients: expected different indices"):
        weights.update_clients([1.0, 1.0], clients=[0, 0])
    with pytest.raises(InvalidInputError, match="excess: expected shape"):
        weights.update_tasks(np.zeros((2, 3)))


# ---- the claim ---------------------------------------------------------------------------------


def softmax_gradient(logits, labels):
    """Mean over the examples of (loss, gradient of the logits)."""
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    loss = -np.log(p[np.arange(len(labels)), labels] + 1e-12)
    p[np.arange(len(labels)), labels] -= 1
    return loss.mean(), p / len(labels)


def hidden(model, x):
    return np.maximum(x @ model["a"].T + model["b"], 0)


def local_training(model, data, shares, rng, steps=20):
    """Clients draw a task by `shares`, then examples of it: an MLP with one head a task."""
    model = {name: value.copy() for name, value in model.items()}
    for _ in range(steps):
        task = rng.choice(len(data), p=shares)
        x, y = data[task]
        pick = rng.integers(len(y), size=16)
        z = hidden(model, x[pick])
        _, g = softmax_gradient(z @ model["h"][task].T, y[pick])
        back = (g @ model["h"][task]) * (z > 0)
        model["h"][task] -= 0.1 * g.T @ z
        model["a"] -= 0.1 * back.T @ x[pick]
        model["b"] -= 0.1 * back.sum(axis=0)
    return model


def proxy_losses(heads, data):
    return np.array([softmax_gradient(x @ heads[t].T, y)[0] for t, (x, y) in enumerate(data)])


def proxy_step(heads, data, weights):
    gradients = [softmax_gradient(x @ heads[t].T, y)[1].T @ x for t, (x, y) in enumerate(data)]
    return heads - weights[:, None, None] * np.array(gradients)


def test_small_tasks_gain_and_the_mean_does_not_lose():
    """Six clients, three classification tasks on shared features, 400 : 60 : 15 examples."""
    clients, tasks, features, classes = 6, 3, 20, 4
    worst, mean = np.zeros(2), np.zeros(2)
    for seed in (1, 2):
        rng = np.random.default_rng(seed)
        shared = rng.standard_normal((6, features)) / np.sqrt(features)
        truth = 2 * rng.standard_normal((tasks, classes, 6))

        def draw(task, size, rng=rng, shared=shared, truth=truth):
            x = rng.standard_normal((size, features))
            logits = np.tanh(2 * x @ shared.T) @ truth[task].T
            return x, (logits + 0.3 * rng.standard_normal(logits.shape)).argmax(axis=1)

        sizes = (np.array([400, 60, 15]) * rng.uniform(0.5, 1.5, (clients, tasks))).astype(int)
        data = [[draw(t, size) for t, size in enumerate(row)] for row in sizes]
        test = [draw(t, 1000) for t in range(tasks)]
        share = sizes / sizes.sum(axis=1, keepdims=True)

        ram, heads = FedRAM(sizes), np.zeros((tasks, classes, features))
        reference = [heads] * clients
        for _ in range(100):
            reference = [
                proxy_step(r, d, s) for r, d, s in zip(reference, data, share, strict=True)
            ]
        floor = [proxy_losses(r, d) for r, d in zip(reference, data, strict=True)]
        for _ in range(50):
            now = [proxy_losses(heads, d) for d in data]
            excess = excess_loss(now, floor)
            alpha = ram.update_tasks(excess).task_weights * (excess > 0)
            local = [proxy_step(heads, d, a) for d, a in zip(data, alpha, strict=True)]
            after = [proxy_losses(w, d) for w, d in zip(local, data, strict=True)]
            ram.update_clients(
                differential_loss((after * share).sum(axis=1), (now * share).sum(axis=1))
            )
            heads = combine(local, sizes.sum(axis=1) / sizes.sum())

        for method, (task_shares, weights) in enumerate(
            ((share, sizes.sum(axis=1) / sizes.sum()), (ram.task_weights, ram.client_weights))
        ):
            rng = np.random.default_rng(seed + 100)
            model = {
                "a": rng.standard_normal((32, features)) * np.sqrt(2 / features),
                "b": np.zeros(32),
                "h": rng.standard_normal((tasks, classes, 32)) / np.sqrt(32),
            }
            for _ in range(40):
                local = [
                    local_training(model, d, s, rng) for d, s in zip(data, task_shares, strict=True)
                ]
                model = combine(local, weights)
            accuracy = [
                ((hidden(model, x) @ model["h"][t].T).argmax(axis=1) == y).mean()
                for t, (x, y) in enumerate(test)
            ]
            worst[method] += min(accuracy) / 2
            mean[method] += np.mean(accuracy) / 2
    assert worst[1] > worst[0] + 0.02
    assert mean[1] > mean[0]
    assert worst[0] > 0.4  # chance is 0.25: there was something to learn
