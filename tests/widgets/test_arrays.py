"""Arrays on their way to a page."""

import base64
import struct
import zlib

import numpy as np
import pytest

from gemmascope.widgets.arrays import LEVELS, MISSING, apart, deflated, packed, png, quantised


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


def test_png_is_the_picture():
    codes = np.array([[0, 127, LEVELS], [MISSING, 0, 0]], np.uint8)
    url = png(codes, ["#ffffff", "#000000"])
    data = base64.b64decode(url.removeprefix("data:image/png;base64,"))
    chunks, at = {}, 8
    while at < len(data):
        length, name = struct.unpack(">I4s", data[at : at + 8])
        chunks[name] = data[at + 8 : at + 8 + length]
        assert zlib.crc32(name + chunks[name]) == struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0]
        at += 12 + length
    assert struct.unpack(">II", chunks[b"IHDR"][:8]) == (3, 2)
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(2, 4)
    palette = np.frombuffer(chunks[b"PLTE"], np.uint8).reshape(256, 3)
    assert (rows[:, 0] == 0).all() and palette[rows[0, 1:], 0].tolist() == [255, 128, 0]
    assert chunks[b"tRNS"][rows[1, 1]] == 0 and set(chunks[b"tRNS"][:MISSING]) == {255}
