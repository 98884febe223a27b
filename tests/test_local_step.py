"""Local steps: worked numbers, variants against the reference, laws, exactness, prepared calls."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flcore
from flcore import _native, _variants
from flcore.errors import InvalidInputError
from flcore.ops import (
    LocalStep,
    global_norm,
    global_norm_rows,
    local_step,
    local_step_rows,
)
from support import DTYPES, EPS, HAS_TORCH, SIZES, np_dtype, outputs_per_level

VARIANTS = [v for v, why in _variants.available("local_step", "cpu").items() if not why]
JOIN = _native.core.LOCAL_JOIN * _native.core.LOCAL_TILE  # values of which a lane takes one tile
OPTIONS = (
    {},
    {"alpha": 0.3, "decay": 0.1},
    {"clip": 1.0, "decay": 0.1},
    {"clip": 1.0, "decay": 0.5, "clip_mode": "full"},
    {"clip": 1e6, "alpha": -2.0},
    {"momentum": 0.9, "clip": 2.0, "decay": 0.01},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.9, "nesterov": True, "first": True},
    {"momentum": 0.5, "first": True, "clip": 1.0, "clip_mode": "full"},
)


def draw(rng: np.random.Generator, shape, dtype: str, count: int) -> list[np.ndarray]:
    return [rng.standard_normal(shape).astype(np_dtype(dtype)) for _ in range(count)]


def wide(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64)


# ---- by hand -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_by_hand(variant, dtype):
    """With alpha g + q = (3, 4), whose norm is 5, and x = (1, 2)."""
    g, q = np.array([1, 1], dtype), np.array([1, 2], dtype)
    for options, want in (
        ({}, [-0.5, 0.0]),
        ({"clip": 10.0}, [-0.5, 0.0]),
        ({"clip": 1.0}, [0.7, 1.6]),
        ({"decay": 0.2}, [-0.6, -0.2]),
        ({"decay": 0.2, "clip": 1.0}, [0.6, 1.4]),
        # bracket (3, 4) + (3, 6) = (6, 10)
        ({"decay": 3.0, "clip": math.sqrt(34), "clip_mode": "full"}, [-0.5, -0.5]),
    ):
        x = np.array([1, 2], dtype)
        local_step(x, g, q, alpha=2.0, lr=0.5, variant=variant, **options)
        np.testing.assert_allclose(x, want, atol=1e-15 if dtype == "float64" else 1e-7)
    assert (g == 1).all() and (q == [1, 2]).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_momentum_by_hand(variant):
    """Brackets 1, then 3: buffers 1 and 3.5, nesterov directions 1.5 and 4.75."""
    for nesterov, first, second in ((False, 1.0, 3.5), (True, 1.5, 4.75)):
        x, buffer = np.array([10.0]), np.array([np.nan])
        options = {"lr": 1.0, "momentum": 0.5, "buffer": buffer, "nesterov": nesterov}
        local_step(x, np.array([1.0]), first=True, variant=variant, **options)
        assert x[0] == 10 - first and buffer[0] == 1
        local_step(x, np.array([3.0]), variant=variant, **options)
        assert x[0] == 10 - first - second and buffer[0] == 3.5


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_norm_is_over_all_tensors_of_a_model_and_of_each_row(variant):
    tensors = [np.zeros(1), np.zeros((1, 1)), np.zeros(0)]
    g = [np.array([3.0]), np.array([[4.0]]), np.zeros(0)]
    assert global_norm(g, variant=variant) == 5.0
    assert global_norm(g, g, alpha=2.0, variant=variant) == 15.0
    local_step(tensors, g, lr=1.0, clip=1.0, variant=variant)
    np.testing.assert_allclose([tensors[0][0], tensors[1][0, 0]], [-0.6, -0.8], rtol=1e-15)
    rows = np.array([[3.0, 4.0], [0.0, 0.5]])
    norms = global_norm_rows(rows, rows[0], alpha=[1.0, 2.0], variant=variant)
    np.testing.assert_allclose(norms, [10.0, math.hypot(3.0, 5.0)], rtol=1e-15)
    x = np.zeros((2, 2))
    local_step_rows(x, rows, lr=1.0, clip=1.0, variant=variant)
    np.testing.assert_allclose(x, [[-0.6, -0.8], [0.0, -0.5]], rtol=1e-15)


# ---- against the reference -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_q", [False, True])
def test_cpu_matches_the_reference(with_q, dtype, rng):
    sizes = [draw(rng, size, dtype, 4) for size in SIZES]
    x, g, q, buffer = (list(tensors) for tensors in zip(*sizes, strict=True))
    scale = 8 * max(EPS[dtype], EPS["float64"])
    for options in OPTIONS:
        found = []
        for variant in ("cpu", "reference"):
            mine, state = [v.copy() for v in x], [v.copy() for v in buffer]
            more = {"buffer": state} if "momentum" in options else {}
            local_step(mine, g, q if with_q else None, lr=0.7, variant=variant, **options, **more)
            found.append((mine, state))
        for got, want in zip(*found, strict=True):
            for a, b, c in zip(got, want, x, strict=True):
                bound = scale * (np.abs(wide(b)) + np.abs(wide(c)) + 4)
                assert a.dtype == c.dtype and (np.abs(wide(a) - wide(b)) <= bound).all(), options


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_models_and_tensors_are_pieces_of_one(dtype, rng):
    """A row has the bits of a call of its own, and only the order of sums tells pieces apart."""
    numbers = {name: rng.uniform(0.1, 2.0, 3) for name in ("lr", "alpha", "decay", "clip")}
    for d in (1, 17, 5000):
        x, g, q, buffer = draw(rng, (3, d), dtype, 4)
        for shared in (False, True):
            more = {"momentum": np.array([0.9, 0.0, 0.5])}
            rows, state = x.copy(), buffer.copy()
            given_q = q[1] if shared else q
            local_step_rows(rows, g, given_q, buffer=state, **numbers, **more)
            for i in range(3):
                one, own = x[i].copy(), buffer[i].copy()
                mine = {name: column[i] for name, column in {**numbers, **more}.items()}
                local_step(one, g[i], given_q if shared else q[i], buffer=own, **mine)
                assert one.tobytes() == rows[i].tobytes()
                assert own.tobytes() == state[i].tobytes()
    x, g = draw(rng, 9000, "float64", 2)
    whole, parts = x.copy(), x.copy()
    local_step(whole, g, lr=1.0, clip=1.0)
    cuts = [slice(0, 4096), slice(4096, 4097), slice(4097, 9000)]
    local_step([parts[c] for c in cuts], [g[c] for c in cuts], lr=1.0, clip=1.0)
    np.testing.assert_allclose(parts, whole, rtol=1e-13)


def test_a_mixture_of_dtypes_shapes_and_structures(rng):
    x = {name: draw(rng, (3, 4, 30), name, 1)[0] for name in DTYPES}
    g = {name: draw(rng, (3, 4, 30), name, 1)[0] for name in DTYPES}
    flat = {name: v.ravel().copy() for name, v in x.items()}
    local_step(flat, {name: v.ravel() for name, v in g.items()}, lr=0.1, clip=2.0)
    local_step(x, g, lr=0.1, clip=2.0)
    for name in DTYPES:
        assert x[name].tobytes() == flat[name].tobytes()
    empty: list[np.ndarray] = []
    local_step(empty, empty, lr=1.0, clip=1.0)
    assert global_norm(empty) == 0.0


def test_norms_are_those_of_exact_sums(rng):
    g = (rng.standard_normal(JOIN + 7001) * 10.0 ** rng.uniform(-9, 9, JOIN + 7001)).astype("f4")
    exact = math.sqrt(math.fsum((wide(g) ** 2).tolist()))
    assert abs(global_norm(g) / exact - 1) < 1e-14
    big = np.full(5, 3e38, np.float32)  # beyond the squares of float32
    assert abs(global_norm(big) / (math.sqrt(5) * float(big[0])) - 1) < 1e-15
    x = np.zeros(5, np.float32)
    local_step(x, big, lr=1.0, clip=1.0)
    np.testing.assert_allclose(x, -1 / math.sqrt(5), rtol=1e-6)


# ---- what must hold ------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from([1, 3, 17, 400]), st.floats(0.05, 20.0))
def test_laws(seed, size, clip):
    rng = np.random.default_rng(seed)
    x, g, q = rng.standard_normal((3, size))

    def step(x: np.ndarray, g: np.ndarray, *rest, **options) -> np.ndarray:
        moved = x.copy()
        local_step(moved, g, *rest, **{"lr": 0.3, **options})
        return moved

    moved = step(x, g, q, clip=clip)
    assert np.linalg.norm(moved - x) <= 0.3 * clip * (1 + 1e-12)
    if np.linalg.norm(g + q) < clip * (1 - 1e-9):
        assert moved.tobytes() == step(x, g, q).tobytes()
    assert step(x, -g, -q, clip=clip, lr=-0.3).tobytes() == moved.tobytes()
    assert step(x, 4 * g, 4 * q, clip=4 * clip, lr=0.075).tobytes() == moved.tobytes()
    np.testing.assert_allclose(step(x, g + q, clip=clip), moved, rtol=1e-13, atol=1e-15)
    # decay is beside the clipped part, or with "full" within it
    decayed = step(x, g, q, clip=clip, decay=0.1)
    np.testing.assert_allclose(decayed, moved - 0.03 * x, rtol=1e-12, atol=1e-14)
    full = step(x, g, q, clip=clip, decay=0.1, clip_mode="full")
    np.testing.assert_allclose(full, step(x, g, q + 0.1 * x, clip=clip), rtol=1e-12, atol=1e-14)
    # momentum 0 is no momentum
    assert step(x, g, q, clip=clip, buffer=np.empty(size), first=True).tobytes() == moved.tobytes()


@pytest.mark.parametrize("clip_mode", ["reference", "full"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_norm_that_is_not_finite_is_seen_in_all_of_its_row(variant, clip_mode):
    g = np.ones((4, 6), np.float32)
    g[1, 2], g[2, 0] = np.nan, np.inf
    for clip, spoilt in ((1.0, [0, 6, 6, 0]), (None, [0, 1, 1, 0]), ([1, np.inf, np.inf, 1], None)):
        x = np.zeros((4, 6), np.float32)
        local_step_rows(x, g, lr=1.0, clip=clip, clip_mode=clip_mode, variant=variant)
        bad = (~np.isfinite(x)).sum(axis=1).tolist()
        if spoilt is None:  # a clip of infinity: norm inf is not above it, norm NaN is not below
            spoilt = [0, 6, 1, 0]
        assert bad == spoilt and np.isnan(x[1, 2])


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_that_are_not_active_are_not_touched(variant, rng):
    x, g, buffer = rng.standard_normal((3, 5, 40))
    flags = np.array([True, False, False, True, False])
    for active in (flags, 2, 0, np.zeros(5, bool)):
        rows = np.zeros(5, bool)
        rows[slice(active) if isinstance(active, int) else active] = True
        moved, state = x.copy(), buffer.copy()
        options = {"lr": 0.1, "clip": 1.0, "momentum": 0.9, "active": active, "variant": variant}
        local_step_rows(moved, g, buffer=state, **options)
        want, kept = x.copy(), buffer.copy()
        if rows.any():
            options = {**options, "active": None}
            part, part_state = x[rows], buffer[rows]
            local_step_rows(part, g[rows], buffer=part_state, **options)
            want[rows], kept[rows] = part, part_state
        assert moved.tobytes() == want.tobytes() and state.tobytes() == kept.tobytes()
        norms = global_norm_rows(g, active=active, variant=variant)
        assert (norms[~rows] == 0).all() and (norms[rows] > 0).all()


# ---- exactness ---------------------------------------------------------------------------------


def test_same_bits_at_every_level_and_thread_count():
    script = """
