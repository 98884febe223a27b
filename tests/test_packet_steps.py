"""Server steps and streaming sums straight from packets: the bits of those of decoded updates."""

from __future__ import annotations

import numpy as np
import pytest

from flcore import ops
from flcore.aggregation import Accumulator, Clipping, FedAdagrad, FedAdam, FedAvgM, FedYogi, Krum
from flcore.errors import DTypeError, InvalidInputError, NonFiniteError
from test_packet_rules import SHAPES, TOTAL, assert_same_bits, clients, decode, make, split

# ---- servers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("server", [FedAvgM, FedAdagrad, FedAdam, FedYogi])
@pytest.mark.parametrize("accumulate", ["float32", "float64", "reproducible"])
def test_server_step_from_packets(server, accumulate):
    like = split(np.random.default_rng(3).standard_normal(TOTAL).astype(np.float32))
    one, two = (server(lr=0.1, noise_std=0.01, accumulate=accumulate) for _ in range(2))
    model_one = model_two = like
    for r in range(3):
        packets = clients(4 + r, TOTAL)
        weights = np.arange(1.0, 5 + r)
        model_one = one.step(model_one, packets, weights)
        model_two = two.step(model_two, [split(decode(p)) for p in packets], weights)
        assert_same_bits(model_one, model_two)
    for key, value in one.state_dict().items():
        if isinstance(value, np.ndarray):
            assert_same_bits(value, two.state_dict()[key])


def test_server_step_with_a_rule_and_copies():
    model = split(np.random.default_rng(3).standard_normal(TOTAL).astype(np.float64))
    packets = clients(7, TOTAL)
    one, two = FedAdam(lr=0.1), FedAdam(lr=0.1)
    stepped, cast = one.step(model, packets, rule=Krum(1), cast="float16")
    rows = [{k: x.astype(np.float64) for k, x in split(decode(p)).items()} for p in packets]
    expected, cast_too = two.step(model, rows, rule=Krum(1), cast="float16")
    for name in SHAPES:
        np.testing.assert_allclose(stepped[name], expected[name], rtol=1e-6)
        assert stepped[name].dtype == np.float64 and cast[name].dtype == cast_too[name].dtype
    with pytest.raises(InvalidInputError, match="packets hold updates"):
        FedAdam(lr=0.1, inputs="models").step(model, packets)


def test_combine_step():
    packets = clients(6, 3000)
    model = np.random.default_rng(0).standard_normal(3000).astype(np.float32)
    rows = [decode(p) for p in packets]
    for kind in ("sgd", "momentum", "adagrad", "adam", "yogi"):
        step = ops.Step(kind, lr=0.3)
        got = ops.combine_step(packets, [1, 2, 0, 1, -1, 1], model, step, divisor=4.0)
        expected = ops.combine_step(rows, [1, 2, 0, 1, -1, 1], model, step, divisor=4.0)
        assert_same_bits(got.model, expected.model)
        plain = ops.combine_step(
            packets, [1, 2, 0, 1, -1, 1], model, step, divisor=4.0, variant="reference"
        )
        np.testing.assert_allclose(got.model, plain.model, rtol=1e-4, atol=1e-5)
    with pytest.raises(InvalidInputError, match="packets are updates"):
        ops.combine_step(packets, [1] * 6, model, ops.Step("sgd"), inputs="models")
    with pytest.raises(InvalidInputError, match="packets are updates"):
        ops.combine_step(packets, [1] * 6, model, ops.Step("sgd"), scales=[1] * 6)


@pytest.mark.parametrize("dtype", ["float32", "float64", "reproducible"])
def test_accumulator_takes_any_packet(dtype):
    packets = clients(10, TOTAL)
    like = split(np.zeros(TOTAL, np.float32))
    one, two = Accumulator(like, dtype), Accumulator(like, dtype)
    for i, packet in enumerate(packets):
        one.add(packet if i % 2 else bytes(packet), weight=1 + i)
        two.add(split(decode(packet)), weight=1 + i)
    assert_same_bits(one.result(), two.result())
    assert one.count == 10 and one.total_weight == 55


def test_accumulator_clips_packets():
    packets = clients(5, 1000)
    like = np.zeros(1000, np.float32)
    one, two = (Accumulator(like, before=Clipping(10.0)) for _ in range(2))
    for packet in packets:
        one.add(packet)
        two.add(decode(packet))
    assert_same_bits(one.result(), two.result())


