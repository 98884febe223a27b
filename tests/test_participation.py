"""FedAU: weights by hand and against lists of intervals, and the server step."""

from __future__ import annotations

import numpy as np
import pytest

from flcore.aggregation import Mean, ParticipationWeights, fedau_step
from flcore.errors import DTypeError, InvalidInputError, NonFiniteError

TRACE = [0, 0, 1, 1, 0, 0, 0, 0, 0, 1, 0, 1]


def replay(trace, cutoff):
    """Weight in force in every round for one client."""
    participation, used = ParticipationWeights(1, cutoff), []
    for took_part in trace:
        used.append(participation.weights[0])
        participation.update([bool(took_part)])
    return used


def interval_lists(trace, cutoff):
    """Weights in force and closed intervals, as plain lists: (rounds, N) and N lists."""
    closed, gap = [[] for _ in trace[0]], [0] * len(trace[0])
    used = []
    for row in trace:
        used.append([np.mean(lengths) if lengths else 1.0 for lengths in closed])
        for n, took_part in enumerate(row):
            gap[n] += 1
            if took_part or gap[n] == cutoff:
                closed[n].append(gap[n])
                gap[n] = 0
    return np.array(used), closed, gap


# ---- weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cutoff", "want"),
    [
        (3, [1, 1, 1, 3, 2, 2, 2, 7 / 3, 7 / 3, 7 / 3, 2.5, 2.5]),
        (None, [1, 1, 1, 3, 2, 2, 2, 2, 2, 2, 10 / 3, 10 / 3]),
    ],
)
def test_trace_by_hand(cutoff, want):
    np.testing.assert_array_equal(replay(TRACE, cutoff), want)


@pytest.mark.parametrize("cutoff", [1, 2, 3, 50, None])
def test_random_traces_equal_the_lists_of_intervals_and_lose_no_round(cutoff, rng):
    trace = rng.random((300, 8)) < np.linspace(0, 1, 8)  # never, rarely, .., always
    used, closed, gap = interval_lists(trace, cutoff)
    participation = ParticipationWeights(8, cutoff)
    for row, want in zip(trace, used, strict=True):
        np.testing.assert_allclose(participation.weights, want, rtol=1e-14)
        participation.update(row)
    np.testing.assert_array_equal(participation.intervals, [len(c) for c in closed])
    np.testing.assert_array_equal(participation.open_intervals, gap)
    elapsed = participation.weights * participation.intervals * (participation.intervals > 0)
    np.testing.assert_allclose(elapsed + participation.open_intervals, 300)


def test_cutoff_one_and_full_participation_keep_all_weights_at_one(rng):
    one, full = ParticipationWeights(5, 1), ParticipationWeights(5)
    for _ in range(50):
        one.update(rng.random(5) < 0.3)
        full.update(np.ones(5, bool))
        np.testing.assert_array_equal(one.weights, np.ones(5))
        np.testing.assert_array_equal(full.weights, np.ones(5))


@pytest.mark.parametrize("cutoff", [None, 10])
def test_bernoulli_participation_finds_the_inverse_rate(cutoff, rng):
    p = np.array([0.02, 0.05, 0.2, 0.7, 1.0])
    participation = ParticipationWeights(5, cutoff)
    for row in rng.random((100_000, 5)) < p:
        participation.update(row)
    want = 1 / p if cutoff is None else (1 - (1 - p) ** cutoff) / p
    np.testing.assert_allclose(participation.weights, want, rtol=0.05)


def test_cyclic_participation_finds_the_period():
    participation = ParticipationWeights(7)  # client n comes in rounds n + 1, n + 8, ..
    for t in range(21_000):
        participation.update([t % 7])
    np.testing.assert_allclose(participation.weights, 7, rtol=1e-3)
    from_the_last = ParticipationWeights(7)
    for t in range(70):
        from_the_last.update([6] if t % 7 == 6 else [])
    assert from_the_last.weights[6] == 7.0


def test_a_client_that_never_came_jumps_to_the_cutoff():
    participation = ParticipationWeights(2, 4)
    seen = [participation.update([0]).weights[1] for _ in range(9)]
    assert seen == [1, 1, 1, 4, 4, 4, 4, 4, 4]