import hashlib, numpy as np, flcore
from flcore.ops import *
rng, digest = np.random.default_rng(1), hashlib.sha256()
sizes = (0, 2, 15, 16, 17, 4095, 4097, 9000)
options = ({}, {"clip": 1.0, "decay": .1}, {"clip": 1.0, "decay": .1, "clip_mode": "full"},
           {"momentum": .9}, {"momentum": .9, "nesterov": True, "first": True})
for dtype in (np.float32, np.float64, np.float16):
    x, g, q, b = ([rng.standard_normal(n).astype(dtype) for n in sizes] for _ in range(4))
    for given in options:
        for with_q in (None, q):
            buffer = b if "momentum" in given else None
            local_step(x, g, with_q, lr=.1, alpha=.7, buffer=buffer, **given)
            for v in x + b:
                digest.update(v.tobytes())
    for v in (*sam_shift(x, g, .1, q=q), *shift(x, g, .3), global_norm(g, q, alpha=.3),
              *round_end(x, g, kind="control", state=b, c=q, scale=3.), *b):
        digest.update(np.asarray(v).tobytes())
x, g, q = rng.standard_normal((3, 600_001)).astype(np.float32)
X, G = rng.standard_normal((2, 5, 90_000)).astype(np.float32)
for threads in (1, 2, 3, 8):
    flcore.set_num_threads(threads)
    y, Y = x.copy(), X.copy()
    local_step(y, g, q, lr=.1, clip=1.0)
    local_step([y[:9], y[9:9], y[9:300_000], y[300_000:]],
               [g[:9], g[9:9], g[9:300_000], g[300_000:]], lr=.1, clip=1.0)
    local_step_rows(Y, G, q[:90_000], lr=.1, clip=1.0)
    for v in (y, Y, sam_shift(y, g, .1), sam_shift_rows(Y, G, .1), global_norm_rows(G)):
        digest.update(v.tobytes())
    print(digest.hexdigest())
    digest = hashlib.sha256() if threads > 1 else digest
