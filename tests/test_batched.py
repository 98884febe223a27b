"""Clients trained together end where clients end that are trained one after another."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from batched_problem import CLASSES, EXAMPLES, check_equal, make_jobs, make_trainer
from flcore.algorithms import Ascent, DataView, DualAscent, LocalWork, Shift, StepSpec, UnitClip
from flcore.algorithms.tools import mean_cross_entropy
from flcore.errors import InvalidInputError
from flcore.simulation.batched import BatchedTrainer, choose_trainer
from flcore.simulation.local import Job, LocalTrainer

nn = torch.nn


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_one_step_by_hand():
    """Two clients with one example each, two classes, and a linear model from 0.

    The probabilities are 1/2, so the gradient is -+1/2 for the scores and that times x.
    """
    model = nn.Linear(1, 2, bias=False)
    torch.nn.init.zeros_(model.weight)
    x, y = torch.tensor([[1.0], [3.0]]), torch.tensor([0, 1])
    one = LocalTrainer(model, x, y)
    views = [DataView(np.array([i]), [1]) for i in range(2)]
    work = LocalWork(one.initial, StepSpec(lr=1.0))
    results = BatchedTrainer(one).train([Job(i, work, views[i], 0) for i in range(2)])
    np.testing.assert_array_equal(results[0].end, [0.5, -0.5])
    np.testing.assert_array_equal(results[1].end, [-1.5, 1.5])
    np.testing.assert_allclose([r.loss for r in results], np.log(2), rtol=1e-6)


# ---- equal to the sequential trainer -----------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        ("mlp", (1, 8, 8)),
        ("wide", (1, 4, 4)),
        ("linear", (6,)),
        ("cnn", (1, 8, 8)),
        ("cnn-gn", (3, 4, 4)),
        ("char", (5,)),
    ],
)
def test_models(model, shape):
    check_equal(one := make_trainer(model, shape), make_jobs(one))


def vectors(one: LocalTrainer, scale: float = 0.05) -> list[np.ndarray]:
    draws = np.random.default_rng(9).standard_normal((4, one.layout.numel)) * scale
    return list(draws.astype(np.float32))


SPECS = {
    "plain": lambda v: [{"clip": None, "decay": 0.0}],
    "scaffold": lambda v: [{"q": vector} for vector in v],
    "scaled": lambda v: [{"alpha": 0.5, "q": vector} for vector in v],
    "full clip": lambda v: [{"clip_mode": "full", "clip": 0.5, "q": vector} for vector in v],
    "own numbers": lambda v: [{"lr": 0.02, "clip": 0.3}, {"lr": 0.2, "clip": 0.5}],
    "momentum": lambda v: [{"momentum": 0.9}],
    "nesterov": lambda v: [{"momentum": 0.9, "nesterov": True}],
    "adam": lambda v: [{"lr": 0.01, "adam": (0.9, 0.999, 1e-3)}],
    "sam": lambda v: [{"shift": Ascent(0.1)}],
    "merged sam": lambda v: [{"shift": Ascent(0.1, merge=0.5)}],
    "raw sam": lambda v: [{"shift": Ascent(0.1, normalised=False)}],
    "adaptive sam": lambda v: [{"shift": Ascent(0.1, adaptive=True), "q": vector} for vector in v],
    "shift": lambda v: [{"shift": Shift(vector)} for vector in v],
    "frozen": lambda v: [{"frozen": v[0] > 0}],
}


@pytest.mark.parametrize("name", SPECS)
def test_forms_of_the_step(name):
    one = make_trainer()
    check_equal(one, make_jobs(one, specs=SPECS[name](vectors(one))))


def test_a_dual_follows_in_both_trainers():
    one = make_trainer()
    duals = []
    for trainer in (one, BatchedTrainer(one, strict=True)):
        shifts = [DualAscent(0.1, v.copy(), v * 0.1) for v in vectors(one, 1e-3)]
        jobs = make_jobs(one, specs=[{"shift": shift} for shift in shifts])
        trainer.train(jobs)
        duals.append(np.stack([shift.dual for shift in shifts]))
    np.testing.assert_allclose(duals[1], duals[0], atol=1e-5)
    assert np.abs(duals[0] - np.stack(vectors(one, 1e-3))).max() > 1e-3


def test_units_are_clipped():
    one = make_trainer()
    rows = np.full(one.layout.numel, -1)
    weight = one.layout.slices["1.weight"]
    rows[weight] = np.arange(weight.stop - weight.start) // 64
    check_equal(one, make_jobs(one, specs=[{"unit_clip": UnitClip(0.01, rows)}]))


@pytest.mark.parametrize("options", [{"loss": "stablemax"}, {"optimizer": "perpgrad"}])
def test_losses_and_optimizers(options):
    one = make_trainer(**options)
    check_equal(one, make_jobs(one), **options)


@pytest.mark.parametrize("sizes", [(1,), (30,), (1, 1), (3, 40, 11, 11, 1, 2, 23, 8, 9, 30, 5, 6)])
def test_sizes(sizes):
    one = make_trainer("linear", (6,))
    for batch_size in (1, 7, 64):
        check_equal(one, make_jobs(one, sizes, batch_size=batch_size))


def test_clients_with_different_steps_keep_their_places():
    one = make_trainer("linear", (6,))
    specs: list[dict[str, Any]] = [{}, {"momentum": 0.9}, {"clip": None}]
    results = check_equal(one, make_jobs(one, (5, 20, 9, 30, 2), specs=specs))
    assert [result.steps for result in results] == [2, 4, 2, 6, 2]


def test_more_clients_than_fit_are_trained_in_parts(monkeypatch):
    one = make_trainer()
    monkeypatch.setattr("flcore.simulation.batched.VALUES", 3 * one.layout.numel)
    check_equal(one, make_jobs(one, (12, 1, 25, 7, 8, 9, 14)))


def test_rounds_of_different_numbers_of_clients():
    one = make_trainer()
    trainer = BatchedTrainer(one, strict=True)
    for sizes in ((10, 20), (3, 9, 14, 6, 2), (5,), (10, 20)):
        jobs = make_jobs(one, sizes)
        for a, b in zip(one.train(jobs), trainer.train(jobs), strict=True):
            np.testing.assert_allclose(b.end, a.end, atol=1e-5)


def test_clients_bring_their_own_examples():
    one = make_trainer()
    jobs = make_jobs(one)
    rng = np.random.default_rng(10)
    for i, job in enumerate(jobs[:3]):
        x = rng.standard_normal((30 + i, 1, 8, 8)).astype(np.float32)
        y = rng.integers(0, CLASSES, 30 + i)
        job.view = DataView(rng.integers(0, 30, 14), [10, 4], x, torch.from_numpy(y))
    jobs[2].view.y = None  # labels of the training data for own examples
    check_equal(one, jobs)


def test_in_place_layers():
    layers = [nn.Flatten(), nn.Linear(64, 16), nn.ReLU(inplace=True), nn.Linear(16, CLASSES)]
    one = make_trainer(nn.Sequential(*layers))
    check_equal(one, make_jobs(one))


def test_parts_that_are_not_trained_or_not_used():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, CLASSES))
    model[1].weight.requires_grad_(False)
    model.unused = nn.Parameter(torch.ones(3))
    model.forward = lambda x: nn.Sequential.forward(model[:4], x)  # type: ignore[method-assign]
    one = make_trainer(model)
    check_equal(one, make_jobs(one, specs=[{"decay": 0.1}]))


# ---- losses of algorithms ----------------------------------------------------------------------


def distance(forward: Any, x: Any, y: Any, weight: Any, aux: dict[str, Any]) -> Any:
    """Keep features and scores near those of two frozen models, more in odd steps."""
    z, scores = forward(x, features=True)
    common, _ = forward(x, aux["common"], features=True)
    own = forward(x, parameters=aux["own"])
    pull = (z - common).square().mean(1) + (scores - own).square().mean(1)
    strength = aux["mu"] * (1 + aux["step"] % 2)
    return mean_cross_entropy(scores, y, weight) + strength * (weight * pull).sum()


def test_losses_with_frozen_models():
    one = make_trainer(batch_loss=distance)
    common, *own = vectors(one, 0.1)
    aux = [{"common": common, "own": vector, "mu": 0.5} for vector in own]
    check_equal(one, make_jobs(one, (12, 5, 25), aux=aux), batch_loss=distance)


def test_numbers_that_clients_do_not_share():
    one = make_trainer(batch_loss=distance)
    common, *own = vectors(one, 0.1)
    aux = [
        {"common": common, "own": v, "mu": mu} for v, mu in zip(own, (0.5, 2.0, 0.5), strict=True)
    ]
    check_equal(one, make_jobs(one, (12, 5, 25), aux=aux), batch_loss=distance)


def test_a_loss_in_rounds_that_follow():
    """Computations are prepared once; what they read is that of the round."""
    one = make_trainer(batch_loss=distance)
    trainer = BatchedTrainer(one, batch_loss=distance, strict=True)
    common, *own = vectors(one, 0.1)
    for scale in (1.0, 2.0):
        aux = [{"common": common * scale, "own": v * scale, "mu": 0.5} for v in own]
        jobs = make_jobs(one, (12, 5, 25), aux=aux)
        for a, b in zip(one.train(jobs), trainer.train(jobs), strict=True):
            np.testing.assert_allclose(b.end, a.end, atol=1e-5)


def test_a_loss_that_changes_with_the_steps_is_recorded_on_demand_only():
    one = make_trainer(batch_loss=distance)
    common, *own = vectors(one, 0.1)
    jobs = make_jobs(one, (12, 5), aux=[{"common": common, "own": v, "mu": 0.5} for v in own])
    lenient = BatchedTrainer(one, batch_loss=distance).train(jobs)
    for a, b in zip(one.train(jobs), lenient, strict=True):
        np.testing.assert_array_equal(a.end, b.end)


def test_labels_with_several_columns():
    def two_tasks(forward: Any, x: Any, y: Any, weight: Any, aux: Any) -> Any:
        scores = forward(x)
        return sum(mean_cross_entropy(scores, y[:, i], weight) for i in range(2))

    one = make_trainer(batch_loss=two_tasks)
    one.y = torch.stack([one.y, one.y.flip(0)], 1)
    check_equal(one, make_jobs(one), batch_loss=two_tasks)


def choosy(forward: Any, x: Any, y: Any, weight: Any, aux: Any) -> Any:
    loss = mean_cross_entropy(forward(x), y, weight)
    return loss if loss.item() > 1 else 2 * loss


def test_a_loss_that_looks_at_values_is_left_to_the_sequential_trainer():
    one = make_trainer(batch_loss=choosy)
    jobs = make_jobs(one)
    with pytest.raises(InvalidInputError, match=r"execution: .*cannot be computed together.*seq"):
        BatchedTrainer(one, batch_loss=choosy, strict=True).train(jobs)
    lenient = BatchedTrainer(one, batch_loss=choosy)
    for _ in range(2):
        for a, b in zip(one.train(jobs), lenient.train(jobs), strict=True):
            np.testing.assert_array_equal(a.end, b.end)


# ---- determinism, divergence -------------------------------------------------------------------


def test_the_same_bits_again():
    one = make_trainer()
    jobs = make_jobs(one, specs=[{"shift": Ascent(0.1), "momentum": 0.5}])
    trainer = BatchedTrainer(one)
    runs = [trainer.train(jobs), trainer.train(jobs), BatchedTrainer(make_trainer()).train(jobs)]
    trainer.train(make_jobs(one, (40, 3)))  # other shapes in between
    runs.append(trainer.train(jobs))
    for run in runs[1:]:
        for a, b in zip(runs[0], run, strict=True):
            np.testing.assert_array_equal(a.end, b.end)
            assert a.loss == b.loss


def test_a_client_that_diverges_does_not_disturb_the_others():
    one = make_trainer()
    jobs = make_jobs(one)
    jobs[2].work.start[:] = np.nan
    results = BatchedTrainer(one).train(jobs)
    assert np.isnan(results[2].loss) and np.isnan(results[2].end).any()
    for i in (0, 1, 3):
        np.testing.assert_allclose(results[i].end, one.train([jobs[i]])[0].end, atol=1e-5)


# ---- what is refused, and what is chosen -------------------------------------------------------


def choose(one: LocalTrainer, execution: str = "auto", participants: int = 5) -> Any:
    return choose_trainer(one, execution=execution, participants=participants)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.BatchNorm1d(64), r"layer 1 \(BatchNorm1d\) keeps statistics.*use GroupNorm, or exec"),
        (nn.Dropout(0.5), r"layer 1 \(Dropout\) draws random numbers.*execution=\"sequential\""),
    ],
)
def test_models_that_cannot_be_batched(layer, message):
    model = nn.Sequential(nn.Flatten(), layer, nn.Linear(64, CLASSES))
    one = make_trainer(model, statistics=True)
    assert choose(one) is one
    assert choose(one, "sequential") is one
    with pytest.raises(InvalidInputError, match=f"execution: {message}"):
        choose(one, "batched")


def test_dropout_of_nothing_is_no_obstacle():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.0), nn.Linear(64, CLASSES))
    one = make_trainer(model)
    assert isinstance(choose(one), BatchedTrainer)


def test_random_numbers_without_a_layer_are_noticed():
    class Noisy(nn.Linear):
        def forward(self, x: Any) -> Any:
            return super().forward(x.flatten(1) + 0.1 * torch.randn(64))

    one = make_trainer(Noisy(64, CLASSES))
    with pytest.raises(InvalidInputError, match="random"):
        BatchedTrainer(one, strict=True).train(make_jobs(one))


def test_operators_that_vmap_does_not_know():
    from flcore.quantization import quantize_model

    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, CLASSES))
    quantize_model(model, "int4", lora_rank=2)
    one = make_trainer(model)
    jobs = make_jobs(one)
    with pytest.raises(InvalidInputError, match=r"flcore::qmatmul hit the vmap fallback"):
        BatchedTrainer(one, strict=True).train(jobs)
    for a, b in zip(one.train(jobs), BatchedTrainer(one).train(jobs), strict=True):
        np.testing.assert_array_equal(a.end, b.end)


def test_auto_takes_what_is_faster():
    digits = make_trainer()
    assert isinstance(choose(digits), BatchedTrainer)
    assert choose(digits, participants=1) is digits
    assert isinstance(choose(digits, "batched", participants=1), BatchedTrainer)
    assert isinstance(choose(make_trainer("cnn")), BatchedTrainer)
    assert not isinstance(choose(make_trainer("cnn", (3, 32, 32))), BatchedTrainer)
    assert not isinstance(choose(make_trainer("mlp", (1, 200, 200))), BatchedTrainer)


def test_labels_that_are_no_classes():
    one = make_trainer()
    one.y[3] = CLASSES
    jobs = make_jobs(one)
    jobs[1].view = DataView(np.array([3]), [1])
    with pytest.raises(InvalidInputError, match=f"y: expected labels from 0 to 4.*got {CLASSES}"):
        BatchedTrainer(one).train(jobs)


def test_evaluation_is_that_of_the_sequential_trainer():
    one = make_trainer()
    trainer = BatchedTrainer(one)
    assert trainer.evaluate(one.initial, one.x, one.y) == one.evaluate(one.initial, one.x, one.y)
    assert len(one.y) == EXAMPLES and trainer.layout is one.layout


# ---- on a GPU ----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["scaffold", "sam", "momentum", "adam"])
@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_a_gpu_finds_the_same(model, name):
    one = make_trainer(model)
    jobs = make_jobs(one, specs=SPECS[name](vectors(one)))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for a, b in zip(one.train(jobs), BatchedTrainer(one, device="cuda").train(jobs), strict=True):
        np.testing.assert_allclose(b.end, a.end, atol=1e-4)
        np.testing.assert_allclose(b.loss, a.loss, rtol=1e-4)
