"""Dense, natural, FP8, MX and NF4 codes: worked numbers, casts of ml_dtypes, every level."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import flcore
from flcore._state import State
from flcore.compression import EF14, FP8, MX, NF4, Dense, Encoder, Natural, decode, decode_add
from flcore.errors import InvalidInputError, NonFiniteError
from flcore.ops.quantize import quantize
from flcore.reference import codes_float as reference
from flcore.reference import wire
from flcore.reference.wire_frame import CODES, SCALES
from flcore.reference.wire_writer import frame
from support import np_dtype, outputs_per_level, unaligned

MX_FORMATS = ("e4m3", "e5m2", "e3m2", "e2m3", "e2m1", "int8")
ML_DTYPES = {
    "e4m3": "float8_e4m3fn",
    "e5m2": "float8_e5m2",
    "e3m2": "float6_e3m2fn",
    "e2m3": "float6_e2m3fn",
    "e2m1": "float4_e2m1fn",
}
ONE = np.ones((1, 1), np.float32)


def options(name: str) -> dict:
    """Arguments of `quantize` by a short name."""
    kind, _, of = name.partition(" ")
    if kind == "dense":
        return {"codec": "dense", "values": of, "bits": 32 if of == "float32" else 16}
    if kind == "natural":
        return {"codec": "natural", "bits": int(of), "form": 9 - int(of)}
    f = reference.FORMATS[of]
    values = "e8m0" if kind == "mx" else "float32"
    return {"codec": "minifloat", "bits": f.bits, "form": f.form, "values": values}


NAMES = (
    "dense float32",
    "dense float16",
    "dense bfloat16",
    "natural 8",
    "natural 9",
    *(f"{kind} {name}" for kind in ("mx", "fp") for name in MX_FORMATS),
    "fp nf4",
)


def sent(packet: np.ndarray) -> np.ndarray:
    return decode(packet.tobytes())


def sections(packet: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and codes as they lie in the packet."""
    _, body = wire.parse(packet.tobytes())
    return body.scales, body.codes


# ---- worked numbers ----------------------------------------------------------------------------


def test_e4m3_by_hand():
    x = np.array([448, -448, 449, 1e9, 2.0**-9, 2.0**-11, 0, 1, -1.5], np.float32)
    codes = reference.cast(x, ONE[0], "e4m3")
    assert [hex(c) for c in codes] == [
        "0x7e", "0xfe", "0x7e", "0x7e", "0x1", "0x0", "0x0", "0x38", "0xbc",
    ]  # fmt: skip
    want = [448, -448, 448, 448, 2.0**-9, 0, 0, 1, -1.5]
    assert reference.code_values("e4m3")[codes].tolist() == want


def test_e2m1_has_eight_magnitudes():
    values = reference.code_values("e2m1")
    assert values[:8].tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert values[8:].tolist() == [0, -0.5, -1, -1.5, -2, -3, -4, -6]
    # ties go to the even code, and what is beyond 6 is 6
    x = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 7, 0.26], np.float32)
    assert values[reference.cast(x, ONE[0], "e2m1")].tolist() == [0, 1, 1, 2, 2, 4, 4, 6, 0.5]


@pytest.mark.parametrize("name", MX_FORMATS)
def test_block_scale_by_hand(name):
    emax = reference.FORMATS[name].emax
    u = np.float32(2.0) ** -np.arange(32, dtype=np.float32)  # 1, 1/2, 1/4, ...
    packet = quantize(u, bucket=32, **options(f"mx {name}"))
    scales, codes = sections(packet)
    assert scales.ravel().tolist() == [127 - emax]
    for power in (-60, -1, 5, 60):
        moved = quantize(u * np.float32(2.0**power), bucket=32, **options(f"mx {name}"))
        assert sections(moved)[0].ravel().tolist() == [127 - emax + power]
        assert sections(moved)[1].tobytes() == codes.tobytes()
    zero = quantize(np.zeros(40, np.float32), bucket=32, **options(f"mx {name}"))
    assert sections(zero)[0].ravel().tolist() == [0, 0]  # X = -127
    assert not sent(zero).any()


