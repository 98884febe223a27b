"""Low-rank factors: bytes and state of the reference, whatever the layers."""

from __future__ import annotations

import numpy as np
import pytest

import flcore
from flcore._state import State
from flcore.compression import Packet, decode
from flcore.errors import DTypeError, InvalidInputError, NonFiniteError
from flcore.ops import low_rank as ops
from flcore.reference import low_rank as reference
from flcore.reference import wire, wire_writer
from flcore.reference.low_rank import Plan
from support import np_dtype, outputs_per_level, unaligned

VARIANTS = ("reference", "cpu")
# Around the tile of 64 x 1024, the lanes, and blocks of whole rows; some layers sent as they are.
SHAPES = [(70, 1500), (5,), (130, 40), (3, 0), (33, 7, 3), (1, 9000), (2100, 17), (64, 1024), ()]
RANKS = [3, 0, 2, 0, 7, 0, 16, 1, 0]
STATES = {"none": {}, "ef14": {"e": 1}, "econtrol": {"e": 1, "h": 1}, "sgdm": {"h": 1, "v": 1}}


def layers_of(rng, shapes=SHAPES, dtype="float32"):
    return [np.asarray(rng.standard_normal(s), np.float32).astype(np_dtype(dtype)) for s in shapes]


def table(shapes) -> bytes:
    return wire_writer.pack_tensors([""] * len(shapes), list(shapes))


def state_of(kind, numel, spare=True, seed=3):
    rng = np.random.default_rng(seed)
    buffers = {n: rng.standard_normal(numel).astype(np.float32) for n in STATES[kind]}
    state = State(**buffers, a=0.3, b=1.0, p=0.9, q=0.1)
    if spare:
        state.spare = {n: np.empty_like(x) for n, x in buffers.items()}
    return state


def run(variant, update, plan, shapes, *, kind="econtrol", rounds=1, spare=True, **options):
    """Packets, factors and state after some warm rounds, as bytes."""
    state, out = state_of(kind, sum(plan.numel), spare), []
    q = None
    for i in range(rounds):
        start = ops.revive(plan, q, 5, i)
        packet, q = ops.low_rank(
            update, plan=plan, start=start, state=state, tensors=table(shapes), round=i,
            variant=variant, **options,
        )  # fmt: skip
        out += [packet.tobytes(), q.tobytes()]
    return out + [x.tobytes() for x in state.buffers().values()]


def factors(packet, plan):
    body = wire.parse(packet.tobytes())[1]
    return plan.parts(body.p, "p"), plan.parts(body.q, "q")


# ---- worked example and properties ---------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_worked_example(variant):
    m = np.array([[1, 2], [3, 4]], np.float32)
    plan, state = Plan.of([(2, 2)], [1]), State(e=np.zeros(4, np.float32))
    options = {"plan": plan, "tensors": table([(2, 2)]), "variant": variant}
    start = np.array([1, 0], np.float32)
    packet, q = ops.low_rank(m, start=start, state=state, **options)
    body = wire.parse(packet.tobytes())[1]
    np.testing.assert_allclose(body.p, [0.316228, 0.948683], atol=1e-6)
    np.testing.assert_allclose(body.q, [3.162278, 4.427189], atol=1e-6)
    np.testing.assert_allclose(decode(Packet.from_bytes(packet)), [1, 1.4, 3, 4.2], atol=1e-6)
    np.testing.assert_allclose(state.e, [0, 0.6, 0, -0.2], atol=1e-6)
    assert float(state.e @ state.e) == pytest.approx(0.4, rel=1e-6) and float((m * m).sum()) == 30
    packet, _ = ops.low_rank(m, start=q, **options)  # warm, without the error
    error = m.reshape(-1) - decode(Packet.from_bytes(packet)).astype(np.float64)
    assert error @ error == pytest.approx(0.133937, abs=2e-6)
    assert np.linalg.svd(m.astype(float))[1][1] ** 2 == pytest.approx(0.133931, abs=1e-6)


@pytest.mark.parametrize("shape", [(40, 30), (300, 1100), (7, 2000)])
def test_a_matrix_of_low_rank_is_exact_after_one_step(shape, rng):
    u = (rng.standard_normal((shape[0], 3)) @ rng.standard_normal((3, shape[1]))).astype(np.float32)
    plan = Plan.of([shape], [4])
    packet, _ = ops.low_rank(
        u, plan=plan, start=ops.revive(plan, None, 1, 0), tensors=table([shape])
    )
    np.testing.assert_allclose(decode(packet_of(packet), like=u), u, atol=3e-5 * np.abs(u).max())


def packet_of(data) -> Packet:
    return Packet.from_bytes(data)