# ---- increments and a step along their sum -------------------------------------------------------


@pytest.mark.parametrize("kind", ["sgd", "momentum", "adagrad", "adam", "yogi"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("codecs", [["sparse"], ["uniform"], None], ids=["sparse", "dense", "mix"])
def test_control_step_is_the_sum_and_then_the_step(kind, dtype, codecs):
    numel = 70_001
    packets = clients(6, numel, codecs)
    weights = [1, 2, 0, 0.5, 1, 3]
    rng = np.random.default_rng(4)
    h = rng.standard_normal(numel).astype(dtype)
    model = rng.standard_normal(numel).astype(np.float32)
    step = ops.Step(kind, lr=-0.3)
    got = ops.control_step(packets, weights, h, model, step, total=9.5)
    expected_h = h.copy()
    ops.decode.decode_add_into(packets, weights, [expected_h])
    assert_same_bits(got.h, expected_h)
    expected = ops.combine_step([expected_h], [1.0], model, step, divisor=9.5, accumulate=dtype)
    for name in ("model", "m", "v"):
        a, b = getattr(got, name), getattr(expected, name)
        assert (a is None) == (b is None)
        if a is not None:
            assert_same_bits(a, b)
    plain = ops.control_step(packets, weights, h, model, step, total=9.5, variant="reference")
    np.testing.assert_allclose(got.h, plain.h, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got.model, plain.model, rtol=1e-3, atol=1e-4)


def test_control_step_by_hand_and_in_layers():
    h = [np.float32([1, 2]), np.float32([[3]])]
    model = [np.float32([10, 10]), np.float32([[10]])]
    packets = [make("dense", np.float32([1, 0, -1])), make("sparse", np.float32([0, 0, 4]))]
    out, h_out = [np.zeros_like(x) for x in model], [np.zeros_like(x) for x in h]
    got = ops.control_step(
        packets, [1, 0.5], h, model, ops.Step("sgd", lr=-1), total=2, out=out, h_out=h_out
    )
    assert got.h is h_out and got.m is None
    np.testing.assert_array_equal(h_out[0], [2, 2])
    np.testing.assert_array_equal(h_out[1], [[4]])
    np.testing.assert_array_equal(out[0], [9, 9])
    np.testing.assert_array_equal(out[1], [[8]])
    np.testing.assert_array_equal(h[0], [1, 2])  # the old one is as it was
    # in place, and a round in which nobody reports
    again = ops.control_step([], [], h, model, ops.Step("sgd", lr=-1), total=2, out=model, h_out=h)
    np.testing.assert_array_equal(again.h[0], [1, 2])
    np.testing.assert_array_equal(model[0], np.float32([9.5, 9]))
    ops.control_step(packets, [1, 0.5], h, model, ops.Step("sgd", lr=-1), total=2, h_out=h)
    np.testing.assert_array_equal(h[1], [[4]])


def test_control_step_errors_change_nothing():
    numel = 100
    packets = clients(2, numel)
    h, model = np.full(numel, 3e38, np.float32), np.ones(numel, np.float32)
    step = ops.Step("sgd")
    big = [make("dense", np.full(numel, 3e38, np.float32))]
    with pytest.raises(NonFiniteError, match="sum overflows"):
        ops.control_step(big, [1], h, model, step, total=2, h_out=h, out=model)
    assert (h == np.float32(3e38)).all() and (model == 1).all()
    with pytest.raises(DTypeError, match="h: expected layers of float32, or all of float64"):
        ops.control_step(packets, [1, 1], model.astype(np.float16), model, step, total=2)
    with pytest.raises(DTypeError, match="h: expected float64 for a float64 layer"):
        ops.control_step(packets, [1, 1], h, model.astype(np.float64), step, total=2)
    with pytest.raises(InvalidInputError, match="divisor: expected a positive"):
        ops.control_step(packets, [1, 1], h, model, step, total=0)
    with pytest.raises(InvalidInputError, match="h: expected shape"):
        ops.control_step(packets, [1, 1], h[:50], model, step, total=2)
    with pytest.raises(DTypeError, match=r"packets\[0\]: expected a packet, got ndarray"):
        ops.control_step([h], [1], h, model, step, total=2)
    with pytest.raises(InvalidInputError, match="model: holds 90 values"):
        ops.control_step(packets, [1, 1], h[:90], model[:90], step, total=2)