def test_block_scale_at_the_ends_of_float32():
    for u, name, byte in (
        (3.4e38, "int8", 254),
        (3.4e38, "e4m3", 246),
        (2.0**-126, "int8", 1),
        (2.0**-127, "int8", 0),
        (2.0**-149, "e2m1", 0),
        (2.0**-118, "e4m3", 1),
        (2.0**-119, "e4m3", 0),
        (2.0**-130, "e4m3", 0),
    ):
        packet = quantize(np.array([u], np.float32), bucket=32, **options(f"mx {name}"))
        assert sections(packet)[0].ravel().tolist() == [byte], (u, name)
        assert np.isfinite(sent(packet)).all()


def test_power_scale_is_the_least_that_fits():
    for top, name, want in (
        (448, "e4m3", 1),
        (448.1, "e4m3", 2),
        (224, "e4m3", 0.5),
        (57344, "e5m2", 1),
        (1e-3, "e4m3", 2.0**-18),  # 448 * 2^-18 = 1.7e-3, 448 * 2^-19 = 8.5e-4
        (0, "e4m3", 0),
        (3.4e38, "e4m3", 2.0**119),
        (1e-45, "e4m3", 2.0**-126),
    ):
        u = np.array([top, -top / 3], np.float32)
        packet = quantize(u, bucket=16, **options(f"fp {name}"))
        assert sections(packet)[0].ravel().tolist() == [want], (top, name)
        assert np.isfinite(sent(packet)).all()


def test_natural_by_hand():
    for form, bits in ((0, 9), (1, 8)):
        half = np.array([0, 0x3FFF, 0x4000, 0xC000, 0xBFFF, 0xFFFF], np.uint16)
        u = np.full(6, 2.5, np.float32)  # 1.25 * 2: up with probability 1/4
        values = reference.natural_values(reference.natural_codes(u, form, half), form)
        assert values.tolist() == [2, 2, 2, 4, 2, 4]
        exact = np.array([1, -1, 0.5, 2.0**-100, -(2.0**18), 0], np.float32)
        for rounding in ("nearest", "stochastic"):
            packet = quantize(
                exact, codec="natural", bits=bits, form=form, bucket=64, rounding=rounding
            )
            assert sent(packet).tolist() == exact.tolist()
    near = quantize(np.array([2.9, 3.0, -5.9, 6.1], np.float32), codec="natural", bits=9, bucket=8)
    assert sent(near).tolist() == [2, 4, -4, 8]


def test_window_of_8_bit_natural_codes():
    u = np.array([2.0**18, 2.0**30, -1e38, 2.0**-108, 2.0**-110, 1e-45], np.float32)
    packet = quantize(u, codec="natural", bits=8, form=1, bucket=64)
    tiny = 2.0**-108
    assert sent(packet).tolist() == [2.0**18, 2.0**18, -(2.0**18), tiny, 0, 0]
    below = np.full(40_000, 2.0**-110, np.float32)  # a quarter of the least power
    packet = quantize(below, codec="natural", bits=8, form=1, bucket=64, rounding="stochastic")
    values, counts = np.unique(sent(packet), return_counts=True)
    assert values.tolist() == [0, tiny]
    assert abs(counts[1] / below.size - 0.25) < 4 * (0.25 * 0.75 / below.size) ** 0.5


def test_wide_natural_codes_never_overflow():
    u = np.array([3.4e38, -3.4e38, 2.0**127, 2.0**-126, 1e-45], np.float32)
    packet = quantize(u, codec="natural", bits=9, bucket=64)
    assert sent(packet).tolist() == [2.0**127, -(2.0**127), 2.0**127, 2.0**-126, 0]


def test_nf4_by_hand():
    values = reference.NF4
    u = np.concatenate([values, (values[1:] + values[:-1]) / np.float32(2)]) * np.float32(3)
    packet = quantize(u, bucket=64, **options("fp nf4"))
    assert sections(packet)[0].ravel().tolist() == [3]
    assert sent(packet)[:16].tolist() == (values * np.float32(3)).tolist()
    assert not sent(quantize(np.zeros(9, np.float32), bucket=64, **options("fp nf4"))).any()


