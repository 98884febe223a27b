"""One pass for the mean and the server's step: worked numbers, variants, exactness, buffers."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest

import flcore
from flcore import _variants
from flcore.ops import Noise, Step, combine, combine_step, random_normal
from flcore.ops._step import KINDS, SERVER_STREAM
from server_problem import flat, problem
from support import DTYPES, EPS, HAS_TORCH, np_dtype, outputs_per_level

VARIANTS = [v for v, why in _variants.available("combine_step", "cpu").items() if not why]
NATIVE = ("cpu", "reference")
ACCUMULATE = ("float32", "float64", "reproducible")
SIZES = (0, 1, 15, 33, 1025, 8191, 8193)  # around the vectors, the tile of bins and the tile


def trajectory(step: Step, rounds: int = 2, **options) -> list[np.ndarray]:
    """Models after each round of the worked example, from zeros."""
    w, state, found = np.zeros(2, np.float32), {}, []
    for d in ([0.1, -0.2], [0.3, 0.1])[:rounds]:
        result = combine_step([np.float32(d)], [1.0], w, step, **state, **options)
        w, state = result.model, {s: getattr(result, s) for s in step.states}
        found.append(w)
    return found


WORKED = {
    Step("sgd", lr=1.0): ([0.1, -0.2], [0.4, -0.1]),
    Step("momentum", lr=1.0, beta1=0.9): ([0.1, -0.2], [0.49, -0.28]),
    Step("adagrad", lr=0.1, beta1=0.0, tau=1e-3): (
        [0.0990099, -0.0995025],
        [0.1935792, -0.0549802],
    ),
    Step("adam", lr=0.1, tau=1e-3): ([0.0909091, -0.0952381], [0.2105155, -0.1296156]),
    Step("yogi", lr=0.01, tau=1e-3): ([0.0090909, -0.0095238], [0.0210458, -0.0129484]),
}


@pytest.mark.parametrize("variant", NATIVE)
@pytest.mark.parametrize("step", WORKED, ids=lambda step: step.kind)
def test_two_rounds_by_hand(step, variant):
    for got, want in zip(trajectory(step, variant=variant), WORKED[step], strict=True):
        np.testing.assert_allclose(got, want, atol=6e-8)


def test_yogi_keeps_v_where_it_equals_the_square():
    d, v = np.float32([0.5, 0.5, 0.5]), np.float32([0.25, 0.5, 0.125])
    got = combine_step([d], [1.0], 0 * d, Step("yogi"), v=v).v
    np.testing.assert_allclose(got, [0.25, 0.4975, 0.1275], rtol=1e-6)
    assert got[0] == v[0]


# ---- every variant against the reference -------------------------------------------------------


def check_against_reference(case, step, *, dtype, model, accumulate="float32", **options):
    """Compare the CPU kernel with float64, and tell what each rounding may do."""
    options = {"accumulate": accumulate, **options}
    got = combine_step(step=step, **case, **options)
    want = combine_step(step=step, **case, **options, variant="reference")
    wide = {k: np.asarray(x, np.float64) for k, x in case.items() if k in ("model", "m", "v")}
    w = wide["model"]
    pairs = zip(case["weights"], case["updates"], strict=True)
    terms = [abs(q) * np.abs(x.astype(np.float64)) for q, x in pairs]
    scale = sum(terms) + (np.abs(w) * np.abs(case["weights"]).sum())
    work = "float64" if model == "float64" else "float32"
    tiny = 8 * EPS[work]
    d = len(terms) * tiny * scale + tiny  # error of D
    m_bound = d + tiny * np.abs(wide.get("m", 0.0))
    big = 1 + np.abs(want.m.astype(np.float64)) if want.m is not None else 1 + scale
    near = 1.0
    if want.v is not None:
        square = (scale + 1) ** 2
        v_bound = tiny * (np.abs(wide["v"]) + square) + 2 * d * (scale + 1)
        assert (np.abs(got.v.astype(np.float64) - want.v) <= v_bound).all()
        root = np.sqrt(want.v.astype(np.float64))
        near = root + step.tau
        # a quotient of numbers that are known to these bounds
        m_bound = m_bound + big * v_bound / (2 * np.maximum(root, 1e-3)) / near
    if want.m is not None:
        assert (np.abs(got.m.astype(np.float64) - want.m) <= m_bound + tiny * big).all()
    bound = step.lr * (m_bound + tiny * big + d) / near + tiny * (1 + np.abs(w) + scale)
    stored = EPS[model] * np.abs(want.model.astype(np.float64)) + 2.0**-24
    error = np.abs(got.model.astype(np.float64) - want.model.astype(np.float64))
    assert (error <= bound + stored).all(), (error - bound - stored).max()
    return got, want


@pytest.mark.parametrize("inputs", ["updates", "models"])
@pytest.mark.parametrize("accumulate", ACCUMULATE)
@pytest.mark.parametrize("kind", KINDS)
def test_cpu_matches_float64_definition(kind, accumulate, inputs, rng):
    for size in SIZES:
        for dtype, model in (("float32", "float32"), ("float64", "float64")):
            case = problem(rng, size, dtype, model, kind)
            step = Step(kind, lr=0.3, beta1=0.8, beta2=0.9, tau=1e-2)
            options = {"inputs": inputs, "accumulate": accumulate, "divisor": 1.5}
            check_against_reference(case, step, dtype=dtype, model=model, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_every_pair_of_dtypes(kind, rng):
    for dtype, model in itertools.product(DTYPES, DTYPES):
        case = problem(rng, 257, dtype, model, kind, n=9)
        got, _ = check_against_reference(case, Step(kind, lr=0.1), dtype=dtype, model=model)
        assert got.model.dtype == np_dtype(model)
        state = np.float64 if model == "float64" else np.float32
        assert all(x.dtype == state for x in (got.m, got.v) if x is not None)


@pytest.mark.skipif("triton" not in VARIANTS, reason="triton is not installed")
@pytest.mark.parametrize("kind", KINDS)
def test_triton_gives_the_bits_of_the_cpu_kernel(kind, rng):
    import torch

    def tensor(x):
        if x.dtype.name == "bfloat16":
            return torch.from_numpy(x.view(np.int16).copy()).view(torch.bfloat16)
        return torch.from_numpy(x.copy())

    pairs = (("float32", "float32"), ("bfloat16", "float32"), ("float64", "float64"),
             ("float16", "bfloat16"), ("float64", "float32"))  # fmt: skip
    for k, (dtype, model) in enumerate(pairs):
        case = problem(rng, 1300, dtype, model, kind, n=5)
        case = {
            name: [tensor(r) for r in x] if name == "updates" else tensor(x)
            for name, x in case.items()
        }
        options = {
            "accumulate": ACCUMULATE[k % 3],
            "inputs": ("updates", "models")[k % 2],
            "noise": Noise(0.1, seed=5, round=2) if k != 1 else None,
            "cast": "bfloat16" if k else "float16",
            "divisor": 1.0 + 2 * (k % 2),
        }
        results = [
            combine_step(step=Step(kind, lr=0.1), **case, **options, variant=v)
            for v in ("triton", "cpu")
        ]
        for one, other in zip(*results, strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other), (kind, dtype, model)


@pytest.mark.skipif("triton" not in VARIANTS, reason="triton is not installed")
def test_codes_agree_between_triton_and_python():
    from flcore.pykernels import combine_step as kernels

    from flcore import _native

    codes = (kernels.SGD, kernels.MOMENTUM, kernels.ADAGRAD, kernels.ADAM)
    assert [c.value for c in codes] == list(range(4))
    assert kernels.STEP_NONFINITE.value == _native.core.STEP_NONFINITE


COMPILE = """
import json, re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from flcore.pykernels import combine_rows, combine_step, sums

