"""Codes of buckets with feedback: every variant gives the bytes of the reference."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import flcore
from flcore._state import State
from flcore.errors import DTypeError, InvalidInputError, NonFiniteError
from flcore.ops.decode import ParsedPacket, decode
from flcore.ops.quantize import quantize
from flcore.reference import buckets, codes_linear, feedback, wire
from support import ROOT, np_dtype, outputs_per_level, unaligned

# Around the vector widths, a group of buckets (1024) and the short last bucket.
SIZES = (0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 499, 500, 501, 1000, 1025, 4097)
BUCKETS = (1, 3, 16, 64, 500, 501, 4096, 65_536)
STATES = {"none": "", "ef14": "e", "ef21": "h", "econtrol": "eh", "sgdm": "vh", "dgc": "ev"}
CODECS = {
    "sign": {"codec": "sign", "bits": 1},
    "sign l2": {"codec": "sign", "bits": 1, "measure": "l2"},
    **{f"absmax {b}": {"codec": "uniform", "bits": b} for b in range(2, 9)},
    "qsgd": {"codec": "uniform", "bits": 4, "measure": "l2", "levels": 5, "rounding": "stochastic"},
    "absmax random": {"codec": "uniform", "bits": 3, "rounding": "stochastic"},
    **{f"affine {b}": {"codec": "affine", "bits": b} for b in range(1, 9)},
    "affine random": {"codec": "affine", "bits": 5, "rounding": "stochastic"},
    "two means": {"codec": "affine", "bits": 1, "measure": "two_means"},
    "ternary": {"codec": "ternary", "bits": 2, "rounding": "stochastic"},
    "trits": {"codec": "ternary", "bits": 2, "form": 1, "rounding": "stochastic", "clip": 2.5},
}


def floats(rng, numel):
    return rng.standard_normal(numel).astype(np.float32)


def state_of(kept, numel, *, spare=True, dtype="float32", seed=3):
    """Random state with the factors of the method that keeps these buffers."""
    rng = np.random.default_rng(seed)
    draw = {name: 0.1 * floats(rng, numel) for name in kept}
    if dtype == "bfloat16":
        draw = {
            name: x if name == "h" else (x.view(np.uint32) >> 16).astype(np.uint16)
            for name, x in draw.items()
        }
    state = State(**draw, a=0.3 if "h" in kept else 1.0)
    if "v" in kept:
        state.p, state.q, state.mask = (0.9, 0.1, False) if "h" in kept else (0.9, 1.0, True)
    if spare:
        state.spare = {name: np.full_like(x, 7) for name, x in draw.items()}
    return state


def run(variant, update, *, bucket, kept="", rounds=1, numel=None, spare=True, **options):
    """Packets and the state after some rounds, as bytes."""
    layers = update if isinstance(update, list) else [update]
    numel = sum(x.size if isinstance(x, np.ndarray) else x.numel() for x in layers)
    dtype = options.pop("state_dtype", "float32")
    state = state_of(kept, numel, spare=spare, dtype=dtype)
    made = [
        quantize(
            update, bucket=bucket, state=state, round=i, seed=5, variant=variant, **options
        ).tobytes()
        for i in range(rounds)
    ]
    return made, [getattr(state, name).tobytes() for name in kept]


def same(update, **options):
    ours, want = run("cpu", update, **options), run("reference", update, **options)
    assert ours[0] == want[0], "packets differ"
    assert ours[1] == want[1], "states differ"
    return ours


def contents(packet: np.ndarray):
    """Scales and codes of a packet."""
    header, body = wire.parse(packet.tobytes())
    return body.scales, buckets.unpack(body.codes, header.numel, header.bits, header.tile)


# ---- worked numbers ----------------------------------------------------------------------------

EXAMPLE = np.array([0.5, -1, 2, 0, -0.25, 0.25, 0, 1], np.float32)


@pytest.mark.parametrize("variant", ["reference", "cpu"])
def test_sign_of_the_example(variant):
    packet = quantize(EXAMPLE, codec="sign", bits=1, bucket=8, variant=variant)
    scales, codes = contents(packet)
    assert scales.tolist() == [[0.625]]
    assert codes.tolist() == [0, 1, 0, 0, 1, 0, 0, 0]
    sent = decode(ParsedPacket(packet)).astype(np.float64)
    u = EXAMPLE.astype(np.float64)
    assert 1 - ((sent - u) ** 2).sum() / (u**2).sum() == pytest.approx(0.490196, abs=1e-6)


@pytest.mark.parametrize("variant", ["reference", "cpu"])
def test_euclidean_norm_of_the_example(variant):
    """With r = 1/2 for all, which is rounding to nearest here: no value lies halfway."""
    packet = quantize(
        EXAMPLE, codec="uniform", bits=4, measure="l2", levels=4, bucket=8, variant=variant
    )
    scales, codes = contents(packet)
    assert scales[0, 0] == pytest.approx(2.524876 / 4, rel=1e-6)
    y = np.abs(EXAMPLE) / scales[0, 0]
    want = [0.7921, 1.5842, 3.1685, 0, 0.3961, 0.3961, 0, 1.5842]
    assert np.allclose(y, want, atol=1e-4)
    assert (codes.astype(int) - 7).tolist() == [1, -2, 3, 0, 0, 0, 0, 2]


@pytest.mark.parametrize("variant", ["reference", "cpu"])
def test_four_bit_codes_pack_low_nibble_first(variant):
    """Codes 1, 15, 0, 8, 7, 3 are the bytes f1 80 37."""
    u = np.array([1, 15, 0, 8, 7, 3], np.float32)
    packet = quantize(u, codec="affine", bits=4, bucket=6, variant=variant)
    _, body = wire.parse(packet.tobytes())
    assert body.codes.tobytes().hex() == "f18037" and body.scales.tolist() == [[0, 1]]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("numel", [1, 2, 7, 8, 9, 15, 16, 17, 100, 503])
def test_any_codes_survive_packing(bits, numel, rng):
    """Codes at every place of a byte, through the kernel's packing and unpacking."""
    u = rng.integers(0, 1 << bits, numel).astype(np.float32)
    u[0] = 0
    u[-1] = (1 << bits) - 1 if numel > 1 else 0
    packet = quantize(u, codec="affine", bits=bits, bucket=max(2, numel), variant="cpu")
    if numel > 1:
        assert contents(packet)[1].tolist() == u.tolist()
    assert decode(ParsedPacket(packet)).tolist() == u.tolist()