def test_packing_by_hand():
    # e2m3: 1/8, 1/4, 3/8, 1/2 are the subnormal codes 1, 2, 3, 4; the 7.5 makes the scale 1
    u = np.array([0.125, 0.25, 0.375, 0.5, -7.5], np.float32)
    packet = quantize(u, bucket=8, **options("fp e2m3"))
    assert sections(packet)[1].tobytes().hex() == "8130103f"
    # e2m1: 0.5, 1, 1.5, -6 are the codes 1, 2, 3, f
    packet = quantize(np.float32([0.5, 1, 1.5, -6, 6]), bucket=8, **options("mx e2m1"))
    assert sections(packet)[1].tobytes().hex() == "21f307"
    # nine bits: 1 is 07f, -2 is 180, 0 is 0
    packet = quantize(np.float32([1, -2, 0]), bucket=8, **options("natural 9"))
    assert sections(packet)[1].tobytes().hex() == "7f000300"
    packet = quantize(np.float32([1, -2, 0]), bucket=8, **options("natural 8"))
    assert sections(packet)[1].tobytes().hex() == "6dee00"  # 109 and 110 are 2^0 and 2^1
    packet = quantize(np.float32([1, -2]), bucket=8, **options("dense bfloat16"))
    assert sections(packet)[1].tobytes().hex() == "803f00c0"


# ---- every code is a finite number -------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES[3:])
def test_every_code_decodes_to_a_finite_number(name):
    o = {"form": 0, "values": "float32"} | options(name)
    numel = 2 ** o["bits"]
    fields = ((np.arange(numel)[:, None] >> np.arange(o["bits"])) & 1).astype(np.uint8)
    bodies = [(CODES, 1, np.packbits(fields.reshape(-1), bitorder="little").tobytes())]
    if o["codec"] == "minifloat":  # the largest scale that a reader takes
        f = next(f for f in reference.FORMATS.values() if f.form == o["form"])
        top = np.uint8([254 - f.emax]) if "mx" in name else np.float32([2.0 ** (127 - f.emax)])
        bodies.insert(0, (SCALES, top.itemsize, top.tobytes()))
    packet = frame(bodies, numel=numel, tile=65_536, **o)
    values = decode(packet)
    assert np.isfinite(values).all()
    assert values.tobytes() == reference.decode_update(*wire.parse(packet)).tobytes()
    if "e4m3" in name:  # NaN elsewhere
        assert values[0x7F] == values[0x7E] == -values[0xFF]
    if "int8" in name:
        assert values[0x80] == values[0x81]


@pytest.mark.parametrize("name", MX_FORMATS)
def test_symmetric(name, rng):
    x = rng.standard_normal(1000).astype(np.float32)
    for kind in ("mx", "fp"):
        plus, minus = (
            sent(quantize(s * x, bucket=32, **options(f"{kind} {name}"))) for s in (1, -1)
        )
        assert np.array_equal(plus, -minus)
        assert not sent(quantize(0 * x, bucket=32, **options(f"{kind} {name}"))).any()
        # codes of codes are the codes
        again = sent(quantize(plus, bucket=32, **options(f"{kind} {name}")))
        assert np.array_equal(plus, again)


# ---- against ml_dtypes -------------------------------------------------------------------------


def spread(rng, size: int) -> np.ndarray:
    return (rng.standard_normal(size) * 2.0 ** rng.uniform(-20, 9, size)).astype(np.float32)


