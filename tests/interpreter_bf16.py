"""Repair of bfloat16 in Triton's interpreter, for tests.

The interpreter (3.6 to 3.9) keeps bfloat16 as raw 16-bit integers: it computes on the bits, and rounds float32 to
bfloat16 by cutting off. Here every operation goes through float32 and rounds to nearest even, as GPUs do. Not covered:
reductions and atomics on bfloat16 itself, which a kernel must do in float32 anyway.
"""

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def is_bf16(value):
    return isinstance(value, TensorHandle) and value.dtype.scalar == tl.bfloat16


def widen(value):
    if not is_bf16(value):
        return value
    bits = np.asarray(value.data).astype(np.uint32) << 16
    return TensorHandle(bits.view(np.float32), tl.float32)


def narrow(value):
    bits = np.ascontiguousarray(value.data, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    rounded = np.where(np.isnan(value.data), (bits >> 16) | 0x40, rounded)
    return TensorHandle(rounded.astype(np.uint16).reshape(np.shape(value.data)), tl.bfloat16)


def through_float32(method, result_like):
    """The method on widened operands; narrowed again if operand `result_like` was bfloat16 and it is no comparison."""

    def call(self, *args, **kwargs):
        if not any(is_bf16(a) for a in args):
            return method(self, *args, **kwargs)
        result = method(self, *[widen(a) for a in args], **kwargs)
        return result if result.data.dtype == bool or not is_bf16(args[result_like]) else narrow(result)

    return call


def cast(method):
    def call(self, src, dst_type, *rounding):
        if dst_type.scalar == tl.bfloat16 and src.dtype.scalar != tl.bfloat16:
            return narrow(TensorHandle(np.asarray(src.data).astype(np.float32), tl.float32))
        if is_bf16(src) and dst_type.scalar != tl.bfloat16:
            src = widen(src)
            if dst_type.scalar == tl.float32:
                return src
        return method(self, src, dst_type, *rounding)

    return call


RESULT_LIKE = {"binary_op": 0, "unary_op": 0, "create_fma": 2, "create_clampf": 0, "create_dot": 2}


def repair():
    for name, result_like in RESULT_LIKE.items():
        setattr(InterpreterBuilder, name, through_float32(getattr(InterpreterBuilder, name), result_like))
    for name in ("cast_impl", "create_fp_to_fp"):
        setattr(InterpreterBuilder, name, cast(getattr(InterpreterBuilder, name)))
