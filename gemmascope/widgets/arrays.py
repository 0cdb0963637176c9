"""Arrays on their way to a page: narrow, quantised, and with what is not a number counted."""

import base64
import math
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


def whole(text: str) -> str:
    """A text that UTF-8 can carry: a lone half of a surrogate pair, which a notebook's messages cannot, is spelled."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def packed(value: Any) -> Any:
    """A value as a page takes it: arrays as {"dtype", "shape", "data"} with little-endian bytes of float32, int32 or
    uint8; loose numbers that are not finite as None; texts whole. Lists and mappings are walked."""
    if isinstance(value, str):
        return whole(value)
    if isinstance(value, np.ndarray):
        narrow = value.astype(value.dtype if value.dtype == np.uint8 else _NARROW[value.dtype.kind], copy=False)
        narrow = np.ascontiguousarray(narrow, dtype=narrow.dtype.newbyteorder("<"))
        return {"dtype": narrow.dtype.name, "shape": list(value.shape), "data": narrow.tobytes()}
    if isinstance(value, Mapping):
        return {whole(str(key)): packed(one) for key, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
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
