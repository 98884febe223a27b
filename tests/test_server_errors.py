"""What stops a server step: values that are not finite, and input that cannot be used."""

from __future__ import annotations

import numpy as np
import pytest

from flcore.aggregation import FedAdagrad, FedAdam, FedAvgM, FedYogi
from flcore.errors import DTypeError, InvalidInputError, NonFiniteError, VariantUnavailableError
from flcore.ops import Noise, Step, combine_step
from flcore.ops._step import KINDS
from server_problem import flat, problem

NATIVE = ("cpu", "reference")

# ---- non-finite values -------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", ["updates", "models"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", NATIVE)
def test_non_finite_policies(variant, kind, inputs, rng):
    case = problem(rng, 9001, "float32", "float32", kind, n=4)
    case["updates"][2][[3, 9000]] = [np.nan, np.inf]
    before = {k: x.copy() for k, x in case.items() if k in ("model", "m", "v")}
    options = {"step": Step(kind), "inputs": inputs, "variant": variant}
    with pytest.raises(NonFiniteError, match=r"updates\[2\]") as caught:
        combine_step(**case, **options)
    assert caught.value.clients == (2,)
    for name, x in before.items():
        assert case[name].tobytes() == x.tobytes()
    left = combine_step(**case, **options, nonfinite="exclude")
    weights = case["weights"] * [1, 1, 0, 1]
    assert flat(left) == flat(combine_step(**{**case, "weights": weights}, **options))
    through = combine_step(**case, **options, nonfinite="propagate").model
    assert not np.isfinite(through[[3, 9000]]).any()
    assert np.isfinite(np.delete(through, [3, 9000])).all()


@pytest.mark.parametrize("variant", NATIVE)
def test_who_is_at_fault_is_named(variant):
    one, nan = np.ones(3, np.float32), np.float32([1, np.nan, 1])
    run = lambda *a, **k: combine_step(*a, **k, variant=variant)  # noqa: E731
    for inputs in ("updates", "models"):
        with pytest.raises(NonFiniteError, match="model: NaN"):
            run([one], [1], nan, Step("sgd"), inputs=inputs)
    with pytest.raises(NonFiniteError, match="m: NaN"):
        run([one], [1], one, Step("momentum"), m=nan)
    with pytest.raises(NonFiniteError, match="v: NaN"):
        run([one], [1], one, Step("adam"), v=nan)
    big = 3e38 * one
    with pytest.raises(NonFiniteError, match="overflows"):
        run([big, big], [1, 1], one, Step("sgd"))
    # D^2 is beyond float32: v would be infinite for ever, and this coordinate never move again
    with pytest.raises(NonFiniteError, match="the step overflows") as caught:
        run([1e25 * one], [1], one, Step("adam"))
    assert caught.value.clients == ()
    half = np.full(3, 65000, np.float16)
    with pytest.raises(NonFiniteError, match="the step overflows"):  # as stored in float16
        run([600 * one], [1], half, Step("sgd"))
    with pytest.raises(NonFiniteError, match="no client is left"):
        run([nan], [1], one, Step("sgd"), nonfinite="exclude")


# ---- bad input ---------------------------------------------------------------------------------

ONE = np.ones(4, np.float32)
ADAM = Step("adam")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": np.ones(5, np.float32)}, InvalidInputError, r"model.*\(4,\)"),
        ({"model": [ONE]}, DTypeError, "model: expected one array"),
        ({"model": np.ones(4, int)}, DTypeError, "model: expected float64.*int64"),
        ({"m": np.ones(4)}, DTypeError, "m: expected float32 for a float32 layer"),
        ({"v": ONE[:3]}, InvalidInputError, r"v.*\(4,\)"),
        ({"out": np.ones(4)}, DTypeError, "out: expected float32"),
        ({"m_out": np.ones(4)}, DTypeError, "m_out: expected float32"),
        ({"cast": "float32"}, DTypeError, "cast: expected one of"),
        ({"cast": ONE}, DTypeError, "cast: expected one of"),
        ({"inputs": "gradients"}, InvalidInputError, "inputs"),
        ({"inputs": "models", "scales": [1]}, InvalidInputError, "scales: expected none"),
        ({"divisor": -1.0}, InvalidInputError, "divisor"),
        ({"weights": [np.nan]}, InvalidInputError, "weights"),
        ({"variant": "cuda"}, VariantUnavailableError, "no cuda variant"),
        ({"scales": [1], "variant": "triton"}, VariantUnavailableError, "no triton variant"),
    ],
)
def test_bad_input_is_named(options, error, message):
    arguments = {"updates": [ONE], "weights": [1.0], "model": ONE, "step": ADAM, **options}
    with pytest.raises(error, match=message):
        combine_step(**arguments)