def test_masks_and_indices_say_the_same(rng):
    by_mask, by_index = ParticipationWeights(100, 9), ParticipationWeights(100, 9)
    for row in rng.random((60, 100)) < 0.1:
        by_mask.update(row)
        by_index.update(np.repeat(rng.permutation(np.flatnonzero(row)), 2))
    np.testing.assert_array_equal(by_mask.weights, by_index.weights)
    assert by_mask.rounds == 60


def test_a_million_clients(rng):
    participation = ParticipationWeights(1_000_000, 3)
    for _ in range(5):
        participation.update(rng.integers(0, 1_000_000, 1000))
    assert participation.intervals.min() == 1 and participation.open_intervals.max() < 3
    with pytest.raises(ValueError, match="read-only"):
        participation.weights[0] = 5.0


def test_state_goes_on_where_it_was(rng):
    trace = rng.random((80, 20)) < 0.2
    whole, first = ParticipationWeights(20, 6), ParticipationWeights(20, 6)
    for row in trace[:40]:
        whole.update(row)
        first.update(row)
    state = first.state_dict()
    first.update(np.ones(20, bool))  # the state is a copy
    second = ParticipationWeights(20, 6)
    second.load_state_dict(state)
    for row in trace[40:]:
        np.testing.assert_array_equal(second.weights, whole.weights)
        whole.update(row)
        second.update(row)
    assert second.weights.tobytes() == whole.weights.tobytes() and second.rounds == 80


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": -1}, r"state\['rounds'\]"),
        ({"cutoff": None}, r"state\['cutoff'\]: expected 3, got None"),
        ({"intervals": np.zeros(3, np.int64)}, r"state\['intervals'\]: expected integers of shape"),
        ({"closed": np.ones(2)}, r"state\['closed'\]: expected integers"),
        ({"closed": np.array([9, 2])}, "client 0 cannot have 1 intervals"),
        ({"intervals": np.array([0, 1])}, "client 0 cannot have 0 intervals"),
        ({"extra": 1}, "state: expected the keys"),
    ],
)
def test_wrong_states_are_refused_and_change_nothing(change, message):
    participation = ParticipationWeights(2, 3).update([0]).update([1])
    state = {**participation.state_dict(), **change}
    with pytest.raises(InvalidInputError, match=message):
        participation.load_state_dict(state)
    np.testing.assert_array_equal(participation.weights, [1, 2])


@pytest.mark.parametrize("participated", [[2], [-1], [0.5], [[0]], [True], [True] * 3, "ab", 1])
def test_wrong_participants_are_refused_and_not_recorded(participated):
    participation = ParticipationWeights(2)
    with pytest.raises(InvalidInputError, match="participated"):
        participation.update(participated)
    assert participation.rounds == 0


@pytest.mark.parametrize(("clients", "cutoff"), [(0, None), (2.0, None), (True, None), (2, 0)])
def test_wrong_populations_are_refused(clients, cutoff):
    with pytest.raises(InvalidInputError, match="num_clients" if cutoff is None else "cutoff"):
        ParticipationWeights(clients, cutoff)


# ---- the server step ---------------------------------------------------------------------------


def test_the_step_divides_by_the_whole_population():
    model = {"w": np.float32([1, 1]), "b": np.float32([0])}
    updates = [
        {"w": np.float32([1, 2]), "b": np.float32([4])},
        {"w": np.float32([0, 8]), "b": np.float32([-4])},
    ]
    result = fedau_step(model, updates, [3, 0.5], 8, lr=2.0)
    np.testing.assert_array_equal(result["w"], np.float32([1.75, 3.5]))  # 1 + 2/8 (3, 6 + 4)
    np.testing.assert_array_equal(result["b"], np.float32([2.5]))
    assert result["w"].dtype == np.float32 and model["w"][0] == 1
    assert fedau_step(model, updates, [3, 0.5], 8, lr=2.0, out=model) is model
    np.testing.assert_array_equal(model["w"], result["w"])


def test_full_participation_is_fedavg_with_uniform_weights(rng):
    x, d = rng.standard_normal(1000), rng.standard_normal((6, 1000))
    participation = ParticipationWeights(6)
    for _ in range(3):
        result = participation.step(x, d, range(6))
        np.testing.assert_allclose(result, x + Mean()(d), rtol=0, atol=1e-14)