tables = {"table_ptr": "*i64", "flags_ptr": "*i32", "rows": "i32", "layers": "i32"}
found = {}
for name, kernel, arguments, constants in (
    ("step", combine_step.step_kernel, tables,
     dict(D=3, W=1, C=2, A=0, KIND=4, MODELS=True, NOISE=True, DIVIDE=False, EMPTY=False)),
    ("rows", combine_rows.rows_kernel,
     {"matrix_ptr": "*i64", **tables, "lines": "i32", "entries": "i32"}, dict(D=1, A=0)),
):
    constants |= dict(ALIGNED=True, BLOCK=1024)
    names = kernel.arg_names
    signature = {n: arguments.get(n, "constexpr") for n in names}
    source = ASTSource(kernel, signature, constants)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=sums.OPTIONS).asm["ptx"]
    found[name] = re.findall(r"\\b(?:fma|mul|add|div|sqrt)\\.[a-z0-9.]+", ptx)
print(json.dumps(found))
"""


@pytest.mark.skipif("triton" not in VARIANTS, reason="triton is not installed")
def test_triton_kernels_compile_to_operations_rounded_one_by_one():
    pytest.importorskip("triton", minversion="3.3")  # the signature of ASTSource
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for instructions in found.values():
        assert {"mul.rn.f32", "add.rn.f32"} <= set(instructions)
        assert not [i for i in instructions if i.startswith("fma")]
    roots = {i for i in found["step"] if i.startswith(("div", "sqrt")) and i.endswith("f32")}
    assert roots == {"div.rn.f32", "sqrt.rn.f32"}


# ---- exactness ---------------------------------------------------------------------------------

LEVELS_SCRIPT = """
import hashlib, numpy as np, ml_dtypes
from flcore.ops import Noise, Step, combine_step
rng = np.random.default_rng(3)
bf16 = ml_dtypes.bfloat16
for dtype, model in ((np.float32, np.float32), (np.float64, np.float64), (bf16, np.float32),
                     (np.float16, np.float16), (np.float32, bf16)):
    rows = [rng.standard_normal(2101).astype(dtype) for _ in range(11)]
    w = rng.standard_normal(2101).astype(model)
    state = np.float64 if model == np.float64 else np.float32
    m, v = rng.standard_normal(2101).astype(state), rng.random(2101).astype(state)
    rows[0][:4], v[:3] = [0.0, -0.0, 6e-8, 100.0], 0
    for kind in ("sgd", "momentum", "adagrad", "adam", "yogi"):
        for accumulate, inputs in (("float32", "models"), ("float64", "updates"),
                                   ("reproducible", "models")):
            states = {"m": m, "v": v} if kind[0] in "ay" else {"m": m} if kind[0] == "m" else {}
            got = combine_step(rows, rng.uniform(0, 1, 11), w, Step(kind, 0.1, tau=1e-9), **states,
                               inputs=inputs, accumulate=accumulate, cast="float16",
                               noise=Noise(0.01, seed=9, round=1))
            joined = b"".join(x.tobytes() for x in got if x is not None)
            print(kind, accumulate, hashlib.sha256(joined).hexdigest())
