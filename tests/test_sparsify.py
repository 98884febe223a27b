"""Exact top-k with feedback: every variant gives the bytes of the reference, whatever the input."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import flcore
from flcore._state import State
from flcore.errors import DTypeError, InvalidInputError, NonFiniteError
from flcore.ops.sparsify import sparsify
from flcore.reference import feedback, wire
from flcore.reference import sparsify as reference
from support import np_dtype, outputs_per_level, unaligned

# Around the vector widths, the block of 1024 coordinates and the tile of 65,536 (16-bit indices).
SIZES = (1, 15, 16, 17, 1023, 1024, 1025, 4097, 65_535, 65_536, 65_537, 131_073)
VALUES = tuple(wire.VALUE_DTYPES)
FLOATS = tuple(name for name in VALUES if name != "int8")
STATES = {
    "none": "",
    "ef14": "e",
    "econtrol": "eh",
    "ef21": "h",
    "ef21 momentum": "hv",
    "dgc": "ev",
    "all": "ehv",
}


def kept(packet: np.ndarray) -> tuple[list[int], list[float]]:
    _, body = wire.parse(packet.tobytes())
    return body.indices.tolist(), body.values.tolist()


def random_state(kept, numel, rng, *, spare=True, dtype="float32", **factors):
    """State of random values, with spares for e and v on request."""

    def buffer(name):
        x = rng.standard_normal(numel).astype(np.float32)
        return x if name == "h" or dtype == "float32" else (x.view(np.uint32) >> 16).astype("u2")

    buffers = {name: buffer(name) for name in kept}
    spares = {name: np.full_like(x, 7) for name, x in buffers.items() if name != "h"}
    return State(**buffers, **factors, spare=spares if spare else {})


def run(variant, update, *, k, state="eh", rounds=1, seed=1, spare=True, carried=True, **options):
    """Packets and state after some rounds, as bytes; the state starts with random values."""
    layers = update if isinstance(update, list) else [update]
    numel = sum(x.size if isinstance(x, np.ndarray) else x.numel() for x in layers)
    factors = {"a": 0.3, "b": 1.0, "p": 0.5, "q": 0.25, "mask": False, "dtype": "float32"}
    factors |= {name: options.pop(name) for name in factors.keys() & options.keys()}
    memory = random_state(state, numel, np.random.default_rng(seed), spare=spare, **factors)
    segments = 1 if isinstance(k, int) else k.size
    tau = np.zeros(segments, np.uint32) if carried else None
    packets = [
        sparsify(update, k=k, state=memory, tau=tau, variant=variant, round=t, **options).tobytes()
        for t in range(rounds)
    ]
    return packets, [x.tobytes() for x in (*memory.buffers().values(), tau) if x is not None]


def same(update, **options):
    ours, want = run("cpu", update, **options), run("reference", update, **options)
    assert ours[0] == want[0], "packets differ"
    assert ours[1] == want[1], "states differ"
    return ours


# ---- worked example and the order of selection -------------------------------------------------


def test_worked_example():
    g = np.array([4, -3, 2, 1], np.float32)
    for variant in ("reference", "cpu"):
        state = State(e=np.zeros(4, np.float32), h=np.zeros(4, np.float32), a=0.5)
        packet = sparsify(g, k=1, state=state, variant=variant)
        assert kept(packet) == ([0], [4.0])
        assert state.e.tolist() == [0, -3, 2, 1] and state.h.tolist() == [4, 0, 0, 0]


def test_keys_order_magnitudes():
    keys = np.array([4.0, -3.0, 2.0, 1.0], np.float32).view(np.uint32) & 0x7FFFFFFF
    assert keys.tolist() == [0x40800000, 0x40400000, 0x40000000, 0x3F800000]


@pytest.mark.parametrize("variant", ["reference", "cpu"])
def test_ties_go_to_the_smaller_index(variant):
    tie = np.array([1, -1, 1, -1], np.float32)
    assert kept(sparsify(tie, k=2, variant=variant)) == ([0, 1], [1.0, -1.0])
    zeros = np.zeros(70_000, np.float32)
    assert kept(sparsify(zeros, k=3, variant=variant)) == ([0, 1, 2], [0.0] * 3)
    signs = np.array([-0.0, 0.0, -0.0], np.float32)
    assert kept(sparsify(signs, k=2, variant=variant))[0] == [0, 1]


def ties_across_tiles() -> np.ndarray:
    x = np.zeros(200_000, np.float32)
    x[::7] = -2.0
    x[[5, 70_001, 199_999]] = 3.0
    return x


ADVERSARIAL = {
    "all zero": np.zeros(131_073, np.float32),
    "all equal": np.full(131_073, -1.5, np.float32),
    "two values": np.tile(np.array([0, 1, 1, 0, 1], np.float32), 26_215),
    "ties across tiles": ties_across_tiles(),
    "rising": np.arange(131_073, dtype=np.float32),
    "falling": np.arange(131_073, dtype=np.float32)[::-1].copy(),
    "one spike": np.eye(1, 131_073, 70_000, dtype=np.float32)[0],
    "subnormal": np.arange(131_073, dtype=np.uint32).view(np.float32),
    # the 11 bits of the first histogram agree; then also the next 11
    "same leading bits": np.linspace(1, 1.0009, 131_073, dtype=np.float32),
    "same 22 bits": (np.uint32(0x3F800000) + np.arange(131_073, dtype=np.uint32) % 512).view(
        np.float32
    ),
    "huge and tiny": np.tile(np.array([3.4e38, 1e-45, -3.4e38, 65_520.0], np.float32), 32_768),
}


@pytest.mark.parametrize("name", ADVERSARIAL)
@pytest.mark.parametrize("share", [0, 0.01, 0.3])
def test_adversarial_inputs(name, share):
    x = ADVERSARIAL[name]
    for k in {max(1, int(share * x.size)), max(1, int(share * x.size) - 1)}:
        packets, _ = same(x, k=k, state="e", a=0.0, b=0.0)
        indices, _ = kept(np.frombuffer(packets[0], np.uint8))
        assert len(indices) == k and indices == reference.select(x, k).tolist()


# ---- every size, state and type ----------------------------------------------------------------


# larger ones of every state: tests/test_carried_threshold.py
GRID = [(n, s) for n in SIZES for s in STATES if n <= 4097 or s in ("none", "econtrol")]


@pytest.mark.parametrize(("numel", "state"), GRID)
def test_equals_the_reference(numel, state, rng):
    g = rng.standard_normal(numel).astype(np.float32)
    for i, k in enumerate(sorted({1, -(-numel // 100), max(1, numel - 1), numel})):
        options = {"values": VALUES[i % 3], "index": ("tile16", "bitmask")[i % 2]}
        options |= {"mask": state == "dgc", "dtype": ("float32", "bfloat16")[i % 2]}
        for spare in (False, True):
            same(g, k=k, state=STATES[state], rounds=2, spare=spare, **options)


def test_empty_update():
    for variant in ("reference", "cpu"):
        state = State(e=np.empty(0, np.float32))
        packet = sparsify(np.empty(0, np.float32), k=0, state=state, variant=variant)
        assert kept(packet) == ([], []) and packet.size == 192


@pytest.mark.parametrize("values", FLOATS)
@pytest.mark.parametrize("index", ["tile16", "bitmask"])
def test_values_are_rounded_and_clamped(values, index):
    edge = [0, -0.0, 1e-45, -6e-8, 6.1e-5, 1 / 3, 1 + 2**-11, 2049, 65_504, 65_519.9, 65_520, 1e30]
    edge += [3.3895314e38, 3.3961775e38, 3.4028235e38, -3.4028235e38, 1 + 2**-8, 1 + 3 * 2**-8]
    g = np.array(edge, np.float32)
    packets, _ = same(g, k=g.size, state="e", a=0.0, b=0.0, values=values, index=index)
    _, sent = kept(np.frombuffer(packets[0], np.uint8))
    largest = {"float32": 3.4028235e38, "float16": 65_504.0, "bfloat16": 3.3895314e38}[values]
    assert np.isfinite(sent).all() and np.abs(sent).max() == np.float32(largest)
    # away from the edges this is the cast of the dtype itself
    normal = np.abs(g) < 60_000
    want = g[normal].astype(np_dtype(values)).astype(np.float32)
    assert np.array_equal(np.array(sent, np.float32)[normal], want)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_dtypes_of_the_update(dtype, rng):
    g = rng.standard_normal(5001).astype(np_dtype(dtype))
    packets, _ = same(g, k=50)
    assert wire.read_header(packets[0]).source_dtype == dtype
    strided = np.repeat(g, 2)[::2]
    read_only = g.copy()
    read_only.flags.writeable = False
    for other in (unaligned(g), strided, read_only):
        assert run("cpu", other, k=50)[0] == packets


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_torch_updates(dtype, rng):
    torch = pytest.importorskip("torch")
    g = rng.standard_normal(4000).astype(np.float32)
    tensor = torch.from_numpy(g).to(getattr(torch, dtype))
    array = tensor.to(torch.float64).numpy().astype(np_dtype(dtype))
    want = run("cpu", array, k=40)
    assert run("cpu", tensor, k=40) == run("reference", tensor, k=40) == want
    assert run("cpu", tensor.reshape(40, 100).t().contiguous().t().reshape(-1), k=40) == want


def test_layers_are_one_update(rng):
    """Any cut into layers, of any dtype, gives the bytes of the concatenation."""
    sizes = [1, 0, 17, 1024, 3, 65_536, 0, 5000, 1]
    flat = rng.standard_normal(sum(sizes)).astype(np.float16)
    layers, start = [], 0
    for i, size in enumerate(sizes):
        dtype = ("float16", "float32", "float64")[i % 3]
        layers.append(unaligned(flat[start : start + size].astype(dtype), 1 + i % 3))
        start += size
    want = run("cpu", flat.astype(np.float64), k=700)
    assert run("cpu", layers, k=700) == want == run("reference", layers, k=700)
    assert sparsify({"a": layers[2].reshape(17, 1)}, k=3).size == sparsify(layers[2], k=3).size


# ---- the same bits everywhere ------------------------------------------------------------------

DIGESTS = """
import hashlib, numpy as np, flcore
from flcore._state import State
from flcore.ops.sparsify import sparsify
rng = np.random.default_rng(5)
digest = hashlib.sha256()
for numel in (17, 1025, 65537, 300_001):
    for dtype in ("float64", "float32", "float16"):
        g = rng.standard_normal(numel).astype(dtype)
        e, h = (rng.standard_normal(numel).astype(np.float32) for _ in range(2))
        state = State(e=e, h=h, a=0.02, spare={"e": np.empty_like(e)})
        tau = np.zeros(1, np.uint32)
        for round, values in enumerate(("float32", "float16", "bfloat16")):
            for index in ("tile16", "bitmask"):
                p = sparsify(g, k=-(-numel // 50), state=state, tau=tau, values=values, index=index)
                digest.update(p.tobytes())
        digest.update(state.e.tobytes() + state.h.tobytes())
equal = np.full(200_000, 0.5, np.float32)
digest.update(sparsify(equal, k=77_777).tobytes())
print(digest.hexdigest())
"""


def test_instruction_set_levels_give_identical_bytes():
    printed = outputs_per_level(DIGESTS)
    assert len(set(printed.values())) == 1, printed


def test_thread_counts_give_identical_bytes(rng):
    g = rng.standard_normal(400_000).astype(np.float32)
    results = []
    for threads in (1, 2, 3):
        flcore.set_num_threads(threads)
        results.append(run("cpu", g, k=4000, rounds=2))
        results.append(run("cpu", np.round(g), k=4000, rounds=2))  # ties in every tile
    assert results[0] == results[2] == results[4] and results[1] == results[3] == results[5]


@settings(deadline=None, max_examples=60, derandomize=True)
@given(data=st.data())
def test_any_floats(data):
    numel = data.draw(st.integers(1, 70))
    bits = st.integers(0, 2**32 - 1).filter(lambda b: b & 0x7F800000 < 0x7F000000)
    draw = hnp.arrays(np.uint32, numel, elements=bits)
    g, e0, h0 = (data.draw(draw).view(np.float32) for _ in range(3))
    a, b = (data.draw(st.floats(0, 2, width=32)) for _ in range(2))
    k, values = data.draw(st.integers(1, numel)), data.draw(st.sampled_from(VALUES))
    results = []
    for variant in ("reference", "cpu"):
        state = State(e=e0.copy(), h=h0.copy(), a=a, b=b)
        packet = sparsify(g, k=k, state=state, values=values, variant=variant)
        e, h = state.e, state.h
        results.append((packet.tobytes(), e.tobytes(), h.tobytes()))
    assert results[0] == results[1]
    _, t, u = feedback.form(g, State(e=e0, h=h0, a=a, b=b))
    indices, _ = kept(packet)
    assert len(indices) == k == len(set(indices)) and indices == sorted(indices)
    outside = np.setdiff1d(np.arange(numel), indices)
    assert np.array_equal(e[outside], t[outside]) and np.array_equal(h[outside], h0[outside])
    if outside.size:
        assert np.abs(u[indices]).min() >= np.abs(u[outside]).max()


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 17, 70_000])
@pytest.mark.parametrize("spare", [False, True])
def test_nothing_is_written_when_a_value_is_not_finite(bad, at, spare, rng):
    for place in ("g", "e", "h", "v"):
        g = rng.standard_normal(70_001).astype(np.float32)
        state = random_state("ehv", g.size, rng, spare=spare, p=0.5)
        tau = np.full(1, 0x3FC00000, np.uint32)  # 1.5: a guess that would do
        (g if place == "g" else getattr(state, place))[at] = bad
        before = {name: x.copy() for name, x in state.buffers().items()}
        for variant in ("reference", "cpu"):
            with pytest.raises(NonFiniteError, match="no state changed"):
                sparsify(g, k=5, state=state, tau=tau, variant=variant)
        for name, x in state.buffers().items():
            assert x.tobytes() == before[name].tobytes(), name
        assert tau[0] == 0x3FC00000


def test_overflow_counts_as_not_finite():
    g = np.full(20, 3e38, np.float32)
    e = np.full(20, 3e38, np.float32)
    for variant in ("reference", "cpu"):
        with pytest.raises(NonFiniteError, match="overflows float32"):
            sparsify(g, k=1, state=State(e=e, a=0.0), variant=variant)  # u is finite, t is not
    with pytest.raises(NonFiniteError, match=r"update\['w'\].*got inf at flat position 1"):
        sparsify({"v": g, "w": np.array([1, 1e39])}, k=1)
    assert e.tolist() == [np.float32(3e38)] * 20


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"k": 0}, InvalidInputError, "k: expected an integer from 1 to 8, got 0"),
        ({"k": 9}, InvalidInputError, "k: expected an integer from 1 to 8, got 9"),
        ({"k": 1.0}, InvalidInputError, "k: expected an integer"),
        ({"values": "int4"}, InvalidInputError, "values: expected one of float32"),
        ({"index": "zip"}, InvalidInputError, "index: expected one of"),
        ({"round": -1}, InvalidInputError, "round: expected 0 <= round"),
        ({"epoch": 2**32}, InvalidInputError, "epoch: expected"),
        ({"tensors": b"x"}, InvalidInputError, "tensors: expected a multiple of 64 bytes"),
        (
            {"state": State(e=np.zeros(7, np.float32))},
            InvalidInputError,
            r"e: expected shape \(8,\)",
        ),
        (
            {"state": State(h=np.zeros(8))},
            DTypeError,
            "h: expected a float32 NumPy array, got float64",
        ),
        (
            {"state": State(e=np.zeros(16, np.float32)[::2])},
            InvalidInputError,
            "e: expected a contiguous",
        ),
        ({"floor": -1.0}, InvalidInputError, "floor, slack: expected finite numbers >= 0"),
        ({"slack": np.nan}, InvalidInputError, "floor, slack: expected finite numbers >= 0"),
        ({"rank": 3}, InvalidInputError, "rank: expected 0 to k, got 3"),
        ({"tau": np.zeros(1)}, DTypeError, "tau: expected a uint32 array, got float64"),
        ({"tau": np.zeros(2, "u4")}, InvalidInputError, r"tau: .* of shape \(1,\), got \(2,\)"),
        ({"segments": [0, 8]}, DTypeError, "segments: expected a 1-D int64 array, got list"),
        (
            {"segments": np.array([0, 3, 8]), "k": np.array([1])},
            InvalidInputError,
            "k: expected 2 counts, got 1",
        ),
        (
            {"segments": np.array([0, 9]), "k": np.array([1])},
            InvalidInputError,
            "segments: expected coordinates that rise from 0 to 8",
        ),
        (
            {"segments": np.array([0, 3, 3, 8]), "k": np.array([1, 1, 1])},
            InvalidInputError,
            r"k\[1\]: expected 0 to 0, got 1",
        ),
        (
            {"segments": np.array([0, 3, 8]), "k": np.array([1, 1]), "floor": 1.0},
            InvalidInputError,
            "floor, rank: expected one segment, got 2",
        ),
        ({"variant": "triton"}, flcore.errors.VariantUnavailableError, "no triton variant"),
    ],
)
def test_mistakes_are_named(change, error, match):
    arguments = {"k": 2} | change
    with pytest.raises(error, match=match):
        sparsify(np.ones(8, np.float32), **arguments)


def test_states_must_not_overlap():
    state = np.zeros(12, np.float32)
    with pytest.raises(InvalidInputError, match="do not overlap"):
        sparsify(np.ones(8, np.float32), k=1, state=State(e=state[:8], h=state[4:]))
    with pytest.raises(DTypeError, match=r"update\[0\]: expected float64.*got int64"):
        sparsify([np.arange(3)], k=1)
