"""Arrays on their way to a page."""

import base64
import zlib

import numpy as np
import pytest

from gemmascope.widgets.arrays import LEVELS, MISSING, apart, deflated, packed, quantised


@pytest.mark.parametrize("low, high", [(0, 1), (-3, 5), (0, 1e-6)])
def test_codes_are_exact_to_half_a_level(low, high):
    x = np.random.default_rng(0).uniform(low, high, (7, 5)).astype(np.float32)
    back = low + quantised(x, low, high) / LEVELS * (high - low)
    assert np.abs(back - x).max() <= (high - low) / LEVELS / 2 * 1.001
    assert quantised(np.array([low, high], np.float32), low, high).tolist() == [0, LEVELS]


def test_what_is_no_number_is_missing_and_what_is_beyond_is_cut():
    x = np.array([np.nan, np.inf, -np.inf, -9, 9, 0.5])
    assert quantised(x, 0, 1).tolist() == [MISSING, MISSING, MISSING, 0, LEVELS, LEVELS // 2]
    with pytest.raises(ValueError, match="low is 1 and high is 1"):
        quantised(x, 1, 1)


def test_packed_narrows_and_walks():
    value = packed({"x": [np.arange(3, dtype=np.int64), np.ones(2), np.array([True])], "y": np.nan, 3: np.int64(4)})
    assert [one["dtype"] for one in value["x"]] == ["int32", "float32", "uint8"]
    assert value["y"] is None and value["3"] == 4
    plain, buffers = apart(value)
    assert [one["data"] for one in plain["x"]] == [0, 1, 2]
    assert np.frombuffer(buffers[0], "<i4").tolist() == [0, 1, 2]
    text = deflated(value)["x"][0]["data"]
    assert zlib.decompress(base64.b64decode(text)) == buffers[0]