"""


def test_instruction_sets_give_identical_bits():
    printed = outputs_per_level(LEVELS_SCRIPT)
    assert len(set(printed.values())) == 1, printed.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_thread_counts_give_identical_bits(kind, rng):
    case = problem(rng, 100_001, "float32", "float32", kind, n=4)
    results = set()
    for threads in (1, 2, 3):
        flcore.set_num_threads(threads)
        results.add(flat(combine_step(step=Step(kind), **case, noise=Noise(0.1), cast="float16")))
    assert len(results) == 1


@pytest.mark.parametrize("accumulate", ACCUMULATE)
@pytest.mark.parametrize("model", ["float32", "float64"])
def test_the_step_is_along_the_bits_of_combine(model, accumulate, rng):
    case = problem(rng, 5000, model, model, "sgd", n=11)
    d = combine(case["updates"], case["weights"], accumulate=accumulate, divisor=3.0)
    options = {"accumulate": accumulate, "divisor": 3.0}
    got = combine_step(step=Step("sgd", lr=1.0), **case, **options).model
    assert got.tobytes() == (case["model"] + d).tobytes()


def test_list_of_layers_equals_flat_input(rng):
    sizes = (1, 64, 0, 4096, 5000)
    case = problem(rng, sum(sizes), "float32", "float32", "adam")
    cuts = np.cumsum(sizes)[:-1]
    pieces = {
        k: [np.split(r, cuts) for r in x] if k == "updates" else np.split(x, cuts)
        for k, x in case.items()
        if k != "weights"
    }
    whole = combine_step(step=Step("adam"), **case)
    parts = combine_step(step=Step("adam"), weights=case["weights"], **pieces)
    for one, many in zip(whole[:3], parts[:3], strict=True):
        assert np.concatenate(many).tobytes() == one.tobytes()


def test_equal_models_change_nothing_even_with_a_tiny_tau(rng):
    w = rng.standard_normal(3000).astype(np.float32)
    weights = np.float64([1, 2, 4]) / 7
    step = Step("adam", lr=0.1, tau=1e-9)  # from rounding errors in D it would make whole steps
    assert combine_step([w] * 3, weights, w, step, inputs="models").model.tobytes() == w.tobytes()
    mean = combine([w] * 3, weights)
    assert (mean != w).any(), "the mean rounds somewhere: the difference has to be taken first"


def test_16_bit_updates_do_not_accumulate_in_their_own_type():
    ones, zero = np.ones((4096, 3), np.float16), np.zeros(3, np.float32)
    got = combine_step(ones, np.ones(4096), zero, Step("sgd")).model
    np.testing.assert_array_equal(got, np.float32([4096] * 3))  # float16 sums would stop at 2048
    big = combine_step([np.full(3, 1000, np.float16)] * 300, np.ones(300), zero, Step("sgd"))
    np.testing.assert_array_equal(big.model, np.float32([3e5] * 3))  # beyond float16


def test_a_float32_master_keeps_steps_that_its_copy_cannot_show():
    d, w = [np.full(1, 2.0**-10, np.float32)], np.ones(1, np.float32)
    for _ in range(8):
        w, _, _, copy = combine_step(d, [1.0], w, Step("sgd"), cast="bfloat16", variant="cpu")
    assert w[0] == 1 + 2.0**-7 == copy.astype(np.float32)[0]
    half = np.ones(1, np_dtype("bfloat16"))
    for _ in range(8):
        half = combine_step(d, [1.0], half, Step("sgd")).model
    assert half[0] == 1  # a bfloat16 master loses each of them


@pytest.mark.parametrize("variant", NATIVE)
@pytest.mark.parametrize("cast", ["float16", "bfloat16"])
@pytest.mark.parametrize("model", DTYPES)
def test_the_copy_is_the_new_model_rounded_once(variant, cast, model, rng):
    case = problem(rng, 1001, "float32", model, "momentum")
    got = combine_step(step=Step("momentum"), **case, cast=cast, variant=variant)
    if (model, cast) == ("float64", "bfloat16"):  # ml_dtypes rounds this pair twice
        error = np.abs(got.cast.astype(np.float64) - got.model)
        assert (error <= EPS["bfloat16"] / 2 * np.abs(got.model)).all()
    else:
        assert got.cast.tobytes() == got.model.astype(np_dtype(cast)).tobytes()


# ---- noise -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["float32", "float64"])
@pytest.mark.parametrize("variant", NATIVE)
def test_noise_is_the_named_stream(variant, model, rng):
    case = problem(rng, 9000, model, model, "sgd")
    layers = {k: [x, x[:100]] for k, x in case.items() if k == "model"}
    layers["updates"] = [[r, r[:100]] for r in case["updates"]]
    noise = Noise(0.25, seed=(7 << 40) + 1, round=3)
    options = {"weights": case["weights"], "step": Step("sgd"), "variant": variant}
    plain = combine_step(**layers, **options).model
    noisy = combine_step(**layers, **options, noise=noise).model
    for j, (a, b) in enumerate(zip(plain, noisy, strict=True)):
        z = random_normal(len(a), noise.seed, round=3, tensor=j, client=SERVER_STREAM)
        np.testing.assert_allclose(b - a, 0.25 * z, atol=4e-7)


def test_noise_has_the_moments_of_its_standard_deviation():
    d, z = 1_000_000, Noise(0.55, seed=1)
    got = combine_step(np.zeros((1, d), np.float32), [1.0], np.zeros(d, np.float32), Step("sgd"),
                       noise=z).model  # fmt: skip
    assert abs(got.mean(dtype=np.float64)) < 5 * 0.55 / 1000
    assert abs(got.std(dtype=np.float64) / 0.55 - 1) < 0.005


# ---- torch and GPU -----------------------------------------------------------------------------


@pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")
def test_torch_gives_the_bits_of_numpy_and_parameters_can_be_stepped(rng):
    import torch

    case = problem(rng, 3000, "float32", "float32", "adam")
    want = combine_step(step=Step("adam"), **case)
    rows = [torch.from_numpy(r) for r in case["updates"]]
    model = torch.nn.Parameter(torch.from_numpy(case["model"].copy()))
    state = {s: torch.from_numpy(case[s]) for s in ("m", "v")}
    got = combine_step(rows, case["weights"], model, Step("adam"), **state, cast="bfloat16")
    for one, other in zip(want[:3], got[:3], strict=True):
        assert not other.requires_grad and other.numpy().tobytes() == one.tobytes()
    assert torch.equal(got.cast, got.model.bfloat16())
    with torch.no_grad():
        combine_step(rows, case["weights"], model, Step("adam"), **state, out=model)
    assert model.detach().numpy().tobytes() == want.model.tobytes()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_gives_the_bits_of_the_cpu_kernel(kind):
    import torch

    names = Step(kind).states
    for dtype, model in itertools.product((torch.float32, torch.bfloat16), (torch.float32,) * 2):
        rows = [torch.randn(70_001).to(dtype) for _ in range(9)]
        w, state = torch.randn(70_001).to(model), {s: torch.rand(70_001) for s in names}
        options = {"noise": Noise(0.1, seed=5), "cast": "bfloat16", "inputs": "models"}
        want = combine_step(rows, [0.1] * 9, w, Step(kind), **state, **options)
        on_gpu = {s: x.cuda() for s, x in state.items()}
        cuda_rows = [r.cuda() for r in rows]
        got = combine_step(cuda_rows, [0.1] * 9, w.cuda(), Step(kind), **on_gpu, **options)
        for a, b in zip(want, got, strict=True):
            assert a is None or torch.equal(a, b.cpu())
