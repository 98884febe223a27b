"""Whether compressing pays: the formula with given constants, what is measured, errors."""

from __future__ import annotations

import math

import numpy as np
import pytest

from flcore.compression import (
    AbsMax,
    Costs,
    Dense,
    EControl,
    Encoder,
    Sign,
    TopK,
    measure_costs,
    should_compress,
)
from flcore.compression import _should_compress as module
from flcore.errors import DTypeError, InvalidInputError

COSTS = Costs(encode_seconds=2e-9, decode_seconds=1e-9, nbytes=0.5)


def test_formula_by_hand():
    found = should_compress(1_000_000, 1e9, AbsMax(4), costs=COSTS)
    assert found.dense_bytes == 4_000_000 and found.compressed_bytes == 500_000
    assert found.dense_seconds == pytest.approx(4e-3)
    assert (found.encode_seconds, found.decode_seconds) == pytest.approx((2e-3, 1e-3))
    assert found.compressed_seconds == pytest.approx(3.5e-3)
    assert found.compress is True and bool(found) is True
    # 3.5 MB saved for 3 ms of work
    assert found.break_even == pytest.approx(3.5e6 / 3e-3)


@pytest.mark.parametrize("numel", [1, 1000, 10**9])
def test_break_even_is_where_the_answer_turns(numel):
    # one value: a whole byte is sent
    rate = should_compress(numel, 1.0, AbsMax(4), costs=COSTS).break_even
    assert should_compress(numel, rate * 0.999, AbsMax(4), costs=COSTS)
    assert not should_compress(numel, rate * 1.001, AbsMax(4), costs=COSTS)


def test_ends():
    free = Costs(0, 0, 0.5)
    found = should_compress(100, 1e30, AbsMax(4), costs=free)
    assert found and found.break_even == math.inf
    larger = Costs(0, 0, 4.5)
    found = should_compress(100, 1e-3, AbsMax(4), costs=larger)
    assert not found and found.break_even == 0
    same = should_compress(100, 1.0, AbsMax(4), costs=Costs(0, 0, 4))
    assert not same  # a tie: leave it
    # two bytes a value: half of what is saved
    half = should_compress(1_000_000, 1e9, AbsMax(4), value_bytes=2, costs=COSTS)
    assert half.dense_bytes == 2_000_000 and not half


def test_measured_bytes_are_those_of_packets():
    for codec, feedback in ((AbsMax(8), None), (Sign(), EControl()), (TopK(ratio=0.01), None)):
        costs = measure_costs(codec, feedback, 5000)
        x = np.random.default_rng(0).standard_normal(8192, dtype=np.float32)
        sent = Encoder(codec, feedback, like=x, tensor_table=True).encode(x).nbytes
        assert costs.nbytes == pytest.approx(sent / 8192)
        assert costs.encode_seconds > 0 and costs.decode_seconds > 0
        found = should_compress(5000, 1e6, codec, feedback)
        assert found.compressed_bytes == math.ceil(5000 * costs.nbytes)
        assert found.encode_seconds == pytest.approx(5000 * costs.encode_seconds)


def test_measured_once():
    module._measure.cache_clear()
    first = measure_costs(AbsMax(4), None, 3000)
    assert measure_costs(AbsMax(4), None, 4096) is first  # the same sample
    assert measure_costs(AbsMax(4), EControl(), 4096) is not first
    assert measure_costs(AbsMax(4), None, 5000) is not first
    assert module._measure.cache_info().misses == 3


def test_sample_is_limited():
    module._measure.cache_clear()
    large = measure_costs(Sign(), None, 10**9)
    assert measure_costs(Sign()) is large
    found = should_compress(10**9, 1e6, Sign())
    assert found.compressed_bytes == math.ceil(10**9 * large.nbytes)
    assert found and found.dense_seconds == 4000  # an hour against two minutes
    assert not should_compress(10**6, 1e15, Dense("float32"))


def test_errors_name_the_argument():
    for numel in (0, -1, 1.5, True, "3"):
        with pytest.raises(InvalidInputError, match="numel: expected a whole number from 1"):
            should_compress(numel, 1e6, AbsMax(4), costs=COSTS)
    for rate in (0, -1.0, math.nan, math.inf, True, "fast"):
        with pytest.raises(InvalidInputError, match="bytes_per_second: expected a finite positive"):
            should_compress(10, rate, AbsMax(4), costs=COSTS)
    with pytest.raises(InvalidInputError, match="value_bytes"):
        should_compress(10, 1e6, AbsMax(4), value_bytes=0, costs=COSTS)
    with pytest.raises(DTypeError, match="codec: expected a codec such as TopK, got str"):
        should_compress(10, 1e6, "absmax")
    with pytest.raises(DTypeError, match="feedback: expected an error control or None, got float"):
        should_compress(10, 1e6, AbsMax(4), 0.5)
    with pytest.raises(DTypeError, match="costs: expected Costs, got tuple"):
        should_compress(10, 1e6, AbsMax(4), costs=(1, 2, 3))
    for wrong in ((-1e-9, 0, 1), (0, math.nan, 1), (0, 0, math.inf)):
        with pytest.raises(InvalidInputError, match="expected a finite number from 0"):
            Costs(*wrong)
