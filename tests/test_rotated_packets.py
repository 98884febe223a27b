"""Rotated packets: golden bytes, and those of every variant, level and thread count."""

from __future__ import annotations

import numpy as np
import pytest

import flcore
from flcore._state import State
from flcore.compression import (
    Encoder,
    Packet,
    Rotated,
    decode,
    decode_add,
)
from flcore.ops.decode import ParsedPacket
from flcore.ops.decode import decode as decode_packet
from flcore.ops.quantize import quantize
from flcore.reference import quantize as driver
from flcore.reference import wire
from flcore.reference.rng import random_bits
from support import np_dtype, outputs_per_level, unaligned
from test_rotated import BITS, NMSE, nmse, random_state, sent
from test_wire import golden

SIZES = (1, 2, 3, 7, 16, 31, 255, 256, 257, 700, 1023, 1024, 1025, 4095, 4097, 12_345)
STATES = {"none": "", "ef14": "e", "ef21": "h", "econtrol": "eh", "sgdm": "vh", "dgc": "ve"}


# Five values with 3 bits, filled up to eight: one scale, eight codes in three bytes.
GOLDEN = golden(
    195,
    {
        0: "464c4355 01 00 4000 0800 0000 01000000",
        16: "0500000000000000 8300000000000000 0300000000000000 0700000000000000",
        48: "02000000 01 01 00 03 00010000 d46c08a4",
        64: "02000000 00000000",
        72: "0100 0000 04000000 8000000000000000 0400000000000000",
        96: "0200 0000 01000000 c000000000000000 0300000000000000",
        128: "956e0040",
        192: "2c 8f d2",
    },
)


def test_golden_packet():
    x = np.array([4, -3, 2, -1, 0.5], np.float32)
    for variant in ("cpu", "reference"):
        p = quantize(
            x, codec="rotated", bits=3, bucket=256, seed=7, round=3, epoch=2, variant=variant
        )
        assert p.tobytes() == GOLDEN
    # decoded from the words of docs/packet.md alone
    scale = float(np.frombuffer(GOLDEN, "<f4", 1, 128)[0])
    fields = int.from_bytes(GOLDEN[192:195], "little")
    q = []
    for j in range(8):
        code = fields >> 3 * j & 7
        centroid = (0.24509416, 0.75600525, 1.34390926, 2.15194567)[code & 3]
        q.append(-centroid if code & 4 else centroid)
    word = int(random_bits(1, 7, round=3, tensor=0x52)[0])
    for i in range(5):
        row = [(-1) ** bin(i & j).count("1") for j in range(8)]
        value = scale * 8**-0.5 * sum(a * b for a, b in zip(row, q, strict=True))
        value = -value if word >> i & 1 else value
        assert decode(Packet.from_bytes(GOLDEN))[i] == pytest.approx(value, rel=1e-6)


# ---- the same bytes everywhere -----------------------------------------------------------------


@pytest.mark.parametrize("numel", SIZES)
def test_equals_the_reference(numel, rng):
    g = rng.standard_normal(numel).astype(np.float32)
    if numel > 1024:
        g[256:512] = 0
    for bits in BITS:
        for block, measure in ((256, "unbiased"), (512, "mse"), (1024, "unbiased"), (4096, "mse")):
            options = {"codec": "rotated", "bits": bits, "bucket": block, "measure": measure}
            ours, want = (
                quantize(g, **options, seed=2**63 + 5, round=2**40 + 1, variant=v)
                for v in ("cpu", "reference")
            )
            assert np.array_equal(ours, want), (bits, block)
            decoded = decode_packet(ParsedPacket(ours))
            slow = driver.decode(*wire.parse(want.tobytes()))
            assert decoded.tobytes() == slow.tobytes(), (bits, block)


