"""Triton's interpreter made fit for tests: bfloat16 computed right, every access checked against the launch's tensors.

As shipped, TRITON_INTERPRET=1 keeps bfloat16 as uint16 and computes with the bit patterns, cuts instead of rounding
when it makes one, and reads and writes wherever a pointer leads. `install()` mends that: bfloat16 is computed in fp32
and rounded to nearest even; a launch may touch only what lies between the first and the last element of a tensor that
it was given. Needs TRITON_INTERPRET=1 before triton is imported, so what uses this runs in a process of its own.
"""

import numpy as np
import torch
import triton.language as tl
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter


class OutOfBoundsError(IndexError):
    """An active lane of a load or store lies in no tensor of the launch."""


def install() -> None:
    """Mends the interpreter of this process."""
    builder = interpreter.InterpreterBuilder
    builder.create_dot = _dot(builder.create_dot)
    builder.binary_op = _binary(builder.binary_op)
    builder.cast_impl = _cast(builder.cast_impl)
    interpreter._interpreter = _CheckedMemory(interpreter._interpreter)
    interpreter.GridExecutor.__call__ = _launch(interpreter.GridExecutor.__call__)


def _wide(handle):
    """A handle's numbers, bfloat16 as fp32."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle.data
    return (handle.data.astype(np.uint32) << 16).view(np.float32)


def _narrow(numbers):
    """fp32 rounded to nearest even bfloat16, as uint16."""
    bits = np.ascontiguousarray(numbers, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(numbers), np.uint16(0x7FC0), rounded.astype(np.uint16))


def _dot(original):
    def create_dot(self, a, b, d, *rest):
        if tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar):
            return original(self, a, b, d, *rest)
        product = np.matmul(_wide(a), _wide(b), dtype=np.float32)
        return interpreter.TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)

    return create_dot


def dot_in_order(builder, a, b, d, *_):
    """Like create_dot, each sum in the order of k: the bits of a row of numpy's matmul hang on where in a it stands."""
    left, right, total = _wide(a).astype(d.data.dtype), _wide(b).astype(d.data.dtype), d.data.copy()
    for k in range(left.shape[1]):
        total += left[:, k : k + 1] * right[k : k + 1]
    return interpreter.TensorHandle(total, d.dtype.scalar)


def _binary(original):
    def binary_op(self, left, right, op):
        if left.dtype.scalar != tl.bfloat16 or right.dtype.scalar != tl.bfloat16:
            return original(self, left, right, op)
        out = op(_wide(left), _wide(right))
        if out.dtype == np.bool_:
            return interpreter.TensorHandle(out, tl.int1)
        return interpreter.TensorHandle(_narrow(out), tl.bfloat16)

    return binary_op


def _cast(original):
    def cast_impl(self, source, to):
        if tl.bfloat16 not in (source.dtype.scalar, to.scalar) or source.dtype.scalar == to.scalar:
            return original(self, source, to)
        numbers = _wide(source)
        if to.scalar == tl.bfloat16:
            return interpreter.TensorHandle(_narrow(numbers.astype(np.float32)), tl.bfloat16)
        return interpreter.TensorHandle(numbers.astype(interpreter._get_np_dtype(to)), to.scalar)

    return cast_impl


class _CheckedMemory:
    """The interpreter's memory, with a fence around the tensors of the launch that is running."""

    def __init__(self, memory):
        self._memory = memory
        self.extents = None  # of the launch that is running
        self.named = {}  # of tensors whose addresses a kernel reads from memory

    def __getattr__(self, name):
        return getattr(self._memory, name)

    def load(self, pointers, mask, other, dtype):
        self._check("load", pointers, mask, np.dtype(dtype).itemsize)
        return self._memory.load(pointers, mask, other, dtype)

    def store(self, pointers, value, mask):
        self._check("store", pointers, mask, value.dtype.itemsize)
        return self._memory.store(pointers, value, mask)

    def atomic_rmw(self, *_):
        raise AssertionError("the kernels of this project use no atomics: results must repeat")

    def _check(self, what, pointers, mask, size):
        active = np.asarray(pointers, dtype=np.uint64)[
            np.broadcast_to(np.asarray(mask, dtype=bool), np.shape(pointers))
        ]
        extents = (*(self.extents or ()), *self.named.values())
        if not active.size or any(f <= active.min() and active.max() + np.uint64(size) <= e for f, e in extents):
            return  # all in one tensor, as nearly always
        inside = np.zeros(active.shape, dtype=bool)
        for first, end in extents:
            inside |= (active >= first) & (active + np.uint64(size) <= end)
        if not inside.all():
            raise OutOfBoundsError(f"{what}: {int((~inside).sum())} of {active.size} active lanes out of bounds")


def follow(module, name):
    """Lets kernels touch a tensor too that went through `module.name(tensor)`, which makes a number of its address."""
    take = getattr(module, name)

    def address(tensor):
        if tensor is not None and tensor.numel():
            interpreter._interpreter.named[tensor.data_ptr()] = _extent(tensor)
        return take(tensor)

    setattr(module, name, address)


def _extent(tensor):
    """Addresses of a tensor's first byte and of the one behind its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _launch(original):
    def call(self, *args, **kwargs):
        memory = interpreter._interpreter
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        memory.extents = [_extent(tensor) for tensor in tensors if tensor.numel()]
        try:
            return original(self, *args, **kwargs)
        finally:
            memory.extents = None

    return call