def test_nobody_there_leaves_the_model():
    x = np.float32([1, 2])
    participation = ParticipationWeights(3, 2).update([0])
    result = participation.step(x, [], [])
    assert result is not x and result.tobytes() == x.tobytes()
    np.testing.assert_array_equal(participation.weights, [1, 2, 2])


def test_a_step_uses_the_weights_from_before_the_round():
    participation = ParticipationWeights(4)
    participation.update([0]).update([0])
    x = participation.step(np.zeros(1), [np.array([4.0]), np.array([8.0])], [3, 0])
    assert x == [3.0]  # client 3 still counts 1
    assert participation.rounds == 3 and participation.weights[3] == 3.0
    assert participation.step(np.zeros(1), [np.array([4.0])], [3]) == [3.0]


def test_errors_of_the_step_name_what_is_wrong_and_record_nothing():
    x, d = np.zeros(2), [np.ones(2), np.array([np.nan, 0])]
    participation = ParticipationWeights(4)
    with pytest.raises(NonFiniteError, match=r"updates\[1\]") as caught:
        participation.step(x, d, [0, 1])
    assert caught.value.clients == (1,)
    for options in ({}, {"nonfinite": "exclude"}):
        with pytest.raises(NonFiniteError, match=r"^model: NaN"):
            participation.step(x * np.nan, d[:1], [0], **options)
    with pytest.raises(InvalidInputError, match="clients: expected 2 different indices"):
        participation.step(x, d, [1, 1])
    with pytest.raises(InvalidInputError, match="clients: expected 2 different indices"):
        participation.step(x, d, [1])
    with pytest.raises(InvalidInputError, match="clients: expected 2 different indices"):
        participation.step(x, d, np.array([True, True, False, False]))
    assert participation.rounds == 0
    np.testing.assert_array_equal(
        participation.step(x, d, [0, 1], nonfinite="exclude"), [0.25, 0.25]
    )
    assert participation.rounds == 1
    with pytest.raises(InvalidInputError, match="at most 1 client"):
        fedau_step(x, d, [1, 1], 1)
    with pytest.raises(InvalidInputError, match="weights: expected numbers >= 0"):
        fedau_step(x, d, [1, -1], 2)
    with pytest.raises(InvalidInputError, match="lr"):
        fedau_step(x, d, [1, 1], 2, lr=0)
    with pytest.raises(InvalidInputError, match="nonfinite"):
        fedau_step(x, d, [1, 1], 2, nonfinite="ignore")
    with pytest.raises(InvalidInputError, match="model: expected shape"):
        fedau_step(np.zeros(3), d, [1, 1], 2)
    with pytest.raises(DTypeError, match="updates: expected a list"):
        fedau_step(x, None, [], 2)


def test_weights_remove_the_bias_of_unequal_participation():
    """Quadratics 0.5 |x - c_n|^2 whose optima depend on the participation rate."""
    rng = np.random.default_rng(3)
    n, d, rounds, lr = 50, 5, 6000, 0.05
    p = np.geomspace(0.02, 1, n)
    c = rng.standard_normal((n, d)) + 3 * np.log(p / p.mean())[:, None] / np.sqrt(d)
    estimates = [ParticipationWeights(n, cutoff) for cutoff in (None, 50, 10)]
    x, tail = np.zeros((6, d)), np.zeros((6, d))
    for t in range(rounds):
        there = rng.random(n) < p
        w = np.zeros((6, n))
        w[0, there] = 1 / max(there.sum(), 1)
        w[1, there] = 1 / n
        w[2, there] = 1 / p[there] / n
        for row, estimate in zip(w[3:], estimates, strict=True):
            row[there] = estimate.weights[there] / n
            estimate.update(there)
        x += lr * (w @ c - w.sum(axis=1, keepdims=True) * x)
        tail += x * (t >= rounds // 2)
    error = np.linalg.norm(tail / (rounds // 2) - c.mean(axis=0), axis=1)
    participants, everybody, known, endless, fifty, ten = error
    assert endless < fifty < ten < min(participants, everybody)
    assert max(known, endless) < 0.2 < 1 < ten
