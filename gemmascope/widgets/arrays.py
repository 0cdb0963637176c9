"""Arrays on their way to a page: narrow, quantised, and with what is not a number counted."""

import base64
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Shaped, UInt8

LEVELS = 254
"""Codes 0 to 254 stand for numbers, evenly spaced from low to high."""
MISSING = 255
"""The code of what is not a number."""
_NARROW = {"f": np.float32, "i": np.int32, "u": np.int32, "b": np.uint8}


def quantised(x: Shaped[np.ndarray, "..."], low: int | float, high: int | float) -> UInt8[np.ndarray, "..."]:
    """Codes of numbers from low to high, a quarter of float32's bytes and exact to half of (high - low) / 254. What is
    beyond is cut; NaN and infinities are MISSING. A reader turns a code back into low + code / 254 * (high - low).

    Raises:
        ValueError: unless low < high.
    """
    if not low < high:
        raise ValueError(f"low is {low} and high is {high}: codes need a range from low up to high.")
    x = np.asarray(x, np.float32)
    there = np.isfinite(x)
    codes = np.clip((np.where(there, x, low) - low) / (high - low), 0, 1) * LEVELS
    return np.where(there, np.rint(codes), MISSING).astype(np.uint8)


def packed(value: Any) -> Any:
    """A value as a page takes it: arrays as {"dtype", "shape", "data"} with little-endian bytes of float32, int32 or
    uint8; loose numbers that are not finite as None. Lists and mappings are walked."""
    if isinstance(value, np.ndarray):
        narrow = value.astype(value.dtype if value.dtype == np.uint8 else _NARROW[value.dtype.kind], copy=False)
        narrow = np.ascontiguousarray(narrow, dtype=narrow.dtype.newbyteorder("<"))
        return {"dtype": narrow.dtype.name, "shape": list(value.shape), "data": narrow.tobytes()}
    if isinstance(value, Mapping):
        return {str(key): packed(one) for key, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [packed(one) for one in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


def apart(value: Any) -> tuple[Any, list[bytes]]:
    """A packed value with the number of its buffer in place of each array's bytes; and the buffers."""
    buffers: list[bytes] = []

    def walked(one: Any) -> Any:
        if isinstance(one, bytes):
            buffers.append(one)
            return len(buffers) - 1
        if isinstance(one, dict):
            return {key: walked(x) for key, x in one.items()}
        return [walked(x) for x in one] if isinstance(one, list) else one

    return walked(value), buffers


def deflated(value: Any) -> Any:
    """A packed value as JSON holds it: bytes deflated, because attention is mostly zeros, then base64."""
    if isinstance(value, bytes):
        return base64.b64encode(zlib.compress(value, 9)).decode("ascii")
    if isinstance(value, dict):
        return {key: deflated(one) for key, one in value.items()}
    return [deflated(one) for one in value] if isinstance(value, list) else value


def png(codes: UInt8[np.ndarray, "row column"], stops: Sequence[str]) -> str:
    """A picture of codes as a data: URL, one pixel a cell, for readers that run no script.

    Args:
        stops: colours "#rrggbb" from the lowest code to the highest; MISSING is left clear.
    """
    rgb = np.array([[int(stop[i : i + 2], 16) for i in (1, 3, 5)] for stop in stops], np.float64)
    places = np.linspace(0, LEVELS, len(stops))
    ramp = np.stack([np.interp(np.arange(256), places, channel) for channel in rgb.T], axis=-1).round()
    palette = ramp.astype(np.uint8).tobytes()
    rows = b"".join(b"\0" + row.tobytes() for row in np.ascontiguousarray(codes))
    parts = {
        b"IHDR": struct.pack(">IIBBBBB", codes.shape[1], codes.shape[0], 8, 3, 0, 0, 0),
        b"PLTE": palette,
        b"tRNS": b"\xff" * MISSING + b"\0",
        b"IDAT": zlib.compress(rows, 9),
        b"IEND": b"",
    }
    chunks = (
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in parts.items()
    )
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(chunks)).decode("ascii")
