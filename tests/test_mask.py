"""Secure sums: ChaCha20 vectors, fixed-point numbers by hand, variants, exactness, drop-outs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flcore
from flcore import _arrays
from flcore.errors import DTypeError, InvalidInputError, NonFiniteError, VariantUnavailableError
from flcore.ops import dequantize_sum, mask_add, modular_sum
from flcore.ops._mask_layers import quantize_layers
from flcore.ops.mask import Mask, quantize
from flcore.privacy import SecureSum
from flcore.reference.mask import chacha20_block
from support import DTYPES, HAS_TORCH, SIZES, Guarded, np_dtype, outputs_per_level, unaligned

VARIANTS = ("cpu", "reference")
LEVELS, CLIP = 1 << 22, 8.0
KEYS = [bytes((31 * i + 7 * j) % 256 for j in range(32)) for i in range(4)]
COUNTING = bytes(range(32))


def masks(count: int) -> list[Mask]:
    return [Mask(KEYS[i], (1, -1)[i % 2], bytes([i] * 12)) for i in range(count)]


# ---- ChaCha20 ----------------------------------------------------------------------------------
# Key, counter, nonce and keystream of RFC 8439: section 2.3.2; appendix A.1, vectors 1 and 2.

RFC_8439 = [
    (
        COUNTING,
        1,
        "000000090000004a00000000",
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e",
    ),
    (
        bytes(32),
        0,
        "00" * 12,
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586",
    ),
    (
        bytes(32),
        1,
        "00" * 12,
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f",
    ),
]


@pytest.mark.parametrize(("key", "counter", "nonce", "stream"), RFC_8439)
def test_keystream_has_the_vectors_of_rfc_8439(key, counter, nonce, stream):
    want = np.frombuffer(bytes.fromhex(stream), "<u4")
    assert (chacha20_block(key, counter, bytes.fromhex(nonce)) == want).all()
    for variant in VARIANTS:
        mask = Mask(key, 1, bytes.fromhex(nonce))
        got = mask_add(np.zeros(16, np.uint32), [mask], position=16 * counter, variant=variant)
        assert got.tobytes() == bytes.fromhex(stream)


def test_keystream_hides_the_text_of_rfc_8439():
    # section 2.4.2: 114 bytes, so the last word of the message is not whole
    text = (
        b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the "
        b"future, sunscreen would be it."
    )
    cipher = (
        "6e2e359a2568f98041ba0728dd0d6981e97e7aec1d4360c20a27afccfd9fae0bf91b65c5524733ab8f593d"
        "abcd62b3571639d624e65152ab8f530c359f0861d807ca0dbf500d6a6156a38e088a22b65e52bc514d16cc"
        "f806818ce91ab77937365af90bbf74a35be6b40b8eedf2785e42874d"
    )
    mask = Mask(COUNTING, 1, bytes.fromhex("000000000000004a00000000"))
    for variant in VARIANTS:
        stream = mask_add(np.zeros(29, np.uint32), [mask], position=16, variant=variant).tobytes()
        assert bytes(a ^ b for a, b in zip(stream, text, strict=False)).hex() == cipher


@pytest.mark.parametrize("variant", VARIANTS)
def test_pieces_of_a_mask_are_the_mask(variant):
    whole = mask_add(np.zeros(1500, np.uint32), masks(2), variant=variant)
    cuts = [0, 1, 5, 16, 250, 257, 768, 1500]  # within blocks and groups, and on their borders
    pieces = [
        mask_add(np.zeros(b - a, np.uint32), masks(2), position=a, variant=variant)
        for a, b in itertools.pairwise(cuts)
    ]
    assert np.concatenate(pieces).tobytes() == whole.tobytes()


def test_the_end_of_a_mask():
    for variant in VARIANTS:
        got = mask_add(
            np.zeros(20, np.uint32), [Mask(COUNTING)], position=2**36 - 20, variant=variant
        )
        want = chacha20_block(COUNTING, [2**32 - 2, 2**32 - 1], bytes(12)).reshape(-1)[-20:]
        assert (got == want).all()
    with pytest.raises(InvalidInputError, match="position: a mask stream has 2\\^36 words"):
        mask_add(np.zeros(21, np.uint32), [Mask(COUNTING)], position=2**36 - 20)


# ---- numbers by hand ---------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_levels_by_hand(variant, rounding):  # whole levels: no rounding changes them
    x = np.float32([-9, -8, 0, 0.5, 8, -1.25, 3])
    words, clipped = quantize(x, rounding=rounding, seed=1, variant=variant)
    assert words.tolist() == [0, 0, 2097152, 2228224, 4194304, 1769472, 2883584]
    assert clipped == 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_sum_of_three_by_hand(variant):
    words, _ = quantize(np.array([0.5, -1.25, 3.0]), rounding="nearest")
    total = modular_sum(words.reshape(3, 1), variant=variant)
    got = dequantize_sum(total, 3, dtype="float64", variant=variant)
    assert got.tolist() == [2.25]  # 18.25 - 16


def test_nearest_ties_go_to_even():
    x = np.array([0.5, 1.5, 2.5, 3.5, 3.5 + 1e-12])
    words, _ = quantize(x, clip=4.0, levels=8, rounding="nearest")
    assert words.tolist() == [4, 6, 6, 8, 8]  # u = 4.5, 5.5, 6.5, 7.5


def test_two_clients_by_hand():
    secure = SecureSum(rounding="nearest")
    updates, weights = [np.array([1.0, -2.0]), np.array([0.5, 4.0])], [100, 300]
    server = secure.server(np.zeros(2), clients=[0, 1])
    for i, (x, e) in enumerate(zip(updates, weights, strict=True)):
        server.add(i, secure.encode(x, e, masks=secure.masks(i, KEYS[i], {1 - i: KEYS[2]})))
    mean = server.unmask({0: KEYS[0], 1: KEYS[1]}).result()
    assert mean.round(6).tolist() == [0.625, 2.500001]
    q_total = 419430 + 1258291
    assert server.total_weight == q_total / LEVELS * 1000
    # (2 C / R) n / 2 * R / Qtot
    bound = secure.error_bound(2, server.total_weight)
    assert bound == pytest.approx(2 * CLIP / LEVELS * LEVELS / q_total)
    assert (np.abs(mean - [0.625, 2.5]) <= bound).all()


# ---- every variant against the reference -------------------------------------------------------


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_has_the_words_of_the_reference(dtype, rounding, rng):
    for size in SIZES:
        x = (4 * rng.standard_normal(size)).astype(np_dtype(dtype))
        for count, position, bits in ((0, 0, 32), (1, 1, 32), (3, 4099, 27)):
            options = {
                "scale": 1.7,
                "rounding": rounding,
                "seed": 2**64 - 1,
                "round": 2,
                "tensor": 3,
                "client": 2**32 - 1,
                "offset": position % 7,
                "masks": masks(count),
                "position": position,
                "bits": bits,
            }
            want, clipped = quantize(x, variant="reference", **options)
            got, same = quantize(unaligned(x), variant="cpu", **options)
            assert got.tobytes() == want.tobytes(), (size, count)
            assert clipped == same and (size < 1000 or clipped > 0)


@pytest.mark.parametrize("clip", [1e-3, 0.1, 3.0, 1e6])
@pytest.mark.parametrize("levels", [1, 3, 1000, 2**31 + 1, 2**32 - 1])
def test_no_word_is_above_the_top_level(levels, clip, rng):
    x = np.concatenate([rng.uniform(-clip, clip, 500), [clip, np.nextafter(clip, 0), -clip, 1e308]])
    for rounding in ("nearest", "stochastic"):
        options = {"clip": clip, "levels": levels, "rounding": rounding, "seed": 3}
        words, _ = quantize(x, **options)
        assert words[[500, 502, 503]].tolist() == [levels, 0, levels]
        assert words.max() <= levels
        assert words.tobytes() == quantize(x, variant="reference", **options)[0].tobytes()
        within = 0.5 + 1e-6 if rounding == "nearest" else 1 + 1e-6
        back = dequantize_sum(words, 1, clip=clip, levels=levels, dtype="float64")
        steps = np.abs(back - np.clip(x, -clip, clip)) * levels / (2 * clip)
        assert steps.max() <= within + levels * 2.0**-50


@pytest.mark.parametrize("bits", [32, 31, 9, 1])
def test_masks_and_sums_have_the_words_of_the_reference(bits, rng):
    for size in SIZES:
        rows = [unaligned(rng.integers(0, 2**32, size, np.uint32), i + 1) for i in range(11)]
        for n in (1, 2, 3, 8, 11):
            start = rng.integers(0, 2**32, size, np.uint32)
            wide = start.astype(object) + sum(r.astype(object) for r in rows[:n])
            for variant in VARIANTS:
                guarded = Guarded(size, np.dtype(np.uint32), offset=1)
                guarded.array[:] = start
                out = modular_sum(rows[:n], acc=guarded.array, bits=bits, variant=variant)
                assert out is guarded.array
                guarded.check()
                assert out.tolist() == (wide % 2**bits).tolist()
        want = mask_add(rows[0], masks(3), position=11, bits=bits, variant="reference")
        guarded = Guarded(size, np.dtype(np.uint32), offset=1)
        assert mask_add(rows[0], masks(3), position=11, bits=bits, out=guarded.array) is (
            guarded.array
        )
        guarded.check()
        assert guarded.array.tobytes() == want.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_rounds_the_exact_sum_once(dtype, rng):
    from fractions import Fraction

    for size in SIZES:
        words = rng.integers(0, 7 * LEVELS, size, np.uint32, endpoint=True)
        guarded = Guarded(size, np_dtype(dtype))
        got = dequantize_sum(words, 7, divisor=3.0, out=guarded.array)
        guarded.check()
        assert got is guarded.array
        factor = Fraction(CLIP / (LEVELS * 3.0))
        exact = [float((2 * int(z) - 7 * LEVELS) * factor) for z in words]
        assert got.tobytes() == np.array(exact).astype(np_dtype(dtype)).tobytes()
        if dtype != "bfloat16":
            want = dequantize_sum(words, 7, divisor=3.0, dtype=dtype, variant="reference")
            assert got.tobytes() == want.tobytes()


def test_kernels_write_nothing_outside(rng):
    for size in SIZES:
        x = rng.standard_normal(size).astype(np.float32)
        guarded = Guarded(size, np.dtype(np.uint32), offset=1)
        quantize_layers(
            [_arrays.view(x)],
            guarded.array,
            scale=1.0,
            clip=CLIP,
            levels=LEVELS,
            rounding="stochastic",
            stream=(1, 2, 3),
            masks=masks(2),
            position=5,
            bits=32,
            variant="cpu",
        )
        guarded.check()
        want, _ = quantize(x, seed=1, round=2, client=3, masks=masks(2), position=5)
        assert guarded.array.tobytes() == want.tobytes()


LEVELS_SCRIPT = """
import hashlib, numpy as np, ml_dtypes
from flcore.ops import dequantize_sum, mask_add, modular_sum
from flcore.ops.mask import Mask, quantize
rng = np.random.default_rng(5)
keys = [Mask(bytes([i] * 32), (1, -1)[i % 2]) for i in range(3)]
for dtype in ("float64", "float32", "float16", ml_dtypes.bfloat16):
    x = (5 * rng.standard_normal(9001)).astype(dtype)
    for rounding in ("nearest", "stochastic"):
        words, clipped = quantize(x, scale=0.3, clip=2.7, rounding=rounding, seed=9, masks=keys,
                                  position=3, bits=30)
        print(clipped, hashlib.sha256(words.tobytes()).hexdigest())
    total = modular_sum([words, words, words], bits=30)
    print(hashlib.sha256(mask_add(total, keys, position=2**33 + 1).tobytes()).hexdigest())
    back = dequantize_sum(total, 256, clip=2.7, divisor=1.1, dtype=np.dtype(dtype).name
                          if dtype is not ml_dtypes.bfloat16 else "float32")
    print(hashlib.sha256(back.tobytes()).hexdigest())
