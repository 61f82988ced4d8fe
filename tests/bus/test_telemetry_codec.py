"""Packed telemetry: lossless where it says so, within its stated error where it rounds, never trusting a header."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from esper.bus.codec import Refused
from esper.bus.telemetry_codec import pack, unpack, unpacked
from esper.messages import Telemetry

buffers = hnp.arrays(np.uint32, hnp.array_shapes(min_dims=3, max_dims=3, min_side=0, max_side=8)).map(lambda bits: bits.view(np.float32))


def message(values: np.ndarray) -> Telemetry:
    ticks, seeds, columns = values.shape
    names = [f"c{number}" for number in range(columns)]
    return Telemetry(site="a", ticks=list(range(ticks)), seeds=seeds, columns=names, data=values.tobytes())


@given(buffers, st.sampled_from(["raw", "delta"]))
def test_every_bit_comes_back_from_raw_and_delta(values, codec):
    sent = message(values)
    assert unpack(pack(sent, codec)).tobytes() == values.tobytes()
    assert unpacked(pack(sent, codec)) == sent


@given(buffers)
def test_rounded_keeps_ten_bits_of_mantissa_and_what_is_not_finite(values):
    packed = pack(message(values), "rounded")
    assert packed.codec == "rounded"
    got = unpack(packed)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(values))
    np.testing.assert_array_equal(np.isinf(got) & ~np.isinf(values) & (np.abs(values) < 3.4e38), False)
    normal = np.isfinite(values) & (np.abs(values) > 1e-37) & (np.abs(values) < 3.4e38)
    assert (np.abs(got[normal] - values[normal]) <= np.abs(values[normal]) * 2.0**-11).all()


def test_rounded_keeps_small_whole_numbers_exactly():
    values = np.arange(2048, dtype=np.float32).reshape(2, 512, 2)
    np.testing.assert_array_equal(unpack(pack(message(values), "rounded")), values)


@pytest.mark.parametrize("codec", ["raw", "delta", "rounded", "unknown"])
@pytest.mark.parametrize("change", [{"seeds": 4}, {"ticks": [1] * 5}, {"seeds": -1}, {"seeds": 1 << 40}, {"data": b""}])
def test_a_buffer_that_is_not_what_its_header_says_is_refused(codec, change):
    sent = message(np.ones((2, 3, 4), np.float32))
    packed = replace(pack(sent, codec) if codec != "unknown" else sent, codec=codec)
    with pytest.raises(Refused):
        unpack(replace(packed, **change))