@pytest.mark.parametrize("kept", STATES)
def test_states_equal_the_reference_and_nothing_is_lost(kept, rng):
    for numel, bits in ((5000, 4), (257, 1)):
        g = rng.standard_normal(numel).astype(np.float32)
        mask = kept == "dgc"
        results = []
        for variant in ("cpu", "reference"):
            for in_place in (True, False):
                state = random_state(STATES[kept], numel, 4, mask)
                before = {k: x.copy() for k, x in state.buffers().items()}
                if not in_place:
                    state.spare = {k: np.empty_like(x) for k, x in before.items()}
                packets = [
                    quantize(
                        g, codec="rotated", bits=bits, bucket=256, state=state, round=r,
                        variant=variant,
                    )
                    for r in range(2)
                ]  # fmt: skip
                after = {k: x.tobytes() for k, x in state.buffers().items()}
                results.append(([p.tobytes() for p in packets], after))
        assert all(r == results[0] for r in results)
        # one step from a known state: e' + D = t, h' = h + D
        state = State(**{k: x.copy() for k, x in before.items()}, a=0.5, b=0.9, p=0.3, q=0.7)
        d = decode_packet(
            ParsedPacket(quantize(g, codec="rotated", bits=bits, bucket=256, state=state))
        )
        f = np.float32
        s = f(0.3) * before["v"] + f(0.7) * g if "v" in before else g
        t = f(0.9) * before["e"] + s if "e" in before else s
        t = t - before["h"] if "h" in before else t
        if "e" in before:
            assert (state.e == t - d).all()
        if "h" in before:
            assert (state.h == before["h"] + d).all()
        if "v" in before:
            assert (state.v == s).all()


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_layers_of_any_type_and_place(dtype, rng):
    g = rng.standard_normal(5001).astype(np_dtype(dtype))
    flat = g.astype(np.float32)
    want = sent(flat, 3, 512)
    layers = [unaligned(flat[:1], 2), flat[1:1], g[1:1030], unaligned(flat[1030:1033]), g[1033:]]
    read_only = flat.copy()
    read_only.flags.writeable = False
    for update in (g, layers, read_only, np.repeat(flat, 2)[::2]):
        assert sent(update, 3, 512).tobytes() == want.tobytes()


@pytest.mark.parametrize("bits", BITS)
def test_magnitudes_from_tiny_to_huge(bits, rng):
    """Scaling by a power of two scales the code, as far as float32 reaches."""
    x = rng.standard_normal(600).astype(np.float32)
    want = sent(x, bits, 256)
    for power in (-100, -60, 60, 100):
        factor = np.float32(2.0**power)
        assert np.array_equal(sent(x * factor, bits, 256), want * factor)
    tiny = (rng.integers(-999, 1000, 600) * 2.0**-149).astype(np.float32)
    both = [sent(tiny, bits, 256, variant=v) for v in ("cpu", "reference")]
    assert both[0].tobytes() == both[1].tobytes()
    ints, want = (x.astype(np.float64) * 2.0**149 for x in (both[0], tiny))
    assert nmse(ints, want) < 1.2 * NMSE[bits] + 0.01
    for top in (3.4e38, -3.4e38):
        for huge in (np.full(600, top, np.float32), np.float32(top) * np.eye(1, 600)[0]):
            huge = huge.astype(np.float32)
            both = [
                quantize(huge, codec="rotated", bits=bits, bucket=256, variant=v)
                for v in ("cpu", "reference")
            ]
            assert np.array_equal(*both)
            assert np.isfinite(decode_packet(ParsedPacket(both[0]))).all()


DIGESTS = """
import hashlib, numpy as np
from flcore._state import State
from flcore.ops.decode import ParsedPacket, decode
from flcore.ops.quantize import quantize
rng = np.random.default_rng(5)
digest = hashlib.sha256()
for numel in (1, 17, 255, 1025, 66_001):
    for bits in (1, 2, 3, 4):
        for block in (256, 512, 1024, 2048, 4096):
            g = (rng.standard_normal(numel) * 10.0 ** rng.integers(-5, 5)).astype(np.float32)
            e, h = (rng.standard_normal(numel).astype(np.float32) for _ in range(2))
            state = State(e=e, h=h, a=0.3)
            for measure in ("unbiased", "mse"):
                p = quantize(g, codec="rotated", bits=bits, bucket=block, state=state, seed=bits,
                             measure=measure)
                digest.update(p.tobytes() + state.e.tobytes() + state.h.tobytes())
                digest.update(decode(ParsedPacket(p)).tobytes())
print(digest.hexdigest())
"""


def test_instruction_set_levels_give_identical_bytes():
    printed = outputs_per_level(DIGESTS)
    assert len(set(printed.values())) == 1, printed


def test_thread_counts_give_identical_bytes(rng):
    g = rng.standard_normal(200_001).astype(np.float32)
    results = []
    for threads in (1, 2, 3):
        flcore.set_num_threads(threads)
        state = random_state("eh", g.size, 1)
        packet = quantize(g, codec="rotated", bits=4, bucket=1024, state=state)
        total = np.ones(g.size, np.float32)
        decode_add([packet, packet], [0.5, -2.0], total)
        results.append((packet.tobytes(), state.e.tobytes(), state.h.tobytes(), total.tobytes()))
    assert results[0] == results[1] == results[2]


def test_decode_add_is_the_weighted_sum(rng):
    g = rng.standard_normal(70_000).astype(np.float32)
    packets = [Encoder(Rotated(b), like=g, client=b).encode(g) for b in BITS]
    for dtype in (np.float32, np.float64):
        out = rng.standard_normal(g.size).astype(dtype)
        want = out.copy()
        for weight, packet in zip((0.25, -1.5, 3.0, 1.0), packets, strict=True):
            want += dtype(weight) * decode(packet).astype(dtype)
        decode_add(packets, (0.25, -1.5, 3.0, 1.0), out)
        assert np.array_equal(out, want)