@pytest.mark.parametrize("name", ML_DTYPES)
def test_equals_the_casts_of_ml_dtypes(name, rng):
    kind = getattr(pytest.importorskip("ml_dtypes"), ML_DTYPES[name])
    values = reference.code_values(name)
    stored = np.arange(2 ** reference.FORMATS[name].bits, dtype=np.uint8).view(kind)
    stored = stored.astype(np.float32)
    finite = np.isfinite(stored)
    assert values[finite].tobytes() == stored[finite].tobytes()
    assert set(np.abs(values[~finite]).tolist()) <= {reference.largest(name)}
    grid = np.unique(values)
    middles = (grid[1:] + grid[:-1]) / 2
    top = np.float32(reference.largest(name))
    x = np.concatenate([spread(rng, 20_000), middles, grid, np.nextafter(middles, top)])
    x = np.concatenate([np.clip(x, -top, top), [top]]).astype(np.float32)
    want = x.astype(kind).view(np.uint8)
    assert reference.cast(x, ONE[0], name).tobytes() == want.tobytes()
    # the op with scale 1, at most a bucket of 65,536
    packet = quantize(x, bucket=65_536, **options(f"fp {name}"))
    assert sections(packet)[0].ravel().tolist() == [1]
    assert sent(packet).tobytes() == x.astype(kind).astype(np.float32).tobytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dense_equals_a_clamped_cast(dtype, rng):
    kind = np_dtype(dtype)
    x = np.concatenate(
        [
            rng.integers(0, 2**32, 50_000, dtype=np.uint32).view(np.float32),
            spread(rng, 10_000),
            np.float32([65504, 65519, 65520, -1e9, 3.4e38, 2.0**-24, 2.0**-25, 2.0**-26, -0.0, 0]),
        ]
    )
    x = x[np.isfinite(x)]
    top = np.float32(65504) if dtype == "float16" else np.float32(3.3895314e38)
    want = np.clip(x, -top, top).astype(kind)
    packet = quantize(x, bucket=65_536, **options(f"dense {dtype}"))
    assert sections(packet)[1].tobytes() == want.tobytes()
    assert sent(packet).tobytes() == want.astype(np.float32).tobytes()


# ---- the CPU kernel ----------------------------------------------------------------------------


def awkward(rng, size: int) -> np.ndarray:
    """Values of all magnitudes, runs of zeros, subnormals, negative zeros."""
    x = (rng.standard_normal(size) * 2.0 ** rng.uniform(-140, 100, size)).astype(np.float32)
    some = rng.integers(0, 6, size)
    x = np.where(some == 0, np.float32(-0.0), x)
    near = rng.standard_normal(size).astype(np.float32)
    return np.where(some > 2, near, x).astype(np.float32)


def run(variant, g, o, bucket, rounding, keep, rounds=2):
    rng = np.random.default_rng(1)
    state = State(
        **{k: (rng.standard_normal(g.size) / 4).astype(np.float32) for k in keep}, a=0.5, p=0.3
    )
    for name in keep:
        state.spare[name] = np.empty_like(getattr(state, name))
    found = [
        quantize(
            g, bucket=bucket, rounding=rounding, state=state, round=r, seed=5, variant=variant, **o
        ).tobytes()
        for r in range(rounds)
    ]
    return found, {k: v.tobytes() for k, v in state.buffers().items()}


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_reference(name, rng):
    o = options(name)
    cases = itertools.product((1, 33, 2500), (32, 100, 4096), ("nearest", "stochastic"))
    for i, (numel, bucket, rounding) in enumerate(cases):
        g = awkward(rng, numel)
        keep = ("", "e", "h", "eh", "ehv")[i % 5]
        assert run("cpu", g, o, bucket, rounding, keep) == run(
            "reference", g, o, bucket, rounding, keep
        ), (numel, bucket, rounding, keep)


@pytest.mark.parametrize("name", NAMES)
def test_short_buckets_and_odd_memory(name, rng):
    o = options(name)
    for bucket in (8, 17, 65_536):
        x = awkward(rng, 1001)
        want = quantize(x, bucket=bucket, variant="reference", **o).tobytes()
        layers = [unaligned(x[:13]), x[13:13], x[13:500][::-1].copy()[::-1], x[500:]]
        assert quantize(layers, bucket=bucket, **o).tobytes() == want
    empty = quantize(np.empty(0, np.float32), bucket=32, **o)
    assert decode(empty.tobytes()).size == 0


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_do_not_show(threads, rng):
    x = awkward(rng, 300_001)
    before = flcore.get_num_threads()
    found = {}
    for count in (threads, 2):
        flcore.set_num_threads(count)
        found[count] = [
            quantize(x, bucket=b, rounding="stochastic", **options(name)).tobytes()
            for name, b in (("mx e2m1", 32), ("mx e3m2", 32), ("natural 9", 65_536))
        ]
        found[count].append([sent(np.frombuffer(p, np.uint8)).tobytes() for p in found[count]])
    flcore.set_num_threads(before)
    assert found[threads] == found[2]