"""


def test_instruction_sets_give_identical_bits():
    printed = outputs_per_level(LEVELS_SCRIPT)
    assert len(printed) >= 1 and len(set(printed.values())) == 1, printed.keys()


def test_thread_counts_give_identical_bits(rng):
    x = rng.standard_normal(300_001).astype(np.float32)
    results = set()
    for threads in (1, 2, 3):
        flcore.set_num_threads(threads)
        words, clipped = quantize(x, clip=2.0, seed=1, masks=masks(2), position=1)
        total = modular_sum([words] * 5)
        hidden = mask_add(total, masks(1), position=7)
        back = dequantize_sum(hidden & np.uint32(LEVELS - 1), 1)
        results.add((clipped, words.tobytes(), total.tobytes(), hidden.tobytes(), back.tobytes()))
    assert len(results) == 1


# ---- exactness and unbiasedness ----------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_stochastic_rounding_is_unbiased(variant):
    # 10^5 roundings of a value a third of the way between two levels; seeded, so not flaky
    clip, levels, repeats = 1.0, 8, 100_000
    for x in (0.0833, -0.71, 0.999):
        u = (x + clip) * levels / (2 * clip)
        words, _ = quantize(np.full(repeats, x), clip=clip, levels=levels, seed=4, variant=variant)
        assert set(np.unique(words)) == {int(u), int(u) + 1}
        deviation = np.sqrt((u - int(u)) * (1 - u + int(u)) / repeats)
        assert abs(words.mean() - u) < 5 * deviation


def test_roundings_of_clients_layers_and_rounds_differ(rng):
    x = rng.uniform(-1, 1, 1000)
    name = {"seed": 1, "round": 1, "tensor": 1, "client": 1}
    first, _ = quantize(x, **name)
    assert quantize(x, **name)[0].tobytes() == first.tobytes()
    for word in name:
        other, _ = quantize(x, **{**name, word: 2})
        assert np.abs(other.astype(int) - first.astype(int)).max() == 1


def test_a_mask_and_its_opposite_cancel(rng):
    words = rng.integers(0, 2**32, 1000, np.uint32)
    both = [Mask(KEYS[0]), Mask(KEYS[1]), Mask(KEYS[0], -1), Mask(KEYS[1], -1)]
    assert (mask_add(words, both) == words).all()
    hidden = mask_add(words, both[:2])
    assert (hidden != words).mean() > 0.99
    assert mask_add(hidden, both[2:], out=hidden) is hidden  # in place
    assert (hidden == words).all()


def test_fewer_bits_agree_with_32_when_nothing_overflows(rng):
    clients, levels = 5, 1 << 10
    for bits in (13, 16, 31):
        means = []
        for b in (bits, 32):
            secure = SecureSum(levels=levels, modulus_bits=b)
            server = secure.server(np.zeros(300), clients=range(clients))
            means.append(run_round(secure, server, drop=set()))
        assert means[0].tobytes() == means[1].tobytes()


def test_overlapping_memory_is_read_before_it_is_written(rng):
    memory = rng.integers(0, 2**32, 10_001, np.uint32)
    want = mask_add(memory[:-1], masks(1))
    assert mask_add(memory[:-1], masks(1), out=memory[1:]).tobytes() == want.tobytes()
    rows = rng.integers(0, 2**32, (10, 5000), np.uint32)
    want = modular_sum([*rows, rows[0]])
    assert modular_sum(rows, acc=rows[0]).tobytes() == want.tobytes()


def test_rows_may_be_strided_foreign_endian_and_read_only(rng):
    memory = rng.integers(0, 2**32, (3, 200), np.uint32)
    memory.flags.writeable = False
    want = modular_sum(np.ascontiguousarray(memory[:, ::2]))
    swapped = memory[:, ::2].astype(">u4")
    assert (modular_sum(list(memory[:, ::2])) == want).all()
    assert (modular_sum(list(swapped)) == want).all()
    assert modular_sum(np.zeros((3, 0), np.uint32)).shape == (0,)


# ---- rounds ------------------------------------------------------------------------------------


def key_of(*numbers: int) -> bytes:
    return bytes((n * 37 + j) % 256 for j in range(32 // len(numbers)) for n in numbers)


def pair_key(i: int, j: int) -> bytes:
    return key_of(min(i, j) + 1, max(i, j) + 101)


def messages(secure: SecureSum, clients, graph, size: int = 300, round: int = 0):
    """Words of every client, plain and masked; weights 100, 200, ..."""
    rng = np.random.default_rng(8)
    plain, masked = {}, {}
    for k, c in enumerate(sorted(clients)):
        x, weight = rng.uniform(-1, 1, size), 100 * (k + 1)
        keys = {other: pair_key(c, other) for other in graph[c]}
        name = {"seed": k, "client": k, "round": round}
        plain[c] = secure.encode(x, weight, **name)
        masked[c] = secure.encode(
            x, weight, **name, masks=secure.masks(c, key_of(c), keys, round=round)
        )
        same = secure.mask(plain[c], c, key_of(c), keys, round=round)
        assert same.tobytes() == masked[c].tobytes()
    return plain, masked


def run_round(secure, server, drop, graph=None, order=None, round=0):
    clients = server.clients
    graph = graph or {c: [o for o in clients if o != c] for c in clients}
    plain, masked = messages(secure, clients, graph, size=300, round=round)
    for c in order or sorted(clients - drop):
        server.add(c, masked[c])
    private, pairs = server.missing_keys()
    server.unmask(
        {c: key_of(c) for c in private},
        {gone: {o: pair_key(gone, o) for o in others} for gone, others in pairs.items()},
    )
    want = modular_sum([plain[c] for c in clients - drop], bits=secure.modulus_bits)
    assert server._words.tobytes() == want.tobytes()
    return server.result()


def ring(clients: list[int], reach: int = 1) -> dict[int, list[int]]:
    n = len(clients)
    near = [k for k in range(-reach, reach + 1) if k]
    return {c: sorted({clients[(i + k) % n] for k in near}) for i, c in enumerate(clients)}


@given(
    numbers=st.lists(st.integers(-(2**63), 2**64 - 1), min_size=1, max_size=7, unique=True),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_the_sum_is_exact_for_any_order_and_any_drop_outs(numbers, data):
    drop = data.draw(st.sets(st.sampled_from(numbers), max_size=len(numbers) - 1))
    order = data.draw(st.permutations([c for c in numbers if c not in drop]))
    bits = data.draw(st.sampled_from([32, 30, 25]))
    graph = ring(numbers, 2) if len(numbers) > 5 and data.draw(st.booleans()) else None
    secure = SecureSum(modulus_bits=bits)
    server = secure.server(np.zeros(300), numbers, neighbours=graph, round=3)
    run_round(secure, server, drop, graph, order, round=3)  # holds the assertion


def test_the_mean_is_within_its_bound():
    for rounding, drop in itertools.product(("nearest", "stochastic"), (set(), {2, 5})):
        secure = SecureSum(rounding=rounding, levels=1 << 12)
        server = secure.server(np.zeros(300), clients=range(6))
        mean = run_round(secure, server, drop)
        rng = np.random.default_rng(8)
        rows, q = [], []
        for k in range(6):
            rows.append(rng.uniform(-1, 1, 300))
            q.append(round(100 * (k + 1) / 1000 * (1 << 12)))
        live = [k for k in range(6) if k not in drop]
        want = sum(q[k] * rows[k] for k in live) / sum(q[k] for k in live)
        bound = secure.error_bound(len(live), server.total_weight)
        error = np.abs(mean - want).max()
        assert bound / 50 < error <= bound * (1 + 1e-9)


def test_layers_keep_their_structure_and_words_their_order(rng):
    update = {
        "w": rng.uniform(-1, 1, (7, 5)).astype(np.float32),
        "empty": np.zeros((0, 3), np.float32),
        "b": rng.uniform(-1, 1, 3),
        "h": rng.uniform(-1, 1, 18).astype(np.float16),
    }
    secure = SecureSum()
    keys = secure.masks(0, KEYS[0], {})
    words = secure.encode(update, 1000, seed=6, round=1, client=2, masks=keys)
    assert words.shape == (1 + 35 + 3 + 18,)
    layers, position = [np.uint32([LEVELS])], 1
    for tensor, x in enumerate(update.values()):
        layers.append(quantize(x, seed=6, round=1, client=2, tensor=tensor)[0])
    assert words.tobytes() == mask_add(np.concatenate(layers), keys).tobytes()
    assert position + sum(x.size for x in update.values()) == words.size
    server = secure.server(update, clients=[0])
    mean = server.add(0, words.tobytes()).unmask({0: KEYS[0]}).result()
    assert list(mean) == list(update) and server.total_weight == 1000
    for name, x in update.items():
        assert mean[name].shape == x.shape and mean[name].dtype == x.dtype
        np.testing.assert_allclose(mean[name], x, rtol=2e-3 if name == "h" else 0, atol=4e-6)


@pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")
def test_torch_tensors_give_the_words_of_numpy(rng):
    import torch

    x = rng.uniform(-1, 1, 500).astype(np.float32)
    tensor = torch.from_numpy(x.copy())
    words, _ = quantize(tensor, seed=1, masks=masks(1))
    assert words.dtype == torch.uint32
    want, _ = quantize(x, seed=1, masks=masks(1))
    assert words.numpy().tobytes() == want.tobytes()
    for variant in VARIANTS:
        plain = mask_add(words, [Mask(KEYS[0], -1, bytes(12))], variant=variant)
        total = modular_sum([plain, plain], variant=variant)
        back = dequantize_sum(total, 2, dtype="bfloat16", variant=variant)
        assert back.dtype == torch.bfloat16
        np.testing.assert_allclose(back.float().numpy(), 2 * x, rtol=2.0**-8, atol=8e-6)
    secure = SecureSum()
    model = [tensor.reshape(50, 10), tensor[:3].to(torch.bfloat16)]
    server = secure.server(model, clients=[4])
    mean = server.add(4, secure.encode(model, 10, seed=1, masks=secure.masks(4, KEYS[0], {})))
    mean = mean.unmask({4: KEYS[0]}).result()
    assert [m.dtype for m in mean] == [torch.float32, torch.bfloat16]
    torch.testing.assert_close(mean[0], model[0], rtol=0, atol=2 * 3.8147e-6 * 100)


def test_a_full_modulus_is_told_from_an_empty_one():
    secure = SecureSum(levels=64, modulus_bits=8, max_weight=1, rounding="nearest")
    assert secure.max_clients == 4

    def run(values):
        server = secure.server(np.zeros(1), clients=range(4))
        for i, value in enumerate(values):
            server.add(i, secure.encode(np.array([value]), 1, saturation="ignore"))
        server._unmasked = True  # plain words: nothing to remove
        return server.result()

    assert run([8.0, 8.0, 8.0, 7.0]) == pytest.approx(7.75)
    for end in (8.0, -8.0):  # 4 * 64 levels are 0 modulo 2^8
        with pytest.raises(InvalidInputError, match="fill the modulus"):
            run([end] * 4)


def test_a_wrong_key_is_seen():
    secure = SecureSum()
    server = secure.server(np.zeros(50), clients=[1, 2])
    _, masked = messages(secure, [1, 2], {1: [2], 2: [1]}, size=50)
    server.add(1, masked[1]).add(2, masked[2])
    server.unmask({1: key_of(1), 2: key_of(3)})
    with pytest.raises(InvalidInputError, match="a wrong key"):
        server.result()
    words = np.full(50, 2 * LEVELS + 1, np.uint32)
    with pytest.raises(InvalidInputError, match="50 of 50 are above clients \\* levels = 8388608"):
        dequantize_sum(words, 2)


# ---- errors ------------------------------------------------------------------------------------


def test_overflow_is_refused_before_the_round():
    secure = SecureSum()
    assert secure.max_clients == 1024 and secure.check_clients(1024) == 1024
    with pytest.raises(InvalidInputError, match="1025 clients of 4194304 levels overflow"):
        secure.check_clients(1025)
    with pytest.raises(InvalidInputError, match="overflow the modulus"):
        secure.server(np.zeros(3), clients=range(1025))
    with pytest.raises(InvalidInputError, match="clients: expected 1 <= clients <= 1024"):
        dequantize_sum(np.zeros(3, np.uint32), 1025)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("variant", VARIANTS)
def test_non_finite_values_are_refused_and_nothing_is_written(variant, bad):
    for size, at in ((1, 0), (33, 32), (5000, 4097)):
        x = np.zeros(size, np.float32)
        x[at] = bad
        out = np.full(size, 7, np.uint32)
        with pytest.raises(NonFiniteError, match="x: NaN or infinity"):
            quantize(x, rounding="nearest", out=out, variant=variant)
        assert (out == 7).all()
    with pytest.raises(NonFiniteError, match=r"update\['b'\]: NaN"):
        SecureSum().encode({"a": np.zeros(2), "b": x}, 1, seed=0, variant=variant)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"clip": 0}, InvalidInputError, "clip: expected a finite number above 0, got 0"),
        ({"clip": float("nan")}, InvalidInputError, "clip"),
        ({"clip": 1.5e308}, InvalidInputError, "clip: the step between levels"),
        ({"clip": 1e-320}, InvalidInputError, "clip: the step between levels"),
        ({"clip": "8"}, None, ""),
        ({"clip": None}, DTypeError, "clip: expected a number, got NoneType"),
        ({"scale": float("inf")}, InvalidInputError, "scale"),
        ({"levels": 0}, InvalidInputError, "levels: expected 1 <= levels <= 4294967295, got 0"),
        ({"levels": 2**32}, InvalidInputError, "levels"),
        ({"levels": 2**22, "bits": 22}, InvalidInputError, "levels <= 4194303"),
        ({"levels": 4.0}, DTypeError, "levels: expected an integer, got float"),
        ({"bits": 33}, InvalidInputError, "bits: expected 1 <= bits <= 32, got 33"),
        ({"rounding": "up"}, InvalidInputError, "rounding"),
        ({"seed": None}, InvalidInputError, "seed: stochastic rounding needs one"),
        ({"seed": -1}, InvalidInputError, "seed"),
        ({"round": 2**32}, InvalidInputError, "round"),
        ({"client": -1}, InvalidInputError, "client"),
        ({"tensor": 2**32}, InvalidInputError, "tensor"),
        ({"offset": 2**34 - 3}, InvalidInputError, "offset: a stream has 2\\^34 values"),
        ({"position": -1}, InvalidInputError, "position"),
        ({"position": 2**36 - 3}, InvalidInputError, "position: a mask stream has"),
        ({"masks": [Mask(bytes(31))]}, InvalidInputError, "masks\\[0\\].key: expected 32 bytes"),
        ({"masks": [Mask("k" * 32)]}, DTypeError, "masks\\[0\\].key: expected 32 bytes, got str"),
        ({"masks": [Mask(bytes(32), 2)]}, InvalidInputError, "masks\\[0\\].sign"),
        ({"masks": [Mask(bytes(32), 1, bytes(8))]}, InvalidInputError, "nonce: expected 12 bytes"),
        ({"masks": [bytes(32)]}, DTypeError, "masks\\[0\\]: expected a Mask"),
        ({"out": np.zeros(3, np.uint32)}, InvalidInputError, "out: expected 4 words, got 3"),
        ({"out": np.zeros(4, np.int32)}, DTypeError, "out: expected an array of uint32, got int32"),
        ({"out": np.zeros(8, np.uint32)[::2]}, InvalidInputError, "out: expected a contiguous"),
        ({"out": np.frombuffer(bytes(16), np.uint32)}, InvalidInputError, "out: the array is read"),
        ({"x": np.zeros(4, np.int64)}, DTypeError, "x: expected float64"),
        ({"x": [0.0]}, DTypeError, "x: expected a NumPy array"),
        ({"variant": "cuda"}, VariantUnavailableError, "mask_quantize has no cuda variant"),
    ],
)
def test_bad_arguments_of_quantize_are_named(arguments, error, says):
    call = {"x": np.zeros(4, np.float32), "seed": 0, **arguments}
    if error is None:
        quantize(call.pop("x"), **call)
        return
    with pytest.raises(error, match=says):
        quantize(call.pop("x"), **call)


def test_bad_words_are_named():
    words = np.zeros(4, np.uint32)
    with pytest.raises(DTypeError, match="words: expected an array of uint32, got uint8"):
        mask_add(np.zeros(4, np.uint8), [])
    with pytest.raises(InvalidInputError, match="rows: expected at least one"):
        modular_sum([])
    with pytest.raises(InvalidInputError, match=r"rows\[1\]: expected 4 words on cpu, got 5"):
        modular_sum([words, np.zeros(5, np.uint32)])
    with pytest.raises(DTypeError, match=r"rows\[1\]: expected an array of uint32, got float32"):
        modular_sum([words, np.zeros(4, np.float32)], acc=words)
    with pytest.raises(InvalidInputError, match="divisor: expected a finite number above 0"):
        dequantize_sum(words, 1, divisor=0)
    with pytest.raises(DTypeError, match="dtype: expected one of"):
        dequantize_sum(words, 1, dtype="int32")
    with pytest.raises(InvalidInputError, match="out: expected 4 values, got 3"):
        dequantize_sum(words, 1, out=np.zeros(3))
    with pytest.raises(DTypeError, match="dtype: NumPy has no bfloat16"):
        dequantize_sum(words, 1, dtype="bfloat16")


def test_a_key_is_not_printed():
    assert repr(Mask(b"secret" + bytes(26))) == f"Mask(key=..., sign=1, nonce={bytes(12)!r})"


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"clip": -1.0}, InvalidInputError, "clip"),
        ({"levels": 2**32}, InvalidInputError, "levels"),
        ({"modulus_bits": 22}, InvalidInputError, "levels: expected 1 <= levels <= 4194303"),
        ({"modulus_bits": 64}, InvalidInputError, "modulus_bits"),
        ({"max_weight": 0}, InvalidInputError, "max_weight"),
        ({"rounding": "down"}, InvalidInputError, "rounding"),
        ({"levels": 1e6}, DTypeError, "levels: expected an integer"),
    ],
)
def test_bad_settings_are_named(arguments, error, says):
    with pytest.raises(error, match=says):
        SecureSum(**arguments)


def test_bad_weights_and_updates_are_named():
    secure, x = SecureSum(), np.zeros(3)
    for weight, says in (
        (-1, "weight: expected 0 <= weight <= max_weight = 1000"),
        (1001, "got 1001"),
        (float("nan"), "weight: expected a finite number"),
        (1e-5, "below half a step"),
    ):
        with pytest.raises(InvalidInputError, match=says):
            secure.encode(x, weight, seed=0)
    assert secure.integer_weight(0) == 0 and secure.integer_weight(1000) == LEVELS
    with pytest.raises(DTypeError, match=r"update\[1\]: expected float64"):
        secure.encode([x, np.zeros(3, np.int64)], 1, seed=0)
    big = np.array([1.0, 9.0, -9.0])
    with pytest.warns(UserWarning, match="2 of 3 values times the weight 1 are beyond clip = 8"):
        secure.encode(big, 1000, seed=0)
    with pytest.raises(InvalidInputError, match="2 of 3 values"):
        secure.encode(big, 1000, seed=0, saturation="raise")
    with pytest.raises(InvalidInputError, match="saturation: expected one of"):
        secure.encode(big, 1000, seed=0, saturation="no")
    with pytest.raises(InvalidInputError, match="client 3 is its own neighbour"):
        secure.masks(3, KEYS[0], {3: KEYS[1]})
    with pytest.raises(InvalidInputError, match=r"pair_keys\[4\]: expected a key of 32 bytes"):
        secure.masks(3, KEYS[0], {4: b"short"})
    with pytest.raises(DTypeError, match="private_key: expected a key of 32 bytes, got str"):
        secure.masks(3, "key", {})
    with pytest.raises(InvalidInputError, match="round"):
        secure.masks(3, KEYS[0], {}, round=-1)


def test_a_hostile_message_changes_nothing():
    secure = SecureSum()
    server = secure.server(np.zeros(3), clients=[1, 2, 3])
    words = np.arange(4, dtype=np.uint32)
    for client, message, error, says in (
        (9, words, InvalidInputError, "client: 9 is not in this round"),
        (1, words[:3], InvalidInputError, "words: expected 4 words, got 3"),
        (1, bytes(15), InvalidInputError, "words: expected 16 bytes \\(4 words\\), got 15"),
        (1, words.astype(np.int64), DTypeError, "words: expected an array of uint32, got int64"),
        (1, None, DTypeError, "words: expected an array of uint32, got NoneType"),
    ):
        with pytest.raises(error, match=says):
            server.add(client, message)
    assert not server.received and not server._words.any()
    server.add(1, words)
    with pytest.raises(InvalidInputError, match="client: 1 has sent its words already"):
        server.add(1, words)
    assert server._words.tolist() == words.tolist()


def test_unmask_wants_the_right_keys_and_no_others():
    secure = SecureSum()
    server = secure.server(np.zeros(3), clients=[1, 2, 3])
    with pytest.raises(InvalidInputError, match="no client has sent"):
        server.unmask({})
    server.add(1, np.zeros(4, np.uint32)).add(2, np.zeros(4, np.uint32))
    assert server.missing_keys() == ([1, 2], {3: [1, 2]}) and server.dropped == {3}
    private, pairs = {1: KEYS[1], 2: KEYS[2]}, {3: {1: KEYS[0], 2: KEYS[0]}}
    before = server._words.copy()
    for keys, says in (
        (({1: KEYS[1]}, pairs), "private_keys: missing for \\[2\\]"),
        (({**private, 3: KEYS[3]}, pairs), "private_keys: not expected for \\[3\\]; never ask"),
        ((private, {}), "pair_keys: missing for \\[3\\]"),
        ((private, {3: {1: KEYS[0]}}), "pair_keys\\[3\\]: missing for \\[2\\]"),
        ((private, {**pairs, 1: {2: KEYS[0]}}), "pair_keys: not expected for \\[1\\]"),
        (({**private, 2: bytes(5)}, pairs), "private_keys\\[2\\]: expected a key of 32 bytes"),
    ):
        with pytest.raises(InvalidInputError, match=says):
            server.unmask(*keys)
    assert (server._words == before).all()
    with pytest.raises(InvalidInputError, match="call unmask first"):
        server.result()
    server.unmask(private, pairs)
    with pytest.raises(InvalidInputError, match="removed already"):
        server.unmask(private, pairs)
    with pytest.raises(InvalidInputError, match="comes after unmask"):
        server.add(3, np.zeros(4, np.uint32))


def test_weights_that_add_up_to_zero_have_no_mean():
    secure = SecureSum()
    server = secure.server(np.zeros(3), clients=[0])
    words = secure.encode(np.ones(3), 0, seed=1, masks=secure.masks(0, KEYS[0], {}))
    with pytest.raises(InvalidInputError, match="weights add up to 0"):
        server.add(0, words).unmask({0: KEYS[0]}).result()


@pytest.mark.parametrize(
    ("clients", "neighbours", "says"),
    [
        ([1, 1], None, "clients: expected different numbers"),
        ([], None, "clients: expected 1 <= clients"),
        ([1, 2], {1: [2]}, "neighbours: expected an entry for each client"),
        ([1, 2], {1: [1], 2: []}, "neighbours\\[1\\]: expected other clients"),
        ([1, 2], {1: [3], 2: []}, "neighbours\\[1\\]: expected other clients"),
        ([1, 2], {1: [2], 2: []}, "2 is a neighbour of 1, but 1 is not one of 2"),
    ],
)
def test_bad_rounds_are_named(clients, neighbours, says):
    with pytest.raises(InvalidInputError, match=says):
        SecureSum().server(np.zeros(3), clients, neighbours=neighbours)