def test_full_rank_loses_nothing(rng):
    u = rng.standard_normal((9, 20)).astype(np.float32)
    plan, state = Plan.of([u.shape], [9]), State(e=np.zeros(180, np.float32))
    ops.low_rank(
        u, plan=plan, start=ops.revive(plan, None, 1, 0), state=state, tensors=table([u.shape])
    )
    assert np.abs(state.e).max() < 1e-5


def test_what_is_sent_is_a_projection(rng):
    u = rng.standard_normal((200, 90)).astype(np.float32)
    plan = Plan.of([u.shape], [5])
    start = ops.revive(plan, None, 1, 0)
    options = {"plan": plan, "tensors": table([u.shape])}
    packet, _ = ops.low_rank(u, start=start, **options)
    (p,), (q,) = factors(packet, plan)
    np.testing.assert_allclose(p.T.astype(float) @ p, np.eye(5), atol=1e-6)
    d = reference.product(p, q)
    assert np.linalg.norm(u - d) <= np.linalg.norm(u)
    np.testing.assert_allclose(d, p.astype(float) @ p.T @ u, atol=1e-4)
    # D does not change when Q becomes Q R: same span
    mixed = (rng.standard_normal((5, 5)) @ start.reshape(5, 90)).astype(np.float32).reshape(-1)
    (p2,), (q2,) = factors(ops.low_rank(u, start=mixed, **options)[0], plan)
    np.testing.assert_allclose(reference.product(p2, q2), d, atol=1e-3)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_no_norm_overflows_or_vanishes(scale, rng):
    u = (rng.standard_normal((80, 60)) * scale).astype(np.float32)
    plan = Plan.of([u.shape], [3])
    options = {"plan": plan, "tensors": table([u.shape])}
    q = ops.revive(plan, None, 1, 0)
    for _ in range(3):  # the warm factor has the magnitude of u; its products must not grow
        packet, q = ops.low_rank(u, start=q, **options)
    (p,), (q3,) = factors(packet, plan)
    np.testing.assert_allclose(p.T.astype(float) @ p, np.eye(3), atol=1e-5)
    best = np.sqrt((np.linalg.svd(u.astype(float) / scale)[1][3:] ** 2).sum())
    left = np.linalg.norm(u.astype(float) / scale - reference.product(p, q3) / scale)
    assert best <= left * (1 + 1e-6) and left < np.linalg.norm(u / scale)


def test_a_dead_factor_is_revived():
    plan = Plan.of([(30, 20), (40, 50)], [2, 3])
    options = {"plan": plan, "tensors": table([(30, 20), (40, 50)])}
    zero = [np.zeros((30, 20), np.float32), np.ones((40, 50), np.float32)]
    packet, q = ops.low_rank(zero, start=ops.revive(plan, None, 1, 0), **options)
    rows = plan.parts(q, "q")
    assert not rows[0].any() and rows[1].any()
    again = ops.revive(plan, q, 1, 1)
    assert plan.parts(again, "q")[0].any(axis=1).all()
    assert plan.parts(again, "q")[1][0].tolist() == rows[1][0].tolist()
    busy = [np.outer(np.arange(30), np.arange(20)).astype(np.float32), zero[1]]
    packet, _ = ops.low_rank(busy, start=again, **options)
    np.testing.assert_allclose(decode(packet_of(packet), like=busy)[0], busy[0], atol=1e-2)


def test_orthonormalise_is_the_reference(rng):
    plan = Plan.of([(70, 33), (2000, 40), (8, 8)], [5, 16, 8])
    p, q = (rng.standard_normal(n).astype(np.float32) for n in (plan.p, plan.q))
    plan.parts(p, "p")[1][:, 3] = 2 * plan.parts(p, "p")[1][:, 1]  # depends on one before it
    for columns, factor in ((False, p), (True, q)):
        ours = ops.orthonormalise(factor, plan=plan, columns=columns)
        want = ops.orthonormalise(factor, plan=plan, columns=columns, variant="reference")
        assert ours.tobytes() == want.tobytes()
    found = plan.parts(ops.orthonormalise(p, plan=plan, columns=False), "p")[1]
    assert not found[:, 3].any()
    kept = np.delete(found, 3, axis=1).astype(float)
    np.testing.assert_allclose(kept.T @ kept, np.eye(15), atol=1e-6)


def test_which_layers_are_compressed():
    shapes = [(100, 100), (100,), (), (10, 10), (100, 5, 20), (0, 9), (40, 4), (1000, 3)]
    assert ops.choose_ranks(shapes, 2, 2.0) == (2, 0, 0, 2, 2, 0, 0, 0)
    assert ops.choose_ranks(shapes, 32, 0.0) == (32, 0, 0, 10, 32, 0, 4, 3)
    assert ops.choose_ranks([(8, 8)], 2, 2.0) == (0,)  # (8 + 8) 2 2 = 64 is not below 64