def test_levels_give_the_same_bytes():
    printed = outputs_per_level(
        """
import hashlib, sys
sys.path.insert(0, "tests")
import numpy as np
from flcore.compression import decode, decode_add
from test_float_codecs import NAMES, awkward, options, quantize
rng = np.random.default_rng(3)
for name in NAMES:
    for bucket, rounding in ((32, "nearest"), (100, "stochastic"), (4096, "stochastic")):
        packet = quantize(awkward(rng, 10_007), bucket=bucket, rounding=rounding, **options(name))
        out = np.zeros(10_007)
        decode_add([packet.tobytes()] * 2, [0.3, 0.7], out=out)
        for part in (packet.tobytes(), decode(packet.tobytes()).tobytes(), out.tobytes()):
            print(name, hashlib.sha256(part).hexdigest())
"""
    )
    assert len(set(printed.values())) == 1


def test_decode_add_is_the_weighted_sum(rng):
    x = [spread(rng, 70_001) for _ in NAMES]
    packets = [quantize(v, bucket=100, **options(name)) for v, name in zip(x, NAMES, strict=True)]
    weights = rng.uniform(0.1, 1, len(NAMES)).tolist()
    out, want = np.zeros(70_001, np.float32), np.zeros(70_001, np.float32)
    decode_add([p.tobytes() for p in packets], weights, out=out)
    for packet, weight in zip(packets, weights, strict=True):
        want = want + np.float32(weight) * sent(packet)
    assert out.tobytes() == want.tobytes()


# ---- statistics --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["natural 9", "natural 8", "fp e4m3", "fp e5m2", "fp e2m1", "dense bfloat16", "dense float16"],
)
def test_stochastic_rounding_is_unbiased(name, rng):
    values = np.array([0.3, -0.7, 2.5, 1e-3, 3.14159, -5e-6, 6.0, 0.0], np.float32)
    draws = 20_000
    u = np.tile(values, draws)
    found = sent(quantize(u, bucket=8, rounding="stochastic", seed=3, **options(name)))
    found = found.reshape(draws, -1).astype(np.float64)
    scatter = found.std(axis=0)
    # 16 random bits: a probability is off by at most 2^-17
    steps = found.max(axis=0) - found.min(axis=0)
    tolerance = 4.5 * scatter / draws**0.5 + steps * 2.0**-17
    assert (np.abs(found.mean(axis=0) - values) <= tolerance + 1e-12).all()
    again = sent(quantize(u, bucket=8, rounding="stochastic", seed=4, **options(name)))
    assert not np.array_equal(found.reshape(-1), again)


def nmse(x: np.ndarray, **o) -> float:
    d = sent(quantize(x, **o)).astype(np.float64)
    return float(((d - x) ** 2).sum() / (x.astype(np.float64) ** 2).sum())


def test_natural_variance_is_at_most_an_eighth(rng):
    normal = rng.standard_normal(400_000).astype(np.float32)
    o = {"bucket": 65_536, "rounding": "stochastic", **options("natural 8")}
    assert abs(nmse(normal, **o) / 0.0828 - 1) < 0.02
    worst = np.full(400_000, 4 / 3, np.float32)
    assert 0.123 < nmse(worst, **o) < 0.127
    for scale in (1e-5, 1.9, 3.3):
        assert nmse(normal * np.float32(scale), **o) < 0.126


# Normal, Laplace and Student t samples (3 degrees of freedom: of one seed, they scatter by 4 %)
NMSE = {
    "mx e4m3": (0.00086, 0.00101, 0.00117),
    "mx e5m2": (0.0029, 0.0030, 0.0032),
    "mx e2m3": (0.00081, 0.00094, 0.0012),
    "mx e3m2": (0.0029, 0.0030, 0.0032),
    "mx e2m1": (0.0132, 0.0161, 0.0202),
    "mx int8": (6.8e-5, 1.0e-4, 1.6e-4),
}