def test_trits_are_five_a_byte():
    u = np.array([-1, 0, 1, 1, -1, 1, 0], np.float32)
    for variant in ("reference", "cpu"):
        packet = quantize(u, codec="ternary", bits=2, form=1, bucket=7, variant=variant)
        _, body = wire.parse(packet.tobytes())
        assert body.codes.tolist() == [0 + 3 * 1 + 9 * 2 + 27 * 2 + 81 * 0, 2 + 3 * 1]
        assert decode(ParsedPacket(packet)).tolist() == u.tolist()


def test_random_bits_are_those_of_the_stream():
    half = buckets.random_halves(5, seed=5, round=2)
    words = flcore.reference.rng.random_bits(3, 5, round=2, tensor=0x51)
    assert half.tolist() == [w >> s & 0xFFFF for w in words.tolist() for s in (0, 16)][:5]
    u = np.array([0.3, -0.3, 0.5, 0.999, 1], np.float32)
    packet = quantize(u, codec="uniform", bits=2, bucket=5, rounding="stochastic", seed=5, round=2)
    want = np.floor(u + buckets.fractions(half)).clip(-1, 1)
    assert decode(ParsedPacket(packet)).tolist() == want.tolist()


# ---- every size, codec, state and type -----------------------------------------------------------


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("bucket", BUCKETS)
def test_equals_the_reference(name, bucket, rng):
    for i, numel in enumerate(SIZES):
        values = ("float32", "bfloat16")[(i + bucket) % 2 or bucket == 1]
        kept = list(STATES.values())[i % len(STATES)]
        same(floats(rng, numel), bucket=bucket, kept=kept, values=values, **CODECS[name])


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_states(state, state_dtype, rng):
    """Some rounds with every form of memory; in place gives what spares give."""
    g = floats(rng, 3001)
    options = {"bucket": 500, "kept": STATES[state], "rounds": 3, "state_dtype": state_dtype}
    for name in ("sign", "absmax 4", "qsgd"):
        want = same(g, **options, **CODECS[name])
        assert run("cpu", g, spare=False, **options, **CODECS[name]) == want