def test_bad_steps_are_named():
    with pytest.raises(InvalidInputError, match="kind: expected one of"):
        Step("nadam")
    for name in ("lr", "beta1", "beta2", "tau"):
        with pytest.raises(InvalidInputError, match=f"{name}: expected a finite number"):
            Step("adam", **{name: np.inf})
    for wrong in ({"std": -1.0}, {"std": np.nan}, {"seed": -1}, {"seed": 1 << 64}, {"round": 0.5}):
        with pytest.raises(InvalidInputError, match=f"{next(iter(wrong))}: expected"):
            Noise(**{"std": 1.0, **wrong})


# ---- optimisers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FedAvgM(lr=-1), "lr: expected"),
        (lambda: FedAvgM(lr=np.inf), "lr: expected"),
        (lambda: FedAvgM(momentum=1.0), "momentum: expected"),
        (lambda: FedAdam(betas=(0.9, 1.0)), r"betas\[1\]: expected"),
        (lambda: FedAdam(betas=0.9), "betas: expected two"),
        (lambda: FedYogi(tau=0.0), "tau: expected"),
        (lambda: FedAdagrad(v0=-1.0), "v0: expected"),
        (lambda: FedAdagrad(beta1=-0.1), "beta1: expected"),
        (lambda: FedAdam(convention="byzfl"), "convention: expected"),
        (lambda: FedAdam(bias_correction="yes"), "bias_correction: expected"),
        (lambda: FedAvgM(inputs="gradients"), "inputs: expected"),
        (lambda: FedAvgM(noise_std=-1.0), "noise_std: expected"),
        (lambda: FedAvgM(seed=-1), "seed: expected"),
        (lambda: FedAvgM(accumulate="float16"), "accumulate: expected"),
        (lambda: FedAvgM(nonfinite="ignore"), "nonfinite: expected"),
        (lambda: FedAvgM(integers="median"), "integers: expected"),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises(InvalidInputError, match=message):
        make()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((ONE, []), InvalidInputError, "at least one update"),
        ((ONE[:3], [ONE]), InvalidInputError, r"model.*\(4,\)"),
        (([ONE], [ONE]), DTypeError, "model: expected one array"),
        ((ONE.astype(int), [ONE]), DTypeError, "model.*int64"),
        ((ONE.astype(np.int32), [ONE.astype(int)]), DTypeError, "model: expected int64.*int32"),
        ((ONE, [ONE], [-1]), InvalidInputError, r"weights\[0\]"),
        ((ONE, [ONE], [0]), InvalidInputError, "positive sum"),
    ],
)
def test_bad_input_of_optimisers_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        FedAdam().step(*arguments)


def test_a_model_of_another_shape_is_refused():
    server = FedAdam()
    server.step({"w": ONE}, [{"w": ONE}])
    for model, error, message in (
        ({"w": ONE[:2]}, InvalidInputError, r"model\['w'\]: expected shape \(4,\)"),
        ({"w": ONE, "b": ONE}, InvalidInputError, "expected the 1 floating layers"),
        ({"w": ONE.astype(np.float64)}, DTypeError, r"model\['w'\].*precision"),
    ):
        with pytest.raises(error, match=message):
            server.step(model, [{k: np.ones_like(v) for k, v in model.items()}])


def test_a_state_that_does_not_fit_is_refused():
    server = FedAdam()
    server.step(ONE, [ONE])
    good = server.state_dict()
    missing = {k: x for k, x in good.items() if k != "v.0"}
    for state, error, message in (
        ({**good, "kind": "FedYogi"}, InvalidInputError, "expected 'FedAdam', got 'FedYogi'"),
        ({**good, "round": -1}, InvalidInputError, "round"),
        ({**good, "extra": ONE}, InvalidInputError, "for each layer"),
        (missing, InvalidInputError, "for each layer"),
        ({**good, "m.0": ONE.astype(np.float16)}, DTypeError, r"m\.0.*float16"),
        ({**good, "m.0": [1.0]}, DTypeError, r"m\.0.*list"),
        ([], InvalidInputError, "expected a dict"),
    ):
        with pytest.raises(error, match=message):
            server.load_state_dict(state)
    assert server.round == 1 and np.array_equal(server.state_dict()["m.0"], good["m.0"])