@pytest.mark.parametrize("name", NMSE)
def test_errors_are_those_of_the_formats(name):
    rng = np.random.default_rng(20240229)
    samples = rng.standard_t(3, 1_000_000), rng.laplace(size=1_000_000)
    samples = rng.standard_normal(1_000_000), samples[1], samples[0]
    for x, want in zip(samples, NMSE[name], strict=True):
        found = nmse(x.astype(np.float32), bucket=32, **options(name))
        digits = 0.5 * 10.0 ** (np.floor(np.log10(want)) - 1)  # of the table
        assert abs(found - want) < 0.05 * want + digits, (found, want)
    if name == "mx e4m3":  # one scale a bucket: no block saturates
        found = nmse(samples[0].astype(np.float32), bucket=65_536, **options("fp e4m3"))
        assert abs(found / 0.0007 - 1) < 0.07


# ---- codecs and feedback -----------------------------------------------------------------------

CODECS = (
    Dense(),
    Dense("float16", "stochastic"),
    Dense("float32"),
    Natural(),
    Natural(9, "nearest"),
    FP8(),
    FP8("e5m2", 100, "stochastic"),
    *(MX(name) for name in MX_FORMATS),
    NF4(),
)


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_encoder_sends_and_keeps_the_rest(codec, rng):
    from flcore.compression import CODECS as REGISTERED

    assert REGISTERED[codec.name].from_dict(codec.to_dict()) == codec
    assert codec.eta(10) == 0.5
    g = [rng.standard_normal(1000).astype(np.float32) for _ in range(5)]
    encoder = Encoder(codec, EF14(), like=g[0])
    total = np.zeros(1000)
    for r, x in enumerate(g):
        total += decode(encoder.encode(x, round=r, seed=1)).astype(np.float64)
    kept = next(v for k, v in encoder.state_dict().items() if k.split(".")[-1] == "e")
    want = np.sum(g, axis=0, dtype=np.float64)
    assert np.abs(total + kept - want).max() < 1e-5
    assert (np.abs(kept).max() == 0) == (codec == Dense("float32"))


def test_bytes_a_coordinate(rng):
    x = rng.standard_normal(1 << 16).astype(np.float32)
    for codec, bits in (
        (Dense(), 16),
        (Natural(), 8),
        (Natural(9), 9),
        (FP8(), 8 + 32 / 1024),
        (NF4(), 4.5),
        (MX("e4m3"), 8.25),
        (MX("e3m2"), 6.25),
        (MX("e2m1"), 4.25),
    ):
        packet = bytes(Encoder(codec, like=x).encode(x, round=0, seed=0))
        assert 0 <= len(packet) - x.size * bits / 8 <= 64 + 8 + 48 + 128, codec


def test_settings_that_cannot_be_used():
    for make in (
        lambda: Dense("int8"),
        lambda: Dense(rounding="up"),
        lambda: Natural(7),
        lambda: Natural(True),
        lambda: FP8("e3m2"),
        lambda: FP8(bucket=0),
        lambda: FP8(bucket=65_537),
        lambda: MX("nf4"),
        lambda: NF4(bucket=1.5),
    ):
        with pytest.raises(InvalidInputError):
            make()


@pytest.mark.parametrize("name", ["dense bfloat16", "natural 8", "mx e2m1", "fp e4m3"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_value_that_is_not_finite_changes_nothing(name, bad, rng):
    x = rng.standard_normal(5000).astype(np.float32)
    x[4990] = bad
    for spare in (True, False):
        e = rng.standard_normal(5000).astype(np.float32)
        before = e.copy()
        state = State(e=e, spare={"e": np.empty_like(e)} if spare else {})
        with pytest.raises(NonFiniteError, match="4990"):
            quantize(x, bucket=32, state=state, **options(name))
        assert state.e is e and e.tobytes() == before.tobytes()
