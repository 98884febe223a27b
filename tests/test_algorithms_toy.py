"""Algorithms against worked numbers: two clients, two parameters, exact gradients, rounds by hand.

`tests/data/toy_vectors.json` holds the global model after each round, and what the methods keep.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from flcore.algorithms import create
from support import ROOT
from toy_problem import CURVATURE, OPTIMUM, PLAIN, Toy

VECTORS = json.loads((ROOT / "tests" / "data" / "toy_vectors.json").read_text())
LR, STEPS = PLAIN["local_lr"], 2


def toy(name: str, *, steps=(2, 2), **options: Any) -> Toy:
    return Toy(create(name, **{**PLAIN, "weighting": "uniform", **options}), steps)


def nearly_linear(monkeypatch) -> None:
    """Make the losses linear, as far as float64 can tell, with the gradient (1, 2)."""
    tiny = 1e-9
    monkeypatch.setattr("toy_problem.CURVATURE", np.full((2, 2), tiny))
    monkeypatch.setattr("toy_problem.OPTIMUM", np.array([[-1.0, -2.0]] * 2) / tiny)


# ---- rounds by hand ------------------------------------------------------------------------------

ONE = (0,)  # the third round of some tables: only client 0 takes part
BOTH = (0, 1)
SIZES: dict[str, Any] = {"weighting": "examples", "steps": (2, 4)}
SPEED: dict[str, Any] = {"prox": 0.1, "rho": 0.1}
SERVER: dict[str, Any] = {"server_lr": 0.1, "tau": 1e-3}

# table: algorithm, options, who takes part in the third round, tolerance
TABLES: dict[str, tuple[str, dict[str, Any], tuple[int, ...], float]] = {
    "fedavg_uniform_K2": ("fedavg", {}, BOTH, 1e-12),
    "fedavg_weights_1_3_taus_2_4": ("fedavg", SIZES, BOTH, 1e-12),
    "fednova_weights_1_3_taus_2_4": ("fednova", SIZES, BOTH, 1e-12),
    "fednova_mom0.9_weights_1_3_taus_2_4": (
        "fednova",
        {**SIZES, "local_momentum": 0.9},
        BOTH,
        1e-12,
    ),
    "fednova_prox0.5_weights_1_3_taus_2_4": ("fednova", {**SIZES, "mu": 0.5}, BOTH, 1e-12),
    "fedprox_mu0.1": ("fedprox", {"mu": 0.1}, BOTH, 1e-12),
    "fedprox_mu1": ("fedprox", {"mu": 1.0}, BOTH, 1e-12),
    "scaffold_optII_rounds_full_full_client0only": ("scaffold", {}, ONE, 1e-12),
    "scaffold_optI_full_full": ("scaffold", {"option": "I"}, BOTH, 1e-12),
    "feddyn_lam0.1_full_full_client0only": ("feddyn", {"prox": 0.1}, ONE, 1e-12),
    "fedspeed_lam0.1_rho0.1_alpha1_serverall": ("fedspeed", SPEED, ONE, 1e-9),
    "fedspeed_lam0.1_rho0.1_alpha1_serveractive": (
        "fedspeed",
        {**SPEED, "server_term": "active"},
        ONE,
        1e-9,
    ),
    "fedspeed_lam0.1_rho0.1_alpha0.5_serverall": (
        "fedspeed",
        {**SPEED, "merge": 0.5},
        ONE,
        1e-9,
    ),
    "fedspeed_lam0.1_rho0.1_alpha1_unnormalised_serveractive": (
        "fedspeed",
        {**SPEED, "normalised": False, "server_term": "active"},
        ONE,
        1e-9,
    ),
    "fedcm_alpha0.1": ("fedcm", {"alpha": 0.1}, BOTH, 1e-12),
    "mofedsam_alpha0.1_rho0.1": ("mofedsam", {"alpha": 0.1, "rho": 0.1}, BOTH, 1e-9),
    "fedsam_rho0.1": ("fedsam", {"rho": 0.1}, BOTH, 1e-9),
    "fedadam_eta0.1_tau1e-3_v0=tau2": ("fedadam", SERVER, BOTH, 1e-12),
    "fedadam_eta0.1_tau1e-3_v0=0": ("fedadam", {**SERVER, "v0": "zero"}, BOTH, 1e-12),
    "fedyogi_eta0.1_tau1e-3_v0=tau2": ("fedyogi", SERVER, BOTH, 1e-12),
    "fedadagrad_eta0.1_b1=0_tau1e-3_v0=tau2": ("fedadagrad", SERVER, BOTH, 1e-12),
    "fedavgm_eta1_beta0.9": ("fedavgm", {"beta": 0.9}, BOTH, 1e-12),
    "fedgps_path_rho0.5": ("fedgps", {"rho": 0.5}, BOTH, 1e-12),
}

# what the tables hold beside the model: of the server, of each client
KEPT = {"c": "control", "Delta": "direction"}
KEPT_BY_CLIENTS = {"c_i": "control", "h": "dual"}


def test_every_table_has_its_algorithm():
    assert set(TABLES) == set(VECTORS)


@pytest.mark.parametrize("table", VECTORS)
def test_rounds_by_hand(table):
    name, options, third, atol = TABLES[table]
    run = toy(name, **options)
    for round, expected in enumerate(VECTORS[table]):
        row = expected if isinstance(expected, dict) else {"w": expected}
        run.play(third if round == 2 else BOTH)
        np.testing.assert_allclose(run.server.model, row["w"], rtol=0, atol=atol)
        for key, kept in KEPT.items():
            if key in row and kept in run.server.state:
                np.testing.assert_allclose(run.server[kept], row[key], rtol=0, atol=10 * atol)
        for key, kept in KEPT_BY_CLIENTS.items():
            if key in row:
                mine = [state[kept] for state in run.states]
                np.testing.assert_allclose(mine, row[key], rtol=0, atol=10 * atol)
    assert round == len(VECTORS[table]) - 1


def test_fedspeed_corrections_after_round_one():
    run = toy("fedspeed", **SPEED)
    run.play()
    mine = [state["dual"] for state in run.states]
    np.testing.assert_allclose(mine, [[0.2079, 0.0], [-0.5467, 0.3896]], atol=5e-5)


# ---- reductions, bit for bit ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "other", "others"),
    [
        ("fedprox", {"mu": 0.0}, "fedavg", {}),
        ("fedprox", {"mu": 0.0, "form": "direct"}, "fedavg", {}),
        ("fedsam", {"rho": 0.0}, "fedavg", {}),
        ("fedsam", {"rho": 0.0, "adaptive": True}, "fedavg", {}),
        ("fedcm", {"alpha": 1.0}, "fedavg", {}),
        ("mofedsam", {"alpha": 1.0, "rho": 0.2}, "fedsam", {"rho": 0.2}),
        ("mofedsam", {"alpha": 0.3, "rho": 0.0}, "fedcm", {"alpha": 0.3}),
        ("fedgamma", {"rho": 0.0}, "scaffold", {}),
        ("fedgamma", {"rho": 0.0, "option": "I"}, "scaffold", {"option": "I"}),
        ("fedspeed", {"rho": 0.0, "prox": 0.2}, "feddyn", {"prox": 0.2}),
        ("fedspeed", {"merge": 0.0, "prox": 0.2}, "feddyn", {"prox": 0.2}),
        ("fedsmoo", {"rho": 0.0, "prox": 0.2}, "feddyn", {"prox": 0.2}),
        ("fedavgm", {"beta": 0.0}, "fedavg", {}),
        ("fedavgm", {"beta": 0.0, "damped": True}, "fedavg", {}),
        ("fedgps", {"rho": 0.0}, "fedavg", {}),
        ("scaffold", {"weighting": "examples"}, "scaffold", {"equal": True}),
        ("feddyn", {"weighting": "examples"}, "feddyn", {"equal": True}),
    ],
)
def test_a_method_without_its_own_term_is_another(name, options, other, others, monkeypatch):
    if others.get("equal"):  # clients of equal size: relative sizes are 1
        monkeypatch.setattr("toy_problem.EXAMPLES", (3, 3))
        others = {}
    more = {"weight_decay": 0.01, "clip": 1.5, "lr_decay": 0.99, "local_momentum": 0.3}
    mine, theirs = toy(name, **more, **options), toy(other, **more, **others)
    for active in (BOTH, BOTH, ONE, (1,), BOTH):
        assert mine.play(active).tobytes() == theirs.play(active).tobytes()


def test_fedsam_whose_losses_are_linear_does_not_depend_on_rho(monkeypatch):
    nearly_linear(monkeypatch)
    for adaptive in (False, True):
        run = toy("fedsam", rho=5.0, adaptive=adaptive)
        np.testing.assert_allclose(run.play(), [-0.2, -0.4], rtol=1e-7)


def test_fedspeed_that_keeps_no_correction_and_averages_models_is_fedprox():
    run, other = toy("fedspeed", rho=0.0, prox=0.7), toy("fedprox", mu=0.7)
    for _ in range(4):
        for state in run.states:
            state["dual"] = np.zeros(2)
        run.server["dual"] = np.zeros(2)
        before = run.server.model
        mean = run.play() - before - run.server["dual"]
        run.server.model = before + mean
        np.testing.assert_allclose(run.server.model, other.play(), rtol=0, atol=1e-14)


def test_fednova_of_clients_with_equal_work_is_fedavg():
    options = {"weighting": "examples", "steps": (3, 3), "local_momentum": 0.5}
    mine, other = toy("fednova", **options).rounds(4), toy("fedavg", **options).rounds(4)
    np.testing.assert_allclose(mine, other, rtol=0, atol=1e-15)


def test_one_step_of_fedprox_is_fedavg_whatever_mu_is():
    for form in ("linear", "direct"):
        mine = toy("fedprox", mu=3.0, form=form, steps=(1, 1)).rounds(5)
        np.testing.assert_allclose(mine, toy("fedavg", steps=(1, 1)).rounds(5), atol=1e-15)


def test_the_two_forms_of_fedprox_differ_where_the_clip_is_active():
    for clip, same in ((None, True), (0.5, False)):
        direct, linear = (
            toy("fedprox", mu=0.5, clip=clip, form=form).rounds(3)[-1]
            for form in ("direct", "linear")
        )
        assert np.allclose(direct, linear, rtol=0, atol=1e-14) == same


def test_first_round_of_scaffold_is_fedavg():
    assert toy("scaffold").play().tobytes() == toy("fedavg").play().tobytes()


def test_first_round_of_fedcm_is_fedavg_at_a_smaller_rate():
    mine, other = toy("fedcm", alpha=0.1).play(), toy("fedavg", local_lr=0.01).play()
    np.testing.assert_allclose(mine, other, rtol=0, atol=1e-16)


def test_first_round_of_feddyn_goes_twice_as_far_as_fedprox():
    mine, other = toy("feddyn", prox=0.4).play(), toy("fedprox", mu=0.4).play()
    np.testing.assert_allclose(mine, 2 * other, rtol=1e-15)


@pytest.mark.parametrize("option", ["I", "II"])
def test_scaffold_of_one_client_is_plain_descent(option):
    run, other = toy("scaffold", option=option), toy("fedavg")
    run.server.population = other.server.population = 1
    for _ in range(5):
        np.testing.assert_allclose(run.play(ONE), other.play(ONE), rtol=0, atol=1e-14)


# ---- fixed points after thousands of rounds ------------------------------------------------------

BEST = [-0.5, 2 / 3]


@pytest.mark.parametrize(
    ("name", "options", "expected", "atol"),
    [
        ("fedavg", {}, [-0.457142857, 0.690909091], 1e-9),
        ("fedprox", {"mu": 1.0}, [-0.4545454545, 0.6923076923], 1e-10),
        ("scaffold", {}, BEST, 1e-12),
        ("scaffold", {"option": "I"}, BEST, 1e-12),
        ("feddyn", {"prox": 0.1}, BEST, 1e-12),
        ("feddyn", {"prox": 1.0}, BEST, 1e-12),
        ("fedspeed", {"prox": 0.1, "rho": 0.1}, [-0.534736, 0.646899], 1e-6),
        ("fedspeed", {"prox": 0.1, "rho": 1e-6}, BEST, 1e-5),
        ("fedcm", {"alpha": 0.1}, [-0.496203, 0.668908], 1e-6),
        ("fednova", SIZES, [-0.714253, 1.177941], 1e-6),
        ("fedavg", SIZES, [-0.846135, 1.482647], 1e-6),
        ("fednova", {**SIZES, "local_lr": 1e-3}, [-0.799279, 1.199760], 1e-6),
        ("fedavg", {**SIZES, "local_lr": 1e-3}, [-0.894337, 1.499813], 1e-6),
        # the objective weighted by examples, 1 to 3, although the clients' means are uniform
        ("scaffold", {"weighting": "examples"}, [-0.8, 1.2], 1e-10),
        ("scaffold", {"weighting": "examples", "option": "I"}, [-0.8, 1.2], 1e-10),
        ("feddyn", {"weighting": "examples"}, [-0.8, 1.2], 1e-10),
    ],
)
def test_where_it_comes_to_rest(name, options, expected, atol):
    run = toy(name, **options)
    if options.get("local_lr") == 1e-3:  # it would take long to get there; does it stay?
        run.server.model = np.array(expected)
    thousands = {"feddyn": 2, "fedavg": 2, "scaffold": 2, "fedprox": 2}
    end = run.rounds(1000 * thousands.get(name, 1) if len(options) < 2 else 1000)[-1]
    np.testing.assert_allclose(end, expected, rtol=0, atol=atol)
    np.testing.assert_allclose(run.play(), end, rtol=0, atol=1e-9)


@pytest.mark.parametrize("local_lr", [0.1, 0.01])
def test_fixed_points_of_fedavg_and_fedprox_in_closed_form(local_lr):
    a = CURVATURE
    for mu in (0.0, 1.0):
        run = toy("fedprox", mu=mu, local_lr=local_lr)
        # a round moves client i by (b_i - w) a_i / (a_i + mu) times what its steps contract
        pull = a / (a + mu) * (1 - (1 - local_lr * (a + mu)) ** STEPS)
        expected = (pull * OPTIMUM).sum(0) / pull.sum(0)
        np.testing.assert_allclose(run.rounds(900)[-1], expected, rtol=0, atol=1e-9)


# ---- what is conserved ---------------------------------------------------------------------------

PLAYED = [BOTH, ONE, (1,), BOTH, (1,), (1,), ONE]


@pytest.mark.parametrize("option", ["I", "II"])
@pytest.mark.parametrize("name", ["scaffold", "fedgamma"])
def test_common_control_is_the_mean_of_the_clients(name, option):
    run = toy(name, option=option, lr_decay=0.9, weight_decay=0.01, clip=1.0, steps=(2, 3))
    for active in PLAYED:
        run.play(active)
        mine = [state.get("control", np.zeros(2)) for state in run.states]
        np.testing.assert_allclose(run.server["control"], np.mean(mine, 0), rtol=0, atol=1e-13)


def test_weighted_control_is_the_weighted_mean_of_the_clients():
    run = toy("scaffold", weighting="examples")
    for active in PLAYED:
        run.play(active)
        parts = [
            p * state.get("control", 0) for p, state in zip((0.5, 1.5), run.states, strict=True)
        ]
        np.testing.assert_allclose(run.server["control"], np.mean(parts, 0), rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["feddyn", "fedspeed", "fedsmoo"])
def test_common_dual_is_the_mean_of_the_clients(name):
    run = toy(name, lr_decay=0.9, weight_decay=0.01, clip=1.0)
    for active in PLAYED:
        run.play(active)
        mine = [state.get("dual", np.zeros(2)) for state in run.states]
        np.testing.assert_allclose(run.server["dual"], np.mean(mine, 0), rtol=0, atol=1e-14)


def test_duals_are_the_sums_of_the_updates_when_everybody_takes_part():
    run, total = toy("feddyn"), np.zeros(2)
    for _ in range(5):
        before = run.server.model
        total += run.play() - before - run.server["dual"]  # the mean update of the round
        mine = [state["dual"] for state in run.states]
        np.testing.assert_allclose(np.mean(mine, 0), total, rtol=0, atol=1e-14)


def test_second_moments_never_turn_negative():
    rng = np.random.default_rng(0)
    for name in ("fedadagrad", "fedadam", "fedyogi"):
        run = toy(name, v0="zero", tau=1e-3)
        for _ in range(50):
            mean = rng.standard_normal(2) * 10.0 ** rng.integers(-3, 3)
            run.algorithm.server_step(run.server, mean, [])
            assert (run.server["v"] >= 0).all(), name


@pytest.mark.parametrize(
    "name", ["fedavg", "fedprox", "fedsam", "fedcm", "mofedsam", "fednova", "fedavgm", "fedyogi"]
)
def test_clients_of_stateless_methods_keep_nothing(name):
    run = toy(name)
    run.rounds(3)
    assert run.states == [{}, {}]


# ---- steps and servers in closed form ------------------------------------------------------------


@pytest.mark.parametrize("form", ["linear", "direct"])
def test_long_local_training_of_fedprox_ends_at_a_stationary_point(form):
    mu = 0.5
    run = toy("fedprox", mu=mu, form=form, steps=(500, 500))
    for i in (0, 1, 0):
        w = run.server.model
        expected = (CURVATURE[i] * OPTIMUM[i] + mu * w) / (CURVATURE[i] + mu)
        np.testing.assert_allclose(run.play((i,)), expected, rtol=0, atol=1e-14)


def test_fedspeed_update_is_a_weighted_sum_of_its_corrected_gradients():
    prox, rho, steps = 0.2, 0.1, 4
    run = toy("fedspeed", prox=prox, rho=rho, steps=(steps, steps))
    run.rounds(3)
    w, before = run.server.model, [state["dual"].copy() for state in run.states]
    run.play()
    for i, state in enumerate(run.states):
        x, expected = w.copy(), np.zeros(2)
        for k in range(steps):
            g1 = CURVATURE[i] * (x - OPTIMUM[i])
            g2 = CURVATURE[i] * (x + rho * g1 / (np.linalg.norm(g1) + 1e-7) - OPTIMUM[i])
            direction = g2 + prox * before[i]  # the prox-correction is -prox * h
            x = x - LR * (direction + prox * (x - w))
            expected -= LR * (1 - LR * prox) ** (steps - 1 - k) * direction
        np.testing.assert_allclose(state["dual"] - before[i], expected, rtol=0, atol=1e-14)


def test_fedcm_direction_approaches_a_constant_gradient_geometrically(monkeypatch):
    nearly_linear(monkeypatch)
    run, expected = toy("fedcm", alpha=0.3), np.zeros(2)
    for _ in range(6):
        run.play()
        expected = 0.3 * np.array([1.0, 2.0]) + 0.7 * expected
        np.testing.assert_allclose(run.server["direction"], expected, rtol=1e-7)


def test_fedsam_gradient_of_a_quadratic_in_one_dimension():
    run, rho = toy("fedsam", rho=0.1, steps=(1, 1)), 0.1
    run.play(ONE)  # gradient (-1, 0): the ascent is rho to the left
    np.testing.assert_allclose(run.server.model, [LR * (1 + rho), 0.0], rtol=0, atol=1e-8)


def test_fedsmoo_step_by_step():
    rho, prox = 0.2, 0.3
    run = toy("fedsmoo", rho=rho, prox=prox)
    w, s = np.zeros(2), np.zeros(2)
    h, duals = np.zeros((2, 2)), np.zeros((2, 2))
    for active in PLAYED:
        updates = []
        for i in active:
            x = w.copy()
            for _ in range(STEPS):
                g1 = CURVATURE[i] * (x - OPTIMUM[i]) - duals[i] - s
                e = rho * g1 / (np.linalg.norm(g1) + 1e-7)
                duals[i] += e - s
                g2 = CURVATURE[i] * (x + e - OPTIMUM[i])
                x = x - LR * (g2 + prox * (h[i] - w) + prox * x)
            h[i] += x - w
            updates.append(x - w)
        w = w + np.mean(updates, 0) + h.mean(0)
        mean = duals[list(active)].mean(0)
        s = rho * mean / (np.linalg.norm(mean) + 1e-7)
        np.testing.assert_allclose(run.play(active), w, rtol=0, atol=1e-12)
        np.testing.assert_allclose(run.server["ascent"], s, rtol=0, atol=1e-12)
        assert np.linalg.norm(s) <= rho


def test_fedadam_without_memory_takes_steps_of_one_size():
    run = toy("fedadam", beta1=0.0, beta2=0.0, tau=0.0, server_lr=0.25)
    np.testing.assert_array_equal(run.play(), [-0.25, 0.25])


def test_yogi_and_adam_agree_where_v_is_zero():
    moments = []
    for name in ("fedyogi", "fedadam"):
        run = toy(name, v0="zero")
        run.play()
        moments.append(run.server["v"])
    np.testing.assert_array_equal(*moments)


def test_damped_momentum_by_hand():
    run, m, w = toy("fedavgm", beta=0.9, damped=True, server_lr=2.0), np.zeros(2), np.zeros(2)
    for _ in range(4):
        other = toy("fedavg")
        other.server.model = w
        m = 0.9 * m + 0.1 * (other.play() - w)
        w = w + 2.0 * m
        np.testing.assert_allclose(run.play(), w, rtol=0, atol=1e-15)


def test_server_momentum_of_fednova_by_hand():
    run = toy("fednova", **SIZES, server_momentum=0.5, lr_decay=0.8)
    plain = toy("fednova", **SIZES, lr_decay=0.8)
    b, w = np.zeros(2), np.zeros(2)
    for t in range(4):
        plain.server.model, lr = w, LR * 0.8**t
        b = 0.5 * b + (plain.play() - w) / lr
        w = w + lr * b
        np.testing.assert_allclose(run.play(), w, rtol=0, atol=1e-14)


def test_paths_of_all_clients_average_to_the_last_update():
    run = toy("fedgps", rho=0.5)
    run.play()
    payload = run.algorithm.downlink(run.server, 0)
    paths = [run.algorithm.others(payload, run.client(i)) for i in BOTH]
    np.testing.assert_allclose(np.mean(paths, 0), run.server["path"], rtol=0, atol=1e-15)
    for i in BOTH:  # one tensor: the shift has the whole length
        shift = run.algorithm.client_begin(payload, run.client(i)).spec.shift
        assert np.linalg.norm(shift.vector) == pytest.approx(0.5, rel=1e-5)


def test_path_of_a_client_that_was_away_is_everybodys():
    run = toy("fedgps", rho=0.5)
    run.play(ONE)
    assert not run.algorithm.others(run.algorithm.downlink(run.server, 1), run.client(1)).any()
    run.play(BOTH)
    run.play((1,))
    payload = run.algorithm.downlink(run.server, 0)
    np.testing.assert_array_equal(run.algorithm.others(payload, run.client(0)), run.server["path"])
    # client 1 was the only one there: no others, no shift
    assert not run.algorithm.others(payload, run.client(1)).any()