@pytest.mark.parametrize("name", ["sign", "absmax 8", "affine 2", "trits", "two means"])
def test_what_is_not_sent_is_kept(name, rng):
    """D + e' = e + g to rounding, and the state is that of the decoded packet, bit for bit."""
    g = floats(rng, 2000)
    state = state_of("eh", g.size)
    block = feedback.form(g, state)
    packet = quantize(g, bucket=300, state=state, **CODECS[name])
    sent = decode(ParsedPacket(packet))
    assert np.array_equal(state.e, block.t - sent)
    scale = np.abs(block.t).max() + np.abs(sent).max()
    assert np.abs(sent + state.e - block.t).max() <= scale * 2.0**-23


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_dtypes_of_the_update(dtype, rng):
    g = rng.standard_normal(3001).astype(np_dtype(dtype))
    options = {"bucket": 500, "kept": "e", **CODECS["absmax 8"]}
    packets, _ = same(g, **options)
    assert wire.read_header(packets[0]).source_dtype == dtype
    strided = np.repeat(g, 2)[::2]
    read_only = g.copy()
    read_only.flags.writeable = False
    for other in (unaligned(g), strided, read_only):
        assert run("cpu", other, **options)[0] == packets


def test_torch_updates(rng):
    torch = pytest.importorskip("torch")
    g = floats(rng, 1500)
    for dtype in ("float32", "bfloat16"):
        tensor = torch.from_numpy(g).to(getattr(torch, dtype))
        array = tensor.to(torch.float64).numpy().astype(np_dtype(dtype))
        want = run("cpu", array, bucket=64, kept="e", **CODECS["absmax 4"])
        assert run("cpu", tensor, bucket=64, kept="e", **CODECS["absmax 4"]) == want


def test_layers_are_one_update(rng):
    """Any cut into layers, of any dtype, gives the codes of the concatenation."""
    sizes = [1, 0, 17, 1024, 3, 2048, 0, 500, 1]
    flat = rng.standard_normal(sum(sizes)).astype(np.float16)
    layers, start = [], 0
    for i, size in enumerate(sizes):
        dtype = ("float16", "float32", "float64")[i % 3]
        layers.append(unaligned(flat[start : start + size].astype(dtype), 1 + i % 3))
        start += size
    options = {"bucket": 500, "kept": "e", **CODECS["qsgd"]}
    want = run("cpu", flat.astype(np.float64), **options)
    assert run("cpu", layers, **options) == want == run("reference", layers, **options)
    assert quantize({"a": layers[2].reshape(17, 1)}, bucket=4, **CODECS["sign"]).size > 0
    assert contents(quantize([], bucket=9, **CODECS["affine 3"]))[1].size == 0


# ---- the same bits everywhere ------------------------------------------------------------------

DIGESTS = """
import hashlib, numpy as np, flcore
from flcore._state import State
from flcore.ops.quantize import quantize
from test_quantize import CODECS, state_of
rng = np.random.default_rng(5)
digest = hashlib.sha256()
for numel in (17, 1025, 70_001):
    for i, (name, codec) in enumerate(CODECS.items()):
        for bucket in (37, 500, 4096):
            g = rng.standard_normal(numel).astype(("float64", "float32", "float16")[i % 3])
            state = state_of(("", "e", "eh", "vh")[i % 4], numel)
            for round in range(2):
                packet = quantize(g, bucket=bucket, state=state, round=round, **codec)
                digest.update(packet.tobytes())
            for x in state.buffers().values():
                digest.update(x.tobytes())
print(digest.hexdigest())
"""


def test_instruction_set_levels_give_identical_bytes(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    printed = outputs_per_level(DIGESTS)
    assert len(set(printed.values())) == 1, printed


def test_thread_counts_give_identical_bytes(rng):
    g = floats(rng, 200_000)
    before = flcore.get_num_threads()
    try:
        for name in ("sign", "absmax 3", "qsgd", "affine 4", "trits"):
            results = []
            for threads in (1, 2, 3):
                flcore.set_num_threads(threads)
                results.append(run("cpu", g, bucket=777, kept="eh", rounds=2, **CODECS[name]))
            assert results[0] == results[1] == results[2]
    finally:
        flcore.set_num_threads(before)


@settings(deadline=None, max_examples=80, derandomize=True)
@given(data=st.data())
def test_any_floats(data):
    """Subnormals, huge values, zeros of both signs: equal bytes, finite values, a packet."""
    numel = data.draw(st.integers(1, 40))
    bits = st.integers(0, 2**32 - 1).filter(lambda b: b & 0x7F800000 != 0x7F800000)
    u = data.draw(hnp.arrays(np.uint32, numel, elements=bits)).view(np.float32)
    name = data.draw(st.sampled_from(list(CODECS)))
    bucket, values = (
        data.draw(st.integers(2, 41)),
        data.draw(st.sampled_from(["float32", "bfloat16"])),
    )
    packets = [
        quantize(u, bucket=bucket, values=values, variant=v, **CODECS[name])
        for v in ("reference", "cpu")
    ]
    assert packets[0].tobytes() == packets[1].tobytes()
    sent = [decode(ParsedPacket(packets[1]), variant=v) for v in ("reference", "cpu")]
    assert sent[0].tobytes() == sent[1].tobytes() and np.isfinite(sent[0]).all()


def test_lane_sum_is_what_it_says():
    x = np.arange(1, 36, dtype=np.float64)[None] / 3
    lanes = [0.0] * 16
    for i, value in enumerate(x[0]):
        lanes[i % 16] += value
    for apart in (8, 4, 2, 1):
        lanes = [lanes[k] + lanes[k + apart] for k in range(apart)]
    assert codes_linear.lane_sum(x)[0] == lanes[0]


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 17, 70_000])
@pytest.mark.parametrize("spare", [True, False])
def test_nothing_changes_when_a_value_is_not_finite(bad, at, spare, rng):
    for place in ("update", "e", "h"):
        g = floats(rng, 70_001)
        state = state_of("eh", g.size, spare=spare)
        (g if place == "update" else getattr(state, place))[at] = bad
        before = {name: (x, x.copy()) for name, x in state.buffers().items()}
        for variant in ("reference", "cpu"):
            with pytest.raises(NonFiniteError, match="no state changed"):
                quantize(g, bucket=500, state=state, variant=variant, **CODECS["absmax 8"])
        for name, (x, copy) in before.items():
            assert getattr(state, name) is x and x.tobytes() == copy.tobytes(), name


