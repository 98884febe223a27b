"""What entries compete in: the update, its layers, blocks; the laws of top-k in each of them."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flcore
from flcore._state import State
from flcore.compression import DGC, EF14, EF21, EControl, Encoder, TopK, decode
from flcore.errors import InvalidInputError
from flcore.ops.sparsify import sparsify
from flcore.reference import sparsify as reference
from flcore.reference import wire
from support import np_dtype, outputs_per_level

G = np.array([4, -3, 2, 1], np.float32)


def kept(packet):
    body = packet.body()
    return body.indices, body.values


# ---- worked examples ----------------------------------------------------------------------------


def test_dgc_worked_example():
    """mu = 0.9, top-1: 4 at 0, then -8.7 at 1, then 11.6 at 0; momentum of what was sent is 0."""
    state = State(e=np.zeros(4, np.float32), v=np.zeros(4, np.float32), p=0.9, mask=True)
    for index, value, momentum, waiting in (
        (0, 4.0, [0, -3, 2, 1], [0, -3, 2, 1]),
        (1, -8.7, [4, 0, 3.8, 1.9], [4, 0, 5.8, 2.9]),
        (0, 11.6, [0, -3, 5.42, 2.71], [0, -3, 11.22, 5.61]),
    ):
        _, body = wire.parse(sparsify(G, k=1, state=state).tobytes())
        assert body.indices.tolist() == [index]
        np.testing.assert_allclose(body.values, [value], rtol=1e-6)
        np.testing.assert_allclose(state.v, momentum, rtol=1e-6)
        np.testing.assert_allclose(state.e, waiting, rtol=1e-6)


@pytest.mark.parametrize("spare", [False, True])
def test_ef21_worked_examples(spare):
    def messages(state, rounds):
        if spare and state.v is not None:
            state.spare["v"] = np.full(4, 7, np.float32)
        for _ in range(rounds):
            _, body = wire.parse(sparsify(G, k=1, state=state).tobytes())
            yield body.indices[0], body.values[0]

    plain = State(h=np.zeros(4, np.float32))
    assert [*messages(plain, 4)] == [(0, 4.0), (1, -3.0), (2, 2.0), (3, 1.0)]
    assert [value for _, value in messages(plain, 2)] == [0, 0]
    momentum = State(h=np.zeros(4, np.float32), v=np.zeros(4, np.float32), p=0.5, q=0.5)
    assert [*messages(momentum, 3)] == [(0, 2.0), (1, -2.25), (2, 1.75)]
    assert momentum.v.tolist() == [3.5, -2.625, 1.75, 0.875]


def test_dgc_without_masking_and_selection_is_momentum_sgd(rng):
    """Everything is sent in every round: v = mu v + g arrives."""
    d = 1000
    state = State(e=np.zeros(d, np.float32), v=np.zeros(d, np.float32), p=0.9)
    momentum = np.zeros(d, np.float32)
    for _ in range(4):
        g = rng.standard_normal(d).astype(np.float32)
        momentum = np.float32(0.9) * momentum + g
        _, body = wire.parse(sparsify(g, k=d, state=state).tobytes())
        assert np.array_equal(body.values, momentum) and not state.e.any()


# ---- scopes -------------------------------------------------------------------------------------


def test_counts_of_each_scope():
    shapes = [(10, 10), (0,), (3,), (250,)]
    starts, k = TopK(ratio=0.07).segments(shapes)
    assert starts.tolist() == [0, 353] and k.tolist() == [25]
    starts, k = TopK(ratio=0.07, scope="tensor").segments(shapes)
    assert starts.tolist() == [0, 100, 100, 103, 353] and k.tolist() == [7, 0, 1, 18]
    starts, k = TopK(ratio=0.07, scope="tile", tile=64).segments(shapes)
    assert starts.tolist() == [0, 64, 128, 192, 256, 320, 353] and k.tolist() == [4] * 5 + [3]
    assert TopK(ratio=0.05, scope="tile", tile=50).segments([(100,)])[1].tolist() == [3, 3]
    assert TopK(ratio=0.001, scope="tile", tile=64).segments([(100,)])[1].tolist() == [1, 1]
    assert TopK(k=5, scope="tensor").segments(shapes)[1].tolist() == [5, 0, 3, 5]
    assert TopK(k=5, scope="tile", tile=100).segments([(203,)])[1].tolist() == [5, 5, 3]
    assert TopK(ratio=0.07, scope="tensor").entries(shapes) == 26
    assert TopK(ratio=0.1).segments([])[1].tolist() == [0]
    assert Encoder(TopK(ratio=0.07, scope="tensor"), like=[np.zeros(s) for s in shapes]).k == 26


@pytest.mark.parametrize("sizes", [[5], [3, 0, 70_000, 17], [65_536, 1, 65_535, 65_537, 200_000]])
@pytest.mark.parametrize("state", ["", "eh", "ev"])
def test_every_layer_is_selected_by_itself(sizes, state, rng):
    """Segments that lie across tiles, fill them, or fit many into one; state follows."""
    numel, starts = sum(sizes), np.cumsum([0, *sizes])
    k = np.array([min(n, max(1, n // 50)) for n in sizes], np.int64)
    scale = np.concatenate([np.full(n, 10.0 ** (i % 4)) for i, n in enumerate(sizes)])
    updates = [(scale * rng.standard_normal(numel)).astype(np.float32) for _ in range(3)]
    results = []
    for variant, spare in (("reference", False), ("cpu", False), ("cpu", True)):
        memory = State(**{n: np.zeros(numel, np.float32) for n in state}, a=0.3, p=0.5, mask=True)
        if spare:
            memory.spare = {n: np.full(numel, 5, np.float32) for n in state if n != "h"}
        tau = np.zeros(len(sizes), np.uint32)
        result = [
            sparsify(
                g, k=k, segments=starts, state=memory, tau=tau, variant=variant, values="bfloat16"
            ).tobytes()
            for g in updates
        ]
        result += [x.tobytes() for x in (*memory.buffers().values(), tau)]
        results.append(result)
        if not state:
            _, body = wire.parse(result[2])
            want = [
                b + reference.select(updates[2][b:e], int(n))
                for (b, e), n in zip(pairwise(starts), k, strict=True)
            ]
            assert body.indices.tolist() == np.concatenate(want).tolist()
    assert results[0] == results[1] == results[2]


def test_one_guess_may_fail_alone(rng):
    """Where one layer has too few candidates and another enough, only the first is searched."""
    sizes = (150_000, 150_000, 200_000)
    starts = np.cumsum([0, *sizes])
    g = [rng.standard_normal(n).astype(np.float32) for n in sizes]
    k = np.array([1500, 1500, 2000])
    tau = np.zeros(3, np.uint32)
    state = State(e=np.zeros(500_000, np.float32), a=0.0, b=0.0)
    state.spare["e"] = state.e.copy()
    sparsify(g, k=k, segments=starts, tau=tau, state=state)
    g[1] *= 0.01
    packet = sparsify(g, k=k, segments=starts, tau=tau, state=state)
    want = [b + reference.select(x, n) for b, x, n in zip(starts[:-1], g, k, strict=True)]
    want = np.concatenate(want)
    _, body = wire.parse(packet.tobytes())
    assert body.indices.tolist() == want.tolist()
    rest = np.concatenate(g)
    rest[want] = 0
    assert np.array_equal(state.e, rest)


@pytest.mark.parametrize("tile", [1, 3, 16, 128, 1000, 65_536])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_equal_the_reference(tile, dtype, rng):
    for numel in (1, tile, 2 * tile + 1, 66_000):
        if numel // tile > 5000:
            continue
        codec = TopK(ratio=0.1, scope="tile", tile=tile)
        g = [
            rng.standard_normal(n).astype(np_dtype(dtype)) for n in (numel // 3, numel - numel // 3)
        ]
        starts, k = codec.segments([x.shape for x in g])
        encoder = Encoder(codec, EControl(), like=g)
        e, h = (np.zeros(numel, np.float32) for _ in range(2))
        memory = State(e=e, h=h, a=codec.eta(numel))
        for t in range(2):
            packet = encoder.encode(g, round=t)
            want = sparsify(
                g, k=k, segments=starts, state=memory, round=t, epoch=t, flags=wire.FLAG_INCREMENT,
                index=packet.header.index, variant="reference",
            )  # fmt: skip
            assert bytes(packet) == want.tobytes()
            assert np.array_equal(encoder.e, memory.e) and np.array_equal(encoder.h, memory.h)
        lengths = np.diff(starts)
        per_block = np.bincount(kept(packet)[0] // tile, minlength=k.size)
        assert per_block.tolist() == k.tolist() and (k <= lengths).all()


def test_a_block_as_long_as_the_update_is_the_update(rng):
    g = rng.standard_normal(5000).astype(np.float32)
    whole = Encoder(TopK(ratio=0.011), like=g).encode(g)
    for tile in (5000, 65_536):
        assert TopK(ratio=0.011).count(5000) == 55
        block = Encoder(TopK(ratio=0.011, scope="tile", tile=tile), like=g).encode(g)
        assert bytes(block) == bytes(whole)
    assert bytes(Encoder(TopK(ratio=0.011, scope="tensor"), like=g).encode(g)) == bytes(whole)


def test_scopes_keep_the_energy_that_they_should(rng):
    """Layers of very different scale: a block budget across them loses most of the energy."""
    d = 1 << 17
    scales = np.repeat(np.geomspace(0.01, 3, 8), d // 8)
    g = (scales * rng.standard_normal(d)).astype(np.float32)
    energy = {}
    for scope in ("global", "tensor", "tile"):
        codec = TopK(ratio=0.01, scope=scope, tile=1024)
        sent = decode(Encoder(codec, like=np.split(g, 8)).encode(np.split(g, 8)))
        energy[scope] = np.sum(sent.astype(np.float64) ** 2) / np.sum(g.astype(np.float64) ** 2)
    assert 0.14 < energy["global"] and 2 * energy["tile"] < energy["global"]
    assert energy["tile"] < energy["tensor"] * 1.05 < energy["global"]


@settings(deadline=None, max_examples=60, derandomize=True)
@given(data=st.data())
def test_top_k_in_any_segments(data):
    sizes = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=6))
    k = [data.draw(st.integers(min(n, 1), n)) for n in sizes]
    bits = st.integers(0, 2**32 - 1).filter(lambda b: b & 0x7F800000 < 0x7F000000)
    few = st.sampled_from([0, 0x3F800000, 0xBF800000, 1, 0x80000000])
    draw = st.lists(
        data.draw(st.sampled_from([bits, few])), min_size=sum(sizes), max_size=sum(sizes)
    )
    g = np.array(data.draw(draw), np.uint32).view(np.float32)
    starts = np.cumsum([0, *sizes])
    packets = [
        sparsify(g, k=np.array(k), segments=starts, variant=variant).tobytes()
        for variant in ("reference", "cpu")
    ]
    assert packets[0] == packets[1]
    _, body = wire.parse(packets[0])
    assert np.bincount(np.searchsorted(starts, body.indices, "right") - 1,
                       minlength=len(sizes)).tolist() == k  # fmt: skip
    u = g.astype(np.float64)
    for (b, e), n in zip(pairwise(starts), k, strict=True):
        if e > b:
            chosen = body.indices[(body.indices >= b) & (body.indices < e)]
            rest = np.sum(u[b:e] ** 2) - np.sum(u[chosen] ** 2)
            assert rest <= (1 - n / (e - b)) * np.sum(u[b:e] ** 2) * (1 + 1e-12)


DIGESTS = """
import hashlib, numpy as np
from flcore.compression import EControl, EF21, Encoder, TopK
rng = np.random.default_rng(5)
digest = hashlib.sha256()
layers = [rng.standard_normal(n).astype(np.float32) for n in (70_000, 3, 0, 65_537, 200_000)]
for scope, tile in (("tensor", 1), ("tile", 7), ("tile", 1024), ("tile", 65_536)):
    encoder = Encoder(TopK(ratio=0.03, scope=scope, tile=tile), EControl(), like=layers)
    for t in range(3):
        digest.update(bytes(encoder.encode(layers, round=t)))
    digest.update(encoder.e.tobytes() + encoder.h.tobytes())