# ---- the same bits -------------------------------------------------------------------------------


@pytest.mark.parametrize("values", ops.VALUES)
@pytest.mark.parametrize("kind", STATES)
def test_equals_the_reference(kind, values, rng):
    update, plan = layers_of(rng), Plan.of(SHAPES, RANKS)
    options = {"kind": kind, "values": values, "rounds": 2}
    want = run("reference", update, plan, SHAPES, **options)
    assert run("cpu", update, plan, SHAPES, **options) == want
    assert run("cpu", update, plan, SHAPES, spare=False, **options) == want
    header, body = wire.parse(want[0])
    assert (header.codec, header.tile, header.value_dtype) == ("low_rank", 16, values)
    assert body.ranks.tolist() == RANKS


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_dtypes_and_memory_of_the_update(dtype, rng):
    shapes, ranks = [(70, 1030), (9,), (20, 30)], [3, 0, 2]
    update, plan = layers_of(rng, shapes, dtype), Plan.of(shapes, ranks)
    want = run("reference", update, plan, shapes)
    assert run("cpu", update, plan, shapes) == want
    for change in (lambda x: unaligned(x), lambda x: np.asfortranarray(x)):
        assert run("cpu", [change(x) for x in update], plan, shapes) == want
    for x in update:
        x.flags.writeable = False
    assert run("cpu", update, plan, shapes) == want


def test_bfloat16_state_is_rounded_stochastically(rng):
    shapes, plan = [(70, 1030), (9,)], Plan.of([(70, 1030), (9,)], [3, 0])
    update, results = layers_of(rng, shapes), []
    for variant in VARIANTS:
        state = State(e=np.full(sum(plan.numel), 0x3F80, np.uint16))
        packet, _ = ops.low_rank(
            update, plan=plan, start=ops.revive(plan, None, 2, 0), state=state,
            tensors=table(shapes), seed=4, round=6, variant=variant,
        )  # fmt: skip
        results.append((packet.tobytes(), state.e.tobytes()))
    assert results[0] == results[1]


DIGESTS = """
import hashlib, numpy as np, flcore
from flcore._state import State
from flcore.ops import low_rank as ops
from flcore.reference import wire_writer
from flcore.reference.low_rank import Plan
rng = np.random.default_rng(5)
shapes, ranks = [(300, 1500), (5,), (333, 7, 11), (2100, 17)], [7, 0, 3, 16]
plan, table = Plan.of(shapes, ranks), wire_writer.pack_tensors([""] * 4, shapes)
digest, d = hashlib.sha256(), sum(plan.numel)
for dtype in (np.float64, np.float32, np.float16):
    g = [rng.standard_normal(s).astype(dtype) for s in shapes]
    e = rng.standard_normal(d).astype(np.float32)
    for values in ("float32", "bfloat16"):
        once = set()
        for threads in (1, 2, 3):
            flcore.set_num_threads(threads)
            state = State(e=e.copy(), a=0.3)
            packet, q = ops.low_rank(g, plan=plan, start=ops.revive(plan, None, 1, 0), state=state,
                                     values=values, tensors=table)
            half = State(e=e.copy(), spare={"e": e.copy()})
            p, v = ops.low_rank_half(g, plan=plan, factor=q, back=False, state=half)
            q, v = ops.low_rank_half(g, plan=plan, factor=p, back=True, state=half)
            ops.low_rank_residual(half.e, plan=plan, p=p, q=q)
            parts = (packet, q, state.e, p, v, half.e)
            once.add(hashlib.sha256(b"".join(x.tobytes() for x in parts)).hexdigest())
        assert len(once) == 1
        digest.update(once.pop().encode())
print(digest.hexdigest())
"""


def test_levels_and_threads_give_identical_bytes():
    printed = outputs_per_level(DIGESTS)
    assert len(set(printed.values())) == 1, printed


# ---- the linear form -----------------------------------------------------------------------------


@pytest.mark.parametrize("back", [False, True])
def test_half_steps_equal_the_reference_and_are_linear(back, rng):
    plan = Plan.of(SHAPES, RANKS)
    numel = sum(plan.numel)
    factor = rng.standard_normal(plan.p if back else plan.q).astype(np.float32)
    one, two = layers_of(rng), layers_of(rng)
    results = []
    for variant in VARIANTS:
        e = np.random.default_rng(1).standard_normal(numel).astype(np.float32)
        state = State(e=e, spare={"e": np.empty_like(e)})
        product, values = ops.low_rank_half(
            one, plan=plan, factor=factor, back=back, state=state, variant=variant
        )
        results.append((product.tobytes(), values.tobytes(), state.e.tobytes()))
    assert results[0] == results[1]
    u = np.concatenate([x.reshape(-1) for x in one]) + e
    for held, wanted, r in zip(plan.parts(state.e, "u"), plan.parts(u, "u"), RANKS, strict=True):
        assert np.array_equal(held, wanted) if r else not held.any()
    options = {"plan": plan, "factor": factor, "back": back}
    a, b = (ops.low_rank_half(x, **options)[0] for x in (one, two))
    mean, _ = ops.low_rank_half(
        [np.asarray((x + y) / 2) for x, y in zip(one, two, strict=True)], **options
    )
    np.testing.assert_allclose(mean, (a + b) / 2, atol=1e-5 * np.abs(a).max())


