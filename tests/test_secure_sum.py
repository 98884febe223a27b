"""Secure rounds: two clients by hand, exact for any drop-outs, error bound, hostile messages."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flcore.errors import DTypeError, InvalidInputError, NonFiniteError
from flcore.ops import dequantize_sum, mask_add, modular_sum
from flcore.ops.mask import quantize
from flcore.privacy import SecureSum
from support import HAS_TORCH

LEVELS, CLIP = 1 << 22, 8.0
KEYS = [bytes((31 * i + 7 * j) % 256 for j in range(32)) for i in range(4)]


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


def test_the_mean_is_that_of_the_published_steps(rng):
    # one by one as SecAgg+ has them: scale, shift by -C, n - 1 more shifts, times R / Qtot
    secure = SecureSum()
    rows = rng.uniform(-5, 5, (9, 400))
    q = [secure.integer_weight(e) for e in range(100, 1000, 100)]
    words = [quantize(x, scale=k / LEVELS, seed=1)[0] for x, k in zip(rows, q, strict=True)]
    total = modular_sum(words)
    z = total.astype(np.float64) * (2 * CLIP / LEVELS) - CLIP
    want = (z - (9 - 1) * CLIP) * (LEVELS / sum(q))
    got = dequantize_sum(total, 9, divisor=sum(q) / LEVELS, dtype="float64")
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-13)
    mean = np.average(rows, axis=0, weights=q)
    assert 0 < np.abs(got - mean).max() <= secure.error_bound(9, sum(q) / LEVELS * 1000)


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


def test_fewer_bits_agree_with_32_when_nothing_overflows(rng):
    clients, levels = 5, 1 << 10
    for bits in (13, 16, 31):
        means = []
        for b in (bits, 32):
            secure = SecureSum(levels=levels, modulus_bits=b)
            server = secure.server(np.zeros(300), clients=range(clients))
            means.append(run_round(secure, server, drop=set()))
        assert means[0].tobytes() == means[1].tobytes()


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


@pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")
def test_torch_models_come_back_as_torch(rng):
    import torch

    tensor = torch.from_numpy(rng.uniform(-1, 1, 500).astype(np.float32))
    secure = SecureSum()
    model = [tensor.reshape(50, 10), tensor[:3].to(torch.bfloat16)]
    server = secure.server(model, clients=[4])
    mean = server.add(4, secure.encode(model, 10, seed=1, masks=secure.masks(4, KEYS[0], {})))
    mean = mean.unmask({4: KEYS[0]}).result()
    assert [m.dtype for m in mean] == [torch.float32, torch.bfloat16]
    torch.testing.assert_close(mean[0], model[0], rtol=0, atol=2 * 3.8147e-6 * 100)


# ---- errors ----------------------------------------------------------------------------------


def test_overflow_is_refused_before_the_round():
    secure = SecureSum()
    assert secure.max_clients == 1024 and secure.check_clients(1024) == 1024
    with pytest.raises(InvalidInputError, match="1025 clients of 4194304 levels overflow"):
        secure.check_clients(1025)
    with pytest.raises(InvalidInputError, match="overflow the modulus"):
        secure.server(np.zeros(3), clients=range(1025))


def test_a_non_finite_layer_is_named():
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(NonFiniteError, match=r"update\['b'\]: NaN"):
            SecureSum().encode({"a": np.zeros(2), "b": np.float32([0, bad])}, 1, seed=0)


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
