"""Corrections of Triton's interpreter, for tests only.

The interpreter keeps bfloat16 as bit patterns: its matrix product multiplies the
patterns, and its conversion from float32 truncates. Hardware does neither.
"""

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_dot = interpreter.InterpreterBuilder.create_dot
_convert = interpreter._convert_float


def _widened(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    data = (handle.data.astype(np.uint32) << 16).view(np.float32)
    return interpreter.TensorHandle(data, tl.float32)


def _exact_dot(self: Any, a: Any, b: Any, acc: Any, *rest: Any) -> Any:
    return _dot(self, _widened(a), _widened(b), acc, *rest)


def _nearest(data: Any, source: Any, target: Any, rounding: Any) -> Any:
    """Round to nearest, ties to even, as every GPU does by default."""
    if source != tl.float32 or target != tl.bfloat16:
        return _convert(data, source, target, rounding)
    bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
    rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    nan = np.isnan(bits.view(np.float32))
    return np.where(nan, np.uint16(0x7FC0), rounded.astype(np.uint16))


def install(monkeypatch: Any) -> None:
    """Correct the interpreter until the end of the test or fixture."""
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", _exact_dot)
    monkeypatch.setattr(interpreter, "_convert_float", _nearest)