"""
    printed = outputs_per_level(script)
    assert len(set(printed.values())) == 1
    lines = next(iter(printed.values())).split()
    assert len(set(lines[2:])) == 1 and len(lines) == 4


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_threads_do_not_change_a_bit(rows, rng):
    x, g = rng.standard_normal((2, rows, JOIN + 70_001)).astype(np.float32)
    found = set()
    for threads in (1, 2, 3, 8):
        flcore.set_num_threads(threads)
        moved = x.copy()
        local_step_rows(moved, g, lr=0.1, clip=3.0, decay=0.01)
        found.add(moved.tobytes())
    assert len(found) == 1


# ---- prepared calls ----------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_prepared_steps_are_those_of_the_functions(variant, rng):
    x, g, h, q, buffer, out = rng.standard_normal((6, 3, 50))
    want, state = x.copy(), buffer.copy()
    steps = LocalStep(x, None, q, buffer, out=out, variant=variant)
    for grad, active in ((g, None), (h, 2), (h, None), (g, np.array([False, True, True]))):
        options = {"clip": 1.0, "momentum": 0.9, "decay": 0.1, "active": active}
        steps.step(0.1, 0.5, g=grad, **options)
        local_step_rows(want, grad, q, lr=0.1, alpha=0.5, buffer=state, variant=variant, **options)
        assert x.tobytes() == want.tobytes() and buffer.tobytes() == state.tobytes()
    steps.sam(0.3, g=h)
    np.testing.assert_allclose(np.linalg.norm(out - x, axis=1), 0.3, rtol=1e-6)
    np.testing.assert_allclose(np.cross(out[:, :3] - x[:, :3], h[:, :3]), 0.0, atol=1e-7)
    with pytest.raises(InvalidInputError, match=r"g: expected shape \(3, 50\), got \(3, 49\)"):
        steps.step(0.1, momentum=0.9, g=h[:, :49])


def test_prepared_steps_of_one_model(rng):
    x, g, h = ([rng.standard_normal((2, 3)), rng.standard_normal(5)] for _ in range(3))
    want = [v.copy() for v in x]
    steps = LocalStep(x, g)
    for grad in (g, h):
        steps.step(0.1, clip=1.0, g=grad)
        local_step(want, grad, lr=0.1, clip=1.0)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(x, want, strict=True))
    with pytest.raises(InvalidInputError, match="g: expected a gradient"):
        LocalStep(x).step(0.1)
    with pytest.raises(InvalidInputError, match="out: sam needs an array"):
        steps.sam(0.1)


def test_prepared_steps_take_no_copies(rng):
    x, g, h = rng.standard_normal((3, 4, 6))
    for call in (
        lambda: LocalStep(x, np.asfortranarray(g)),
        lambda: LocalStep([x[:, ::2]], [g[:, ::2].copy()]),
        lambda: LocalStep(x, g).step(0.1, g=np.asfortranarray(h)),
        lambda: LocalStep([x], [g]).step(0.1, g=[h[::2].repeat(2, 0)[:, ::-1]]),
    ):
        with pytest.raises(InvalidInputError, match="expected an array without gaps"):
            call()
    with pytest.raises(InvalidInputError, match="x: it shares memory with g"):
        LocalStep(x, g).step(0.1, g=x)
    before = x.copy()
    steps = LocalStep(x, g)
    for bad in (dict(lr=np.nan), dict(lr=0.1, clip=-1.0), dict(lr=0.1, momentum=0.5)):
        for _ in range(2):  # before and after the quick way is open
            with pytest.raises(InvalidInputError):
                steps.step(**bad)
            assert (x == before).all()
        steps.step(0.0)
    with pytest.raises(InvalidInputError, match="active: expected"):
        steps.step(0.0, active=5)


# ---- torch -------------------------------------------------------------------------------------

if HAS_TORCH:
    import torch


needs_torch = pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")


@needs_torch
def test_tensors_are_written_in_place_and_in_any_dense_order():
    torch.manual_seed(0)
    x = torch.nn.Conv2d(3, 5, 3).weight
    g = torch.randn_like(x)
    want = x.detach().numpy().copy()
    local_step(want, g.numpy(), lr=0.1)
    last = x.detach().clone().to(memory_format=torch.channels_last)
    for target in (last, x):
        version = target._version
        local_step(target, g, lr=0.1)
        assert target._version > version
        assert torch.equal(target.detach(), torch.from_numpy(want))
    assert last.is_contiguous(memory_format=torch.channels_last)
    rows, grads = torch.randn(3, 8, dtype=torch.bfloat16), torch.randn(3, 8, dtype=torch.bfloat16)
    before = rows.clone()
    local_step_rows(rows[:, :6], grads[:, :6], lr=torch.tensor([1.0, 2.0, 0.0]), clip=1.0)
    assert torch.equal(rows[:, 6:], before[:, 6:]) and torch.equal(rows[2], before[2])
    assert not torch.equal(rows[:2, :6], before[:2, :6])
    norms = global_norm_rows(grads)
    assert norms.dtype == torch.float64
    torch.testing.assert_close(norms, grads.double().norm(dim=1))


@needs_torch
def test_a_change_is_seen_by_autograd():
    x = torch.ones(3, requires_grad=True)
    y = (x * x).sum()
    local_step(x.detach(), torch.ones(3), lr=1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@needs_torch
def test_opcheck_and_compile():
    from flcore import _torch_local_step

    torch.manual_seed(0)
    x, g, q, b = ([torch.randn(4, 5), torch.randn(7)] for _ in range(4))
    arguments = (0.1, 1.0, 0.01, 1.0, "reference", 0.9, False, False)
    torch.library.opcheck(_torch_local_step.op, (x, g, q, b, *arguments))
    torch.library.opcheck(_torch_local_step.op, (x, g, [], [], 0.1, 1.0, 0.0, None, "full", 0.0,
                                                 False, False))  # fmt: skip
    torch._dynamo.reset()
    for more in ({}, {"momentum": 0.5, "nesterov": True}):
        eager, compiled = ([v.clone() for v in x] for _ in range(2))
        states = [[v.clone() for v in b] if more else None for _ in range(2)]
        local_step(eager, g, q, lr=0.1, clip=1.0, buffer=states[0], **more)

        def step(x, buffer, more=more):
            local_step(x, g, q, lr=0.1, clip=1.0, buffer=buffer, **more)

        torch.compile(step, fullgraph=True, backend="aot_eager")(compiled, states[1])
        for one, other in ((eager, compiled), *([states] if more else [])):
            assert all(map(torch.equal, one, other))