print(digest.hexdigest())
"""


def test_instruction_set_levels_give_identical_bytes():
    printed = outputs_per_level(DIGESTS)
    assert len(set(printed.values())) == 1, printed


def test_thread_counts_give_identical_bytes(rng):
    sizes = (70_000, 3, 40_000, 65_537, 100_000)
    layers = [np.round(3 * rng.standard_normal(n)).astype(np.float32) for n in sizes]  # many ties
    results = []
    for threads in (1, 2, 3, 7):
        flcore.set_num_threads(threads)
        for scope in ("tensor", "tile"):
            encoder = Encoder(TopK(ratio=0.02, scope=scope, tile=500), EF21(0.5), like=layers)
            results.append([bytes(encoder.encode(layers, round=t)) for t in range(2)])
    assert results[:2] * 4 == results


# ---- error control over segments ----------------------------------------------------------------


@pytest.mark.parametrize("scope", ["global", "tensor", "tile"])
def test_nothing_is_lost_in_any_scope(scope, rng):
    """D + e' = e + g in every round, exactly, and in each segment k entries."""
    layers = [rng.integers(-50, 51, n).astype(np.float32) for n in (300, 70_000, 1)]
    encoder = Encoder(TopK(ratio=0.01, scope=scope, tile=256), EF14(), like=layers)
    for _ in range(3):
        whole = encoder.e + np.concatenate(layers)
        sent = decode(encoder.encode(layers))
        assert np.array_equal(sent + encoder.e, whole)