def test_overflow_counts_as_not_finite():
    g = np.full(20, 3e38, np.float32)
    for variant in ("reference", "cpu"):
        state = State(e=g.copy(), a=0.0)
        with pytest.raises(NonFiniteError, match="overflows float32"):
            quantize(g, bucket=8, state=state, variant=variant, **CODECS["sign"])
    with pytest.raises(NonFiniteError, match=r"update\['w'\].*got inf at flat position 1"):
        quantize({"v": g, "w": np.array([1, 1e39])}, bucket=8, **CODECS["sign"])


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"codec": "topk"}, InvalidInputError, "codec: expected one of dense, sign"),
        ({"bits": 9}, InvalidInputError, "9 bits a code"),
        ({"bits": 1}, InvalidInputError, "1 bits a code"),
        ({"bits": 2.0}, InvalidInputError, "bits: expected an integer"),
        ({"form": 1}, InvalidInputError, "form 1 is not one"),
        ({"bucket": 0}, InvalidInputError, "buckets of 1 to 65536"),
        ({"bucket": 65_537}, InvalidInputError, "bucket: expected an integer up to 65536"),
        ({"codec": "affine", "bucket": 1}, InvalidInputError, "at most 8 bytes a coordinate"),
        ({"values": "float16"}, InvalidInputError, "value dtype 2 is not one"),
        ({"values": "int4"}, InvalidInputError, "values: expected one of float32"),
        ({"rounding": "up"}, InvalidInputError, "rounding: expected nearest or stochastic"),
        ({"measure": "mean"}, InvalidInputError, "measure: expected one of max, l2"),
        ({"levels": 128}, InvalidInputError, "levels: expected 1 to 127 with 8 bits"),
        ({"codec": "affine", "levels": 3}, InvalidInputError, "levels: the codec affine has none"),
        ({"codec": "affine", "measure": "two_means"}, InvalidInputError, "two_means has 1 bit"),
        ({"clip": -1.0}, InvalidInputError, "clip: expected a number >= 0"),
        ({"round": -1}, InvalidInputError, "round: expected 0 <= round"),
        ({"epoch": 2**32}, InvalidInputError, "epoch: expected"),
        ({"tensors": b"x"}, InvalidInputError, "tensors: expected a multiple of 64 bytes"),
        ({"state": State(e=np.zeros(7, np.float32))}, InvalidInputError, r"expected shape \(8,\)"),
        ({"state": State(h=np.zeros(8))}, DTypeError, "h: expected a float32 NumPy array"),
        ({"variant": "cuda"}, flcore.errors.VariantUnavailableError, "no cuda variant"),
    ],
)
def test_mistakes_are_named(change, error, match):
    arguments = {"codec": "uniform", "bits": 8, "bucket": 4} | change
    with pytest.raises(error, match=match):
        quantize(np.ones(8, np.float32), **arguments)


def test_updates_that_cannot_be_read():
    with pytest.raises(DTypeError, match=r"update\[0\]: expected float64.*got int64"):
        quantize([np.arange(3)], codec="sign", bits=1, bucket=8)