@pytest.mark.parametrize("variant", VARIANTS)
def test_residual_leaves_other_layers_alone(variant, rng):
    plan = Plan.of(SHAPES, RANKS)
    p, q = (rng.standard_normal(n).astype(np.float32) for n in (plan.p, plan.q))
    e = rng.standard_normal(sum(plan.numel)).astype(np.float32)
    before = e.copy()
    ops.low_rank_residual(e, plan=plan, p=p, q=q, variant=variant)
    layers = zip(*(plan.parts(x, k) for x, k in ((before, "u"), (e, "u"), (p, "p"), (q, "q"))),
                 RANKS, strict=True)  # fmt: skip
    for old, new, x, y, r in layers:
        want = old - reference.product(x, y) if r else old
        assert new.tobytes() == want.tobytes()


def test_empty_updates():
    plan = Plan.of([], [])
    for variant in VARIANTS:
        data, q = ops.low_rank([], plan=plan, start=np.empty(0, np.float32), variant=variant)
        assert decode(data.tobytes()).size == 0 and q.size == 0


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3.402e38])
@pytest.mark.parametrize("at", [0, 70_000, 72_108])
@pytest.mark.parametrize("spare", [True, False])
def test_nothing_is_written_when_a_value_is_not_finite(bad, at, spare, rng):
    shapes, ranks = [(70, 1030), (9,)], [3, 0]
    update, plan = layers_of(rng, shapes), Plan.of(shapes, ranks)
    flat = np.concatenate([x.reshape(-1) for x in update])
    flat[at] = bad
    if bad < 1e39:
        flat[at - 1] = bad  # the sums overflow, or t - D might
    update = [x.reshape(s) for s, x in zip(shapes, np.split(flat, [72_100]), strict=True)]
    for variant in VARIANTS:
        state = state_of("econtrol", flat.size, spare)
        before = [x.tobytes() for x in state.buffers().values()]
        with pytest.raises(NonFiniteError, match="no state changed"):
            ops.low_rank(
                update, plan=plan, start=ops.revive(plan, None, 1, 0), state=state,
                tensors=table(shapes), variant=variant,
            )  # fmt: skip
        assert [x.tobytes() for x in state.buffers().values()] == before


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"rank": 1}, InvalidInputError, "rank: expected 2 to 32, got 1"),
        ({"rank": 33}, InvalidInputError, "rank: expected 2 to 32, got 33"),
        ({"values": "float16"}, InvalidInputError, "values: expected one of float32, bfloat16"),
        ({"tensors": b""}, InvalidInputError, r"tensors: expected a row of 64 bytes a layer \(2\)"),
        ({"start": np.ones(3, np.float32)}, InvalidInputError, r"start: expected .*\(16,\)"),
        ({"start": np.ones(16)}, DTypeError, "start: expected a float32"),
        ({"plan": Plan.of([(9, 8)], [2])}, InvalidInputError, "plan: expected layers of"),
        ({"state": State(e=np.zeros(3, np.float32))}, InvalidInputError, r"e: expected shape"),
        ({"round": -1}, InvalidInputError, "round: expected"),
        ({"variant": "cuda"}, flcore.errors.VariantUnavailableError, "no cuda variant"),
    ],
)
def test_mistakes_are_named(change, error, match):
    shapes = [(9, 8), (4,)]
    plan = Plan.of(shapes, [2, 0])
    options = {"plan": plan, "start": np.ones(16, np.float32), "tensors": table(shapes)} | change
    with pytest.raises(error, match=match):
        ops.low_rank([np.ones(s, np.float32) for s in shapes], **options)


def test_native_plans_are_checked():
    from flcore import _native

    for numel, n, m, rank, says in (
        ([6], [2], [4], [1], "expected 6 values"),
        ([6], [2], [3], [3], "expected 6 values and a rank"),
        ([6], [2], [3], [33], "rank"),
        ([6], [2], [3], [], "expected 1 rows"),
        ([6], [-2], [-3], [1], "expected 6 values"),
    ):
        with pytest.raises(InvalidInputError, match=says):
            _native.core.LowRankPlan(numel, n, m, rank)