def test_ef21_recovers_a_fixed_update(rng):
    """Exact after ceil(d / k) rounds, and contracting in each."""
    g = [rng.standard_normal(n).astype(np.float32) for n in (50, 130)]
    encoder = Encoder(TopK(ratio=0.1, scope="tensor"), EF21(), like=g)
    flat, before = np.concatenate(g), np.inf
    for _ in range(math.ceil(1 / 0.1)):
        encoder.encode(g)
        left = np.sum((flat - encoder.h).astype(np.float64) ** 2)
        assert left <= 0.9 * before or left == 0
        before = left
    assert np.array_equal(encoder.h, flat)


def test_dgc_forgets_the_momentum_of_what_was_sent(rng):
    g = rng.standard_normal(1000).astype(np.float32)
    encoder = Encoder(TopK(k=30), DGC(), like=g)
    for t in range(3):
        index, _ = kept(encoder.encode(g, round=t))
        assert not encoder.v[index].any() and not encoder.e[index].any()
        assert np.count_nonzero(encoder.v) == 970


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"scope": "layer"}, "scope: expected one of global, tensor, tile, got 'layer'"),
        ({"tile": 0}, "tile: expected an integer from 1 to 65536, got 0"),
        ({"tile": 65_537}, "tile: expected an integer from 1 to 65536"),
        ({"tile": 2.0}, "tile: expected an integer from 1 to 65536"),
    ],
)
def test_settings_that_cannot_be(options, match):
    with pytest.raises(InvalidInputError, match=match):
        TopK(ratio=0.1, **options)
